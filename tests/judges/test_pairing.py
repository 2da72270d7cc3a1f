"""Pairing rules: properties that hold for every input, and the cases that the papers name."""

import random

from hypothesis import given
from hypothesis import strategies as st

from selfimprove.judges import Candidate
from selfimprove.judges.pairing import (
    Dropped,
    Judged,
    all_pairs,
    best_vs_random,
    best_vs_worst,
    dynamic,
    gold_vs_generated,
    improver_vs_initial,
    kept,
    shares_won,
    top_k,
)
from selfimprove.judges.protocol import Preference

SCORES = st.none() | st.sampled_from([0.0, 0.5, 1.0])
ONE = st.tuples(st.sampled_from("abcdef"), SCORES, st.sampled_from(["stop", "length"]))


def judged(text, score, finish="stop", source="current", token_ids=None, sample=0):
    ids = [ord(c) for c in text] if token_ids is None else token_ids
    return Judged(Candidate("p", "p", source, sample, text, ids, finish), score)


@given(st.lists(ONE, max_size=8), st.integers(1, 4), st.integers(0, 5))
def test_best_vs_worst_never_prefers_what_is_not_better(rows, max_pairs, seed):
    group = [judged(*row) for row in rows]
    found = best_vs_worst(group, random.Random(seed), max_pairs=max_pairs)
    if isinstance(found, Dropped):
        assert found.reason
        return
    assert 1 <= len(found) <= max_pairs
    assert len({rejected.candidate.text for _, rejected in found}) == len(found)
    for chosen, rejected in found:
        assert chosen.score > rejected.score
        assert chosen.candidate.finish_reason == "stop"
        assert chosen.candidate.text != rejected.candidate.text
    whole = [score for _, score, finish in rows if score is not None and finish == "stop"]
    assert max(found[0][0].score, 0) <= max(whole)


def test_of_equal_texts_the_whole_one_counts():
    good, cut, bad = judged("g", 1.0), judged("g", 1.0, "length"), judged("b", 0.0)
    for group in ([good, cut, bad], [cut, bad, good]):
        assert best_vs_worst(group, random.Random(0)) == [(good, bad)]


def test_best_vs_worst_says_why_there_is_no_pair():
    rng = random.Random(0)
    assert best_vs_worst([judged("a", None)], rng) == Dropped("no score")
    assert best_vs_worst([judged("a", 1.0), judged("b", 1.0)], rng) == Dropped("no score gap")
    assert best_vs_worst([judged("a", 1.0, "length")], rng) == Dropped("every answer truncated")
    assert best_vs_worst([judged("g", 1.0, source="gold"), judged("b", 0.0)], rng) == Dropped("no score gap")


def test_spin_pairs_the_gold_with_every_own_sample_that_differs():
    gold, same, other = judged("g", None, source="gold"), judged("g", None), judged("h", None)
    assert gold_vs_generated([gold, same, other], random.Random(0)) == [(gold, other)]
    assert gold_vs_generated([gold, same], random.Random(0)) == Dropped("answer equals the gold")
    assert gold_vs_generated([other], random.Random(0)) == Dropped("no gold answer")


def test_synpo_prefers_the_best_rewrite_to_the_initial_answer():
    first = judged("i", 0.2, source="initial")
    weak, strong = judged("w", 0.3, source="improver"), judged("s", 0.9, source="improver")
    rng = random.Random(0)
    assert improver_vs_initial([first, weak, strong], rng, min_gap=0.5) == [(strong, first)]
    assert improver_vs_initial([first, weak], rng, min_gap=0.5) == Dropped("no score gap")
    assert improver_vs_initial([first, strong], rng, min_score=0.95) == Dropped("score too low")
    assert improver_vs_initial([judged("i", 0.9, source="initial"), weak], rng) == Dropped("no score gap")
    assert improver_vs_initial([weak], rng) == Dropped("no score")
    loop = judged("a b c d " * 5, 1.0, source="improver")
    assert improver_vs_initial([first, loop], rng) == Dropped("repetitive")
    cut = judged("z", 1.0, "length", source="improver")
    assert improver_vs_initial([first, cut], rng) == Dropped("no score")


