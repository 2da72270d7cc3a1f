"""A worker process: one engine for a whole run, one shard after the other.

Started by `local.Local` as `python -m selfimprove.execution.worker FD PID MACHINE LOG`.
"""

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
    spoke = 0.0

    def send(reply: messages.Reply) -> None:
        connection.send_bytes(msgspec.msgpack.encode(reply))

    def tell(count: int) -> None:
        nonlocal spoke
        if time.monotonic() - spoke > BEAT:
            spoke = time.monotonic()
            send(messages.Answered(count))

    with interrupts.Interrupts(lambda: None) as asked_to_stop, Engines(Path(log)) as engines:

        def listen() -> None:
            while True:
                try:
                    call = msgspec.msgpack.decode(connection.recv_bytes(), type=messages.Call)
                except (EOFError, OSError):
                    os._exit(1)  # nobody waits for an answer
                if isinstance(call, messages.Stop):
                    asked_to_stop.pending = True
                else:
                    calls.put(call)

        threading.Thread(target=listen, daemon=True).start()
        while True:
            call = calls.get()
            try:
                answer(call, engines, machine, tell)
                reply: messages.Reply = messages.Done()
            except KeyboardInterrupt:
                asked_to_stop.pending = False  # a study goes on with other runs
                reply = messages.Stopped()
            except UserError as error:
                reply = messages.Failed(error.message, error.hint)
            except Exception as error:
                traceback.print_exc()
                reply = messages.Failed(f"{type(error).__name__}: {error}", None)
            send(reply)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
