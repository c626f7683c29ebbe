"""Writes the golden distances with the published packages, in an environment of its own:

    pip install torch==2.13.0 lpips==0.1.4 dreamsim==0.2.1 torchvision
    git clone https://github.com/facebookresearch/dinov2
    PYTHONPATH=. DINOV2=dinov2 python tests/golden/make_distances.py

Add `full` for the networks at their published size, whose figures are not stored but compared with vmpo's at once
(vmpo must then be importable too).
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import tests.golden.distance_inputs as inputs

# torchvision's compiled operators are not needed, and not there beside a CPU build of PyTorch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import dreamsim  # noqa: E402
import dreamsim.feature_extraction.extractor as extractor  # noqa: E402
import dreamsim.feature_extraction.load_clip_as_dino as clip_loading  # noqa: E402
import dreamsim.feature_extraction.load_open_clip_as_dino as open_clip_loading  # noqa: E402
import dreamsim.model as published_model  # noqa: E402
import lpips  # noqa: E402
import torchvision  # noqa: E402
from dreamsim.feature_extraction.vision_transformer import DINOHead, VisionTransformer  # noqa: E402

VARIANTS = ("ensemble", "dino_vitb16", "clip_vitb32", "open_clip_vitb32", "dinov2_vitb14")
PICTURES = 16


def lpips_distances(net: str, pairs: list[tuple[Tensor, Tensor]], folder: Path) -> list[float]:
    """The published distance of each pair, of pictures in [0, 1]."""
    backbone, heads = inputs.write_lpips(folder, net)
    constructor = "alexnet" if net == "alex" else "vgg16"
    made = getattr(torchvision.models, constructor)(weights=None)
    features = {n.removeprefix("features."): w for n, w in torch.load(backbone).items() if "features" in n}
    made.features.load_state_dict(features)
    setattr(lpips.pretrained_networks.tv, constructor, lambda **_: made)
    metric = lpips.LPIPS(net=net, model_path=str(heads), verbose=False)
    with torch.no_grad():
        return [metric(a[None], b[None], normalize=True).item() for a, b in pairs]


def tiny_vit(width: int, depth: int, **options: Any) -> VisionTransformer:
    """The published class at another size."""
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    return VisionTransformer(
        embed_dim=width, depth=depth, num_heads=width // 64, qkv_bias=True, norm_layer=norm, **options
    )


def published_dreamsim(variant: str, folder: Path, width: int, depth: int) -> tuple[Any, Any]:
    """The published model, reading the files of `folder`."""
    clip_loading.vit_base = open_clip_loading.vit_base = functools.partial(tiny_vit, width, depth)
    head = {f"module.head.{name}": w for name, w in DINOHead(768, 2048).state_dict().items()}
    head["module.head.last_layer.weight"] = torch.zeros(2048, 256)
    torch.save({"student": head}, folder / "dino_vitb16_pretrain.pth")

    def hub_load(_: str, name: str) -> Any:
        if name == "dinov2_vitb14":
            sys.path.insert(0, os.environ["DINOV2"])
            from dinov2.models.vision_transformer import DinoVisionTransformer

            made = DinoVisionTransformer(
                img_size=518, patch_size=14, embed_dim=width, depth=12, num_heads=width // 64, init_values=1.0,
                block_chunks=0, interpolate_antialias=False, interpolate_offset=0.1,
            )  # fmt: skip
            made.load_state_dict(torch.load(folder / "dinov2_vitb14_pretrain.pth"))
        else:
            made = tiny_vit(width, 12)
            made.load_state_dict(torch.load(folder / "dino_vitbase16_pretrain.pth"))
        return made

    extractor.torch.hub.load = hub_load
    published_model.download_weights = lambda **_: None
    return dreamsim.dreamsim(device="cpu", cache_dir=str(folder), dreamsim_type=variant)


def embeddings(model: Any, preprocess: Any, pictures: list[Tensor]) -> Tensor:
    """The published embeddings of the published preprocessing of 8-bit pictures."""
    rows = []
    for picture in pictures:
        pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        with torch.no_grad():
            rows.append(model.embed(preprocess(Image.fromarray(pixels))))
    return torch.cat(rows)


def golden(pictures: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What the test reads."""
    versions = {name: version(name) for name in ("lpips", "dreamsim", "torch", "torchvision", "peft", "pillow")}
    found: dict[str, Any] = {"versions": versions, "lpips": {}, "dreamsim": {}}
    for net in ("alex", "vgg"):
        with tempfile.TemporaryDirectory() as folder:
            found["lpips"][net] = lpips_distances(net, pairs, Path(folder))
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as name:
            folder = inputs.write_dreamsim(Path(name), variant)
            model, preprocess = published_dreamsim(variant, folder, inputs.WIDTH, 2)
            embedded = embeddings(model, preprocess, pictures)
        distances = 1 - torch.nn.functional.cosine_similarity(embedded.double(), embedded.double().roll(1, 0))
        found["dreamsim"][variant] = {"distances": distances.tolist(), "first": embedded[:, :4].tolist()}
    return found


def compare_full(pictures: list[Tensor]) -> None:
    """Published sizes: embeddings and distances of vmpo against the published ones."""
    from vmpo.features.dreamsim import DreamSim

    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as name:
            folder = inputs.write_dreamsim(Path(name), variant, width=768, depth=12, projection=512)
            model, preprocess = published_dreamsim(variant, folder, 768, 12)
            theirs = embeddings(model, preprocess, pictures)
            ours = DreamSim(variant, folder)
            mine = torch.cat([ours(picture[None]) for picture in pictures])
        with torch.no_grad():
            distances = 1 - torch.nn.functional.cosine_similarity(theirs.double(), theirs.double().roll(1, 0))
            mine_distances = (mine - mine.roll(1, 0)).double().square().sum(1) / 2
        print(
            f"{variant}: F {theirs.shape[1]}, distances {distances.min():.3f} to {distances.max():.3f}, "
            f"relative error of distances {((mine_distances - distances) / distances).abs().max():.1e}, "
            f"of embeddings {((mine - theirs).norm(dim=1) / theirs.norm(dim=1)).max():.1e}"
        )


if __name__ == "__main__":
    many = [inputs.picture(index) for index in range(PICTURES)]
    if "full" in sys.argv:
        compare_full(many)
    else:
        both = [(picture, inputs.picture(index, 1)) for index, picture in enumerate(many)]
        file = Path(__file__).parent / "distances.json"
        file.write_text(json.dumps(golden(many, both)) + "\n")
