"""What holds for every reward: the interface, the guards around it, names and sums."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.rewards import BUILT_IN, combine, load_reward, score_images

NAN = float("nan")
IMAGES = torch.rand(3, 3, 24, 64, generator=torch.Generator().manual_seed(2))
PROMPTS = ['"AB"', '"CD"', '"EF"']
METADATA: list[dict[str, Any]] = [{}, {}, {}]


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.mean((1, 2, 3))


# every built-in reward


# a server or weights of their own: test_remote_rewards.py, test_judge.py, test_deqa.py, test_network_rewards.py
ELSEWHERE = {"remote", "vlm_judge", "unified_reward", "deqa"}
ELSEWHERE |= {"hpsv2", "pick_score", "clip_score", "aesthetic", "image_reward"}


@pytest.mark.parametrize("name", sorted(BUILT_IN.keys() - ELSEWHERE))
def test_built_in_rewards_keep_the_contract(name: str) -> None:
    if name.startswith("ocr"):
        pytest.importorskip("rapidocr")
    reward = load_reward(name)
    assert isinstance(reward.range, str)
    assert reward.range
    assert isinstance(reward.differentiable, bool)
    before = IMAGES.clone()
    scores = score_images({name: reward}, IMAGES, PROMPTS, METADATA)[name]
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(IMAGES, before)
    again = reward(IMAGES.flip(0), PROMPTS[::-1], METADATA)
    torch.testing.assert_close(again.flip(0), scores, rtol=1e-3, atol=1e-3)  # a score depends on its sample alone
    broken = IMAGES.clone()
    broken[1] = torch.nan
    assert score_images({name: reward}, broken, PROMPTS, METADATA)[name].isnan().tolist() == [False, True, False]


# guards


def test_scores_pass_through_unchanged() -> None:
    assert torch.equal(score_images({"b": brightness}, IMAGES, PROMPTS, METADATA)["b"], IMAGES.mean((1, 2, 3)))


def test_an_exception_is_nan_for_the_batch_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def broken(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        calls.append(1)
        raise RuntimeError(f"server gone after {len(calls)} calls")

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            scores = score_images({"remote-1": broken, "b": brightness}, IMAGES, PROMPTS, METADATA)
    assert scores["remote-1"].isnan().all()
    assert scores["remote-1"].shape == (3,)
    assert scores["b"].isfinite().all()
    lines = [record.getMessage() for record in caplog.records if "remote-1" in record.getMessage()]
    assert len(lines) == 1
    assert "server gone" in lines[0]


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_a_non_finite_score_is_nan_for_its_sample_only(bad: float) -> None:
    scores = score_images({"r": lambda *_: torch.tensor([1.5, bad, 0.0])}, IMAGES, PROMPTS, METADATA)["r"]
    torch.testing.assert_close(scores, torch.tensor([1.5, NAN, 0.0]), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (), (1, 3)])
def test_a_wrong_shape_stops_and_names_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as error:
        score_images({"mine": lambda *_: torch.zeros(shape)}, IMAGES, PROMPTS, METADATA)
    assert all(text in str(error.value) for text in ("mine", str(shape), "(3,)"))


@pytest.mark.parametrize("result", [0.5, [0.1, 0.2, 0.3], None, torch.zeros(3, dtype=torch.complex64)])
def test_a_result_that_is_no_real_tensor_stops(result: object) -> None:
    with pytest.raises(UserError, match=r"'mine' returned a .*float tensor of shape"):
        score_images({"mine": lambda *_: result}, IMAGES, PROMPTS, METADATA)  # type: ignore[dict-item, return-value]


def test_low_precision_and_integer_scores_become_float32_and_double_stays() -> None:
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.int64, torch.float32), (torch.float64,) * 2]:
        scores = score_images({"r": lambda *_, d=dtype: torch.ones(3, dtype=d)}, IMAGES, PROMPTS, METADATA)["r"]
        assert scores.dtype == expected


def test_a_user_error_of_a_reward_stops() -> None:
    pytest.importorskip("rapidocr")
    with pytest.raises(UserError, match="no quotes here"):
        score_images({"ocr": load_reward("ocr")}, IMAGES[:1], ["no quotes here"], METADATA[:1])


def test_mismatched_inputs_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 images, 2 prompts"):
        score_images({}, IMAGES, PROMPTS[:2], METADATA)
    with pytest.raises(ValueError, match="must be"):
        score_images({}, IMAGES[0], PROMPTS, METADATA)


# sums

GROUP = torch.tensor([7, 7, 3, 7, 3])
A = torch.tensor([1.0, 2.0, 5.0, 6.0, 9.0], dtype=torch.float64)
B = torch.tensor([10.0, 30.0, -20.0, NAN, 40.0], dtype=torch.float64)


def test_one_reward_of_weight_one_is_unchanged() -> None:
    scores = torch.tensor([0.1, NAN, -3.7])
    assert torch.equal(combine({"a": scores}, {"a": 1.0}, torch.zeros(3)).nan_to_num(9), scores.nan_to_num(9))


def test_sum_is_weighted_and_nan_spreads() -> None:
    total = combine({"a": A, "b": B}, {"a": 0.3, "b": -2.0}, GROUP, "sum")
    torch.testing.assert_close(total, 0.3 * A - 2.0 * B, equal_nan=True)
    assert total.isnan().tolist() == [False, False, False, True, False]


def test_a_watched_reward_does_not_count() -> None:
    assert torch.equal(combine({"a": A, "b": B}, {"a": 0.3, "b": 0.0}, GROUP), 0.3 * A)
    assert torch.equal(combine({"a": A, "b": B}, {"a": 0.3}, GROUP), 0.3 * A)


def test_group_normalisation_by_hand() -> None:
    total = combine({"a": A, "b": B}, {"a": 0.3, "b": -2.0}, GROUP, "group_normalised")
    expected = torch.full((5,), NAN, dtype=torch.float64)
    std_a = {7: (14 / 3) ** 0.5, 3: 2.0}  # of (1, 2, 6) and (5, 9)
    std_b = {7: 10.0, 3: 30.0}  # of (10, 30) without the failed one, and (-20, 40)
    mean_a, mean_b = {7: 3.0, 3: 7.0}, {7: 20.0, 3: 10.0}
    for i in (0, 1, 2, 4):
        g = int(GROUP[i])
        expected[i] = 0.3 * (A[i] - mean_a[g]) / (std_a[g] + 1e-4) - 2.0 * (B[i] - mean_b[g]) / (std_b[g] + 1e-4)
    torch.testing.assert_close(total, expected, equal_nan=True, rtol=1e-12, atol=1e-12)


def test_group_normalisation_of_a_constant_or_failed_group() -> None:
    scores = torch.tensor([2.5, 2.5, NAN, NAN, 4.0])
    total = combine({"a": scores}, {"a": 3.0}, torch.tensor([0, 0, 1, 1, 2]), "group_normalised")
    torch.testing.assert_close(total, torch.tensor([0.0, 0.0, NAN, NAN, 0.0]), equal_nan=True)


@pytest.mark.parametrize(
    ("weights", "how", "message"),
    [
        ({"brightnes": 1.0}, "sum", "did you mean 'brightness'"),
        ({"brightness": NAN}, "sum", "must be finite"),
        ({"brightness": 0.0}, "sum", "other than 0"),
        ({}, "sum", "other than 0"),
        ({"brightness": 1.0}, "mean", "not by 'mean'"),
    ],
)
def test_bad_weights_are_user_errors(weights: dict[str, float], how: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        combine({"brightness": A}, weights, GROUP, how)


# names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def write(folder: Path, module: str, text: str) -> None:
    folder.joinpath(f"{module}.py").write_text(text)


def test_own_functions_and_classes_are_loaded(folder: Path) -> None:
    write(
        folder,
        "own_rewards_a",
        "import torch\n"
        "def redness(images, prompts, metadata, gain=1.0):\n    return gain * images[:, 0].mean((1, 2))\n"
        "redness.differentiable = True\n"
        "class Offset:\n"
        "    range = 'any'\n    differentiable = False\n"
        "    def __init__(self, by):\n        self.by = by\n"
        "    def __call__(self, images, prompts, metadata):\n        return torch.full((len(images),), self.by)\n",
    )
    redness = load_reward("own_rewards_a:redness")
    torch.testing.assert_close(redness(IMAGES, PROMPTS, METADATA), IMAGES[:, 0].mean((1, 2)))
    assert redness.range == "unknown"
    assert redness.differentiable is True
    louder = load_reward("own_rewards_a:redness", {"gain": 2.5})
    torch.testing.assert_close(louder(IMAGES, PROMPTS, METADATA), 2.5 * IMAGES[:, 0].mean((1, 2)))
    assert louder.differentiable is True
    offset = load_reward("own_rewards_a:Offset", {"by": 0.25})
    assert offset.range == "any"
    assert offset(IMAGES, PROMPTS, METADATA).tolist() == [0.25] * 3


def test_options_reach_built_in_rewards() -> None:
    small = load_reward("jpeg_compressibility", {"scale": 500})(IMAGES, PROMPTS, METADATA)
    torch.testing.assert_close(small * 500, load_reward("jpeg_compressibility")(IMAGES, PROMPTS, METADATA))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jpeg_compresibility", {}, "did you mean 'jpeg_compressibility'"),
        ("zzz", {}, "unknown reward 'zzz'; Built in are ocr"),
        ("jpeg_compressibility", {"scal": 2}, "'scal'.*its options are: scale"),
        ("no_such_module_x:f", {}, "no module 'no_such_module_x'"),
        ("own_rewards_b:brigthness", {}, "has no 'brigthness'; did you mean 'brightness'"),
        ("own_rewards_b:two", {}, "cannot be called as"),
        ("own_rewards_b:brightness", {"gain": 2}, "cannot be called as"),
        ("own_rewards_b:NUMBER", {}, "is a int"),
        ("own_rewards_c:f", {}, "importing 'own_rewards_c' failed: ZeroDivisionError"),
        ("own_rewards_d:f", {}, "'own_rewards_d' needs the missing package 'no_such_package_y'"),
        ("own_rewards_e:f", {}, "importing 'own_rewards_e' failed: SyntaxError"),
        ("folder/rewards.py:f", {}, "is not of the form 'module:function'"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(
    folder: Path, name: str, options: dict[str, Any], message: str
) -> None:
    write(
        folder,
        "own_rewards_b",
        "NUMBER = 4\ndef brightness(images, prompts, metadata):\n    pass\ndef two(a, b):\n    pass\n",
    )
    write(folder, "own_rewards_c", "1 / 0\n")
    write(folder, "own_rewards_d", "import no_such_package_y\n")
    write(folder, "own_rewards_e", "def f(:\n")
    with pytest.raises(UserError, match=message) as error:
        load_reward(name, options)
    assert "\n" not in str(error.value)
