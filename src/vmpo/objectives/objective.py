"""Training objectives as compositions of a centre, a loss and a potential of the log importance weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.log_weights import LogWeights

Level = Literal["step", "trajectory"]
Centre = Literal["group", "learned", "zero"]
Loss = Literal["squared", "surrogate", "clipped"]
Potential = Literal["return_to_go", "difference", "terminal"]
CHOICES = {"level": Level, "centre": Centre, "loss": Loss, "potential": Potential}

STD_FLOOR = 1e-4


class RowTerms(NamedTuple):
    """What a micro-batch of rows (trajectory, step) needs to know of all the others; nothing here has a gradient.

    Attributes:
        advantage: handed to `Objective.row_loss`, (N, S), nats. For 'surrogate' and 'clipped' the centred log-weight A.
            For 'squared' the target that log p_theta + M is regressed on: at step level log p_ref + Δφ, free of theta.
        weight: of each row in the total loss, all normalisation included, (N, S).
        mask: rows that count, (N, S) bool; elsewhere weight and advantage are 0.
    """

    advantage: Tensor
    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Objective:
    """A loss of the log-weights log w = log p_ref − log p_theta + Δφ, centred at c.

        A = log w − c            of a step, or summed over the trajectory
        squared                  (log w − M)²                             (Eq. 8; gradient −2A ∇(log p_theta + M))
        surrogate                −A·log p_theta, A detached               (Eq. 31; gradient of ½ Var, Eq. 6)
        clipped                  −min(ρA, clip(ρ, 1−ε, 1+ε)A)             (Eq. 21, 32)

    The total loss over any set of rows is Σ weight·row_loss: its gradient summed over micro-batches is the gradient of
    the whole, because ∇½Var is linear in ∇log p_theta with coefficients that need no graph (Σ_i A_i = 0, Eq. 26). Its
    value is the objective's for 'squared' at step level only; `LogWeights` has the variance itself.

    Attributes:
        name: of the method.
        level: centre each step's log w ('step') or their sum over the trajectory ('trajectory', Eq. 37 left).
        centre: 'group' mean, 'learned' M(t), or 'zero'.
        loss: see above.
        potential: which Δφ the reward enters by.
        per_step: return-to-go with the factor 1/S (Eq. 39) or without (Eq. 4).
        reference: log p_ref − log p_theta is part of the weight; False leaves the reward alone (REINFORCE, GRPO).
        standardise: divide A by the group's standard deviation (divisor K) + 1e-4, in the units of Δφ.
        bessel: a group's sum is divided by K−1 (Eq. 5, 32) rather than K (Eq. 21).
        clip_range: ε, of the exact ratio of a step's densities.
        source: paper and equations.

    Raises:
        UserError: if the parts do not make a sound method.
    """

    name: str
    level: Level = "step"
    centre: Centre = "group"
    loss: Loss = "surrogate"
    potential: Potential = "return_to_go"
    per_step: bool = True
    reference: bool = True
    standardise: bool = False
    bessel: bool = False
    clip_range: float = 0.2
    source: str = ""

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in get_args(allowed):
                known = ", ".join(get_args(allowed))
                raise UserError(f"objective '{self.name}': {field}='{getattr(self, field)}' is not one of {known}")
        if reason := _unsound(self):
            raise UserError(f"objective '{self.name}': {reason}")

    @property
    def needs_log_p(self) -> bool:
        """Whether `rows` depends on the current log p_theta: if not, off-policy steps need no extra forward pass."""
        return self.reference and not (self.loss == "squared" and self.level == "step")

    # --- all rows -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rows(
        self,
        log_p: Tensor | None,
        log_p_ref: Tensor,
        delta_phi: Tensor,
        group: Tensor,
        centre_value: Tensor | None = None,
    ) -> RowTerms:
        """The terms that couple rows, from the matrices of all trajectories.

        A trajectory with a non-finite entry leaves its group. A group of fewer than two valid trajectories has no
        spread and, with the group centre, leaves the loss; the mean over groups is over those that stay.

        Args:
            log_p: current log p_theta, nats, (N, S); may be None unless `needs_log_p`.
            log_p_ref: nats, (N, S).
            delta_phi: Δφ, nats, (N, S); NaN rows are masked.
            group: group of each trajectory, (N,).
            centre_value: M of each step as `LearnedCentre` gives it, (S,), or a scalar M.

        Raises:
            ValueError: if `log_p` or `centre_value` is needed and missing.
        """
        if self.needs_log_p and log_p is None:
            raise ValueError(f"objective '{self.name}' needs the current log p_theta")
        if self.centre == "learned" and centre_value is None:
            raise ValueError(f"objective '{self.name}' needs the value of its learned centre")
        log_w = LogWeights(self._log_w(log_p, log_p_ref, delta_phi), group)
        least = 2 if self.centre == "group" else 1
        keep = (log_w.mask & (log_w.count[log_w.index] >= least))[:, None].expand_as(log_w.log_w)
        if self.loss != "squared":
            advantage = self._advantage(log_w)
        elif self.level == "step":
            advantage = log_p_ref + delta_phi
        else:
            advantage = _trajectory_target(log_w, cast("Tensor", log_p), cast("Tensor", centre_value))
        zeros = torch.zeros_like(log_w.log_w)
        weight = self._weight(log_w, keep, least)
        return RowTerms(torch.where(keep, advantage.to(zeros.dtype), zeros), torch.where(keep, weight, zeros), keep)

    def _log_w(self, log_p: Tensor | None, log_p_ref: Tensor, delta_phi: Tensor) -> Tensor:
        if not self.reference:
            return delta_phi
        return log_p_ref + delta_phi if log_p is None else (log_p_ref - log_p) + delta_phi

    def _advantage(self, log_w: LogWeights) -> Tensor:
        values = log_w if self.level == "step" else LogWeights(log_w.trajectory()[:, None], log_w.group)
        advantage = values.log_w
        if self.centre == "group":
            advantage = advantage - values.step_mean[values.index]
        if self.standardise:
            count = values.count[:, None]
            std = (values.step_variance * (count - 1) / count).sqrt()
            advantage = advantage / (std[values.index] + STD_FLOOR)
        return advantage.expand_as(log_w.log_w)

    def _weight(self, log_w: LogWeights, keep: Tensor, least: int) -> Tensor:
        """Mean over rows for a learned centre (Eq. 8), mean over groups of 1/(K−1) or 1/K otherwise (Eq. 5, 21)."""
        if self.centre == "learned":
            rows = keep.sum() if self.level == "step" else keep.any(1).sum()
            return (1 / rows.clamp(min=1).to(log_w.log_w.dtype)).expand_as(log_w.log_w)
        num_groups = (log_w.count >= least).sum().clamp(min=1)
        members = (log_w.count - 1 if self.bessel else log_w.count).clamp(min=1)
        return (1 / (num_groups * members))[log_w.index, None].expand_as(log_w.log_w)

    # --- any rows -------------------------------------------------------------------------------------------------

    def row_loss(
        self, log_p: Tensor, log_p_old: Tensor, advantage: Tensor, centre_value: Tensor | None = None
    ) -> Tensor:
        """The loss of rows (trajectory, step), to be weighted by `RowTerms.weight` and summed, (R,).

        Args:
            log_p: log p_theta of the rows, with its graph, nats, (R,).
            log_p_old: log p_old, nats, (R,); read by 'clipped' only.
            advantage: `RowTerms.advantage` of the rows, (R,).
            centre_value: `LearnedCentre` at the rows' steps, with its graph, (R,); for the learned centre only.

        Raises:
            ValueError: if the centre is learned and `centre_value` is missing.
        """
        if self.loss == "surrogate":
            return -advantage * log_p
        if self.loss == "clipped":
            ratio = (log_p - log_p_old).exp()
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            return -torch.minimum(ratio * advantage, clipped * advantage)
        if self.centre == "zero":
            return (advantage - log_p) ** 2
        if centre_value is None:
            raise ValueError(f"objective '{self.name}' needs the value of its learned centre at these rows")
        return (advantage - log_p - centre_value) ** 2

    def metrics(self, log_p: Tensor, log_p_old: Tensor, advantage: Tensor) -> dict[str, float]:
        """Means over rows of the ratio p_theta/p_old and, for 'clipped', of the rows whose gradient is cut off."""
        ratio = (log_p.detach() - log_p_old).exp()
        above, below = ratio > 1 + self.clip_range, ratio < 1 - self.clip_range
        cut = (above & (advantage > 0)) | (below & (advantage < 0))
        fraction = cut.float().mean().item() if self.loss == "clipped" else 0.0
        return {"ratio_mean": ratio.mean().item(), "clip_fraction": fraction}


def _trajectory_target(log_w: LogWeights, log_p: Tensor, centre_value: Tensor) -> Tensor:
    """(N, S) such that target − log p − M/S is Σ_s log w − M: the trajectory's other steps are held where they are."""
    num_steps = log_p.shape[1]
    share = centre_value if centre_value.ndim else centre_value.expand(num_steps) / num_steps
    return (log_w.trajectory() - share.sum())[:, None] + log_p + share


