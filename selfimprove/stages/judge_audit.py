"""The audit of a round's judge, a part of the stage label: what its verdicts show, and what asking again shows."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from selfimprove import judges, recipe
from selfimprove.judges import Candidate, Opinion, Preference, audit, audit_scores
from selfimprove.judges.audit_scores import Scored
from selfimprove.judges.pairing import Key
from selfimprove.records import Anchor
from selfimprove.stages.io import StageIO
from selfimprove.store import read_rows


def write_audit(
    io: StageIO,
    section: recipe.Label,
    candidates: Sequence[Candidate],
    opinions: Sequence[Opinion],
    preferences: Mapping[tuple[Key, Key], Preference],
) -> None:
    """Write audit.json, and anchors-*.parquet where the recipe asks for anchors."""
    if section.judge is None:
        return
    texts = {candidate.key: candidate.text for candidate in candidates}
    told: dict[str, Any] = {"judge": judges.identity(section.judge)}
    if judges.compares(section.judge):
        rows = [
            audit.Row(None, p.forward, p.swapped, (len(texts[a]), len(texts[b]))) for (a, b), p in preferences.items()
        ]
        told["pairs"] = audit.plain(audit.audit(rows))
    else:
        told["scores"] = audit.plain(audit_scores.audit(_scored(candidates, opinions)))
    if section.audit:
        told |= _anchors(io, section.judge, section.audit.anchors, candidates)
        if section.audit.second:
            told |= _second(io, section.audit, candidates, opinions)
    io.out.write_json("audit.json", told)
    if told.get("drift", {}).get("alarm"):
        io.out.metrics["judge alarm"] = (
            f"the same answers score {told['drift']['rise']:+.3g} since round 1 (p = {told['drift']['p']:.2g}):"
            " the judge has grown lenient"
        )


def _anchors(io: StageIO, choice: recipe.Choice, number: int, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The first round's answers judged again, twice: how far the scores have moved, and how far they move by chance."""
    if "anchors" in io.inputs:
        anchors = read_rows(io.inputs["anchors"], "anchors", Anchor)
        taken = [
            Candidate(a.prompt_id, a.prompt, a.source, a.sample, a.text, a.token_ids, a.finish_reason, a.answer)
            for a in anchors
        ]
    else:
        rng = random.Random(io.row_seed("anchors"))
        taken = [candidates[i] for i in sorted(rng.sample(range(len(candidates)), min(number, len(candidates))))]
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
    import dataclasses

    renamed = [dataclasses.replace(c, prompt_id=f"{name}/{c.prompt_id}") for c in taken]
    return judges.bind(choice)(renamed, io.judging)


def _second(
    io: StageIO, section: recipe.Audit, candidates: Sequence[Candidate], opinions: Sequence[Opinion]
) -> dict[str, Any]:
    assert section.second is not None
    prompts = list(dict.fromkeys(c.prompt_id for c in candidates))
    rng = random.Random(io.row_seed("second judge"))
    sample = set(rng.sample(prompts, min(section.sample, len(prompts))))
    both = [(c, o) for c, o in zip(candidates, opinions, strict=True) if c.prompt_id in sample]
    taken = [c for c, _ in both]
    other = judges.bind(section.second)(taken, io.judging)
    compared = audit_scores.compare(_scored(taken, [o for _, o in both]), _scored(taken, other))
    return {"second": {"judge": judges.identity(section.second), **audit.plain(compared)}}


def _scored(candidates: Sequence[Candidate], opinions: Sequence[Opinion]) -> list[Scored]:
    return [Scored(c.prompt_id, len(c.text), o.score, o.reason) for c, o in zip(candidates, opinions, strict=True)]
