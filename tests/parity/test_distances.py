"""LPIPS, DreamSim and CLIP distances against the published packages, under the same weights and pictures.

`tests/golden/make_distances.py` wrote the expected numbers with lpips 0.1.4 and dreamsim 0.2.1; pictures go through
each package's own preprocessing there, and through vmpo's here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.distance_inputs import (
    lora_shapes,
    picture,
    vit_shapes,
    write_adapter,
    write_dreamsim,
    write_lpips,
)
from vmpo.errors import UserError
from vmpo.features.clip_embedding import CLIPEmbedding
from vmpo.features.dreamsim import DreamSim
from vmpo.features.extractor import FeatureExtractor, paired_distances, pairwise_distances
from vmpo.features.loading import load_feature
from vmpo.features.lpips import LPIPS

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "distances.json").read_text())
PICTURES = 16
SMALL = torch.rand(3, 3, 40, 32, generator=torch.Generator().manual_seed(0))


def relative_error(ours: Tensor, expected: list[float]) -> float:
    published = torch.tensor(expected, dtype=torch.float64)
    return ((ours.double() - published) / published).abs().max().item()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny weights of every extractor."""
    folder = tmp_path_factory.mktemp("weights")
    backbone, heads = write_lpips(folder, "alex")
    single = write_dreamsim(folder / "dreamsim", "clip_vitb32")
    return {
        "lpips": {"backbone": backbone, "heads": heads},
        "dreamsim": {"variant": "clip_vitb32", "weights": single},
        "clip": {"weights": str(save_tiny_clip(folder / "clip"))},
    }