def _unsound(objective: Objective) -> str | None:
    """Why the parts of an objective do not make a sound method, with what would, or None if they do."""
    learned, grouped = objective.centre == "learned", objective.centre == "group"
    squared, step = objective.loss == "squared", objective.level == "step"
    if learned and not squared:
        return f"loss='{objective.loss}' gives the learned centre no gradient; use loss='squared' or centre='group'"
    if squared and grouped:
        return "the squared loss around a group mean has the surrogate's gradient (Eq. 26); use loss='surrogate'"
    if squared and not learned and not (step and objective.potential == "difference"):
        return (
            "centre='zero' with loss='squared' demands log w = 0, but the log-weights of this potential are at best "
            "constant, at log Z; use centre='learned', or potential='difference' with level='step' (Eq. 49)"
        )
    if squared and not objective.reference:
        return "loss='squared' without log p_ref − log p_theta does not depend on the policy; set reference=True"
    if step and objective.potential == "terminal":
        return (
            "potential='terminal' leaves all steps but the last without reward at level='step'; use 'return_to_go' or "
            "'difference', or level='trajectory'"
        )
    if not step and objective.potential == "return_to_go" and not objective.per_step:
        return "return_to_go with per_step=False counts the reward S times at level='trajectory'; set per_step=True"
    if objective.standardise and not grouped:
        return "standardise=True divides by the group's standard deviation; it needs centre='group'"
    if objective.bessel and not grouped:
        return "bessel=True corrects for a mean of the same samples; it needs centre='group'"
    if objective.loss == "clipped" and not 0 < objective.clip_range < 1:
        return f"clip_range={objective.clip_range} must lie between 0 and 1"
    return None
