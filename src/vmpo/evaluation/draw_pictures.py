"""Draws a source's pictures for a table and saves them, each process its share of the batches."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from vmpo.errors import UserError
from vmpo.evaluation.evaluate import Report, picture_seed
from vmpo.evaluation.picture_source import ADAPTER_FILES, Source
from vmpo.evaluation.score_log import ScoreLog
from vmpo.policies.adapters import load_lora
from vmpo.policies.pipeline import PipelinePolicy
from vmpo.prompts import PromptSet
from vmpo.rollouts import draw_states
from vmpo.training.pictures import save_image
from vmpo.training.processes import share
from vmpo.training.setup import load_kernel_of, load_policy_of

DRAWN_AT_ONCE = 8  # where the recipe leaves the number to what fits a training


def batches_of(prompts: int, images: int, batch: int) -> list[list[tuple[int, int]]]:
    """(prompt, image) of all pictures, in batches that do not depend on what is done already or by how many."""
    every = [(p, m) for p in range(prompts) for m in range(images)]
    return [every[i : i + batch] for i in range(0, len(every), batch)]


def load_source_policy(source: Source, device: torch.device) -> PipelinePolicy:
    """The policy of a source, with its adapter if it has one.

    Raises:
        UserError: if the model or the adapter cannot be loaded.
    """
    assert source.config is not None
    policy = load_policy_of(source.config, device)
    if source.adapter is None:
        return policy
    if (source.adapter / ADAPTER_FILES[0]).is_file():
        load_lora(policy, source.adapter)
    else:
        load_peft_adapter(policy, source.adapter)
    return policy


def load_peft_adapter(policy: PipelinePolicy, folder: Path) -> None:
    """Loads an adapter that PEFT saved (`adapter_config.json`, `adapter_model.safetensors`), as Flow-GRPO publishes.

    Raises:
        UserError: if the configuration is missing, or the adapter is not one of this model.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"adapter '{folder}' has no readable adapter_config.json beside its weights") from error
    weights = {k.removeprefix("base_model.model."): v for k, v in load_file(folder / ADAPTER_FILES[1]).items()}
    try:
        policy.denoiser.load_lora_adapter(weights, prefix=None, adapter_name="default", metadata=config)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"adapter '{folder}' does not fit the model's denoiser: {reason}") from error


def draw_source(
    source: Source,
    prompts: PromptSet,
    images: int,
    seed: int,
    log: ScoreLog,
    accelerator: Accelerator,
    report: Report,
) -> None:
    """Draws, saves and records the pictures of this process's batches that are not recorded yet.

    A batch is recorded when all its pictures are on the disk. One that a crash cut short is drawn again in the same
    company, so that the pictures do not depend on what happened.
    """
    assert source.config is not None
    at_once = source.config.optimisation.micro_batch or DRAWN_AT_ONCE
    batches = batches_of(len(prompts), images, at_once)
    mine = [batches[i] for i in share(len(batches), accelerator)]
    missing = [b for b in mine if any((source.label, p, m) not in log.records for p, m in b)]
    if not missing:
        return
    policy = load_source_policy(source, accelerator.device)
    kernel = load_kernel_of(source.config, policy)
    done, total = 0, sum(map(len, missing))
    with policy.reference() if source.kind == "base" else nullcontext():
        for batch in missing:
            report(f"{source.label}: drawing", done, total)
            seeds = [picture_seed(seed, p, m) for p, m in batch]
            conditioning = policy.encode([prompts.prompts[p] for p, _ in batch])
            pictures = policy.decode(draw_states(policy, kernel, conditioning, seeds)).cpu()
            records = []
            for (p, m), number, picture in zip(batch, seeds, pictures, strict=True):
                file = f"pictures/{source.label}/{p:05d}-{m}.png"
                save_image(picture, log.folder / file)
                names = {"source": source.label, "prompt": p, "image": m}
                records.append({**names, "seed": number, "file": file, "scores": {}})
            log.append(records)
            done += len(batch)
