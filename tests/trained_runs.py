"""Run folders as training leaves them, made without training, and what their denoisers give."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from vmpo.policies.adapters import add_lora, lora_parameters, save_lora
from vmpo.policies.loading import load_policy
from vmpo.policies.pipeline import Call

RANK, ALPHA = 4, 6
TOLERANCE = 1e-5
"""Of the largest output."""


@dataclass
class Trained:
    """A run folder, its base model, and what the denoiser gives without and with the run's adapter."""

    kind: str
    run: Path
    model: Path
    base: Tensor
    aligned: Tensor

    @property
    def name(self) -> str:
        return "transformer" if self.kind == "sd3" else "unet"

    def pipe(self) -> DiffusionPipeline:
        pipe = DiffusionPipeline.from_pretrained(self.model, **absent(self.model))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def denoiser(self) -> nn.Module:
        kind = SD3Transformer2DModel if self.kind == "sd3" else UNet2DConditionModel
        return kind.from_pretrained(self.model, subfolder=self.name).eval()

    def is_aligned(self, denoiser: nn.Module) -> None:
        assert (output(self.kind, denoiser) - self.aligned).abs().max() < TOLERANCE * self.aligned.abs().max()


def absent(folder: Path) -> dict[str, None]:
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}


@torch.no_grad()
def output(kind: str, denoiser: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator)
    x, t = draw(2, 4, 8, 16), torch.tensor([300.0, 800.0])
    if kind == "sd3":
        pooled = draw(2, 64)
        return denoiser(x, draw(2, 7, 64), pooled, t, return_dict=False)[0]
    more = {}
    if kind == "sdxl":
        sizes = torch.tensor([[16.0, 32, 0, 0, 16, 32]] * 2)
        more = {"added_cond_kwargs": {"text_embeds": draw(2, 32), "time_ids": sizes}}
    return denoiser(x, t, draw(2, 7, 64 if kind == "sdxl" else 32), return_dict=False, **more)[0]


def make_run(folder: Path, kind: str, model: Path, targets: list[str] | None = None) -> Trained:
    """A run as training leaves it: the adapter is written by the library's own function."""
    policy = load_policy(str(model), Call(height=16, width=32))
    base = output(kind, policy.denoiser)
    add_lora(policy, RANK, ALPHA, targets, seed=5)
    torch.manual_seed(6)
    for parameter in lora_parameters(policy):
        nn.init.normal_(parameter, std=0.3)
    folder.mkdir(parents=True)
    save_lora(policy, folder / "adapter")
    settings = {"name": f"{kind} run", "model": {"path": str(model), "height": 16, "width": 32}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    aligned = output(kind, policy.denoiser)
    assert (aligned - base).abs().max() > 0.05 * aligned.abs().max(), "an adapter that is lost must be seen"
    return Trained(kind, folder, model, base, aligned)
