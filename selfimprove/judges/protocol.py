"""What a judge is: completions in, opinions out, in the same order; what is unknown is None with a reason."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from selfimprove.records import Generation

SERVER = "server:"  # how the name of a model that a server of the recipe serves begins


class Candidate(msgspec.Struct, frozen=True):
    """A completion to be judged; all candidates of a prompt reach the judge together."""

    prompt_id: str
    prompt: str
    source: str  # "current", "initial", "improver", "gold" or "given"
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: str
    answer: str | None = None  # a reference answer, where the data has one

    @property
    def key(self) -> tuple[str, str, int]:
        """Identifies it within a stage."""
        return self.prompt_id, self.source, self.sample

    @property
    def name(self) -> str:
        """The same, as text."""
        return f"{self.prompt_id}/{self.source}/{self.sample}"


class Opinion(NamedTuple):
    """A score, higher is better, or None and why; and the judge's own words, where it has any."""

    score: float | None
    reason: str = ""
    reply: str = ""


class Preference(NamedTuple):
    """What a judge makes of two answers shown in both orders: P(first is better), between 0 and 1.

    None and a reason where a reply could not be read. `replies` are the judge's words, forward and swapped.
    """

    forward: float | None
    swapped: float | None  # shown the other way round, and turned back
    reason: str = ""
    replies: tuple[str, str] = ("", "")

    @property
    def mean(self) -> float | None:
        """Over both orders; None where one is unknown, since half of it would be position."""
        return None if self.forward is None or self.swapped is None else (self.forward + self.swapped) / 2

    @property
    def consistent(self) -> bool:
        """Whether both orders prefer the same answer."""
        return self.forward is not None and self.swapped is not None and (self.forward - 0.5) * (self.swapped - 0.5) > 0


Judge = Callable[[Sequence[Candidate], "Panel"], list[Opinion]]
Comparer = Callable[[Sequence[tuple[Candidate, Candidate]], "Panel"], list[Preference]]


class Question(NamedTuple):
    """What a judge asks a model, and under which name; names give the seeds."""

    name: str
    text: str


class Replies(NamedTuple):
    """A model's `n` replies to a question; none, and why, where it could not be asked."""

    texts: tuple[str, ...]
    reason: str = ""


class Panel(Protocol):
    """What a judge may ask of models.

    A model is named "current", "initial" (policies of the run), "server:NAME" (a server of the recipe), or by a
    directory or hub id.
    """

    @property
    def opinions(self) -> Mapping[tuple[str, str, int], Opinion]:
        """What an earlier stage found, by (prompt_id, source, sample)."""

    def nonce(self, name: str) -> str:
        """A word that whoever wrote the judged text cannot know: the same for the same run and name."""

    def ask(
        self,
        model: str,
        questions: Sequence[Question],
        n: int,
        temperature: float,
        max_tokens: int,
        schema: Mapping[str, Any] | None = None,
    ) -> list[Replies]:
        """`n` replies to each question, in order; `schema` (JSON) shapes them where the model's server can."""

    def choose(self, model: str, questions: Sequence[Question], options: Sequence[str]) -> list[list[float] | None]:
        """The probability of each option as the beginning of the reply, among the options; None where unknown."""

    def logps(self, model: str, rows: Sequence[tuple[str, Sequence[int]]]) -> list[list[float] | None]:
        """Log-probability (nats) of each of the ids that answer each prompt; None where the context is too small."""

    def rewards(self, model: str, rows: Sequence[tuple[str, str]]) -> list[float | None]:
        """The reward of each (prompt, answer) by a sequence-classification model; None where it does not fit."""

    def compare(self, model: str, rows: Sequence[tuple[str, str, str]]) -> list[float | None]:
        """The logit that the first of two answers to a prompt is better, by a two-answer encoder."""


def squeezed(text: str) -> str:
    """A text up to white space."""
    return " ".join(text.split())


def candidate(row: Generation, answer: str | None = None) -> Candidate:
    """A completion as judges see it."""
    return Candidate(
        row.prompt_id, row.prompt, row.source, row.sample, row.text, row.token_ids, row.finish_reason, answer
    )
