"""Pairing rules: the judged completions of one prompt in, pairs out or the reason why there is none. Pure functions."""

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from selfimprove.judges import Candidate
from selfimprove.records import Message, Pair


class Judged(NamedTuple):
    """A completion and its score; None is unknown."""

    candidate: Candidate
    score: float | None


class Dropped(NamedTuple):
    """No pair, and why."""

    reason: str


def as_row(
    iteration: int, number: int, prompt_token_ids: list[int], source: str, chosen: Judged, rejected: Judged
) -> Pair:
    """The `number`-th pair of a prompt as the row that is stored; `source` is the data's."""
    better, worse = chosen.candidate, rejected.candidate
    return Pair(
        pair_id=f"i{iteration}/{better.prompt_id}/{number}",
        prompt=[Message(role="user", content=better.prompt)],
        chosen=[Message(role="assistant", content=better.text)],
        rejected=[Message(role="assistant", content=worse.text)],
        prompt_id=better.prompt_id,
        iteration=iteration,
        chosen_source=better.source,
        rejected_source=worse.source,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        prompt_token_ids=prompt_token_ids,
        chosen_token_ids=better.token_ids,
        rejected_token_ids=worse.token_ids,
        source=source,
    )


Pairs = list[tuple[Judged, Judged]]  # (chosen, rejected)
Rule = Callable[[Sequence[Judged], random.Random], Pairs | Dropped]


def best_vs_worst(judged: Sequence[Judged], rng: random.Random, *, max_pairs: int = 1) -> Pairs | Dropped:
    """The best of the current policy's samples against each of the `max_pairs` worst that score less.

    Ties are broken at random, equal texts count once, a truncated answer is never chosen.
    """
    own = [j for j in judged if j.candidate.source == "current"]
    own.sort(key=lambda j: j.candidate.finish_reason != "length")  # of equal texts the last one counts: a whole one
    scored = [(j, j.score) for j in {j.candidate.text: j for j in own}.values() if j.score is not None]
    if not scored:
        return Dropped("no score")
    rng.shuffle(scored)
    ranked = sorted(scored, key=lambda pair: -pair[1])
    whole = [pair for pair in ranked if pair[0].candidate.finish_reason != "length"]
    if not whole:
        return Dropped("every answer truncated")
    best, high = whole[0]
    pairs = [(best, worst) for worst, low in reversed(ranked[-max_pairs:]) if high > low]
    return pairs or Dropped("no score gap")


def gold_vs_generated(judged: Sequence[Judged], rng: random.Random) -> Pairs | Dropped:
    """SPIN (arXiv 2401.01335): the gold answer is chosen, the policy's own sample is rejected."""
    gold = next((j for j in judged if j.candidate.source == "gold"), None)
    if gold is None:
        return Dropped("no gold answer")
    generated = [j for j in judged if j.candidate.source == "current"]
    pairs = [(gold, g) for g in generated if g.candidate.token_ids != gold.candidate.token_ids]
    return pairs or Dropped("answer equals the gold")


def dynamic(
    judged: Sequence[Judged],
    rng: random.Random,
    *,
    anchor: Literal["gold", "improver"] = "gold",
    threshold: float = 0.0,
    ties: Literal["generated", "anchor"] = "generated",
) -> Pairs | Dropped:
    """DNPO's dynamic sample labels (arXiv 2502.05400, section 3.1): whichever scores higher is chosen.

    The generated answer is chosen when its score exceeds the anchor's by `threshold`; at exactly `threshold`, `ties`
    says which. The anchor stays chosen where a score is unknown and against a truncated answer. An answer meets its own
    rewrite where that is whole, else the first anchor that is. No pair is dropped, but an answer that equals its
    anchor makes none: such pairs have no gradient, and Adam, which rescales, would step along noise.
    """
    anchors = [j for j in judged if j.candidate.source == anchor]
    generated = [j for j in judged if j.candidate.source == "current"]
    if not anchors or not generated:
        return Dropped(f"no {anchor} answer" if not anchors else "no answer")
    whole = [j for j in anchors if j.candidate.finish_reason != "length"]
    if not whole:
        return Dropped(f"every {anchor} answer truncated")
    of_draft = {j.candidate.sample: j for j in whole}
    pairs = []
    for own in generated:
        fixed = of_draft.get(own.candidate.sample, whole[0])
        if own.candidate.text == fixed.candidate.text:
            continue
        gap = None if own.score is None or fixed.score is None else own.score - fixed.score - threshold
        won = gap is not None and (gap > 0 or (gap == 0 and ties == "generated"))
        flipped = won and own.candidate.finish_reason != "length"
        pairs.append((own, fixed) if flipped else (fixed, own))
    return pairs or Dropped(f"answer equals the {anchor}")


def improver_vs_initial(
    judged: Sequence[Judged],
    rng: random.Random,
    *,
    rejected: Literal["initial", "current"] = "initial",
    min_gap: float = 0.0,
    min_score: float = 0.0,
    max_repetition: float = 0.5,
) -> Pairs | Dropped:
    """SynPO (arXiv 2410.06961, section 3.2): chosen = the improver's rewrite, rejected = the initial model's answer.

    `rejected` = "current" takes the current policy's answer instead, which the paper did not publish an ablation of.

    The best rewrite is kept when its score exceeds the rejected one's by at least `min_gap` (and by more than
    nothing), it reaches `min_score`, and no more than `max_repetition` of it is repetition.
    """
    rewrites = [
        (j, j.score)
        for j in judged
        if j.candidate.source == "improver" and j.score is not None and j.candidate.finish_reason != "length"
    ]
    first = next((j for j in judged if j.candidate.source == rejected), None)
    if first is None or first.score is None or not rewrites:
        return Dropped("no score")
    rewrites = [pair for pair in rewrites if repetition(pair[0].candidate.text) <= max_repetition]
    if not rewrites:
        return Dropped("repetitive")
    chosen, score = max(rewrites, key=lambda pair: pair[1])
    if score < min_score:
        return Dropped("score too low")
    if score <= first.score or score - first.score < min_gap:
        return Dropped("no score gap")
    return [(chosen, first)]


def repetition(text: str) -> float:
    """Share of the words of a text that are in a repeated four-word sequence seen before (0 for short texts)."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


RULES: dict[str, Callable[..., Pairs | Dropped]] = {
    "best_vs_worst": best_vs_worst,
    "gold_vs_generated": gold_vs_generated,
    "dynamic": dynamic,
    "improver_vs_initial": improver_vs_initial,
}
