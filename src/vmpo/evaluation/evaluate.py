"""The evaluation of a run: base and aligned with one sampler and the same seeds, beside the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmpo.disk import write_text
from vmpo.errors import UserError
from vmpo.evaluation.diversity import total_variance, total_variances
from vmpo.evaluation.glyph_style import StyleReading, marginals_of, read_styles, style_entropy
from vmpo.evaluation.statistics import clustered_mean, paired_difference
from vmpo.evaluation.truth import measure_truth
from vmpo.kernels import Kernel
from vmpo.log_weights import LogWeights
from vmpo.policies.adapters import load_lora
from vmpo.policies.loading import EMBEDDED
from vmpo.policies.policy import Policy
from vmpo.prompts import PromptSet
from vmpo.rewards import Reward, combine, score_images
from vmpo.rewards.ocr import LineRecogniser, OCRAccuracy, recogniser, target_text
from vmpo.rollouts import rollout
from vmpo.training.adapters import adapter_beta
from vmpo.training.config import Config, validate_config
from vmpo.training.pictures import save_image
from vmpo.training.scoring import decode
from vmpo.training.setup import (
    density_scale,
    load_kernel_of,
    load_objective_of,
    load_policy_of,
    load_prompts_of,
    load_rewards_of,
)

GALLERY = 24
Report = Callable[[str, int, int], None]


def picture_seed(seed: int, prompt: int, image: int) -> int:
    """The noise seed of picture `image` (< 1009) of prompt number `prompt`, whatever draws it."""
    return seed * 1_000_003 + prompt * 1009 + image


@dataclass(frozen=True)
class Samples:
    """M pictures of each of P prompts.

    Attributes:
        images: (P·M, 3, H, W), prompt by prompt.
        features: latents scaled so that their total variance is a mean over dimensions, (P, M, D).
        scores: {reward: (P, M)}; reward: the weighted total, (P, M).
        read: what the recogniser read, prompt by prompt, or empty texts where no reward reads.
        log_ratio: log p_ref − log p of whole trajectories, nats, (P, M); kl: exact KL to the reference, nats, (P, M).
    """

    images: Tensor
    features: Tensor
    scores: dict[str, Tensor]
    reward: Tensor
    read: list[str]
    log_ratio: Tensor
    kl: Tensor


def read_run_config(folder: Path) -> Config:
    """The configuration a run folder was begun with.

    Raises:
        UserError: if the folder is no run folder.
    """
    import yaml

    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"'{folder}' is no run folder: it has no config.yaml; 'vmpo train --run {folder}' makes one")
    return validate_config(yaml.safe_load(file.read_text()), where=f"'{file}'")


class Evaluation:
    """Draws and scores pictures of a run's base and aligned policy."""

    def __init__(self, folder: Path, config: Config, report: Report = lambda what, done, total: None) -> None:
        self.folder, self.config, self.report = folder, config, report
        self.rewards: dict[str, Reward] = load_rewards_of(config)
        self.test: PromptSet = load_prompts_of(config, self.rewards)[1]
        self.policy = load_policy_of(config, "cuda" if torch.cuda.is_available() else "cpu")
        self.kernel: Kernel = load_kernel_of(config, self.policy)
        load_lora(self.policy, folder / "adapter")
        scale = density_scale(load_objective_of(config), self.policy)  # to that of the exact densities
        self.beta = adapter_beta(folder / "adapter", config.objective.beta) * scale

    def draw(self, rows: list[int], images: int, *, aligned: bool, seed: int) -> Samples:
        """M pictures a prompt; picture m of prompt p starts from the same noise whatever the policy."""
        prompts = self.test.take([r for r in rows for _ in range(images)])
        policy: Policy = self.policy
        seeds = [picture_seed(seed, r, m) for r in rows for m in range(images)]
        context: AbstractContextManager[None] = nullcontext() if aligned else self.policy.reference()
        name, total = ("aligned" if aligned else "base"), len(seeds)
        with context:
            drawn = rollout(
                policy,
                self.kernel,
                policy.encode(prompts.prompts),
                seeds,
                batch=self.config.optimisation.micro_batch,
                progress=lambda done: self.report(f"{name} pictures", done, total),
            )
        pictures = decode(policy, drawn.x_0, self.config.optimisation.micro_batch)
        self.report(f"{name} rewards", 0, total)
        scores = score_images(self.rewards, pictures, prompts.prompts, prompts.metadata)
        reader = self.reader()
        group = torch.arange(len(rows)).repeat_interleave(images)
        reward = combine({n: scores[n] for n in self.config.reward.weights}, self.config.reward.weights, group)
        shape = (len(rows), images)
        features = drawn.x_0.flatten(1).cpu().double()
        return Samples(
            images=pictures,
            features=(features / features.shape[1] ** 0.5).view(*shape, -1),
            scores={n: s.view(shape) for n, s in scores.items()},
            reward=reward.view(shape),
            read=reader.read(pictures) if reader is not None else [""] * total,
            log_ratio=(drawn.log_p_ref - drawn.log_p_old).double().sum(1).cpu().view(shape),
            kl=drawn.kl_ref.double().sum(1).cpu().view(shape),
        )

    def reader(self) -> LineRecogniser | None:
        """What reads the pictures, where a reward does."""
        return next((recogniser(r.alphabet) for r in self.rewards.values() if isinstance(r, OCRAccuracy)), None)


