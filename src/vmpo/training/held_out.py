"""The held-out measurement taken every few epochs: reward and KL on prompts that are not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vmpo.kernels import Kernel
from vmpo.policies.policy import Policy
from vmpo.rewards import Reward, combine, score_images
from vmpo.rollouts import rollout
from vmpo.training.processes import gather_rows, share
from vmpo.training.prompts import PromptSet
from vmpo.training.scoring import decode


@dataclass(frozen=True)
class HeldOut:
    """One picture of each held-out prompt at fixed seeds: scores by reward, total, exact KL (nats), first pictures."""

    scores: dict[str, Tensor]
    reward: Tensor
    kl_ref: Tensor
    images: Tensor

    def metrics(self) -> dict[str, float]:
        """Means and standard errors under the names of the run record."""
        valid = self.reward[torch.isfinite(self.reward)]
        spread = valid.std().item() / len(valid) ** 0.5 if len(valid) > 1 else float("nan")
        out = {
            "eval_reward_mean": valid.mean().item() if len(valid) else float("nan"),
            "eval_reward_se": spread,
            "eval_kl_ref": self.kl_ref.mean().item(),
        }
        return out | {f"eval_{name}_mean": score.nanmean().item() for name, score in self.scores.items()}


def measure_held_out(
    policy: Policy,
    kernel: Kernel,
    rewards: dict[str, Reward],
    weights: dict[str, float],
    prompts: PromptSet,
    accelerator: Accelerator,
    *,
    seed: int,
    batch: int,
) -> HeldOut:
    """Draws and scores one picture a prompt; the seeds, hence the starting noises, are the same at every call."""
    mine = share(len(prompts), accelerator)
    local = prompts.take(mine)
    drawn = rollout(policy, kernel, policy.encode(local.prompts), [seed * 1_000_003 + i for i in mine], batch=batch)
    images = decode(policy, drawn.x_0, batch)
    found = score_images(rewards, images, local.prompts, local.metadata)
    total = len(prompts)
    scores = {name: gather_rows(score, mine, total, accelerator) for name, score in found.items()}
    group = torch.zeros(total, dtype=torch.long)
    return HeldOut(
        scores,
        combine({n: scores[n] for n in weights}, weights, group),
        gather_rows(drawn.kl_ref.sum(1).cpu(), mine, total, accelerator),
        images[:32],
    )
