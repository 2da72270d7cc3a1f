"""Attention over packed trees: a prompt sees itself, a response its prompt and itself, nothing else.

Registered with transformers' AttentionInterface under a name that its mask builder does not know, so that models hand
us queries, keys and values with no mask and their code stays untouched. The structure comes as a keyword of the model's
call. On CUDA it is one variable-length call; on CPU a causal call per prompt and a masked one per response.
"""

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "selfimprove_tree"


class Structure(NamedTuple):
    """Who sees whom in a packed row of T tokens."""

    spans: list[tuple[int, list[int]]]  # per tree: tokens of the prompt, tokens of each response
    key_index: Tensor  # (T_k,) the prompt's keys repeated before each response's
    starts_q: Tensor  # (S + 1,) int32, over prompts and responses that hold a token
    starts_k: Tensor  # (S + 1,) int32
    longest_q: int
    longest_k: int


def structure(spans: list[tuple[int, list[int]]], device: torch.device) -> Structure:
    """The structure of a packed row from its spans (see packing.Packed)."""
    index: list[int] = []
    queries, keys, begin = [], [], 0
    for prompt, responses in spans:
        own = range(begin, begin + prompt)
        index += own
        queries.append(prompt)
        keys.append(prompt)
        begin += prompt
        for response in filter(None, responses):
            index += [*own, *range(begin, begin + response)]
            queries.append(response)
            keys.append(prompt + response)
            begin += response

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)

    return Structure(spans, torch.tensor(index, device=device), starts(queries), starts(keys), max(queries), max(keys))


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree: Structure | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; query (1, H, T, D), key and value (1, H_kv, T, D); returns (1, T, H, D).

    Raises:
        ValueError: the model did not pass the structure on, or built a mask of its own.
    """
    if tree is None or attention_mask is not None or dropout:
        raise ValueError(f"{type(module).__name__} cannot run packed trees")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    plain = softcap is None and s_aux is None
    if query.is_cuda and plain and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, scaling, sliding_window, tree), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    lengths = [n for prompt, responses in tree.spans for n in (prompt, *responses)]
    # one split, not a slice per segment: the gradient of each slice would fill a tensor of the whole row
    queries, keys, values = (iter(torch.split(x, lengths, dim=2)) for x in (query, key, value))
    parts = []
    for _, responses in tree.spans:
        q, prompt_k, prompt_v = next(queries), next(keys), next(values)
        parts.append(_segment(q, prompt_k, prompt_v, scaling, sliding_window, softcap, s_aux))
        for _ in responses:
            q, k, v = next(queries), next(keys), next(values)
            if q.shape[2]:
                k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
                parts.append(_segment(q, k, v, scaling, sliding_window, softcap, s_aux))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The last q.shape[2] of k.shape[2] positions attend causally; shapes (1, H, L, D)."""
    rows, columns = q.shape[2], k.shape[2]
    windowed = window is not None and window < columns
    if softcap is None and sinks is None and not windowed and rows == columns:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    if windowed:
        seen = seen.triu(columns - rows - (window or 0) + 1)
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~seen, -torch.inf)
    if sinks is not None:  # a logit per head that takes probability and gives nothing (gpt-oss)
        sink = sinks.float().reshape(1, -1, 1, 1).expand(1, q.shape[1], rows, 1)
        scores = torch.cat([scores, sink], dim=-1)
    return scores.softmax(-1)[..., :columns].to(v.dtype) @ v


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, tree: Structure) -> Tensor:
    """One kernel call: sequences are prompts and (prompt + response); queries align with the last keys."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, H, D)
    out = varlen_attn(
        queries.contiguous(),
        keys[tree.key_index],
        values[tree.key_index],
        tree.starts_q,
        tree.starts_k,
        tree.longest_q,
        tree.longest_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


transformers.AttentionInterface.register(NAME, tree_attention)
