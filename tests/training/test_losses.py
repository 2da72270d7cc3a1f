"""Losses against the reference values of tests/data/loss_vectors.json, which the upstream programs computed."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch

from selfimprove.errors import UserError
from selfimprove.recipe import Choice, Optimizer, Train
from selfimprove.training import losses

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "loss_vectors.json").read_text())


SIMPLE = {  # upstream's name of a loss whose parameters have our names
    "dpo_sigmoid": losses.dpo,
    "spin": losses.dpo,
    "cdpo": losses.dpo,
    "robust_dpo": losses.robust_dpo,
    "dpo_length_norm": losses.dpo_norm,
    "ipo_avg": losses.ipo,
    "ipo_sum": losses.ipo_sum,
    "hinge": losses.hinge,
    "minor_dpo": losses.minor_dpo,
    "r_dpo": losses.r_dpo,
    "sppo_hard": losses.sppo_hard,
    "apo_zero": losses.apo_zero,
    "apo_down": losses.apo_down,
    "nca_pair": losses.nca,
    "exo_pair": losses.exo,
}


def _ours(case):
    p = case["params"]
    match case["loss"]:
        case name if name in SIMPLE:
            return functools.partial(SIMPLE[name], **p)
        case "simpo" if p["loss_type"] == "sigmoid":
            smoothing = p["label_smoothing"]
            return functools.partial(
                losses.simpo, beta=p["beta"], gamma=p["beta"] * p["gamma_beta_ratio"], label_smoothing=smoothing
            )
        case "slic_hf_reg":
            return functools.partial(losses.slic_hf, delta=p["delta"], nll_weight=p["lambda"])
        case "dpop":
            return functools.partial(losses.dpop, beta=p["beta"], penalty=p["lambda"])
        case "rpo" if p["nll"] == "per_example_token_mean":
            return functools.partial(losses.rpo, beta=p["beta"], nll_weight=p["alpha"])
        case "orpo" if p["nll"] == "per_example_token_mean":
            return functools.partial(losses.orpo, odds_weight=p["lambda"])
    return None


def _quantities(grad=False):
    inputs = {k: torch.tensor(v, dtype=torch.float64) for k, v in VECTORS["inputs"].items() if "logps" in k}
    chosen, rejected = (inputs[f"policy_{side}_logps"].requires_grad_(grad) for side in ("chosen", "rejected"))
    return losses.Quantities(
        chosen,
        rejected,
        inputs["ref_chosen_logps"],
        inputs["ref_rejected_logps"],
        torch.tensor(VECTORS["inputs"]["chosen_lengths"]),
        torch.tensor(VECTORS["inputs"]["rejected_lengths"]),
    )


CASES = [case for case in VECTORS["cases"] if _ours(case)]


def test_every_loss_has_a_reference_value():
    assert {(_ours(case)).func for case in CASES} == set(losses.LOSSES.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_losses_and_gradients_equal_the_reference(case):
    q = _quantities(grad=True)
    found = _ours(case)(q)
    found.mean().backward()
    torch.testing.assert_close(found.tolist(), case["losses"], rtol=0, atol=1e-9)
    for side in ("chosen", "rejected"):
        gradient = getattr(q, f"policy_{side}_logps").grad.tolist()
        torch.testing.assert_close(gradient, case[f"grad_policy_{side}_logps"], rtol=0, atol=1e-9)


def test_dpo_at_policy_equal_reference_is_log_2():
    q = _quantities()
    same = q._replace(reference_chosen_logps=q.policy_chosen_logps, reference_rejected_logps=q.policy_rejected_logps)
    torch.testing.assert_close(losses.dpo(same, beta=0.3), torch.full((8,), math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("case", VECTORS["edge_cases"]["cases"], ids=lambda case: case["id"])
def test_edge_cases_stay_exact(case):
    """Policy equal to reference, differences of 2,000 nats, odds near overflow."""
    inputs = {k: torch.tensor(v, dtype=torch.float64) for k, v in VECTORS["edge_cases"]["inputs"].items()}
    q = losses.Quantities(
        inputs["policy_chosen_logps"].requires_grad_(),
        inputs["policy_rejected_logps"].requires_grad_(),
        inputs["ref_chosen_logps"],
        inputs["ref_rejected_logps"],
        inputs["chosen_lengths"],
        inputs["rejected_lengths"],
    )
    if case["loss"] == "orpo_or_term":  # the odds term alone, without the NLL
        found = losses.orpo(q, odds_weight=case["params"]["lambda"]) + q.policy_chosen_logps / q.chosen_tokens
    else:
        params = {"loss_type": "sigmoid", "label_smoothing": 0.0} if case["loss"] == "simpo" else {}
        found = _ours({**case, "params": params | case["params"]})(q)
    found.mean().backward()
    torch.testing.assert_close(found.tolist(), case["losses"], rtol=1e-12, atol=1e-9)
    gradient = q.policy_chosen_logps.grad.tolist()
    torch.testing.assert_close(gradient, case["grad_policy_chosen_logps"], rtol=1e-9, atol=1e-9)


def test_nll_weight_adds_the_chosen_answers_negative_log_likelihood_per_token():
    q = _quantities()
    added = losses.simpo(q, nll_weight=0.5) - losses.simpo(q)
    torch.testing.assert_close(added, -0.5 * q.policy_chosen_logps / q.chosen_tokens)


def test_extreme_margins_stay_finite():
    far = torch.tensor([-1e5, -1.0], dtype=torch.float64)
    q = losses.Quantities(far, far.flip(0), far.flip(0), far, torch.ones(2), torch.ones(2))
    for found in (losses.dpo(q, beta=1.0), losses.simpo(q, beta=10.0)):
        assert torch.isfinite(found).all()


def test_the_loss_of_a_recipe_has_its_parameters_bound():
    section = Train(loss=Choice(name="simpo", beta=4.0, gamma=0.5), optimizer=Optimizer(learning_rate=1e-3))
    loss, beta = losses.of(section)
    assert beta == 4.0
    torch.testing.assert_close(loss(_quantities()), losses.simpo(_quantities(), beta=4.0, gamma=0.5))


@pytest.mark.parametrize(
    ("loss", "reference", "says"),
    [
        ({"name": "dppo"}, None, "unknown loss 'dppo'"),
        ({"name": "dpo", "betta": 0.1}, "initial", "parameter 'betta'"),
        ({"name": "dpo", "beta": "high"}, "initial", "parameter 'beta'"),
        ({"name": "dpo"}, None, "needs a reference"),
        ({"name": "simpo"}, "initial", "uses no reference"),
    ],
)
def test_what_cannot_work_is_refused_with_a_hint(loss, reference, says):
    section = Train(loss=Choice(**loss), reference=reference, optimizer=Optimizer(learning_rate=1e-3))
    with pytest.raises(UserError, match=says) as raised:
        losses.of(section)
    assert raised.value.hint
