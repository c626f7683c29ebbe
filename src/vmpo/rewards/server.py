"""The reference reward server: any reward behind JSON over HTTP, on the standard library alone.

Requests are taken by threads, pictures are scored by one at a time: a network is not asked by two. The protocol is
that of `vmpo.rewards.remote`; nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import hmac
import json
import logging
import signal
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vmpo.errors import UserError
from vmpo.rewards.service import RefusedError, RewardService

logger = logging.getLogger(__name__)

IDLE = 30.0  # seconds without a byte after which a client is given up


class RewardServer(ThreadingHTTPServer):
    """Serves one reward until it is told to stop; requests under way are then finished."""

    daemon_threads = False  # server_close waits for the requests under way
    request_queue_size = 128

    def __init__(
        self, service: RewardService, host: str, port: int, *, max_bytes: int = 2**28, token: str | None = None
    ) -> None:
        """
        Arguments:
            host, port: the address; port 0 takes a free one.
            max_bytes: the largest request.
            token: what requests but /health must bear; None: nothing.

        Raises:
            UserError: if the address cannot be used.
        """
        self.service, self.max_bytes, self.token = service, max_bytes, token
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot serve at {host}:{port}: {reason}; choose another --host or --port") from error

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def serve_until_stopped(self) -> None:
        """Serves until SIGTERM or SIGINT; called from the main thread."""

        def stop(number: int, frame: object) -> None:
            threading.Thread(target=self.shutdown).start()  # it waits for the loop that this handler interrupts

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        with self:
            self.serve_forever(poll_interval=0.2)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error of ours."""
        logger.debug("a request of %s broke off", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = IDLE

    def do_GET(self) -> None:
        self._answer({"/health": self.server.service.health})

    def do_POST(self) -> None:
        service = self.server.service
        self._answer(
            {"/score": lambda: service.score(self._request()), "/check": lambda: service.check(self._request())}
        )

    def _answer(self, routes: dict[str, Callable[[], dict[str, Any]]]) -> None:
        try:
            if self.path not in routes:
                raise RefusedError(
                    404, f"there is no {self.command} {self.path}; there are GET /health, POST /score, /check"
                )
            if self.path != "/health":
                self._let_in()
            status, reply = 200, routes[self.path]()
        except RefusedError as error:
            status, reply = error.status, {"error": str(error)}
        except OSError:  # the client is gone or silent
            raise
        except Exception as error:  # a reward's own failures are null scores; this is ours
            logger.exception("request failed")
            status, reply = 500, {"error": f"{type(error).__name__}: {error}"}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _let_in(self) -> None:
        token = self.server.token
        given = self.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RefusedError(401, "this server asks for a token (Authorization: Bearer ...)")

    def _request(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RefusedError(411, "a request needs its Content-Length")
        if int(length) > self.server.max_bytes:
            raise RefusedError(413, f"the request has {length} bytes; at most {self.server.max_bytes} are taken")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"the request is no JSON: {error}") from error
        if not isinstance(request, dict):
            raise RefusedError(400, "the request must be a JSON object")
        return request

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)
