"""`vmpo evaluate`, `vmpo strip` and `vmpo report`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vmpo.cli.app import RunFolder, app, begin, console
from vmpo.errors import UserError

if TYPE_CHECKING:
    from vmpo.evaluation.benchmark_plan import Benchmark
    from vmpo.evaluation.score_table import ScoreTable

Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps; the run's evaluation.steps if not given.")]
Eta = Annotated[float | None, typer.Option(min=0, help="Noise level; the run's evaluation.eta if not given.")]


@app.command()
def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A run folder. With --out: SOURCE or LABEL=SOURCE, each a run (RUN@ADAPTER for another of its "
            "adapters), 'base' (of the first run), a model, an adapter's folder, or a folder of pictures."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for tables, scores and pictures of the sources; used again, it goes on.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt set; the first run's held-out one if not given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts of the set.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Pictures a prompt.")] = None,
    rewards: Annotated[
        str | None, typer.Option(help="Scores of a picture, comma-separated; the first run's if not given.")
    ] = None,
    distances: Annotated[
        str, typer.Option(help="Diversity of a prompt's pictures, comma-separated: dreamsim, clip, lpips.")
    ] = "",
    lower: Annotated[str, typer.Option(help="Columns in which less is better, comma-separated.")] = "",
    steps: Steps = None,
    eta: Eta = None,
    like: Annotated[str | None, typer.Option(help="Run or recipe as which models and adapters are drawn.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the pictures that are drawn.")] = 1234,
    retry: Annotated[bool, typer.Option("--retry", help="Score again what failed before.")] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME.OPTION=VALUE of a reward or distance; NAME.use says what it is.")
    ] = None,
    gallery: Annotated[str | None, typer.Option(help="Prompts of the gallery, by number from 0; the first 6.")] = None,
    digits: Annotated[int, typer.Option(min=0, max=12, help="Decimals in the tables.")] = 4,
) -> None:
    """Measure a run against the truth; with --out, tables of several sources on the same prompts and seeds."""
    begin()
    if out is None:
        of_tables = (prompts, limit, images, rewards, distances, lower, steps, eta, like, retry, option, gallery)
        if len(sources) > 1 or any(value not in (None, "", False, []) for value in of_tables):
            raise UserError("a table of sources needs --out FOLDER, where it goes; without it a single run is measured")
        _evaluate_run(Path(sources[0]))
        return
    from vmpo.evaluation.benchmark_plan import plan_benchmark

    job = plan_benchmark(
        sources,
        prompts=prompts,
        limit=limit,
        images=images,
        rewards=None if rewards is None else _names(rewards),
        distances=_names(distances),
        lower=_names(lower),
        steps=steps,
        eta=eta,
        like=like,
        seed=seed,
        retry=retry,
        options=option or [],
    )
    _benchmark(job, out, _rows(gallery, len(job.prompts)), digits)


@app.command()
def strip(
    run: RunFolder,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts, a row each.")],
    out: Annotated[Path | None, typer.Option(help="PNG file; strip.png in the run folder if not given.")] = None,
    columns: Annotated[int, typer.Option(min=2, help="Pictures a row, the base model's first.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Of the noises.")] = 1234,
    steps: Steps = None,
    eta: Eta = None,
) -> None:
    """Draw the same prompts and noises through a run's adapters, to see what training does to a picture."""
    begin()
    from vmpo.evaluation.training_strip import draw_strip
    from vmpo.reports.picture_grid import PictureGrid, save_grid_figure

    with console.status("drawing"):
        found = draw_strip(run, prompt, seed=seed, columns=columns, steps=steps, eta=eta)
    titles = ["base" if epoch == 0 else f"epoch {epoch}" for epoch in found.epochs]
    file = out or run / "strip.png"
    save_grid_figure(PictureGrid(found.pictures, titles, found.prompts), file)
    console.print(f"strip: {file}", soft_wrap=True)


@app.command()
def report(run: RunFolder) -> None:
    """Write the run's report, one HTML file."""
    from vmpo.reports.page import write_report

    console.print(f"report: {write_report(run).resolve()}", soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _rows(text: str | None, prompts: int) -> list[int]:
    """Numbers of prompts, those of --gallery or the first six.

    Raises:
        UserError: for what is no number, or a prompt that is not there.
    """
    if text is None:
        return list(range(min(6, prompts)))
    wrong = next((word for word in _names(text) if not word.isdigit() or int(word) >= prompts), None)
    if wrong is not None or not _names(text):
        raise UserError(f"--gallery '{text}': numbers of prompts, comma-separated, from 0 to {prompts - 1}")
    return [int(word) for word in _names(text)]


def _benchmark(job: Benchmark, out: Path, rows: list[int], digits: int) -> None:
    from vmpo.evaluation.benchmark import build_accelerator, run_benchmark
    from vmpo.reports.score_table import write_tables
    from vmpo.reports.source_gallery import write_gallery

    accelerator = build_accelerator()
    with console.status("loading") as status:
        if not accelerator.is_main_process:
            status.stop()
        table = run_benchmark(job, out, accelerator, lambda what, done, total: status.update(f"{what} {done}/{total}"))
    if accelerator.is_main_process:
        write_tables(table, out, digits)
        write_gallery(out, list(table.means), job.prompts.prompts, rows)
        _print_table(table, digits)
        console.print(f"tables, scores and gallery: {out}", soft_wrap=True)


def _print_table(table: ScoreTable, digits: int) -> None:
    from vmpo.reports.score_table import figures, notes, title

    shown = Table("", *map(title, table.metrics), box=None)
    for source, row in table.means.items():
        shown.add_row(source, *(" ± ".join(filter(None, figures(e, digits) or "–")) for e in row.values()))
    console.print(shown)
    for line in notes(table):
        console.print(line, soft_wrap=True, markup=False)


def _evaluate_run(run: Path) -> None:
    from vmpo.evaluation.evaluate import evaluate as run_evaluation
    from vmpo.evaluation.truth import UntrustedTruth

    with console.status("loading") as status, warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrustedTruth)  # the table says it
        found = run_evaluation(run, lambda what, done, total: status.update(f"{what} {done}/{total}"))
    _print_evaluation(found)


def _print_evaluation(found: dict[str, Any]) -> None:
    table = Table("", "base", "aligned", "tilted truth", box=None)
    truth = found["truth"]
    beside = {
        "reward": truth["reward"],
        "kl_ref": truth["kl"],
        "diversity": truth.get("diversity"),
        "log_z": truth["log_z"],
    }
    for metric, base in found["base"].items():
        aligned, true = found["aligned"][metric], beside.get(metric)
        cells = [f"{e['mean']:.3f} ± {e['se']:.3f}" if e is not None else "" for e in (base, aligned, true)]
        table.add_row(metric, *cells)
    console.print(table)
    if "note" in truth:
        console.print(f"note: {truth['note']}", soft_wrap=True)
    gap = truth.get("gap")
    if gap:
        console.print(
            f"at the aligned policy's KL of {gap['kl']:.2f} nats the best reward that base samples show is "
            f"{gap['frontier_reward']:.3f}; the policy has {gap['policy_reward']:.3f}, a gap of "
            f"{gap['gap']:.3f} ± {gap['se']:.3f}",
            soft_wrap=True,
        )
