"""The gate's rule: what it decides and says, and how often it errs over whole runs."""

import json

import numpy as np
import pytest
from scipy import stats

from selfimprove import recipe
from selfimprove.evaluation.gate import decide

HEALTHY = {"truncated_share": 0.0, "length_ratio": 1.0, "diversity_ratio": 1.0}


def scores(values, prefix="p"):
    return {f"{prefix}{i}": float(value) for i, value in enumerate(values)}


def gate(new, best, greedy=((1, 0) * 100, (1, 0) * 100), iteration=1, health=HEALTHY, idle=0, **settings):
    """Decide on these sampled scores, by default with greedy ones that stay."""
    return decide(
        {"sampled": scores(new), "greedy": scores(greedy[0])},
        {"sampled": scores(best), "greedy": scores(greedy[1])},
        recipe.Gate(**settings),
        iteration,
        health,
        idle,
    )


LOW, HIGH = [0.25, 0.5] * 100, [0.5, 0.5] * 100  # 12.5 points between them, on 200 prompts


def test_a_sure_gain_is_promoted():
    found = gate(HIGH, LOW)
    assert (found.decision, found.stop) == ("promote", False)
    assert found.primary["difference"] == pytest.approx(0.125)
    assert 0 < found.primary["low"] < 0.125 < found.primary["high"]
    assert (found.primary["level"], found.primary["n"]) == (0.025, 200)
    assert found.guards["greedy"]["n"] == 200
    assert all(held["ok"] for held in found.health.values())
    said = "Sampled against the best: +12.5 points (95 %: +9.9 to +15.1, 200 prompts)"
    assert found.reasons == [f"{said}: surely a gain of more than 0."]


def test_a_sure_loss_is_rolled_back_or_not_as_the_recipe_says():
    found = gate(LOW, HIGH)
    assert found.decision == "roll back"
    assert "surely worse" in found.reasons[0]
    kept = gate(LOW, HIGH, roll_back=False)
    assert kept.decision == "keep"
    assert "gate.roll_back is off" in kept.reasons[-1]
    assert gate(LOW, HIGH, max_drop=0.2).decision == "keep"


@pytest.mark.parametrize(("moved", "decision"), [(7, "keep"), (20, "promote")])
def test_it_takes_more_than_a_few_prompts(moved, decision):
    found = gate([0.5] * moved + [0.25] * 200, [0.25] * (moved + 200))
    assert found.decision == decision


def test_no_change_is_kept():
    found = gate(LOW, LOW)
    assert found.decision == "keep"
    assert (found.primary["difference"], found.primary["low"] < 0 < found.primary["high"]) == (0.0, True)
    assert "no gain above 0 that could be told" in found.reasons[0]


def test_the_gain_must_be_what_the_recipe_asks():
    assert gate(HIGH, LOW, min_gain=0.08).decision == "promote"
    found = gate(HIGH, LOW, min_gain=0.11)
    assert found.decision == "keep"
    assert found.primary["mde"] > 0.11
    assert "no gain above 11 that could be told" in found.reasons[0]


def test_the_bounds_are_wider_the_later_the_round():
    one, ten = gate(HIGH, LOW, iteration=1).primary, gate(HIGH, LOW, iteration=10).primary
    assert (one["level"], ten["level"]) == (0.05 / 2, 0.05 / 110)
    reference = stats.ttest_rel(HIGH, LOW).confidence_interval(1 - 0.1 / 110)  # a bound at that level on each side
    assert ten["low"] <= reference.low < one["low"]
    assert ten["mde"] > one["mde"]
    with pytest.raises(ValueError, match="round"):
        gate(HIGH, LOW, iteration=0)


def test_a_small_sure_gain_is_said_to_look_large():
    found = gate([0.5] * 70 + [0.0] * 40 + [0.25] * 290, [0.25] * 400)
    assert found.decision == "promote"
    assert found.primary["difference"] < found.primary["mde"]
    assert "probably looks larger than it is" in found.reasons[0]


