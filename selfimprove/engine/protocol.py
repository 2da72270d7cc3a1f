"""The seam to inference: token ids in, token ids and log-probabilities out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec

from selfimprove.errors import UserError


class Request(msgspec.Struct, frozen=True):
    """`n` completions of one prompt; completion k is sampled with seed + k."""

    prompt_token_ids: list[int]
    n: int
    seed: int


class Sampling(msgspec.Struct, frozen=True):
    """Sampling parameters under vLLM's names; temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: list[int]
    stop: list[str] = []


class Completion(msgspec.Struct, frozen=True):
    """Sampled token ids, the end token included when it was sampled.

    The log-probabilities are in nats, under the unscaled distribution (temperature 1, no top-p).
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


Task = Literal["generate", "reward", "compare"]  # what a model is opened for: Engine, Scorer, Ranker
Finished = Callable[[int, list[Completion]], None]  # number of the request, its completions


class Options(msgspec.Struct, frozen=True):
    """How an engine is built."""

    dtype: Literal["float32", "bfloat16"]
    max_model_len: int
    max_num_seqs: int
    kv_cache_gib: int
    gpu_memory_utilization: float
    threads: int | None  # of the engine on CPU; None = its own choice
    timeout: float = 1800.0  # seconds of silence after which an engine in a process of its own counts as hung
    tensor_parallel: int = 1  # GPUs that share the weights


class Comparison(NamedTuple):
    """The logit that a first answer is better than a second, and how many tokens of the three texts were cut off."""

    logit: float
    cut: int


class EngineDied(UserError):
    """A process died or hung in the middle of a call.

    What was told before counts, and the next call starts another one.
    """


class Engine(Protocol):
    """One inference engine for a whole run; weights are swapped, the engine stays."""

    def swap(self, model: Path) -> None:
        """Serve the weights in this directory from now on; nothing happens when they are served already."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished) -> list[list[Completion]]:
        """`n` completions of each request, in the order of the requests; `finished` hears of each when it ends.

        Raises:
            KeyboardInterrupt: the user asked to stop (interrupts.asked); what was begun is finished and was told.
            EngineDied: in the middle.
            UserError: the engine cannot serve.
        """

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it; the first token has none, so a list is one shorter.

        Raises:
            EngineDied: in the middle.
        """

    def sleep(self) -> None:
        """Give the device's memory back until the next `swap` (a no-op on CPU)."""

    def close(self) -> None:
        """End the engine and its processes."""


class Scorer(Protocol):
    """A sequence classifier of one label; its weights stay the same."""

    def rewards(self, sequences: Sequence[Sequence[int]], finished: Callable[[int, float], None]) -> list[float]:
        """The raw logit at the last token of each sequence, in order; `finished` hears of each with its number.

        A sequence that is longer than the scorer's context is the caller's to leave out.
        """

    def sleep(self) -> None:
        """Give the device's memory back until the next call (a no-op on CPU)."""

    def close(self) -> None:
        """End the scorer and its processes."""


class Ranker(Protocol):
    """An encoder that reads a prompt and two answers at once; its weights stay the same."""

    def compare(
        self, rows: Sequence[tuple[str, str, str]], finished: Callable[[int, Comparison], None]
    ) -> list[Comparison]:
        """Each (prompt, first answer, second answer), in order; `finished` hears of each with its number."""

    def sleep(self) -> None:
        """Give the device's memory back until the next call (a no-op on CPU)."""

    def close(self) -> None:
        """Forget the model."""
