"""The model card of an export: what was trained on what, how it measured, how it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from vmpo.export.adapter import Adapter
from vmpo.export.card_settings import is_hub_name, public_settings, public_text
from vmpo.export.loading_code import loading_code
from vmpo.reports.run_record import RunRecord, finite, read_run, section
from vmpo.training.config import Config

LICENCE = (
    "# license: to be stated by whoever publishes this (the terms of the base model and of the rewards may bind it)\n"
)


def write_card(
    folder: Path,
    run: Path,
    config: Config,
    adapter: Adapter,
    to: str,
    *,
    repo: str | None = None,
    tables: Path | None = None,
) -> None:
    """Writes README.md, and the pictures it shows into samples/.

    Args:
        repo: name on the hub under which it will be loaded; a local folder's name if None.
        tables: folder that `vmpo evaluate --out` made, whose table.md and gallery.png the card shows too.
    """
    record = read_run(run)
    parts = [
        front_matter(config, to),
        f"# {config.name}\n",
        summary(config, adapter, to),
        *_pictures(folder, record, tables),
        *_evaluation(record, tables),
        "## How to load\n",
        loading_code(config, adapter, to, repo),
        *_training(record, config),
        "## Settings\n",
        "A recipe for `vmpo train`; paths of the machine, addresses and secrets are left out.\n",
        f"```yaml\n{yaml.safe_dump(public_settings(config), sort_keys=False, allow_unicode=True)}```\n",
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def front_matter(config: Config, to: str) -> str:
    """What the hub reads: base model (where it is one of the hub's), library, tags; no licence is made up."""
    kind = "merged" if to == "merged" else "adapter"
    base = {"base_model": config.model.path, "base_model_relation": "finetune" if kind == "merged" else "adapter"}
    facts: dict[str, Any] = {
        **(base if is_hub_name(config.model.path) else {}),
        "library_name": "peft" if to == "peft" else "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", *(["lora"] if kind == "adapter" else []), "vmpo", config.objective.name],
    }
    return f"---\n{LICENCE}{yaml.safe_dump(facts, sort_keys=False)}---\n"


def base_in_words(config: Config) -> str:
    """The base model as a link, or the name of a local folder."""
    path = config.model.path
    if is_hub_name(path):
        return f"[{path}](https://huggingface.co/{path})"
    return f"the local model `{Path(path).name}`"


def summary(config: Config, adapter: Adapter, to: str) -> str:
    """One sentence: base, objective, temperature, rewards."""
    ranks = ", ".join(str(rank) for rank in sorted({m.rank for m in adapter.modules}))
    rewards = " + ".join(f"{weight:g} · {name}" for name, weight in config.reward.weights.items())
    base, objective = base_in_words(config), config.objective
    what = f"This is {base} aligned" if to == "merged" else f"This LoRA (rank {ranks}) aligns {base}"
    return (
        f"{what} with the reward {rewards}: trained by `vmpo` with the objective `{objective.name}` at the temperature "
        f"beta = {objective.beta:g}, on the prompts `{public_text(config.prompts.train)}`.\n"
    )


def _pictures(folder: Path, record: RunRecord, tables: Path | None) -> list[str]:
    grids = sorted((record.folder / "samples").glob("epoch-*.png"))
    shown: list[tuple[str, Path]] = []
    if len(grids) > 1:
        shown = [(f"Held-out prompts, {_epoch(grids[0])}", grids[0])]
    if grids:
        shown += [(f"The same prompts and noises, {_epoch(grids[-1])}", grids[-1])]
    if tables is not None and (tables / "gallery.png").is_file():
        shown += [("Gallery of the evaluation", tables / "gallery.png")]
    if not shown:
        return []
    (folder / "samples").mkdir()
    lines = ["## Pictures\n"]
    for caption, file in shown:
        shutil.copyfile(file, folder / "samples" / file.name)
        lines += [f"{caption}:\n", f"![{caption}](samples/{file.name})\n"]
    return lines


def _epoch(grid: Path) -> str:
    number = int(grid.stem.removeprefix("epoch-"))
    return "before training" if number == 0 else f"after epoch {number}"


def _evaluation(record: RunRecord, tables: Path | None) -> list[str]:
    lines = []
    base, aligned, difference = (section(record.evaluation, key) for key in ("base", "aligned", "difference"))
    if aligned:
        lines += ["| held out | base | aligned | difference |", "|---|---:|---:|---:|"]
        for metric in aligned:
            cells = [_estimate(side.get(metric)) for side in (base, aligned, difference)]
            lines.append(f"| {metric} | {' | '.join(cells)} |")
        lines.append("\nMeans ± standard errors over prompts; differences are paired by prompt.\n")
    if tables is not None and (tables / "table.md").is_file():
        lines += [(tables / "table.md").read_text(encoding="utf-8")]
    return ["## Evaluation\n", *(lines or ["Not evaluated.\n"])]


def _estimate(entry: object) -> str:
    mean, error = (finite(section(entry).get(key)) for key in ("mean", "se"))
    if mean is None:
        return "–"
    return f"{mean:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _training(record: RunRecord, config: Config) -> list[str]:
    facts = record.provenance
    versions = section(facts, "versions")
    rows = {"prompts × pictures an epoch": f"{config.optimisation.prompts} × {config.optimisation.group}"}
    if record.metrics:
        last = record.metrics[-1]
        rows["epochs"] = f"{last['epoch']:g}"
        rows["pictures drawn"] = f"{finite(last.get('samples')) or 0:,.0f}"
        processes = int(finite(facts.get("processes")) or 1)
        hours = (finite(last.get("seconds")) or 0.0) / 3600
        rows["training time"] = f"{hours:.2f} hours × {processes} process{'es' if processes > 1 else ''}"
    if "hardware" in facts:
        rows["hardware"] = str(facts["hardware"])
    if facts.get("vmpo"):
        versions = {"vmpo": facts["vmpo"], **versions}
    if versions:
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return ["## Training\n", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
