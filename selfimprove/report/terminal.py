"""What a person sees while a run goes on and afterwards, on stderr (talk) or stdout (tables that were asked for)."""

import time
from collections.abc import Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from selfimprove.plan import BASE, Step
from selfimprove.report.escape import line
from selfimprove.results import signed
from selfimprove.store import Manifest
from selfimprove.study import Ended, Planned

MOST_BENCHMARKS = 3  # that fit into 80 columns beside one another
WIDE = 110  # columns for a bar with the last score beside it
STATES = {"done": "green", "running": "cyan", "failed": "red", "stale": "yellow", "missing": "dim"}


class Watcher:
    """Follows a run: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.score = ""
        self._where = ""
        self._begun = 0.0
        self._first: dict[str, tuple[float, int]] = {}  # when a count was first told, and what it was
        self._said: dict[str, float] = {}
        self._tasks: dict[str, Any] = {}
        wide = console.width >= WIDE
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24 if wide else 6),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            *([TextColumn("{task.fields[score]}", style="dim")] if wide else []),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Watcher":
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def started(self, step: Step, number: int, total: int) -> None:
        """See run.Display."""
        self._begun = time.monotonic()
        self._where = f"{_iteration(step.iteration)} {step.name} [{number}/{total}]"
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks, self._said, self._first = {}, {}, {}
        if self.console.is_terminal:
            self._tasks[""] = self._bars.add_task(f"{self._where} starting", total=None, rate="", score=self.score)

    def progress(self, what: str, done: int, total: int) -> None:
        """See run.Display; what stands in parentheses, as a cost, changes on the way."""
        now = time.monotonic()
        what = line(what)
        name = what.partition(" (")[0]  # what follows changes as it goes on: the cost so far
        first, had = self._first.setdefault(name, (now, done))  # what an earlier process did is no speed of this one
        rate = f"{(done - had) / (now - first):.0f}/s" if now - first > 0.5 else ""
        if self.console.is_terminal:
            if "" in self._tasks:
                self._bars.remove_task(self._tasks.pop(""))
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task("", total=total, rate="", score="")
            told = f"{self._where} {what}".strip()
            self._bars.update(self._tasks[name], description=told, completed=done, rate=rate, score=self.score)
        elif now - self._said.get(name, first) > 10 and done < total:
            self._said[name] = now
            left = (now - first) * (total - done) / max(1, done - had)
            told = f"  {self._where} {what}: {done}/{total} {rate}, {left:.0f} s left"
            self.console.print(told, highlight=False, markup=False, soft_wrap=True)

    def stopping(self) -> None:
        """See run.Display."""
        self.console.print(
            "stopping: what is under way is finished and kept, nothing new is begun; Ctrl-C again stops at once",
            highlight=False,
        )

    def waiting(self, what: str) -> None:
        """See run.Display."""
        told = f"still stopping: {what}; Ctrl-C again stops at once"
        self.console.print(told, highlight=False, markup=False)

    def finished(self, step: Step, manifest: Manifest, scores: dict[str, Any] | None) -> None:
        """See run.Display."""
        rows = manifest.rows
        dropped = ", ".join(f"{count} {line(reason)}" for reason, count in rows.quarantined.items())
        told = Text()
        told.append(f"{_iteration(step.iteration):<13}", style="bold")
        told.append(f"{step.name:<20}")
        told.append(f"{rows.rows_out:>6} of {rows.rows_in:<6} {rows.unit + 's':<14}{manifest.seconds:>7.1f} s")
        if dropped:
            told.append(f"  ({dropped})", style="dim")
        if scores:
            self.score = ", ".join(f"{mode} {s['value']:.3f}" for mode, s in scores["scores"].items())
            told.append(f"  {self.score}", style="cyan")
        self.console.print(told, soft_wrap=True)


class StudyWatcher:
    """Follows a study: a bar over its runs on a terminal, a line for each run that ended."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self._total, self._over = total, 0
        self._begun = time.monotonic()
        self._shares: dict[str, float] = {}  # of the runs under way
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "StudyWatcher":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def started(self, one: Planned) -> None:
        """See study.Display."""
        self._shares[one.name] = 0.0
        self._draw()

    def progress(self, one: Planned, done: int, total: int) -> None:
        """See study.Display."""
        self._shares[one.name] = done / total
        self._draw()

    def ended(self, one: Planned, how: Ended) -> None:
        """See study.Display."""
        self._shares.pop(one.name, None)
        self._over += 1
        scores = ", ".join(f"{mode} {value:.3f}" for mode, value in how.scores.items())
        told = f"[{self._over}/{self._total}] {one.name}: {how.state}, {how.seconds:.0f} s  {scores or line(how.error)}"
        self.console.print(f"{told}  {self._left()}".rstrip(), highlight=False, markup=False, soft_wrap=True)
        self._draw()

    def stopping(self) -> None:
        """See study.Display."""
        self.console.print("stopping at the next safe points; Ctrl-C again stops at once", highlight=False)

    def _draw(self) -> None:
        done = self._over + sum(self._shares.values())
        what = f"{self._over}/{self._total} runs  {self._left()}  {' '.join(self._shares)}"
        self._bar.update(self._task, completed=done, description=what)

    def _left(self) -> str:
        """Runs take about as long as those before them; the first share of one gives no measure yet."""
        done = self._over + sum(self._shares.values())
        if done <= 0 or self._over == self._total:
            return ""
        seconds = (time.monotonic() - self._begun) * (self._total - done) / done
        return f"about {seconds / 60:.0f} min left" if seconds >= 60 else f"about {seconds:.0f} s left"


