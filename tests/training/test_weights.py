"""Arithmetic on weights against the reference procedures, and what it must leave alone."""

import json

import pytest
import torch

from selfimprove.training import weights
from tests.paths import ROOT
from tests.training.conftest import tiny

PROCEDURES = json.loads((ROOT / "tests/data/loss_vectors.json").read_text(encoding="utf-8"))["procedures"]


def double(values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


def close(found, expected):
    torch.testing.assert_close(found["w"], double(expected)["w"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "step", "rate", "after"),
    [
        ("sapo_ema", weights.ema_, "ema_beta", "ema_after_step"),
        ("tr_dpo_soft", weights.sync_, "alpha", "ref_after_sync"),
    ],
)
def test_follows_the_reference_trajectory(name, step, rate, after):
    case = PROCEDURES[name]
    held = double(case["theta"][0])
    for theta, expected in zip(case["theta"], case[after], strict=True):
        step(held, double(theta), case[rate])
        close(held, expected)


def test_expo_equals_the_reference():
    case = PROCEDURES["expo"]
    theta = double(case["theta_dpo"])
    weights.extrapolate_(theta, double(case["theta_sft"]), case["alpha"])
    close(theta, case["result"])


def test_a_hard_sync_is_a_copy():
    reference, policy = weights.parameters(tiny(seed=1)), weights.parameters(tiny(seed=2))
    weights.sync_(reference, policy, 1.0)
    assert all(torch.equal(reference[name], policy[name]) for name in policy)


@pytest.mark.parametrize("tied", [True, False])
def test_extrapolation_moves_each_weight_once_and_no_buffer(tied):
    model, start = tiny(tied, seed=1), tiny(tied, seed=2)
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert buffers  # the rotary frequencies
    weights.extrapolate_(weights.parameters(model), weights.parameters(start), 0.5)
    for name, theta in model.state_dict().items():
        origin = start.state_dict()[name].double()
        torch.testing.assert_close(theta.double(), 1.5 * before[name] - 0.5 * origin, rtol=1e-6, atol=1e-6, msg=name)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_bfloat16_weights_are_rounded_once():
    torch.manual_seed(0)
    theta, start = torch.randn(2, 10_000).bfloat16()
    found = {"w": theta.clone()}
    weights.extrapolate_(found, {"w": start}, 0.3)
    exact = (theta.double() + 0.3 * (theta.double() - start.double())).bfloat16()
    assert (found["w"] == exact).float().mean() > 0.999  # float32 and then bfloat16 rounds twice, rarely elsewhere
    assert ((theta + 0.3 * (theta - start)) == exact).float().mean() < 0.9  # what computing in bfloat16 would give


def test_an_average_of_bfloat16_weights_moves_where_bfloat16_would_stand_still():
    start, new = {"w": torch.ones(3).bfloat16()}, {"w": torch.full((3,), 1.5).bfloat16()}
    average = weights.copied(start)
    for _ in range(10):
        weights.ema_(average, new, 0.999)
        weights.ema_(start, new, 0.999)
    torch.testing.assert_close(average["w"], torch.full((3,), 1.5 - 0.5 * 0.999**10))
    assert start["w"].eq(1).all()


def test_copies_are_not_views():
    model = tiny()
    kept = weights.copied(weights.parameters(model))
    model.model.norm.weight.data.zero_()
    assert kept["model.norm.weight"].eq(1).all()


@pytest.mark.parametrize("other", [{"w": torch.ones(1)}, {"v": torch.ones(3)}, {}])
@pytest.mark.parametrize("step", [weights.ema_, weights.sync_, weights.extrapolate_])
def test_other_names_or_shapes_are_refused_before_anything_changes(step, other):
    held = {"a": torch.zeros(2), "w": torch.zeros(3)}
    with pytest.raises(ValueError, match="not the same tensors: "):
        step(held, {"a": torch.ones(2), **other}, 0.5)
    assert held["a"].eq(0).all()
