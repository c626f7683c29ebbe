"""Times ddpo-pytorch's own sampling and training steps beside vmpo's, on the same network, adapter and pictures.

python benchmarks/peer_ddpo.py CHECKOUT [RECIPE] [key.path=value …] [--repeats N] [--threads N] [--out FILE]

CHECKOUT is a copy of github.com/kvablack/ddpo-pytorch. Its `pipeline_with_logprob` draws, and its training loop's
arithmetic is repeated around its `ddim_step_with_logprob`: one guided forward and backward a step, gradients added up
over all steps of all pictures, one AdamW step. vmpo does the same by objective `ddpo_is` with noise in all steps; its
rollout includes the reference's densities, which the peer does not work out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import diffusers.utils
import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from throughput import rounded
from torch import Tensor

from vmpo.policies.pipeline import PipelinePolicy
from vmpo.training.provenance import hardware
from vmpo.training.recipes import load_config
from vmpo.training.run import silence_libraries
from vmpo.training.setup import load_parts
from vmpo.training.trainer import Trainer

SAME = ["objective.name=ddpo_is", "sampler.window=null", "sampler.eta=1.0", "optimisation.updates=1"]
CLIP, BOUND = 1e-4, 5.0


class Peer:
    """ddpo-pytorch's functions on a policy's pipeline."""

    def __init__(self, checkout: Path, policy: PipelinePolicy, prompts: list[str], steps: int) -> None:
        # newer diffusers keep it elsewhere
        diffusers.utils.randn_tensor = randn_tensor  # type: ignore[attr-defined]
        sys.path.insert(0, str(checkout))
        from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
        from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob

        self.draw, self.step = pipeline_with_logprob, ddim_step_with_logprob
        self.policy, self.pipe, self.steps = policy, policy.pipe, steps
        conditioning = policy.encode(prompts)
        self.embeds = conditioning.positive["encoder_hidden_states"]
        assert conditioning.negative is not None
        self.negative = conditioning.negative["encoder_hidden_states"]

    def sample(self, micro_batch: int) -> tuple[Tensor, Tensor]:
        """All latents, (N, T + 1, *shape), and log-densities, (N, T), in the peer's batches."""
        latents, log_p = [], []
        factor = self.pipe.vae_scale_factor
        for embeds, negative in zip(self.embeds.split(micro_batch), self.negative.split(micro_batch), strict=True):
            _, _, states, densities = self.draw(
                self.pipe,
                prompt_embeds=embeds,
                negative_prompt_embeds=negative,
                height=self.policy.state_shape[1] * factor,
                width=self.policy.state_shape[2] * factor,
                num_inference_steps=self.steps,
                guidance_scale=self.policy.call.guidance,
                eta=1.0,
                output_type="latent",
            )
            latents.append(torch.stack(states, 1))
            log_p.append(torch.stack(densities, 1))
        return torch.cat(latents), torch.cat(log_p)

    def update(self, latents: Tensor, log_p: Tensor, micro_batch: int, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step on every step of every picture."""
        rows = torch.arange(len(latents))
        advantages = torch.randn(len(latents)).clamp(-BOUND, BOUND)  # what they are does not change what a step costs
        parts = len(rows.split(micro_batch)) * self.steps
        for part in rows.split(micro_batch):
            embeds = torch.cat([self.negative[part], self.embeds[part]])
            for j, t in enumerate(self.pipe.scheduler.timesteps):
                times = t.repeat(len(part))
                out = self.pipe.unet(torch.cat([latents[part, j]] * 2), torch.cat([times] * 2), embeds).sample
                plain, text = out.chunk(2)
                noise = plain + self.policy.call.guidance * (text - plain)
                _, new = self.step(
                    self.pipe.scheduler, noise, times, latents[part, j], eta=1.0, prev_sample=latents[part, j + 1]
                )
                ratio = (new - log_p[part, j]).exp()
                worse = torch.maximum(-advantages[part] * ratio, -advantages[part] * ratio.clamp(1 - CLIP, 1 + CLIP))
                (worse.mean() / parts).backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.pipe.unet.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(checkout: Path, recipe: str, overrides: list[str], repeats: int) -> dict[str, Any]:
    """Images and rows a second of both, in one process on the same weights."""
    config = load_config(recipe, [*SAME, *overrides])
    parts = load_parts(config, torch.device("cpu"))
    policy, micro_batch = parts.policy, config.optimisation.micro_batch
    seconds: dict[str, list[float]] = {"sampling": [], "updates": [], "peer_sampling": [], "peer_updates": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, parts, Path(folder), Accelerator(cpu=True))
        data, _ = trainer.draw(0)
        peer = Peer(checkout, policy, parts.train.take(data.prompt.tolist()).prompts, config.sampler.steps)
        latents, log_p = peer.sample(micro_batch)
        optimizer, groups = trainer.updater.optimizer, data.group.unique()
        for _ in range(repeats + 1):  # in turn, so that what else the machine does hits both; the first one warms up
            seconds["sampling"].append(trainer.draw(0)[1]["time_rollout"])
            seconds["peer_sampling"].append(seconds_of(lambda: peer.sample(micro_batch)))
            seconds["updates"].append(seconds_of(lambda: trainer.updater.step(data, groups, on_policy=True)))
            seconds["peer_updates"].append(seconds_of(lambda: peer.update(latents, log_p, micro_batch, optimizer)))
    images, rows = len(latents), latents.shape[0] * config.sampler.steps

    def figures(prefix: str) -> dict[str, float]:
        sampling, updates = (median(seconds[f"{prefix}{work}"][1:]) for work in ("sampling", "updates"))
        return {"images_per_s": images / sampling, "rows_per_s": rows / updates}

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "recipe": config.name,
        "overrides": [*SAME, *overrides],
        "images": images,
        "steps": config.sampler.steps,
        "micro_batch": micro_batch,
        "vmpo": figures(""),
        "ddpo-pytorch": figures("peer_"),
    }


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("words", nargs="*", metavar="RECIPE or key.path=value")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/peer-ddpo.json"))
    given = parser.parse_args()
    words = list(given.words)
    recipe = words.pop(0) if words and "=" not in words[0] else "glyphs-ddim"
    silence_libraries()
    if given.threads:
        torch.set_num_threads(given.threads)
    text = json.dumps(rounded(measure(given.checkout, recipe, words, given.repeats)), indent=2)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
