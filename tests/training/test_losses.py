"""Losses: reference values (tests/check_loss_vectors.py has them all), properties, states, and what is refused."""

import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from selfimprove.errors import UserError
from selfimprove.recipe import Choice
from selfimprove.training import coupling, losses
from tests import check_loss_vectors

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "loss_vectors.json").read_text())
STATEFUL = {
    "gamma_simpo": {"beta": 3.0},
    "gamma_dpo": {"beta": 0.2, "tau": 2.0},
    "beta_dpo": {"filtered": 0.4},
    "bco": {"beta": 0.3},
}


def _quantities(pairs=8, seed=0, dtype=torch.float64):
    """Random quantities with every input that a loss may need."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=5.0, mean=0.0):
        return (mean + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    base = draw(2, pairs, scale=20.0, mean=-80.0)
    policy, reference, second = (base + draw(2, pairs) for _ in range(3))
    return losses.Quantities(
        *(row.clone().requires_grad_() for row in policy),
        *reference,
        *torch.randint(5, 60, (2, pairs), generator=generator),
        *second,
        *torch.rand(3, pairs, generator=generator, dtype=torch.float64).to(dtype),
        *draw(2, pairs, scale=0.5),
        *draw(2, 2 * pairs),
    )


def _section(*loss, references=()):
    """A recipe's [train], as far as a loss looks at it."""
    choices = [Choice(**entry) for entry in loss]
    return SimpleNamespace(loss=choices[0] if len(choices) == 1 else choices, references=references)


def _of(*loss, references=("initial", "previous"), seed=0):
    needed = max(losses.LOSSES[entry["name"]].references for entry in loss)
    return losses.of(_section(*loss, references=references[:needed]), seed)


def _value(bound, q):
    return bound.function(q if bound.state is None else bound.state.before(q))


def _tensors(q):
    """All that a state filled, a mix's members included."""
    return [x for part in (q, *q.members) for x in part if torch.is_tensor(x)]


# Reference values


def test_every_loss_has_a_reference_value():
    """That they agree is tests/test_check_loss_vectors.py; SFT's stands in the file's token-level section."""
    found = {check_loss_vectors.ours(case) for case in VECTORS["cases"]}
    assert {f.func for f in found} | {losses.sft} == {spec.function for spec in losses.LOSSES.values()}


def test_sft_is_the_negative_log_likelihood_per_token():
    expected = VECTORS["token_level"]["expected"]
    chosen, rejected = (torch.tensor(x).double() for x in (expected["sum_logps"][:4], expected["sum_logps"][4:]))
    q = losses.Quantities(chosen, rejected, None, None, *torch.tensor(expected["lengths"]).chunk(2))
    torch.testing.assert_close(losses.sft(q), -torch.tensor(expected["avg_logps"][:4]).double())
    batch = losses.sft(q, nll="batch").mean().item()
    assert batch == pytest.approx(expected["nll_batch_token_mean_completion_only"], rel=1e-6)


# Properties


def test_dpo_at_policy_equal_reference_is_log_2():
    q = _quantities()
    same = q._replace(reference_chosen_logps=q.policy_chosen_logps, reference_rejected_logps=q.policy_rejected_logps)
    torch.testing.assert_close(losses.dpo(same, beta=0.3), torch.full((8,), math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("function", [losses.simpo, losses.rpo, losses.cpo, losses.arpo])
@pytest.mark.parametrize("nll", ["example", "batch"])
def test_nll_weight_adds_the_chosen_answers_negative_log_likelihood_per_token(function, nll):
    q = _quantities()
    added = (function(q, nll_weight=0.5, nll=nll) - function(q, nll_weight=0.0, nll=nll)).mean()
    batch = -q.policy_chosen_logps.sum() / q.chosen_tokens.sum()
    example = (-q.policy_chosen_logps / q.chosen_tokens).mean()
    torch.testing.assert_close(added, 0.5 * {"example": example, "batch": batch}[nll])


@pytest.mark.parametrize("name", losses.LOSSES)
def test_extreme_margins_stay_finite_in_float32(name):
    """Log-ratios of 2,000 nats both ways, and an answer of probability one."""
    chosen = torch.tensor([-10.0, -2010.0, 0.0, -5.0], requires_grad=True)
    rejected = torch.tensor([-2010.0, -10.0, -5.0, 0.0], requires_grad=True)
    q = _quantities(4, dtype=torch.float32)._replace(
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        reference_chosen_logps=chosen.detach().flip(0),
        reference_rejected_logps=rejected.detach().flip(0),
        chosen_tokens=torch.tensor([1, 1, 4, 4]),
        rejected_tokens=torch.tensor([1, 1, 4, 4]),
    )
    found = _value(_of({"name": name}), q)
    found.mean().backward()
    for tensor in (found, chosen.grad, rejected.grad):
        assert tensor is None or torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", [n for n, spec in losses.LOSSES.items() if not spec.coupled])
def test_a_loss_that_is_not_coupled_may_be_split(name):
    bound, q = _of({"name": name} | ({"nll": "example"} if name in ("cpo", "arpo") else {})), _quantities()
    assert not bound.coupled
    parts = [bound.function(type(q)(*(x[i : i + 3] if torch.is_tensor(x) else x for x in q))) for i in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(parts), bound.function(q), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [{"name": n} for n, s in losses.LOSSES.items() if s.coupled] + [{"name": "cpo"}])
def test_a_loss_that_is_coupled_may_not(loss):
    bound, q = _of(loss), _quantities()
    assert bound.coupled
    halves = [type(q)(*(x.chunk(2)[i] if torch.is_tensor(x) else x for x in q)) for i in (0, 1)]
    parts = [_value(_of(loss), half).mean() for half in halves]
    assert (sum(parts) / 2 - _value(bound, q).mean()).abs() > 1e-6


def test_win_rates_of_a_prompts_samples():
    found = losses.preferences(torch.tensor([0.0, math.log(3.0)], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.25], [0.75, 0.5]], dtype=torch.float64))


