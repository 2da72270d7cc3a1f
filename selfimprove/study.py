"""A study: worlds x arms x seeds, each an ordinary run, made by worker processes that take one after another.

The file says what is compared with what; `planned` turns it into runs, `perform` makes those that are not finished.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import msgspec
import pydantic
from pydantic import Field

from selfimprove import children, locks, recipe, recipe_file, textfile
from selfimprove.errors import UserError
from selfimprove.interrupts import Interrupts
from selfimprove.plan import examine
from selfimprove.recipe import Edit, Recipe
from selfimprove.run import place
from selfimprove.store import Run, write_atomically

NAME = r"^[A-Za-z0-9]\w*$"  # of worlds and arms; '-' parts the name of a run
OWN = ("seed", "rounds")  # settings that have a key of their own in the file

# --- the file ----------------------------------------------------------------------------------------------------


class World(Edit):
    """What the arms are tried in: data, judge, model; its settings apply to every arm."""

    title: str = ""


class Arm(Edit):
    """A recipe and what this arm changes of it."""

    recipe: str  # a shipped one or a TOML file
    claim: str = ""  # what its paper says, shown beside what was found
    worlds: list[str] | None = Field(None, min_length=1)  # unset = all
    within: dict[str, Edit] = Field({}, alias="in")  # further changes in a world
    rounds: int | None = Field(None, ge=1)  # unset = the study's
    control_of: str | None = None  # the arm whose gain this one could explain away


class Study(Edit):
    """The file; its own `set` and `drop` apply everywhere."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seeds: list[int] = Field([0], min_length=1)
    rounds: int | None = Field(None, ge=1)  # unset = each recipe's
    baselines: list[str] = Field([])  # arms that every other one is compared with
    out: str | None = None  # the report; unset = NAME.md
    worlds: dict[str, World] = Field(min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _names_fit(self) -> Self:
        named = [*self.worlds, *self.arms]
        pattern = pydantic.TypeAdapter(pydantic.constr(pattern=NAME))
        for name in named:
            try:
                pattern.validate_python(name)
            except pydantic.ValidationError:
                raise ValueError(f"'{name}' cannot name a world or an arm: letters, digits and '_'") from None
        for wrong, sentence in [
            (len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0, "seeds are different numbers from 0 on"),
            *((name not in self.arms, f"baseline '{name}' is no arm") for name in self.baselines),
            *self._wrong_in_arms(),
        ]:
            if wrong:
                raise ValueError(sentence)
        return self

    def _wrong_in_arms(self) -> Iterator[tuple[bool, str]]:
        for name, arm in self.arms.items():
            of = arm.control_of
            yield of is not None and (of not in self.arms or of == name), f"arm '{name}': no other arm '{of}'"
            for world in [*(arm.worlds or []), *arm.within]:
                yield world not in self.worlds, f"arm '{name}': no world '{world}'"
            for world in arm.within:
                outside = arm.worlds is not None and world not in arm.worlds
                yield outside, f"arm '{name}': settings in '{world}', where it does not run"
        for edit in [self, *self.worlds.values(), *self.arms.values()]:
            for inner in [edit, *(edit.within.values() if isinstance(edit, Arm) else [])]:
                for key in OWN:
                    yield key in inner.set or key in inner.drop, f"'{key}' is no setting here: it has a key of its own"

    def tried_in(self, arm: str) -> list[str]:
        """The worlds that an arm runs in."""
        return self.arms[arm].worlds or list(self.worlds)

    def edits(self, world: str, arm: str) -> list[Edit]:
        """What changes the arm's recipe in a world, in order."""
        chosen = self.arms[arm]
        return [self, self.worlds[world], chosen, *([chosen.within[world]] if world in chosen.within else [])]


def load(path: Path) -> Study:
    """Read a study.

    Raises:
        UserError: unreadable, no TOML, an unknown key, a name that nothing has.
    """
    hint = "docs/studies.md shows one"
    return recipe.validated(Study, recipe_file.read_toml(path, "study", hint, hint), f"study {path.name}")


# --- its runs ----------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """One run of a study."""

    name: str
    world: str
    arm: str
    seed: int
    recipe: Recipe


def planned(study: Study) -> list[Planned]:
    """Every run, seed by seed, so that what an interrupted study leaves are complete seeds.

    Raises:
        UserError: an arm's settings make no recipe, or arms of one world are not measured alike.
    """
    recipes = {(world, arm): _recipe_of(study, world, arm) for arm in study.arms for world in study.tried_in(arm)}
    for world in study.worlds:
        _measured_alike(world, {arm: one for (where, arm), one in recipes.items() if where == world})
    return [
        Planned(f"{study.name}-{world}-{arm}-s{seed}", world, arm, seed, chosen.model_copy(update={"seed": seed}))
        for seed in study.seeds
        for world in study.worlds
        for arm in study.arms
        if (chosen := recipes.get((world, arm)))
    ]


def _recipe_of(study: Study, world: str, arm: str) -> Recipe:
    rounds = study.arms[arm].rounds or study.rounds
    own = [Edit(set={"rounds": rounds})] if rounds else []
    try:
        chosen = recipe_file.load(recipe_file.find(study.arms[arm].recipe), edits=[*study.edits(world, arm), *own])
    except UserError as error:
        raise UserError(f"arm '{arm}' in world '{world}': {error.message}", error.hint) from None
    return recipe_file.absolute(chosen)


def _measured_alike(world: str, arms: Mapping[str, Recipe]) -> None:
    """Scores under different prompts or judges cannot be compared."""
    first = next(iter(arms), "")
    for arm, chosen in arms.items():
        for what, mine, others in [
            ("[evaluate]", chosen.evaluate, arms[first].evaluate),
            ("data.heldout", chosen.data.heldout, arms[first].data.heldout),
        ]:
            if mine != others:
                raise UserError(
                    f"arms '{first}' and '{arm}' differ in {what} in world '{world}', so their scores do not compare",
                    f"set it in [worlds.{world}], for all of them",
                )


def finished(run: Run, chosen: Recipe) -> bool:
    """Whether a run has everything that this recipe makes."""
    if not run.exists() or recipe_file.differences(recipe_file.load(run.recipe_file), chosen):
        return False
    return all(examined.status == "done" for examined in examine(run, chosen))


class Ledger(pydantic.BaseModel):
    """What is known of a study's runs beyond their directories."""

    failures: dict[str, str] = {}  # run: why its last attempt failed
    at_once: dict[str, int] = {}  # run: how many were made side by side


class Folder:
    """`runs/NAME.study`: the ledger, what workers and their engines said, the lock."""

    def __init__(self, runs: Path, study: Study) -> None:
        self.runs = runs
        self.path = runs / f"{study.name}.study"

    def log(self, worker: int) -> Path:
        """What a worker and its engine say."""
        return self.path / f"worker-{worker}.log"

    def read(self) -> Ledger:
        """The ledger; an empty one at the beginning.

        Raises:
            UserError: it is damaged.
        """
        path = self.path / "ledger.json"
        if not os.path.lexists(path):
            return Ledger()
        hint = f"move it away: only why runs failed is lost, selfimprove makes them again; mv {path} {path}.damaged"
        try:
            return Ledger.model_validate(textfile.parse_json(textfile.read(path, hint)))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}", hint) from None

    def write(self, ledger: Ledger) -> None:
        """Keep the ledger."""
        write_atomically(self.path / "ledger.json", ledger.model_dump_json(indent=1) + "\n")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time makes the runs of a study.

        Raises:
            UserError: another one does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / ".gitignore").write_text("*\n", encoding="utf-8")
        with locks.held(self.path, f"study '{self.path.stem}'", "wait for it; --report-only needs no runs"):
            yield


