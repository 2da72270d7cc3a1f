"""The driver's side of a vLLM host process: start it, call it, notice that it hangs, end it."""

import os
import socket
import struct
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from selfimprove import children, interrupts
from selfimprove.engine import messages
from selfimprove.engine.protocol import EngineDied, Finished, Options
from selfimprove.errors import UserError

R = TypeVar("R")
TICK = 0.2  # seconds between looks at what else there is to do
DEATHS = 2  # of engines while they start, one after the other: then it is no accident
LAST_LINES = 5  # of an engine's log that are quoted
RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # of ours, not of engines


class HostError(UserError):
    """The host process failed a call or died."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "the engine's log is in the folder logs of the run; selfimprove resume RUN goes on")


class HostGone(HostError):
    """The host process died, or hung and was killed: another one may do better."""


def died(log: Path, error: HostError) -> EngineDied:
    """What is raised when a call failed; whoever asked decides whether another engine is to try."""
    note(log, f"the engine is started again when it is asked again: {error.message}")
    return EngineDied(
        f"the engine failed: {error.message}{last_words(log)}",
        f"what was finished is kept; the engine's log is {log}; then selfimprove resume RUN",
    )


class Lives:
    """Whether an engine that died while it started is to be started again.

    Args:
        log: file that takes the host's output.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._deaths = 0

    def left(self, error: HostError) -> bool:
        """Count a death; whether another start may do better."""
        self._deaths += 1
        if self._deaths < DEATHS:
            note(self._log, f"the engine is started again: {error.message}")
        return self._deaths < DEATHS


def note(log: Path, sentence: str) -> None:
    """Write a sentence of our own into an engine's log."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\nselfimprove: {sentence}\n")


def last_words(log: Path) -> str:
    """The last lines of an engine's log, as the end of a sentence; empty where it said nothing."""
    try:
        lines = log.read_bytes()[-8192:].decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip() and not line.startswith("selfimprove: ")][-LAST_LINES:]
    return f"; its last words: {' | '.join(line[:200] for line in said)}" if said else ""


def cannot_serve(model: Path, error: HostError, log: Path) -> UserError:
    """What the user is told when a model does not start."""
    return UserError(
        f"vLLM could not serve {model}: {error.message}{last_words(log) if isinstance(error, HostGone) else ''}",
        f"selfimprove doctor; the engine's log is {log}",
    )


class HostProcess:
    """A host process that loads `model` in the background; the first `receive` is the answer to that.

    Args:
        model: the weights to load.
        options: how the engine is built, and after how many silent seconds it counts as hung.
        log: file that takes the host's output.
        task: what the engine is for.
    """

    def __init__(self, model: Path, options: Options, log: Path, task: Literal["generate", "reward"]) -> None:
        self.log = log
        self._patience = options.timeout
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # a host may hang in the middle of a frame
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(self._patience) + 1, 0))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"selfimprove: engine start on {model} to {task}\n")
        with log.open("ab") as file, theirs:
            self.process = children.start(
                [sys.executable, "-m", "selfimprove.engine.host", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=children.NOTHING,
                stdout=file,
                stderr=file,
                env=_environment(options),
            )
        self._connection = Connection(ours.detach())
        self._send(messages.Load(str(model), options, task))

    def call(self, call: messages.Call, expected: type[R], finished: Finished | None = None) -> R:
        """Send a call and wait for its answer.

        Raises:
            HostError: the call failed, or the process is gone.
        """
        self._send(call)
        return self.receive(expected, finished)

    def receive(self, expected: type[R], finished: Finished | None = None) -> R:
        """Wait for the answer to what was sent; `finished` hears of what is ready before.

        A host that is sampling (`finished`) when the user asks to stop begins no further request and answers early.

        Raises:
            HostError: the call failed.
            HostGone: the process is gone, or said nothing for too long and was killed.
        """
        heard = time.monotonic()
        stop = interrupts.Stop("the engine finishes the answers that it has begun")
        while True:
            if finished and stop.due():
                self._send(messages.Stop())
            try:
                if not self._connection.poll(TICK):
                    if time.monotonic() - heard > self._patience:
                        raise self._hung()
                    continue
                reply: messages.Reply = msgspec.msgpack.decode(self._connection.recv_bytes(), type=messages.Reply)
            except BlockingIOError:
                raise self._hung() from None
            except (EOFError, OSError):
                raise HostGone(f"the engine process ended with code {self.process.wait()}") from None
            heard = time.monotonic()
            match reply:
                case messages.Finished(number, completions):
                    if finished:
                        finished(number, completions)
                case messages.Beat():
                    pass
                case messages.Failure(error, traceback):
                    with self.log.open("a", encoding="utf-8") as log:
                        log.write(traceback)
                    raise HostError(error)
                case _ if isinstance(reply, expected):
                    return reply
                case _:
                    raise HostError(f"unexpected reply {type(reply).__name__}")

    def await_ready(self) -> None:
        """Wait for the answer to the start.

        Raises:
            KeyboardInterrupt: the user asked to stop; the answer can still be awaited.
            HostError: see `receive`.
        """
        began = time.monotonic()
        while not self._connection.poll(TICK):
            interrupts.check()
            if time.monotonic() - began > self._patience:
                raise self._hung()
        self.receive(messages.Done)

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        children.end(self.process)

    def _hung(self) -> HostGone:
        children.end(self.process)
        return HostGone(f"the engine hung: it said nothing for {self._patience:.0f} s (machine.engine_timeout_s)")

    def _send(self, call: messages.Call) -> None:
        try:
            self._connection.send_bytes(msgspec.msgpack.encode(call))
        except BlockingIOError:
            raise self._hung() from None
        except OSError as error:
            raise HostGone(f"the engine process is gone ({error})") from None


def _environment(options: Options) -> dict[str, str]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    for name in RANKS:
        environment.pop(name, None)
    if options.threads is not None:
        environment["OMP_NUM_THREADS"] = str(options.threads)
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # bound threads spin beside any other load
    return environment
