"""What must hold before the first update, and after it; a run that fails here would train silently on nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.policies.policy import Policy
from vmpo.training.rollout import Rollout
from vmpo.training.update import Updater

TOLERANCE = 1e-3  # nats; rows drawn and trained in batches of equal make-up agree to the last bit on a CPU


def check_ratio(updater: Updater, rollout: Rollout) -> float:
    """Largest |log p_theta − log p_old| of the first rows under the unchanged policy, nats; 0 is right.

    Raises:
        UserError: above the tolerance: rollout and training do not evaluate the same density.
    """
    rows = torch.arange(min(len(rollout.rows), updater.micro_batch))
    worst = 0.0
    for s in range(len(updater.steps)):
        _, log_p = updater.transition(rollout, rows, torch.full_like(rows, s))
        log_p_old = updater.density_scale * rollout.trajectory.log_p_old[rows, s]
        worst = max(worst, float((log_p.detach().cpu() - log_p_old).abs().max()))
    if not worst <= TOLERANCE:
        raise UserError(
            f"the ratio p_theta/p_old of the unchanged policy is not 1: log ratio up to {worst:.3g} nats; the network "
            f"answers differently in rollout and training (precision, dropout, or attention back end)"
        )
    return worst


def check_some_reward(reward: Tensor) -> None:
    """At least one reward of an epoch must be there.

    Raises:
        UserError: if all failed.
    """
    if not torch.isfinite(reward).any():
        raise UserError("every reward of the epoch failed; see the messages above, the run can be resumed when mended")


def check_rewards_vary(reward: Tensor, group: Tensor) -> None:
    """Before the first update, rewards must vary within at least one group; a run that has converged may end flat.

    Raises:
        UserError: if none varies.
    """
    groups = [reward[group == g] for g in group.unique()]
    if all(len(r[torch.isfinite(r)].unique()) < 2 for r in groups):
        value = reward[torch.isfinite(reward)][0].item()
        raise UserError(
            f"rewards do not vary within any group (all are {value:g}), so there is nothing to learn from; "
            f"check that the reward reads these pictures and prompts, or enlarge optimisation.group"
        )


def check_adapter(policy: Policy, updater: Updater, rollout: Rollout, grad_norm: float) -> None:
    """After the first update the adapter must have had a gradient and must change the output.

    Raises:
        UserError: otherwise.
    """
    if not grad_norm > 0:
        raise UserError(f"the adapter received no gradient (norm {grad_norm}); check model.lora.targets and the reward")
    rows = torch.arange(min(len(rollout.rows), 2))
    first = torch.zeros_like(rows)
    with torch.no_grad():
        adapted, _ = updater.transition(rollout, rows, first)
        with policy.reference():
            base, _ = updater.transition(rollout, rows, first)
    if torch.equal(adapted.mean, base.mean):
        raise UserError("the adapter does not change the output after an update; check model.lora.targets")
