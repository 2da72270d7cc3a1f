"""The chunked head against a dense log_softmax in float64, and what it allocates."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selfimprove.training import head
from selfimprove.training.head import Shape
from selfimprove.training.logps import Scorer
from tests.training.families import TREES, VOCAB, build

ROWS, WIDTH, WORDS = 23, 8, 37
ALL = ROWS * WORDS * 4  # bytes of every row's logits
BUDGETS = {"kept": ALL, "a row short of kept": ALL - 1, "chunks of three": 3 * 8 * WORDS, "row by row": 1}
SHAPES = {"plain": Shape(), "scale": Shape(0.3), "cap": Shape(1.0, 2.0), "scale and cap": Shape(2.5, 1.5)}


def draw(bias: bool, dtype: torch.dtype = torch.float32):
    torch.manual_seed(1)
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(WORDS, WIDTH)
    inputs = [hidden, weight, torch.randn(WORDS)] if bias else [hidden, weight]
    return [x.to(dtype).requires_grad_() for x in inputs], torch.randint(WORDS, (ROWS,))


def dense(inputs, targets, shape: Shape):
    hidden, weight, *bias = (x.double() for x in inputs)
    x = (hidden @ weight.T + (bias[0] if bias else 0)) * shape.scale
    if shape.softcap:
        x = shape.softcap * torch.tanh(x / shape.softcap)
    logps = x.log_softmax(-1)
    return logps[range(ROWS), targets], logps.exp().square().sum(-1).log()


def ours(inputs, targets, shape: Shape, budget: int, measure: bool = False):
    hidden, weight, *bias = inputs
    return head.target_logps(hidden, weight, bias[0] if bias else None, targets, shape, budget, measure)


PROBE = torch.linspace(-1, 2, ROWS, dtype=torch.float64)  # dLoss/dlogp differs from row to row


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_equals_the_dense_log_softmax_in_value_and_gradient(bias, shape, budget):
    inputs, targets = draw(bias)
    expected, spread = dense(inputs, targets, shape)
    found, concentration = ours(inputs, targets, shape, budget, measure=True)
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(concentration.double(), spread, atol=5e-6, rtol=0)
    assert not concentration.requires_grad
    truth = torch.autograd.grad((expected * PROBE).sum(), inputs)
    for gradient, true in zip(torch.autograd.grad((found.double() * PROBE).sum(), inputs), truth, strict=True):
        torch.testing.assert_close(gradient, true, atol=2e-5, rtol=1e-5)


def test_without_measuring_no_concentration_is_given():
    inputs, targets = draw(False)
    assert ours(inputs, targets, Shape(), ALL)[1] is None


def test_a_second_backward_pass_gives_the_same():
    """The kept softmax is used up by the first one."""
    inputs, targets = draw(True)
    loss = (ours(inputs, targets, SHAPES["cap"], ALL)[0].double() * PROBE).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for again, before in zip(torch.autograd.grad(loss, inputs), first, strict=True):
        torch.testing.assert_close(again, before)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2]])
@pytest.mark.parametrize("budget", [1, ALL])
def test_frozen_inputs_get_no_gradient_and_change_none(wanted, budget):
    inputs, targets = draw(True)
    whole = torch.autograd.grad(ours(inputs, targets, Shape(), budget)[0].sum(), inputs)
    for i, x in enumerate(inputs):
        x.requires_grad_(i in wanted)
    ours(inputs, targets, Shape(), budget)[0].sum().backward()
    for i, x in enumerate(inputs):
        assert (x.grad is None) == (i not in wanted)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, whole[i])


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_bfloat16_stays_near_the_exact_values_and_keeps_its_dtype(budget):
    inputs, targets = draw(True, torch.bfloat16)
    expected, _ = dense(inputs, targets, Shape())
    found, _ = ours(inputs, targets, Shape(), budget)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=0.06, rtol=0)  # logits of 8 have 2**-5 between neighbours
    truth = torch.autograd.grad((expected * PROBE).sum(), inputs)
    for gradient, true in zip(torch.autograd.grad((found.double() * PROBE).sum(), inputs), truth, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - true).norm() / true.norm() < 0.02


def test_no_targets_are_no_log_probs():
    inputs, _ = draw(True)
    hidden = inputs[0][:0].detach().requires_grad_()
    found, concentration = head.target_logps(
        hidden, inputs[1], inputs[2], torch.tensor([], dtype=torch.long), Shape(), ALL, True
    )
    found.sum().backward()
    assert found.shape == concentration.shape == (0,)
    assert hidden.grad.shape == (0, WIDTH)
    assert not inputs[1].grad.any()


class Largest(TorchDispatchMode):
    """Bytes of the largest floating-point tensor made that has the vocabulary as a side and is not a weight's."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words, self.width, self.bytes, self.count = words, width, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() < 2:
                continue
            if self.words in x.shape and self.width not in x.shape:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
                self.count += 1
        return out


@pytest.mark.parametrize("budget", [ALL, *(WORDS * 4 * rows for rows in (1, 2, 5, 11, 22))])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_tensor_over_the_vocabulary_exceeds_the_budget(budget, shape):
    inputs, targets = draw(True)
    with Largest(WORDS, WIDTH) as seen:
        found, _ = ours(inputs, targets, shape, budget, measure=True)
        forward = seen.count
        found.sum().backward()
    assert 0 < forward < seen.count  # the backward pass was watched too
    assert budget / 3 < seen.bytes <= budget  # and the budget is made use of


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_a_whole_model_stays_within_it(rows):
    model = build("llama untied")
    budget = rows * VOCAB * 4
    scorer = Scorer(model, logits_bytes=budget)
    with Largest(VOCAB, model.config.hidden_size) as seen:
        scorer(scorer.pack(TREES)).logps.sum().backward()
    assert 0 < seen.bytes <= min(budget, sum(len(r) for t in TREES for r in t.responses) * VOCAB * 4)


@pytest.mark.parametrize(
    "family", ["llama untied", "phi 1", "gemma 2", "cohere", "granite", "hyperclovax", "falcon h1"]
)
def test_the_head_of_a_model_is_taken_from_its_configuration(family):
    model = build(family)
    ids = torch.tensor([[5, 9, 2, 40]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0]
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[0]
        out = model.get_output_embeddings()
        found = head.logits(hidden, out.weight, out.bias, head.shape_of(model.config))
    torch.testing.assert_close(found, expected)
