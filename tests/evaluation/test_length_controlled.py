"""AlpacaEval 2's published figures, the fit's optimality, and the coverage of its standard error."""

import json

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st

from selfimprove.evaluation import length_controlled as lc
from selfimprove.evaluation.benchmarks import alpaca_lc
from selfimprove.evaluation.soft_logistic import fit, sigmoid
from tests.paths import SHARED

DATA = SHARED / "data" / "alpaca_lc"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data/alpaca_lc is not here")
MODELS = ["FuseChat-Gemma-2-9B-Instruct", "FuseChat-Llama-3.2-1B-Instruct", "gpt4_gamed", "claude-2.1", "alpaca-7b", "gpt35_turbo_instruct"]  # fmt: skip  # noqa: E501


def published(model):
    return json.loads((DATA / "public" / "published.json").read_text())[model]


def rows_of(model):
    judged = alpaca_lc.read_judged(DATA / "public" / f"{model}.jsonl")
    difficulty = alpaca_lc.read_difficulty(DATA / "instruction_difficulty.csv")
    gamma = np.array([difficulty[i] for i in range(len(judged.indices))])  # by place, as published
    delta = np.array(judged.len_1, dtype=float) - judged.len_2
    gamed = alpaca_lc.read_gamed(DATA / "gamed_baseline.csv").rows
    return judged, lc.Rows(delta, lc.chance(judged.preference), gamma), gamed


@needs_data
class TestPublished:
    @pytest.mark.parametrize("model", MODELS)
    def test_raw_figures_are_exact(self, model):
        found = lc.raw_win_rate(rows_of(model)[0].preference)._asdict()
        for name, value in found.items():
            assert value == pytest.approx(published(model)["published"][name], abs=1e-9), name

    @pytest.mark.parametrize("model", MODELS)
    def test_at_the_published_c(self, model):
        _, rows, gamed = rows_of(model)
        told = published(model)
        found = lc.length_controlled(rows, gamed, told["published_C"])
        assert found.win_rate == pytest.approx(told["published"]["length_controlled_winrate"], abs=0.02)
        stopped_early = told["reproduced"]["exact_optimum_at_published_C_minus_published"]
        gap = found.win_rate - told["published"]["length_controlled_winrate"]
        assert gap == pytest.approx(stopped_early, abs=1e-5)  # so liblinear's early stop is all that is between
        if told["published"]["lc_standard_error"]:
            assert found.prediction_spread == pytest.approx(told["published"]["lc_standard_error"], abs=1e-3)

    @pytest.mark.parametrize("model", MODELS)
    def test_with_its_own_c(self, model):
        _, rows, gamed = rows_of(model)
        told = published(model)["published"]["length_controlled_winrate"]
        assert lc.length_controlled(rows, gamed).win_rate == pytest.approx(told, abs=0.15)

    def test_without_gamed_rows_a_gamed_model_is_thirteen_points_off(self):
        _, rows, _ = rows_of("gpt4_gamed")
        told = published("gpt4_gamed")
        off = lc.length_controlled(rows, c=1e6).win_rate - told["published"]["length_controlled_winrate"]
        assert off == pytest.approx(told["reproduced"]["unregularised_minus_published"], abs=0.02)

    def test_difficulties_joined_by_index(self):
        """evaluation.md, A.6: the published 17.73 of a model with a hole comes from a join by place; it is 14.96."""
        _, rows, gamed = rows_of("gpt35_turbo_instruct")
        hole = published("gpt35_turbo_instruct")["missing_eval_set_indices"]
        difficulty = alpaca_lc.read_difficulty(DATA / "instruction_difficulty.csv")
        gamma = np.array([difficulty[i] for i in sorted(difficulty) if i not in hole])
        assert lc.length_controlled(rows._replace(gamma=gamma), gamed).win_rate == pytest.approx(14.96, abs=0.01)

    @pytest.mark.parametrize(
        ("model", "error"),
        [("FuseChat-Gemma-2-9B-Instruct", 1.37), ("claude-2.1", 1.74), ("alpaca-7b", 1.01), ("gpt4_gamed", 2.16)],
    )
    def test_bootstrap_errors(self, model, error):
        """Of evaluation.md, A.6, from 300 resamples, whose own error is 4 %."""
        _, rows, gamed = rows_of(model)
        found = lc.bootstrap(rows, gamed, published(model)["published_C"], 600)
        assert found.standard_error == pytest.approx(error, rel=0.1)


def some_rows(rng, n, *, gamma=True):
    difficulty = rng.normal(0, 1, n)
    delta = rng.normal(-200, 400, n)
    q = sigmoid(-0.6 - 1.2 * np.tanh(delta / 400) + 0.7 * difficulty * gamma)
    return lc.Rows(delta, rng.beta(2 * q, 2 * (1 - q)), difficulty if gamma else None)


def test_without_a_penalty_the_fit_is_that_of_statsmodels():
    rng = np.random.default_rng(0)
    x, p, weight = rng.normal(size=(200, 3)), rng.random(200), rng.random(200) * 2
    reference = sm.GLM(p, x, family=sm.families.Binomial(), var_weights=weight).fit(tol=1e-12)
    found = fit(x[None], p, weight[None], 1e12)[0]
    assert found == pytest.approx(reference.params, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-4, 0.05, 0.3, 1.0, 20.0, 1e4]))
