"""Training objectives as compositions of a centre, a loss and a potential of the log importance weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.log_weights import LogWeights
from vmpo.objectives.levels import Level, mixing
from vmpo.objectives.soundness import (
    CHOICES,
    Anchor,
    Centre,
    Direction,
    Importance,
    LogProb,
    Loss,
    Potential,
    Predictor,
    Standardise,
    unsound,
)

STD_FLOOR = 1e-4


class RowTerms(NamedTuple):
    """What a micro-batch of rows (trajectory, step) needs to know of all the others; nothing here has a gradient.

    Attributes:
        advantage: handed to `Objective.row_loss`, (N, S), nats. For 'squared' the target that log p_theta + c is
            regressed on: at step level log p_anchor + Δφ, free of theta. Else the log-weight of the level, less its
            group mean where the centre is one; what is learned is taken off in `row_loss`.
        weight: of each row in the total loss, all normalisation and importance included, (N, S).
        mask: rows that count, (N, S) bool; elsewhere weight and advantage are 0.
    """

    advantage: Tensor
    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Objective:
    """A loss of the log-weights log w = log p_anchor − log p_theta + Δφ, centred at c.

        A = log w − c            of a step, or summed as the level says (`vmpo.objectives.levels`)
        squared                  (log w − c)²                             (Eq. 8; gradient −2A ∇(log p_theta + c))
        surrogate                −A·log p_theta, A detached               (Eq. 31; gradient of ½ Var, Eq. 6)
        ratio                    −ρA, ρ = p_theta/p_old                   (Eq. 3)
        clipped                  −min(ρA, clip(ρ, 1−ε, 1+ε)A)             (Eq. 19, 21, 32)
        clamped                  −clip(ρ, 1−ε, 1+ε)A                      (DPOK: no gradient outside, whatever A)
        gradient                 ‖∇_x log w‖²                             (Eq. 51 to 55; `vmpo.training.matching`)

    The total loss over any set of rows is Σ weight·row_loss: its gradient summed over micro-batches is the gradient of
    the whole, because ∇½Var is linear in ∇log p_theta with coefficients that need no graph (Σ_i A_i = 0, Eq. 26). Its
    value is the objective's for 'squared' at step level only; `LogWeights` has the variance itself.

    Attributes:
        name: of the method.
        level: which sums of steps' log w are made constant, see `vmpo.objectives.levels`.
        centre: 'group' mean a prompt and step, 'batch' mean over all prompts, 'learned' M(t), 'prompt' M(t, c),
            'value' M(t) + V(x_t, t, c), or 'zero'. What is learned beside a policy loss other than 'squared' is fitted
            to the uncentred log-weight by least squares (Eq. 7).
        loss: see above.
        potential: which Δφ the reward enters by; 'learned' adds F(x_{t-1}) − F(x_t) to the difference (Eq. 54),
            'learned_product' multiplies intermediate rewards by 1 + F(x_t) (Eq. 45); F(x_0) = 0 in both.
        per_step: return-to-go with the factor 1/S (Eq. 39) or without (Eq. 4).
        anchor: what p_theta is weighed against: 'ref', the policy 'old' that drew the rollout, the 'noising' kernel
            q(x_t|x_{t-1}), or 'none': the reward alone, as in REINFORCE and GRPO.
        standardise: divide A by the population standard deviation of its 'group' or of the 'batch', plus 1e-4.
        bessel: a group's sum is divided by K−1 (Eq. 5, 32) rather than K (Eq. 21).
        clip_range: ε, of the ratio of a step's densities.
        advantage_clip: A is clipped to ± this.
        importance: weigh rows by p_theta/p_old of the 'step' or of the 'trajectory', detached.
        importance_range: what that weight is clipped to; None: not at all.
        direction: of 'gradient': with respect to x_{t-1} ('forward', Eq. 52), x_t ('backward', Eq. 53) or 'both'.
        decay: λ of level 'subtrajectory': a stretch of n steps weighs λ^n.
        log_prob: 'sum' is the density; 'mean' divides it by the dimension D, as published code bases do.
        predictor: whose x̂_0 intermediate rewards are taken of: the 'policy' (Eq. 44) or the 'reference', whose
            potentials stand still while the policy learns.
        kl_old, kl_ref: weights of the exact KLs to p_old and p_ref that are added (Eq. 22).
        reuse, replay, reference_share: what the trajectories are drawn from: passes over a rollout, earlier rollouts
            that are kept, and the share drawn from p_ref.
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
    anchor: Anchor = "ref"
    standardise: Standardise = "none"
    bessel: bool = False
    clip_range: float = 0.2
    advantage_clip: float | None = None
    importance: Importance = "none"
    importance_range: tuple[float, float] | None = None
    direction: Direction = "forward"
    decay: float = 0.9
    log_prob: LogProb = "sum"
    predictor: Predictor = "policy"
    kl_old: float = 0.0
    kl_ref: float = 0.0
    reuse: int = 1
    replay: int = 0
    reference_share: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in get_args(allowed):
                known = ", ".join(get_args(allowed))
                raise UserError(f"objective '{self.name}': {field}='{getattr(self, field)}' is not one of {known}")
        if reason := unsound(self):
            raise UserError(f"objective '{self.name}': {reason}")

    @property
    def needs_log_p(self) -> bool:
        """Whether `rows` depends on the current log p_theta: if not, off-policy steps need no extra forward pass."""
        if self.loss == "gradient":
            return False
        weighed = self.anchor != "none" and not (self.loss == "squared" and self.level == "step")
        return weighed or self.importance != "none"

    @property
    def needs_values(self) -> bool:
        """Whether intermediate rewards of states enter the potential."""
        return self.potential in ("difference", "learned", "learned_product")

    @property
    def is_learned(self) -> bool:
        """Whether the centre has parameters."""
        return self.centre in ("learned", "prompt", "value")

    @property
    def is_ratio(self) -> bool:
        """Whether the loss is a function of p_theta/p_old."""
        return self.loss in ("ratio", "clipped", "clamped")

    @property
    def per_row(self) -> bool:
        """Whether the loss is a mean over rows (Eq. 8) rather than a sum over steps, meaned over trajectories."""
        learned_squares = self.loss == "squared" and self.is_learned and self.level != "trajectory"
        return learned_squares or self.loss == "gradient"

    @property
    def needs_centre_value(self) -> bool:
        """Whether `rows` reads what is learned beside the policy."""
        return self.loss == "squared" and self.level != "step"

    def centre_start(self, log_p: Tensor, log_anchor: Tensor, delta_phi: Tensor) -> Tensor:
        """What a learned centre is the mean of: each step's log w or, in a policy gradient, its level's sum, (N, S)."""
        log_w = self._log_w(log_p, log_anchor, delta_phi)
        return log_w if self.loss == "squared" else mixing(self.level, log_w, self.decay)

    # --- all rows -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rows(
        self,
        log_p: Tensor | None,
        log_anchor: Tensor,
        delta_phi: Tensor,
        group: Tensor,
        centre_value: Tensor | None = None,
        log_p_old: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> RowTerms:
        """The terms that couple rows, from the matrices of all trajectories.

        A trajectory with a non-finite entry leaves its group. A group of fewer than two valid trajectories has no
        spread and, with the group centre, leaves the loss; the mean over groups is over those that stay.

        Args:
            log_p: current log p_theta, nats, (N, S); may be None unless `needs_log_p`.
            log_anchor: log density of the anchor, nats, (N, S); not read where there is none.
            delta_phi: Δφ, nats, (N, S); NaN rows are masked.
            group: group of each trajectory, (N,).
            centre_value: what is learned and taken off each step's log w, (N, S) or (S,); a scalar is the M of a whole
                trajectory. Read by 'squared' at other levels than 'step' only.
            log_p_old: log density the rollout was drawn with, (N, S); read by importance weights.
            chosen: trajectories the loss is over, whole groups of them, (N,) bool; None: all. Rewards that are
                weighed against nothing are centred and scaled over the batch of all, as DDPO and Flow-GRPO do once
                a rollout; log-weights, which move with theta, over the chosen.

        Raises:
            ValueError: if `log_p`, `log_p_old` or `centre_value` is needed and missing.
        """
        if self.needs_log_p and log_p is None:
            raise ValueError(f"objective '{self.name}' needs the current log p_theta")
        if self.needs_centre_value and self.is_learned and centre_value is None:
            raise ValueError(f"objective '{self.name}' needs the value of its learned centre")
        if self.importance != "none" and log_p_old is None:
            raise ValueError(f"objective '{self.name}' needs log p_old for its importance weights")
        if self.centre == "batch":
            group = torch.zeros_like(group)
        batch = LogWeights(self._log_w(log_p, log_anchor, delta_phi), group)
        log_w = batch
        if chosen is not None:
            log_w = LogWeights(torch.where(chosen[:, None], batch.log_w, torch.nan), group)
        least = 2 if self.centre in ("group", "batch") else 1
        keep = (log_w.mask & (log_w.count[log_w.index] >= least))[:, None].expand_as(log_w.log_w)
        importance = self._importance(log_p, log_p_old, log_w)
        if self.loss == "squared":
            advantage = self._target(log_w, log_p, log_anchor, delta_phi, centre_value)
        elif self.loss == "gradient":
            advantage = torch.zeros_like(log_w.log_w)
        else:
            advantage = self._advantage(batch if self.anchor == "none" else log_w)
        zeros = torch.zeros_like(log_w.log_w)
        weight = self._weight(log_w, keep, least) * importance
        return RowTerms(torch.where(keep, advantage.to(zeros.dtype), zeros), torch.where(keep, weight, zeros), keep)

    def _log_w(self, log_p: Tensor | None, log_anchor: Tensor, delta_phi: Tensor) -> Tensor:
        if self.anchor == "none" or self.loss == "gradient":
            return delta_phi
        return log_anchor + delta_phi if log_p is None else (log_anchor - log_p) + delta_phi

    def _importance(self, log_p: Tensor | None, log_p_old: Tensor | None, log_w: LogWeights) -> Tensor:
        if self.importance == "none":
            return torch.ones_like(log_w.log_w)
        log_ratio = cast("Tensor", log_p) - cast("Tensor", log_p_old)
        if self.importance == "trajectory":
            log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
        low, high = self.importance_range or (0.0, torch.inf)
        return log_ratio.exp().clamp(low, high).to(log_w.log_w.dtype)

    def _target(
        self,
        log_w: LogWeights,
        log_p: Tensor | None,
        log_anchor: Tensor,
        delta_phi: Tensor,
        centre_value: Tensor | None,
    ) -> Tensor:
        """(N, S) such that target − log p − c is the level's sum of log w − c, other steps held where they are."""
        if self.level == "step":
            return log_anchor + delta_phi
        current = cast("Tensor", log_p)
        num_steps = current.shape[1]
        share = torch.zeros((), dtype=current.dtype) if centre_value is None else centre_value.to(current)
        if share.ndim == 0:
            share = share.expand(num_steps) / num_steps
        return mixing(self.level, log_w.log_w - share, self.decay) + current + share

    def _advantage(self, log_w: LogWeights) -> Tensor:
        values = LogWeights(mixing(self.level, log_w.log_w, self.decay), log_w.group)
        advantage = values.log_w
        if self.centre in ("group", "batch"):
            # plain under importance weights too: over K−1 Σ wA is then unbiased (Eq. 46), with a weighted mean not
            advantage = advantage - values.step_mean[values.index]
        if self.standardise != "none":
            over = values if self.standardise == "group" else LogWeights(values.log_w, torch.zeros_like(values.group))
            count = over.count[:, None]
            std = (over.step_variance * (count - 1) / count).sqrt()
            advantage = advantage / (std[over.index] + STD_FLOOR)
        if self.advantage_clip is not None:
            advantage = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        return advantage

    def _weight(self, log_w: LogWeights, keep: Tensor, least: int) -> Tensor:
        """Mean over rows (Eq. 8), over trajectories, or over groups of 1/(K−1) or 1/K (Eq. 5, 21)."""
        if self.per_row or self.is_learned:
            rows = keep.sum() if self.per_row else keep.any(1).sum()
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
            log_p_old: log p_old, nats, (R,); read by the ratio losses only.
            advantage: `RowTerms.advantage` of the rows, (R,).
            centre_value: what is learned and taken off log w at the rows, with its graph, nats, (R,).

        Raises:
            ValueError: if the centre is learned and `centre_value` is missing.
        """
        if self.is_learned and centre_value is None:
            raise ValueError(f"objective '{self.name}' needs the value of its learned centre at these rows")
        learned = centre_value if centre_value is not None else torch.zeros_like(advantage)
        if self.loss == "squared":
            return (advantage - log_p - learned) ** 2
        fit = 0.5 * (advantage - learned) ** 2 if self.is_learned else 0.0  # Eq. 7
        advantage = advantage - learned.detach()
        if self.loss == "surrogate":
            return fit - advantage * log_p
        ratio = (log_p - log_p_old).exp()
        if self.loss == "ratio":
            return fit - ratio * advantage
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        if self.loss == "clamped":
            return fit - clipped * advantage
        return fit - torch.minimum(ratio * advantage, clipped * advantage)

    def metrics(self, log_p: Tensor, log_p_old: Tensor, advantage: Tensor) -> dict[str, float]:
        """Means over rows of the ratio p_theta/p_old and, where it is clipped, of the rows whose gradient is cut."""
        ratio = (log_p.detach() - log_p_old).exp()
        above, below = ratio > 1 + self.clip_range, ratio < 1 - self.clip_range
        cut = above | below if self.loss == "clamped" else (above & (advantage > 0)) | (below & (advantage < 0))
        fraction = cut.float().mean().item() if self.loss in ("clipped", "clamped") else 0.0
        return {"ratio_mean": ratio.mean().item(), "clip_fraction": fraction}
