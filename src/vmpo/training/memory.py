"""What a run needs of the device's memory, said before it starts, and the largest micro-batch that fits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import psutil
import torch
import yaml
from accelerate import Accelerator

from vmpo.errors import UserError
from vmpo.policies.memory import decode_bytes, update_bytes, weight_bytes
from vmpo.policies.pipeline import PipelinePolicy
from vmpo.training.config import Config

GIB = 1 << 30
ADAPTER_COPIES = 5  # values, gradients, two moments of AdamW, the average
MARGIN = 0.9  # of the memory is planned for; allocators waste some


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        weights: of all networks that stay there.
        encoders: of text encoders that come and go.
        adapter: its values, gradients, optimiser state and average.
        states: of the trajectories drawn in an epoch, this process's share.
        row: what a row of an update adds; picture: what decoding a picture adds.
    """

    weights: int
    encoders: int
    adapter: int
    states: int
    row: int
    picture: int

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.adapter + self.states

    def total(self, micro_batch: int) -> int:
        """The peak: the worst of encoding, updating and decoding."""
        return self.fixed + max(self.encoders, micro_batch * max(self.row, self.picture))

    def largest(self, available: int) -> int:
        """Rows that fit beside the rest; 0 if not even one does."""
        return max(0, int(MARGIN * available - self.fixed) // max(self.row, self.picture))


def estimate_memory(config: Config, policy: PipelinePolicy, processes: int = 1) -> MemoryEstimate:
    """Of a policy with its adapter; reward models are not counted."""
    pipe, lora, sampler, optimisation = policy.pipe, config.model.lora, config.sampler, config.optimisation
    encoders = sum(map(weight_bytes, policy.encoders))
    stays = 0 if config.model.offload_encoders else encoders
    adapter = [p for n, p in policy.denoiser.named_parameters() if "lora_" in n]
    state = 4 * torch.Size(policy.state_shape).numel()
    steps = min(sampler.steps, sampler.window[1]) if sampler.window else sampler.steps
    drawn = -(-optimisation.prompts * optimisation.group // processes)
    return MemoryEstimate(
        weights=weight_bytes(policy.denoiser) + weight_bytes(pipe.vae) + stays,
        encoders=encoders - stays,
        adapter=ADAPTER_COPIES * sum(4 * p.numel() for p in adapter),
        states=drawn * state * (sampler.steps + 1 + 2 * steps),
        row=update_bytes(policy, lora.rank, lora.targets),
        picture=decode_bytes(policy),
    )


def available_memory(device: torch.device) -> int:
    """Bytes of the whole GPU, or of memory that is free on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(psutil.virtual_memory().available)


def _line(estimate: MemoryEstimate, micro_batch: int, available: int) -> str:
    fixed, row, total, there = map(readable, (estimate.fixed, estimate.row, estimate.total(micro_batch), available))
    return f"memory: {fixed} and {micro_batch} rows of {row}, about {total} of {there}; reward models are not counted"


def readable(size: int) -> str:
    """Bytes for the eye."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _share(policy: PipelinePolicy, accelerator: Accelerator) -> int:
    # processes have a GPU each, or the CPU's memory between them
    available = available_memory(policy.device)
    return available if policy.device.type == "cuda" else available // accelerator.num_processes


def plan_memory(
    config: Config, policy: PipelinePolicy, folder_config: str | None, accelerator: Accelerator
) -> tuple[Config, str]:
    """The configuration with a micro-batch of 0 replaced by the largest that fits, and the estimate for the eye.

    A resumed run keeps the number it was begun with. Only the main process has something to show.

    Args:
        folder_config: the text of the run folder's config.yaml, if the run was begun.

    Raises:
        UserError: if not even one row fits.
    """
    optimisation, share = config.optimisation, _share(policy, accelerator)
    estimate = cache(lambda: estimate_memory(config, policy, accelerator.num_processes))  # takes seconds
    found = optimisation.micro_batch
    if not found and folder_config is not None:
        found = int(yaml.safe_load(folder_config)["optimisation"]["micro_batch"])
    elif not found:
        found = _largest(config, estimate(), share, accelerator)
    planned = config.model_copy(update={"optimisation": optimisation.model_copy(update={"micro_batch": found})})
    return planned, _line(estimate(), found, share) if accelerator.is_main_process else ""


def _largest(config: Config, estimate: MemoryEstimate, share: int, accelerator: Accelerator) -> int:
    most = config.optimisation.prompts * config.optimisation.group * config.sampler.steps
    fits = torch.tensor(min(estimate.largest(share), most), device=accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(fits, op=torch.distributed.ReduceOp.MIN)
    if int(fits) < 1:
        raise UserError(
            f"not even one row fits: {_line(estimate, 1, share)}; try model.checkpointing=true, "
            f"model.offload_encoders=true, model.vae_slicing=true, model.weights=bf16 or a smaller picture"
        )
    return int(fits)
