"""Arena-Hard's published ratings, statsmodels' of a round robin, limits without a maximum, and style control."""

import itertools
import json

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.special import expit

from selfimprove.evaluation import bradley_terry as bt
from selfimprove.evaluation import style
from selfimprove.evaluation.bradley_terry import Battle
from tests.paths import SHARED

DATA = SHARED / "data" / "arena_hard" / "public"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data/arena_hard is not here")

# lmarena/arena-hard-auto @ 57a9881 (Apache-2.0), data/arena_hard_battles.jsonl: won, lost, drawn against
# claude-3-haiku; Elo and win rate by that commit's own program.
OFFICIAL = {
    "claude-3-5-sonnet-20240620": (414, 38, 8, 1399.170798871745, 90.8695653282374),
    "claude-3-opus-20240229": (341, 70, 9, 1266.5167122604448, 82.26190481865913),
    "gpt-4o": (423, 39, 6, 1402.4641251694547, 91.02564110499594),
}
HAIKU = "claude-3-haiku-20240307"


def test_official_figures():
    battles = []
    for model, (won, lost, drawn, _, _) in OFFICIAL.items():
        winners = ["second"] * won + ["first"] * lost + ["tie"] * drawn
        battles += [Battle(str(i), HAIKU, model, winner) for i, winner in enumerate(winners)]
    found = bt.rate(battles, HAIKU, resamples=2)
    for model, (*_, elo, win_rate) in OFFICIAL.items():
        assert found[model].elo == pytest.approx(elo, abs=1e-6)
        assert found[model].win_rate == pytest.approx(win_rate, abs=1e-6)
    assert (found[HAIKU].elo, found[HAIKU].win_rate, found[HAIKU].battles) == (1000.0, 50.0, 1348)


@needs_data
def test_official_figures_of_the_battles_themselves():
    winners = {"model_a": "first", "model_b": "second", "tie": "tie"}
    told = json.loads((DATA / "battles_57a9881_expected.json").read_text())
    rows = [json.loads(line) for line in (DATA / "battles_57a9881.jsonl").open()]
    battles = [Battle(str(r["question_id"]), r["model_a"], r["model_b"], winners[r["winner"]]) for r in rows]
    found = bt.rate(battles, HAIKU, resamples=200)
    assert len(found) == len(told["elo_official"]) == 4
    for model, elo in told["elo_official"].items():
        assert found[model].elo == pytest.approx(elo, abs=1e-6)
        assert found[model].win_rate == pytest.approx(told["winrate_official"][model], abs=1e-6)
        if model != HAIKU:
            assert found[model].win_rate == pytest.approx(told["winrate_closed_form"][model], abs=1e-6)
            assert found[model].low < found[model].win_rate < found[model].high


def round_robin(rng, skills, questions, each=1):
    names = list(skills)
    battles = []
    for question in range(questions):
        for a, b in itertools.combinations(names, 2):
            for _ in range(each):
                draw = rng.random()
                chance = expit(skills[a] - skills[b])
                winner = "tie" if draw < 0.1 else "first" if rng.random() < chance else "second"
                battles.append(Battle(str(question), a, b, winner))
    return battles


def test_a_round_robin_is_rated_as_by_statsmodels():
    battles = round_robin(np.random.default_rng(0), {"a": 0.0, "b": 0.7, "c": -0.4, "d": 1.2}, 60)
    names = bt.models(battles)
    x = np.zeros((len(battles), len(names)))
    for row, battle in enumerate(battles):
        x[row, names.index(battle.first)], x[row, names.index(battle.second)] = 1, -1
    y = [bt.WORTH[battle.winner] for battle in battles]
    keep = [i for i, name in enumerate(names) if name != "b"]
    reference = sm.GLM(y, x[:, keep], family=sm.families.Binomial()).fit(tol=1e-12).params
    found = bt.rate(battles, "b", resamples=20)
    for i, logit in zip(keep, reference, strict=True):
        assert found[names[i]].elo == pytest.approx(1000 + 400 * logit / np.log(10), abs=1e-3)
        assert found[names[i]].win_rate == pytest.approx(100 * expit(logit), abs=1e-5)


