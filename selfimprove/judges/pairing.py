"""Pairing rules: the judged completions of one prompt in, pairs out or the reason why there is none. Pure functions."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from selfimprove.judges.protocol import Candidate, Opinion, Preference
from selfimprove.ngrams import repetition
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


Key = tuple[str, str, int]  # of a candidate
Pairs = list[tuple[Judged, Judged]]  # (chosen, rejected)
Rule = Callable[[Sequence[Judged], random.Random], Pairs | Dropped]


def best_vs_worst(judged: Sequence[Judged], rng: random.Random, *, max_pairs: int = 1) -> Pairs | Dropped:
    """The best of the current policy's samples against each of the `max_pairs` worst that score less.

    Ties are broken at random, equal texts count once, a truncated answer is never chosen.
    """
    ranked = _ranked(judged, rng)
    if isinstance(ranked, Dropped):
        return ranked
    whole = [pair for pair in ranked if _whole(pair[0])]
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


def best_vs_random(judged: Sequence[Judged], rng: random.Random) -> Pairs | Dropped:
    """The best of the current policy's samples against a random one that scores less.

    The worst answer is often wrong in a way that teaches little; a random one is nearer (the "best-vs-random" rule of
    West-of-N and RSO's sampling, arXiv 2309.06657).
    """
    ranked = _ranked(judged, rng)
    if isinstance(ranked, Dropped):
        return ranked
    best = next((pair for pair in ranked if _whole(pair[0])), None)
    if best is None:
        return Dropped("every answer truncated")
    worse = [j for j, score in ranked if score < best[1]]
    return [(best[0], rng.choice(worse))] if worse else Dropped("no score gap")


def all_pairs(judged: Sequence[Judged], rng: random.Random) -> Pairs | Dropped:
    """Every two of the current policy's samples of different score; label.min_margin says how different."""
    ranked = _ranked(judged, rng)
    if isinstance(ranked, Dropped):
        return ranked
    pairs = [(a, b) for a, high in ranked if _whole(a) for b, low in ranked if low < high]
    return pairs or Dropped("no score gap")


def top_k(judged: Sequence[Judged], rng: random.Random, *, k: Annotated[int, Field(ge=1)] = 2) -> Pairs | Dropped:
    """Each of the `k` best of the current policy's samples against each of the `k` worst that scores less."""
    ranked = _ranked(judged, rng)
    if isinstance(ranked, Dropped):
        return ranked
    best = [pair for pair in ranked if _whole(pair[0])][:k]
    if not best:
        return Dropped("every answer truncated")
    pairs = [(a, b) for a, high in best for b, low in reversed(ranked[-k:]) if low < high]
    return pairs or Dropped("no score gap")


def given(judged: Sequence[Judged], rng: random.Random) -> Pairs | Dropped:
    """Pairs that were there before the run (data.pairs): the first answer is chosen, the second rejected."""
    chosen, rejected = judged
    same = chosen.candidate.token_ids == rejected.candidate.token_ids
    return Dropped("chosen equals rejected") if same else [(chosen, rejected)]


def _ranked(judged: Sequence[Judged], rng: random.Random) -> list[tuple[Judged, float]] | Dropped:
    """The current policy's samples of known score, best first, ties at random; equal texts count once."""
    own = [j for j in judged if j.candidate.source == "current"]
    own.sort(key=_whole)  # of equal texts the last one counts: a whole one
    scored = [(j, j.score) for j in {j.candidate.text: j for j in own}.values() if j.score is not None]
    rng.shuffle(scored)
    return sorted(scored, key=lambda pair: -pair[1]) if scored else Dropped("no score")


def _whole(one: Judged) -> bool:
    return one.candidate.finish_reason != "length"


class Refused(NamedTuple):
    """A pair that a rule proposed and something speaks against."""

    pair: tuple[Judged, Judged]
    reason: str


def kept(
    proposed: Pairs,
    min_margin: float,
    max_length_ratio: float | None,
    compared: Mapping[tuple[Key, Key], Preference] | None,
) -> tuple[Pairs, list[Refused]]:
    """The proposed pairs that stay, and those that do not, each with its reason.

    Args:
        proposed: (chosen, rejected) of one prompt.
        min_margin: smallest score gap.
        max_length_ratio: of chosen to rejected, in tokens; None = any.
        compared: what a judge that compares found; a pair stays only where both orders prefer the chosen answer.
    """
    stay, refused = [], []
    for pair in proposed:
        reason = _against(*pair, min_margin, max_length_ratio, compared)
        if reason:
            refused.append(Refused(pair, reason))
        else:
            stay.append(pair)
    return stay, refused


def _against(
    chosen: Judged,
    rejected: Judged,
    min_margin: float,
    max_length_ratio: float | None,
    compared: Mapping[tuple[Key, Key], Preference] | None,
) -> str:
    if not _whole(chosen):
        return "chosen answer truncated"
    if compared is not None:
        preference = _between(chosen.candidate.key, rejected.candidate.key, compared)
        if preference is None or preference.mean is None:
            return "comparison unknown"
        if not preference.consistent:
            return "the judge's two orders disagree"
        if preference.mean < 0.5:
            return "the judge prefers the rejected answer"
    if min_margin:
        if chosen.score is None or rejected.score is None:
            return "score unknown"
        if chosen.score - rejected.score < min_margin:
            return "score gap too small"
    lengths = len(chosen.candidate.token_ids), len(rejected.candidate.token_ids)
    if max_length_ratio is not None and lengths[0] > max_length_ratio * lengths[1]:
        return "chosen answer too long"
    return ""


def _between(a: Key, b: Key, compared: Mapping[tuple[Key, Key], Preference]) -> Preference | None:
    """The preference of `a` over `b`, whichever way they were compared."""
    if (a, b) in compared:
        return compared[a, b]
    found = compared.get((b, a))
    if found is None or found.forward is None or found.swapped is None:
        return None
    return found._replace(forward=1 - found.forward, swapped=1 - found.swapped)


def shares_won(compared: Mapping[tuple[Key, Key], Preference]) -> dict[Key, Opinion]:
    """The share of its comparisons that each answer wins, both orders counted, where one is known."""
    wins: dict[Key, list[float]] = {}
    for (a, b), preference in compared.items():
        if preference.mean is not None:
            wins.setdefault(a, []).append(preference.mean)
            wins.setdefault(b, []).append(1 - preference.mean)
    return {key: Opinion(sum(of) / len(of), f"mean of {len(of)} comparisons") for key, of in wins.items()}


RULES: dict[str, Callable[..., Pairs | Dropped]] = {
    "best_vs_worst": best_vs_worst,
    "best_vs_random": best_vs_random,
    "all_pairs": all_pairs,
    "top_k": top_k,
    "gold_vs_generated": gold_vs_generated,
    "dynamic": dynamic,
    "improver_vs_initial": improver_vs_initial,
    "given": given,
}