# --- making them -------------------------------------------------------------------------------------------------


class Task(msgspec.Struct, tag=True):
    """Make a run."""

    run: str  # its directory
    recipe: dict[str, Any]
    siblings: list[str]  # directories of runs whose artifacts it may adopt
    command: list[str]


class Stage(msgspec.Struct, tag=True):
    """A stage of the run is published."""

    done: int
    total: int


class Ended(msgspec.Struct, tag=True):
    """The run is done, failed or stopped."""

    state: str
    seconds: float = 0.0
    error: str = ""
    scores: dict[str, float] = {}  # of the last evaluation


Reply = Stage | Ended


class Display(Protocol):
    """What watches a study."""

    def started(self, one: Planned) -> None:
        """A run begins or goes on."""

    def progress(self, one: Planned, done: int, total: int) -> None:
        """A stage of it is published."""

    def ended(self, one: Planned, how: Ended) -> None:
        """It is over."""

    def stopping(self) -> None:
        """The user asked to stop; the runs end at their next safe points."""


def unfinished(runs: Sequence[Planned], folder: Folder) -> list[Planned]:
    """The runs that are still to make, in order."""
    return [one for one in runs if not finished(place(folder.runs, one.name), one.recipe)]


def perform(
    runs: Sequence[Planned],
    todo: Sequence[Planned],
    folder: Folder,
    jobs: int,
    display: Display,
    command: list[str],
) -> dict[str, str]:
    """Make the runs of `todo`, `jobs` at a time; returns those that failed and why, the others went on.

    Raises:
        KeyboardInterrupt: the user stopped it; the runs under way ended at safe points.
    """
    with folder.lock(), Interrupts(display.stopping) as interrupts:
        ledger = folder.read()
        workers = [Worker(number, folder.log(number)) for number in range(min(jobs, len(todo)))]
        try:
            _feed(workers, runs, todo, folder, ledger, display, interrupts, command)
            for worker in workers:
                worker.dismiss()
        finally:
            for worker in workers:
                worker.kill()
        interrupts.check()
    return {one.name: ledger.failures[one.name] for one in todo if one.name in ledger.failures}


