"""What a table compares: runs, bare models, adapters and folders of pictures, as they are named on the command line."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vmpo.errors import UserError
from vmpo.evaluation.evaluate import read_run_config
from vmpo.evaluation.picture_folder import FoundPicture, find_pictures
from vmpo.policies import adapters
from vmpo.policies.loading import EMBEDDED
from vmpo.training.adapters import adapter_folder
from vmpo.training.config import Config
from vmpo.training.recipes import load_config

Kind = Literal["run", "base", "model", "adapter", "pictures"]
ADAPTER_FILES = (adapters.FILE, "adapter_model.safetensors")
LABEL = re.compile(r"[\w .()+@-]+")


@dataclass(frozen=True)
class Source:
    """A row of the table.

    Attributes:
        label: its name there, and the folder its pictures are drawn into.
        kind: an aligned run, its base, a bare model, an adapter on the base, or pictures that are there already.
        path: the run, adapter or folder; the model's name for a model.
        config: how it is drawn; None for pictures.
        adapter: the adapter's folder, None without one.
        pictures: what was found in a folder of pictures.
    """

    label: str
    kind: Kind
    path: str
    config: Config | None = None
    adapter: Path | None = None
    pictures: tuple[FoundPicture, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What its scores depend on; another identity under the same label is another source.

        Adapters are told apart by their content, folders of pictures by the files' names, sizes and times.
        """
        if self.config is None:
            stats = [(str(p.file), s.st_size, s.st_mtime_ns) for p in self.pictures for s in [p.file.stat()]]
            return {"kind": self.kind, "files": len(stats), "digest": _digest(repr(sorted(stats)).encode())}
        model = self.config.model.model_dump(include={"path", "height", "width", "guidance", "weights", "autocast"})
        found = {"kind": self.kind, "model": model, "sampler": self.config.sampler.model_dump(mode="json")}
        return found | ({"adapter": _digest(adapter_file(self.adapter).read_bytes())} if self.adapter else {})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def adapter_file(folder: Path) -> Path:
    """The weights in an adapter's folder, as diffusers or as PEFT writes them.

    Raises:
        UserError: if there are none.
    """
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"no adapter at '{folder / ADAPTER_FILES[0]}'; 'vmpo train' writes one into its run folder")


def _run_and_adapter(path: str) -> tuple[Path, str | None] | None:
    """'RUN', or 'RUN@ADAPTER' for another of its adapters, as `adapter_folder` names them; None for anything else."""
    run, _, name = path.rpartition("@")
    for folder, adapter in ((path, None), (run, name)):
        if folder and (Path(folder) / "config.yaml").is_file():
            return Path(folder), adapter
    return None


def _kind_of(path: str) -> Kind:
    folder = Path(path)
    if path == "base":
        return "base"
    if path in EMBEDDED:
        return "model"
    if _run_and_adapter(path):
        return "run"
    if (folder / "model_index.json").is_file():
        return "model"
    if any((folder / name).is_file() for name in ADAPTER_FILES):
        return "adapter"
    if folder.is_dir():
        return "pictures"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return "model"  # a hub name; loading says whether it can be had
    raise UserError(
        f"source '{path}' is not there; a source is a run folder, 'base', a model, an adapter's folder or a folder of "
        f"pictures"
    )


def _label_and_path(word: str) -> tuple[str, str]:
    before, equals, after = word.partition("=")
    if equals and "/" not in before:
        label, path = before.strip(), after
    else:
        label, path = Path(word).name or word, word
    if not LABEL.fullmatch(label) or label.startswith("."):
        raise UserError(
            f"source '{word}': the label '{label}' may have letters, digits, spaces and ._-+()@ only; give one as "
            f"LABEL=SOURCE"
        )
    return label, path


def with_sampler(config: Config, steps: int | None, eta: float | None) -> Config:
    """A configuration with the sampler of evaluations: `steps` and `eta` given, else those of its `evaluation` section.

    A window of stochastic steps is one of the training's schedule; with other steps or eta it is dropped.
    """
    steps = steps if steps is not None else config.evaluation.steps
    eta = eta if eta is not None else config.evaluation.eta
    own = config.sampler
    change: dict[str, Any] = {}
    if steps is not None and steps != own.steps:
        change |= {"steps": steps, "window": None}
    if eta is not None and eta != own.eta:
        change |= {"eta": eta, "window": None}
    return config.model_copy(update={"sampler": own.model_copy(update=change)})


def read_sources(words: list[str], like: str | None, steps: int | None, eta: float | None) -> list[Source]:
    """The sources named by 'SOURCE' or 'LABEL=SOURCE', in order.

    Bare models, adapters and 'base' are drawn as `like` is (a run folder or a recipe), by default as the first run
    among the sources.

    Raises:
        UserError: for a source that is not there, two of one label, or one that nothing says how to draw.
    """
    named = [(label, path, _kind_of(path)) for label, path in map(_label_and_path, words)]
    labels = [label for label, _, _ in named]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"two sources have the label '{twice}'; name them apart as LABEL=SOURCE")
    first = next((found[0] for _, path, _ in named if (found := _run_and_adapter(path))), None)
    like = like or (str(first) if first is not None else None)
    like = like or next((path for _, path, kind in named if path in EMBEDDED), None)  # recipes of the same name
    common = None if like is None else read_run_config(Path(like)) if Path(like).is_dir() else load_config(like, [])
    return [_source(label, path, kind, common, steps, eta) for label, path, kind in named]


def _source(label: str, path: str, kind: Kind, common: Config | None, steps: int | None, eta: float | None) -> Source:
    if kind == "pictures":
        return Source(label, kind, path, pictures=tuple(find_pictures(Path(path))))
    run = _run_and_adapter(path)
    config = read_run_config(run[0]) if run else common
    if config is None:
        raise UserError(
            f"source '{path}': nothing says how it is drawn; name a run beside it, or --like with a run or a recipe"
        )
    if kind == "model":
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    adapter = adapter_folder(*run) if run else Path(path) if kind == "adapter" else None
    if adapter is not None:
        adapter_file(adapter)
    return Source(label, kind, path, with_sampler(config, steps, eta), adapter)
