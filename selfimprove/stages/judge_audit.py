"""The audit of a round's judge, a part of the stage label: what its verdicts show, and what asking again shows."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from selfimprove import judges, recipe
from selfimprove.judges import Candidate, Opinion, Preference, audit, audit_scores
from selfimprove.judges.audit_scores import Scored
from selfimprove.judges.pairing import Key
from selfimprove.records import Anchor
from selfimprove.stages.io import StageIO
from selfimprove.store import read_rows


class RoundAudit:
    """What is kept of a round's answers for its audit: columns of all, and the answers that are judged again.

    Args:
        io: of the stage.
        section: the recipe's [label], with a judge.
        prompts: that are judged.
        candidates: of these prompts.
    """

    def __init__(self, io: StageIO, section: recipe.Label, prompts: int, candidates: int) -> None:
        assert section.judge is not None
        self._io, self._section, self._judge = io, section, section.judge
        self._scores = audit_scores.Scores()
        self._pairs: list[audit.Row] = []
        self._kinds: dict[object, audit.Row] = {}
        self._anchors: set[int] = set()  # numbers of candidates
        self._sample: set[int] = set()  # numbers of prompts
        if section.audit and "anchors" not in io.inputs:
            rng = random.Random(io.row_seed("anchors"))
            self._anchors = set(rng.sample(range(candidates), min(section.audit.anchors, candidates)))
        if section.audit and section.audit.second:
            rng = random.Random(io.row_seed("second judge"))
            self._sample = set(rng.sample(range(prompts), min(section.audit.sample, prompts)))
        self._candidate = self._prompt = -1  # numbers of the last
        self._prompt_id: str | None = None
        self._taken: list[Candidate] = []  # as anchors
        self._sampled: list[tuple[Candidate, Opinion]] = []

    def see(
        self,
        candidates: Sequence[Candidate],
        opinions: Sequence[Opinion],
        preferences: Mapping[tuple[Key, Key], Preference],
    ) -> None:
        """Take what the judge has found of some prompts."""
        if preferences:
            lengths = {candidate.key: len(candidate.text) for candidate in candidates}
            for (a, b), p in preferences.items():
                row = audit.Row(None, p.forward, p.swapped, (lengths[a], lengths[b]))
                self._pairs.append(self._kinds.setdefault(audit.kind(row), row))
        self._scores.extend(_scored(candidates, opinions))
        if not self._anchors and not self._sample:
            return
        for candidate, opinion in zip(candidates, opinions, strict=True):
            self._candidate += 1
            if candidate.prompt_id != self._prompt_id:
                self._prompt, self._prompt_id = self._prompt + 1, candidate.prompt_id
            if self._candidate in self._anchors:
                self._taken.append(candidate)
            if self._prompt in self._sample:
                self._sampled.append((candidate, opinion))

    def write(self) -> None:
        """Write audit.json, and anchors-*.parquet where the recipe asks for anchors."""
        told: dict[str, Any] = {"judge": judges.identity(self._judge)}
        if judges.compares(self._judge):
            told["pairs"] = audit.plain(audit.audit(self._pairs))
        else:
            told["scores"] = audit.plain(self._scores.audit())
        if self._section.audit:
            told |= _anchors(self._io, self._judge, self._taken)
            if self._section.audit.second:
                told |= _second(self._io, self._section.audit.second, self._sampled)
        self._io.out.write_json("audit.json", told)
        if told.get("drift", {}).get("alarm"):
            self._io.out.metrics["judge alarm"] = (
                f"the same answers score {told['drift']['rise']:+.3g} since round 1 (p = {told['drift']['p']:.2g}):"
                " the judge has grown lenient"
            )


def _anchors(io: StageIO, choice: recipe.Choice, taken: Sequence[Candidate]) -> dict[str, Any]:
    """The first round's answers judged again, twice: how far the scores have moved, and how far they move by chance."""
    if "anchors" in io.inputs:
        anchors = read_rows(io.inputs["anchors"], "anchors", Anchor)
        taken = [
            Candidate(a.prompt_id, a.prompt, a.source, a.sample, a.text, a.token_ids, a.finish_reason, a.answer)
            for a in anchors
        ]
    first, again = (_asked_anew(io, choice, taken, name) for name in ("anchor", "anchor again"))
    before = [a.score for a in anchors] if "anchors" in io.inputs else [opinion.score for opinion in first]
    if "anchors" not in io.inputs:
        io.out.write_rows(
            "anchors",
            Anchor,
            (
                Anchor(
                    c.prompt_id, c.prompt, c.source, c.sample, c.text, c.token_ids, c.finish_reason, c.answer, o.score
                )
                for c, o in zip(taken, first, strict=True)
            ),
        )
    return {
        "again": audit.plain(audit_scores.compare(_scored(taken, first), _scored(taken, again))),
        "drift": audit.plain(audit_scores.drift(before, [opinion.score for opinion in first])),
    }


def _asked_anew(io: StageIO, choice: recipe.Choice, taken: Sequence[Candidate], name: str) -> list[Opinion]:
    """Opinions on the answers under other names, and so with other seeds and marks."""
    renamed = [replace(c, prompt_id=f"{name}/{c.prompt_id}") for c in taken]
    return judges.bind(choice)(renamed, io.judging)


def _second(io: StageIO, choice: recipe.Choice, both: Sequence[tuple[Candidate, Opinion]]) -> dict[str, Any]:
    taken = [candidate for candidate, _ in both]
    other = judges.bind(choice)(taken, io.judging)
    compared = audit_scores.compare(_scored(taken, [opinion for _, opinion in both]), _scored(taken, other))
    return {"second": {"judge": judges.identity(choice), **audit.plain(compared)}}


def _scored(candidates: Sequence[Candidate], opinions: Sequence[Opinion]) -> list[Scored]:
    return [Scored(c.prompt_id, len(c.text), o.score, o.reason) for c, o in zip(candidates, opinions, strict=True)]
