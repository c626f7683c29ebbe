"""A whole training run, with its progress on the screen."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vmpo.errors import UserError
from vmpo.training.config import Config
from vmpo.training.memory import plan_memory
from vmpo.training.setup import load_parts
from vmpo.training.stopping import check_stopping
from vmpo.training.trainer import Metrics, Trainer

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def build_accelerator(config: Config, folder: Path) -> Accelerator:
    """Accelerate's view of the processes and trackers; weights and precision are the policy's own business.

    Raises:
        UserError: if a tracker is asked for that is not installed.
    """
    wanted = config.trackers
    if wanted is None:
        wanted = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for name in wanted:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise UserError(f"trackers: '{name}' is not installed; 'pip install {name}', or leave it out")
    return Accelerator(log_with=list(wanted) or None, project_dir=str(folder), cpu=not torch.cuda.is_available())


def train(config: Config, folder: Path, *, resume: bool, console: Console) -> Trainer:
    """Runs a configuration to its end in a run folder; killed at any moment, it can be resumed exactly.

    Raises:
        UserError: for anything the user can mend.
    """
    check_stopping(config)
    accelerator = build_accelerator(config, folder)
    parts = load_parts(config, accelerator.device)
    begun = folder / "config.yaml"
    begun_with = begun.read_text() if begun.is_file() else None
    config, line = plan_memory(config, parts.policy, begun_with, accelerator)
    if line:
        console.print(line, soft_wrap=True)
    trainer = Trainer(config, parts, folder, accelerator)
    try:
        _run(trainer, accelerator, console, resume)
    finally:
        trainer.lock.release()
    return trainer


def _run(trainer: Trainer, accelerator: Accelerator, console: Console, resume: bool) -> None:
    config, taken_up = trainer.config, trainer.open_folder(resume)
    quiet = not accelerator.is_main_process
    if taken_up and not quiet:
        console.print(f"resumed after epoch {trainer.epoch}")
    if accelerator.log_with:
        accelerator.init_trackers("vmpo", init_kwargs={})
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} epochs"),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(config.name, total=config.optimisation.epochs, completed=trainer.epoch, facts="")
        _loop(trainer, accelerator, console, bar, task, quiet)
    if not quiet and trainer.epoch < config.optimisation.epochs:
        console.print(f"stopped after epoch {trainer.epoch}: {trainer.stop_reason()}", soft_wrap=True)
    if accelerator.log_with:
        accelerator.end_training()


def _loop(trainer: Trainer, accelerator: Accelerator, console: Console, bar: Progress, task: Any, quiet: bool) -> None:
    config = trainer.config
    every = config.evaluation.every
    if trainer.epoch == 0 and every and not trainer.log:
        first = trainer.measure()  # the base model, so that curves start where they should
        trainer.record({"epoch": 0, "samples": 0, "seconds": 0.0, **first})
        if not quiet:
            console.print(_line(trainer.log[-1]), soft_wrap=True)
    while not trainer.finished():
        metrics = trainer.run_epoch()
        if every and (trainer.epoch % every == 0 or trainer.finished()):
            metrics |= trainer.measure()
        if trainer.epoch < config.optimisation.epochs and (reason := trainer.stop_reason()):
            metrics["stopped"] = reason
        trainer.record(metrics)
        if accelerator.log_with:
            accelerator.log({k: v for k, v in metrics.items() if isinstance(v, int | float)}, step=trainer.epoch)
        if not quiet:
            bar.update(task, completed=trainer.epoch, facts=_facts(metrics))
            if "eval_reward_mean" in metrics or not console.is_terminal:
                console.print(_line(metrics), soft_wrap=True)
        if trainer.epoch % config.checkpoint_every == 0 or trainer.finished():
            trainer.save()
            trainer.save_adapter()
        accelerator.wait_for_everyone()
    if not trainer.checkpointed():
        trainer.save()
    trainer.save_adapter()
    accelerator.wait_for_everyone()


def _facts(metrics: Metrics) -> str:
    return f"reward {metrics['reward_mean']:.3f}  KL {metrics['kl_ref']:.2f} nats"


def _line(metrics: Metrics) -> str:
    parts = [f"epoch {metrics['epoch']:>4}"]
    if "reward_mean" in metrics:
        parts += [
            f"reward {metrics['reward_mean']:.3f}",
            f"KL {metrics['kl_ref']:6.2f}",
            f"Var(log w) {metrics['var_log_w']:7.2f}",
            f"grad {metrics['grad_norm']:.2g}",
            f"{metrics['seconds']:.0f} s",
        ]
    if metrics.get("failed_rewards"):
        parts.append(f"failed {metrics['failed_rewards']:.1%}")
    if "eval_reward_mean" in metrics:
        parts.append(f"| held out {metrics['eval_reward_mean']:.3f} ± {metrics['eval_reward_se']:.3f}")
    if "eval_gap_rewards" in metrics:
        parts.append(f"gap {metrics['eval_gap_rewards']:+.2f} ± {metrics['eval_gap_rewards_se']:.2f} sd")
    return "  ".join(parts)


def silence_libraries() -> None:
    """Keeps the libraries' notices off the screen; errors stay."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
