"""The memory of a training against textbook numbers and against what torch really holds."""

import pytest
import torch

from selfimprove.recipe import Adapter, Machine, Optimizer
from selfimprove.training.footprint import footprint

FULL = Optimizer(learning_rate=1e-6)
B = 10**9


def test_mixed_precision_adamw_of_one_process_takes_18_bytes_a_parameter():
    """Float32 weights, gradients and two moments (16 bytes, arXiv 1910.02054), and copies in bfloat16."""
    found = footprint(8 * B, 8 * B, FULL.model_copy(update={"dtype": "bfloat16"}), Machine(), 0)
    assert found.total == 18 * 8 * B
    assert footprint(8 * B, 8 * B, FULL, Machine(), 1).total == (16 + 4) * 8 * B


@pytest.mark.parametrize(("processes", "nodes"), [(8, 1), (8, 2), (1, 4)])
def test_fsdp_cuts_everything_into_equal_parts(processes, nodes):
    machine = Machine(executor="static", num_processes=processes, nodes=nodes, sharding="fsdp")
    one, parts = footprint(8 * B, 8 * B, FULL, Machine(), 2), footprint(8 * B, 8 * B, FULL, machine, 2)
    assert [part * processes * nodes for part in parts] == list(one)


def test_ddp_cuts_nothing():
    machine = Machine(num_processes=8)
    one, each = footprint(B, B, FULL, Machine(), 1), footprint(B, B, FULL, machine, 1)
    assert each._replace(gradients=one.gradients) == one
    assert each.gradients == 2 * one.gradients


def test_adapters_have_moments_of_their_own_only():
    adapted = FULL.model_copy(update={"adapter": Adapter()})
    found = footprint(B + 10**7, 10**7, adapted, Machine(), 1)
    assert (found.gradients, found.moments) == (4 * 10**7, 8 * 10**7)
    assert found.references == 4 * B
    quantised = FULL.model_copy(update={"adapter": Adapter(quantize="nf4")})
    assert footprint(B + 10**7, 10**7, quantised, Machine(), 1).references == pytest.approx(0.516 * B)


def test_it_is_what_torch_holds_after_a_step():
    model = torch.nn.Linear(64, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    size = sum(p.numel() for p in model.parameters())
    found = footprint(size, size, FULL, Machine(), 0)

    def held(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    assert found.weights == held(model.parameters())
    assert found.gradients == held(p.grad for p in model.parameters())
    state = optimizer.state.values()
    assert found.moments == held(t for s in state for t in (s["exp_avg"], s["exp_avg_sq"]))