def test_where_nobody_loses_there_is_a_limit_and_no_elo():
    battles = [
        Battle("1", "base", "best", "second"),
        Battle("1", "base", "worst", "first"),
        Battle("1", "base", "even", "tie"),
        Battle("2", "worst", "last", "first"),
        Battle("2", "lone", "other", "tie"),
    ]
    found = bt.rate(battles, "base", resamples=20)
    assert (found["best"].win_rate, found["best"].elo) == (100.0, None)
    assert (found["worst"].win_rate, found["worst"].elo) == (0.0, None)
    assert (found["last"].win_rate, found["last"].elo) == (0.0, None)
    assert found["even"].win_rate == pytest.approx(50)
    assert found["lone"] == found["other"] == bt.Rating(None, None, None, None, 1)


def test_battles_of_one_question_hang_together():
    """Three copies of every battle say nothing new: the interval stays as wide (upstream's shrinks by sqrt 3)."""
    rng = np.random.default_rng(1)
    battles = [Battle(str(i), "base", "model", "second" if rng.random() < 0.6 else "first") for i in range(200)]
    one, three = (bt.rate(some, "base", resamples=300)["model"] for some in (battles, battles * 3))
    assert (three.low, three.high) == (pytest.approx(one.low, abs=1e-4), pytest.approx(one.high, abs=1e-4))


