"""Scores of saved pictures: rewards a picture, diversity a prompt; only those that are not on record.

What is scored is the saved 8-bit file, never the tensor it was made from, so that scoring it again, or elsewhere, gives
the same number, and pictures that something else drew are measured alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vmpo.errors import UserError
from vmpo.evaluation.diversity import mean_pairwise_distances, vendi_scores
from vmpo.evaluation.draw_pictures import batches_of
from vmpo.evaluation.evaluate import Report
from vmpo.evaluation.score_log import WHOLE_PROMPT, Record, ScoreLog
from vmpo.features.extractor import FeatureExtractor
from vmpo.prompts import PromptSet
from vmpo.rewards import Reward, score_images
from vmpo.training.processes import share

BATCH = 16
"""Pictures a batch of scoring."""


@dataclass(frozen=True)
class Scoring:
    """Where scores go and what is scored: P prompts, M pictures each; `retry` scores failed pictures again."""

    log: ScoreLog
    prompts: PromptSet
    images: int
    device: torch.device
    retry: bool = False
    report: Report = lambda what, done, total: None

    def is_missing(self, key: tuple[str, int, int], name: str) -> bool:
        """Whether a score is not on record; one that failed is (as null), unless it is to be tried again."""
        scores = self.log.records.get(key, {}).get("scores", {})
        return name not in scores or (self.retry and scores[name] is None)

    def lacks(self, source: str, name: str, *, whole_prompts: bool) -> bool:
        """Whether any picture (or prompt) of a source has no such score yet."""
        images = [WHOLE_PROMPT] if whole_prompts else range(self.images)
        return any(self.is_missing((source, p, m), name) for p in range(len(self.prompts)) for m in images)

    def read(self, key: tuple[str, int, int]) -> Tensor:
        """The picture of a record, (3, H, W) in [0, 1] on the CPU."""
        return read_picture(self.log.folder / self.log.records[key]["file"])


def read_picture(path: Path) -> Tensor:
    """A picture file as RGB in [0, 1], (3, H, W).

    Raises:
        UserError: if it is gone or no picture.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"picture '{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def score_rewards(job: Scoring, source: str, name: str, load: Callable[[], Reward]) -> None:
    """Scores this process's batches of a source by one reward, which is loaded only if something is missing."""
    batches = batches_of(len(job.prompts), job.images, BATCH)
    mine = [batches[i] for i in share(len(batches), job.log.accelerator)]
    missing = [[(p, m) for p, m in batch if job.is_missing((source, p, m), name)] for batch in mine]
    missing = [batch for batch in missing if batch]
    if not missing:
        return
    reward, done, total = load(), 0, sum(map(len, missing))
    for batch in missing:
        job.report(f"{source}: {name}", done, total)
        read = [(p, m, job.read((source, p, m))) for p, m in batch]
        records: list[Record] = []
        for _, rows in groupby(read, key=lambda row: row[2].shape):  # pictures of one size at a time
            same = list(rows)
            words = job.prompts.take([p for p, _, _ in same])
            images = torch.stack([image for _, _, image in same]).to(job.device)
            scores = score_images({name: reward}, images, words.prompts, words.metadata)[name].tolist()
            records += [
                {"source": source, "prompt": p, "image": m, "scores": {name: None if math.isnan(s) else s}}
                for (p, m, _), s in zip(same, scores, strict=True)
            ]
        job.log.append(records)
        done += len(batch)


def prompt_diversity(name: str, metric: FeatureExtractor, images: list[Tensor]) -> dict[str, float | None]:
    """How much the M pictures of one prompt differ: the mean distance of two, and the Vendi score where it is cosine.

    For an embedding e and the cosine distance 1 − cos the mean is the unbiased total variance of e/|e|,

        mean_{i≠j} (1 − cos(e_i, e_j)) = Σ_{i≠j} |e_i/|e_i| − e_j/|e_j||² / (2 M (M − 1)),

    which Domingo-Enrich et al. (2024, arXiv:2409.08861) and the paper's tables take with DreamSim. None where an
    extractor failed.

    Raises:
        UserError: if pictures of several sizes have features of several lengths, as those of LPIPS have.
    """
    sizes = sorted({tuple(image.shape[1:]) for image in images})
    parts = [torch.stack(images)] if len(sizes) == 1 else [image[None] for image in images]
    found_features = [metric(part).detach() for part in parts]
    if len({f.shape[1] for f in found_features}) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sizes)
        raise UserError(f"distance '{name}' compares pictures of one size; a prompt has pictures of {shown}")
    features = torch.cat(found_features).double()
    found = {name: mean_pairwise_distances(features[None], metric.distance).item()}
    if metric.distance == "cosine":
        found[f"vendi_{name}"] = vendi_scores(features[None]).item()
    return {key: None if math.isnan(value) else value for key, value in found.items()}


def score_diversity(job: Scoring, source: str, name: str, load: Callable[[], FeatureExtractor]) -> None:
    """Measures the diversity of this process's prompts of a source in one feature space."""
    mine = share(len(job.prompts), job.log.accelerator)
    missing = [p for p in mine if job.is_missing((source, p, WHOLE_PROMPT), name)]
    if not missing:
        return
    metric = load()
    for done, p in enumerate(missing):
        job.report(f"{source}: {name}", done, len(missing))
        images = [job.read((source, p, m)).to(job.device) for m in range(job.images)]
        with torch.no_grad():
            found = prompt_diversity(name, metric, images)
        job.log.append([{"source": source, "prompt": p, "scores": found}])


def scores_of(log: ScoreLog, source: str, prompts: int, images: int) -> Mapping[str, Tensor]:
    """Everything on record of a source: rewards (P, M) and diversities (P,), float64, NaN where there is none."""
    tables: dict[str, Tensor] = {}
    for (label, p, m), record in log.records.items():
        if label != source or p >= prompts or m >= images:
            continue
        for name, score in record["scores"].items():
            shape = (prompts,) if m == WHOLE_PROMPT else (prompts, images)
            table = tables.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))
            if score is not None:
                table[p if m == WHOLE_PROMPT else (p, m)] = score
    return tables
