"""Alarms: none on a healthy run, the right one on each degenerate one, and never a word about what is unknown."""

import dataclasses
import random
import re
import string

import pytest

from selfimprove import facts
from selfimprove.evaluation import health
from selfimprove.evaluation.round_facts import RoundFacts
from tests import synthetic_run
from tests.synthetic_run import World, healthy_audit, healthy_metrics, sentence

ROUNDS = 3
UNKNOWN = {  # of the healthy run: no encoder, no comparing judge, nothing of M_0, no noise, no gamma-PO
    "prompts: mean cosine", "answers: mean cosine", "judge prefers longer", "judge flips", "KL to M_0", "noise sigma",
    "gamma margins",
}  # fmt: skip


def panel(path, world):
    chosen = synthetic_run.recipe(ROUNDS)
    return {i.name: i for i in health.panel(facts.gather(synthetic_run.write(path, chosen, world, prompts=60), chosen))}


def ringing(found, state="bad"):
    return {name for name, indicator in found.items() if indicator.state == state}


def test_a_healthy_run_rings_nowhere(tmp_path):
    found = panel(tmp_path / "run", World())
    assert ringing(found, "unknown") == UNKNOWN
    assert ringing(found, "watch") | ringing(found) == set()
    assert all(not i.cause and not i.remedy for i in found.values() if i.state == "good")
    assert all(i.cause and not i.remedy for i in found.values() if i.state == "unknown")


def one_answer(rng, t):
    return sentence(rng) if t < ROUNDS else "the same answer to whatever is asked of it"


def looping(rng, t):
    return sentence(rng) if t < ROUNDS else " ".join([sentence(rng, 5)] * 4)


def lenient(t):
    drift = {"effect": 0.9, "alarm": True} if t == ROUNDS else {"effect": 0.0, "alarm": False}
    return healthy_audit(t) | {"drift": drift}


def comparing(t):
    rates = {"flipped": 0.5, "prefers_longer": 0.9, "unreadable": 0.3}
    return {"pairs": {name: {"value": value} for name, value in rates.items()}}


def sinking(t):
    return [
        step | {"logps/chosen_change": -t * 2.5 * k / 20, "rewards/accuracies": 0.4}
        for k, step in enumerate(healthy_metrics(t))
    ]


