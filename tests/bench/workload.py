"""What both trainers are given: a random Llama, seeded preference pairs, and the arithmetic the step needs."""

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from selfimprove.training.job import PairRow, Tree

PAD, EOS, FIRST_ID = 0, 1, 2


class Setting(NamedTuple):
    """A machine's bench: the model's shape, how a step is split, what a clock tick means."""

    device: str
    vocab: int
    layers: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    dtype: str  # of the computation; weights, gradients and moments are float32 on both sides
    pairs: int  # per optimiser step
    device_batch: int  # TRL's per-device batch where no other is asked for
    batches: tuple[int, ...]  # per-device batches from which the one that suits TRL best is taken
    tokens: int  # our token budget of a micro-batch
    logits_mib: int = 256
    prompt: tuple[int, int, float] = (50, 400, 178)  # shortest, longest, median of the log-normal
    response: tuple[int, int, float] = (20, 300, 102)


def cpu(vocab: int) -> Setting:
    """Of performance figures on one CPU thread: 4.9 M parameters at vocabulary 1,024 and 13 M at 32,768."""
    return Setting("cpu", vocab, 6, 256, 768, 4, 4, "float32", 8, 8, (1, 2, 4, 8, 16), 2048)


def gpu(vocab: int) -> Setting:
    """Of one GPU: the shape of a 0.5B model in bf16."""
    return Setting("cuda", vocab, 24, 896, 4864, 14, 2, "bfloat16", 64, 16, (4, 8, 16, 32, 64), 32768, 4096)


def tiny(vocab: int) -> Setting:
    """Of the smoke test."""
    shape = Setting("cpu", vocab, 2, 32, 48, 4, 4, "float32", 4, 4, (1, 4), 128)
    return shape._replace(prompt=(4, 40, 14), response=(2, 30, 9))


def here(vocab: int) -> Setting:
    """Of this machine."""
    return gpu(vocab) if torch.cuda.is_available() else cpu(vocab)


def model(setting: Setting) -> Any:
    """The same random weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        intermediate_size=setting.inter,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return transformers.LlamaForCausalLM(config).to(setting.device).train()


def perturb(policy: Any) -> None:
    """Move the weights away from the reference's, the same way each time: at the reference every DPO loss is log 2."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.device), alpha=0.002)


def trees(setting: Setting, prompts: int, responses: int, seed: int = 0) -> list[Tree]:
    """Prompts with their responses; lengths log-normal, redrawn where they leave their bounds."""
    rng = np.random.default_rng(seed)

    def ids(bounds: tuple[int, int, float]) -> list[int]:
        low, high, median = bounds
        length = 0
        while not low <= length <= high:
            length = round(median * float(np.exp(0.5 * rng.standard_normal())))
        return rng.integers(FIRST_ID, setting.vocab, length).tolist()

    def response() -> list[int]:
        return [*ids(setting.response)[:-1], EOS]

    return [Tree(ids(setting.prompt), [response() for _ in range(responses)]) for _ in range(prompts)]


def all_pairs(found: list[Tree]) -> list[PairRow]:
    """Every pair of every prompt, the earlier response preferred."""
    return [
        PairRow(f"{number}/{i}/{j}", tree.prompt_ids, tree.responses[i], tree.responses[j])
        for number, tree in enumerate(found)
        for i in range(len(tree.responses))
        for j in range(i + 1, len(tree.responses))
    ]


def needed_flops(setting: Setting, found: list[Tree]) -> float:
    """Of a step forward and backward: each distinct token once, logits of scored positions only, nothing twice.

    A product of (m, k) and (k, n) counts 2mkn, and each has two of its kind in the backward pass. Attention counts what
    causality leaves: a token at position p sees p + 1 keys. Norms, rotations, softmax and optimiser count nothing.
    """
    s, head_size = setting, setting.hidden // setting.heads
    projections = s.hidden * s.hidden * 2 + s.hidden * s.kv_heads * head_size * 2
    per_token = 2 * s.layers * (projections + 3 * s.hidden * s.inter)
    forward = 0.0
    for tree in found:
        prompt = len(tree.prompt_ids)
        fed = [len(r) - 1 for r in tree.responses]  # the last token of a response predicts nothing
        seen = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in fed)
        forward += per_token * (prompt + sum(fed)) + 4 * s.layers * s.hidden * seen
        forward += 2 * s.hidden * s.vocab * sum(map(len, tree.responses))
    return 3 * forward


def now(setting: Setting) -> float:
    """CPU seconds of this process, since other processes share the machine; on a GPU wall seconds when it is idle."""
    if setting.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def product_rates(setting: Setting, seconds: float = 0.15) -> list[float]:
    """FLOP/s of matrix products in the bench's dtype, each for so long: a square one and the model's own shapes."""
    s, rows = setting, 2048 if setting.device == "cpu" else 16384
    shapes = [(rows, s.hidden, s.inter), (rows, s.inter, s.hidden), (rows // 2, s.hidden, s.vocab)]
    return [square_rate(s, seconds), *(_rate(s, *shape, seconds) for shape in shapes)]


def square_rate(setting: Setting, seconds: float) -> float:
    """FLOP/s of the square product; for as long as a step it is what the best possible step would reach."""
    side = 1024 if setting.device == "cpu" else 8192
    return _rate(setting, side, side, side, seconds)


def _rate(s: Setting, m: int, k: int, n: int, seconds: float) -> float:
    a, b = (torch.randn(x, device=s.device, dtype=getattr(torch, s.dtype)) for x in ((m, k), (k, n)))
    torch.mm(a, b)
    began, count = now(s), 0
    while now(s) - began < seconds:
        for _ in range(2 if s.device == "cpu" else 20):
            torch.mm(a, b)
            count += 1
    return 2 * m * k * n * count / (now(s) - began)


def peak_flops(before: Sequence[float], after: Sequence[float]) -> float:
    """The best product's rate beside a step: its average over both stretches, as a step's own rate is an average."""
    return max(map(statistics.mean, zip(before, after, strict=True)))
