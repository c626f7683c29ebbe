"""The command line: `vmpo train`, `sample`, `evaluate`, `report`, `recipes`, `compare`, `pretrain`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vmpo.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Align diffusion and flow models with a reward by minimising the variance of log importance weights.",
)
console = Console(highlight=False)

RunFolder = Annotated[Path, typer.Argument(help="A run folder, as `vmpo train` makes.")]


def _begin() -> None:
    # imports of the heavy libraries wait until a command needs them
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from vmpo.training.run import silence_libraries

    silence_libraries()


@app.command()
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="[RECIPE] [key.path=value …]; the embedded recipe if none is named.")
    ] = None,
    run: Annotated[
        Path | None,
        # torchrun reads every option that could be its own and stops at --run, so there is a second name
        typer.Option("--run", "--folder", help="Run folder; runs/RECIPE if not given. Under torchrun: --folder."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder, exactly where it was.")] = False,
) -> None:
    """Train an adapter by a recipe."""
    _begin()
    from vmpo.training.config import load_config
    from vmpo.training.run import train as run_training

    words = list(arguments or [])
    recipe = words.pop(0) if words and "=" not in words[0] else "glyphs"
    config = load_config(recipe, words)
    folder = run if run is not None else Path("runs") / config.name
    run_training(config, folder, resume=resume, console=console)
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(f"adapter: {folder / 'adapter' / 'pytorch_lora_weights.safetensors'}")


@app.command()
def evaluate(run: RunFolder) -> None:
    """Measure base and aligned on held-out prompts, with the truth beside them."""
    _begin()
    from vmpo.evaluation.evaluate import evaluate as run_evaluation
    from vmpo.evaluation.truth import UntrustedTruth

    with console.status("loading") as status, warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrustedTruth)  # the table says it
        found = run_evaluation(run, lambda what, done, total: status.update(f"{what} {done}/{total}"))
    _print_evaluation(found)


@app.command()
def report(run: RunFolder) -> None:
    """Write the run's report, one HTML file."""
    from vmpo.reports.page import write_report

    console.print(f"report: {write_report(run).resolve()}", soft_wrap=True)


@app.command()
def sample(
    source: Annotated[str, typer.Argument(help="A run folder, or a model (embedded name, folder or hub name).")],
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others follow.")] = 0,
    images: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the deterministic sampler.")] = 28,
    base: Annotated[bool, typer.Option(help="Leave the adapter out.")] = False,
) -> None:
    """Draw pictures with the pipeline's own deterministic sampler."""
    _begin()
    from vmpo.evaluation.sample import sample as draw

    for path in draw(source, prompt, out, seed=seed, images=images, steps=steps, base=base):
        console.print(str(path), soft_wrap=True)


@app.command()
def recipes() -> None:
    """List the recipes that ship with vmpo."""
    from vmpo.training.config import recipe_names, validate_config

    table = Table("recipe", "model", "objective", "reward", "sampler", box=None)
    from vmpo.training.config import read_recipe

    for name in recipe_names():
        config = validate_config(read_recipe(name), where=name)
        table.add_row(
            name,
            config.model.path,
            f"{config.objective.name}, beta {config.objective.beta:g}",
            ", ".join(config.reward.weights),
            f"{config.sampler.kernel}, {config.sampler.steps} steps",
        )
    console.print(table)


@app.command()
def objectives() -> None:
    """List the objectives and what they are made of."""
    from vmpo.objectives import FAMILIES

    table = Table("objective", "level", "centre", "loss", "potential", "anchor", "source", box=None)
    for family in FAMILIES.values():
        for o in family:
            table.add_row(o.name, o.level, o.centre, o.loss, o.potential, o.anchor, o.source)
        table.add_section()
    console.print(table)


@app.command()
def pretrain(
    model: Annotated[str, typer.Argument(help="The embedded pipeline to train from nothing: 'glyphs'.")],
    out: Annotated[Path, typer.Option(help="Folder for the pipeline.")] = Path("pretrained/glyphs"),
    scale: Annotated[float, typer.Option(min=0.0001, help="Share of the steps to run; for trials.")] = 1.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the network; needs g++.")] = True,
) -> None:
    """Train an embedded pipeline from nothing, or go on with one that was begun in the folder."""
    if model != "glyphs":
        raise UserError(f"no embedded pipeline '{model}'; there is 'glyphs'")
    _begin()
    from vmpo.pretraining.glyphs import pretrain_glyphs

    pretrain_glyphs(out, scale=scale, compiled=compiled, log=lambda line: console.print(line))
    console.print(f"pipeline: {out}", soft_wrap=True)


@app.command()
def compare(
    objectives: Annotated[
        list[str] | None,
        typer.Argument(help="Objectives, NAME[,part=value…]; those of interest in each world if none is named."),
    ] = None,
    on: Annotated[
        list[str] | None, typer.Option("--on", help="Exact worlds or recipes, one a flag; all exact worlds by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results; a comparison that was stopped goes on.")] = Path(
        "runs/comparison"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 … N−1.")] = 3,
    samples: Annotated[int | None, typer.Option(min=1, help="Trajectories each training may draw.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Seconds each training may take.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time; the number of cores.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value for every training of a recipe.")
    ] = None,
) -> None:
    """Compare objectives in worlds whose answer is known, or by recipes, on equal budgets."""
    _begin()
    from vmpo.comparison.compare import compare as run_comparison
    from vmpo.comparison.variant import family_of
    from vmpo.reports.comparison_page import read_results, write_comparison
    from vmpo.reports.comparison_table import print_table

    worlds, recipes_ = run_comparison(
        list(objectives or []),
        list(on or []),
        out,
        seeds=seeds,
        samples=samples,
        seconds=seconds,
        jobs=jobs,
        overrides=list(override or []),
        command=["vmpo", *sys.argv[1:]],
        console=console,
    )
    if worlds:
        results = read_results(out)
        print_table(console, results)
        families = {result["objective"]: family_of(result["objective"]) for result in results}
        console.print(f"page: {write_comparison(out, families).resolve()}", soft_wrap=True)
    for name in recipes_:
        console.print((out / f"{name}.md").read_text(), markup=False, soft_wrap=True)


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


def main() -> None:
    """Runs the command line; a `UserError` prints one line and exits with code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        console_error = Console(stderr=True, highlight=False)
        console_error.print(f"vmpo: {error}", soft_wrap=True, markup=False, style="bold red")
        sys.exit(2)


if __name__ == "__main__":
    main()