def test_mrpo_of_the_same_reference_twice_is_dpo():
    q = _quantities()
    q = q._replace(second_chosen_logps=q.reference_chosen_logps, second_rejected_logps=q.reference_rejected_logps)
    for function, alpha in itertools.product((losses.mrpo, losses.multi_dpo), (None, 0.0, 0.3, 1.0)):
        torch.testing.assert_close(function(q, beta=0.2, alpha=alpha), losses.dpo(q, beta=0.2))


def test_ktos_shift_is_a_constant():
    q = _quantities()
    logps = (q.mismatched_reference_logps + 1.0).requires_grad_()
    coupling.kto(q._replace(mismatched_policy_logps=logps)).sum().backward()
    assert logps.grad is None


def test_wpo_gives_no_gradient_through_its_weight():
    q = _quantities()
    concentration = q.chosen_concentration.clone().requires_grad_()
    assert not losses.wpo_weights(q._replace(chosen_concentration=concentration)).requires_grad


# gamma-PO


def test_margins_share_the_target_and_follow_the_gaps():
    gaps, others = _quantities(12).log_ratio().detach(), _quantities(30, seed=1).log_ratio().detach()
    whole = coupling.gamma_margins(torch.cat([others, gaps]), gaps[:0], gamma=4.0, tau=10.0)
    assert whole.sum().item() == pytest.approx(42 * 4.0, rel=1e-12)
    torch.testing.assert_close(coupling.gamma_margins(gaps, others, gamma=4.0, tau=10.0), whole[30:])
    assert (whole[torch.cat([others, gaps]).argsort()].diff() >= 0).all()
    assert whole.max() - whole.min() > 0.1


def test_a_huge_tau_gives_the_base_loss():
    q = _quantities()._replace(other_gaps=torch.randn(20, dtype=torch.float64))
    simpo = coupling.gamma_simpo(q, beta=2.0, gamma=1.5, tau=1e12)
    torch.testing.assert_close(simpo, losses.simpo(q, beta=2.0, gamma=1.5), rtol=0, atol=1e-9)
    dpo = coupling.gamma_dpo(q, beta=0.3, gamma=1.5, tau=1e12, length_norm=False, label_smoothing=0.1)
    torch.testing.assert_close(dpo, losses.dpo(q, beta=0.3, label_smoothing=0.1), rtol=0, atol=1e-9)


def test_margins_are_constants():
    q = _quantities()
    q = q._replace(other_gaps=q.margin_per_token().detach() + 1)
    gaps = 2.0 * q.margin_per_token()
    margins = coupling.gamma_margins(gaps, q.other_gaps, gamma=3.0, tau=1.0)
    assert not margins.requires_grad
    coupling.gamma_simpo(q, beta=2.0, gamma=3.0, tau=1.0).sum().backward()
    expected = -2.0 * torch.sigmoid(margins - gaps) / q.chosen_tokens
    torch.testing.assert_close(q.policy_chosen_logps.grad, expected.detach())


