"""Asking the judge of a round, a window of answers at a time: a part of the stage label.

What a judge that takes long has found of a window is kept until the stage is published, by the hash of what it was
asked, so that it is asked once, whoever asks first: the stage, `ahead` of it, or a process that was killed since.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from selfimprove import judges, recipe
from selfimprove.execution import shard
from selfimprove.judges import Candidate, Opinion, Preference
from selfimprove.judges.pairing import Key, shares_won
from selfimprove.records import Verdict
from selfimprove.stages.io import StageIO
from selfimprove.store import iter_rows


class Findings(NamedTuple):
    """What a judge made of some candidates, in their order; and of two at a time, where it compares."""

    opinions: list[Opinion]
    preferences: Mapping[tuple[Key, Key], Preference]


class Judging:
    """The judge of a round.

    Args:
        io: of the stage label.
        choice: the judge; None = none is asked.
        total: candidates of all windows, as far as is known by now; for progress.
    """

    def __init__(self, io: StageIO, choice: recipe.Choice | None, total: Callable[[], int]) -> None:
        self._io, self._choice, self._total = io, choice, total
        self._before = self._window = 0  # candidates of earlier windows, and of the one under way
        if choice:
            io.judging.progress = self._progress
        self._folder = io.scratch / "judged" if choice and judges.works_elsewhere(choice) else None
        self.earlier = self._scored_before(choice) if choice and not judges.compares(choice) else {}

    def find(self, candidates: Sequence[Candidate]) -> Findings:
        """What the judge finds of candidates, those of a prompt side by side; asked for where it is not known."""
        self._window = len(candidates)
        try:
            return self._found(candidates)
        finally:
            self._before, self._window = self._before + self._window, 0

    def _found(self, candidates: Sequence[Candidate]) -> Findings:
        if self._folder is None:
            return self._asked(candidates)
        name = hashlib.sha256(msgspec.msgpack.encode(candidates)).hexdigest()[:32]
        path = self._folder / f"{name}.done"
        with contextlib.suppress(msgspec.DecodeError):  # of another version
            if (known := shard.read(path)) is not None:
                opinions, preferences = msgspec.msgpack.decode(known, type=_KEPT)
                return Findings(opinions, dict(preferences))
        found = self._asked(candidates)
        shard.write(path, msgspec.msgpack.encode([found.opinions, list(found.preferences.items())]))
        return found

    def _progress(self, what: str, done: int, total: int) -> None:
        """What is done of a window, as a part of all."""
        if self._window:
            done = self._before + self._window * done // max(1, total)
            total = max(self._total(), self._before + self._window)
        self._io.progress(what, done, total)

    def _asked(self, candidates: Sequence[Candidate]) -> Findings:
        if self._choice is None:
            return Findings([Opinion(None, "no judge asked")] * len(candidates), {})
        if judges.compares(self._choice):
            preferences = self._preferences(self._choice, candidates)
            won = shares_won(preferences)
            unknown = Opinion(None, "no readable comparison")
            return Findings([won.get(candidate.key, unknown) for candidate in candidates], preferences)
        return Findings(self._opinions(self._choice, candidates), {})

    def _scored_before(self, choice: recipe.Choice) -> dict[str, Opinion]:
        """The scores of golds that a judge which stays has given; a policy that judges itself is another each round."""
        if not judges.fixed(choice) or "earlier" not in self._io.inputs:
            return {}
        identity = judges.identity(choice)
        return {
            v.prompt_id: Opinion(v.score, v.reason, v.reply)
            for v in iter_rows(self._io.inputs["earlier"], "verdicts", Verdict)
            if v.source == "gold" and v.judge == identity and v.score is not None
        }

    def _opinions(self, choice: recipe.Choice, candidates: Sequence[Candidate]) -> list[Opinion]:
        """A score of each candidate; of a gold that was scored before, that score."""
        earlier = self.earlier
        if not earlier:
            return judges.bind(choice)(candidates, self._io.judging)
        before = [c.source == "gold" and c.prompt_id in earlier for c in candidates]
        new = [c for c, known in zip(candidates, before, strict=True) if not known]
        asked = iter(judges.bind(choice)(new, self._io.judging))
        return [earlier[c.prompt_id] if known else next(asked) for c, known in zip(candidates, before, strict=True)]

    def _preferences(self, choice: recipe.Choice, candidates: Sequence[Candidate]) -> dict[tuple[Key, Key], Preference]:
        """Every two answers of a prompt that differ, compared."""
        pairs = [
            (a, b)
            for _, group in itertools.groupby(candidates, key=lambda c: c.prompt_id)
            for a, b in itertools.combinations(list(group), 2)
            if a.text != b.text
        ]
        found = judges.bind_comparer(choice)(pairs, self._io.judging)
        return {(a.key, b.key): preference for (a, b), preference in zip(pairs, found, strict=True)}


_KEPT = tuple[list[Opinion], list[tuple[tuple[Key, Key], Preference]]]
