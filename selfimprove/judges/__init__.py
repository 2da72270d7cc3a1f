"""Judges: completions in, opinions out, in the same order; an unknown score is None with a reason, never zero."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from selfimprove.demo import world


@dataclass(frozen=True, slots=True)
class Candidate:
    """A completion to be judged; all candidates of a prompt reach the judge together."""

    prompt_id: str
    prompt: str
    source: str  # "current", "initial", "improver" or "gold"
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: str
    answer: str | None = None  # a reference answer, where the data has one


class Opinion(NamedTuple):
    """A score, higher is better, or None and why."""

    score: float | None
    reason: str = ""


Judge = Callable[[Sequence[Candidate]], list[Opinion]]


def _demo_world(candidate: Candidate) -> Opinion:
    right = world.check(candidate.prompt, candidate.text)
    return Opinion(None, "prompt outside the grammar") if right is None else Opinion(float(right))


def _exact(candidate: Candidate) -> Opinion:
    if candidate.answer is None:
        return Opinion(None, "no reference answer")
    return Opinion(float(_squeezed(candidate.text) == _squeezed(candidate.answer)))


CHECKERS: dict[str, Callable[[Candidate], Opinion]] = {"demo_world": _demo_world, "exact": _exact}


def verifier(candidates: Sequence[Candidate], *, checker: Literal["demo_world", "exact"]) -> list[Opinion]:
    """Right (1) or wrong (0) by a named checker: `demo_world` parses the prompt, `exact` compares with a reference."""
    return [CHECKERS[checker](candidate) for candidate in candidates]


def self_consistency(
    candidates: Sequence[Candidate], *, voters: Literal["current", "improver"] = "current"
) -> list[Opinion]:
    """Share of the voters' samples of the prompt that give the same answer (Wang et al., arXiv 2203.11171)."""
    votes: dict[str, Counter[str]] = {}
    for candidate in candidates:
        if candidate.source == voters:
            votes.setdefault(candidate.prompt_id, Counter())[_squeezed(candidate.text)] += 1
    opinions = []
    for candidate in candidates:
        ballots = votes.get(candidate.prompt_id)
        if not ballots:
            opinions.append(Opinion(None, f"no sample of {voters} votes on this prompt"))
        else:
            opinions.append(Opinion(ballots[_squeezed(candidate.text)] / ballots.total()))
    return opinions


JUDGES: dict[str, Callable[..., list[Opinion]]] = {"verifier": verifier, "self_consistency": self_consistency}


def _squeezed(text: str) -> str:
    return " ".join(text.split())
