"""The same prompts and noises through a run's adapters, from the base model on: what training does to a picture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.evaluation.evaluate import picture_seed, read_run_config
from vmpo.evaluation.picture_source import ADAPTER_FILES, with_sampler
from vmpo.policies.adapters import add_lora, load_lora, lora_parameters
from vmpo.policies.pipeline import PipelinePolicy
from vmpo.rollouts import draw_states
from vmpo.training.averaging import set_values
from vmpo.training.checkpoint import checkpoints
from vmpo.training.config import Config
from vmpo.training.setup import load_kernel_of, load_policy_of

EPOCH = re.compile(r"epoch-(\d+)")


@dataclass(frozen=True)
class Strip:
    """Pictures (3, H, W) of each prompt at each epoch; epoch 0 is the base model."""

    epochs: list[int]
    prompts: list[str]
    pictures: list[list[Tensor]]


def adapters_by_epoch(run: Path) -> dict[int, Path]:
    """Where the adapter after each epoch lies: adapters kept on their own before those inside checkpoints."""
    found = {int(p.name.removeprefix("epoch-")): p / "state.pt" for p in checkpoints(run / "checkpoints")}
    for file in run.rglob(ADAPTER_FILES[0]):
        match = EPOCH.fullmatch(file.parent.name)
        if match:
            found[int(match[1])] = file.parent
    return dict(sorted(found.items()))


def spread(epochs: list[int], count: int) -> list[int]:
    """At most `count` epochs, the first and the last among them, as evenly spaced as there are any."""
    if len(epochs) <= count:
        return epochs
    wanted = [epochs[0] + (epochs[-1] - epochs[0]) * i / max(count - 1, 1) for i in range(count)]
    wanted[-1] = epochs[-1]
    return sorted({min(epochs, key=lambda e: abs(e - w)) for w in wanted})


def _apply(policy: PipelinePolicy, config: Config, adapter: Path) -> None:
    """Puts an adapter in place of the present one."""
    policy.pipe.unload_lora_weights()
    if adapter.is_dir():
        load_lora(policy, adapter)
        return
    lora = config.model.lora
    add_lora(policy, lora.rank, lora.alpha, lora.targets, config.seed)
    state = torch.load(adapter, map_location="cpu", weights_only=False)
    set_values(lora_parameters(policy), state["average"])


@torch.no_grad()
def draw_strip(
    run: Path, prompts: list[str], *, seed: int, columns: int, steps: int | None, eta: float | None
) -> Strip:
    """Draws each prompt once an epoch, always from the same noise.

    Raises:
        UserError: if the folder is no run folder, or keeps no adapter.
    """
    config = with_sampler(read_run_config(run), steps, eta)
    adapters = adapters_by_epoch(run)
    if not adapters:
        raise UserError(f"run '{run}' keeps no adapter of any epoch; 'vmpo train' with --run {run} makes checkpoints")
    policy = load_policy_of(config, "cuda" if torch.cuda.is_available() else "cpu")
    kernel, chosen = load_kernel_of(config, policy), [0, *spread(list(adapters), columns - 1)]
    seeds = [picture_seed(seed, p, 0) for p in range(len(prompts))]
    pictures: list[list[Tensor]] = [[] for _ in prompts]
    for epoch in chosen:
        if epoch:
            _apply(policy, config, adapters[epoch])
        for p, prompt in enumerate(prompts):
            drawn = draw_states(policy, kernel, policy.encode([prompt]), [seeds[p]])
            pictures[p].append(policy.decode(drawn)[0].cpu())
    return Strip(chosen, prompts, pictures)
