"""Times rollout and update of a recipe, and says what share of the machine's matrix-product rate they reach.

python benchmarks/throughput.py [RECIPE] [key.path=value …] [--random-weights] [--repeats N] [--threads N] [--out FILE]

With --random-weights the recipe's published architecture is built at its full size without its weights, and prompts are
noise: what a step costs does not depend on either.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vmpo.errors import UserError
from vmpo.policies.loading import DTYPES
from vmpo.policies.pipeline import PipelinePolicy
from vmpo.policies.policy import Conditioning
from vmpo.policies.published import architecture_of, published, published_names, published_policy
from vmpo.training.config import Config
from vmpo.training.provenance import hardware
from vmpo.training.recipes import load_config
from vmpo.training.rollout import Rollout
from vmpo.training.run import silence_libraries
from vmpo.training.setup import call_of, load_parts, loading_of
from vmpo.training.trainer import Trainer

MATRIX = 2048


def synchronise() -> None:
    """Waits for an accelerator's queue; a CPU has none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Best measured rate of a product of square matrices, FLOP/s, in the precision and on the threads torch uses."""
    size = MATRIX if device.type == "cpu" else 4 * MATRIX
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    fastest, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < seconds:
        synchronise()
        start = time.perf_counter()
        torch.mm(a, b)
        synchronise()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def flops_per_row(trainer: Trainer, data: Rollout) -> dict[str, float]:
    """Model FLOPs of one row: the policy's forward, the reference's, and forward with backward, counted by torch.

    Attention is counted on its plain form, since fused kernels hide their products; recomputation does not count.
    """
    rows = torch.arange(min(len(data.rows), trainer.updater.micro_batch))
    first = torch.zeros_like(rows)

    def count(*, backward: bool = False) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            if backward:
                trainer.updater.transition(data, rows, first)[1].sum().backward()
            else:
                with torch.no_grad():
                    trainer.updater.transition(data, rows, first)
        trainer.updater.optimizer.zero_grad()
        return counter.get_total_flops() / len(rows)

    with trainer.parts.policy.reference():
        reference = count()
    return {"forward": count(), "reference_forward": reference, "forward_backward": count(backward=True)}


def time_rollouts(trainer: Trainer, repeats: int) -> tuple[Rollout, list[float], list[float]]:
    """The last epoch's data; seconds of sampling (densities and reference included); of decoding and rewards."""
    sampling, scoring = [], []
    for epoch in range(repeats + 1):  # the first one warms up
        data, metrics = trainer.draw(epoch)
        sampling.append(metrics["time_rollout"])
        scoring.append(metrics["time_rewards"])
    return data, sampling[1:], scoring[1:]


def time_updates(trainer: Trainer, data: Rollout, repeats: int) -> list[float]:
    """Seconds of one optimiser step on all rows of an epoch: forward, backward, clipping and AdamW."""
    if trainer.terms.centre is not None:
        start = trainer.parts.objective.centre_start(data.log_p_old, data.log_anchor, data.delta_phi)
        trainer.terms.centre.initialise(start, data.prompt)
    groups, seconds = data.group.unique(), []
    for _ in range(repeats + 1):
        synchronise()
        start = time.perf_counter()
        trainer.updater.step(data, groups, on_policy=True)
        synchronise()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def peak_memory_gib() -> float:
    """Most memory held so far: the process's resident set, or what torch took of the accelerator."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


def untrained_policy(config: Config, device: torch.device) -> PipelinePolicy:
    """The recipe's published architecture at full size with random weights and random prompts."""
    architecture = architecture_of(config.model.path)
    if architecture is None:
        known = ", ".join(published(name)["hub"] for name in published_names())
        raise UserError(f"--random-weights: no architecture is known for '{config.model.path}', only for {known}")
    torch.manual_seed(0)
    policy = published_policy(architecture, call_of(config), loading_of(config), device)
    dtype = policy.denoiser.dtype

    def encode(prompt: str, guided: bool) -> Conditioning:
        sides = [
            {k: torch.randn(1, *shape, dtype=dtype) for k, shape in policy.conditioning_shapes.items()}
            for _ in range(1 + guided)
        ]
        return Conditioning(*sides)

    policy.prompts_from(encode)
    return policy


def measure(config: Config, repeats: int, *, random_weights: bool = False) -> dict[str, Any]:
    """All figures of a recipe; times are medians over `repeats`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = config.model.autocast if config.model.autocast != "none" else config.model.weights
    dtype = DTYPES[precision] or torch.float32
    rate_before = matmul_rate(device, dtype)
    parts = load_parts(config, device, untrained_policy(config, device) if random_weights else None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, parts, Path(folder), Accelerator(cpu=device.type == "cpu"))
        data, sampling, scoring = time_rollouts(trainer, repeats)
        updates = time_updates(trainer, data, repeats)
        flops = flops_per_row(trainer, data)
    rate = max(rate_before, matmul_rate(device, dtype))
    images, steps, stochastic = len(data.rows), parts.kernel.num_steps, len(parts.kernel.stochastic_steps)
    rows = int(torch.isfinite(data.delta_phi).all(1).sum()) * stochastic
    rollout_flops = images * (steps * flops["forward"] + stochastic * flops["reference_forward"])
    both = [a + b for a, b in zip(sampling, scoring, strict=True)]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "recipe": config.name,
        "random_weights": random_weights,
        "objective": config.objective.name,
        "sampler": f"{config.sampler.kernel}, {steps} steps, {stochastic} of them stochastic",
        "precision": {"weights": config.model.weights, "autocast": config.model.autocast},
        "images": images,
        "rows": rows,
        "micro_batch": config.optimisation.micro_batch,
        "repeats": repeats,
        "matmul_gflops": rate / 1e9,
        "model_mflops_per_row": {name: value / 1e6 for name, value in flops.items()},
        "rollout": {
            "images_per_s": images / median(sampling),
            "images_per_s_with_decoding_and_rewards": images / median(both),
            "share_of_matmul_rate": rollout_flops / median(sampling) / rate,
            "seconds": sampling,
            "seconds_decoding_and_rewards": scoring,
        },
        "update": {
            "rows_per_s": rows / median(updates),
            "share_of_matmul_rate": rows * flops["forward_backward"] / median(updates) / rate,
            "seconds": updates,
        },
        "peak_memory_gib": peak_memory_gib(),
    }


def rounded(value: Any) -> Any:
    """Floats to four significant digits, in nested figures."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="glyphs")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--repeats", type=int, default=3, help="timed rollouts and updates, after one of each")
    parser.add_argument("--random-weights", action="store_true", help="the architecture at full size, untrained")
    parser.add_argument("--threads", type=int, help="torch's threads; all cores if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput.json"))
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}; at least 1")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    silence_libraries()
    try:
        config = load_config(arguments.recipe, arguments.overrides)
        found = rounded(measure(config, arguments.repeats, random_weights=arguments.random_weights))
    except UserError as error:
        parser.exit(2, f"throughput: {error}\n")
    text = json.dumps(found, indent=2)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")
    print(text)
    print(f"saved: {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
