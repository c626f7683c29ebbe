"""Packages: their versions against what vmpo requires, and those it can do without."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vmpo.doctor.findings import Finding

SHOWN = ("torch", "diffusers", "transformers", "peft", "accelerate")  # others only if something is wrong with them
OPTIONAL = {
    "tensorboard": "trackers: [tensorboard]",
    "wandb": "trackers: [wandb]",
    "trackio": "trackers: [trackio]",
    "torchao": "model.quantise=int8",
    "bitsandbytes": "model.quantise=nf4",
    "paddleocr": "ocr_scene with engine=paddleocr",
}


def required_packages() -> list[Finding]:
    """Python and the packages vmpo requires, as its installed metadata has them, and torchvision if it is there."""
    try:
        own = metadata("vmpo")
    except PackageNotFoundError:
        return [Finding("vmpo", "problem", "not installed, so its requirements are unknown", ("pip install vmpo",))]
    found = [_python(own["Requires-Python"] or "")]
    required = [r for text in own.get_all("Requires-Dist") or [] if not (r := Requirement(text)).marker]
    packages = {requirement.name: _package(requirement) for requirement in required}
    found += [packages.pop(name) for name in SHOWN if name in packages]
    wrong = [finding for finding in packages.values() if finding.state != "ok"]
    found += wrong or [Finding("others", "ok", f"all {len(packages)} others that vmpo requires")]
    return [*found, *_torchvision()]


def _python(required: str) -> Finding:
    here = platform.python_version()
    if SpecifierSet(required).contains(here, prereleases=True):
        return Finding("python", "ok", f"{here} ({required})")
    return Finding("python", "problem", f"{here}, but {required} is required", (f"use Python {required}",))


def _package(requirement: Requirement) -> Finding:
    command = (f"pip install '{requirement.name}{requirement.specifier}'",)
    try:
        here = version(requirement.name)
    except PackageNotFoundError:
        return Finding(requirement.name, "problem", f"not installed, but {requirement.specifier} is required", command)
    if requirement.specifier.contains(here, prereleases=True):
        return Finding(requirement.name, "ok", f"{here} ({requirement.specifier})")
    return Finding(requirement.name, "problem", f"{here}, but {requirement.specifier} is required", command)


def _torchvision() -> Iterator[Finding]:
    # vmpo does not need it, but transformers and diffusers import whatever torchvision they find
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another torch fails in many ways
        reason = " ".join(str(error).split())[:100]
        yield Finding(
            "torchvision",
            "problem",
            f"installed but fails to import, and then so do transformers and diffusers: {reason}",
            ("pip uninstall torchvision   # vmpo does not need it; or install the build of your torch",),
        )
    else:
        yield Finding("torchvision", "ok", f"{_version('torchvision')} (not needed)")


def optional_packages() -> list[Finding]:
    """Trackers and whatever single settings need."""
    found = []
    for name, use in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            found.append(Finding(name, "missing", f"for {use}"))
        else:
            found.append(Finding(name, "ok", f"{_version(name)}, for {use}"))
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"
