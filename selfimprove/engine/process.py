"""The driver's side of a vLLM host process: start it, call it, end it."""

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from selfimprove.engine import messages
from selfimprove.engine.protocol import Finished, Options
from selfimprove.errors import UserError

R = TypeVar("R")


class HostError(UserError):
    """The host process failed a call or died."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "the engine's log is in the folder logs of the run; selfimprove resume RUN goes on")


def cannot_serve(model: Path, error: HostError, log: Path) -> UserError:
    """What the user is told when a model does not start."""
    return UserError(f"vLLM could not serve {model}: {error}", f"selfimprove doctor; the engine's log is {log}")


class HostProcess:
    """A host process that loads `model` in the background; the first `receive` is the answer to that.

    Args:
        model: the weights to load.
        options: how the engine is built.
        log: file that takes the host's output.
        task: what the engine is for.
    """

    def __init__(self, model: Path, options: Options, log: Path, task: Literal["generate", "reward"]) -> None:
        self.log = log
        ours, theirs = socket.socketpair()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"selfimprove: engine start on {model} to {task}\n")
        with log.open("ab") as file, theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "selfimprove.engine.host", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is the driver's to handle
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
        """Wait for the answer to what was sent; `finished` hears of what is ready before."""
        while True:
            try:
                reply: messages.Reply = msgspec.msgpack.decode(self._connection.recv_bytes(), type=messages.Reply)
            except (EOFError, OSError):
                raise HostError(f"the engine process ended with code {self.process.wait()}") from None
            match reply:
                case messages.Finished(number, completions):
                    if finished:
                        finished(number, completions)
                case messages.Failure(error, traceback):
                    with self.log.open("a", encoding="utf-8") as log:
                        log.write(traceback)
                    raise HostError(error)
                case _ if isinstance(reply, expected):
                    return reply
                case _:
                    raise HostError(f"unexpected reply {type(reply).__name__}")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self.process.kill()
        self.process.wait()

    def _send(self, call: messages.Call) -> None:
        try:
            self._connection.send_bytes(msgspec.msgpack.encode(call))
        except OSError as error:
            raise HostError(f"the engine process is gone ({error})") from None


def _environment(options: Options) -> dict[str, str]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if options.threads is not None:
        environment["OMP_NUM_THREADS"] = str(options.threads)
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # bound threads spin beside any other load
    return environment