class TestGuards:
    fell = ((0,) * 30 + (1,) * 170, (1,) * 200)

    def test_a_guard_that_fell_stops_a_promotion_and_rolls_back(self):
        found = gate(HIGH, LOW, greedy=self.fell)
        assert found.decision == "roll back"
        assert any(reason.startswith("Greedy against the best: -15.0 points") for reason in found.reasons)
        assert gate(HIGH, LOW, greedy=self.fell, roll_back=False).decision == "keep"

    def test_a_fall_that_is_allowed_or_may_be_chance_stops_nothing(self):
        assert gate(HIGH, LOW, greedy=self.fell, max_drop=0.15).decision == "promote"
        chance = ((0,) * 4 + (1,) * 196, (1,) * 200)
        assert gate(HIGH, LOW, greedy=chance).decision == "promote"

    def test_no_guards_no_look(self):
        assert gate(HIGH, LOW, greedy=self.fell, guards=[]).decision == "promote"

    def test_an_unmeasured_guard_stops_a_promotion(self):
        found = gate(HIGH, LOW, greedy=((), ()))
        assert (found.decision, found.guards["greedy"]["low"]) == ("keep", None)
        assert any("Greedy is unknown" in reason for reason in found.reasons)

    def test_the_primary_guards_itself(self):
        found = gate(HIGH, LOW, guards=["sampled", "greedy", "greedy"])
        assert (found.decision, list(found.guards)) == ("promote", ["greedy"])


class TestHealth:
    @pytest.mark.parametrize(
        ("name", "value"), [("truncated_share", 0.11), ("length_ratio", 2.01), ("diversity_ratio", 0.49)]
    )
    def test_a_broken_limit_rolls_back(self, name, value):
        found = gate(HIGH, LOW, health=HEALTHY | {name: value})
        assert found.decision == "roll back"
        assert found.health[name]["ok"] is False
        spoken = name.replace("_", " ").capitalize()
        assert f"{spoken} is {value}, beyond the limit of {found.health[name]['limit']:g}." in found.reasons
        assert gate(HIGH, LOW, health=HEALTHY | {name: value}, roll_back=False).decision == "keep"
        unset = {f"{'min' if name.startswith('div') else 'max'}_{name}": None}
        assert gate(HIGH, LOW, health=HEALTHY | {name: value}, limits=unset).decision == "promote"

    def test_at_the_limit_is_within(self):
        health = {"truncated_share": 0.1, "length_ratio": 2.0, "diversity_ratio": 0.5}
        assert gate(HIGH, LOW, health=health).decision == "promote"

    @pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "absent"])
    def test_unknown_is_never_passed_in_silence(self, value):
        health = {k: v for k, v in (HEALTHY | {"length_ratio": value}).items() if v != "absent"}
        found = gate(HIGH, LOW, health=health)
        assert found.decision == "keep"
        assert found.health["length_ratio"] == {"value": None, "limit": 2.0, "ok": None}
        assert "Length ratio is unknown, and nothing unknown is promoted." in found.reasons
        assert gate(LOW, HIGH, health=health).decision == "roll back"


class TestPrompts:
    def test_only_shared_prompts_count_and_the_others_are_told(self):
        new = {"sampled": scores(HIGH), "greedy": scores(LOW)}
        best = {"sampled": scores(LOW[:150]) | scores([1.0] * 20, prefix="gone"), "greedy": scores(LOW)}
        found = decide(new, best, recipe.Gate(), 4, HEALTHY)
        assert (found.decision, found.primary["n"]) == ("promote", 150)
        assert "Sampled: 70 of 220 prompts lack a score in one of the rounds and do not count." in found.reasons

    def test_a_score_that_is_no_number_is_missing(self):
        for hole in (float("nan"), None):
            new = {"sampled": scores(HIGH) | {"p0": hole, "p1": hole}, "greedy": scores(LOW)}
            found = decide(new, {"sampled": scores(LOW), "greedy": scores(LOW)}, recipe.Gate(), 4, HEALTHY)
            assert found.primary["n"] == 198
            assert any("2 of 200" in reason for reason in found.reasons)

    @pytest.mark.parametrize("n", [0, 1])
    def test_one_prompt_or_none_tells_nothing(self, n):
        found = gate([1.0] * n, [0.0] * n)
        assert (found.decision, found.primary["n"]) == ("keep", n)
        assert all(found.primary[key] is None for key in ("difference", "low", "high", "mde"))
        assert found.reasons[0] == f"Sampled is unknown: prompts scored in both rounds: {n}; it takes two."

    def test_a_metric_nobody_measured(self):
        found = decide({}, {}, recipe.Gate(), 4, HEALTHY)
        assert (found.decision, found.primary["n"]) == ("keep", 0)

    @pytest.mark.parametrize("n", [2, 3, 5])
    def test_a_few_prompts_promote_nothing_even_if_all_are_won(self, n):
        assert gate([1.0] * n, [0.0] * n).decision == "keep"

    def test_the_order_of_prompts_means_nothing(self):
        rng = np.random.default_rng(1)
        new, best = scores(rng.random(50)), scores(rng.random(50))
        turned = dict(reversed(best.items()))
        found = [decide({"sampled": new}, {"sampled": b}, recipe.Gate(guards=[]), 4, HEALTHY) for b in (best, turned)]
        assert found[0] == found[1]


