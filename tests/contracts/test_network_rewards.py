"""What holds for every reward of a frozen network, on small checkpoints in the published formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from tests.golden.scorer_checkpoints import SCORERS, write_checkpoint
from vmpo.errors import UserError
from vmpo.rewards import load_reward, score_images

torch.set_num_threads(1)
PROMPTS = ["a photo of a cat", "the tower in the snow", "a photo of a cat"]
METADATA: list[dict[str, Any]] = [{}, {}, {}]
HOMES = {
    "hpsv2": "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir DIR",
    "pick_score": "hf download yuvalkirstain/PickScore_v1 --local-dir DIR",
    "clip_score": "hf download openai/clip-vit-large-patch14 --local-dir DIR",
    "aesthetic": "hf download openai/clip-vit-large-patch14 --local-dir DIR",
    "image_reward": "hf download THUDM/ImageReward ImageReward.pt --local-dir DIR",
}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {scorer: write_checkpoint(scorer, tmp_path_factory.mktemp(scorer)) for scorer in SCORERS}


def images(num: int = 3, height: int = 60, width: int = 84) -> Tensor:
    """Smooth pictures away from black and white, where nothing is clamped."""
    coarse = torch.rand(num, 3, 5, 7, generator=torch.Generator().manual_seed(4)) * 0.5 + 0.25
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


@pytest.fixture(params=SCORERS)
def scorer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_contract_of_rewards(scorer: str, options: dict[str, dict[str, Any]]) -> None:
    reward = load_reward(scorer, options[scorer])
    assert reward.differentiable is True
    assert reward.range
    pictures = images()
    before = pictures.clone()
    scores = score_images({scorer: reward}, pictures, PROMPTS, METADATA)[scorer]
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert len(set(scores.tolist())) == 3
    assert torch.equal(pictures, before)
    again = reward(pictures.flip(0), PROMPTS[::-1], METADATA)
    torch.testing.assert_close(again.flip(0), scores, rtol=1e-4, atol=1e-5)
    pictures[1, 0, 0, 0] = torch.nan
    broken = reward(pictures, PROMPTS, METADATA)
    torch.testing.assert_close(
        broken, torch.where(torch.tensor([False, True, False]), torch.nan, scores), equal_nan=True
    )


def test_scores_do_not_depend_on_the_batch(scorer: str, options: dict[str, dict[str, Any]]) -> None:
    whole = load_reward(scorer, options[scorer])(images(), PROMPTS, METADATA)
    parts = load_reward(scorer, {**options[scorer], "batch": 2})(images(), PROMPTS, METADATA)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_no_graph_without_a_wish_for_one(scorer: str, options: dict[str, dict[str, Any]]) -> None:
    reward: Any = load_reward(scorer, options[scorer])
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())
    assert not reward.network.training
    assert not reward(images(), PROMPTS, METADATA).requires_grad
    with torch.no_grad():  # then the published path too
        wanted = reward(images().requires_grad_(), PROMPTS, METADATA)
    assert torch.equal(wanted, reward(images(), PROMPTS, METADATA))


def test_gradients_against_finite_differences(scorer: str, tmp_path: Path) -> None:
    reward: Any = load_reward(scorer, write_checkpoint(scorer, tmp_path))  # its own, for the change of dtype
    reward.network.double()
    if scorer == "aesthetic":
        reward.head.double()
    pictures = images().double().requires_grad_()
    scores = reward(pictures, PROMPTS, METADATA)
    assert scores.dtype == torch.float64
    (gradient,) = torch.autograd.grad(scores.sum(), pictures)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ahead, behind = (
        reward((pictures.detach() + h * direction).requires_grad_(), PROMPTS, METADATA).detach() for h in (1e-5, -1e-5)
    )
    expected = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close((ahead - behind) / 2e-5, expected, rtol=1e-5, atol=1e-7)


def test_half_precision_changes_little(scorer: str, options: dict[str, dict[str, Any]]) -> None:
    full = load_reward(scorer, options[scorer])(images(), PROMPTS, METADATA)
    half = load_reward(scorer, {**options[scorer], "dtype": "bf16"})(images(), PROMPTS, METADATA)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.05 * full.abs().max().item())


def test_the_device_is_that_of_the_pictures_or_the_one_asked_for(
    scorer: str, options: dict[str, dict[str, Any]]
) -> None:
    free = load_reward(scorer, options[scorer])
    placed = load_reward(scorer, {**options[scorer], "device": "cpu"})
    assert torch.equal(placed(images(), PROMPTS, METADATA), free(images(), PROMPTS, METADATA))
    assert placed(images(), PROMPTS, METADATA).device == images().device


def test_missing_weights_say_where_they_are(scorer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_reward(scorer)
    message = str(error.value)
    assert HOMES[scorer] in message
    assert "\n" not in message
    assert ("clip=DIR" if scorer == "aesthetic" else "weights=DIR") in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dtype", "int8", "dtype is 'int8'"),
        ("batch", 0, "must be above 0"),
        ("device", "abacus", "device of .* is 'abacus'"),
        ("weights", "no/such/file.pt", "no/such/file.pt"),
    ],
)
def test_options_that_cannot_be(
    scorer: str, option: str, value: Any, message: str, options: dict[str, dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_reward(scorer, {**options[scorer], option: value})
    assert "\n" not in str(error.value)


def test_the_same_network_is_loaded_once(scorer: str, options: dict[str, dict[str, Any]]) -> None:
    first: Any = load_reward(scorer, options[scorer])
    second: Any = load_reward(scorer, options[scorer])
    assert first is not second
    assert first.network is second.network
    assert dataclasses.asdict(first) == dataclasses.asdict(second)


def test_a_folder_without_a_vocabulary(scorer: str, options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    if scorer == "aesthetic":
        return  # looks at no prompt
    with pytest.raises(UserError, match="no vocabulary"):
        load_reward(scorer, {**options[scorer], "tokenizer": str(tmp_path)})


def test_weights_of_another_network(scorer: str, options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save({"conv.weight": torch.ones(3)}, other)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"<html>not found</html>")
    for file in (other, broken):
        with pytest.raises(UserError) as error:
            load_reward(scorer, {**options[scorer], "weights": str(file)})
        assert file.name in str(error.value)
        assert "\n" not in str(error.value)
