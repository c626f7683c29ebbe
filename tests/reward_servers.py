"""Servers for tests: one that fails in every way a reward server can, and one that answers like a chat model."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vmpo.rewards.server import RewardServer
from vmpo.rewards.service import RewardService

HANG = 3.0  # seconds; beyond every time limit of the tests
FAULTS = [
    "closed",
    "slow",
    "dripping",
    "cut",
    "500",
    "404",
    "redirect",
    "nan",
    "null",
    "too few",
    "too many",
    "no list",
    "text scores",
    "true scores",
    "giant number",
    "not json",
    "html",
    "deep json",
    "not utf-8",
    "huge body",
    "no http",
]


def redness(encoded: str) -> float:
    """Ten times the mean of the red channel, as `tests.scenarios.brightness`, of a base64 PNG."""
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))
    return float(10 * pixels[..., 0].mean() / 255)


@contextmanager
def serving(reward: Callable[..., Tensor], name: str = "mine", **settings: Any) -> Iterator[RewardServer]:
    """The reference server with a reward, in a thread."""
    service = RewardService(name, reward, batch=settings.pop("batch", 16))  # type: ignore[arg-type]
    server = RewardServer(service, "127.0.0.1", 0, **settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Server:
    """Serves `answer(request, number) -> (status, body)` on a free port; bodies may be bytes, a JSON value or a fault.

    Requests to /score and /chat/completions are numbered from 0 in `requests`; all else is 404.
    """

    def __init__(self, answer: Callable[[dict[str, Any], int], Any]) -> None:
        self.answer, self.requests, self.times = answer, list[dict[str, Any]](), list[float]()
        self.headers: list[dict[str, str]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_error(404)

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self.path.endswith(("/score", "/chat/completions")):
                    self.send_error(404)
                    return
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append(request)
                    outer.times.append(time.monotonic())
                    outer.headers.append(dict(self.headers))
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                try:
                    self.reply(outer.answer(request, number), request)
                except OSError:  # the client gave up
                    pass
                finally:
                    with outer.lock:
                        outer.busy -= 1

            def reply(self, found: Any, request: dict[str, Any]) -> None:
                if isinstance(found, str):
                    fault(self, found, len(request.get("images", [0])))
                    return
                send(self, 200, json.dumps(found).encode())

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, data: bytes, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)


def fault(handler: BaseHTTPRequestHandler, name: str, count: int) -> None:
    """One of `FAULTS`, in reply to a request for `count` scores."""
    ones = [1.0] * count
    replies: dict[str, bytes] = {
        "nan": json.dumps({"scores": [float("nan")] * count}).encode(),
        "null": json.dumps({"scores": [None] * count}).encode(),
        "too few": json.dumps({"scores": ones[1:]}).encode(),
        "too many": json.dumps({"scores": [*ones, 1.0]}).encode(),
        "no list": json.dumps({"score": ones}).encode(),
        "text scores": json.dumps({"scores": ["1.0"] * count}).encode(),
        "true scores": json.dumps({"scores": [True] * count}).encode(),
        "giant number": b'{"scores": [' + b",".join([b"1" + b"0" * 400] * count) + b"]}",
        "not json": b'{"scores": [0.5, ',
        "html": b"<html><body>busy\n\x1b[31m</body></html>",
        "deep json": b"[" * 100_000,
        "not utf-8": b'{"scores": "\xff\xfe\xfa"}',
    }
    if name in replies:
        send(handler, 200, replies[name])
    elif name in ("500", "404"):
        send(handler, int(name), b'{"error": "the scorer is out of order"}')
    elif name == "redirect":
        handler.send_response(302)
        handler.send_header("Location", "http://127.0.0.1:9/score")
        handler.end_headers()
    elif name == "slow":
        time.sleep(HANG)
        send(handler, 200, json.dumps({"scores": ones}).encode())
    elif name == "dripping":  # never silent for as long as a time limit between two bytes
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(int(HANG / 0.05)):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    elif name == "cut":
        send(handler, 200, b'{"scores": [', length=1000)
    elif name == "huge body":
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b" " * 2**20)
    elif name == "no http":
        handler.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")
    elif name != "closed":
        raise AssertionError(name)
