"""What fits this device: the largest micro-batch of the published architectures, without their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vmpo.policies.adapters import add_lora
from vmpo.policies.published import architecture_of, published, published_names, published_policy
from vmpo.training.config import Config, Model, Sampler
from vmpo.training.memory import MemoryEstimate, available_memory, estimate_memory
from vmpo.training.recipes import load_config, recipe_names
from vmpo.training.setup import call_of, loading_of


@dataclass(frozen=True)
class Capacity:
    """What one device holds; reward models are not counted.

    Attributes:
        job: recipe, or the name of the architecture.
        plain: the estimate with all activations kept; saving: with model.checkpointing and model.vae_slicing.
        available: bytes.
    """

    job: str
    plain: MemoryEstimate
    saving: MemoryEstimate
    available: int


def jobs() -> dict[str, Config]:
    """For every published architecture its plainest recipe, else a run of 128 pictures in 50 guided steps."""
    found = {}
    recipes = {name: load_config(name, []) for name in recipe_names()}
    for name in published_names():
        hub = published(name)["hub"]
        ours = [recipe for recipe, config in recipes.items() if config.model.path == hub]
        job = min(ours, key=len, default=name)
        plain = Config(model=Model(path=hub, guidance=5.0, weights="bf16"), sampler=Sampler(kernel="ddim", steps=50))
        found[job] = recipes.get(job, plain)
    return found


def capacities(chosen: dict[str, Config], tell: Callable[[str], None]) -> list[Capacity]:
    """Of runs by name; those whose model's architecture is not known are left out.

    Args:
        tell: is told what is being worked out, which takes some seconds each.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available, found = available_memory(device), []
    for job, config in chosen.items():
        architecture = architecture_of(config.model.path)
        if architecture is None:
            continue
        tell(f"what fits: {job}")
        plain, saving = (_estimate(config, architecture, saving=saving) for saving in (False, True))
        found.append(Capacity(job, plain, saving, available))
    return found


def _estimate(config: Config, architecture: str, *, saving: bool) -> MemoryEstimate:
    loading, lora = loading_of(config), config.model.lora
    if saving:
        loading = replace(loading, checkpointing=True, vae_slicing=True)
    policy = published_policy(architecture, call_of(config), loading)
    add_lora(policy, lora.rank, lora.alpha, lora.targets, config.seed)
    return estimate_memory(config, policy)
