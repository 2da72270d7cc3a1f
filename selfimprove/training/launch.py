"""From a stage to a finished training: in this process, or in several under torchrun. The recipe says how many."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from selfimprove import children, disk, interrupts
from selfimprove.errors import UserError
from selfimprove.recipe import Machine, Optimizer, Train
from selfimprove.training import distributed
from selfimprove.training.job import Job, PairRow, Weights
from selfimprove.training.trainer import STOP, fit


def train(job: Job) -> dict[str, float]:
    """Train as `machine` says; returns the last step's metrics.

    Raises:
        KeyboardInterrupt: the user asked to stop; a checkpoint of the last step is kept.
        UserError: what a training process raised, or that one died.
    """
    if job.machine.num_processes == 1:
        return fit(job, distributed.World(0, 1, distributed.device()))
    job.scratch.mkdir(parents=True, exist_ok=True)
    (job.scratch / STOP).unlink(missing_ok=True)
    specification = job.scratch / "job.json"
    specification.write_text(json.dumps(_plain(job)), encoding="utf-8")
    log = job.scratch / "torchrun.log"
    with log.open("ab") as output:
        process = children.start(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                f"--nproc-per-node={job.machine.num_processes}",
                "--no-python",
                *children.beyond([sys.executable, "-m", "selfimprove.training.launch", str(specification)]),
            ],
            # torchrun puts its workers into sessions of their own and forgets them when it is killed, but they share
            # its stdin: we hold the other end of it, and say nothing
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
        try:
            shown = _follow(process, job)
        finally:
            if process.stdin:
                process.stdin.close()
            children.end(process)
    if shown is None:
        raise UserError(
            f"a training process ended with code {process.returncode}", f"its output is {log}; selfimprove resume RUN"
        )
    return shown


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
    """The job as JSON values."""
    values = job._asdict() | {
        "optimizer": job.optimizer.model_dump(),
        "machine": job.machine.model_dump(),
        "preference": job.preference and job.preference.model_dump(exclude_none=True),
        "start": (str(job.start.path), job.start.identity),
        "references": {name: (str(w.path), w.identity) for name, w in job.references.items()},
    }
    values.pop("progress")
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


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
    job = _job(json.loads(Path(specification).read_text(encoding="utf-8")))
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
