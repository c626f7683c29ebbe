"""One cell of a comparison on exact worlds: an objective, a world and a seed, to a result that can be written down."""

from __future__ import annotations

import math
from typing import Any

import torch

from vmpo.comparison.measurement import measure, measure_end
from vmpo.comparison.variant import parse_variant
from vmpo.comparison.world_training import Budget, WorldTraining
from vmpo.errors import UserError
from vmpo.exact import MaskedChain, Mixture, World, get_world

CURVE_POINTS = 20
RUNAWAY = 1e5  # nats of KL to p_ref at which a training is given up


def run_cell(world_name: str, spec: str, seed: int, budget: Budget) -> dict[str, Any]:
    """Trains and measures; a combination that is refused gives a result with the reason in its note.

    Returns:
        JSON: world, objective, seed, source, note, truth, curve, final, gradient_snr, seconds,
        samples, points, probabilities; numbers that are not finite are None.
    """
    world = get_world(world_name)
    variant = parse_variant(spec)
    truth = {name: value.mean().item() for name, value in vars(world.truth()).items()}
    result: dict[str, Any] = {"world": world_name, "objective": spec, "seed": seed, "source": variant.objective.source}
    try:
        training = WorldTraining(world, variant, budget, seed)
    except UserError as error:
        empty: dict[str, Any] = {"curve": [], "final": {}, "points": [], "probabilities": None, "samples": 0}
        return {**result, "truth": truth, "note": f"stopped: {error}", **empty, "seconds": None}
    result["gradient_snr"] = WorldTraining(world, variant, budget, seed + 1000).gradient_snr()
    every = max(1, budget.rollouts // CURVE_POINTS) * budget.batch
    curve, note = [], ""
    samples, seconds = 0, 0.0
    for samples, seconds in training.run():
        if samples % every == 0:
            point = measure(world, training.policy)
            curve.append({"samples": samples, "seconds": seconds, **point})
            if not point["kl_ref"] < RUNAWAY:
                note = f"runs away: stopped at {point['kl_ref']:.0e} nats from p_ref, after {samples} samples"
                break
    final, points, law = measure_end(world, training.policy)
    result |= {
        "truth": truth,
        "note": note,
        "curve": curve,
        "final": final,
        "seconds": seconds,
        "samples": samples,
        "points": points,
        "probabilities": law,
    }
    return _finite(result)


def world_facts(world_name: str, budget: Budget) -> dict[str, Any]:
    """What the page draws of a world: its optimal frontier, target samples, density or probabilities."""
    world = get_world(world_name)
    betas = torch.cat([torch.tensor([torch.inf]), torch.logspace(1.5, -1.0, 40)]).double() * world.beta
    kl, reward = world.frontier(betas)
    prompts = f"{len(world.prompts)} prompt{'s' if len(world.prompts) > 1 else ''}"
    kind = world.kind[0].upper() + world.kind[1:]
    size = f"{world.kernel.num_steps} steps, {prompts}, beta {world.beta:g}"
    facts: dict[str, Any] = {
        "kind": f"{kind}: {size}; {budget.samples:,} trajectories a training",
        "frontier": {"kl": kl.mean(1).tolist(), "reward": reward.mean(1).tolist()},
        "target_points": world.sample_target(800, 0, seed=5).tolist(),
        "density": None,
        "target_probabilities": None,
        "labels": None,
    }
    return facts | _law_facts(world)


def _law_facts(world: World) -> dict[str, Any]:
    if isinstance(world, MaskedChain):
        digits = world.digits[world.clean].tolist()
        labels = ["".join("abcdefgh"[d] for d in row) for row in digits]
        return {"target_probabilities": world.target()[world.clean].tolist(), "labels": labels}
    if isinstance(world, Mixture):
        x, y = torch.linspace(-6.5, 6.5, 131).double(), torch.linspace(-4.0, 4.0, 81).double()
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
        return {"density": {"x": x.tolist(), "y": y.tolist(), "p": world.density(grid).view(len(y), len(x)).tolist()}}
    return {}


def _finite(value: Any) -> Any:
    """The same with numbers that are not finite as None, which JSON has a word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
