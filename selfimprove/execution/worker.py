"""A worker process: one engine for a whole run, one shard after the other.

Started by `local.Local` as `python -m selfimprove.execution.worker FD PID MACHINE LOG`.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import msgspec

from selfimprove import children, interrupts, recipe
from selfimprove.engine import Engines
from selfimprove.errors import UserError
from selfimprove.execution import messages
from selfimprove.execution.carry import carry_out
from selfimprove.execution.inline import rest
from selfimprove.execution.shard import Work, asked

BEAT = 0.2  # seconds between two words about how far it is
PULSE = 1.0  # seconds between two words in any case, while a call is under way: a model may be slow to finish a row


class Voice:
    """What a worker says to its driver.

    Args:
        connection: to the driver.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._count: int | None = None  # of rows answered; None = between two calls
        self._spoke = 0.0
        threading.Thread(target=self._pulse, daemon=True).start()

    def tell(self, count: int) -> None:
        """So many rows have an answer."""
        self._count = count
        if time.monotonic() - self._spoke > BEAT:
            self._say(count)

    def end(self, reply: messages.Reply) -> None:
        """The call is over."""
        with self._lock:
            self._count = None
            self._connection.send_bytes(msgspec.msgpack.encode(reply))

    def _say(self, count: int | None) -> None:
        with self._lock:
            if count is not None and self._count is not None:
                self._spoke = time.monotonic()
                self._connection.send_bytes(msgspec.msgpack.encode(messages.Answered(count)))

    def _pulse(self) -> None:
        while True:
            time.sleep(PULSE)
            with contextlib.suppress(OSError):  # whoever listens ends this process
                self._say(self._count)


def answer(call: messages.Call, engines: Engines, machine: recipe.Machine, tell: Callable[[int], None]) -> None:
    """Carry out one call."""
    match call:
        case messages.Carry(folder, name, only):
            work, shard = asked(Path(folder), name)
            carry_out(engines, machine, Path(folder), work, shard, tell, only)
        case messages.Sleep(work):
            rest(engines, machine, msgspec.msgpack.decode(work, type=Work))


def main(descriptor: int, driver: int, settings: str, log: str) -> None:
    """Answer calls until the driver (a process id) hangs up or dies."""
    children.tie(driver)
    connection = Connection(descriptor)
    machine = recipe.Machine.model_validate_json(settings)
    calls: SimpleQueue[messages.Call] = SimpleQueue()
    voice = Voice(connection)

    with interrupts.Interrupts(lambda: None) as asked_to_stop, Engines(Path(log)) as engines:

        def listen() -> None:
            while True:
                try:
                    call = msgspec.msgpack.decode(connection.recv_bytes(), type=messages.Call)
                except (EOFError, OSError):
                    os._exit(1)  # nobody waits for an answer
                asked_to_stop.pending = isinstance(call, messages.Stop)  # of the call before; a study goes on
                if not isinstance(call, messages.Stop):
                    calls.put(call)

        threading.Thread(target=listen, daemon=True).start()
        while True:
            call = calls.get()
            try:
                answer(call, engines, machine, voice.tell)
                reply: messages.Reply = messages.Done()
            except KeyboardInterrupt:
                reply = messages.Stopped()
            except UserError as error:
                reply = messages.Failed(error.message, error.hint)
            except Exception as error:
                traceback.print_exc()
                reply = messages.Failed(f"{type(error).__name__}: {error}", None)
            voice.end(reply)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