class TestDynamic:
    """DNPO's dynamic sample labels (arXiv 2502.05400, section 3.1)."""

    @given(st.lists(ONE, min_size=1, max_size=6), SCORES, st.sampled_from([-0.5, 0.0, 0.5]))
    def test_no_pair_is_dropped_and_the_chosen_one_earns_it(self, rows, gold_score, threshold):
        gold = judged("g", gold_score, source="gold")
        own = [judged(*row) for row in rows]
        pairs = dynamic([gold, *own], random.Random(0), threshold=threshold)
        assert not isinstance(pairs, Dropped)
        assert len(pairs) == len(own)
        for (chosen, rejected), generated in zip(pairs, own, strict=True):
            assert {id(chosen), id(rejected)} == {id(gold), id(generated)}
            better = None not in (generated.score, gold_score) and generated.score - gold_score >= threshold
            assert (chosen is generated) == (better and generated.candidate.finish_reason == "stop")

    def test_ties_go_where_the_recipe_says(self):
        gold, own = judged("g", 1.0, source="gold"), judged("h", 1.0)
        assert dynamic([gold, own], random.Random(0)) == [(own, gold)]
        assert dynamic([gold, own], random.Random(0), ties="anchor") == [(gold, own)]
        assert dynamic([gold, own], random.Random(0), threshold=0.1) == [(gold, own)]

    def test_the_same_text_makes_no_pair(self):
        gold, own, other = judged("g", 0.0, source="gold"), judged("g", 1.0), judged("h", 1.0)
        assert dynamic([gold, own], random.Random(0)) == Dropped("answer equals the gold")
        assert dynamic([gold, own, other], random.Random(0)) == [(other, gold)]

    def test_a_draft_meets_its_own_rewrite(self):
        rewrites = [judged("r", 0.0, source="improver"), judged("s", 1.0, source="improver", sample=1)]
        own = [judged("b", 0.5, sample=1), judged("a", 0.5)]
        pairs = dynamic([*own, *rewrites], random.Random(0), anchor="improver")
        assert pairs == [(rewrites[1], own[0]), (own[1], rewrites[0])]
        assert dynamic(own, random.Random(0)) == Dropped("no gold answer")

    def test_every_answer_meets_the_one_gold(self):
        gold, own = judged("g", 1.0, source="gold"), [judged("a", 0.5), judged("b", 0.5, sample=1)]
        assert dynamic([gold, *own], random.Random(0)) == [(gold, own[0]), (gold, own[1])]

    def test_a_truncated_rewrite_is_never_chosen(self):
        cut = judged("r", 1.0, "length", source="improver")
        whole = judged("s", 1.0, source="improver", sample=1)
        own = [judged("a", 0.5), judged("b", 0.5, sample=1)]
        assert dynamic([*own, cut, whole], random.Random(0), anchor="improver") == [(whole, own[0]), (whole, own[1])]
        assert dynamic([*own, cut], random.Random(0), anchor="improver") == Dropped("every improver answer truncated")


def test_synpo_may_reject_the_current_answer_instead():
    rewrite, first, own = judged("r", 1.0, source="improver"), judged("m", 0.0, source="initial"), judged("c", 0.0)
    group = [rewrite, first, own]
    assert improver_vs_initial(group, random.Random(0)) == [(rewrite, first)]
    assert improver_vs_initial(group, random.Random(0), rejected="current") == [(rewrite, own)]


