"""The measurement taken every few epochs: rewards, KL and diversity of fixed prompts at fixed noises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vmpo.kernels import Kernel
from vmpo.policies.policy import Policy
from vmpo.prompts import PromptSet
from vmpo.rewards import Reward, combine, score_images
from vmpo.rollouts import rollout
from vmpo.training.processes import gather_rows, share
from vmpo.training.scoring import decode


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of the values of prompts (P,), NaN left out, and its standard error between prompts; NaN where undefined."""
    valid = values[torch.isfinite(values)]
    error = valid.std().item() / len(valid) ** 0.5 if len(valid) > 1 else float("nan")
    return valid.mean().item() if len(valid) else float("nan"), error


@dataclass(frozen=True)
class HeldOut:
    """M pictures of each of P prompts.

    Attributes:
        scores: of each reward, {name: (P, M)}, NaN where it failed; reward: the total that is trained on, (P, M).
        kl_ref: exact KL to the reference, nats a trajectory, (P, M).
        diversity: total variance of a prompt's latents divided by their dimension, (P,); None for one picture.
        images: the first pictures of the first prompts.
    """

    scores: dict[str, Tensor]
    reward: Tensor
    kl_ref: Tensor
    diversity: Tensor | None
    images: Tensor

    def metrics(self) -> dict[str, float]:
        """Means over prompts with their standard errors, under the names of the run record."""
        mean, error = mean_and_error(self.reward.nanmean(1))
        out = {"eval_reward_mean": mean, "eval_reward_se": error, "eval_kl_ref": self.kl_ref.mean(1).mean().item()}
        for name, score in self.scores.items():
            prompts = score.nanmean(1)
            out |= {f"eval_{name}_mean": prompts.nanmean().item(), f"eval_{name}_se": mean_and_error(prompts)[1]}
            if failed := score.isnan().double().mean().item():
                out[f"eval_{name}_failed"] = failed
        if self.diversity is not None:
            out["eval_diversity"], out["eval_diversity_se"] = mean_and_error(self.diversity)
        return out


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
    images: int = 1,
) -> HeldOut:
    """Draws and scores `images` pictures a prompt; the seeds, hence the starting noises, are the same at every call.

    A process draws all pictures of its prompts. The first pictures of all prompts come first: the number of pictures
    asked for does not change them.
    """
    mine, total = share(len(prompts), accelerator), len(prompts)
    local = prompts.take(mine * images)
    seeds = [seed * 1_000_003 + m * 100_003 + i for m in range(images) for i in mine]
    drawn = rollout(policy, kernel, policy.encode(local.prompts), seeds, batch=batch)
    pictures = decode(policy, drawn.x_0, batch)

    def gathered(values: Tensor) -> Tensor:
        """One value a local picture as (P, M)."""
        return gather_rows(values.cpu().view(images, -1).T.contiguous(), mine, total, accelerator)

    scores = {n: gathered(s) for n, s in score_images(rewards, pictures, local.prompts, local.metadata).items()}
    reward = combine({n: scores[n].flatten() for n in weights}, weights, torch.zeros(total * images, dtype=torch.long))
    diversity = None
    if images > 1:
        latents = drawn.x_0.flatten(1).double().cpu().view(images, len(mine), -1)
        diversity = gather_rows(latents.var(0).mean(-1), mine, total, accelerator)
    first = pictures[: min(len(mine), 32)]
    return HeldOut(scores, reward.view(total, images), gathered(drawn.kl_ref.sum(1)), diversity, first)
