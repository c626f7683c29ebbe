"""ImageReward against the published package, under the same weights, vocabulary, prompts and pictures.

`tests/golden/scores.json` holds what image-reward 1.5 gave (`tests/golden/upstream/scores.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden.scorer_checkpoints import GOLDEN, as_images, weights_of, write_checkpoint
from tests.golden.scorer_inputs import PROMPTS, picture, pictures
from vmpo.errors import UserError
from vmpo.rewards import load_reward
from vmpo.rewards.image_reward_network import image_reward_network

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_checkpoint("image_reward", tmp_path_factory.mktemp("image_reward"))


def scores(reward: Any, prompts: list[str] = PROMPTS, grad: bool = False) -> Tensor:
    """Scores of the 16 golden pictures, one by one since their sizes differ."""
    images = [as_images(p).requires_grad_(grad) for p in pictures()]
    return torch.cat([reward(image, [prompt], [{}]) for image, prompt in zip(images, prompts, strict=True)])


def test_golden_scores(options: dict[str, Any]) -> None:
    expected = torch.tensor(GOLDEN["image_reward"]["scores"])
    assert len(expected) == 16
    atol = 1e-6 * expected.abs().max().item()  # for a score that happens to be near 0
    torch.testing.assert_close(scores(load_reward("image_reward", options)), expected, rtol=1e-4, atol=atol)


def test_golden_scores_tell_pictures_and_prompts_apart(options: dict[str, Any]) -> None:
    expected = torch.tensor(GOLDEN["image_reward"]["scores"])
    assert expected.std() > 0.1 * expected.abs().mean()
    other = scores(load_reward("image_reward", options), [PROMPTS[(i + 3) % 16] for i in range(16)])
    assert ((other - expected).abs() > 1e-3 * expected.abs()).all()


def test_scores_of_float_pictures_are_near_the_published_ones(options: dict[str, Any]) -> None:
    reward = load_reward("image_reward", options)
    published = scores(reward)
    assert ((scores(reward, grad=True) - published).abs() < 0.06 * published.std()).all()


def test_prompts_are_cut_at_35_tokens(options: dict[str, Any]) -> None:
    reward = load_reward("image_reward", options)
    images = as_images(picture(3)).expand(3, -1, -1, -1)
    cut, exact, shorter = reward(images, ["cat " * 50, "cat " * 33, "cat " * 32], [{}] * 3).tolist()
    assert cut == pytest.approx(exact, abs=1e-5)
    assert abs(shorter - exact) > 1e-4


def test_padding_of_the_prompt_is_not_looked_at(options: dict[str, Any]) -> None:
    """The network's output for tokens with their mask is that for the tokens alone."""
    reward: Any = load_reward("image_reward", options)
    ids = torch.tensor([reward.vocabulary("a photo of a cat").input_ids])
    padded = torch.nn.functional.pad(ids, (0, 7), value=9)
    mask = torch.tensor([[1] * ids.shape[1] + [0] * 7])
    pixels = reward.preprocessing(as_images(picture(5)))
    with torch.no_grad():
        alone = reward.network(pixels, ids, torch.ones_like(ids))
        with_padding = reward.network(pixels, padded, mask)
    torch.testing.assert_close(with_padding, alone, rtol=1e-5, atol=1e-5)


def test_every_published_tensor_arrives() -> None:
    """Outside and in the first blocks: changing a tensor changes the score, but for the key biases softmax cancels."""
    state = weights_of("image_reward")
    state["blip.visual_encoder.pos_embed"] = state["blip.visual_encoder.pos_embed"][:, :5]  # 2 x 2 patches are enough
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[2, 50, 60, 3]])

    def score(weights: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return image_reward_network(weights, "a state dict")(pixels, ids, torch.ones_like(ids))

    reference = score(state)
    for name in state:
        if "blocks.1." in name or "layer.1." in name:  # the golden scores hold them all
            continue
        if name.startswith(("blip.vision_proj", "blip.text_proj")) or name.endswith(
            "key.bias"
        ):  # unused; q·b_k cancels
            continue
        changed = {**state, name: 1.5 * state[name] + 0.1 * torch.randn_like(state[name])}
        assert not torch.allclose(score(changed), reference, atol=1e-5), name


def test_the_authors_normalisation(options: dict[str, Any]) -> None:
    """With a head that returns 0, every score is -mean / std of the authors' data."""
    state = weights_of("image_reward")
    for name in ("mlp.layers.7.weight", "mlp.layers.7.bias"):
        state[name] = torch.zeros_like(state[name])
    file = Path(options["weights"]).with_name("zero.safetensors")
    save_file(state, file)
    score = load_reward("image_reward", {**options, "weights": str(file)})(as_images(picture(0)), ["x"], [{}])
    assert score.item() == pytest.approx(-0.16717362830052426 / 1.0333394966054072, rel=1e-6)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("blip.visual_encoder.pos_embed", "is no checkpoint of ImageReward: it has no 'pos_embed'"),
        ("blip.visual_encoder.norm.bias", "lacks 1 tensors of a BlipVisionModel, such as post_layernorm.bias"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", "lacks 1 tensors of a BlipTextModel"),
        ("mlp.layers.0.weight", "it has no layers.0.weight"),
        ("mlp.layers.6.bias", "does not hold the weights of a ScoreHead"),
    ],
)
def test_checkpoints_that_are_cut_short(absent: str, message: str, options: dict[str, Any], tmp_path: Path) -> None:
    state = weights_of("image_reward")
    del state[absent]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=message):
        load_reward("image_reward", {**options, "weights": str(tmp_path / "cut.pt")})
