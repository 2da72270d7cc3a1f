"""From answers and what a judge found of them to pairs: pure functions, so that `verify` can do it again.

The stage label asks the judge, and writes what comes out here.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from selfimprove import judges, recipe
from selfimprove.judges import Candidate, Opinion, Preference
from selfimprove.judges.pairing import Dropped, Judged, Key, Rule, as_row, kept
from selfimprove.records import Flip, Generation, Pair, Seed


class Paired(NamedTuple):
    """The pairs of some prompts, the prompts without one and why, and how many pairs were refused, by reason."""

    pairs: list[Pair]
    dropped: list[tuple[str, str]]
    refused: Counter[str]


def candidates(
    rows: Iterable[Generation], golds: Mapping[str, Seed], completion_ids: Callable[[str, str], list[int]]
) -> tuple[list[Candidate], dict[str, list[int]]]:
    """All completions of a prompt side by side, the gold first where there is one; and each prompt's token ids.

    Args:
        rows: completions.
        golds: the seeds by prompt_id, with an answer or not.
        completion_ids: the token ids of an answer to a prompt.
    """
    by_prompt: dict[str, list[Generation]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    found: list[Candidate] = []
    for prompt_id, group in by_prompt.items():
        gold = golds.get(prompt_id)
        if gold and gold.completion is not None:
            ids = completion_ids(gold.prompt, gold.completion)
            found.append(Candidate(prompt_id, gold.prompt, "gold", 0, gold.completion, ids, "stop"))
        answer = gold.completion if gold else None
        found += [judges.candidate(row, answer) for row in group]
    return found, {prompt_id: group[0].prompt_token_ids for prompt_id, group in by_prompt.items()}


def paired(
    section: recipe.Label,
    rule: Rule,
    iteration: int,
    row_seed: Callable[[str], int],
    found: Iterable[tuple[Candidate, Opinion]],
    preferences: Mapping[tuple[Key, Key], Preference],
    prompt_ids: Mapping[str, list[int]],
    golds: Mapping[str, Seed],
) -> Paired:
    """What the rule proposes and nothing speaks against, before any quota.

    Args:
        section: the recipe's [label].
        rule: its pairing rule, bound.
        iteration: of the stage.
        row_seed: the stage's seed of a row.
        found: candidates, those of a prompt together, and the judge's opinions.
        preferences: between two of them, where the judge compares.
        prompt_ids: token ids of each prompt.
        golds: the seeds by prompt_id; a pair has its source.
    """
    compared = preferences if section.judge and judges.compares(section.judge) else None
    made = Paired([], [], Counter())
    rng = random.Random()
    judged = (Judged(candidate, opinion.score) for candidate, opinion in found)
    for prompt_id, group in itertools.groupby(judged, key=lambda j: j.candidate.prompt_id):
        rng.seed(row_seed(prompt_id))  # a generator anew would be seeded twice
        proposed = rule(list(group), rng)
        if isinstance(proposed, Dropped):
            made.dropped.append((prompt_id, proposed.reason))
            continue
        good, bad = kept(proposed, section.min_margin, section.max_length_ratio, compared)
        made.refused.update(one.reason for one in bad)
        if not good:
            made.dropped.append((prompt_id, bad[0].reason))
            continue
        source = golds[prompt_id].source if prompt_id in golds else ""
        made.pairs.extend(as_row(iteration, k, prompt_ids[prompt_id], source, *one) for k, one in enumerate(good))
    return made


def within(prompts: Sequence[str], quota: int, rng: random.Random) -> tuple[list[int], list[str]]:
    """As many pairs as the quota, drawn at random, by their places; and the prompts that have lost all of theirs.

    Args:
        prompts: of each pair its prompt_id.
        quota: pairs that stay.
        rng: draws them.
    """
    if len(prompts) <= quota:
        return list(range(len(prompts))), []
    chosen = sorted(rng.sample(range(len(prompts)), quota))
    left = {prompts[i] for i in chosen}
    return chosen, list(dict.fromkeys(prompt for prompt in prompts if prompt not in left))


def flip(pair: Pair) -> Flip:
    """A dynamic label that went to the generated answer."""
    return Flip(
        pair.pair_id, pair.prompt_id, pair.iteration, "dynamic",
        pair.rejected_source, pair.chosen_source, pair.rejected_score, pair.chosen_score,
    )  # fmt: skip


def flips(section: recipe.Label, pairs: Iterable[Pair]) -> list[Flip]:
    """Of a round's own pairs those that the rule `dynamic` turned over."""
    return [flip(pair) for pair in pairs if section.pairing.name == "dynamic" and pair.chosen_source == "current"]


def relabelled(pair: Pair, chosen: float | None, rejected: float | None, iteration: int) -> tuple[Pair, Flip | None]:
    """An earlier pair with new scores of its chosen and its rejected answer.

    It stays as it is where a score is unknown or both are the same, and turns where the rejected one scores more.
    """
    if chosen is None or rejected is None or rejected <= chosen:
        return replace(pair, chosen_score=chosen, rejected_score=rejected), None
    turned = Flip(
        pair.pair_id, pair.prompt_id, iteration, "relabelled",
        pair.chosen_source, pair.rejected_source, chosen, rejected,
    )  # fmt: skip
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_source=pair.rejected_source,
        rejected_source=pair.chosen_source,
        chosen_score=rejected,
        rejected_score=chosen,
        chosen_token_ids=pair.rejected_token_ids,
        rejected_token_ids=pair.chosen_token_ids,
    ), turned
