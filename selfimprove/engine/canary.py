"""The proof that an engine serves the weights it was told to serve.

Two fixed token sequences are scored by the model that was saved and by the engine; a stale or half-loaded engine
differs. On a GPU, and in bfloat16, the kernels differ too: there the tolerance is wide and small changes do not show.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from selfimprove.engine.checkpoints import SAFE

if TYPE_CHECKING:
    import transformers

FILE = "canary.json"


class Tolerance(NamedTuple):
    """How far log-probabilities of the same weights may be apart, in nats."""

    mean: float  # over the tokens
    largest: float


def tolerance(dtype: str, on_gpu: bool) -> Tolerance:
    """Of one way to compute beside another.

    In bfloat16 single tokens of a 0.5B model are off by more than a quarter of a nat on an H100, the mean by a few
    hundredths (docs/performance.md); other weights move these unlikely tokens by about a nat.
    """
    return Tolerance(2e-3, 2e-3) if dtype == "float32" and not on_gpu else Tolerance(0.15, 1.5)


class Canary(msgspec.Struct, frozen=True):
    """Token sequences and the log-probability of each token but the first."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]


def sequences(vocab_size: int, length: int = 24) -> list[list[int]]:
    """Two fixed sequences of pseudo-random token ids: text would be too easy to predict to tell weights apart."""
    digits = [hashlib.sha256(f"canary/{i}".encode()).digest() for i in range(2 * length)]
    ids = [int.from_bytes(d[:8], "big") % vocab_size for d in digits]
    return [ids[:length], ids[length:]]


def compute(model: "transformers.PreTrainedModel") -> Canary:
    """Score the sequences with a model held in memory."""
    import torch

    token_ids = sequences(model.config.get_text_config().vocab_size)
    with torch.inference_mode():
        batch = torch.tensor(token_ids, device=model.device)
        logprobs = model(batch).logits.float().log_softmax(-1)
        scores = logprobs[:, :-1].gather(-1, batch[:, 1:, None])[..., 0]
    return Canary(token_ids, scores.tolist())


def of(directory: Path) -> Canary:
    """The canary saved beside the weights, or scored now with transformers where none was saved."""
    saved = directory / FILE
    if saved.is_file():
        return msgspec.json.decode(saved.read_bytes(), type=Canary)
    import transformers

    return compute(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32", **SAFE).eval())


def save(directory: Path, canary: Canary) -> None:
    """Write the canary beside the weights."""
    (directory / FILE).write_text(json.dumps(msgspec.to_builtins(canary)) + "\n", encoding="utf-8")


class Difference(NamedTuple):
    """How far log-probabilities are apart, in nats; not-a-number where one is."""

    mean: float
    largest: float

    def within(self, allowed: Tolerance) -> bool:
        """Whether they may be those of the same weights."""
        return self.mean <= allowed.mean and self.largest <= allowed.largest


def difference(expected: Canary, measured: list[list[float]]) -> Difference:
    """Of what an engine measured to what the checkpoint says."""
    pairs = zip(expected.logprobs, measured, strict=True)
    apart = [abs(e - m) for es, ms in pairs for e, m in zip(es, ms, strict=True)]
    mean = sum(apart) / len(apart)
    return Difference(mean, max(apart) if mean == mean else mean)