@pytest.mark.parametrize(("idle", "patience", "stop"), [(0, 1, True), (0, 2, False), (1, 2, True), (9, None, False)])
def test_patience_ends(idle, patience, stop):
    found = gate(LOW, LOW, idle=idle, patience=patience)
    assert found.stop is stop
    assert any("patience" in reason for reason in found.reasons) is stop
    assert gate(HIGH, LOW, idle=idle, patience=patience).stop is False


def test_a_decision_is_plain_json():
    found = gate([1.0], [0.0], greedy=((), ()), health={})._asdict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# --- whole runs --------------------------------------------------------------------------------------------------


def first_promotions(runs, rounds, n, seed, metric="sampled", redrawn=0.0, gain=0.0):
    """The round (from 1; 0 = never) in which each of many runs first promotes.

    Prompts differ in difficulty. A round changes that of a share `redrawn` of them, and raises all by what makes `gain`
    on average; half of the greedy answers stay the base's wherever the difficulty does.
    """
    rng = np.random.default_rng(seed)
    rule = recipe.Gate(metric=metric, guards=["greedy" if metric == "sampled" else "sampled"])
    ids, found = [f"p{i}" for i in range(n)], []
    for _ in range(runs):
        base = rng.beta(0.8, 0.8, n)
        stays = rng.random(n) < base
        best = {
            "sampled": dict(zip(ids, (rng.binomial(4, base) / 4).tolist(), strict=True)),
            "greedy": dict(zip(ids, stays.astype(float).tolist(), strict=True)),
        }
        promoted = 0
        for number in range(1, rounds + 1):
            other = rng.random(n) < redrawn
            skill = np.where(other, rng.beta(0.8, 0.8, n), base)
            skill += 2 * gain * (1 - skill)  # half of the way is open, on average
            greedy = np.where(other | (rng.random(n) < 0.5), rng.random(n) < skill, stays)
            new = {
                "sampled": dict(zip(ids, (rng.binomial(4, skill) / 4).tolist(), strict=True)),
                "greedy": dict(zip(ids, greedy.astype(float).tolist(), strict=True)),
            }
            if decide(new, best, rule, number, HEALTHY).decision == "promote":
                promoted = number
                break
        found.append(promoted)
    return np.array(found)


@pytest.mark.parametrize(
    ("rounds", "metric", "redrawn"), [(4, "sampled", 0.0), (4, "greedy", 0.2), (10, "sampled", 0.2)]
)
def test_a_run_without_any_gain_rarely_promotes_anything(rounds, metric, redrawn):
    """Same skill, or another skill that is no better on average: 5 in 100 runs at the most."""
    assert np.mean(first_promotions(2_000, rounds, 100, seed=rounds, metric=metric, redrawn=redrawn) > 0) <= 0.05


def test_a_gain_of_five_points_is_mostly_promoted_on_650_prompts():
    assert np.mean(first_promotions(100, 1, 650, seed=2, redrawn=0.1, gain=0.05) == 1) > 0.5