def test_the_interval_covers_the_truth_about_95_times_in_100():
    """2,000 experiments of 80 questions, each with two battles that share its difficulty."""
    rng = np.random.default_rng(2)
    covered = []
    chances = rng.beta(0.65 * 4, 0.35 * 4, size=(2000, 80))
    outcomes = rng.random((2000, 80, 2)) < chances[..., None]
    for seed, experiment in enumerate(outcomes):
        draws = np.random.default_rng(seed).multinomial(80, np.full(80, 1 / 80), 300)
        rates = draws @ experiment.mean(axis=1) / 80  # of two models: the win rate itself
        low, high = np.percentile(100 * rates, [2.5, 97.5])
        covered.append(low <= 65 <= high)
        if seed < 5:
            battles = [
                Battle(str(question), "base", "m", "second" if won else "first")
                for question, two in enumerate(experiment)
                for won in two
            ]
            found = bt.rate(battles, "base", 300, seed)["m"]
            assert (found.low, found.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    assert 0.93 <= np.mean(covered) <= 0.97


def test_two_games_in_swapped_order():
    found = bt.battles_of_games("7", "base", "model", ["A>>B", "A>B"])
    assert found == [Battle("7", "base", "model", "first")] * 3 + [Battle("7", "base", "model", "second")]
    assert bt.battles_of_games("7", "base", "model", [None, "A=B"]) == [Battle("7", "base", "model", "tie")]
    assert bt.battles_of_games("7", "base", "model", ["B>>A", "B>A"]) == [
        *[Battle("7", "base", "model", "second")] * 3,
        Battle("7", "base", "model", "first"),
    ]


class TestStyle:
    def biased(self, rng, n=3000):
        """A model as good as the baseline, whose answers are longer, before a judge that likes length."""
        battles, differences = [], []
        for i in range(n):
            mine, theirs = int(rng.lognormal(6.3, 0.5)), int(rng.lognormal(6.0, 0.5))
            told = style.difference(style.Style(theirs, 1, 2, 0), style.Style(mine, 2, 2, 1))
            chance = expit(-3 * told[0])
            battles.append(Battle(str(i), "base", "model", "second" if rng.random() < chance else "first"))
            differences.append(told)
        return battles, differences

    @pytest.mark.parametrize("control", ["length", "markdown", "both"])
    def test_the_fit_is_that_of_statsmodels(self, control):
        rng = np.random.default_rng(0)
        battles = round_robin(rng, {"base": 0.0, "m": 0.5, "n": -0.3}, 150)
        differences = [tuple(rng.normal(0, 0.2, 4)) for _ in battles]
        found = style.controlled(battles, differences, "base", control, resamples=10)
        columns = style.COLUMNS[control]
        x, y, told = np.zeros((len(battles), 2)), [], []
        for row, (battle, difference) in enumerate(zip(battles, differences, strict=True)):
            side = -1 if battle.first == "base" else 1  # seen from the model
            for name, sign in ((battle.first, 1), (battle.second, -1)):
                if name != "base":
                    x[row, ["m", "n"].index(name)] = sign * side
            worth = bt.WORTH[battle.winner]
            y.append(worth if side == 1 else 1 - worth)
            told.append(side * np.array(difference)[columns])
        z = (np.array(told) - np.mean(told, axis=0)) / np.std(told, axis=0, ddof=1)
        reference = sm.GLM(y, np.hstack([x, z]), family=sm.families.Binomial()).fit(tol=1e-12).params
        assert found.ratings["m"].win_rate == pytest.approx(100 * expit(reference[0]), abs=1e-6)
        assert found.ratings["n"].win_rate == pytest.approx(100 * expit(reference[1]), abs=1e-6)
        assert found.coefficients == pytest.approx(reference[2:], abs=1e-7)
        assert (
            len(found.coefficients) == {"length": 1, "markdown": 3, "both": 4}[control]
        )  # upstream cuts models instead

    def test_length_explains_what_length_has_won(self):
        battles, differences = self.biased(np.random.default_rng(1))
        raw = bt.rate(battles, "base", resamples=2)["model"].win_rate
        found = style.controlled(battles, differences, "base", "length", resamples=5)
        assert raw > 57
        # at the mean difference the model keeps what its mean length wins; the coefficient says that it is even at none
        mean, spread = (getattr(np, f)([-d[0] for d in differences]) for f in ("mean", "std"))
        at_equal = np.log(found.ratings["model"].win_rate / (100 - found.ratings["model"].win_rate))
        assert 100 * expit(at_equal - found.coefficients[0] * mean / spread) == pytest.approx(50, abs=2)
        assert found.coefficients[0] / spread == pytest.approx(3, abs=0.3)

    def test_copies_of_a_strong_verdict_do_not_narrow_the_interval(self):
        battles, differences = self.biased(np.random.default_rng(2), 150)
        one = style.controlled(battles, differences, "base", "both", resamples=60).ratings["model"]
        three = style.controlled(battles * 3, differences * 3, "base", "both", resamples=60).ratings["model"]
        assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.02)

    def test_no_maximum_is_none(self):
        battles = [Battle(str(i), "base", "m", "second" if i % 2 else "first") for i in range(20)]
        apart = [(-0.5, 0, 0, 0) if i % 2 else (0.5, 0, 0, 0) for i in range(20)]
        found = style.controlled(battles, apart, "base", "length")
        assert (found.coefficients, found.ratings["m"].win_rate) == (None, None)
        beaten = style.controlled([Battle("1", "base", "m", "first")], [(0.1, 0, 0, 0)], "base", "both")
        assert beaten.ratings["m"] == bt.Rating(None, None, None, None, 1)

    def test_counts(self):
        text = "# One\n## Two\n\n1. a\n2. b\n - c\n* d\n\n**bold** and __bold__ and **bold\n** no\n"
        text += "```\n# no\n- no\n```\n####### seven"
        assert style.style(text, 40) == style.Style(40, 2, 4, 2)

    def test_differences(self):
        found = style.difference(style.Style(30, 4, 0, 2), style.Style(10, 0, 0, 2))
        a, b = 2 / 31, 2 / 11
        assert found == pytest.approx((0.5, (4 / 31) / (4 / 31 + 1), 0, (a - b) / (a + b + 1)))
        assert style.difference(style.Style(0, 0, 0, 0), style.Style(0, 0, 0, 0)) == (0, 0, 0, 0)
