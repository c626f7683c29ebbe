"""A pretraining run: a denoiser and its text encoders on a pool of latents, with an average of the weights."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from vmpo.errors import UserError
from vmpo.pretraining.captions import MAX_TOKENS, Pool, encode_pool
from vmpo.pretraining.settings import Pretraining, scaled

STATE = "state.pt"
Log = Callable[[str], None]


class Task(Protocol):
    """What is trained: a pipeline, and the loss of its denoiser on captioned latents."""

    pipe: DiffusionPipeline
    network: nn.Module
    encoders: list[nn.Module]
    tokenizer: CLIPTokenizer

    def matrices(self) -> list[nn.Parameter]:
        """The weight matrices that Muon steps; AdamW steps the rest."""
        ...

    def loss(self, predict: Callable[..., Any], x_0: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch, `predict` in the place of `network`."""
        ...


class Trainer:
    """A task's parameters, their optimisers and averages, and how they go to disk and come back."""

    def __init__(self, task: Task, settings: Pretraining, compiled: bool = False) -> None:
        self.task, self.settings = task, settings
        # the pipeline keeps the plain module, so that what is saved does not know of the compiler
        self.predict = torch.compile(task.network.forward) if compiled else task.network
        matrices = task.matrices()
        chosen = {id(p) for p in matrices}
        modules = nn.ModuleList([task.network, *task.encoders])
        others = [p for p in modules.parameters() if id(p) not in chosen and p.requires_grad]
        self.parameters = matrices + others
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.base_lrs = (settings.muon_lr, settings.lr)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.done = 0
        empty = task.tokenizer("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        self.empty = empty.input_ids[0]

    def trust_compiler(self, pool: Pool, log: Log) -> None:
        """Goes back to the plain network if the compiled one leaves a parameter without its gradient.

        PyTorch 2.13 does so on a CPU to everything below a UNet's upsampling, and training goes on without a word.
        """
        if self.predict is self.task.network:
            return
        reached = []
        for predict in (self.task.network, self.predict):
            generator = torch.Generator().manual_seed(self.settings.seed)
            with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
                self.task.loss(predict, pool.latents[:8].float(), pool.tokens[:8], generator).backward()
            reached.append([p.grad is not None and bool(p.grad.any()) for p in self.parameters])
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        lost = sum(plain and not compiled for plain, compiled in zip(*reached, strict=True))
        if lost:
            log(f"the compiled network gives {lost} of {len(self.parameters)} parameters no gradient: not compiled")
            self.predict = self.task.network

    def lr_scale(self) -> float:
        """The present share of the full learning rates."""
        done = self.done
        for cycle in self.settings.cycles:
            if done < cycle.steps:
                rise = min((done + 1) / self.settings.warmup, 1.0)
                return cycle.peak * min(rise, (cycle.steps - done) / (cycle.decay * cycle.steps))
            done -= cycle.steps
        return 0.0

    def step(self, pool: Pool) -> float:
        """One batch; returns its loss."""
        n, g = self.settings.batch, self.generator
        rows = torch.randint(len(pool.latents), (n,), generator=g)
        x_0, tokens = pool.latents[rows].float(), pool.tokens[rows].clone()
        tokens[torch.rand(n, generator=g) < self.settings.caption_dropout] = self.empty
        # on so few tokens plain matrix products are faster on a CPU than the flash kernel's backward pass
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            loss = self.task.loss(self.predict, x_0, tokens, g)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, lr in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * self.lr_scale()
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        self.update_ema()
        return loss.item()

    def update_ema(self) -> None:
        decay = min(self.settings.ema, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)

    def swap_ema(self) -> None:
        """Exchanges live and averaged weights."""
        with torch.no_grad():
            for p, e in zip(self.parameters, self.ema, strict=True):
                kept = p.detach().clone()
                p.copy_(e)
                e.copy_(kept)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on exactly where this is."""
        return {
            "settings": asdict(self.settings),
            "done": self.done,
            "parameters": [p.detach() for p in self.parameters],
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self.done = state["done"]
        with torch.no_grad():
            for mine, kept in zip([*self.parameters, *self.ema], [*state["parameters"], *state["ema"]], strict=True):
                mine.copy_(kept)
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.generator.set_state(state["generator"])


def train(trainer: Trainer, pool: Pool, plain: Pool | None, folder: Path, log: Log) -> None:
    """Runs the steps that are left, plain ones first; keeps the whole state every 1,000 of them and at the end."""
    trainer.trust_compiler(pool, log)
    began, first, window = time.time(), trainer.done, list[float]()
    total = trainer.settings.steps
    while trainer.done < total:
        plainly = trainer.done < trainer.settings.plain_steps
        window.append(trainer.step(plain if plain is not None and plainly else pool))
        if trainer.done % 50 == 0 or trainer.done == total:
            left = (total - trainer.done) * (time.time() - began) / (trainer.done - first) / 60
            log(f"step {trainer.done}/{total}  loss {sum(window) / len(window):.4f}  {left:.0f} min left")
            window = []
        if trainer.done % 1_000 == 0 or trainer.done == total:
            partial = folder / "state.partial"
            torch.save(trainer.state(), partial)
            partial.replace(folder / STATE)


def pretrain(
    folder: Path,
    settings: Pretraining,
    autoencoder: Callable[[Pretraining, Log], AutoencoderKL],
    build: Callable[[AutoencoderKL, int], Task],
    *,
    scale: float = 1.0,
    compiled: bool = False,
    log: Log = print,
) -> Task:
    """Trains a pipeline and writes it to `folder`, or goes on with what was begun there.

    Args:
        autoencoder: trains or loads the autoencoder.
        build: the untrained pipeline around an autoencoder, by seed.
        scale: shortens everything, for trials.
        compiled: compiles the network (a minute, needs a C++ compiler), which takes a third off each step.

    Raises:
        UserError: if the folder holds a run with other settings.
    """
    settings = scaled(settings, scale)
    folder.mkdir(parents=True, exist_ok=True)
    began, vae_folder, state_file = time.time(), folder / "vae", folder / STATE
    state = torch.load(state_file, weights_only=True) if state_file.is_file() else None
    if state is not None and state["settings"] != asdict(settings):
        raise UserError(f"'{folder}' holds a pretraining run with other settings; pass another --out")
    if state is not None:
        vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    else:
        vae = autoencoder(settings, log)
        vae.save_pretrained(vae_folder)
    torch.manual_seed(settings.seed)  # the pool samples the autoencoder's posterior
    task = build(vae, settings.seed)
    trainer = Trainer(task, settings, compiled)
    if state is not None:
        trainer.load_state(state)
        log(f"goes on at step {trainer.done}")
    pool = encode_pool(vae, task.tokenizer, settings, log)
    plain = encode_pool(vae, task.tokenizer, settings, log, plainly=True) if settings.plain_steps else None
    train(trainer, pool, plain, folder, log)
    trainer.swap_ema()
    _save(task, folder)
    facts = {**asdict(settings), "hours": round((time.time() - began) / 3600, 2)}
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    return task


def _save(task: Task, folder: Path) -> None:
    task.network.half()  # halves what the package weighs
    task.pipe.save_pretrained(folder)
    task.network.float()
