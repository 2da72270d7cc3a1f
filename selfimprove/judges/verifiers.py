"""Checkers that say right or wrong without a model."""

from collections.abc import Callable, Sequence
from typing import Literal

from selfimprove.demo import world
from selfimprove.judges.protocol import Candidate, Opinion, Panel


def _demo_world(candidate: Candidate) -> Opinion:
    right = world.check(candidate.prompt, candidate.text)
    return Opinion(None, "prompt outside the grammar") if right is None else Opinion(float(right))


def _exact(candidate: Candidate) -> Opinion:
    if candidate.answer is None:
        return Opinion(None, "no reference answer")
    return Opinion(float(_squeezed(candidate.text) == _squeezed(candidate.answer)))


CHECKERS: dict[str, Callable[[Candidate], Opinion]] = {"demo_world": _demo_world, "exact": _exact}


def verifier(
    candidates: Sequence[Candidate], panel: Panel | None = None, *, checker: Literal["demo_world", "exact"]
) -> list[Opinion]:
    """Right (1) or wrong (0) by a named checker: `demo_world` parses the prompt, `exact` compares with a reference."""
    return [CHECKERS[checker](candidate) for candidate in candidates]


def _squeezed(text: str) -> str:
    return " ".join(text.split())