def evaluate(folder: Path, report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """Measures a run and writes `evaluation.json` and the gallery's pictures into its folder.

    The score set has many prompts with few pictures each, for the rewards; the deep set has fewer prompts with many
    pictures each, for what lies within a prompt: diversity, ESS, log Z and the tilted truth. KL is exact, per step.

    Raises:
        UserError: if the folder is no run folder or has no adapter.
    """
    config = read_run_config(folder)
    run, settings = Evaluation(folder, config, report), config.evaluation
    wide = list(range(min(settings.final_prompts, len(run.test))))
    deep = wide[: settings.truth_prompts] or wide[:2]
    seed = settings.seed + 1
    found: dict[str, Any] = {}
    wide_samples, deep_samples = {}, {}
    for name in ("base", "aligned"):
        wide_samples[name] = run.draw(wide, settings.final_images, aligned=name == "aligned", seed=seed)
        deep_samples[name] = run.draw(deep, settings.truth_images, aligned=name == "aligned", seed=seed + 1)
        found[name] = _metrics(run, wide_samples[name], deep_samples[name], wide, deep)
    base, aligned = deep_samples["base"], deep_samples["aligned"]
    found["difference"] = _differences(run, wide_samples, wide) | {
        "diversity": paired_difference(total_variances(base.features), total_variances(aligned.features)).as_dict()
    }
    found["truth"] = measure_truth(base.reward, run.beta, base.features, aligned.reward, aligned.kl)
    if quiet := _quiet_steps_note(run.kernel):
        found["truth"]["note"] = "; ".join(filter(None, [found["truth"].get("note"), quiet]))
    if config.model.path in EMBEDDED:
        found["marginals"] = _marginals(run, deep_samples, deep)
    found["gallery"] = _gallery(run, wide_samples, wide)
    found["settings"] = {
        "words": len(wide),
        "images_per_prompt": settings.final_images,
        "deep_prompts": len(deep),
        "deep_images_per_prompt": settings.truth_images,
        "sampler": f"{config.sampler.kernel}, {config.sampler.steps} steps, guidance {config.model.guidance:g}",
        "seed": seed,
    }
    write_text(folder / "evaluation.json", json.dumps(found, indent=1))
    return found


def _quiet_steps_note(kernel: Kernel) -> str | None:
    """A caveat where more than the last step adds no noise: the frontier is then no bound."""
    quiet = kernel.num_steps - len(kernel.stochastic_steps)
    if quiet < 2:
        return None
    return (
        f"{quiet} of the sampler's {kernel.num_steps} steps add no noise, and what the adapter changes there is in no "
        f"KL: a policy may lie above the frontier"
    )


def _metrics(run: Evaluation, wide: Samples, deep: Samples, rows: list[int], deep_rows: list[int]) -> dict[str, Any]:
    found = {name: clustered_mean(score).as_dict() for name, score in wide.scores.items()}
    found["reward"] = clustered_mean(wide.reward).as_dict()
    if run.reader() is not None:
        found["exact_match"] = clustered_mean(_exact_matches(wide, run.test.take(rows).prompts)).as_dict()
    found["diversity"] = total_variance(deep.features).as_dict()
    found["kl_ref"] = clustered_mean(wide.kl).as_dict()
    shape = deep.reward.shape
    log_w = deep.log_ratio + deep.reward / run.beta
    group = torch.arange(shape[0]).repeat_interleave(shape[1])
    weights = LogWeights(log_w.flatten()[:, None], group)
    found["ess"] = clustered_mean(weights.ess).as_dict()
    found["log_z"] = clustered_mean(weights.log_z).as_dict()
    found["var_log_w"] = clustered_mean(log_w.var(1)).as_dict()
    if run.config.model.path in EMBEDDED:
        found["style_entropy"] = style_entropy(_styles(run, deep, deep_rows), group.tolist()).as_dict()
    return found


def _differences(run: Evaluation, samples: dict[str, Samples], rows: list[int]) -> dict[str, Any]:
    base, aligned = samples["base"], samples["aligned"]
    found = {name: paired_difference(base.scores[name], aligned.scores[name]).as_dict() for name in base.scores}
    found["reward"] = paired_difference(base.reward, aligned.reward).as_dict()
    if run.reader() is not None:
        prompts = run.test.take(rows).prompts
        exact = [_exact_matches(s, prompts) for s in (base, aligned)]
        found["exact_match"] = paired_difference(*exact).as_dict()
    return found


def _exact_matches(samples: Samples, prompts: list[str]) -> Tensor:
    images = samples.reward.shape[1]
    targets = [target_text(p).replace(" ", "").lower() for p in prompts for _ in range(images)]
    return torch.tensor([float(r == t) for r, t in zip(samples.read, targets, strict=True)]).view(-1, images)


def _styles(run: Evaluation, samples: Samples, rows: list[int]) -> list[StyleReading]:
    # fonts are told apart by the letters that are there, so it is the word that was read that counts
    wanted = [_quoted(p) for p in run.test.take(rows).prompts for _ in range(samples.reward.shape[1])]
    return read_styles(samples.images, [read.upper() or word for read, word in zip(samples.read, wanted, strict=True)])


def _marginals(run: Evaluation, deep: dict[str, Samples], rows: list[int]) -> dict[str, Any]:
    readings = {name: _styles(run, s, rows) for name, s in deep.items()}
    found = {name: marginals_of(r) for name, r in readings.items()}
    reward = deep["base"].reward.double()
    weights = torch.softmax(torch.where(reward.isfinite(), reward / run.beta, -torch.inf), dim=1)
    return found | {"truth": marginals_of(readings["base"], weights.flatten())}


def _gallery(run: Evaluation, samples: dict[str, Samples], rows: list[int]) -> list[dict[str, Any]]:
    images = samples["base"].reward.shape[1]
    shown = rows[:GALLERY]
    entries: list[dict[str, Any]] = [{"prompt": p, "word": _quoted(p)} for p in run.test.take(shown).prompts]
    for name, found in samples.items():
        first = found.images[: len(shown) * images : images]
        read = found.read[: len(shown) * images : images]
        for index, (entry, image) in enumerate(zip(entries, first, strict=True)):
            file = f"samples/evaluation/{name}-{index:03d}.png"
            save_image(image, run.folder / file)
            score = found.reward[index, 0].item()
            entry[name] = {"file": file, "read": read[index].upper(), "score": score}
    return entries


def _quoted(prompt: str) -> str:
    return prompt.split('"')[1] if prompt.count('"') > 1 else ""