def test_the_window_is_the_batch_and_a_draw_of_past_gaps():
    state = _of({"name": "gamma_simpo", "beta": 2.0}).state
    past = state.dump()["queue"]
    assert len(past) == 8
    for pairs, others in ((100, 8), (100, 108), (100, 156), (255, 1), (256, 0), (300, 0)):
        q = _quantities(pairs, seed=len(past))
        drawn = state.before(q).other_gaps.tolist()
        assert len(drawn) == len(set(drawn)) == others  # without replacement
        assert set(drawn) <= set(past)
        past += (2.0 * q.margin_per_token()).tolist()
        assert state.dump()["queue"] == past
    for seed in range(4):
        state.before(_quantities(300, seed=seed))
    assert len(state.dump()["queue"]) == 2048


def test_the_window_shows_the_margins_that_the_loss_takes():
    choice = {"name": "gamma_dpo", "beta": 0.3, "gamma": 1.5, "tau": 2.0, "label_smoothing": 0.0}
    bound = _of(choice)
    q = bound.state.before(_quantities())
    gaps = 0.3 * q.log_ratio_per_token().detach()
    taken = gaps + 1.5 + torch.log(torch.expm1(bound.function(q).detach()))  # from -log s(gap - (margin - gamma))
    shown = bound.state.shown()
    assert shown["gamma/mean"] == pytest.approx(taken.mean().item(), abs=1e-6)
    assert shown["gamma/sd"] == pytest.approx(taken.std(correction=0).item(), abs=1e-6)
    mixed = _of(choice | {"weight": 0.5}, {"name": "dpo", "weight": 0.5})
    assert mixed.state.shown() == {}
    mixed.state.before(_quantities())
    assert mixed.state.shown().keys() == shown.keys()


# beta-DPO and BCO


def test_beta_dpo_is_the_mean_over_the_selected_pairs():
    bound, q = _of({"name": "beta_dpo", "alpha": 0.0, "beta": 0.2, "filtered": 0.3}), _quantities(8)
    filled = bound.state.before(q)
    assert filled.selected.sum() == 5  # 5.6 rounded down, as in the program
    expected = losses.dpo(q, beta=0.2)[filled.selected].mean()
    torch.testing.assert_close(bound.function(filled).mean(), expected)


def test_the_selection_follows_the_law_of_draws_without_replacement():
    """Two of four pairs, against the exact probability of each set; 4 standard errors."""
    gaps, draws = [0.0, 1.0, -1.5, 2.5], 20_000
    state = coupling.BetaSelection(0, 0.5)
    state.mean, state.deviation = 0.0, 1.0
    weights = [math.exp(-(gap**2) / 2) for gap in gaps]
    counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for _ in range(draws):
        counts[tuple(sorted(state._draw(gaps, 2)))] += 1
    for (a, b), count in counts.items():
        total = sum(weights)
        p = sum(weights[i] / total * weights[j] / (total - weights[i]) for i, j in ((a, b), (b, a)))
        assert abs(count / draws - p) < 4 * math.sqrt(p * (1 - p) / draws)


def test_the_selection_stands_gaps_of_no_weight():
    q = _quantities(8)
    far = q._replace(policy_chosen_logps=q.policy_chosen_logps + torch.tensor([1e6] * 4 + [-1e6] * 4))
    state = coupling.BetaSelection(0, 0.25)
    state.deviation = 1e-9
    assert state.before(far).selected.sum() == 6
    one = type(q)(*(x[:1] if torch.is_tensor(x) else x for x in q))
    assert coupling.BetaSelection(0, 0.9).before(one).selected.tolist() == [True]


def test_bco_shifts_by_the_mean_of_every_reward_seen():
    state, seen = _of({"name": "bco", "beta": 0.3}).state, []
    for pairs, seed in ((8, 0), (3, 1), (5, 2)):
        q = _quantities(pairs, seed)
        seen += (0.3 * torch.cat(q.rewards())).tolist()
        assert state.before(q).running_reward.item() == pytest.approx(math.fsum(seen) / len(seen), rel=1e-12)


# States


@pytest.mark.parametrize(
    "loss",
    [[{"name": name, **params}] for name, params in STATEFUL.items()]
    + [[{"name": name, **params, "weight": 0.25} for name, params in STATEFUL.items()]],
)
def test_a_state_goes_through_json_to_the_bit(loss):
    straight, before, resumed = _of(*loss, seed=3).state, _of(*loss, seed=3).state, _of(*loss, seed=99).state
    for seed in range(40):
        straight.before(_quantities(9, seed))
        before.before(_quantities(9, seed))
    resumed.load(json.loads(json.dumps(before.dump())))
    for seed in range(40, 45):
        q = _quantities(9, seed)
        a, b = straight.before(q), resumed.before(q)
        for one, other in zip(_tensors(a), _tensors(b), strict=True):
            assert torch.equal(one, other)
    assert straight.dump() == resumed.dump()


