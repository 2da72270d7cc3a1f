"""The share of the peak that a step of products and attention alone would reach: `python -m tests.bench.bound`.

For comparison the share of a step that is the square product alone: 1, but for what the machine's wavering adds.

The model's shapes in a step's order, each result in memory of its own as autograd keeps them, and the attention calls
of the packed trees; norms, rotations, activations, sums, the head's softmax and the optimiser are left out. CPU only.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from selfimprove.training import heap
from selfimprove.training.job import Tree
from selfimprove.training.packing import fill, size
from tests.bench import workload
from tests.bench.train import spread
from tests.bench.workload import Setting


def share(setting: Setting, repeats: int, budget: int) -> tuple[list[float], list[float]]:
    """Needed FLOPs per second over the peak, as Result.shares: of each step, and of the square product for as long."""
    torch.set_num_threads(1)
    weights, embedding = weights_of(setting)
    trees = workload.trees(setting, setting.pairs * repeats, 2)
    shares, alone = [], []
    for begin in range(0, len(trees), setting.pairs):
        part = trees[begin : begin + setting.pairs]
        before = workload.product_rates(setting)
        seconds = sum(attention(setting, tree) for tree in part)
        for group in fill([size(tree) for tree in part], budget):
            tokens = sum(size(part[i]) for i in group)
            scored = sum(len(response) for i in group for response in part[i].responses)
            seconds += products(setting, weights, embedding, tokens, scored)
        between = workload.product_rates(setting)
        shares.append(workload.needed_flops(setting, part) / seconds / workload.peak_flops(before, between))
        square = workload.square_rate(setting, seconds)
        alone.append(square / workload.peak_flops(between, workload.product_rates(setting)))
    return shares, alone


def weights_of(s: Setting) -> tuple[list[list[Tensor]], Tensor]:
    """Per layer (out, in): queries, keys, values, output, gate, up, down; and the head."""
    keys = s.hidden // s.heads * s.kv_heads
    shapes = [(s.hidden, s.hidden), (keys, s.hidden), (keys, s.hidden), (s.hidden, s.hidden)]
    shapes += [(s.inter, s.hidden), (s.inter, s.hidden), (s.hidden, s.inter)]
    return [[torch.randn(shape) for shape in shapes] for _ in range(s.layers)], torch.randn(s.vocab, s.hidden)


def products(s: Setting, weights: Sequence[list[Tensor]], embedding: Tensor, tokens: int, scored: int) -> float:
    """Seconds of one micro-batch forward and backward. What one product gives the next is of the right shape only."""
    narrow, wide = torch.randn(tokens, s.hidden) * 1e-3, torch.randn(tokens, s.inter) * 1e-3
    inputs = [[wide if w.shape[1] == s.inter else narrow.clone() for w in layer] for layer in weights]
    began = workload.now(s)
    kept = [[x @ w.t() for x, w in zip(xs, layer, strict=True)] for xs, layer in zip(inputs, weights, strict=True)]
    states = narrow[:scored]
    logits = states @ embedding.t()
    kept.append([logits @ embedding, logits.t() @ states])
    for layer, xs, outs in zip(reversed(weights), reversed(inputs), reversed(kept[:-1]), strict=True):
        for w, x, gradient in zip(layer, xs, outs, strict=True):  # each output stands for its own gradient
            _ = gradient.t() @ x, gradient @ w
    return workload.now(s) - began


def attention(s: Setting, tree: Tree) -> float:
    """Seconds of one tree's calls in all layers, forward and backward."""
    prompt, width, seconds = len(tree.prompt_ids), s.hidden // s.heads, 0.0
    for rows, columns in [(prompt, prompt), *((len(r) - 1, prompt + len(r) - 1) for r in tree.responses)]:
        q, k, v, gradient = (torch.randn(1, s.heads, n, width) for n in (rows, columns, columns, rows))
        given = [x.requires_grad_() for x in (q, k, v)]
        seen = None if rows == columns else torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        began = workload.now(s)
        for _ in range(s.layers):
            out = scaled_dot_product_attention(*given, attn_mask=seen, is_causal=seen is None)
            torch.autograd.grad(out, given, gradient)
        seconds += workload.now(s) - began
    return seconds


def main() -> None:
    """Print a line per token budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 32768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    given = parser.parse_args()
    for vocab in given.vocab:
        for tokens in given.tokens:
            with heap.kept(torch.device("cpu")):
                found, alone = share(workload.cpu(vocab), given.repeats, tokens)
            print(
                f"vocabulary {vocab:,}, {tokens:,} tokens a micro-batch: {spread(found)} of the peak; "
                f"the square product alone: {spread(alone)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
