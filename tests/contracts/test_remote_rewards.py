"""Rewards behind HTTP: the scores arrive as they are, every way to fail is NaN or a stop, and nothing hangs."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.reward_servers import FAULTS, HANG, Server, redness, serving
from vmpo.errors import UserError
from vmpo.rewards import load_reward, scoring
from vmpo.rewards.png import decode_png, encode_png

NAN = float("nan")
IMAGES = torch.rand(7, 3, 12, 20, generator=torch.Generator().manual_seed(5))
PROMPTS = [f"prompt {i}" for i in range(7)]
METADATA: list[dict[str, Any]] = [{"shift": 100.0 * i} for i in range(7)]
QUICK = {"timeout": 0.4, "deadline": 2.0, "retries": 0, "backoff": 0.01}


@pytest.fixture(autouse=True)
def _nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_logged", set())


def shifted_redness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Depends on picture, prompt and metadata, so that a mix-up of any shows."""
    own = torch.tensor([m["shift"] + 1000.0 * int(p.split()[1]) for p, m in zip(prompts, metadata, strict=True)])
    return own + 10 * images[:, 0].mean((1, 2))


def right(request: dict[str, Any], number: int) -> dict[str, Any]:
    return {"scores": [redness(text) for text in request["images"]]}


def remote(url: str | list[str], **options: Any) -> Any:
    return load_reward("remote", {"endpoints": url, **QUICK, **options})


