"""The published checkpoints of DreamSim: which files a variant is made of, and their weights with the adapter merged.

A release is a zip of pretrained vision transformers and a LoRA adapter saved by peft, one for all branches, whose
tensors are named `base_model.model.extractor_list.<branch>.model.<layer>.lora_A.weight`.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.preprocessing import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from vmpo.features.published_file import PublishedFile, cache_folder
from vmpo.features.vit_conversion import convert_vit
from vmpo.features.weights import read_state_dict

IMAGE_SIZE = 224
_RELEASES = "https://github.com/ssundaram21/dreamsim/releases/download"
_DINO = "https://dl.fbaipublicfiles.com"


@dataclass(frozen=True)
class Backbone:
    """A vision transformer of the ensemble.

    Attributes:
        file: in the folder of the checkpoint.
        family: 'clip' (projected, CLIP's normalisation of pictures), 'dino' (class token, ImageNet's).
        activation: of its MLPs.
        home: where the file comes from if the release has none.
    """

    file: str
    family: Literal["clip", "dino"]
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    home: PublishedFile | None = None

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel."""
        return (CLIP_MEAN, CLIP_STD) if self.family == "clip" else (IMAGENET_MEAN, IMAGENET_STD)


def _of_meta(name: str, folder: str) -> Backbone:
    return Backbone(name, "dino", home=PublishedFile(name, f"{_DINO}/{folder}/{name}"))


def _of_clip(name: str, activation: Literal["gelu", "quick_gelu"]) -> Backbone:
    return Backbone(f"{name}_pretrain.pth.tar", "clip", activation)


_DINO_B16 = _of_meta("dino_vitbase16_pretrain.pth", "dino/dino_vitbase16_pretrain")


@dataclass(frozen=True)
class Variant:
    """The branches of a variant, the folder of its adapter, and the release that has it."""

    branches: tuple[Backbone, ...]
    adapter: str
    release: str


VARIANTS = {
    "ensemble": Variant(
        (_DINO_B16, _of_clip("clip_vitb16", "quick_gelu"), _of_clip("open_clip_vitb16", "gelu")),
        "ensemble_lora",
        "v0.2.0",
    ),
    "dino_vitb16": Variant((_DINO_B16,), "dino_vitb16_single_lora", "v0.2.0"),
    "clip_vitb32": Variant((_of_clip("clip_vitb32", "quick_gelu"),), "clip_vitb32_single_lora", "v0.2.0"),
    "open_clip_vitb32": Variant((_of_clip("open_clip_vitb32", "gelu"),), "open_clip_vitb32_single_lora", "v0.2.0"),
    "dinov2_vitb14": Variant(
        (_of_meta("dinov2_vitb14_pretrain.pth", "dinov2/dinov2_vitb14"),), "dinov2_vitb14_single_lora", "v0.2.1"
    ),
}


def load_branches(name: str, folder: Path | None) -> list[Any]:
    """The networks of a variant with the adapter merged, each (B, 3, 224, 224) normalised → `image_embeds` (B, F).

    Arguments:
        name: of the variant.
        folder: the unpacked release; fetched where None.

    Raises:
        UserError: if the files are not there and cannot be fetched, or hold something else.
    """
    variant = VARIANTS[name]
    folder = folder or _fetch_release(name, variant)
    if not (folder / variant.adapter).is_dir():
        raise UserError(f"'{folder}' has no '{variant.adapter}'; it must be the unpacked {_release(name, variant).url}")
    adapter = _read_adapter(folder / variant.adapter)
    if set(adapter) != set(range(len(variant.branches))):
        raise UserError(f"'{folder / variant.adapter}' adapts branches {sorted(adapter)} of {len(variant.branches)}")
    networks = []
    for index, backbone in enumerate(variant.branches):
        file = _find(backbone, folder)
        weights = {layer: weight.float() for layer, weight in read_state_dict(file).items()}
        _merge(weights, adapter[index], str(folder / variant.adapter))
        networks.append(
            convert_vit(
                weights,
                activation=backbone.activation,
                eps=1e-5 if backbone.family == "clip" else 1e-6,
                output="projection" if backbone.family == "clip" else "token",
                image_size=IMAGE_SIZE,
                source=str(file),
            )
        )
    return networks


def _release(name: str, variant: Variant) -> PublishedFile:
    archive = f"dreamsim_{name}_checkpoint.zip"
    return PublishedFile(archive, f"{_RELEASES}/{variant.release}-checkpoints/{archive}", folder="dreamsim")


def _fetch_release(name: str, variant: Variant) -> Path:
    from filelock import FileLock

    folder = cache_folder() / "dreamsim" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # of several processes one fetches
        return folder if folder.is_dir() else _unpack_release(name, variant, folder)


def _unpack_release(name: str, variant: Variant, folder: Path) -> Path:
    found = _release(name, variant).fetch(f"DreamSim '{name}'", ", or unpack it and give the folder as 'weights'")
    unpacked = Path(tempfile.mkdtemp(dir=found.parent))
    try:
        zipfile.ZipFile(found).extractall(unpacked)
    except zipfile.BadZipFile as error:
        raise UserError(f"'{found}' is no zip file ({error}); delete it to have it fetched again") from error
    unpacked.rename(folder)  # whole or not at all
    found.unlink()
    return folder


def _find(backbone: Backbone, folder: Path) -> Path:
    for place in (folder / backbone.file, folder / "checkpoints" / backbone.file):
        if place.is_file():
            return place
    if backbone.home is None:
        raise UserError(f"'{folder}' has no '{backbone.file}'; DreamSim's weights are an unpacked release")
    return backbone.home.fetch("DreamSim", f" or in '{folder}'")


# Adapter


def _read_adapter(folder: Path) -> dict[int, dict[str, dict[str, Tensor]]]:
    """{branch: {layer: {"A": (r, in), "B": (out, r) times the scale}}} of a folder saved by peft."""
    config = folder / "adapter_config.json"
    files = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    file = next((f for f in files if f.is_file()), files[0])
    if not config.is_file() or not file.is_file():
        raise UserError(f"'{folder}' has no adapter_config.json and adapter_model.safetensors (or .bin), as peft saves")
    settings = json.loads(config.read_text())
    scale = settings["lora_alpha"] / settings["r"] ** (0.5 if settings.get("use_rslora") else 1)
    layers: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in read_state_dict(file).items():
        found = re.fullmatch(r".*extractor_list\.(\d+)\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if not found or tensor.ndim != 2:
            raise UserError(f"'{file}' has '{name}' of shape {tuple(tensor.shape)}; LoRA of linear layers was expected")
        factor = tensor.float() * (scale if found[3] == "B" else 1.0)
        layers.setdefault(int(found[1]), {}).setdefault(found[2], {})[found[3]] = factor
    return layers


def _merge(weights: dict[str, Tensor], adapter: dict[str, dict[str, Tensor]], source: str) -> None:
    """W ← W + (α/r) B A in each adapted layer."""
    for layer, factors in adapter.items():
        name = f"{layer}.weight"
        if name not in weights or set(factors) != {"A", "B"}:
            raise UserError(f"'{source}' has half an adapter of '{layer}', or there is no such layer")
        update = factors["B"] @ factors["A"]
        if update.shape != weights[name].shape:
            raise UserError(f"'{source}' adapts '{name}' as {tuple(update.shape)}; it is {tuple(weights[name].shape)}")
        weights[name] = weights[name] + update
