"""A line of a comparison: an objective by name, with parts exchanged, and where intermediate rewards come from."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import yaml

from vmpo.errors import UserError
from vmpo.objectives import FAMILIES, Objective, get_objective

Intermediate = Literal["predicted", "exact", "none"]


@dataclass(frozen=True)
class Variant:
    """An objective as it is compared.

    Attributes:
        spec: as typed, `name[,part=value…]`; its name in tables and files.
        objective: the composition.
        intermediate: rewards of states: 'predicted' r(x̂_0) or E_ref[r(x_0)|x_t] (Eq. 44), the 'exact' soft value, or
            'none'.
    """

    spec: str
    objective: Objective
    intermediate: Intermediate = "predicted"


def family_of(spec: str) -> str:
    """The family its objective belongs to, for figures."""
    name = spec.split(",")[0].strip()
    return next(family for family, members in FAMILIES.items() if any(o.name == name for o in members))


def parse_variant(spec: str) -> Variant:
    """Reads `vmpo_diff` or `vmpo_diff,intermediate=exact,centre=group`.

    Raises:
        UserError: for an objective, part or value that does not exist, or parts that make no sound method.
    """
    name, *changes = [part.strip() for part in spec.split(",")]
    objective = get_objective(name)
    known = [f.name for f in fields(Objective) if f.name not in ("name", "source")]
    own: dict[str, Any] = {}
    for change in changes:
        part, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"'{change}' in '{spec}' is not of the form part=value")
        if part not in [*known, "intermediate"]:
            near = difflib.get_close_matches(part, [*known, "intermediate"], n=1, cutoff=0.0)[0]
            raise UserError(f"an objective has no part '{part}'; did you mean '{near}'?")
        own[part] = yaml.safe_load(text)
    intermediate = own.pop("intermediate", "predicted")
    if intermediate not in get_args(Intermediate):
        raise UserError(f"intermediate='{intermediate}' is not one of {', '.join(get_args(Intermediate))}")
    return Variant(spec, replace(objective, **own), intermediate)
