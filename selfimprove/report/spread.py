"""How a run spreads over a machine, on a terminal: workers, shards, memory of a device and time of each stage."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from selfimprove.machine_file import Hardware
from selfimprove.pace import Work
from selfimprove.placement import Placement
from selfimprove.plan import Examined, called
from selfimprove.recipe import Machine
from selfimprove.report.escape import line
from selfimprove.report.planning import UNKNOWN, duration

GIB = 2**30


def show(
    examined: Sequence[Examined],
    placed: Mapping[str, Placement],
    machine: Machine,
    hardware: Hardware | None,
    console: Console,
) -> None:
    """Print what the machine is, a row for each kind of work of each stage, and what does not fit."""
    console.print(told(machine, hardware), highlight=False, markup=False, soft_wrap=True)
    shown = [(called(e.step), placed[e.step.directory]) for e in examined if e.step.directory in placed]
    if not shown:
        return
    console.print(table(shown))
    for title, said in (
        (
            "memory of one device, without activations",
            [(s, parts(w)) for s, one in shown for w in one.work if w.memory],
        ),
        ("time", [(stage, one.how) for stage, one in shown if one.work]),
        ("idle", [(stage, note) for stage, one in shown for note in one.notes]),
        ("warning", [(stage, warning) for stage, one in shown for warning in one.warnings]),
    ):
        for sentence, stages in _grouped(said):
            console.print(f"{title}: {stages}: {line(sentence)}", highlight=False, markup=False, soft_wrap=True)


def told(machine: Machine, hardware: Hardware | None) -> str:
    """The machine in a line."""
    devices = (
        f"{hardware.devices_per_node} x {line(hardware.device)} of {hardware.memory_gib:g} GiB a node, "
        if (hardware)
        else ""
    )
    per_engine = f", each on {machine.tensor_parallel} devices" if machine.tensor_parallel > 1 else ""
    engines = "an engine a rank" if machine.executor == "static" else counted(machine.workers, "engine")
    nodes = f" on each of {machine.nodes} nodes" if machine.nodes > 1 else ""
    sharding = f", {machine.sharding}" if machine.num_processes * machine.nodes > 1 else ""
    return (
        f"machine: {devices}executor {machine.executor}, {engines}{per_engine};"
        f" training in {counted(machine.num_processes, 'process')}{nodes}{sharding}"
    )


def counted(number: int, what: str) -> str:
    """`1 engine`, `8 processes`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('s') else 's'}"


def table(shown: Sequence[tuple[str, Placement]]) -> Table:
    """A row for each kind of work, and the time of all."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    drawn.add_column("stage", no_wrap=True)
    drawn.add_column("work", no_wrap=True)
    for heading in ("workers", "shards", "memory"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    drawn.add_column("time", justify="right", no_wrap=True)
    for stage, one in shown:
        time = UNKNOWN if one.seconds is None else duration(one.seconds)
        if not one.work:
            drawn.add_row(stage, "no model", "", "", "", time)
        for number, work in enumerate(one.work):
            drawn.add_row(stage if not number else "", *_cells(work), "" if number else time)
    known = [one.seconds for _, one in shown if one.seconds is not None]
    whole = duration(sum(known))
    drawn.add_section()
    every = whole if len(known) == len(shown) else f">{whole}" if known else UNKNOWN
    drawn.add_row("all", "", "", "", "", every)
    return drawn


def _cells(work: Work) -> list[str]:
    workers = UNKNOWN if work.workers is None else str(work.workers)
    shards = "" if work.kind == "train" else UNKNOWN if work.shards is None else str(sum(work.shards))
    return [
        work.kind,
        workers if work.devices == 1 else f"{workers} x {work.devices}",
        shards,
        UNKNOWN if work.memory is None else f"{gib(sum(work.memory.values()))} GiB",
    ]


def parts(work: Work) -> str:
    """What takes the memory of a device."""
    return f"{work.kind} = " + " + ".join(f"{what} {gib(number)} GiB" for what, number in (work.memory or {}).items())


def _grouped(said: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each sentence once, with all stages that it is said of."""
    found: dict[str, list[str]] = {}
    for stage, sentence in said:
        if stage not in found.setdefault(sentence, []):
            found[sentence].append(stage)
    return [(sentence, together(stages)) for sentence, stages in found.items()]


def together(stages: Sequence[str]) -> str:
    """`1-4/generate, 1/train`; rounds that follow one another as one."""
    runs: list[tuple[str, int, int]] = []
    for iteration, name in sorted((int(stage.partition("/")[0]), stage.partition("/")[2]) for stage in stages):
        before = next((i for i, (what, _, last) in enumerate(runs) if what == name and last == iteration - 1), None)
        if before is None:
            runs.append((name, iteration, iteration))
        else:
            runs[before] = (name, runs[before][1], iteration)
    return ", ".join(f"{first}/{name}" if first == last else f"{first}-{last}/{name}" for name, first, last in runs)


def gib(number: int) -> str:
    """`72.3`; bytes in GiB."""
    return f"{number / GIB:.1f}" if number >= GIB / 20 else f"{number / GIB:.2g}"
