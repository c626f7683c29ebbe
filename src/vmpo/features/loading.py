"""Feature extractors by name: the built-in ones, and anybody's function or class as 'module:name'."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.extensions import construct, import_extension, unknown_name
from vmpo.features.clip_embedding import CLIPEmbedding
from vmpo.features.dreamsim import DreamSim
from vmpo.features.extractor import DISTANCES, Distance, FeatureExtractor
from vmpo.features.lpips import LPIPS

BUILT_IN: dict[str, Callable[..., FeatureExtractor]] = {"dreamsim": DreamSim, "lpips": LPIPS, "clip": CLIPEmbedding}
_KIND = "distance"


def load_feature(name: str, kwargs: Mapping[str, Any] | None = None) -> FeatureExtractor:
    """The feature extractor of a name: a built-in one, or 'module:function', 'module:Class' or 'module:instance'.

    The current directory is searched first. `kwargs` go to the constructor of a class, or are fixed arguments of
    a function. Your own has the distance 'cosine' and the name of its function or class where it states none, and
    what it returns is checked.

    Raises:
        UserError: in one line, for an unknown name, a failed import, something that is not callable, or an option or
            a distance that does not exist.
    """
    options = dict(kwargs or {})
    if ":" not in name:
        if name not in BUILT_IN:
            raise unknown_name(_KIND, name, BUILT_IN)
        return cast(FeatureExtractor, construct(_KIND, name, cast(type, BUILT_IN[name]), options))
    found = import_extension(_KIND, name)
    if inspect.isclass(found):
        found, options = construct(_KIND, name, found, options), {}
    if not callable(found):
        raise UserError(f"{_KIND} '{name}' is a {type(found).__name__}; it must be a function or a class")
    return _Checked(name, found, options)


class _Checked:
    """Somebody's extractor, its facts filled in and its results checked."""

    def __init__(self, given: str, extract: Callable[..., Any], options: dict[str, Any]) -> None:
        self.name = str(getattr(extract, "name", given.partition(":")[2]))
        self.distance: Distance = getattr(extract, "distance", "cosine")
        if self.distance not in DISTANCES:
            raise UserError(f"{_KIND} '{given}' states '{self.distance}'; it must be one of {', '.join(DISTANCES)}")
        self._given, self._extract = given, functools.partial(extract, **options)

    def __call__(self, images: Tensor) -> Tensor:
        features = self._extract(images)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"{_KIND} '{self._given}' returned {shape}; it must be a tensor ({len(images)}, numbers)")
        return features.to(torch.float32)
