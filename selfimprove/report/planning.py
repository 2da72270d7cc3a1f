"""The plan of a run on a terminal: what would happen to each stage and why, and what it would take."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfimprove.estimates import Estimate, total
from selfimprove.plan import Examined, called
from selfimprove.report.escape import line

UNKNOWN = "?"
COLOURS = {"done": "green", "stale": "yellow", "to do": ""}


def show(examined: Sequence[Examined], taken: Mapping[str, Estimate], console: Console) -> None:
    """Print the plan; `taken` has an estimate of each step that is not done."""
    console.print(table(examined, taken))
    for sentence in reasons(examined):
        console.print(sentence, soft_wrap=True)
    if taken:
        console.print(f"tokens, time, disk, memory: {_measured(list(taken.values()))}", highlight=False)
    if all(one.status == "done" for one in examined):
        console.print("everything is made: nothing to do", highlight=False)


def table(examined: Sequence[Examined], taken: Mapping[str, Estimate]) -> Table:
    """A row for each stage, and the sum of what is left."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_footer=False)
    drawn.add_column("stage", no_wrap=True)
    drawn.add_column("plan", no_wrap=True)
    for heading in ("tokens", "time", "disk", "memory", "USD"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    left = [taken[e.step.directory] for e in examined if e.step.directory in taken]
    for one in examined:
        cells = _cells(taken[one.step.directory]) if one.step.directory in taken else [""] * 5
        status = Text(one.status, style=COLOURS[one.status])
        drawn.add_row(called(one.step), status, *cells)
    if left:
        sums = total(left)
        parts = [count(sums.tokens), duration(sums.seconds), size(sums.disk_bytes), size(sums.memory_bytes)]
        names = ("tokens", "seconds", "disk_bytes", "memory_bytes", "usd")
        cells = [
            _at_least(text, sums.unknown.get(name, 0), len(left))
            for text, name in zip([*parts, f"{sums.usd:.2f}"], names, strict=True)
        ]
        drawn.add_section()
        drawn.add_row("all", f"{len(left)} left", *cells)
    return drawn


def reasons(examined: Sequence[Examined]) -> list[Text]:
    """Why each stage is what it is, where that does not go without saying."""
    told = [one for one in examined if one.reason and one.status != "to do"]
    return [Text.assemble((f"{called(one.step)}: ", "bold"), line(one.reason)) for one in told]


def _cells(one: Estimate) -> list[str]:
    return [
        UNKNOWN if one.tokens is None else count(one.tokens),
        UNKNOWN if one.seconds is None else duration(one.seconds),
        UNKNOWN if one.disk_bytes is None else size(one.disk_bytes),
        UNKNOWN if one.memory_bytes is None else size(one.memory_bytes),
        UNKNOWN if one.usd is None else f"{one.usd:.2f}" if one.usd else "",
    ]


def _at_least(text: str, unknown: int, of: int) -> str:
    """A sum of which parts are not known."""
    return UNKNOWN if unknown == of else f">{text}" if unknown else text


def _measured(left: Sequence[Estimate]) -> str:
    by_round = sum(one.how.startswith("as ") for one in left)
    if by_round == len(left):
        return "by earlier rounds of this run"
    return f"{by_round} by earlier rounds, the others at most" if by_round else "at most: nothing is measured yet"


def count(number: int) -> str:
    """`12k`, `3.4M`; a number of tokens."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def duration(seconds: float) -> str:
    """`12 s`, `3 min`, `1.5 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def size(number: int) -> str:
    """`12 MB`; a number of bytes, in thousands."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number} B"