def save_tiny_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(3)
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = vision | {"vocab_size": 99}
    config = CLIPConfig(
        text_config=text, vision_config=vision | {"image_size": 64, "patch_size": 16}, projection_dim=24
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


# published packages


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_the_published_distance(net: Any, tmp_path: Path) -> None:
    metric = LPIPS(net, *write_lpips(tmp_path, net))
    ours = [
        paired_distances(metric.distance, *(metric(picture(index, variant)[None]) for variant in (0, 1)))
        for index in range(PICTURES)
    ]
    assert relative_error(torch.cat(ours), GOLDEN["lpips"][net]) < 1e-4


@pytest.mark.parametrize("variant", GOLDEN["dreamsim"])
def test_dreamsim_is_the_published_distance(variant: str, tmp_path: Path) -> None:
    metric = DreamSim(variant, write_dreamsim(tmp_path, variant))
    embeddings = torch.cat([metric(picture(index)[None]) for index in range(PICTURES)])
    expected = GOLDEN["dreamsim"][variant]
    ours = paired_distances(metric.distance, embeddings, embeddings.roll(1, 0))
    assert relative_error(ours, expected["distances"]) < 1e-4
    torch.testing.assert_close(embeddings[:, :4], torch.tensor(expected["first"]), rtol=1e-4, atol=1e-5)


def test_the_adapter_matters_at_this_tolerance(tmp_path: Path) -> None:
    folder = write_dreamsim(tmp_path, "clip_vitb32")
    config = folder / "clip_vitb32_single_lora" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 0.5', '"lora_alpha": 0.4'))
    metric = DreamSim("clip_vitb32", folder)
    embeddings = torch.cat([metric(picture(index)[None]) for index in range(PICTURES)])
    ours = paired_distances(metric.distance, embeddings, embeddings.roll(1, 0))
    assert relative_error(ours, GOLDEN["dreamsim"]["clip_vitb32"]["distances"]) > 1e-3


def test_clip_embeddings_are_those_of_transformers(tiny: dict[str, Any]) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel

    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    model = CLIPModel.from_pretrained(tiny["clip"]["weights"]).eval()
    metric = CLIPEmbedding(**tiny["clip"])
    for index in range(PICTURES):
        pixels = (picture(index) * 255).round().to(torch.uint8)
        with torch.no_grad():
            theirs = model.get_image_features(**processor(pixels, return_tensors="pt"))
        theirs = getattr(theirs, "pooler_output", theirs)
        ours = metric(picture(index)[None])
        torch.testing.assert_close(ours, torch.nn.functional.normalize(theirs, dim=1), rtol=1e-4, atol=1e-5)


# what holds for every extractor


@pytest.mark.parametrize("name", ["lpips", "dreamsim", "clip"])
def test_every_extractor_keeps_the_contract(name: str, tiny: dict[str, Any]) -> None:
    metric: FeatureExtractor = load_feature(name, tiny[name] | {"batch": 2})
    assert metric.name.startswith(name)
    before = SMALL.clone()
    features = metric(SMALL)
    assert features.dtype == torch.float32
    assert features.shape[0] == 3
    assert features.ndim == 2
    assert not features.requires_grad
    assert torch.equal(SMALL, before)
    torch.testing.assert_close(metric(SMALL.flip(0)).flip(0), features, rtol=1e-4, atol=1e-5)
    broken = SMALL.clone()
    broken[1, 0, 3, 3] = torch.nan
    assert metric(broken).isnan().any(dim=1).tolist() == [False, True, False]
    distances = pairwise_distances(metric.distance, features)
    assert torch.equal(distances, distances.mT)
    assert (distances.diagonal() == 0).all()
    torch.testing.assert_close(distances[0, 1:2], paired_distances(metric.distance, features[:1], features[1:2]))


@pytest.mark.parametrize("name", ["lpips", "dreamsim", "clip"])
def test_the_gradient_of_a_distance_reaches_the_pictures(name: str, tiny: dict[str, Any]) -> None:
    metric = load_feature(name, tiny[name])
    target = metric(SMALL[1:2])
    images = SMALL[:1].clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return paired_distances(metric.distance, metric(x), target).sum()

    loss(images).backward()
    gradient = images.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    step = 2e-3 / gradient.norm() * gradient
    ahead, behind = (loss((images + sign * step).detach().requires_grad_()).item() for sign in (1, -1))
    assert (ahead - behind) / 2 == pytest.approx((gradient * step).sum().item(), rel=0.03)


def test_a_picture_without_contrast_has_a_finite_gradient(tiny: dict[str, Any]) -> None:
    metric = LPIPS(**tiny["lpips"])
    metric.layers[0].bias.zero_()  # every channel of the first layer is silent for ImageNet's mean grey
    images = ((metric.shift + 1) / 2).expand(1, 3, 40, 40).clone().requires_grad_()
    metric(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


# weights


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_weights_say_where_to_get_them(offline: Path) -> None:
    with pytest.raises(
        UserError, match=r"download\.pytorch\.org/models/alexnet-owt-7be5be79\.pth.*'backbone'"
    ) as error:
        LPIPS()
    assert str(offline) in one_line(error)
    with pytest.raises(
        UserError, match=r"github\.com/.*v0\.2\.0-checkpoints/dreamsim_ensemble_checkpoint\.zip.*'weights'"
    ):
        load_feature("dreamsim")
    with pytest.raises(UserError, match=r"hf download openai/clip-vit-large-patch14 .*weights=") as error:
        load_feature("clip")
    one_line(error)


def test_cached_weights_are_found(offline: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = tmp_path_factory.mktemp("source")
    cache = offline / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    backbone, heads = write_lpips(source, "alex")
    backbone.rename(cache / "alexnet-owt-7be5be79.pth")
    heads.rename(cache / "lpips_v0.1_alex.pth")
    assert LPIPS()(SMALL).shape[0] == 3


def test_a_release_is_unpacked_once(offline: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import shutil

    folder = write_dreamsim(tmp_path_factory.mktemp("source"), "open_clip_vitb32")
    archive = offline / "hub" / "dreamsim" / "dreamsim_open_clip_vitb32_checkpoint"
    archive.parent.mkdir(parents=True)
    shutil.make_archive(str(archive), "zip", folder)
    first = DreamSim("open_clip_vitb32")(SMALL)
    assert not archive.with_suffix(".zip").exists()
    assert torch.equal(DreamSim("open_clip_vitb32")(SMALL), first)
    assert torch.equal(DreamSim("open_clip_vitb32", folder)(SMALL), first)


def test_other_files_than_weights_are_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="is not a file of weights") as error:
        LPIPS(backbone=broken)
    one_line(error)
    with pytest.raises(UserError, match=r"does not hold 64 weights >= 0 as 'lin0\.model\.1\.weight'"):
        LPIPS(**{**tiny["lpips"], "heads": tiny["lpips"]["backbone"]})
    with pytest.raises(UserError, match="does not hold the weights of a Sequential") as error:
        LPIPS("vgg", **tiny["lpips"])
    one_line(error)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_dreamsim(tmp_path / "a", "clip_vitb32")
    file = folder / "clip_vitb32_pretrain.pth.tar"
    weights = torch.load(file)["state_dict"]
    torch.save({"state_dict": {n: w for n, w in weights.items() if n != "norm.bias"}}, file)
    with pytest.raises(UserError, match=r"'norm\.bias' is missing"):
        DreamSim("clip_vitb32", folder)
    torch.save({"state_dict": weights | {"head.weight": torch.ones(2, 2)}}, file)
    with pytest.raises(UserError, match=r"head\.weight"):
        DreamSim("clip_vitb32", folder)
    with pytest.raises(
        UserError, match=r"must be the unpacked https://github\.com/.*dreamsim_ensemble_checkpoint\.zip"
    ):
        DreamSim("ensemble", folder)
    file.unlink()
    with pytest.raises(UserError, match=r"has no 'clip_vitb32_pretrain\.pth\.tar'"):
        DreamSim("clip_vitb32", folder)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"base_model.model.extractor_list.0.model.patch_embed.proj.lora_A.weight": (4, 3, 2, 2)}, "linear layers"),
        ({"base_model.model.mlp.fc1.weight": (4, 3)}, "linear layers"),
        (lora_shapes([3], 128, 16), "no such layer"),
        (lora_shapes([2, 1], 128, 16), r"adapts branches \[0, 1\] of 1"),
        (lora_shapes([2], 64, 16), r"adapts 'blocks\.0\.attn\.qkv\.weight' as \(192, 64\)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(shapes: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    torch.save({"state_dict": {n: torch.ones(s) for n, s in vit_shapes(128, 2, 32, 96).items()}},
               folder / "clip_vitb32_pretrain.pth.tar")  # fmt: skip
    write_adapter(folder / "clip_vitb32_single_lora", shapes, 1)
    with pytest.raises(UserError, match=message):
        DreamSim("clip_vitb32", folder)


# names and options


def mean_colour(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def one_row(images: Tensor) -> Tensor:
    return images.mean((0, 2, 3))[None]


class Thumbnail:
    name, distance = "thumbnail", "euclidean"

    def __init__(self, side: int = 2) -> None:
        self.side = side

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, self.side).flatten(1).double()


class Wrong(Thumbnail):
    distance = "manhattan"


def test_own_extractors_by_name() -> None:
    colour = load_feature("tests.parity.test_distances:mean_colour")
    assert (colour.name, colour.distance) == ("mean_colour", "cosine")
    torch.testing.assert_close(colour(SMALL), SMALL.mean((2, 3)))
    thumbnail = load_feature("tests.parity.test_distances:Thumbnail", {"side": 3})
    assert (thumbnail.name, thumbnail.distance) == ("thumbnail", "euclidean")
    assert (thumbnail(SMALL).shape, thumbnail(SMALL).dtype) == ((3, 27), torch.float32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dreamsym", {}, "unknown distance 'dreamsym'; did you mean 'dreamsim'"),
        ("lpips", {"nett": "vgg"}, "its options are: net, backbone, heads, batch"),
        ("lpips", {"net": "squeeze"}, "must be one of alex, vgg"),
        ("dreamsim", {"variant": "ensembel"}, "did you mean 'ensemble'"),
        ("tests.parity.test_distances:mean_color", {}, "did you mean 'mean_colour'"),
        ("tests.parity.test_distances:SMALL", {}, "is a Tensor"),
        ("tests.parity.test_distances:Wrong", {}, "must be one of cosine, euclidean, squared_euclidean"),
        ("no_such_module:f", {}, "there is no module 'no_such_module'"),
    ],
)
def test_mistakes_are_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_feature(name, options)
    one_line(error)


def test_what_an_own_extractor_returns_is_checked() -> None:
    with pytest.raises(UserError, match=r"returned \(1, 3\); it must be a tensor \(3, numbers\)"):
        load_feature("tests.parity.test_distances:one_row")(SMALL)


def test_pictures_too_small_for_the_network_are_refused(tiny: dict[str, Any]) -> None:
    metric = LPIPS(**tiny["lpips"])
    assert metric(SMALL[..., :31, :31]).shape[0] == 3
    with pytest.raises(UserError, match="24 x 32 pixels; this network needs 31"):
        metric(SMALL[..., :24, :32])
