"""Constraints that a program can check, as IFEval has them (arXiv 2311.07911).

Verdicts are those of google-research's `instruction_following_eval`, with its three sources of chance taken out:
language detection is seeded, a parameter that is missing is an error instead of a random draw, and a "letter" that is
none ('#', '!') is counted as it stands.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from selfimprove.constraints.checks import CHECKS

__all__ = ["CHECKS", "Constraint", "ConstraintError", "loose", "parse", "read", "strict"]


class ConstraintError(ValueError):
    """A constraint that nobody can check: an unknown name, or parameters that do not fit."""


class Constraint(NamedTuple):
    """A named check with its parameters."""

    name: str
    parameters: Mapping[str, Any]

    def holds(self, text: str) -> bool:
        """Whether a text keeps it; an empty one keeps none."""
        return bool(text.strip()) and CHECKS[self.name](text, **self.parameters)


def read(names: Sequence[str], parameters: Sequence[Mapping[str, Any]]) -> list[Constraint]:
    """Constraints from IFEval's `instruction_id_list` and `kwargs`; a parameter that is None counts as absent.

    Raises:
        ConstraintError: an unknown name, a missing, unknown or ill-typed parameter, or lists of different lengths.
    """
    if len(names) != len(parameters):
        raise ConstraintError(f"{len(names)} instructions, but parameters for {len(parameters)}")
    found = []
    for name, given in zip(names, parameters, strict=True):
        if name not in CHECKS:
            raise ConstraintError(f"unknown instruction '{name}'")
        told = {key: value for key, value in given.items() if value is not None}
        for key, kind in _parameters(name).items():
            if key not in told:
                raise ConstraintError(f"{name}: '{key}' is missing")
            if not _fits(told[key], kind):
                raise ConstraintError(f"{name}: '{key}' is {json.dumps(told[key])}")
        if unknown := told.keys() - _parameters(name).keys():
            raise ConstraintError(f"{name}: unknown parameter '{min(unknown)}'")
        found.append(Constraint(name, told))
    return found


def parse(text: str) -> list[Constraint]:
    """Constraints from JSON with IFEval's keys, `instruction_id_list` and `kwargs`.

    Raises:
        ConstraintError: no such JSON, or see `read`.
    """
    try:
        table = json.loads(text)
        names, parameters = table["instruction_id_list"], table["kwargs"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConstraintError("no JSON with instruction_id_list and kwargs") from None
    lists = isinstance(names, list) and isinstance(parameters, list)
    if not lists or not all(isinstance(one, str) for one in names) or not all(isinstance(p, dict) for p in parameters):
        raise ConstraintError("instruction_id_list must hold texts, kwargs tables")
    if not names:
        raise ConstraintError("no constraint is given")
    return read(names, parameters)


def strict(text: str, constraints: Sequence[Constraint]) -> list[bool]:
    """Which constraints a text keeps as it stands."""
    return [constraint.holds(text) for constraint in constraints]


def loose(text: str, constraints: Sequence[Constraint]) -> list[bool]:
    """Which are kept by the text or by one of seven others: without first or last line or both, without asterisks."""
    lines = text.split("\n")
    shorter = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    variants = [text, *shorter]
    variants += [variant.replace("*", "") for variant in variants]
    return [any(constraint.holds(variant) for variant in dict.fromkeys(variants)) for constraint in constraints]


def _parameters(name: str) -> dict[str, Any]:
    of = inspect.signature(CHECKS[name]).parameters.values()
    return {p.name: p.annotation for p in of if p.kind is p.KEYWORD_ONLY}


def _fits(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    if kind is str:
        return isinstance(value, str) and bool(value)
    if kind == list[str]:
        return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
    return value in ("at least", "less than")