@pytest.mark.parametrize("name", ["gamma_simpo", "beta_dpo"])
def test_draws_depend_on_the_seed_alone(name):
    def drawn(seed):
        state = _of({"name": name}, seed=seed).state
        for step in range(30):  # the deviation of beta-DPO's first steps is so small that few draws can differ
            q = state.before(_quantities(20, step))
        return (q.other_gaps if name == "gamma_simpo" else q.selected).tolist()

    random.seed(1)
    first = drawn(5)
    random.seed(2)
    assert drawn(5) == first
    assert drawn(6) != first


@pytest.mark.parametrize("name", STATEFUL)
def test_a_stateful_loss_refuses_what_its_state_has_not_filled(name):
    with pytest.raises(ValueError, match="needs the"):
        _of({"name": name}).function(_quantities())


# From a recipe


def test_the_loss_of_a_recipe_has_its_parameters_bound():
    bound = losses.of(_section({"name": "simpo", "beta": 4.0, "gamma": 0.5}))
    assert bound[1:] == (4.0, 0, False, frozenset(), None, True, False)
    torch.testing.assert_close(bound.function(_quantities()), losses.simpo(_quantities(), beta=4.0, gamma=0.5))


@pytest.mark.parametrize(
    ("loss", "references", "coupled", "needs"),
    [
        ({"name": "mrpo"}, 2, False, set()),
        ({"name": "kto"}, 1, True, {"mismatched"}),
        ({"name": "wpo"}, 1, False, {"concentration"}),
        ({"name": "sppo"}, 1, False, {"win_rates"}),
        ({"name": "rpo", "nll": "batch"}, 1, True, set()),
        ({"name": "sft"}, 0, False, set()),
    ],
)
def test_what_a_loss_asks_of_the_trainer(loss, references, coupled, needs):
    bound = _of(loss)
    assert (bound.references, bound.coupled, set(bound.needs)) == (references, coupled, needs)
    assert bound.beta == (1.0 if loss["name"] == "sft" else bound.function.keywords["beta"])


def test_a_mix_is_the_weighted_sum_of_its_members():
    loss = [
        {"name": "dpo", "beta": 0.2, "weight": 0.5},
        {"name": "sft", "weight": 0.125},
        {"name": "kto", "weight": 0.25},
        {"name": "mrpo", "weight": 0.125},
    ]
    mix, q = _of(*loss), _quantities()
    assert _of(*loss[1:], loss[0]).beta == 0.1  # of kto, the first that has one; sft has none
    assert mix[1:] == (0.2, 2, True, {"mismatched"}, None, True, False)
    parts = [losses.dpo(q, beta=0.2), losses.sft(q), coupling.kto(q), losses.mrpo(q)]
    expected = sum(entry["weight"] * part.mean() for entry, part in zip(loss, parts, strict=True))
    assert mix.function(q).shape == (8,)
    torch.testing.assert_close(mix.function(q).mean(), expected)


