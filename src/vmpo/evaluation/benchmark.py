"""Several sources on the same prompts and seeds: draws what is to be drawn, scores what is not scored yet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from filelock import FileLock

from vmpo.disk import lock_folder, write_text
from vmpo.errors import UserError
from vmpo.evaluation.benchmark_plan import Benchmark
from vmpo.evaluation.draw_pictures import draw_source
from vmpo.evaluation.evaluate import Report
from vmpo.evaluation.picture_folder import match_pictures
from vmpo.evaluation.score_log import Record, ScoreLog
from vmpo.evaluation.score_pictures import Scoring, score_diversity, score_rewards, scores_of
from vmpo.evaluation.score_table import ScoreTable, build_table
from vmpo.evaluation.statistics import prompt_means
from vmpo.rewards import check_prompts


def run_benchmark(
    job: Benchmark,
    folder: Path,
    accelerator: Accelerator,
    report: Report = lambda what, done, total: None,
) -> ScoreTable:
    """Draws and scores what is missing in `folder`, and gives the table; killed at any moment it can be repeated.

    Raises:
        UserError: for anything the user can mend, before pictures are drawn wherever that can be known then.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    if accelerator.is_main_process:
        lock_folder(folder, lock, f"'{folder}'")
    try:
        accelerator.wait_for_everyone()
        log = ScoreLog(folder, accelerator)
        _check_settings(job, folder)
        log.merge()
        scoring = Scoring(log, job.prompts, job.images, accelerator.device, job.retry, report)
        _check_scorers(job, scoring)
        if accelerator.is_main_process:
            _write_settings(job, folder)
            _record_given_pictures(job, log)
        for source in job.sources:
            if source.kind != "pictures":
                draw_source(source, job.prompts, job.images, job.seed, log, accelerator, report)
        log.merge()
        for name in job.rewards:
            loaded = _once(lambda n=name: job.load_reward(n))  # type: ignore[misc]
            for source in job.sources:
                score_rewards(scoring, source.label, name, loaded)
        for name in job.distances:
            metric = _once(lambda n=name: job.load_distance(n))  # type: ignore[misc]
            for source in job.sources:
                score_diversity(scoring, source.label, name, metric)
        log.merge()
        if accelerator.is_main_process:
            _record_prompts(job, log)
        log.merge()
        return _table(job, log)
    finally:
        lock.release()


def build_accelerator() -> Accelerator:
    """The processes; one may wait hours for another that has the slower pictures."""
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[waiting])


def _once(load: Callable[[], Any]) -> Callable[[], Any]:
    """Loads at the first call only, so that one scorer at a time is in memory."""
    found: list[Any] = []

    def loaded() -> Any:
        if not found:
            found.append(load())
        return found[0]

    return loaded


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / "settings.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _check_settings(job: Benchmark, folder: Path) -> None:
    """The scores in a folder belong to its prompts, seeds and sources; others must not be mixed with them."""
    if job.distances and job.images < 2:
        raise UserError(f"--distances {','.join(job.distances)} needs two pictures a prompt or more, not {job.images}")
    written = _read_settings(folder)
    for key, value in job.settings().items():
        if key in written and written[key] != value:
            raise UserError(
                f"'{folder}' was begun with {key} {written[key]}, not {value}; repeat that, or choose another --out"
            )
    for source in job.sources:
        known = written.get("sources", {}).get(source.label)
        if known is not None and known != json.loads(json.dumps(source.identity())):
            raise UserError(
                f"'{folder}' holds scores of another '{source.label}' (adapter, settings or pictures have changed); "
                f"choose another label, as NEW={source.path}, or another --out"
            )


def _write_settings(job: Benchmark, folder: Path) -> None:
    sources = _read_settings(folder).get("sources", {}) | {s.label: s.identity() for s in job.sources}
    write_text(folder / "settings.json", json.dumps(job.settings() | {"sources": sources}, indent=1))


def _check_scorers(job: Benchmark, scoring: Scoring) -> None:
    """Loads every scorer that is needed and lets it look at the prompts, before hours of drawing; keeps none."""
    labels = [source.label for source in job.sources]
    for name in job.rewards:
        if any(scoring.lacks(label, name, whole_prompts=False) for label in labels):
            check_prompts({name: job.load_reward(name)}, job.prompts.prompts)
    for name in job.distances:
        if any(scoring.lacks(label, name, whole_prompts=True) for label in labels):
            job.load_distance(name)


def _record_given_pictures(job: Benchmark, log: ScoreLog) -> None:
    records = []
    for source in (s for s in job.sources if s.kind == "pictures"):
        files = match_pictures(list(source.pictures), job.prompts, Path(source.path))
        for p, m in ((p, m) for p in range(len(files)) for m in range(job.images)):
            if (source.label, p, m) not in log.records:
                names = {"source": source.label, "prompt": p, "image": m}
                records.append({**names, "seed": None, "file": str(files[p][m].resolve()), "scores": {}})
    log.append(records)


def _record_prompts(job: Benchmark, log: ScoreLog) -> None:
    """A line a prompt: its text, the means of its pictures' scores, beside the diversity that is there already."""
    records: list[Record] = []
    for source in job.sources:
        scores = scores_of(log, source.label, len(job.prompts), job.images)
        means = {name: prompt_means(table).tolist() for name, table in scores.items() if table.ndim == 2}
        for p, text in enumerate(job.prompts.prompts):
            known = {name: None if math.isnan(column[p]) else column[p] for name, column in means.items()}
            records.append({"source": source.label, "prompt": p, "text": text, "means": known, "scores": {}})
    log.append(records)


def _table(job: Benchmark, log: ScoreLog) -> ScoreTable:
    scores = {s.label: scores_of(log, s.label, len(job.prompts), job.images) for s in job.sources}
    vendi = [f"vendi_{name}" for name in job.distances]  # of cosine distances only
    metrics = [*job.rewards, *job.distances, *(v for v in vendi if all(v in found for found in scores.values()))]
    return build_table(scores, metrics, job.lower, len(job.prompts), job.images)
