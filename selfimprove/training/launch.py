"""From a stage to a finished training: in this process, or in several under torchrun. The recipe says how many."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfimprove import children, disk, interrupts, store
from selfimprove.errors import UserError
from selfimprove.recipe import Machine, Optimizer, Train
from selfimprove.training import distributed, rendezvous
from selfimprove.training.job import Job, PairRow, Weights
from selfimprove.training.trainer import STOP, fit

SPECIFICATION = "job.json"  # of a training in several processes, there for as long as it runs
GRACE_SECONDS = 60.0  # for a node's processes to end after the driver's
POLL_SECONDS = 0.2


def train(job: Job) -> dict[str, float]:
    """Train as `machine` says; returns the last step's metrics.

    Over several nodes this is node 0, the driver; the others `join` it, for as long as `job.scratch` has a job.json.

    Raises:
        KeyboardInterrupt: the user asked to stop; a checkpoint of the last step is kept.
        UserError: what a training process raised, or that one died.
    """
    if job.machine.num_processes * job.machine.nodes == 1:
        return fit(job, distributed.World(0, 1, distributed.device()))
    job.scratch.mkdir(parents=True, exist_ok=True)
    (job.scratch / STOP).unlink(missing_ok=True)
    specification = job.scratch / SPECIFICATION
    log = _log(specification, 0)
    command = rendezvous.torchrun(job.machine, 0, attempt := uuid.uuid4().hex)
    store.write_atomically(specification, json.dumps({"attempt": attempt, "job": _plain(job)}))
    try:
        with _started(command, specification, log, subprocess.PIPE) as process:
            shown = _follow(process, job)
    finally:
        specification.unlink(missing_ok=True)
    if shown is None:
        raise UserError(
            f"a training process ended with code {process.returncode}",
            f"{_seen(log, job.machine)}; selfimprove resume RUN",
        )
    return shown


def join(specification: Path, machine: Machine, node_rank: int) -> None:
    """Run this node's processes of the training that the driver has written down; returns when they are done.

    Args:
        specification: job.json in the training's scratch folder, on a file system that all nodes see at the same path.
        machine: the recipe's.
        node_rank: of this node, from 1.

    Raises:
        KeyboardInterrupt: the user asked this node to stop; the driver's training fails, and can be resumed.
        UserError: a process of this node died, or the driver has given the training up.
    """
    attempt = json.loads(specification.read_text(encoding="utf-8"))["attempt"]
    log, mine = _log(specification, node_rank), specification.stat()
    gone = None
    with _started(rendezvous.torchrun(machine, node_rank, attempt), specification, log, None) as process:
        while process.poll() is None and (gone is None or time.monotonic() < gone + GRACE_SECONDS):
            interrupts.check()
            time.sleep(POLL_SECONDS)
            if gone is None and not _same(specification, mine):
                gone = time.monotonic()
    if process.returncode:
        raise UserError(
            f"the training processes of node {node_rank} ended with code {process.returncode}",
            f"{_seen(log, machine)}; the driver, node 0, says more",
        )


def _same(path: Path, known: os.stat_result) -> bool:
    """Whether the driver has not finished, nor begun anew."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_ino, found.st_mtime_ns) == (known.st_ino, known.st_mtime_ns)


def _log(specification: Path, node_rank: int) -> Path:
    return specification.with_name(f"torchrun-{node_rank}.log" if node_rank else "torchrun.log")


def _seen(log: Path, machine: Machine) -> str:
    if machine.nodes == 1:
        return f"its output is {log}"
    return f"its output is {log}; all {machine.nodes} nodes must be there and reach {rendezvous.endpoint(machine)}"


@contextmanager
def _started(
    command: list[str], specification: Path, log: Path, stdout: int | None
) -> Iterator["subprocess.Popen[str]"]:
    """The torchrun of this node; it and its processes are gone afterwards."""
    with log.open("ab") as output:
        process = children.start(
            [
                *command,
                "--no-python",
                *children.beyond([sys.executable, "-m", "selfimprove.training.launch", str(specification)]),
            ],
            # torchrun puts its workers into sessions of their own and forgets them when it is killed, but they share
            # its stdin: we hold the other end of it, and say nothing
            stdin=subprocess.PIPE,
            stdout=stdout or output,
            stderr=output,
            text=True,
        )
        try:
            yield process
        finally:
            if process.stdin:
                process.stdin.close()
            children.end(process)


def _follow(process: "subprocess.Popen[str]", job: Job) -> dict[str, float] | None:
    """What the processes say, line by line: progress, an error of the user's or of the disk, or the result."""
    shown: dict[str, float] | None = None
    assert process.stdout is not None
    for line in process.stdout:
        try:
            said = json.loads(line)
        except json.JSONDecodeError:
            continue  # some library talks on stdout
        match said:
            case {"done": int(done), "total": int(total)}:
                job.progress(done, total)
                if interrupts.asked():
                    (job.scratch / STOP).touch()
            case {"stopped": True}:
                raise KeyboardInterrupt
            case {"error": str(message), "hint": hint}:
                raise UserError(message, hint)
            case {"disk": int(number), "file": str(file)}:
                raise OSError(number, os.strerror(number), file)
            case {"result": dict(result)}:
                shown = result
    return shown


def _plain(job: Job) -> dict[str, Any]:
    """The job as JSON values, which mean the same in any working folder."""
    values = job._asdict() | {
        "optimizer": job.optimizer.model_dump(),
        "machine": job.machine.model_dump(),
        "preference": job.preference and job.preference.model_dump(exclude_none=True),
        "start": (str(job.start.path.absolute()), job.start.identity),
        "references": {name: (str(w.path.absolute()), w.identity) for name, w in job.references.items()},
    }
    values.pop("progress")
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in values.items()}


def _job(values: dict[str, Any]) -> Job:
    """The inverse of `_plain`, run beside others: its progress goes to stdout."""

    def weights(pair: list[str]) -> Weights:
        return Weights(Path(pair[0]), pair[1])

    paths = {name: Path(values[name]) for name in ("out", "metrics", "scratch", "cache")}
    rows = [
        PairRow(name, prompt, chosen, rejected, rates and (rates[0], rates[1], rates[2]), source)
        for name, prompt, chosen, rejected, rates, source in values["rows"]
    ]
    return Job(
        **values
        | paths
        | {
            "rows": rows,
            "optimizer": Optimizer.model_validate(values["optimizer"]),
            "machine": Machine.model_validate(values["machine"]),
            "preference": values["preference"] and Train.model_validate(values["preference"]),
            "start": weights(values["start"]),
            "references": {name: weights(pair) for name, pair in values["references"].items()},
            "losses": values["losses"] and Path(values["losses"]),
            "progress": lambda done, total: _say({"done": done, "total": total}),
        }
    )


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def main(specification: str) -> None:
    """One of the processes that torchrun starts."""
    job = _job(json.loads(Path(specification).read_text(encoding="utf-8"))["job"])
    with distributed.joined() as world:
        try:
            shown = fit(job, world)
        except UserError as error:  # every process sees the same error; the first tells
            if world.first:
                _say({"error": error.message, "hint": error.hint})
            sys.exit(1)
        except KeyboardInterrupt:
            if world.first:
                _say({"stopped": True})
            return
        except Exception as error:
            number = disk.number_of(error)
            if number is not None:  # of the one process that writes
                _say({"disk": number, "file": str(job.scratch)})
            raise
        if world.first:
            _say({"result": shown})


if __name__ == "__main__":
    main(sys.argv[1])
