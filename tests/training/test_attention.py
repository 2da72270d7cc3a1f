"""Packed trees under many families of attention, and what the variable-length kernel is handed."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen

from selfimprove.training import attention
from selfimprove.training.logps import Scorer
from tests.training.families import (
    PACKED,
    TREES,
    WINDOW,
    assert_same_gradients,
    build,
    by_rows,
    gradients,
    oracle,
    weights_of,
)

SPANS = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.integers(0, 7), min_size=1, max_size=4)), min_size=1, max_size=4
)
SIGNATURE = inspect.signature(varlen.varlen_attn)


@pytest.mark.parametrize("family", PACKED)
def test_packed_trees_equal_transformers_row_by_row(family):
    model = build(family)
    plain = oracle(model)
    expected = by_rows(plain, TREES)
    scorer = Scorer(model)
    found = scorer(scorer.pack(TREES)).logps
    assert found.detach().double() == pytest.approx(expected.detach(), abs=2e-5)
    weights = weights_of(len(expected))
    (expected * weights).sum().backward()
    (found.double() * weights).sum().backward()
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize(
    ("family", "setting", "none"),
    [
        *((f, "sliding_window", 100) for f in ("mistral", "gemma 2", "gemma 3", "phi 3", "olmo 3", "gpt-oss")),
        ("gemma 2", "attn_logit_softcapping", 1e6),
        ("gemma 2", "final_logit_softcapping", 1e6),
    ],
)
def test_windows_and_caps_matter_to_the_trees_above(family, setting, none):
    """Else the equality would prove nothing about them."""
    model = build(family)
    expected = by_rows(oracle(model), TREES)
    setattr(model.config, setting, none)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert (by_rows(oracle(other), TREES) - expected).abs().max() > 0.01


def kernel(*args, **kwargs):
    """What varlen_attn documents, written as a loop over sequences; queries align with the last keys."""
    bound = SIGNATURE.bind(*args, **kwargs)  # refuses what the real one would
    bound.apply_defaults()
    a = bound.arguments
    q, k, v, left, right = a["query"], a["key"], a["value"], *a["window_size"]
    assert q.is_contiguous()
    assert k.is_contiguous()
    assert v.is_contiguous()
    assert a["cu_seq_q"].dtype == a["cu_seq_k"].dtype == torch.int32
    assert right == 0
    heads, rest = divmod(q.shape[1], k.shape[1])
    assert rest == 0
    assert a["enable_gqa"] == (heads > 1)
    out = torch.full_like(q, torch.nan)
    starts = zip(*(a[name].tolist() for name in ("cu_seq_q", "cu_seq_k")), strict=True)
    begin_q, begin_k = next(starts)
    assert begin_q == begin_k == 0
    longest = [0, 0]
    for end_q, end_k in starts:
        rows, columns = end_q - begin_q, end_k - begin_k
        assert 0 < rows <= columns
        longest = [max(longest[0], rows), max(longest[1], columns)]
        for head in range(q.shape[1]):
            keys, values = (x[begin_k:end_k, head // heads] for x in (k, v))
            scores = q[begin_q:end_q, head] @ keys.T * (q.shape[-1] ** -0.5 if a["scale"] is None else a["scale"])
            at = torch.arange(rows)[:, None] + columns - rows
            key_at = torch.arange(columns)[None]
            seen = (key_at <= at) & ((key_at >= at - left) if left >= 0 else True)
            out[begin_q:end_q, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        begin_q, begin_k = end_q, end_k
    assert begin_q == len(q)
    assert begin_k == len(k) == len(v)
    assert longest == [a["max_q"], a["max_k"]]
    return out


def random_qkv(tokens: int, heads: int, kv_heads: int, device: str = "cpu", dtype: torch.dtype = torch.float32):
    torch.manual_seed(tokens)
    shapes = [(1, h, tokens, 16) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def forward_and_gradients(function, inputs):
    out = function(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    probe = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * probe).sum(), inputs)]


@settings(max_examples=40, deadline=None)
@given(
    spans=SPANS,
    window=st.sampled_from([None, 1, 2, WINDOW, 100]),
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.3]),
)
def test_the_kernel_is_handed_the_attention_of_the_segments(spans, window, kv_heads, scale):
    tree = attention.structure(spans, torch.device("cpu"))
    tokens = sum(prompt + sum(responses) for prompt, responses in spans)
    inputs = random_qkv(tokens, 4, kv_heads)

    def segments(q, k, v):
        return attention.tree_attention(torch.nn.Identity(), q, k, v, None, scale, sliding_window=window, tree=tree)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", kernel)
        handed = forward_and_gradients(lambda q, k, v: attention._varlen(q, k, v, scale, window, tree), inputs)
    for found, expected in zip(handed, forward_and_gradients(segments, inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_a_response_sees_its_prompt_and_itself_only():
    """Counted from the structure alone: which keys each query may see, tree [2; 2, 0, 1] beside tree [1; 1]."""
    tree = attention.structure([(2, [2, 0, 1]), (1, [1])], torch.device("cpu"))
    assert tree.key_index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 5, 6]
    assert tree.starts_q.tolist() == [0, 2, 4, 5, 6, 7]
    assert tree.starts_k.tolist() == [0, 2, 6, 9, 10, 12]
    assert (tree.longest_q, tree.longest_k) == (2, 4)


@pytest.mark.parametrize("family", ["llama tied", "gpt 2", "gemma 2"])
def test_autocast_hands_the_kernel_one_half_precision_dtype(family, monkeypatch):
    """Rotary embeddings of float32 weights widen queries and keys, and no kernel takes those beside bfloat16 values."""
    seen = set()
    segment = attention._segment

    def record(q, k, v, *rest):
        seen.update({q.dtype, k.dtype, v.dtype})
        return segment(q, k, v, *rest)

    monkeypatch.setattr(attention, "_segment", record)
    scorer = Scorer(build(family), dtype=torch.bfloat16)
    scorer(scorer.pack(TREES))
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("given", [{"tree": None}, {"attention_mask": torch.ones(1)}, {"dropout": 0.1}])
def test_what_cannot_be_packed_is_refused(given):
    q, k, v = random_qkv(3, 2, 2)
    keywords = {"attention_mask": None, "tree": attention.structure([(2, [1])], torch.device("cpu")), **given}
    with pytest.raises(ValueError, match="Identity cannot run packed trees"):
        attention.tree_attention(torch.nn.Identity(), q, k, v, **keywords)
