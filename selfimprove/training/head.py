"""Log-probabilities of target tokens from hidden states, without a (tokens, vocabulary) tensor beyond a budget.

The gradient of a preference loss is scaled by sums over whole sequences, so it cannot be finished in the forward
pass: the softmax is kept for the backward pass where it fits the budget, and computed again in chunks where not.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

CACHED_BYTES = 512 << 10  # of logits between the passes of a softmax on CPU, so that they stay in a core's cache


class Shape(NamedTuple):
    """What a model does to its logits after the matrix product."""

    scale: float = 1.0
    softcap: float | None = None


class _TargetLogps(torch.autograd.Function):
    """log softmax(shape(h W^T + b))[target] per row; h (N, H), W (V, H), targets (N,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: Shape,
        budget: int,
        measure: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        fits = rows * vocabulary * 4 <= budget
        chunk = max(1, min(rows, rows if fits else budget // (8 * vocabulary)))
        logps = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        concentration = torch.empty_like(logps) if measure else None
        wants = any(ctx.needs_input_grad[:3])
        kept = []
        for begin in range(0, rows, chunk):
            part = slice(begin, begin + chunk)
            probabilities, raw = _softmax(hidden[part], weight, bias, shape, targets[part], logps[part])
            if concentration is not None:
                concentration[part] = torch.linalg.vector_norm(probabilities, dim=-1).square_().log_()
            if fits and wants:
                kept.append((probabilities, raw))
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.shape, ctx.chunk, ctx.kept = shape, chunk, kept
        if concentration is not None:
            ctx.mark_non_differentiable(concentration)
        return logps, concentration

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        gradient, shape = gradients[0], ctx.shape
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        unused = torch.empty(ctx.chunk, dtype=torch.float32, device=hidden.device)
        for number, begin in enumerate(range(0, hidden.shape[0], ctx.chunk)):
            part = slice(begin, begin + ctx.chunk)
            h, t, g = hidden[part], targets[part], gradient[part, None].float() * -shape.scale
            if ctx.kept:
                d_logits, raw = ctx.kept[number]
            else:
                d_logits, raw = _softmax(h, weight, bias, shape, t, unused[: h.shape[0]])
            # softmax - onehot; g is one factor per row, so it goes to the small sides of the products
            d_logits.scatter_add_(1, t[:, None], d_logits.new_full((1, 1), -1.0).expand(len(t), 1))
            if shape.softcap is not None:
                d_logits.mul_(1 - (raw / shape.softcap).square_())
            d_logits_cast = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits_cast, weight, out=d_hidden[part]).mul_(g)
            if ctx.needs_input_grad[1]:
                product = (d_logits_cast.T @ (h * g).to(h.dtype)).float()
                d_weight = product if d_weight is None else d_weight.add_(product)
            if d_bias is not None:
                d_bias += (g.T @ d_logits)[0]
        ctx.kept = None  # the tiles were used up
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None, None


def _softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, targets: Tensor, logps: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Softmax (n, V) in float32, the targets' log-probs in `logps`, and the capped logits where there is a cap."""
    x = logits(hidden, weight, bias, shape)
    raw = x.clone() if shape.softcap is not None else None
    rows = max(1, CACHED_BYTES // (4 * x.shape[1])) if x.device.type == "cpu" else max(1, len(x))
    for part, target, logp in zip(*(torch.split(y, rows) for y in (x, targets, logps)), strict=True):
        part -= part.amax(-1, keepdim=True)
        logp.copy_(part.gather(1, target[:, None])[:, 0])
        total = part.exp_().sum(-1)
        logp -= total.log()
        part /= total[:, None]
    return x, raw


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """shape(h W^T + b) in float32; hidden (n, H), weight (V, H); returns (n, V), free to be changed in place."""
    x = torch.nn.functional.linear(hidden, weight, bias).float()
    if shape.scale != 1.0:
        x = x.mul_(shape.scale)
    if shape.softcap is not None:
        x = torch.tanh(x.div_(shape.softcap)).mul_(shape.softcap)
    return x


def target_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shape: Shape,
    budget: int,
    measure: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and, where asked, log sum_v p(v)^2 of its position; (N,), float32, nats.

    Args:
        hidden: (N, H) states that predict the targets.
        weight: (V, H) of the head.
        bias: (V,) or None.
        targets: (N,) token ids.
        shape: scale and soft cap of the logits.
        budget: bytes that a (tokens, V) tensor may take.
        measure: also give the concentration (detached), which costs another pass over the vocabulary.
    """
    found: tuple[Tensor, Tensor | None] = _TargetLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, shape, budget, measure
    )
    return found


def shape_of(config: Any) -> Shape:
    """The scale and cap that a model's configuration states (Cohere, Granite, Falcon-H1, Gemma and their like)."""
    text = config.get_text_config()
    scale, divisor, multiplier = (
        float(getattr(text, name, None) or 1.0) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")
    )
    if text.model_type.startswith("hyperclovax"):  # multiplies by what Granite divides by
        divisor = 1.0 / divisor
    return Shape(scale * multiplier / divisor, getattr(text, "final_logit_softcapping", None))