def evaluations(summary: dict[str, Any]) -> Group:
    """The iterations' scores, and their benchmarks below where these fit beside one another."""
    parts: list[RenderableType] = [iterations_table(summary)]
    names = list(summary["base"].get("benchmarks", {}))
    if len(names) > MOST_BENCHMARKS:
        parts.append(Text(f"{len(names)} benchmarks: selfimprove status {summary['run']} --json"))
    elif names:
        parts.append(_benchmarks_table(summary, names))
    return Group(*parts)


def iterations_table(summary: dict[str, Any]) -> Table:
    """One row an iteration: held-out accuracy with its 95 % interval, and the change against the base."""
    table = Table(
        title=Text(line(f"run {summary['run']} (recipe {summary['recipe']}): {summary['state']}")),
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for heading in ("", "greedy", "vs base", "sampled", "vs base"):
        table.add_column(heading, overflow="fold")
    for name, entry in _evaluated(summary):
        if not entry["scores"]:
            table.add_row(name, *["-"] * 4)
            continue
        compared = entry.get("comparisons", {})
        cells = [
            text
            for mode in ("greedy", "sampled")
            for text in (score(entry["scores"][mode]), change(compared, "base", mode))
        ]
        table.add_row(name, *cells)
    return table


def _benchmarks_table(summary: dict[str, Any], names: Sequence[str]) -> Table:
    """One row an iteration, one column a benchmark."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("", *names):
        table.add_column(Text(heading), overflow="fold")
    for name, entry in _evaluated(summary):
        known = entry.get("benchmarks")
        table.add_row(name, *(score(known[benchmark]) if known else "-" for benchmark in names))
    return table


def _evaluated(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What was evaluated, by the name of its row."""
    rows = [("base", summary["base"])]
    if summary["sft"]:
        rows.append(("after SFT", summary["sft"]))
    rows += [(f"iteration {entry['iteration']}", entry) for entry in summary["iterations"]]
    if summary["control"]:
        rows.append(("SFT control", summary["control"]))
    return rows


def stages_table(summary: dict[str, Any]) -> Table:
    """One row a stage: state, rows, seconds."""
    table = Table()
    for heading in ("iteration", "stage", "state", "in", "out", "quarantined", "seconds"):
        justify: Literal["left", "right"] = "right" if heading in ("in", "out", "quarantined", "seconds") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for entry in [summary["base"], *summary["iterations"]]:
        for stage in entry["stages"]:
            cells = [stage["rows_in"], stage["rows_out"], stage["quarantined"], stage["seconds"]]
            state = Text(stage["state"], style=STATES.get(stage["state"], ""))
            table.add_row(
                _iteration(entry["iteration"]), stage["name"], state, *("-" if c is None else str(c) for c in cells)
            )
    return table


def score(interval: dict[str, Any]) -> str:
    """`.712 [.676, .745]`."""
    return f"{_short(interval['value'])} [{_short(interval['ci95'][0])}, {_short(interval['ci95'][1])}]"


def change(comparisons: dict[str, Any], against: str, mode: str) -> str:
    """`+.103 p<.001`; empty where nothing was compared."""
    if against not in comparisons:
        return ""
    found = comparisons[against][mode]
    p = "p<.001" if found["p"] < 0.001 else "p=1" if found["p"] > 0.9995 else f"p={_short(found['p'])}"
    return f"{signed(found['difference'])} {p}"


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if 0 <= value < 1 else f"{value:.3f}"


def _iteration(number: int) -> str:
    return "base" if number == BASE else f"iteration {number}"