def test_a_mix_keeps_the_states_of_its_members_apart_and_the_gradient_whole():
    """The state sees detached quantities; the trainer then asks for the loss of the same pairs with a gradient."""
    loss = [{"name": "gamma_simpo", "beta": 2.0, "weight": 0.75}, {"name": "gamma_dpo", "weight": 0.25}]
    mix, q = _of(*loss, seed=4), _quantities()
    seen = q._replace(
        policy_chosen_logps=q.policy_chosen_logps.detach(), policy_rejected_logps=q.policy_rejected_logps.detach()
    )
    filled = mix.state.before(seen)
    found = mix.function(
        filled._replace(policy_chosen_logps=q.policy_chosen_logps, policy_rejected_logps=q.policy_rejected_logps)
    )
    alone = [
        _of({k: v for k, v in entry.items() if k != "weight"}, seed=4 + i) for i, entry in enumerate(loss)
    ]  # each member has draws of its own
    expected = sum(entry["weight"] * _value(bound, q) for entry, bound in zip(loss, alone, strict=True))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.mean(), q.policy_chosen_logps)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("loss", "references", "says"),
    [
        ([{"name": "dppo"}], (), "unknown loss 'dppo'"),
        ([{"name": "dpo", "betta": 0.1}], ("initial",), "parameter 'betta'"),
        ([{"name": "dpo", "beta": "high"}], ("initial",), "parameter 'beta'"),
        ([{"name": "dpo", "beta": 0.0}], ("initial",), "parameter 'beta': input should be greater than 0"),
        ([{"name": "dpo", "beta": math.inf}], ("initial",), "parameter 'beta'"),
        ([{"name": "dpo", "weight": 1.0}], ("initial",), "parameter 'weight'"),
        ([{"name": "robust_dpo", "label_smoothing": 0.5}], ("initial",), "less than 0.5"),
        ([{"name": "exo", "label_smoothing": 0.0}], ("initial",), "greater than 0"),
        ([{"name": "beta_dpo", "filtered": 1.0}], ("initial",), "less than 1"),
        ([{"name": "rpo", "nll": "token"}], ("initial",), "'example' or 'batch'"),
        ([{"name": "mrpo", "alpha": 1.5}], ("initial", "previous"), "parameter 'alpha"),
        ([{"name": "dpo"}], (), "needs a reference, train.reference names none"),
        ([{"name": "mrpo"}], ("initial",), "needs two references, train.reference names 1"),
        ([{"name": "simpo"}], ("initial",), "uses no reference"),
        ([{"name": "dpo"}], ("initial", "previous"), "uses a reference, train.reference names 2"),
        ([{"name": "sft", "weight": 0.5}, {"name": "simpo", "weight": 0.5}], ("initial",), "mix sft \\+ simpo uses no"),
        ([{"name": "dpo", "weight": 0.5}, {"name": "sft", "weight": 0.5}], (), "mix dpo \\+ sft needs a reference"),
        ([{"name": "dpo", "weight": 0.5}, {"name": "sft", "weight": 0.4}], ("initial",), "sum to 0.9"),
        (
            [{"name": "dpo", "weight": 1.5}, {"name": "sft", "weight": -0.5}],
            ("initial",),
            "'sft' .* has weight",
        ),
        (
            [{"name": "dpo", "weight": 0.5}, {"name": "sft", "weight": True}],
            ("initial",),
            "'sft' .* has weight",
        ),
        ([{"name": "dpo", "weight": 1.0}, {"name": "sft"}], ("initial",), "'sft' of the mix has no weight"),
        ([{"name": "dpo", "weight": 0.5}, {"name": "sgt", "weight": 0.5}], ("initial",), "unknown loss 'sgt'"),
        ([], (), "sum to 0"),
    ],
)
def test_what_cannot_work_is_refused_with_a_hint(loss, references, says):
    with pytest.raises(UserError, match=says) as raised:
        losses.of(_section(*loss, references=references))
    assert raised.value.hint


@pytest.mark.parametrize(
    ("loss", "of_gap"),
    [
        ({"name": "dpo", "beta": 0.3}, lambda gap: -torch.nn.functional.logsigmoid(gap)),
        ({"name": "hinge", "beta": 0.3}, lambda gap: (1 - gap).relu()),
        ({"name": "cpo", "beta": 0.02, "nll_weight": 0}, lambda gap: -torch.nn.functional.logsigmoid(gap)),
        ({"name": "slic_hf", "beta": 0.7, "nll_weight": 0}, lambda gap: (1 - gap).relu()),
        ({"name": "simpo", "beta": 2.5, "gamma": 0.5}, lambda gap: -torch.nn.functional.logsigmoid(gap - 0.5)),
        ({"name": "simpo_hinge", "beta": 2.5, "gamma": 0.5}, lambda gap: (1.5 - gap).relu()),
    ],
)
def test_a_loss_is_a_function_of_the_gap_of_the_shown_rewards(loss, of_gap):
    q, bound = _quantities(), _of(loss)
    if not bound.references:
        q = q._replace(reference_chosen_logps=None, reference_rejected_logps=None)
    chosen, rejected = losses.implicit_rewards(bound, q)
    assert not chosen.requires_grad
    torch.testing.assert_close(of_gap(chosen - rejected), _value(bound, q).detach(), rtol=1e-12, atol=1e-12)


def test_a_mix_shows_the_rewards_of_its_first_member_with_a_scale():
    q = _quantities()._replace(reference_chosen_logps=None, reference_rejected_logps=None)
    mixed = [{"name": "sft", "weight": 0.5}, {"name": "cpo", "beta": 0.02, "weight": 0.5}]
    for found, expected in zip(
        losses.implicit_rewards(_of(*mixed), q),
        losses.implicit_rewards(_of({"name": "cpo", "beta": 0.02}), q),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
