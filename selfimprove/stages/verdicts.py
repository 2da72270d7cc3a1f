"""What the judge of a round finds, written down; a part of the stage label."""

from collections import Counter
from typing import Any

from selfimprove import columns, judges, recipe
from selfimprove.records import Comparison, Verdict
from selfimprove.stages.answers import Window
from selfimprove.stages.io import StageIO
from selfimprove.stages.judging import Findings, Judging

SHOWN = 120  # characters of a reason


class Labels:
    """The judge at work: what it finds is written as verdicts, and as comparisons where it compares.

    Args:
        io: of the stage label.
        section: the recipe's [label].
        candidates: that will be judged, in all.
    """

    def __init__(self, io: StageIO, section: recipe.Label, candidates: int) -> None:
        self._io, self._identity = io, judges.identity(section.judge)
        self._judging = Judging(io, section.judge, lambda: candidates)
        self._verdicts = io.out.writer("verdicts", Verdict)
        self._comparisons: columns.Writer[Comparison] | None = None
        self.number = self.known = self.prompts = 0
        self.total = 0.0  # of the known scores
        self.unknown: Counter[str] = Counter()  # reasons of the others
        if section.judge and judges.compares(section.judge):
            self._comparisons = io.out.writer("comparisons", Comparison)
        elif section.judge:
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
        found = self._judging.find(candidates)
        if earlier := self._judging.earlier:
            again = sum(c.source == "gold" and c.prompt_id in earlier for c in candidates)
            self._io.out.metrics["golds scored before"] += again
        if self._comparisons:
            self._comparisons.extend(
                Comparison(*a, *b[1:], self._identity, p.forward, p.swapped, p.reason, *p.replies)
                for (a, b), p in found.preferences.items()
            )
        self._verdicts.extend(
            Verdict(c.prompt_id, c.source, c.sample, self._identity, o.score, o.reason, o.reply)
            for c, o in zip(candidates, found.opinions, strict=True)
        )
        self.prompts += len(window.prompt_ids)
        self.number += len(found.opinions)
        for opinion in found.opinions:
            if opinion.score is not None:
                self.known += 1
                self.total += opinion.score
            elif opinion.reason:
                self.unknown[opinion.reason[:SHOWN]] += 1
        return found
