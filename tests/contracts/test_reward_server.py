"""The reference reward server: what it takes, what it refuses, and what it counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.reward_servers import serving
from tests.scenarios import brightness
from vmpo.errors import UserError
from vmpo.rewards import load_reward
from vmpo.rewards.png import encode_png
from vmpo.rewards.server import RewardServer

NAN = float("nan")
PNG = encode_png(Image.new("RGB", (4, 3), (255, 0, 0)))
WIDE = encode_png(Image.new("RGB", (5, 3)))
BOMB = encode_png(Image.new("1", (9000, 9000)))


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with serving(brightness, max_bytes=400_000) as found:
        yield found


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"\x80\x04\x95\x0e", 400, "no JSON"),  # the beginning of a pickle
        (b"[1]", 400, "must be a JSON object"),
        (b"[" * 100_000, 400, "no JSON"),
        ({}, 400, "'prompts' must be"),
        ({"prompts": [3], "images": [PNG]}, 400, "'prompts' must be"),
        ({"prompts": ["a", "b"], "images": [PNG]}, 400, "list of 2 pictures"),
        ({"prompts": ["a"], "images": [PNG], "metadata": []}, 400, "list of 1 objects"),
        ({"prompts": ["a"], "images": [PNG], "metadata": ["x"]}, 400, "list of 1 objects"),
        ({"prompts": ["a"], "images": ["no base64!"]}, 400, "picture 0 .*not base64"),
        ({"prompts": ["a"], "images": ["AAAA"]}, 400, "picture 0 .*not a PNG"),
        ({"prompts": ["a"], "images": [PNG[:60]]}, 400, "picture 0 .*not a PNG"),
        ({"prompts": ["a"], "images": [7]}, 400, "picture 0"),
        ({"prompts": ["a"], "images": [BOMB]}, 400, "9000 x 9000 pixels"),
        ({"prompts": ["a", "b"], "images": [PNG, WIDE]}, 400, "one size"),
        (b" " * 400_001, 413, "at most 400000"),
    ],
)
def test_the_server_refuses_what_is_not_its_protocol(
    server: RewardServer, body: Any, status: int, message: str
) -> None:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    reply = httpx2.post(f"{server.url}/score", timeout=5, **sent)
    assert reply.status_code == status
    assert re.search(message, reply.json()["error"]), reply.text


def test_the_server_says_what_it_serves_and_counts(server: RewardServer) -> None:
    with serving(load_reward("jpeg_incompressibility"), "three") as own:
        body = {"prompts": ["prompt 1"] * 2, "images": [PNG] * 2}
        assert len(httpx2.post(f"{own.url}/score", json=body).json()["scores"]) == 2
        health = httpx2.get(f"{own.url}/health").json()
    assert (health["reward"], health["scored"], health["failed"]) == ("three", 2, 0)
    assert health["version"].startswith("vmpo")
    assert httpx2.get(f"{server.url}/score").status_code == 404
    assert httpx2.post(f"{server.url}/", content=b"{}").status_code == 404


def test_failures_of_the_reward_are_null_and_counted() -> None:
    def broken(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if prompts[0] == "raise":
            raise RuntimeError("out of memory")
        return torch.tensor([0.5, NAN, -math.inf])

    with serving(broken) as own:
        body = {"prompts": ["a"] * 3, "images": [PNG] * 3}
        assert httpx2.post(f"{own.url}/score", json=body).json() == {"scores": [0.5, None, None]}
        body["prompts"] = ["raise"] * 3
        assert httpx2.post(f"{own.url}/score", json=body).json() == {"scores": [None] * 3}
        assert (own.service.scored, own.service.failed) == (1, 5)


def test_an_address_in_use_is_one_line(server: RewardServer) -> None:
    with pytest.raises(UserError, match=r"cannot serve at 127.0.0.1:\d+: Address already in use; choose another"):
        RewardServer(server.service, "127.0.0.1", int(server.server_address[1]))
