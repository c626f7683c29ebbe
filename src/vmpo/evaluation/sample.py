"""Pictures for the eye, by the sampler that plain diffusers uses too."""

from __future__ import annotations

import re
from pathlib import Path

from vmpo.errors import UserError
from vmpo.evaluation.evaluate import read_run_config
from vmpo.kernels import Kernel, build_kernel
from vmpo.policies.adapters import load_lora
from vmpo.policies.loading import EMBEDDED, load_policy, policy_class_of
from vmpo.policies.pipeline import Call, PipelinePolicy
from vmpo.rollouts import rollout
from vmpo.training.adapters import adapter_folder
from vmpo.training.pictures import save_image
from vmpo.training.recipes import load_config
from vmpo.training.scoring import decode
from vmpo.training.setup import load_policy_of


def deterministic_kernel(policy: PipelinePolicy, steps: int) -> Kernel:
    """What a plain diffusers pipeline steps by: Euler on the flow of Stable Diffusion 3, else DDIM without noise."""
    if policy.flow:
        return build_kernel("flow_grpo", steps, eta=0.0, schedule="sd3", shift=policy.pipe.scheduler.config.shift)
    return build_kernel("ddim", steps, eta=0.0, **policy.schedule)


def load_source(source: str, base: bool, adapter: str | None = None) -> PipelinePolicy:
    """A run's policy with an adapter as `adapter_folder` names them (without it if `base`), or a bare model."""
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        policy = load_policy_of(read_run_config(folder))
        if not base:
            load_lora(policy, adapter_folder(folder, adapter))
        return policy
    if adapter is not None:
        raise UserError(f"--adapter {adapter}: '{source}' is no run folder (no config.yaml), so it has no adapters")
    if source in EMBEDDED:
        return load_policy_of(load_config(source, []))
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"'{source}' is neither a run folder (no config.yaml) nor a model (no model_index.json)")
    return load_policy(source, Call(guidance=policy_class_of(source).usual_guidance))


def sample(
    source: str,
    prompts: list[str],
    out: Path,
    *,
    seed: int,
    images: int,
    steps: int,
    base: bool,
    adapter: str | None = None,
) -> list[Path]:
    """Draws `images` pictures a prompt by the pipeline's own ODE steps; picture i starts from seed + i.

    At the same seed, prompt and number of steps a plain diffusers pipeline draws the same picture.
    """
    policy = load_source(source, base, adapter)
    kernel = deterministic_kernel(policy, steps)
    written = []
    for prompt in prompts:
        seeds = [seed + i for i in range(images)]
        drawn = rollout(policy, kernel, policy.encode([prompt] * images), seeds, batch=8)
        name = re.sub(r"[^A-Za-z0-9]+", "-", prompt).strip("-")[:60]
        for number, image in zip(seeds, decode(policy, drawn.x_0, 8), strict=True):
            path = out / f"{name}-{number}.png"
            save_image(image, path)
            written.append(path)
    return written
