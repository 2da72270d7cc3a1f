"""The judge of a round at work, a part of the stage label: a window of answers in, verdicts and comparisons out."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from selfimprove import columns, judges, recipe
from selfimprove.judges import Candidate, Opinion, Preference
from selfimprove.judges.pairing import Key, shares_won
from selfimprove.records import Comparison, Verdict
from selfimprove.stages.answers import Window
from selfimprove.stages.io import StageIO
from selfimprove.store import iter_rows


class Findings(NamedTuple):
    """What a judge made of some candidates, in their order; and of two at a time, where it compares."""

    opinions: list[Opinion]
    preferences: Mapping[tuple[Key, Key], Preference]


class Labels:
    """The judge at work: what it finds is written as verdicts, and as comparisons where it compares."""

    def __init__(self, io: StageIO, section: recipe.Label) -> None:
        self._io, self._choice, self._identity = io, section.judge, judges.identity(section.judge)
        self._verdicts = io.out.writer("verdicts", Verdict)
        self._comparisons: columns.Writer[Comparison] | None = None
        self._earlier: dict[str, Opinion] = {}
        self.number = self.known = self.prompts = 0
        self.total = 0.0  # of the known scores
        if section.judge and judges.compares(section.judge):
            self._comparisons = io.out.writer("comparisons", Comparison)
        elif section.judge:
            self._earlier = self._scored_before(section.judge)
            io.out.metrics["golds scored before"] = 0

    def __enter__(self) -> "Labels":
        return self

    def __exit__(self, *exception: Any) -> None:
        for writer in (self._verdicts, self._comparisons):
            if writer:
                writer.__exit__(*exception)

    def judge(self, window: Window) -> Findings:
        """What the judge finds of some prompts' answers."""
        candidates = window.candidates
        preferences: dict[tuple[Key, Key], Preference] = {}
        if self._choice is None:
            opinions = [Opinion(None, "no judge asked")] * len(candidates)
        elif self._comparisons:
            preferences = self._preferences(self._choice, candidates)
            won = shares_won(preferences)
            opinions = [won.get(candidate.key, Opinion(None, "no readable comparison")) for candidate in candidates]
        else:
            opinions = self._opinions(self._choice, candidates)
        self._verdicts.extend(
            Verdict(c.prompt_id, c.source, c.sample, self._identity, o.score, o.reason, o.reply)
            for c, o in zip(candidates, opinions, strict=True)
        )
        self.prompts += len(window.prompt_ids)
        self.number += len(opinions)
        for opinion in opinions:
            if opinion.score is not None:
                self.known += 1
                self.total += opinion.score
        return Findings(opinions, preferences)

    def _scored_before(self, choice: recipe.Choice) -> dict[str, Opinion]:
        """The scores of golds that a judge which stays has given; a policy that judges itself is another each round."""
        if not judges.fixed(choice) or "earlier" not in self._io.inputs:
            return {}
        return {
            v.prompt_id: Opinion(v.score, v.reason, v.reply)
            for v in iter_rows(self._io.inputs["earlier"], "verdicts", Verdict)
            if v.source == "gold" and v.judge == self._identity and v.score is not None
        }

    def _opinions(self, choice: recipe.Choice, candidates: Sequence[Candidate]) -> list[Opinion]:
        """A score of each candidate; of a gold that was scored before, that score."""
        earlier = self._earlier
        if not earlier:
            return judges.bind(choice)(candidates, self._io.judging)
        before = [c.source == "gold" and c.prompt_id in earlier for c in candidates]
        new = [c for c, known in zip(candidates, before, strict=True) if not known]
        asked = iter(judges.bind(choice)(new, self._io.judging))
        self._io.out.metrics["golds scored before"] += len(candidates) - len(new)
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
        assert self._comparisons
        self._comparisons.extend(
            Comparison(
                a.prompt_id, a.source, a.sample, b.source, b.sample, self._identity,
                p.forward, p.swapped, p.reason, *p.replies,
            )
            for (a, b), p in zip(pairs, found, strict=True)
        )  # fmt: skip
        return {(a.key, b.key): preference for (a, b), preference in zip(pairs, found, strict=True)}
