"""Settings of a run: validated, with defaults."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vmpo.errors import UserError
from vmpo.objectives.levels import Level
from vmpo.objectives.soundness import Anchor, Centre, Importance, LogProb, Potential, Predictor, Standardise


class Section(BaseModel):
    """Part of the settings; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoRA(Section):
    """The adapter that is trained (Hu et al. 2022, arXiv 2106.09685)."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(64, gt=0)
    targets: list[str] | None = Field(None, description="module names; None: the model's own attention projections")


class Model(Section):
    """Which pipeline is aligned and how its network is called."""

    path: str = Field("glyphs", description="'glyphs' or 'glyphs-ddim' (embedded), a local folder or a hub name")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    variant: str | None = Field(None, description="of the weight files on the hub, e.g. fp16")
    height: int = Field(512, ge=8)
    width: int = Field(512, ge=8)
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance in rollout and training; 1 is off")
    max_sequence_length: int = Field(
        256, ge=0, le=512, description="T5 tokens; 0 leaves the padding of a missing T5 out"
    )
    t5: bool = Field(True, description="false leaves Stable Diffusion 3's third text encoder out")
    weights: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the frozen networks; the adapter is fp32")
    vae_weights: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="None: as weights")
    autocast: Literal["none", "bf16", "fp16"] = "none"
    quantise: Literal["none", "int8", "nf4"] = Field(
        "none", description="bits of the frozen denoiser and T5: int8 by torchao, nf4 by bitsandbytes"
    )
    checkpointing: bool = Field(False, description="compute activations again in the backward pass: less memory")
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    vae_slicing: bool = Field(False, description="decode pictures one by one: less memory")
    offload_encoders: bool = Field(False, description="text encoders are on the device only while they encode")
    lora: LoRA = LoRA()


class Sampler(Section):
    """The kernel p(x_{t-1} | x_t) and its schedule."""

    kernel: Literal["ddim", "flow_grpo", "dance", "cps"] = "flow_grpo"
    steps: int = Field(10, ge=1)
    eta: float | None = Field(None, description="noise level; None: the kernel's published default")
    shift: float = Field(3.0, gt=0)
    schedule: Literal["linear", "sd3"] = "sd3"
    window: tuple[int, int] | None = Field(None, description="(first, size) of the stochastic steps; None: all")


class Prompts(Section):
    """Prompt sets by name ('vmpo prompts' lists them), files (.txt, .jsonl, .json), or unions 'a+b' of such."""

    train: str = "glyphs/train"
    test: str = "glyphs/test"


class Reward(Section):
    """Rewards by name or 'module:function', with their weights and options."""

    weights: dict[str, float] = Field({"ocr": 1.0}, min_length=1)
    combine: Literal["sum", "group_normalised"] = "sum"
    held_out: list[str] = Field([], description="rewards that are measured at evaluations and never trained on")
    options: dict[str, dict[str, Any]] = Field(
        {}, description="{name: {option: value}}; with 'use: NAME' the name is free and NAME says what it is"
    )

    def sources(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """What each trained-on or held-out reward is, a built-in name or 'module:name', and its options.

        Raises:
            UserError: for options of a reward that is neither.
        """
        names = list(dict.fromkeys([*self.weights, *self.held_out]))
        for name in self.options:
            if name not in names:
                raise UserError(
                    f"reward.options: '{name}' is neither in reward.weights nor in reward.held_out"
                    f"{nearest(name, names)}"
                )
        found = {}
        for name in names:
            options = dict(self.options.get(name, {}))
            use = options.pop("use", name)
            if not isinstance(use, str):
                raise UserError(f"reward.options.{name}.use={use!r}; it must name a reward, e.g. use: remote")
            found[name] = use, options
        return found


class Objective(Section):
    """What is minimised, at which temperature. Parts that are None are the method's own (docs/objectives.md)."""

    name: str = "vmpo_diff"
    beta: float = Field(0.1, gt=0, description="reward temperature: the target is p_ref·exp(r/beta)")
    target_kl: float | None = Field(
        None, gt=0, description="nats a trajectory at which KL(p_theta‖p_ref) is held by moving beta; None: beta stays"
    )
    kl_gain: float = Field(0.1, gt=0, lt=5, description="how fast: beta changes by a fifth of this an epoch at most")
    beta_range: tuple[float, float] = Field(
        (0.01, 100.0), description="least and most that a moving beta becomes, as multiples of beta"
    )
    level: Level | None = Field(None, description="which sums of steps are made constant")
    centre: Centre | None = None
    potential: Potential | None = None
    anchor: Anchor | None = Field(None, description="what p_theta is weighed against")
    standardise: Standardise | None = None
    importance: Importance | None = None
    kl_old: float | None = Field(None, ge=0, description="weight of KL(p_theta‖p_old), a step")
    kl_ref: float | None = Field(None, ge=0, description="weight of an explicit KL(p_theta‖p_ref), a step (Eq. 22)")
    clip_range: float | None = Field(None, gt=0, description="epsilon of clipped forms")
    log_prob: LogProb | None = Field(
        None, description="sum: the density; mean: divided by the dimension D, as published code bases do"
    )
    reuse: int | None = Field(None, ge=1, description="passes over each rollout")
    replay: int | None = Field(None, ge=0, description="earlier rollouts that are trained on again")
    reference_share: float | None = Field(None, ge=0, lt=1, description="share of trajectories drawn from p_ref")
    predictor: Predictor | None = Field(None, description="whose x0_hat intermediate rewards are taken of")
    intermediate: list[int] | None = Field(
        None, description="stochastic steps whose r(x0_hat) enters the difference potential; None: all"
    )

    @field_validator("beta_range")
    @classmethod
    def _holds_beta(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= 1 <= value[1]:
            raise ValueError("it must be [low, high] with 0 < low <= 1 <= high")
        return value

    def parts(self) -> dict[str, Any]:
        """The parts that are set, in place of the method's own."""
        own = self.model_dump(exclude={"name", "beta", "target_kl", "kl_gain", "beta_range", "intermediate"})
        return {part: value for part, value in own.items() if value is not None}


class Optimisation(Section):
    """Samples and updates; per-device sizes follow from these."""

    epochs: int = Field(100, ge=1)
    prompts: int = Field(8, ge=1, description="distinct prompts an epoch")
    group: int = Field(16, ge=1, description="pictures a prompt; 1 where nothing is compared within a prompt")
    updates: int = Field(1, ge=1, description="optimiser steps a rollout, each on its own share of the prompts")
    lr: float = Field(3e-4, gt=0)
    lr_centre: float | None = Field(None, description="learning rate of what is learned beside the policy; None: lr")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    ema: float = Field(0.9, ge=0, lt=1, description="decay of the averaged adapter used at evaluation; 0 is off")
    warmup: int = Field(0, ge=0, description="updates over which the learning rate rises")
    decay: bool = Field(False, description="linear decay of the learning rate to 0 over the run")
    micro_batch: int = Field(
        64, ge=0, description="rows or pictures a forward pass; changes memory, not results; 0: as many as fit"
    )


class Evaluation(Section):
    """Held-out measurements."""

    every: int = Field(10, ge=0, description="epochs between evaluations during training; 0 is never")
    prompts: int = Field(64, ge=1, description="held-out prompts of the evaluations during training")
    images: int = Field(1, ge=1, description="pictures a prompt of these; 2 or more measure diversity")
    train_prompts: int = Field(
        0, ge=0, description="training prompts measured beside them, for the gap between the two; 0 is off"
    )
    pareto: int = Field(
        4, ge=0, description="adapters kept of evaluations no other beats in reward, KL and diversity; 0 is off"
    )
    final_prompts: int = Field(256, ge=1)
    final_images: int = Field(4, ge=2, description="pictures a prompt of the final evaluation")
    truth_prompts: int = Field(48, ge=0)
    truth_images: int = Field(32, ge=2, description="base samples a prompt from which the tilted truth is computed")
    patience: int = Field(
        0, ge=0, description="evaluations without a better reward, or with a fallen one, before stopping; 0 is off"
    )
    stop_on: Literal["reward", "held_out"] = Field(
        "reward",
        description="what patience watches: the trained reward on held-out prompts, or the rewards of reward.held_out",
    )
    stop_errors: float = Field(
        2.0, gt=0, description="standard errors (paired by prompt) that a fall of a held-out reward must exceed"
    )
    max_kl: float | None = Field(
        None, gt=0, description="nats a trajectory; training stops at the first evaluation above; None: no budget"
    )
    steps: int | None = Field(None, ge=1, description="steps of the pictures of tables; None: the sampler's")
    eta: float | None = Field(None, ge=0, description="noise level of the pictures of tables; None: the sampler's")
    seed: int = 1234


class Config(Section):
    """A run."""

    name: str = "run"
    seed: int = 0
    model: Model = Model()
    sampler: Sampler = Sampler()
    prompts: Prompts = Prompts()
    reward: Reward = Reward()
    objective: Objective = Objective()
    optimisation: Optimisation = Optimisation()
    evaluation: Evaluation = Evaluation()
    checkpoint_every: int = Field(5, ge=1, description="epochs between checkpoints")
    max_minutes: float | None = Field(None, gt=0, description="training stops after the epoch that passes this time")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] | None = Field(
        None, description="None: TensorBoard where installed"
    )


def validate_config(values: dict[str, Any], where: str) -> Config:
    """Validates nested settings.

    Raises:
        UserError: for the first problem found, in one line.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _keys_at(problem["loc"][:-1])
            raise UserError(f"{where}: unknown key '{key}'{nearest(str(problem['loc'][-1]), known)}") from error
        raise UserError(f"{where}: {key}={problem['input']!r}: {problem['msg'].lower()}") from error


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Config
    for part in location:
        section = section.model_fields[str(part)].annotation
    return list(section.model_fields)


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about a name that is not known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}."
