"""The audit against published figures, statsmodels and scipy, and what its definitions must give."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.api import OLS
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint

from selfimprove import auditing, jsonl
from selfimprove.judges import audit, audit_scores, labelled
from selfimprove.judges.audit import CLASSES, UNREADABLE, Row
from selfimprove.judges.audit_scores import Scored
from tests.paths import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data with known answers is not beside the checkout")
SUBSETS = ("Natural", "Neighbor", "GPTInst", "GPTOut", "Manual")

preferences = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0, None])
rows = st.builds(
    Row, st.sampled_from([*CLASSES, None]), preferences, preferences, st.tuples(st.integers(0, 9), st.integers(0, 9))
)


@needs_data
class TestPublishedFigures:
    def test_every_cell_of_llmbar(self):
        """60 cells (5 subsets x 3 judges x 4 strategies), in each 5 official counts and 7 figures derived from them."""
        expected = json.loads((DATA / "llmbar/public/expected_statistics.json").read_text())
        pairs = auditing.by_subset([list(labelled.read_pairs(DATA / f"llmbar/dataset/{s}.json")) for s in SUBSETS])
        verdicts = labelled.read_verdicts(DATA / "llmbar/public/verdicts.jsonl.gz")
        found = auditing.audit_recorded(pairs, verdicts)
        assert found.left_out == []
        assert {f"{g.subset}/{g.judge}/{g.strategy}" for g in found.groups} == set(expected)
        for group in found.groups:
            cell, told = expected[f"{group.subset}/{group.judge}/{group.strategy}"], group.pairs
            counts = {
                "n": told.n,
                "correct_fwd": told.forward.accuracy.value * told.n,
                "correct_swp": told.swapped.accuracy.value * told.n,
                "correct_both": told.both_right.value * told.n,
                "consistent": told.consistent.value * told.n,
            }
            derived = {
                "accuracy_avg": told.mean_right.value,
                "position_consistency": told.consistent.value,
                "first_position_rate": told.first_position.value,
                "accuracy_tie_half": told.half_right.value,
                "n_unparsable": told.unreadable_verdicts,
                "kappa_fwd_vs_swp": told.kappa_orders,
                "kappa_fwd_vs_label": told.forward.kappa,
            }
            assert counts == pytest.approx(cell["official_counts"], abs=1e-9)
            assert derived == pytest.approx(cell["derived"], abs=1e-12)

    @pytest.mark.parametrize("judge", ["gpt-3.5-turbo", "pandalm-7b"])
    def test_the_judges_of_pandalm(self, judge):
        expected = json.loads((DATA / "pandalm/expected.json").read_text())[judge]
        pairs = auditing.by_subset([list(labelled.read_pairs(DATA / "pandalm/testset-v1.json.gz"))])
        verdicts = labelled.read_verdicts(DATA / f"pandalm/{judge}-testset-v1.json.gz")
        [group] = auditing.audit_recorded(pairs, verdicts).groups
        told = {
            "accuracy": group.pairs.forward.accuracy.value,
            "cohen_kappa": group.pairs.forward.kappa,
            "macro_f1": group.pairs.forward.macro_f1,
            "n_unparsable": group.pairs.unreadable_verdicts,
        }
        assert told == pytest.approx(expected, abs=1e-12)
        assert group.pairs.n == 999
        assert (group.pairs.swapped, group.pairs.consistent, group.pairs.first_position) == (None, None, None)

    def test_the_annotators_of_pandalm(self):
        expected = json.loads((DATA / "pandalm/expected.json").read_text())
        raw = [row for _, row in jsonl.rows(DATA / "pandalm/testset-v1.json.gz")]
        for two, kappa in expected["annotator_kappa"].items():
            said = [(str(row[f"annotator{two[0]}"]), str(row[f"annotator{two[1]}"])) for row in raw]
            assert audit.kappa(said) == pytest.approx(kappa, abs=1e-12)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1))
def test_kappa_equals_statsmodels(pairs):
    table = np.array([[pairs.count((one, other)) for other in "abcd"] for one in "abcd"])
    found = audit.kappa(pairs)
    if found is None:
        assert len({name for two in pairs for name in two}) == 1
    else:
        assert found == pytest.approx(cohens_kappa(table, return_results=False), abs=1e-12)


def test_macro_f1_of_the_example_of_scikit_learn():
    """sklearn.metrics.f1_score, documentation: macro average of these labels."""
    assert audit.macro_f1(list(zip("012012", "021001", strict=True))) == pytest.approx(0.8 / 3)
    assert audit.macro_f1([("a", "x"), ("a", "a")]) == pytest.approx(2 / 3)  # x is no class of the truth
    assert audit.macro_f1([]) is None


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1))
def test_wilson_intervals_equal_statsmodels(values):
    found = audit.rate(values)
    low, high = proportion_confint(sum(values), len(values), method="wilson")
    assert (found.value, found.n) == (pytest.approx(sum(values) / len(values)), len(values))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_two_verdicts_on_a_pair_count_as_one_in_the_interval():
    assert audit.pooled([[1.0, 1.0], [0.0, 0.0], []]) == audit.rate([1.0, 0.0])


@given(st.lists(rows, min_size=1))
def test_what_every_audit_holds_to(given_rows):
    told = audit.audit(given_rows)
    parts = (told.consistent, told.flipped, told.unreadable)
    assert sum(part.value for part in parts) == pytest.approx(1)
    assert (told.forward is None) == (told.labelled == 0)
    if told.combined:
        cells = [n for row in told.combined.confusion.values() for n in row.values()]
        assert sum(cells) == told.labelled
        hits = sum(told.combined.confusion[name][name] for name in CLASSES)
        assert told.combined.accuracy.value == pytest.approx(hits / told.labelled)
        assert told.both_right.value <= min(told.forward.accuracy.value, told.swapped.accuracy.value)
        assert told.mean_right.value == pytest.approx((told.forward.accuracy.value + told.swapped.accuracy.value) / 2)
    json.dumps(audit.plain(told), allow_nan=False)


@given(st.lists(rows, min_size=1))
def test_the_names_of_the_answers_do_not_matter(given_rows):
    """Exchange the two answers: each order's verdict is the other's, and nothing else changes."""
    other = {"first": "second", "second": "first", "tie": "tie", None: None}
    turned = [
        Row(
            other[row.human],
            None if row.swapped is None else 1 - row.swapped,
            None if row.forward is None else 1 - row.forward,
            row.lengths[::-1],
        )
        for row in given_rows
    ]
    here, there = audit.audit(given_rows), audit.audit(turned)
    same = [n for n in here._fields if n not in ("forward", "swapped", "combined", "kappa_orders")]
    for name in same:
        one, two = getattr(here, name), getattr(there, name)
        assert one == (pytest.approx(two) if one is not None else two), name
    assert audit.plain(here.forward and here.forward.accuracy) == audit.plain(there.swapped and there.swapped.accuracy)
    assert (here.kappa_orders is None) == (there.kappa_orders is None)
    assert here.kappa_orders is None or here.kappa_orders == pytest.approx(there.kappa_orders)


def test_a_judge_that_always_takes_the_first_shown():
    told = audit.audit([Row(human, 1.0, 0.0, (1, 2)) for human in ("first", "second") for _ in range(50)])
    assert (told.first_position.value, told.consistent.value, told.flipped.value) == (1, 0, 1)
    assert (told.mean_right.value, told.both_right.value, told.half_right.value) == (0.5, 0, 0.5)
    assert told.combined.confusion["first"]["tie"] == 50
    assert told.prefers_longer is None  # it prefers nothing
    assert told.humans_prefer_longer.value == 0.5


def test_what_cannot_be_read_is_neither_a_tie_nor_right():
    told = audit.audit([Row("tie", None, 0.5), Row("first", 1.0, 1.0), Row(None, 1.0, 1.0)])
    assert (told.n, told.labelled, told.unreadable_verdicts) == (3, 2, 1)
    assert told.combined.confusion["tie"] == {"first": 0, "second": 0, "tie": 0, UNREADABLE: 1}
    assert told.forward.accuracy.value == 0.5
    assert told.swapped.accuracy.value == 1
    assert told.ties.value == pytest.approx(1 / 5)
    nothing = audit.audit([Row(None, None, None)])
    assert (nothing.forward, nothing.ties, nothing.first_position, nothing.unreadable.value) == (None, None, None, 1)


def scored(scores, lengths=None, prompts=None):
    n = len(scores)
    return [
        Scored(prompt, length, score, "" if score is not None else "no reply readable")
        for prompt, length, score in zip(prompts or ["p"] * n, lengths or range(n), scores, strict=True)
    ]


def test_correlations_equal_scipy_and_a_regression_with_a_mean_of_its_own_for_every_prompt():
    rng = np.random.default_rng(0)
    prompts = [f"p{i}" for i in rng.integers(0, 20, 200)]
    lengths = rng.integers(1, 500, 200)
    scores = np.round(3 + lengths / 200 + rng.normal(0, 1, 200))
    told = audit_scores.audit(scored(list(scores), list(lengths), prompts))
    assert told.length.spearman == pytest.approx(stats.spearmanr(scores, lengths).statistic)
    assert told.length.pearson == pytest.approx(stats.pearsonr(scores, lengths).statistic)
    dummies = np.array([[float(p == name) for name in sorted(set(prompts))] for p in prompts])
    left = [OLS(values, dummies).fit().resid for values in (scores, lengths.astype(float))]
    assert told.length_within.pearson == pytest.approx(stats.pearsonr(*left).statistic)
    [alone] = {told.length_within.spearman for told in [audit_scores.audit(scored(list(scores), list(lengths)))]}
    assert alone == pytest.approx(stats.spearmanr(scores, lengths).statistic)


def test_long_answers_to_hard_prompts_are_no_bias_within_prompts():
    """Between prompts score falls with length; within each, the longer answer scores higher."""
    prompts = [f"p{i}" for i in range(20) for _ in range(2)]
    lengths = [100 * i + k for i in range(20) for k in range(2)]
    scores = [20.0 - i + 0.1 * k for i in range(20) for k in range(2)]
    told = audit_scores.audit(scored(scores, lengths, prompts))
    assert told.length.spearman < -0.9
    assert (told.length_within.spearman, told.length_within.pearson) == (pytest.approx(1), pytest.approx(1))


def test_a_judge_that_says_one_number_and_one_that_says_nothing():
    told = audit_scores.audit(scored([5.0, 5.0, None]))
    assert (told.mean, told.sd, told.ties.value, told.unknown.value) == (5, 0, 1, pytest.approx(1 / 3))
    assert told.reasons == {"no reply readable": 1}
    assert (told.length.spearman, told.length_within.pearson) == (None, None)
    silent = audit_scores.audit(scored([None, None]))
    assert (silent.mean, silent.sd, silent.ties, silent.unknown.value) == (None, None, None, 1)
    assert audit_scores.audit([]).unknown is None


def test_a_judge_asked_twice():
    one = scored([1.0, 2.0, 3.0, None], prompts=["p", "p", "q", "q"])
    assert audit_scores.compare(one, one) == audit_scores.Comparison(
        3, 1, audit.rate([0.0] * 3), 0.0, audit.rate([1.0]), audit.rate([0.0]), None, pytest.approx(1.0)
    )
    again = scored([2.0, 1.0, 3.0, 4.0], prompts=["p", "p", "q", "q"])
    told = audit_scores.compare(one, again)
    assert (told.n, told.unknown, told.mean_difference) == (3, 1, pytest.approx(2 / 3))
    assert (told.differ.value, told.flipped.value, told.order.value) == (pytest.approx(2 / 3), 1, 0)
    with pytest.raises(ValueError, match="different answers"):
        audit_scores.compare(one, scored([1.0] * 4))


def test_a_second_judge():
    """Kappa over better, worse and tie of every two answers to a prompt; Spearman of the scores."""
    rng = np.random.default_rng(1)
    prompts = [f"p{i // 3}" for i in range(60)]
    left = list(np.round(rng.normal(0, 1, 60)))
    right = list(np.round(np.array(left) + rng.normal(0, 1, 60)))
    told = audit_scores.compare(scored(left, prompts=prompts), scored(right, prompts=prompts))
    twos = [(i, j) for i in range(60) for j in range(i + 1, 60) if prompts[i] == prompts[j]]
    table = np.zeros((3, 3))
    for i, j in twos:
        table[int(np.sign(left[i] - left[j])), int(np.sign(right[i] - right[j]))] += 1
    assert told.order.n == len(twos) == 60
    assert told.kappa == pytest.approx(cohens_kappa(table, return_results=False))
    assert told.spearman == pytest.approx(stats.spearmanr(left, right).statistic)


class TestDrift:
    def test_the_chance_is_that_of_all_signs(self):
        before, after = [3.0, 4, 5, 2, 3, 4, 1, 5], [4.0, 4, 4, 4, 5, 5, 1.5, 5]
        difference = np.array(after) - np.array(before)
        signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
        exact = np.mean((signs * difference[:, None]).mean(0) >= difference.mean() - 1e-12)
        told = audit_scores.drift(before, after)
        assert told.p == pytest.approx(exact, abs=1e-12)
        assert told.rise == pytest.approx(difference.mean())
        assert told.effect == pytest.approx(difference.mean() / np.std(before, ddof=1))

    def test_a_false_alarm_is_as_rare_as_the_level(self):
        rng = np.random.default_rng(2)
        alarms = []
        for _ in range(1000):
            truth = rng.normal(3, 1, 10)
            before, after = (list(np.round(truth + rng.normal(0, 0.5, 10))) for _ in range(2))
            alarms.append(audit_scores.drift(before, after, min_effect=0.0).alarm)
        assert np.mean(alarms) <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / 1000)

    def test_leniency_is_an_alarm_and_harshness_is_none(self):
        rng = np.random.default_rng(3)
        before = list(rng.normal(3, 1, 40))
        after = [score + 0.5 + rng.normal(0, 0.3) for score in before]
        assert audit_scores.drift(before, after).alarm is True
        assert audit_scores.drift(after, before).alarm is False

    def test_a_rise_that_is_certain_but_small_is_none(self):
        before = list(np.random.default_rng(4).normal(3, 1, 40))
        told = audit_scores.drift(before, [score + 0.01 for score in before])
        assert told.p < 0.001
        assert told.alarm is False
        assert audit_scores.drift(before, [score + 0.01 for score in before], min_effect=0.0).alarm is True

    def test_no_alarm_can_be_told_from_few_anchors(self):
        told = audit_scores.drift([1.0] * 6, [5.0] * 6)  # 2^-6 > .01
        assert (told.p, told.alarm, told.effect) == (pytest.approx(2**-6), None, None)
        assert audit_scores.drift([1.0] * 7, [5.0] * 7).alarm is True
        assert audit_scores.drift([1.0, None, 2.0], [1.0, 3.0, None]).alarm is None
        assert audit_scores.drift([1.0, None, 2.0, 3.0], [1.0, 3.0, None, 3.0])[:2] == (2, 2)
