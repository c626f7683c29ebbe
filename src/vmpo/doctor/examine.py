"""The whole examination."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmpo.doctor.findings import Finding, Section


def examine(recipe: str | None = None) -> Iterator[Section]:
    """All sections but what fits, one by one; with a recipe, only the rewards, models and prompts it needs.

    What cannot be examined, for example because transformers cannot be imported, is a problem and not the end.

    Raises:
        UserError: if there is no such recipe, or its settings are wrong.
    """
    from vmpo.training.recipes import load_config, recipe_names

    configs = [load_config(name, []) for name in ([recipe] if recipe else recipe_names())]
    sources = configs[0].reward.sources() if recipe else None
    sets = [configs[0].prompts.train, configs[0].prompts.test] if recipe else None

    def of_rewards() -> list[Finding]:
        from vmpo.doctor.rewards import rewards

        return rewards(sources)

    def of_models() -> list[Finding]:
        from vmpo.doctor.models import models

        return models(config.model.path for config in configs)

    def of_prompts() -> list[Finding]:
        from vmpo.doctor.prompt_sets import prompt_sets

        return prompt_sets(sets)

    yield _section("versions", _versions)
    yield _section("devices", _devices)
    yield _section("rewards", of_rewards)
    yield _section("models", of_models)
    yield _section("prompt sets", of_prompts)
    if recipe is None:
        yield _section("optional packages", _optional)
    yield _section("disk", _disk)


def _versions() -> list[Finding]:
    from vmpo.doctor.packages import required_packages

    return required_packages()


def _devices() -> list[Finding]:
    from vmpo.doctor.devices import devices

    return devices()


def _optional() -> list[Finding]:
    from vmpo.doctor.packages import optional_packages

    return optional_packages()


def _disk() -> list[Finding]:
    from vmpo.doctor.disk import disk

    return disk()


def _section(title: str, look: Callable[[], list[Finding]]) -> Section:
    try:
        return Section(title, look())
    except Exception as error:  # a doctor does not fall ill
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Section(title, [Finding(title, "problem", f"could not be examined: {reason}")])
