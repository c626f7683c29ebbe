"""The published models by their architectures: pipelines without weights, for estimates, benchmarks and checks."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from vmpo.errors import UserError
from vmpo.policies.loading import DTYPES, Loading, as_policy, vae_dtype
from vmpo.policies.pipeline import Call, PipelinePolicy

FOLDER = resources.files("vmpo").joinpath("assets/published")


def published_names() -> list[str]:
    """Names of the architectures that are known."""
    return sorted(file.name.removesuffix(".json") for file in FOLDER.iterdir() if file.name.endswith(".json"))


def published(name: str) -> dict[str, Any]:
    """{"hub": repository, "pipeline": class, "components": {name: configuration}} of a published model.

    Raises:
        UserError: if it is not known.
    """
    if name not in published_names():
        raise UserError(f"no published architecture '{name}'; known: {', '.join(published_names())}")
    found: dict[str, Any] = json.loads(FOLDER.joinpath(f"{name}.json").read_text())
    return found


def architecture_of(path: str) -> str | None:
    """The architecture published under a hub name, if it is known."""
    return next((name for name in published_names() if published(name)["hub"] == path), None)


def published_policy(name: str, call: Call, loading: Loading, device: torch.device | str = "meta") -> PipelinePolicy:
    """The policy of a published architecture, untrained, in the precisions of `loading`."""
    pipe = build_published(name, device)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.to(DTYPES[loading.weights])
    pipe.vae.to(vae_dtype(pipe, loading))
    return as_policy(pipe, call, loading)


def build_published(name: str, device: torch.device | str = "meta") -> DiffusionPipeline:
    """The pipeline with untrained networks, without tokenizers; text encoders are shapes only (the meta device)."""
    model = published(name)
    pipeline_class = getattr(diffusers, model["pipeline"])
    expected, _ = pipeline_class._get_signature_keys(pipeline_class)
    components: dict[str, Any] = dict.fromkeys(name for name in expected if name != "self")
    for part, config in model["components"].items():
        components[part] = _build(dict(config), "meta" if part.startswith("text_encoder") else device)
    more = {"requires_safety_checker": False} if model["pipeline"] == "StableDiffusionPipeline" else {}
    return pipeline_class(**components, **more)


def _build(config: dict[str, Any], device: torch.device | str) -> Any:
    name = config.pop("_class_name")
    if name.endswith("Scheduler"):
        return getattr(diffusers, name).from_config(config)
    with torch.device(device):
        if hasattr(diffusers, name):
            return getattr(diffusers, name).from_config(config).eval()
        network = getattr(transformers, name)
        return network(network.config_class(**config)).eval()