DEGENERATE = {
    "collapse to one answer": (
        World(answer=one_answer),
        {"answers: distinct bigrams", "answers: self-BLEU", "answers: compression", "samples differ"},
    ),
    "the same prompts again": (
        World(prompt=lambda rng, t: sentence(rng, 12, 2000 if t == 1 else 10), duplicates=lambda t: 100 * t),
        {"prompts: distinct bigrams", "prompts: self-BLEU", "prompts: compression", "duplicate prompts removed"},
    ),
    "answers go in circles": (
        World(answer=looping),
        {"repetition", "answers: compression", "answers: distinct bigrams"},
    ),
    "length blows up": (
        World(
            answer=lambda rng, t: sentence(rng, 20 * (t + 1)),
            cut=lambda rng, t: rng.random() < 0.2 * t,
            chosen_words=lambda t: 20 + 10 * t,
        ),
        {"answer length", "truncated answers", "EOS rate", "chosen / rejected length"},
    ),
    "the policy falls silent": (
        World(answer=lambda rng, t: sentence(rng, 20 if t < ROUNDS else 4), chosen_words=lambda t: 9),
        {"answer length", "chosen / rejected length"},
    ),
    "the gap shrinks": (World(gap=lambda t: 2.0 / t**2), {"score gap"}),
    "pairs run out": (World(pairs=lambda t: 60 // t**2), {"prompts with a pair"}),
    "chosen log-probs fall": (World(metrics=sinking), {"chosen log-probs", "reward accuracy, end"}),
    "a lenient judge": (World(audit=lenient), {"leniency drift"}),
    "a judge that pays for length": (
        World(audit=lambda t: {"scores": {"unknown": {"value": 0.0}, "length_within": {"spearman": 0.7}}}),
        {"score-length correlation"},
    ),
    "a judge of places": (World(audit=comparing), {"judge flips", "judge prefers longer", "unreadable verdicts"}),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_the_right_alarm_rings(tmp_path, case):
    world, expected = DEGENERATE[case]
    found = panel(tmp_path / "run", world)
    assert ringing(found) == expected
    for name in expected:
        assert found[name].cause
        assert found[name].remedy
        assert not re.search(r"[{}]|nan", found[name].cause)


def test_the_state_is_of_the_last_round_and_what_is_relative_needs_two():
    rounds = [RoundFacts(0, answer_tokens=10.0, truncated_share=0.5), RoundFacts(1, answer_tokens=25.0)]
    found = {i.name: i for i in health.panel(rounds)}
    assert found["truncated answers"].state == "bad"  # the last one known
    assert found["truncated answers"].values == {0: 0.5, 1: None}
    assert found["answer length"].state == "bad"
    assert "2.5 times as long" in found["answer length"].cause
    alone = {i.name: i for i in health.panel(rounds[:1])}
    assert (alone["answer length"].state, alone["answer length"].cause) == ("unknown", health.ALONE)
    assert {i.state for i in health.panel([])} == {"unknown"}
    recovered = [*rounds, RoundFacts(2, answer_tokens=11.0, truncated_share=0.0)]
    assert ringing({i.name: i for i in health.panel(recovered)}) == set()


def test_what_is_held_against_something_else_than_the_first_round():
    def state(name, *rounds):
        return next(i.state for i in health.panel(rounds) if i.name == name)

    assert state("KL to M_0", RoundFacts(0, kl=0.0, surprise=10.0), RoundFacts(1, kl=9.0)) == "good"
    assert state("KL to M_0", RoundFacts(0, kl=0.0, surprise=10.0), RoundFacts(1, kl=31.0)) == "bad"
    assert state("KL to M_0", RoundFacts(1, kl=31.0, surprise=10.0)) == "unknown"  # no base: no entropy of its own
    assert state("noise sigma", RoundFacts(1, noise_sigma=1.0, noise_bound=4.0)) == "good"
    assert state("noise sigma", RoundFacts(1, noise_sigma=2.5, noise_bound=4.0)) == "watch"
    assert state("noise sigma", RoundFacts(1, noise_sigma=3.7, noise_bound=4.0)) == "bad"
    assert state("leniency drift", RoundFacts(1, leniency=0.9, lenient=False)) == "good"  # too few to be sure
    assert state("leniency drift", RoundFacts(1, leniency=0.9)) == "unknown"
    assert state("gamma margins", RoundFacts(1, margin_spread=0.001)) == "watch"
    assert state("gamma margins", RoundFacts(1, margin_spread=3.0)) == "watch"
    assert state("reward accuracy, start", RoundFacts(1, accuracy_start=1.0)) == "watch"


class TestTable:
    def test_every_fact_but_the_helpers_is_an_indicator_once(self):
        facts_shown = [rule.fact for rule in health.rules()]
        helpers = {"iteration", "lenient", "noise_bound", "surprise"}
        assert sorted(facts_shown) == sorted(set(RoundFacts._fields) - helpers)

    def test_every_cause_can_be_said_and_every_limit_is_in_order(self):
        for rule in health.rules():
            for limit in rule.limits:
                names = {name for _, name, _, _ in string.Formatter().parse(limit.cause) if name}
                assert names <= {"now", "first", "held"}, rule.name
                if limit.bad is not None:
                    assert (limit.bad >= limit.watch) == (limit.side == "above") or limit.bad == limit.watch
                assert limit.because
                assert limit.remedy

    def test_a_remedy_names_keys_that_a_recipe_has(self):
        from selfimprove import recipe

        for rule in health.rules():
            for limit in rule.limits:
                for key in re.findall(r"\b(?:label|generate|train|evaluate|synthesize|data)(?:\.\w+)+", limit.remedy):
                    recipe._known(key)


def test_the_panel_of_random_facts_is_always_whole():
    rng = random.Random(0)
    fields = [name for name in RoundFacts._fields if name not in ("iteration", "lenient")]
    for _ in range(200):
        rounds = [
            RoundFacts(t, **{name: rng.choice([None, 0.0, rng.uniform(-2, 2)]) for name in fields}) for t in range(4)
        ]
        found = health.panel(rounds)
        assert [i.name for i in found] == [rule.name for rule in health.rules()]
        assert all(bool(i.remedy) == (i.state in ("watch", "bad")) for i in found)
        assert all(bool(i.cause) == (i.state != "good") for i in found)


def test_a_world_is_healthy_by_default():
    """The degenerate worlds differ from the healthy one in what they name, and in nothing else."""
    for world, _ in DEGENERATE.values():
        changed = [f.name for f in dataclasses.fields(World) if getattr(world, f.name) is not f.default]
        assert 1 <= len(changed) <= 3
