"""Judges: completions in, opinions out, in the same order; an unknown score is None with a reason, never zero."""

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import Field

from selfimprove import chat
from selfimprove.demo import world
from selfimprove.recipe import Choice
from selfimprove.records import Generation


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


class Panel(Protocol):
    """What a judge may ask of the models of the run."""

    @property
    def opinions(self) -> Mapping[tuple[str, str, int], Opinion]:
        """What an earlier stage found, by (prompt_id, source, sample)."""

    def answers(
        self, model: str, requests: Sequence[tuple[str, str]], n: int, temperature: float, max_tokens: int
    ) -> list[list[str]]:
        """`n` answers to each (id, text) by the model of that name; none to a text too long for the context."""

    def logps(self, model: str, rows: Sequence[tuple[str, Sequence[int]]]) -> list[float | None]:
        """Summed log-probability (nats) of the ids that answer each prompt; None where the context is too small."""


def candidate(row: Generation, answer: str | None = None) -> Candidate:
    """A completion as judges see it."""
    return Candidate(
        row.prompt_id, row.prompt, row.source, row.sample, row.text, row.token_ids, row.finish_reason, answer
    )


Judge = Callable[[Sequence[Candidate], Panel], list[Opinion]]


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


def self_consistency(
    candidates: Sequence[Candidate], panel: Panel | None = None, *, voters: Literal["current", "improver"] = "current"
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


def rubric(
    candidates: Sequence[Candidate],
    panel: Panel,
    *,
    template: Literal["rate", "rate_additive"] = "rate",
    n: Annotated[int, Field(ge=1)] = 3,
    temperature: Annotated[float, Field(ge=0)] = 1.0,
    max_tokens: Annotated[int, Field(ge=1)] = 16,
) -> list[Opinion]:
    """The policy as its own judge, 0 to 5, the mean of `n` replies (self-rewarding, arXiv 2401.10020, section 2.2).

    The same answer to a prompt is rated once: two ratings of it would make a preference out of nothing.
    """
    names: dict[str, str] = {}  # of each request, the first candidate's
    requests = [chat.render(template, {"question": c.prompt, "answer": c.text}) for c in candidates]
    for candidate, request in zip(candidates, requests, strict=True):
        names.setdefault(request, f"{candidate.prompt_id}/{candidate.source}/{candidate.sample}")
    asked = [(name, request) for request, name in names.items()]
    answers = zip(names, panel.answers("current", asked, n, temperature, max_tokens), strict=True)
    opinions = {request: _mean_rating(replies, n) for request, replies in answers}
    return [opinions[request] for request in requests]


def _mean_rating(replies: Sequence[str], n: int) -> Opinion:
    scores = [score for reply in replies if (score := rating(reply)) is not None]
    if scores:
        return Opinion(sum(scores) / len(scores), f"{len(scores)} of {n} replies readable")
    return Opinion(None, "no reply readable" if replies else "too long for the judge's context")


def rating(reply: str) -> float | None:
    """The last `Score: N` of a reply, 0 to 5."""
    found = re.findall(r"\bscore\b[\s:*]*([0-5])(?!\d|\.\d)", reply, re.IGNORECASE)
    return float(found[-1]) if found else None


def discriminator(candidates: Sequence[Candidate], panel: Panel) -> list[Opinion]:
    """What the stage `discriminate` found (D2PO, arXiv 2405.01511)."""
    unknown = Opinion(None, "the discriminator did not see it")
    return [panel.opinions.get((c.prompt_id, c.source, c.sample), unknown) for c in candidates]


def demo_rubric(
    candidates: Sequence[Candidate],
    panel: Panel | None = None,
    *,
    noise: Annotated[float, Field(ge=0)] = 20.0,
    gap: Annotated[float, Field(ge=0)] = 40.0,
) -> list[Opinion]:
    """A judge of the embedded world that errs: 0 to 100 in steps of 5, right answers `gap` higher, `noise` = sd.

    The noise belongs to the answer's text: asked twice, the judge says the same, as a model does at temperature 0.
    """
    opinions = []
    for candidate in candidates:
        right = _demo_world(candidate)
        if right.score is None:
            opinions.append(right)
            continue
        error = random.Random(f"{candidate.prompt}\n{_squeezed(candidate.text)}").gauss(0, noise)
        score = 50 + gap * (right.score - 0.5) + error
        opinions.append(Opinion(float(min(100, max(0, 5 * round(score / 5))))))
    return opinions


class Spec(NamedTuple):
    """A judge, whether it asks models of the run, and whether its score is of prompt and answer alone."""

    function: Callable[..., list[Opinion]]
    asks_models: bool = False
    fixed: bool = False  # the same in every round, so that a gold is scored once


JUDGES: Mapping[str, Spec] = {
    "verifier": Spec(verifier, fixed=True),
    "self_consistency": Spec(self_consistency),
    "rubric": Spec(rubric, asks_models=True),
    "discriminator": Spec(discriminator),
    "demo_rubric": Spec(demo_rubric, fixed=True),
}


def bind(choice: Choice) -> Judge:
    """The judge that a recipe names, its parameters bound.

    Raises:
        UserError: unknown name or parameter.
    """
    return choice.bind("judge", {name: spec.function for name, spec in JUDGES.items()})


def identity(choice: Choice | None) -> str:
    """A judge's name and parameters, as verdicts carry them."""
    if choice is None:
        return "none"
    given = ", ".join(f"{name}={value}" for name, value in sorted((choice.model_extra or {}).items()))
    return f"{choice.name}({given})" if given else choice.name


def _squeezed(text: str) -> str:
    return " ".join(text.split())