def local(images: Tensor = IMAGES) -> Tensor:
    return 10 * ((images[:, 0] * 255).round() / 255).mean((1, 2))


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_pictures_survive_the_journey_to_the_last_bit() -> None:
    pixels = torch.randint(0, 256, (3, 9, 14), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    text = encode_png(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    assert torch.equal((decode_png(text) * 255).round().to(torch.uint8), pixels)


@pytest.mark.parametrize(("batch", "server_batch"), [(3, 16), (16, 2), (1, 1)])
def test_scores_are_those_of_the_reward_itself(batch: int, server_batch: int) -> None:
    eight_bits = (IMAGES * 255).round() / 255
    with serving(shifted_redness, batch=server_batch) as server:
        found = remote(server.url, batch=batch)(IMAGES, PROMPTS, METADATA)
        jpeg = load_reward("jpeg_incompressibility")
    torch.testing.assert_close(found, shifted_redness(eight_bits, PROMPTS, METADATA), rtol=1e-6, atol=0)
    with serving(jpeg) as server:
        assert torch.equal(remote(server.url)(IMAGES, PROMPTS, METADATA), jpeg(IMAGES, PROMPTS, METADATA))


def test_a_broken_picture_is_not_sent() -> None:
    images = IMAGES.clone()
    images[2, 1, 3, 3] = NAN
    images[5, 0, 0, 0] = math.inf
    with Server(right) as server:
        scores = remote(server.url, batch=2, on_failure="stop")(images, PROMPTS, METADATA)
    assert scores.isnan().tolist() == [i in (2, 5) for i in range(7)]
    torch.testing.assert_close(scores[[0, 1, 3, 4, 6]], local()[[0, 1, 3, 4, 6]], rtol=1e-6, atol=0)
    assert sum(len(request["images"]) for request in server.requests) == 5


def test_a_score_that_is_null_is_nan_for_its_picture_only() -> None:
    def some(request: dict[str, Any], number: int) -> dict[str, Any]:
        return {"scores": [None, NAN, 0.5, -1, 1e300, 0, 2]}

    with Server(some) as server:
        scores = scoring.score_images({"r": remote(server.url)}, IMAGES, PROMPTS, METADATA)["r"]
    torch.testing.assert_close(
        scores, torch.tensor([NAN, NAN, 0.5, -1.0, NAN, 0.0, 2.0]), equal_nan=True, rtol=0, atol=0
    )


def test_it_works_inside_a_running_event_loop() -> None:
    async def notebook_cell(url: str) -> Tensor:
        return remote(url)(IMAGES, PROMPTS, METADATA)

    with Server(right) as server:
        torch.testing.assert_close(asyncio.run(notebook_cell(server.url)), local(), rtol=1e-6, atol=0)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_nan_for_its_batch_and_said_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    def second_batch_fails(request: dict[str, Any], number: int) -> Any:
        return name if "prompt 2" in request["prompts"] else right(request, number)

    began = time.monotonic()
    with Server(second_batch_fails) as server, caplog.at_level(logging.WARNING):
        reward = remote(server.url, batch=2)
        for _ in range(2):
            scores = scoring.score_images({"r": reward}, IMAGES, PROMPTS, METADATA)["r"]
    assert scores.isnan().tolist() == [i in (2, 3) for i in range(7)]
    torch.testing.assert_close(scores.nan_to_num(0), local() * ~scores.isnan(), rtol=1e-6, atol=0)
    assert time.monotonic() - began < 2 * HANG
    said = [r.getMessage() for r in caplog.records if server.url in r.getMessage()]
    assert len(said) == 1, said
    assert said[0].isprintable()
    assert len(said[0]) < 500


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_stops_where_that_is_asked_for(name: str) -> None:
    with (
        Server(lambda request, number: name) as server,
        pytest.raises(UserError, match="on_failure is 'stop'") as error,
    ):
        scoring.score_images({"r": remote(server.url, on_failure="stop")}, IMAGES, PROMPTS, METADATA)
    assert server.url in str(error.value)
    assert str(error.value).isprintable()


def test_a_server_that_is_not_there_is_nan_or_a_stop() -> None:
    with Server(right) as server:
        pass
    assert remote(server.url)(IMAGES, PROMPTS, METADATA).isnan().all()
    with pytest.raises(UserError, match=r"attempts failed \(3 tries\)"):
        remote(server.url, on_failure="stop", retries=2)(IMAGES, PROMPTS, METADATA)


def test_stop_does_not_wait_for_the_other_requests() -> None:
    def first_fails(request: dict[str, Any], number: int) -> Any:
        return "500" if "prompt 0" in request["prompts"] else "slow"

    began = time.monotonic()
    with Server(first_fails) as server, pytest.raises(UserError, match="status 500: the scorer is out of order"):
        remote(server.url, batch=1, timeout=10, deadline=10, on_failure="stop")(IMAGES, PROMPTS, METADATA)
    assert time.monotonic() - began < HANG + 1  # closing the server waits for nobody


def test_the_deadline_holds_for_all_requests_together() -> None:
    def slow_but_in_time(request: dict[str, Any], number: int) -> dict[str, Any]:
        time.sleep(0.3)
        return right(request, number)

    with Server(slow_but_in_time) as server:
        began = time.monotonic()
        reward = remote(server.url, batch=1, concurrency=1, timeout=10, deadline=1.0)
        scores = reward(IMAGES, PROMPTS, METADATA)
        assert time.monotonic() - began < 2.0
    done = int(scores.isfinite().sum())
    assert 1 <= done <= 3
    torch.testing.assert_close(scores[:done], local()[:done], rtol=1e-6, atol=0)


def test_retries_bring_the_scores_and_wait_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[tuple[float, float]] = []
    monkeypatch.setattr("random.uniform", lambda a, b: factors.append((a, b)) or 1.0)

    with Server(lambda request, number: right(request, number) if number == 3 else "500") as server:
        scores = remote(server.url, retries=3, backoff=0.1, deadline=5)(IMAGES, PROMPTS, METADATA)
    torch.testing.assert_close(scores, local(), rtol=1e-6, atol=0)
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert [gap == pytest.approx(want, abs=0.09) for gap, want in zip(gaps, [0.1, 0.2, 0.4], strict=True)] == [True] * 3
    assert factors == [(0.5, 1.5)] * 3, "the waits are spread at random"


@pytest.mark.parametrize(("name", "tries"), [("404", 1), ("500", 3), ("not json", 3), ("too few", 3)])
def test_what_another_try_cannot_mend_is_not_tried_again(name: str, tries: int) -> None:
    with Server(lambda request, number: name) as server:
        assert remote(server.url, retries=2)(IMAGES, PROMPTS, METADATA).isnan().all()
    assert len(server.requests) == tries


# --- several servers --------------------------------------------------------------------------------------------------


def test_what_cannot_be_sent_is_a_failure_like_any_other() -> None:
    metadata = [*METADATA[:6], {"shift": torch.zeros(1)}]
    with Server(right) as server:
        assert remote(server.url, batch=6)(IMAGES, PROMPTS, metadata).isnan().tolist() == [False] * 6 + [True]
        with pytest.raises(UserError, match="Tensor is not JSON serializable"):
            remote(server.url, batch=6, on_failure="stop")(IMAGES, PROMPTS, metadata)


def test_a_dead_server_costs_nothing_while_another_lives() -> None:
    with Server(right) as dead:
        pass
    with Server(right) as living:
        reward = remote([dead.url, living.url], batch=1, retries=1, backoff=5, concurrency=2, on_failure="stop")
        began = time.monotonic()
        scores = reward(IMAGES, PROMPTS, METADATA)
    assert time.monotonic() - began < 2, "no wait before the other server is asked"
    torch.testing.assert_close(scores, local(), rtol=1e-6, atol=0)
    assert len(living.requests) == 7


def test_load_is_shared_and_concurrency_kept() -> None:
    def patient(request: dict[str, Any], number: int) -> dict[str, Any]:
        time.sleep(0.05)
        return right(request, number)

    images = IMAGES.repeat(4, 1, 1, 1)
    with Server(patient) as one, Server(patient) as two:
        reward = remote([one.url, two.url], batch=1, concurrency=4)
        scores = reward(images, PROMPTS * 4, METADATA * 4)
    torch.testing.assert_close(scores, local(images), rtol=1e-6, atol=0)
    assert [len(server.requests) for server in (one, two)] == [14, 14]
    assert max(one.most_busy, two.most_busy) == 2


# --- before a run -----------------------------------------------------------------------------------------------------


def test_a_token_lets_in_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "secret-7")
    monkeypatch.setenv("OTHER_TOKEN", "wrong-7")
    with serving(shifted_redness, token="secret-7") as server:
        own = remote(server.url, key_env="REWARD_TOKEN", on_failure="stop")
        own.check_prompts(PROMPTS)
        assert own(IMAGES, PROMPTS, METADATA).isfinite().all()
        for options in ({}, {"key_env": "OTHER_TOKEN"}):
            with pytest.raises(UserError, match="status 401: this server asks for a token") as error:
                remote(server.url, on_failure="stop", **options)(IMAGES, PROMPTS, METADATA)
            assert "-7" not in str(error.value)
    monkeypatch.delenv("REWARD_TOKEN")
    with pytest.raises(UserError, match=r"'REWARD_TOKEN' \(key_env\) is not set"):
        remote(server.url, key_env="REWARD_TOKEN")


class Quoted:
    range, differentiable = "[0, 1]", False

    def check_prompts(self, prompts: list[str]) -> None:
        for prompt in prompts:
            if '"' not in prompt:
                raise UserError(f"no quotes in: {prompt}")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.check_prompts(prompts)
        return images.mean((1, 2, 3))


def test_prompts_are_checked_by_the_server_before_a_run() -> None:
    with serving(Quoted()) as server:
        reward = remote(server.url)
        reward.check_prompts(['a "word"'])
        with pytest.raises(UserError, match="status 422: no quotes in: prompt 3"):
            reward.check_prompts(['a "word"', "prompt 3"])
        assert reward(IMAGES, PROMPTS, METADATA).isnan().all()
    with Server(right) as foreign:  # neither /health nor /check
        remote(foreign.url).check_prompts(PROMPTS)
    with pytest.raises(UserError, match=r"no reward server answers: .*'vmpo serve-reward NAME'"):
        remote(foreign.url).check_prompts(PROMPTS)
    with serving(Quoted()) as server:
        remote([foreign.url, server.url]).check_prompts(['one "lives"'])


def test_servers_of_one_reward_must_serve_the_same() -> None:
    with serving(Quoted(), "one") as first, serving(Quoted(), "other") as second:
        reward = remote([first.url, second.url])
        with pytest.raises(UserError, match=r"must serve the same, but: .*one.*other"):
            reward.check_prompts(['"x"'])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoints": []}, "endpoints is empty"),
        ({"endpoints": "127.0.0.1:80"}, "'127.0.0.1:80' is no address"),
        ({"endpoints": "http://x", "timeout": 0}, "timeout=0"),
        ({"endpoints": "http://x", "deadline": math.inf}, "deadline=inf"),
        ({"endpoints": "http://x", "retries": -1}, "retries=-1"),
        ({"endpoints": "http://x", "concurrency": 0}, "concurrency=0"),
        ({"endpoints": "http://x", "batch": 0}, "batch=0"),
        ({"endpoints": "http://x", "on_failure": "skip"}, "must be 'mask' or 'stop'"),
        ({"endpoints": "http://x", "on_fail": "stop"}, "its options are: endpoints, timeout"),
        ({}, "'endpoints'.*its options are: endpoints, timeout"),
    ],
)
def test_options_that_cannot_be_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward("remote", options)