def _feed(
    workers: Sequence["Worker"],
    runs: Sequence[Planned],
    todo: Sequence[Planned],
    folder: Folder,
    ledger: Ledger,
    display: Display,
    interrupts: Interrupts,
    command: list[str],
) -> None:
    """Hand the runs to the workers and hear what became of them."""
    waiting, busy = deque(todo), dict[Worker, Planned]()
    while waiting or busy:
        if interrupts.pending:
            waiting.clear()
            for worker in busy:
                worker.interrupt()
        for worker in workers:
            if waiting and worker not in busy:
                busy[worker] = one = waiting.popleft()
                worker.give(_task(one, runs, folder, command))
                display.started(one)
        ready = wait([worker.connection for worker in busy], timeout=0.2)
        for worker in [worker for worker in busy if worker.connection in ready]:
            one = busy[worker]
            match worker.hear():
                case Stage(done, total):
                    display.progress(one, done, total)
                case Ended() as how:
                    del busy[worker]
                    ledger.at_once[one.name] = len(workers)
                    ledger.failures.pop(one.name, None)
                    if how.state == "failed":
                        ledger.failures[one.name] = how.error
                    folder.write(ledger)
                    display.ended(one, how)


def _task(one: Planned, runs: Sequence[Planned], folder: Folder, command: list[str]) -> Task:
    siblings = [folder.runs / other.name for other in runs if other.seed == one.seed and other.name != one.name]
    return Task(
        str(folder.runs / one.name),
        one.recipe.model_dump(exclude_none=True),
        [str(path) for path in siblings],
        command,
    )


class Worker:
    """The driver's side of a process that makes one run after another with one engine; see worker.py."""

    def __init__(self, number: int, log: Path) -> None:
        self.number = number
        self.log = log
        self._start()

    def give(self, task: Task) -> None:
        """Let it make a run; a worker that died is replaced."""
        if self._process.poll() is not None:
            self.kill()
            self._start()
        self._told = False
        with contextlib.suppress(OSError):  # it died just now: `hear` says so
            self.connection.send_bytes(msgspec.msgpack.encode(task))

    def hear(self) -> Reply:
        """What it says next."""
        try:
            reply: Reply = msgspec.msgpack.decode(self.connection.recv_bytes(), type=Reply)
            return reply
        except (EOFError, OSError):
            code = self._process.wait()
            if self._told:
                return Ended("stopped")
            return Ended("failed", error=f"its process ended with code {code}; {self.log} may say why")

    def interrupt(self) -> None:
        """Ask it, once, to stop at the next safe point."""
        if not self._told:
            self._told = True
            self._process.send_signal(signal.SIGINT)

    def dismiss(self) -> None:
        """Let it close its engine and end."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)

    def kill(self) -> None:
        """End it at once."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with self.log.open("ab") as log, theirs:
            self._process = children.start(
                [
                    *(sys.executable, "-m", "selfimprove.worker"),
                    *(str(theirs.fileno()), str(os.getpid()), str(self.log)),
                ],
                pass_fds=[theirs.fileno()],
                stdin=children.NOTHING,
                stdout=log,
                stderr=log,
            )
        self.connection = Connection(ours.detach())
        self._told = False
