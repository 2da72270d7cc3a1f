"""Real vLLM that writes: swap with a canary, rebuild on any failure."""

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from selfimprove import interrupts
from selfimprove.engine import canary, device_memory, messages
from selfimprove.engine.process import HostError, HostGone, HostProcess, Lives, cannot_serve, died, note
from selfimprove.engine.protocol import Completion, EngineDied, Finished, Options, Request, Sampling

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
        if self._down:
            self._start(model)
        self._finish_start()
        if model == self._served:
            return
        self.swaps += 1
        began = time.monotonic()
        if self._on_gpu():  # what training left in this process's cache is needed by the engine that wakes
            gc.collect()
            torch.cuda.empty_cache()
            if self._served is None:  # it slept
                device_memory.settle(self.options.gpu_memory_utilization - device_memory.SLEEPERS)
        try:
            self._call(messages.Swap(str(model)), messages.Done)
            self._prove(model)
        except HostError as error:
            self.rebuilds += 1
            note(self.log, f"swap to {model} failed, engine rebuilt: {error}")
            self.close()
            self._start(model)
            self._finish_start()
        note(self.log, f"swapped to {model} in {time.monotonic() - began:.2f} s")
        self._served = self._wanted = model

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished) -> list[list[Completion]]:
        """See protocol.Engine."""
        answers: dict[int, list[Completion]] = {}

        def take(number: int, completions: list[Completion]) -> None:
            answers[number] = completions
            finished(number, completions)

        try:
            self._finish_start()
            interrupts.check()
            self._call(messages.Generate(list(requests), sampling), messages.Done, take)
            if len(answers) < len(requests):
                interrupts.check()
                raise HostError(f"{len(requests) - len(answers)} requests were not answered")
        except HostError as error:
            raise self._died(error) from None
        return [answers[i] for i in range(len(requests))]

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See protocol.Engine."""
        try:
            self._finish_start()
            return self._call(messages.Score([list(s) for s in sequences]), messages.Logprobs).logprobs
        except HostError as error:
            raise self._died(error) from None

    def sleep(self) -> None:
        """See protocol.Engine; the next `swap` wakes the engine and loads its weights again."""
        if self._on_gpu() and not self._down:
            self._finish_start()
            try:
                self._call(messages.Sleep(), messages.Done)
            except HostError as error:  # dead or hung: the memory is free, too
                note(self.log, f"the engine did not sleep and was ended: {error.message}")
                self.close()
            self._served = None

    def close(self) -> None:
        """End the host process; whoever asks for something afterwards starts another one."""
        self._host.close()
        self._served = self._starting = None
        self._down = True

    def _died(self, error: HostError) -> EngineDied:
        self.close()
        return died(self.log, error)

    def _start(self, model: Path) -> None:
        self.starts += 1
        self._host = HostProcess(model, self.options, self.log, "generate")
        self._starting = self._wanted = model
        self._began = time.monotonic()
        self._down = False

    def _finish_start(self) -> None:
        """Wait until the engine serves what it was started with; one that dies while it starts is started again.

        Raises:
            KeyboardInterrupt: the user asked to stop; nothing is lost.
            UserError: it does not start.
        """
        if self._down:
            self._start(self._wanted)
        lives = Lives(self.log)
        while (model := self._starting) is not None:
            try:
                self._host.await_ready()
                self._starting = None
                note(self.log, f"engine ready after {time.monotonic() - self._began:.1f} s")
                if (model / canary.FILE).is_file() or model in self._known:
                    self._prove(model)
                else:  # loaded from disk a moment ago: this is what these weights look like when they are right
                    ids = canary.sequences(_vocab_size(model))
                    self._known[model] = canary.Canary(ids, self._call(messages.Score(ids), messages.Logprobs).logprobs)
                self._served = model
            except HostGone as error:
                self.close()
                if not lives.left(error):
                    raise cannot_serve(model, error, self.log) from None
                self._start(model)
            except HostError as error:
                self.close()
                raise cannot_serve(model, error, self.log) from None

    def _prove(self, model: Path) -> None:
        if model not in self._known:
            self._known[model] = canary.of(model)
        expected = self._known[model]
        measured = self._call(messages.Score(expected.token_ids), messages.Logprobs).logprobs
        difference = canary.difference(expected, measured)
        if not difference.within(canary.tolerance(self.options.dtype, self._on_gpu())):
            raise HostError(
                f"canary: log-probs differ from the checkpoint's by {difference.mean:.3g} nats in the mean, "
                f"{difference.largest:.3g} at most"
            )
        note(self.log, f"canary: {difference.mean:.2g} nats off in the mean, {difference.largest:.2g} at most")

    def _on_gpu(self) -> bool:
        return bool(torch.cuda.is_available())

    def _call(self, call: messages.Call, expected: type[R], finished: Finished | None = None) -> R:
        try:
            return self._host.call(call, expected, finished)
        except HostError:
            self._served = None  # whatever it serves now, the next swap proves or rebuilds it
            raise
        except BaseException:  # the second Ctrl-C: what the host is in the middle of would be the next call's answer
            self.close()
            raise


def _vocab_size(model: Path) -> int:
    import transformers

    return int(transformers.AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config().vocab_size)
