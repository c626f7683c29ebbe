"""Draws trajectories from a policy and keeps their densities under policy and reference."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import torch
from torch import Tensor

from vmpo.kernels import Kernel
from vmpo.policies.policy import Conditioning, Policy
from vmpo.trajectory import Trajectory


def noise_for(seeds: list[int], num_steps: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise of N trajectories, (N, T+1, *shape): x_T first, then one draw a step.

    Each trajectory has a generator of its own on the CPU, so that neither batch size nor number of processes nor
    kind of device changes a sample; its first draw is what a diffusers pipeline takes as latents at that seed.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.cat([torch.randn((1, *shape), generator=generator) for _ in range(num_steps + 1)]))
    return torch.stack(rows).to(device)


def reference_rows(share: float, group: int, rows: Tensor) -> Tensor | None:
    """Which of the samples `rows` p_ref draws, (n,) bool: the last of each group, at least one; None for no share.

    Args:
        share: of a group's trajectories; rounded to whole ones.
        group: trajectories of a group, which follow each other.
        rows: global sample indices, (n,) long.
    """
    return rows % group >= group - max(1, round(share * group)) if share > 0 else None


@torch.no_grad()
def rollout(
    policy: Policy,
    kernel: Kernel,
    conditioning: Conditioning,
    seeds: list[int],
    *,
    batch: int = 64,
    x0_hat_at: Collection[int] = (),
    x0_hat_of: Literal["policy", "reference"] = "policy",
    dtype: torch.dtype = torch.float32,
    from_reference: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Draws one trajectory a seed, in batches; densities are those of the stored states.

    Args:
        conditioning: encoded prompts, N of them.
        seeds: N noise seeds.
        x0_hat_at: stochastic steps s at which the predicted clean state is kept (for intermediate rewards, Eq. 44).
        x0_hat_of: whose prediction that is.
        dtype: precision the states are stored in; they are cast before their density is evaluated.
        from_reference: trajectories that p_ref draws in place of the policy, (N,) bool; None: none.
        progress: called with the number of trajectories done.
    """
    parts = []
    for start in range(0, len(seeds), batch):
        chunk = slice(start, start + batch)
        noise = noise_for(seeds[chunk], kernel.num_steps, policy.state_shape, policy.device)
        drawn_by = None if from_reference is None else from_reference[chunk]
        parts.append(
            rollout_from_noise(
                policy,
                kernel,
                conditioning[chunk],
                noise,
                x0_hat_at=x0_hat_at,
                x0_hat_of=x0_hat_of,
                dtype=dtype,
                from_reference=drawn_by,
            )
        )
        if progress is not None:
            progress(min(start + batch, len(seeds)))
    return Trajectory.cat(parts)


@torch.no_grad()
def rollout_from_noise(
    policy: Policy,
    kernel: Kernel,
    conditioning: Conditioning,
    noise: Tensor,
    *,
    x0_hat_at: Collection[int] = (),
    x0_hat_of: Literal["policy", "reference"] = "policy",
    dtype: torch.dtype = torch.float32,
    from_reference: Tensor | None = None,
) -> Trajectory:
    """Draws trajectories in one batch from standard normal noise, (N, T+1, *shape); arguments as in `rollout`."""
    x_t = kernel.initial(noise[:, 0]).to(dtype)
    states, log_p, log_p_ref, means, means_ref, kl_ref = [x_t], [], [], [], [], []
    x0_hat: dict[int, Tensor] = {}
    times = kernel.times.to(x_t.device)
    s = 0
    for k in range(kernel.num_steps):
        step = torch.full((len(x_t),), k, device=x_t.device)
        output = policy.predict(x_t, times[step], conditioning)
        p = kernel.transition(x_t, output, step)
        x_next = p.sample(noise[:, k + 1]).to(dtype)  # cast first: the density is that of what is stored
        if kernel.stochastic[k]:
            with policy.reference():
                output_ref = policy.predict(x_t, times[step], conditioning)
            p_ref = kernel.transition(x_t, output_ref, step)
            if from_reference is not None:
                rows = from_reference.to(x_t.device).view(-1, *[1] * (x_t.ndim - 1))
                x_next = torch.where(rows, p_ref.sample(noise[:, k + 1]).to(dtype), x_next)
            log_p.append(p.log_prob(x_next))
            log_p_ref.append(p_ref.log_prob(x_next))
            kl_ref.append(p.kl(p_ref))
            means.append(p.mean)
            means_ref.append(p_ref.mean)
            if s in x0_hat_at:
                x0_hat[s] = kernel.predict_x0(x_t, output if x0_hat_of == "policy" else output_ref, step)
            s += 1
        states.append(x_next)
        x_t = x_next
    if not log_p:  # a deterministic sampler has no densities to keep
        none, no_mean = x_t.new_zeros((len(x_t), 0)), x_t.new_zeros((len(x_t), 0, *x_t.shape[1:]))
        return Trajectory(torch.stack(states, 1), none, none, no_mean, no_mean, none, {})
    return Trajectory(
        x=torch.stack(states, 1),
        log_p_old=torch.stack(log_p, 1),
        log_p_ref=torch.stack(log_p_ref, 1),
        mean_old=torch.stack(means, 1),
        mean_ref=torch.stack(means_ref, 1),
        kl_ref=torch.stack(kl_ref, 1),
        x0_hat=x0_hat,
    )


@torch.no_grad()
def draw_states(policy: Policy, kernel: Kernel, conditioning: Conditioning, seeds: list[int]) -> Tensor:
    """Clean states x_0 of one trajectory a seed, (N, *shape): those of `rollout`, without its densities."""
    noise = noise_for(seeds, kernel.num_steps, policy.state_shape, policy.device)
    x_t, times = kernel.initial(noise[:, 0]), kernel.times.to(policy.device)
    for k in range(kernel.num_steps):
        step = torch.full((len(seeds),), k, device=policy.device)
        output = policy.predict(x_t, times[step], conditioning)
        x_t = kernel.transition(x_t, output, step).sample(noise[:, k + 1]).float()
    return x_t