def test_the_fit_is_the_optimum(seed, c):
    """The subgradient conditions of the penalised problem, for four weightings at once."""
    rng = np.random.default_rng(seed)
    x, p, weight = rng.normal(size=(4, 40, 3)), rng.random(40), rng.integers(0, 3, (4, 40)).astype(float)
    weight[:, 0] = 1
    b = fit(x, p, weight, c)
    z = np.einsum("bnk,bk->bn", x, b)
    gradient = np.einsum("bn,bnk->bk", weight * (sigmoid(z) - p), x)
    assert (np.abs(gradient[b == 0]) <= 1 / c + 1e-6).all()
    assert gradient[b != 0] == pytest.approx(-np.sign(b[b != 0]) / c, abs=1e-5)


@pytest.mark.parametrize("c", [1e-3, 3.0, 1e4])
@pytest.mark.parametrize("labels", ["length", "won", "lost"])
def test_separable_rows_have_an_optimum(labels, c):
    """The penalty alone holds the coefficients; resamples may have no spread of length at all."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        delta = rng.integers(-3000, 3000, 12) * (rng.random(12) < 0.7).astype(float)
        p = {"length": (delta > 0).astype(float), "won": np.ones(12), "lost": np.zeros(12)}[labels]
        rows = lc.Rows(delta, p, rng.normal(0, 1, 12))
        found = lc.bootstrap(rows, None, c, 20, seed)
        assert 0 <= found.low <= found.high <= 100


def test_the_minimal_variant_takes_length_out():
    """Half of the prompts with longer answers that win for their length, half with shorter ones: even at one length."""
    rng = np.random.default_rng(3)
    delta = rng.normal(-300, 400, 20_000)
    q = sigmoid(-2 * np.tanh(delta / delta.std(ddof=1)))
    rows = lc.Rows(delta, (rng.random(len(q)) < q).astype(float), None)
    found = lc.length_controlled(rows)
    assert 100 * rows.p.mean() > 60
    assert found.win_rate == pytest.approx(50, abs=1.5)
    assert len(found.coefficients) == 2


def test_a_model_against_itself_is_even():
    rows = lc.Rows(np.zeros(50), np.full(50, 0.5), np.linspace(-1, 1, 50))
    assert lc.length_controlled(rows).win_rate == pytest.approx(50, abs=1e-6)


def test_unreadable_preferences_are_no_ties():
    preference = np.array([0, 1.5, 1, 2, np.nan, 2.5, -1, 1.9])
    found = lc.raw_win_rate(preference)
    assert (found.n_total, found.n_draws, found.n_wins, found.n_wins_base) == (5, 2, 2, 1)
    assert found.win_rate == pytest.approx(100 * (0.5 + 0.5 + 0 + 1 + 0.9) / 5)
    assert found.discrete_win_rate == pytest.approx(60)
    rows = some_rows(np.random.default_rng(1), 300)
    holed = rows._replace(p=np.where(np.arange(300) < 30, np.nan, rows.p))
    cut = lc.Rows(rows.delta[30:], rows.p[30:], rows.gamma[30:])
    # not in the fit, but in the scale of lengths and in the mean: near, and not the same
    assert lc.length_controlled(holed).win_rate == pytest.approx(lc.length_controlled(cut).win_rate, abs=2)


def test_what_cannot_be_fitted_is_told():
    with pytest.raises(ValueError, match="same length"):
        lc.length_controlled(lc.Rows(np.full(5, 7.0), np.full(5, 0.5), None))
    with pytest.raises(ValueError, match="needs a preference"):
        lc.length_controlled(lc.Rows(np.arange(5.0), np.full(5, np.nan), None))
    with pytest.raises(ValueError, match="needs a preference"):
        lc.raw_win_rate(np.array([np.nan]))
    with pytest.raises(ValueError, match="needs 5 rows"):
        lc.length_controlled(lc.Rows(np.arange(4.0), np.full(4, 0.5), None))
    gamed = lc.Gamed(np.ones(2), np.ones(2), np.ones(2), 1)
    with pytest.raises(ValueError, match="gamma"):
        lc.length_controlled(lc.Rows(np.arange(5.0), np.full(5, 0.5), None), gamed)


def test_resamples_are_seeded_and_chunks_change_nothing(monkeypatch):
    rows = some_rows(np.random.default_rng(2), 60)
    whole = lc.bootstrap(rows, None, 10.0, 50, seed=4)
    assert lc.bootstrap(rows, None, 10.0, 50, seed=5) != whole
    monkeypatch.setattr(lc, "CHUNK", 1000)
    assert lc.bootstrap(rows, None, 10.0, 50, seed=4) == pytest.approx(whole, abs=1e-7)


def test_the_standard_error_covers_the_truth_about_95_times_in_100():
    """2,000 experiments of 80 prompts; the truth is the figure of a very large one."""
    rng = np.random.default_rng(0)
    truth = lc.length_controlled(some_rows(rng, 400_000), None, 100.0).win_rate
    covered = []
    for seed in range(2000):
        rows = some_rows(rng, 80)
        found = lc.length_controlled(rows, None, 100.0).win_rate
        error = lc.bootstrap(rows, None, 100.0, 50, seed).standard_error
        covered.append(abs(found - truth) <= 1.96 * error)
    assert 0.93 <= np.mean(covered) <= 0.97
