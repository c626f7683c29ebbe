"""From the words of a command line to what a table of sources measures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vmpo.errors import UserError
from vmpo.evaluation.picture_folder import match_pictures, prompts_named_in
from vmpo.evaluation.picture_source import Source, read_sources
from vmpo.features.extractor import FeatureExtractor
from vmpo.prompts import PromptSet, load_prompts
from vmpo.rewards import Reward, load_reward

Scorer = tuple[str, dict[str, Any]]
"""What a scorer is, a built-in name or 'module:name', and its options."""
MOST_IMAGES = 1009  # seeds of a prompt's pictures must not run into the next prompt's


@dataclass(frozen=True)
class Benchmark:
    """What is measured.

    Attributes:
        sources: rows of the table; differences are taken to the first.
        prompts: the set; images: pictures of each prompt.
        rewards: names as `load_reward` takes them, a score a picture.
        distances: names as `load_feature` takes them, a diversity a prompt.
        lower: metrics of which less is better.
        seed: of the pictures that are drawn.
        retry: score again what failed.
        scorers: what rewards and distances are, and their options, where a name alone does not say it.
    """

    sources: tuple[Source, ...]
    prompts: PromptSet
    images: int
    rewards: tuple[str, ...]
    distances: tuple[str, ...] = ()
    lower: tuple[str, ...] = ()
    seed: int = 1234
    retry: bool = False
    scorers: Mapping[str, Scorer] = field(default_factory=dict)

    def load_reward(self, name: str) -> Reward:
        """The reward of a name."""
        return load_reward(*self.scorers.get(name, (name, {})))

    def load_distance(self, name: str) -> FeatureExtractor:
        """The feature extractor of a name."""
        from vmpo.features.loading import load_feature  # the networks' classes are heavy

        return load_feature(*self.scorers.get(name, (name, {})))

    def settings(self) -> dict[str, Any]:
        """What a folder of scores must agree with to be gone on with."""
        text = json.dumps(self.prompts.prompts).encode()
        return {
            "prompts": len(self.prompts),
            "prompts_digest": hashlib.sha256(text).hexdigest()[:16],
            "images": self.images,
            "seed": self.seed,
        }


def plan_benchmark(
    words: list[str],
    *,
    prompts: str | None,
    limit: int | None,
    images: int | None,
    rewards: tuple[str, ...] | None,
    distances: tuple[str, ...],
    lower: tuple[str, ...],
    steps: int | None,
    eta: float | None,
    like: str | None,
    seed: int,
    retry: bool,
    options: list[str],
) -> Benchmark:
    """From the words of a command line to what is measured; `rewards` None: those of the first run.

    Raises:
        UserError: if a source, a prompt set or what to measure is missing, or they do not fit together.
    """
    sources = read_sources(words, like, steps, eta)
    chosen = choose_prompts(sources, prompts, limit)
    config = next((source.config for source in sources if source.config is not None), None)
    own = {} if config is None else config.reward.sources()
    if rewards is None:
        rewards = tuple(own)
    if not rewards and not distances:
        raise UserError("nothing says what to measure; name --rewards or --distances, or a run among the sources")
    metrics = [*rewards, *distances, *(f"vendi_{name}" for name in distances)]
    wrong = next((name for name in lower if name not in metrics), None)
    if wrong is not None:
        raise UserError(f"--lower {wrong}: the table has no such column; it has {', '.join(metrics)}")
    count = choose_images(sources, chosen, images)
    own |= read_options(options, [*rewards, *distances], own)
    return Benchmark(tuple(sources), chosen, count, rewards, distances, lower, seed, retry, own)


def read_options(words: list[str], names: list[str], own: Mapping[str, Scorer]) -> dict[str, Scorer]:
    """What scorers are and their options, from 'NAME.OPTION=VALUE' (values as YAML; 'use': what NAME is).

    They go over those a run has for the scorer.

    Raises:
        UserError: if a word has another form, or NAME is not measured.
    """
    found = {name: (use, dict(options)) for name, (use, options) in own.items()}
    for word in words:
        key, equals, text = word.partition("=")
        name = max((n for n in names if key.startswith(f"{n}.")), key=len, default=None)
        if name is None or not equals:
            raise UserError(f"--option '{word}' is not of the form NAME.OPTION=VALUE; measured are {', '.join(names)}")
        use, options = found.get(name, (name, {}))
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--option '{word}': the value is no valid YAML") from error
        option = key.removeprefix(f"{name}.")
        found[name] = (str(value), options) if option == "use" else (use, options | {option: value})
    return found


def choose_prompts(sources: list[Source], name: str | None, limit: int | None) -> PromptSet:
    """The prompts asked for; else the first run's held-out ones, else those a folder of pictures names.

    Raises:
        UserError: if nothing names any.
    """
    drawn = next((source.config for source in sources if source.config is not None), None)
    if name is not None:
        found = load_prompts(name)
    elif drawn is not None:
        found = load_prompts(drawn.prompts.test)
    else:
        found = prompts_named_in(list(sources[0].pictures), Path(sources[0].path))
    return found.take(list(range(min(limit or len(found), len(found)))))


def choose_images(sources: list[Source], prompts: PromptSet, asked: int | None) -> int:
    """Pictures a prompt: those asked for; else as many as every folder has of every prompt, else a run's setting.

    Raises:
        UserError: if a folder has fewer of some prompt, or more are asked for than seeds are kept for.
    """
    if asked is not None and asked >= MOST_IMAGES:
        raise UserError(f"--images {asked}: at most {MOST_IMAGES - 1} pictures a prompt are drawn")
    counts = []
    for source in (s for s in sources if s.kind == "pictures"):
        files = match_pictures(list(source.pictures), prompts, Path(source.path))
        fewest = min(range(len(files)), key=lambda p: len(files[p]))
        counts.append(len(files[fewest]))
        if asked is not None and counts[-1] < asked:
            raise UserError(
                f"'{source.path}' has {counts[-1]} picture(s) of prompt {fewest}, '{prompts.prompts[fewest]}', and "
                f"--images {asked} needs {asked}"
            )
    drawn = [source.config.evaluation.final_images for source in sources if source.config is not None]
    return asked if asked is not None else min(counts, default=0) or drawn[0]
