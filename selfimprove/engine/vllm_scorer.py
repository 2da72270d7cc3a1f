"""A reward model in a vLLM host process of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from selfimprove import interrupts
from selfimprove.engine import messages
from selfimprove.engine.process import HostError, HostProcess, cannot_serve, died
from selfimprove.engine.protocol import Options

ROWS = 512  # of one call: many steps of the engine, and seldom enough to be heard of


class VllmScorer:
    """See protocol.Scorer; construction returns at once and the engine starts in the background.

    Args:
        model: a directory that checkpoints.check_reward_model lets pass.
        options: how the engine is built.
        log: file that takes the host's output.
    """

    def __init__(self, model: Path, options: Options, log: Path) -> None:
        self._model, self._options = model, options
        self._host = HostProcess(model, options, log, "reward")
        self._started = self._asleep = False

    def rewards(self, sequences: Sequence[Sequence[int]], finished: Callable[[int, float], None]) -> list[float]:
        """See protocol.Scorer.

        Raises:
            KeyboardInterrupt: the user asked to stop; what was begun is finished and was told.
            EngineDied: in the middle.
            UserError: vLLM cannot serve the model.
        """
        found: list[float] = []
        while len(found) < len(sequences):
            rows = [list(ids) for ids in sequences[len(found) : len(found) + ROWS]]
            try:
                self._finish_start()
                interrupts.check()
                self._wake()
                rewards = self._host.call(messages.Reward(rows), messages.Rewards).rewards
            except HostError as error:
                self._restart()
                raise died(self._host.log, error) from None
            for reward in rewards:
                finished(len(found), reward)
                found.append(reward)
        return found

    def sleep(self) -> None:
        """See protocol.Scorer."""
        if torch.cuda.is_available():
            self._finish_start()
            try:
                self._host.call(messages.Sleep(), messages.Done)
            except HostError:
                self._restart()
            self._asleep = True

    def close(self) -> None:
        """End the host process."""
        self._host.close()

    def _wake(self) -> None:
        if self._asleep:
            self._host.call(messages.Wake(), messages.Done)
            self._asleep = False

    def _restart(self) -> None:
        self._host.close()
        self._host = HostProcess(self._model, self._options, self._host.log, "reward")
        self._started = self._asleep = False

    def _finish_start(self) -> None:
        if self._started:
            return
        try:
            self._host.await_ready()
        except HostError as error:
            self.close()
            raise cannot_serve(self._model, error, self._host.log) from None
        self._started = True
