"""Real vLLM that writes: swap with a canary, rebuild on any failure."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from selfimprove.engine import canary, messages
from selfimprove.engine.process import HostError, HostProcess, cannot_serve
from selfimprove.engine.protocol import Completion, Finished, Options, Request, Sampling

R = TypeVar("R")


class VllmEngine:
    """Real vLLM in one process of its own; construction returns at once and the engine starts in the background.

    Args:
        model: the first weights to serve.
        options: how the engine is built.
        log: file that takes the host's output.
    """

    def __init__(self, model: Path, options: Options, log: Path) -> None:
        self.options = options
        self.log = log
        self.starts = self.swaps = self.rebuilds = 0
        self._known: dict[Path, canary.Canary] = {}  # canaries of weights saved without one
        self._served: Path | None = None
        self._starting: Path | None = None
        self._start(model)

    def swap(self, model: Path) -> None:
        """Serve `model`, proved by its canary; an engine that fails the proof is built anew.

        Raises:
            UserError: vLLM cannot start, or a fresh engine does not reproduce the checkpoint either.
        """
        self._finish_start()
        if model == self._served:
            return
        self.swaps += 1
        if self._on_gpu():  # what training left in this process's cache is needed by the engine that wakes
            gc.collect()
            torch.cuda.empty_cache()
        try:
            self._call(messages.Swap(str(model)), messages.Done)
            self._prove(model)
        except HostError as error:
            self.rebuilds += 1
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"\nselfimprove: swap to {model} failed, engine rebuilt: {error}\n")
            self.close()
            self._start(model)
            self._finish_start()
        self._served = model

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished) -> list[list[Completion]]:
        """See protocol.Engine."""
        self._finish_start()
        answers: list[list[Completion]] = [[] for _ in requests]

        def take(number: int, completions: list[Completion]) -> None:
            answers[number] = completions
            finished(number, completions)

        self._call(messages.Generate(list(requests), sampling), messages.Done, take)
        return answers

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See protocol.Engine."""
        self._finish_start()
        return self._call(messages.Score([list(s) for s in sequences]), messages.Logprobs).logprobs

    def sleep(self) -> None:
        """See protocol.Engine; the next `swap` wakes the engine and loads its weights again."""
        if self._on_gpu():
            self._finish_start()
            self._call(messages.Sleep(), messages.Done)
            self._served = None

    def close(self) -> None:
        """End the host process."""
        self._host.close()
        self._served = self._starting = None

    def _start(self, model: Path) -> None:
        self.starts += 1
        self._host = HostProcess(model, self.options, self.log, "generate")
        self._starting = model

    def _finish_start(self) -> None:
        model = self._starting
        if model is None:
            return
        try:
            self._host.receive(messages.Done)
            self._starting = None
            if (model / canary.FILE).is_file() or model in self._known:
                self._prove(model)
            else:  # loaded from disk a moment ago: this is what these weights look like when they are right
                ids = canary.sequences(_vocab_size(model))
                self._known[model] = canary.Canary(ids, self._call(messages.Score(ids), messages.Logprobs).logprobs)
        except HostError as error:
            self.close()
            raise cannot_serve(model, error, self.log) from None
        self._served = model

    def _prove(self, model: Path) -> None:
        if model not in self._known:
            self._known[model] = canary.of(model)
        expected = self._known[model]
        measured = self._call(messages.Score(expected.token_ids), messages.Logprobs).logprobs
        difference = canary.difference(expected, measured)
        if not difference <= canary.tolerance(self.options.dtype, self._on_gpu()):
            raise HostError(f"canary: log-probs differ from the checkpoint's by {difference:.3g} nats")

    def _on_gpu(self) -> bool:
        return bool(torch.cuda.is_available())

    def _call(self, call: messages.Call, expected: type[R], finished: Finished | None = None) -> R:
        try:
            return self._host.call(call, expected, finished)
        except HostError:
            self._served = None  # whatever it serves now, the next swap proves or rebuilds it
            raise


def _vocab_size(model: Path) -> int:
    import transformers

    return int(transformers.AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config().vocab_size)