class TestRulesOverScores:
    """best_vs_random, all_pairs, top_k: what is chosen scores more, is whole, and every such pair can occur."""

    @given(st.lists(ONE, max_size=8), st.integers(0, 5))
    def test_what_is_chosen_scores_more_and_is_whole(self, rows, seed):
        group = [judged(*row) for row in rows]
        for rule in (best_vs_random, all_pairs, top_k):
            found = rule(group, random.Random(seed))
            if isinstance(found, Dropped):
                assert found.reason in ("no score", "every answer truncated", "no score gap")
                continue
            assert len({(a.candidate.text, b.candidate.text) for a, b in found}) == len(found) > 0
            for chosen, rejected in found:
                assert chosen.score > rejected.score
                assert chosen.candidate.finish_reason == "stop"

    @given(st.lists(ONE, max_size=8), st.integers(0, 5))
    def test_all_pairs_are_all(self, rows, seed):
        group = [judged(*row) for row in rows]
        found = all_pairs(group, random.Random(seed))
        texts = {}  # of equal texts a whole one counts, the last of those
        for one in sorted(group, key=lambda j: j.candidate.finish_reason != "length"):
            texts[one.candidate.text] = one
        expected = {
            (a.candidate.text, b.candidate.text)
            for a in texts.values()
            for b in texts.values()
            if None not in (a.score, b.score) and a.score > b.score and a.candidate.finish_reason == "stop"
        }
        pairs = [] if isinstance(found, Dropped) else found
        assert {(a.candidate.text, b.candidate.text) for a, b in pairs} == expected

    def test_top_k_is_k_against_k(self):
        group = [judged(text, score) for text, score in zip("abcde", [5.0, 4.0, 3.0, 2.0, 1.0], strict=True)]
        texts = [(a.candidate.text, b.candidate.text) for a, b in top_k(group, random.Random(0), k=2)]
        assert texts == [("a", "e"), ("a", "d"), ("b", "e"), ("b", "d")]

    def test_best_vs_random_is_not_always_the_worst(self):
        group = [judged(text, score) for text, score in zip("abcd", [4.0, 3.0, 2.0, 1.0], strict=True)]
        rejected = [best_vs_random(group, random.Random(seed))[0][1].candidate.text for seed in range(300)]
        shares = {text: rejected.count(text) / 300 for text in "bcd"}
        assert all(0.2 < share < 0.47 for share in shares.values())  # each 1/3; five standard deviations


class TestKept:
    good, bad = judged("good", 3.0), judged("bad", 1.0, sample=1)

    def reasons(self, pair=None, margin=0.0, ratio=None, compared=None):
        stay, refused = kept([pair or (self.good, self.bad)], margin, ratio, compared)
        assert len(stay) + len(refused) == 1
        return [one.reason for one in refused]

    def test_margin_and_length(self):
        assert self.reasons() == []
        assert self.reasons(margin=2.0) == []
        assert self.reasons(margin=2.1) == ["score gap too small"]
        assert self.reasons((self.good, judged("bad", None)), margin=0.1) == ["score unknown"]
        assert self.reasons(ratio=4 / 3) == []
        assert self.reasons(ratio=1.3) == ["chosen answer too long"]
        assert self.reasons((judged("x", 2.0, "length"), self.bad)) == ["chosen answer truncated"]

    def test_only_what_both_orders_prefer_stays(self):
        def compared(forward, swapped, turned=False):
            keys = (self.good.candidate.key, self.bad.candidate.key)
            return {keys[::-1] if turned else keys: Preference(forward, swapped)}

        assert self.reasons(compared=compared(1.0, 1.0)) == []
        assert self.reasons(compared=compared(0.0, 0.0, turned=True)) == []
        assert self.reasons(compared=compared(0.6, 0.9)) == []
        assert self.reasons(compared=compared(1.0, 0.0)) == ["the judge's two orders disagree"]
        assert self.reasons(compared=compared(0.5, 1.0)) == ["the judge's two orders disagree"]
        assert self.reasons(compared=compared(0.0, 0.0)) == ["the judge prefers the rejected answer"]
        assert self.reasons(compared=compared(1.0, None)) == ["comparison unknown"]
        assert self.reasons(compared={}) == ["comparison unknown"]

    def test_an_answers_share_of_what_it_won(self):
        third = judged("third", None, sample=2).candidate.key
        a, b = self.good.candidate.key, self.bad.candidate.key
        won = shares_won({
            (a, b): Preference(1.0, 1.0), (a, third): Preference(0.5, 0.5), (b, third): Preference(1.0, None),
        })  # fmt: skip
        assert {key: opinion.score for key, opinion in won.items()} == {a: 0.75, b: 0.0, third: 0.5}
