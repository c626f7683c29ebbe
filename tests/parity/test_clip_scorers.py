"""HPSv2, PickScore, CLIPScore and the aesthetic predictor against the published implementations.

`tests/golden/scores.json` holds what those gave for the same weights, vocabulary, prompts and pictures, each through
its own preprocessing and tokenizer (`tests/golden/upstream/scores.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.golden.scorer_checkpoints import CLIP_SCORERS, GOLDEN, as_images, weights_of, write_checkpoint
from tests.golden.scorer_inputs import PROMPTS, SIZES, picture, pictures
from vmpo.errors import UserError
from vmpo.features.clip_tokens import clean_prompt, load_clip_tokenizer, tokenise
from vmpo.features.open_clip import clip_from_open_clip
from vmpo.features.preprocessing import Preprocessing
from vmpo.rewards import load_reward

torch.set_num_threads(1)
UNSCALED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {scorer: write_checkpoint(scorer, tmp_path_factory.mktemp(scorer)) for scorer in CLIP_SCORERS}


def scores(reward: Any, prompts: list[str] = PROMPTS) -> Tensor:
    """Scores of the 16 golden pictures, one by one since their sizes differ."""
    return torch.cat([reward(as_images(p), [prompt], [{}]) for p, prompt in zip(pictures(), prompts, strict=True)])


@pytest.mark.parametrize("scorer", CLIP_SCORERS)
def test_golden_scores(scorer: str, options: dict[str, dict[str, Any]]) -> None:
    expected = torch.tensor(GOLDEN[scorer]["scores"])
    assert len(expected) == 16
    atol = 1e-6 * expected.abs().max().item()  # for a score that happens to be near 0
    torch.testing.assert_close(scores(load_reward(scorer, options[scorer])), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("scorer", CLIP_SCORERS)
def test_golden_scores_tell_pictures_and_prompts_apart(scorer: str, options: dict[str, dict[str, Any]]) -> None:
    """The figures above would show another picture, and another prompt where prompts matter."""
    expected = torch.tensor(GOLDEN[scorer]["scores"])
    assert expected.std() > 0.1 * expected.abs().mean()
    other = scores(load_reward(scorer, options[scorer]), [PROMPTS[(i + 3) % 16] for i in range(16)])
    changed = (other - expected).abs() > 1e-3 * expected.abs()
    assert changed.all() if scorer != "aesthetic" else not changed.any()


# preprocessing


@pytest.mark.parametrize("index", range(16))
def test_preprocessing_is_that_of_transformers(index: int) -> None:
    processor = CLIPImageProcessorPil()
    expected = processor(Image.fromarray(picture(index)), return_tensors="pt").pixel_values
    torch.testing.assert_close(Preprocessing(floor=True)(as_images(picture(index))), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "most", "mean"),
    [
        ({}, 2, 0.4),  # 1.1 and 0.32 when written; rounding alone gives 0.5 and 0.25
        ({"interpolation": "bilinear"}, 2, 0.4),
        ({"keep_aspect": False}, 25, 1.5),  # 17 and 0.9: of two unlike factors Pillow may take the columns' first
    ],
    ids=str,
)
def test_float_pictures_are_near_those_of_pil(kind: dict[str, Any], most: float, mean: float) -> None:
    preprocess = Preprocessing(**UNSCALED, **kind)
    for index in range(16):
        images = as_images(picture(index))
        difference = 255 * (preprocess(images.clone().requires_grad_()) - preprocess(images)).abs()
        assert difference.max() < most
        assert difference.mean() < mean


def test_float_pictures_of_hps_are_the_published_ones() -> None:
    preprocess = Preprocessing(pad=True, resize_floats=True)
    for index in range(16):
        images = as_images(picture(index))
        assert torch.equal(preprocess(images.clone().requires_grad_()), preprocess(images))


def test_padding_centres_the_picture_on_black() -> None:
    out = Preprocessing(size=8, pad=True, resize_floats=True, **UNSCALED)(torch.ones(1, 3, 3, 8))
    assert out[0, 0].sum(1).tolist() == [0, 0, 8, 8, 8, 0, 0, 0]


def test_odd_margins_follow_the_two_libraries() -> None:
    images = torch.arange(11.0).view(1, 1, 11, 1).expand(1, 3, 11, 8) / 255
    assert (Preprocessing(size=8, **UNSCALED)(images)[0, 0, 0] * 255).round().unique().item() == 2
    assert (Preprocessing(size=8, floor=True, **UNSCALED)(images)[0, 0, 0] * 255).round().unique().item() == 1


@pytest.mark.parametrize("scorer", CLIP_SCORERS)
def test_scores_of_float_pictures_are_near_the_published_ones(scorer: str, options: dict[str, dict[str, Any]]) -> None:
    reward = load_reward(scorer, options[scorer])
    published = scores(reward)
    floats = torch.cat(
        [reward(as_images(p).requires_grad_(), [prompt], [{}]) for p, prompt in zip(pictures(), PROMPTS, strict=True)]
    )
    assert ((floats - published).abs() < 0.06 * published.std()).all()  # random weights amplify a level of 255


# prompts


def test_prompts_are_cut_at_77_tokens(options: dict[str, dict[str, Any]]) -> None:
    tokenizer = load_clip_tokenizer(options["hpsv2"]["tokenizer"])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    (ids,) = tokenise(tokenizer, ["cat " * 100], 77).tolist()
    assert ids == [start, *tokenizer("cat").input_ids[1:-1] * 75, end]
    reward = load_reward("hpsv2", options["hpsv2"])
    images = as_images(picture(3)).expand(3, -1, -1, -1)
    cut, exact, shorter = reward(images, ["cat " * 100, "cat " * 75, "cat " * 74], [{}] * 3).tolist()
    assert cut == pytest.approx(exact, abs=1e-6)
    assert abs(shorter - exact) > 1e-5


def test_prompts_are_cleaned_as_published() -> None:
    assert clean_prompt("  the king’s “golden”\n crown ") == 'the king\'s "golden" crown'
    assert clean_prompt("salt &amp;amp; pepper") == "salt & pepper"
    assert clean_prompt("ｆｏｘ，ｃａｔ") == "fox,cat"


def test_a_prompt_counts_for_its_own_picture(options: dict[str, dict[str, Any]]) -> None:
    reward = load_reward("pick_score", {**options["pick_score"], "batch": 2})
    images = torch.cat([as_images(picture(0))] * 5)
    prompts = [PROMPTS[i] for i in (0, 2, 0, 4, 2)]
    together = reward(images, prompts, [{}] * 5)
    alone = torch.cat([reward(images[:1], [prompt], [{}]) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


# options


def test_conventions_of_clip_score(options: dict[str, dict[str, Any]]) -> None:
    def score(prompts: list[str] = PROMPTS, **more: str) -> Tensor:
        images = as_images(picture(8)).expand(16, -1, -1, -1)
        return load_reward("clip_score", {**options["clip_score"], **more})(images, prompts, [{}] * 16)

    cosine = score()
    assert (cosine < 0).any()
    assert (cosine > 0).any()
    torch.testing.assert_close(score(convention="percent"), 100 * cosine)
    torch.testing.assert_close(score(convention="hessel"), 2.5 * cosine.clamp_min(0))
    torch.testing.assert_close(score(prefix="a photo of "), score(["a photo of " + prompt for prompt in PROMPTS]))
    with pytest.raises(UserError, match="convention of CLIPScore is 'dot'; it can be cosine, percent, hessel"):
        score(convention="dot")


def test_scale_of_pick_score(options: dict[str, dict[str, Any]]) -> None:
    plain, scaled = (load_reward("pick_score", options["pick_score"] | more) for more in ({}, {"scale": 26}))
    images = as_images(picture(8))
    torch.testing.assert_close(scaled(images, ["fox"], [{}]), plain(images, ["fox"], [{}]) / 26)
    with pytest.raises(UserError, match="scale of PickScore"):
        load_reward("pick_score", {**options["pick_score"], "scale": 0})


def test_hps_reads_its_checkpoint_and_a_folder_alike(options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    reward: Any = load_reward("hpsv2", options["hpsv2"])
    reward.network.save_pretrained(tmp_path)
    folder = load_reward("hpsv2", {**options["hpsv2"], "weights": str(tmp_path)})
    images = as_images(picture(5))
    torch.testing.assert_close(folder(images, ["fox"], [{}]), reward(images, ["fox"], [{}]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("version", "filename"), [("v2.0", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt")]
)
def test_versions_of_hps(
    version: str, filename: str, options: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, name: str) -> str:
        asked.append((repo, name))
        return str(options["hpsv2"]["weights"])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load_reward("hpsv2", {"version": version, "tokenizer": options["hpsv2"]["tokenizer"]})
    assert asked == [("xswu/HPSv2", filename)]
    with pytest.raises(UserError, match=r"version of HPSv2 is 'v3'; it can be v2.0, v2.1"):
        load_reward("hpsv2", {"version": "v3"})


# checkpoints


def test_every_published_tensor_arrives() -> None:
    """Every tensor outside and in the first blocks arrives: changing it changes an embedding or the logit scale."""
    state = weights_of("hpsv2")
    state["visual.positional_embedding"] = state["visual.positional_embedding"][:5]  # 2 x 2 patches are enough
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[len(state["token_embedding.weight"]) - 2, 5, 7, len(state["token_embedding.weight"]) - 1]])

    def embed(weights: dict[str, Tensor]) -> Tensor:
        model: CLIPModel = clip_from_open_clip(weights, "a state dict", vision_head_width=80)
        with torch.no_grad():
            output = model(input_ids=ids, pixel_values=pixels)
        return torch.cat([output.image_embeds, output.text_embeds, model.logit_scale.view(1, 1)], 1)

    reference = embed(state)
    for name in state:
        if ".resblocks.1." in name:  # the golden scores hold them all
            continue
        changed = {**state, name: 1.5 * state[name] + 0.1}
        assert not torch.allclose(embed(changed), reference, atol=1e-5), name


def test_checkpoints_that_are_cut_short(tmp_path: Path, options: dict[str, dict[str, Any]]) -> None:
    state = weights_of("hpsv2")
    del state["visual.proj"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"cut.pt' lacks 1 tensors of a CLIPModel, such as visual_projection.weight"):
        load_reward("hpsv2", {**options["hpsv2"], "weights": str(tmp_path / "cut.pt")})
    head = weights_of("aesthetic", "head") | {"layers.7.bias": torch.zeros(2)}
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"head.pth' does not hold the weights of a ScoreHead"):
        load_reward("aesthetic", {**options["aesthetic"], "weights": str(tmp_path / "head.pth")})


def test_a_head_of_another_clip(tmp_path: Path, options: dict[str, dict[str, Any]]) -> None:
    head = weights_of("aesthetic", "head") | {"layers.0.weight": torch.zeros(1024, 768)}
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"takes 768 features, but .* has 24"):
        load_reward("aesthetic", {**options["aesthetic"], "weights": str(tmp_path / "head.pth")})


def test_the_golden_pictures_are_varied() -> None:
    assert len(set(SIZES)) == 16
    assert {p.shape[:2] for p in pictures()} == set(SIZES)
