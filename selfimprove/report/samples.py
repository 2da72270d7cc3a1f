"""What to read: answers to the same prompts from round to round, and the pairs that training saw."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove.evaluation import splits
from selfimprove.plan import Examined
from selfimprove.report import diff
from selfimprove.report.diff import Piece
from selfimprove.report.evidence import REPORT, Evaluation, columns, finite, rows_at
from selfimprove.report.figures import MINUS
from selfimprove.stages import label

PROMPTS = 12  # shown
PAIRS = 3  # shown of each end
LONGEST = 1_500  # characters shown of a text
LONG = 240  # characters that a column of its own is too narrow for
REWRITTEN = 0.25  # of the words: with less in common a long text is not marked up


class Answer(NamedTuple):
    """One answer; `pieces` is None where the text is shown without marks, for the reason in `note`."""

    label: str
    score: float | None
    text: str
    pieces: list[Piece] | None
    note: str
    cut: bool  # the model was stopped at its limit of tokens


class Prompt(NamedTuple):
    """A prompt and its answers in order."""

    text: str
    answers: list[Answer]
    long: bool  # too long to stand side by side in narrow columns


class Group(NamedTuple):
    """Prompts that have fared alike; `total` is how many there are, shown or not."""

    name: str
    total: int
    prompts: list[Prompt]


class Side(NamedTuple):
    """One answer of a pair; the pieces are in both, or only in this one."""

    text: str
    pieces: list[Piece] | None
    source: str
    score: float | None


class Pair(NamedTuple):
    """A pair that was trained on; `margin` is the chosen answer's score less the rejected one's."""

    prompt: str
    chosen: Side
    rejected: Side
    margin: float | None


class Pairs(NamedTuple):
    """The pairs of a round at both ends of their margins; where all are alike some at random, in `largest`."""

    iteration: int
    total: int
    unknown: int  # pairs without a margin
    alike: bool
    largest: list[Pair]
    smallest: list[Pair]


def answers(found: Sequence[Evaluation]) -> list[Group]:
    """Greedy answers of base, SFT and rounds to some prompts of each fate between the first and the last of them."""
    those = [one for one in found if one.kind != "control" and splits.GREEDY in one.by_prompt]
    if not those:
        return []
    shared = sorted(set.intersection(*(set(one.by_prompt[splits.GREEDY]) for one in those)))
    before, after = (one.by_prompt[splits.GREEDY] for one in (those[0], those[-1]))
    fates: dict[str, list[str]] = {"gained": [], "lost": [], "the same": []}
    for prompt_id in shared:
        change = after[prompt_id] - before[prompt_id]
        fates["gained" if change > 0 else "lost" if change < 0 else "the same"].append(prompt_id)
    rng = random.Random(0)
    chosen = {name: sorted(rng.sample(ids, n)) for (name, ids), n in zip(fates.items(), _shares(fates), strict=True)}
    wanted = {prompt_id for ids in chosen.values() for prompt_id in ids}
    rows = [(one, _greedy(one.directory, wanted)) for one in those]
    return [
        Group(name, len(fates[name]), [_prompt(prompt_id, rows) for prompt_id in ids])
        for name, ids in chosen.items()
        if ids
    ]


def _shares(fates: Mapping[str, Sequence[str]]) -> list[int]:
    """A third of PROMPTS each, and what one cannot fill to the others."""
    room, shares = PROMPTS, [0] * len(fates)
    sizes = [len(ids) for ids in fates.values()]
    while room and shares != sizes:
        k = min((k for k in range(len(sizes)) if shares[k] < sizes[k]), key=lambda k: shares[k])
        shares[k], room = shares[k] + 1, room - 1
    return shares


def _greedy(directory: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """The greedy rows of these prompts, of the report split."""
    keys = columns(directory, "samples", ("prompt_id", "mode", "split"))
    halves = keys["split"].to_pylist() if "split" in keys.column_names else [REPORT] * keys.num_rows
    of = zip(keys["prompt_id"].to_pylist(), keys["mode"].to_pylist(), halves, strict=True)
    places = [k for k, (prompt_id, *rest) in enumerate(of) if prompt_id in wanted and rest == [splits.GREEDY, REPORT]]
    fields = ("prompt_id", "prompt", "text", "score", "finish_reason")
    return {row["prompt_id"]: row for row in rows_at(directory, "samples", fields, places).values()}


def _prompt(prompt_id: str, rows: Sequence[tuple[Evaluation, Mapping[str, Mapping[str, Any]]]]) -> Prompt:
    shown: list[Answer] = []
    before: str | None = None
    for one, found in rows:
        row = found[prompt_id]
        pieces, note = (None, "") if before is None else _changed(before, row["text"])
        shown.append(
            Answer(one.label, finite(row["score"]), row["text"], pieces, note, row["finish_reason"] == "length")
        )
        before = row["text"]
    return Prompt(rows[0][1][prompt_id]["prompt"], shown, max(len(one.text) for one in shown) > LONG)


def _changed(old: str, new: str) -> tuple[list[Piece] | None, str]:
    """Marks of what changed, or why there are none."""
    if old == new:
        return None, "unchanged"
    pieces = diff.words(old[:LONGEST], new[:LONGEST])
    if pieces is None:
        return None, "changed; too long to compare word by word"
    longer = max(len(old[:LONGEST]), len(new[:LONGEST]))
    kept = sum(len(piece.text) for piece in pieces if piece.kind == "same")
    if longer > 200 and kept / longer < REWRITTEN:
        return None, "rewritten"
    return pieces, ""


def pairs(root: Path, examined: Sequence[Examined]) -> list[Pairs]:
    """The pairs of every round with the largest and the smallest margins."""
    return [
        found
        for one in examined
        if one.step.stage is label and one.manifest and (found := _pairs(root / one.step.directory, one.step.iteration))
    ]


def _pairs(directory: Path, iteration: int) -> Pairs | None:
    scores = columns(directory, "pairs", ("chosen_score", "rejected_score"))
    if not scores.num_rows:
        return None
    both = zip(scores["chosen_score"].to_pylist(), scores["rejected_score"].to_pylist(), strict=True)
    margins = [None if None in (c, r) else finite(c - r) for c, r in both]
    known = sorted((margin, k) for k, margin in enumerate(margins) if margin is not None)
    alike = not known or known[0][0] == known[-1][0]
    if alike:
        every = [k for _, k in known] or list(range(len(margins)))
        high, low = random.Random(iteration).sample(every, min(2 * PAIRS, len(every))), []
    else:
        number = min(PAIRS, len(known) // 2)
        high, low = [k for _, k in reversed(known[-number:])], [k for _, k in known[:number]]
    fields = ("prompt", "chosen", "rejected", "chosen_source", "rejected_source", "chosen_score", "rejected_score")
    rows = rows_at(directory, "pairs", fields, [*high, *low])
    return Pairs(
        iteration, len(margins), len(margins) - len(known), alike,
        [_pair(rows[k], margins[k]) for k in high], [_pair(rows[k], margins[k]) for k in low],
    )  # fmt: skip


def _pair(row: Mapping[str, Any], margin: float | None) -> Pair:
    prompt, chosen, rejected = ("\n".join(m["content"] for m in row[name]) for name in ("prompt", "chosen", "rejected"))
    pieces, _ = _changed(rejected, chosen)
    only = {kind: [p for p in pieces or [] if p.kind in ("same", kind)] or None for kind in ("ins", "del")}
    return Pair(
        prompt,
        Side(chosen, only["ins"], row["chosen_source"], finite(row["chosen_score"])),
        Side(rejected, only["del"], row["rejected_source"], finite(row["rejected_score"])),
        margin,
    )


def mark(score: float | None) -> str:
    """✓ and ✗ for right and wrong, the number for scores between."""
    if score is None:
        return "?"
    return {1.0: "✓", 0.0: "✗"}.get(score, f"{score:.3g}".replace("-", MINUS))
