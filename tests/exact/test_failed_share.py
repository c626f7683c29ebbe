"""An update whose rewards all failed leaves everything as it was, the optimiser's momentum included."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.exact.test_update_streaming import CHOSEN, KERNEL, STEPS, N, centre_of, problem
from vmpo.objectives import OBJECTIVES
from vmpo.training.learned_terms import LearnedTerms
from vmpo.training.update import Penalties, Updater


@pytest.mark.parametrize("name", ["vmpo_r2g", "vmpo_diff", "grpo"])
def test_a_share_without_a_score_takes_no_step(name: str) -> None:
    policy, data = problem()
    centre = centre_of(OBJECTIVES[name])
    parameters = [*policy.denoiser.parameters(), *(centre.parameters() if centre else [])]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    updater = Updater(
        cast(Any, policy),
        KERNEL,
        OBJECTIVES[name],
        LearnedTerms(OBJECTIVES[name], KERNEL.stochastic_steps, centre),
        Penalties(0.7, 0.3),
        optimizer,
        cast(Any, SimpleNamespace(num_processes=1, process_index=0)),
        micro_batch=5,
        grad_clip=1.0,
    )
    before = [p.detach().clone() for p in parameters]
    updater.step(data, torch.tensor(CHOSEN), on_policy=False)
    moved = [p.detach().clone() for p in parameters]
    assert not any(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    nothing = replace(data, delta_phi=torch.full((N, len(STEPS)), torch.nan, dtype=torch.float64))
    metrics = updater.step(nothing, torch.tensor(CHOSEN), on_policy=False)
    assert all(torch.equal(a, b) for a, b in zip(moved, parameters, strict=True))
    assert metrics == {"loss": 0, "kl_old": 0, "ratio_mean": 1, "clip_fraction": 0, "grad_norm": 0}
    updater.step(data, torch.tensor(CHOSEN), on_policy=False)
    assert not any(torch.equal(a, b) for a, b in zip(moved, parameters, strict=True))
