"""The command line: parse, call one function, print. Imports nothing heavy, so that --help answers at once.

stdout is data, stderr is talk. Exit codes: 0 done, 1 user error, 2 usage, 3 the answer is no, 130 interrupted.
"""

import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from selfimprove import __version__
from selfimprove.cli_score import score
from selfimprove.errors import UsageError, UserError

RUNS = Path("runs")

app = typer.Typer(
    help="Iterative LLM self-improvement: synthesize, generate, label, train, evaluate; round after round.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
demo = typer.Typer(help="The embedded default: its data and its base model.", no_args_is_help=True)
app.add_typer(demo, name="demo")
app.add_typer(score, name="score")

Settings = Annotated[
    Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Any key of the recipe, again and again.")
]
From = Annotated[
    Optional[str],
    typer.Option("--from", metavar="STAGE", help="Make this stage (as 2/label) and all that is made from it anew."),
]
Until = Annotated[Optional[str], typer.Option(metavar="STAGE", help="Stop after this stage.")]
Only = Annotated[Optional[str], typer.Option(metavar="STAGE", help="Make just this stage.")]
MachineFile = Annotated[
    Optional[Path],
    typer.Option("--machine", metavar="FILE.toml", help="Where it runs: its [machine] before the recipe's own."),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run in ./runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(shown: bool) -> None:
    if shown:
        print(f"selfimprove {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def iterate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe or a TOML file.")] = "default",
    rounds: Annotated[
        Optional[int], typer.Option(min=1, help="Iterations; the recipe says how many otherwise.")
    ] = None,
    run: Annotated[
        Optional[str], typer.Option(metavar="NAME", help="Name of the run; the recipe's name otherwise.")
    ] = None,
    model: Annotated[
        Optional[str], typer.Option(metavar="PATH", help="Model directory or hub id to start from.")
    ] = None,
    seed: Annotated[Optional[int], typer.Option(min=0, help="Seed of the run.")] = None,
    engine: Annotated[Optional[str], typer.Option(help="vllm, transformers or fake.")] = None,
    machine: MachineFile = None,
    settings: Settings = None,
    again: From = None,
    until: Until = None,
    only: Only = None,
) -> None:
    """Improve a model over numbered iterations; go on where an earlier call stopped."""
    from selfimprove import recipe_file

    overrides = [f"{key}={json.dumps(value)}" for key, value in _given(rounds, model, seed, engine).items()]
    chosen = recipe_file.load(recipe_file.find(recipe), [*overrides, *(settings or [])], machine=_machine(machine))
    chosen = recipe_file.absolute(chosen)
    _go(chosen.name if run is None else run, chosen, again, until, only)


def _machine(file: Path | None) -> dict[str, Any] | None:
    """The keys of [machine] in a machine file."""
    if file is None:
        return None
    from selfimprove import machine_file

    return machine_file.read(file).machine


def _given(rounds: int | None, model: str | None, seed: int | None, engine: str | None) -> dict[str, Any]:
    values = {"rounds": rounds, "model.path": model, "seed": seed, "engine.kind": engine}
    return {key: value for key, value in values.items() if value is not None}


@app.command()
def resume(
    run: RunName, machine: MachineFile = None, again: From = None, until: Until = None, only: Only = None
) -> None:
    """Finish a run that was stopped, killed or failed, or make a part of it."""
    from selfimprove import recipe_file

    found, chosen = _open(run)
    if machine:
        chosen = recipe_file.load(found.recipe_file, machine=_machine(machine))
    _go(run, chosen, again, until, only)


def _go(name: str, chosen: Any, again: str | None, until: str | None, only: str | None) -> None:
    from rich.console import Console

    from selfimprove import run as running
    from selfimprove.execution import Executors
    from selfimprove.report import terminal
    from selfimprove.status import summary

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own display says what goes on
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for kernels on the hub, which we do not use
    talk = Console(stderr=True)
    found = running.place(RUNS, name)
    selection = running.select(chosen, again, until, only)
    if again and not found.exists():
        raise UserError(f"run '{name}' has nothing yet that --from could set aside", "leave --from out")
    try:
        with terminal.Watcher(talk) as watcher, Executors() as executors:
            outcome = running.iterate(
                found,
                chosen,
                watcher,
                sys.argv[1:],
                executors,
                selection=selection,
                tell=lambda sentence: talk.print(sentence, highlight=False, soft_wrap=True),
            )
    except KeyboardInterrupt:
        talk.print(f"\nstopped; selfimprove resume {name} goes on where it stopped", highlight=False)
        raise typer.Exit(130) from None
    Console().print(terminal.evaluations(summary(found, chosen)))
    if outcome.made:
        talk.print(f"{outcome.made} stages in {outcome.seconds:.0f} s, in {found.path}", highlight=False)
    elif until or only:
        talk.print(f"run '{name}': {until or only} is made already", highlight=False, markup=False)
    else:
        talk.print(f"run '{name}' is finished: nothing to do", highlight=False)


@app.command()
def work(
    run: RunName,
    runs: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the driver's runs lie, as this machine sees it.")
    ] = RUNS,
) -> None:
    """Follow a run of executor = "static" as RANK of WORLD_SIZE, or of SLURM's: carry out shards until it ends."""
    from selfimprove import follower
    from selfimprove.boundary import is_run_name

    if not is_run_name(run):
        raise UsageError(f"'{run}' cannot be a run's name", "letters, digits, '.', '_' and '-', no slash")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    follower.follow((runs / run).absolute())


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML: worlds, arms, seeds; see docs/studies.md.")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs made at once, each worker with an engine of its own.")] = 1,
    out: Annotated[Optional[Path], typer.Option(help="The report; what the file says otherwise, or NAME.md.")] = None,
    numbers: Annotated[
        Optional[Path], typer.Option("--json", metavar="FILE", help="Also write every number as JSON.")
    ] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Make no run; report what is finished.")] = False,
) -> None:
    """Make many runs, arms x worlds x seeds, and write one report that compares them; go on where a call stopped."""
    from rich.console import Console

    from selfimprove import study as studies

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    chosen = studies.load(file)
    folder = studies.Folder(RUNS, chosen)
    runs = studies.planned(chosen)
    failures: dict[str, str] = {}
    if not report_only:
        from selfimprove.report import terminal

        talk = Console(stderr=True)
        todo = studies.unfinished(runs, folder)
        talk.print(f"{len(runs)} runs, {len(todo)} to make, {jobs} at once", highlight=False)
        try:
            with terminal.StudyWatcher(talk, len(todo)) as watcher:
                failures = studies.perform(runs, todo, folder, jobs, watcher, sys.argv[1:])
        except KeyboardInterrupt:
            talk.print("\nstopped; the same command goes on, with --report-only it reports so far", highlight=False)
            raise typer.Exit(130) from None
    from selfimprove.report import study as report

    told = report.numbers(chosen, folder)
    path = out or Path(chosen.out or f"{chosen.name}.md")
    for target, text in ((path, report.markdown(told)), (numbers, json.dumps(told, indent=1) + "\n")):
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            print(target)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(runs)} runs failed: {next(iter(failures))}: {next(iter(failures.values()))}",
            f"mend it, then the same command makes what is missing; logs are in {folder.path}",
        )


@app.command()
def plan(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or of a recipe not run yet.")],
    machine: MachineFile = None,
    settings: Settings = None,
    again: From = None,
    until: Until = None,
    only: Only = None,
    as_json: AsJson = False,
) -> None:
    """What would run, stage by stage, why, and what it would take; with --machine also how it spreads over one."""
    from selfimprove import estimates, machine_file, placement, recipe_file
    from selfimprove.plan import examine
    from selfimprove.run import place, select

    where = machine_file.read(machine) if machine else None
    keys = where.machine if where else None
    if (RUNS / run / "recipe.toml").is_file():
        found, _ = _open(run)
        chosen = recipe_file.absolute(recipe_file.load(found.recipe_file, settings, machine=keys))
    else:
        from selfimprove.preflight import check

        chosen = recipe_file.absolute(recipe_file.load(recipe_file.find(run), settings, machine=keys))
        found = place(RUNS, chosen.name)
        check(chosen)
    selection = select(chosen, again, until, only)
    examined = examine(found, chosen, selection.again)
    survey = estimates.survey(found, chosen, examined)
    taken = survey.estimates
    placed = placement.place(found, chosen, examined, survey, where.hardware) if where else {}
    shown = selection.of(examined)
    if as_json:
        _json(
            [
                {"iteration": e.step.iteration, "stage": e.step.name, "plan": e.status, "why": e.reason}
                | {"estimate": taken[e.step.directory]._asdict() if e.step.directory in taken else None}
                | ({"machine": placement.plain(placed.get(e.step.directory))} if where else {})
                for e in shown
            ]
        )
        return
    from rich.console import Console

    from selfimprove.report import planning, spread

    planning.show(shown, taken, Console())
    if where:
        spread.show(shown, placed, chosen.machine, where.hardware, Console())


@app.command()
def fork(
    where: Annotated[
        str, typer.Argument(metavar="RUN@STAGE", help="A run, and the first stage that is not shared: default@2/label.")
    ],
    settings: Settings = None,
    run: Annotated[Optional[str], typer.Option(metavar="NAME", help="Name of the new run.")] = None,
) -> None:
    """Begin a run that shares what another has made before a stage, and goes on from there with other settings."""
    from selfimprove import forking, recipe_file
    from selfimprove.report.escape import line

    name, at = forking.parse(where)
    parent, _ = _open(name)
    chosen = recipe_file.absolute(recipe_file.load(parent.recipe_file, settings))
    made = forking.fork(parent, chosen, at, run, sys.argv[1:])
    shared = f"{len(made.shared)} stages ({made.shared_bytes / 1e6:.1f} MB)" if made.shared else "nothing"
    print(made.run.path)
    print(f"shares {shared} with run '{line(name)}', begins at {made.at.directory}", file=sys.stderr)
    if made.copied:
        print(f"{made.copied} files were copied: the file system makes no hard links here", file=sys.stderr)
    print(f"\nhint: selfimprove resume {made.run.name}", file=sys.stderr)


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a TOML file.")],
    machine: MachineFile = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe, its data and its model, and rehearse the first training step; needs no GPU."""
    from selfimprove import recipe_file
    from selfimprove.preflight import rehearse

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    named = recipe_file.find(recipe)
    chosen = recipe_file.absolute(recipe_file.load(named, settings, machine=_machine(machine)))
    found = rehearse(chosen)
    if as_json:
        _json([one._asdict() for one in found])
        return
    for one in found:
        print(f"ok    {one.what}: {one.found}")


@app.command()
def status(run: RunName, as_json: AsJson = False) -> None:
    """State, rows, seconds and scores of every iteration."""
    from selfimprove.status import summary

    found, chosen = _open(run)
    told = summary(found, chosen)
    if as_json:
        _json(told)
        return
    from rich.console import Console

    from selfimprove.report import terminal
    from selfimprove.report.escape import line

    console = Console()
    console.print(terminal.stages_table(told))
    console.print(terminal.evaluations(told))
    if holder := found.holder():
        console.print(f"being written by {line(str(holder))}", highlight=False, markup=False)
    if told["error"]:
        console.print(f"stopped by: {line(told['error'])}", highlight=False, markup=False)


@app.command()
def inspect(
    run: RunName,
    stage: Annotated[Optional[str], typer.Argument(metavar="STAGE", help="For example 2 or 2/label.")] = None,
    sample: Annotated[Optional[int], typer.Option(min=0, help="Rows shown: 3 of each kind, 20 with --where.")] = None,
    where: Annotated[
        Optional[str],
        typer.Option(metavar="SQL", help='Rows for which this holds, as "margin < 0.1"; pairs, or the stage\'s own.'),
    ] = None,
    rows: Annotated[
        Optional[str], typer.Option(metavar="KIND", help="Rows of this kind: verdicts, generations, losses ...")
    ] = None,
    pair: Annotated[Optional[str], typer.Option(metavar="ID", help="A pair's whole life.")] = None,
    prompt: Annotated[Optional[str], typer.Option(metavar="ID", help="A prompt's, over all rounds.")] = None,
    as_json: AsJson = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="Print rows whole, one a line: all of them.")] = False,
) -> None:
    """Look into a run: an iteration's stages, a stage's rows, the rows for which something holds, a pair's life."""
    lives = [name for name, value in (("--pair", pair), ("--prompt", prompt)) if value is not None]
    others = (stage, sample, where, rows)
    if len(lives) == 2 or (lives and (as_jsonl or any(value is not None for value in others))):
        raise UsageError(f"{lives[0]} goes with RUN and --json alone", f"selfimprove inspect RUN {lives[0]} ID")
    if as_json and as_jsonl:
        raise UsageError("--json and --jsonl do not go together", "--json is one document, --jsonl a row a line")
    asked = where is not None or rows is not None or as_jsonl
    if sample is not None and stage is None and not asked:
        raise UsageError("--sample needs rows to show", "selfimprove inspect RUN 2/label --sample N, or --where SQL")
    from selfimprove.report import inspection, paging

    found, chosen = _open(run)
    if lives:
        from selfimprove import lineage
        from selfimprove.report import lives as drawing

        told = lineage.pair(found, chosen, pair) if pair is not None else lineage.prompt(found, chosen, prompt or "")
        if as_json:
            _json(told)
            return
        with paging.paged() as console:
            drawing.show(told, console)
    elif asked:
        with inspection.Asked(found, chosen, stage, rows, where) as wanted:
            if as_jsonl:
                wanted.stream(sample)
            elif as_json:
                _json(wanted.first(20 if sample is None else sample))
            else:
                with paging.paged() as console:
                    wanted.show(20 if sample is None else sample, console)
    else:
        looked = inspection.look(found, chosen, stage, 3 if sample is None else sample)
        if as_json:
            _json(looked)
            return
        with paging.paged() as console:
            inspection.show(looked, console)


@app.command()
def diff(
    old: Annotated[str, typer.Argument(metavar="RUN@1", help="An iteration of a run, or a stage: RUN@1/label.")],
    new: Annotated[str, typer.Argument(metavar="RUN@3", help="Another one, of this run or of another.")],
    sample: Annotated[int, typer.Option(min=0, help="Examples shown of each kind of change.")] = 3,
    as_json: AsJson = False,
) -> None:
    """What differs between two iterations: ingredients, rows, scores, prompts, answers, labels, cost."""
    from selfimprove import difference
    from selfimprove.report import inspection, paging

    sides = []
    for text in (old, new):
        name, _, where = text.rpartition("@")
        if not name or not where:
            raise UsageError(f"'{text}' names no iteration", "selfimprove diff RUN@1 RUN@3, or RUN@1/label RUN@3/label")
        run, chosen = _open(name)
        sides.append(difference.Side(text, run, chosen, inspection.at(run, chosen, where)))
    if ("/" in old.rpartition("@")[2]) != ("/" in new.rpartition("@")[2]):
        raise UsageError(f"{old} and {new}: an iteration and a stage", "give two iterations, or the same stage of two")
    told = difference.difference(sides[0], sides[1], sample)
    if as_json:
        _json(told)
        return
    from selfimprove.report import differences as drawing

    with paging.paged() as console:
        drawing.show(told, console)


@app.command()
def verify(
    run: RunName,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set broken stages aside, and what was made from them; make nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every file, row and figure of a run against what they are made from; exit code 3 when something differs."""
    from rich.console import Console

    from selfimprove import verification
    from selfimprove.report.escape import line
    from selfimprove.report.progress import Checking

    place = _place(run)
    with Checking(Console(stderr=True)) as bar:
        found = verification.verify(place, bar.progress)
    mended = verification.repair(place, found) if repair else None
    sentences = [problem.sentence for problem in found.broken]
    if as_json:
        told = {"run": run, "files": found.files, "broken": sentences, "notes": found.notes, "seconds": found.seconds}
        if mended:
            told["repair"] = {"set_aside": mended.moved, "again": mended.again}
        _json(told)
    else:
        for sentence in sentences:
            print(line(sentence))
        for note in found.notes:
            print(f"note: {line(note)}", file=sys.stderr)
        print(f"{found.files} files checked, {len(sentences)} broken")
        _say_repaired(run, found, mended)
    if found.broken if mended is None else mended.left:
        raise typer.Exit(3)


def _say_repaired(run: str, found: Any, mended: Any) -> None:
    """What was set aside, what will run again, and the command that does it."""
    from selfimprove.report.escape import line

    if mended is None:
        if any(problem.directory or problem.file for problem in found.broken):
            hint = f"selfimprove verify {run} --repair sets aside what is broken and what was made from it"
            print(f"\nhint: {hint}", file=sys.stderr)
        elif found.broken:
            print(f"\nhint: put the file back as it was; selfimprove plan {run} says what follows", file=sys.stderr)
        return
    for name in mended.moved:
        print(f"set aside {line(name)}")
    if mended.again:
        print(f"will run again: {', '.join(mended.again)}")
        print(f"\nhint: selfimprove resume {run}", file=sys.stderr)
    elif not mended.moved:
        print("nothing to repair" if not mended.left else "nothing that could be set aside would mend it")
    if mended.left and mended.moved:
        print(f"not mended: {len(mended.left)}", file=sys.stderr)


@app.command()
def gc(
    run: Annotated[
        Optional[str], typer.Argument(metavar="RUN", help="Name of a run in ./runs; all of them else.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, only sizes are shown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what takes room and is needed by nobody: weights of earlier rounds, caches, scratch, logs; --yes removes it.

    Rows, scores, metrics, reports and receipts always stay, and so do the best, the latest and the initial weights.
    """
    from selfimprove import garbage
    from selfimprove.disk import size

    found = garbage.survey([_open(run)[0]] if run else garbage.runs_in(RUNS, None))
    freed, refused = 0, ""
    for one in found if yes else []:
        try:
            freed += garbage.remove(one)
        except UserError as error:  # somebody writes this one; the others can be cleared all the same
            if run:
                raise
            refused = error.message
            print(f"left alone: {error.message}", file=sys.stderr)
    if as_json:
        told = [{"run": one.run.name, "can go": one.by_kind(), "kept": one.kept} for one in found]
        _json({"runs": told, "freed": freed if yes else None})
        return
    for one in found:
        print(one.run.name)
        for kind, number in one.by_kind().items():
            print(f"  {kind:<18}{size(number):>10}  {'removed' if yes and not refused else 'can go'}")
        for reason, number in one.kept.items():
            print(f"  {'stays':<18}{size(number):>10}  {reason}")
    if yes:
        print(f"freed {size(freed)}")
    else:
        whole = sum(number for one in found for number in one.by_kind().values())
        print(f"{size(whole)} can go")
        if whole:
            print(f"\nhint: selfimprove gc {run + ' ' if run else ''}--yes removes it", file=sys.stderr)


@app.command()
def push(
    run: RunName,
    to: Annotated[
        Optional[str],
        typer.Option("--to", metavar="STORE", help="Folder or URL; machine.store otherwise."),
    ] = None,
    reading: Annotated[
        bool, typer.Option("--verify", help="Read back every file that the store has of the run; 3 when one differs.")
    ] = False,
) -> None:
    """Keep whatever a run has published in a store as well: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or a folder."""
    from rich.console import Console

    from selfimprove.disk import told
    from selfimprove.remote import mirror
    from selfimprove.report.escape import line
    from selfimprove.report.progress import Moving

    found, chosen = _open(run)
    kept = mirror.of(to or chosen.machine.store, found)
    if kept is None:
        raise UsageError(
            f"run '{run}' names no store in machine.store", f"selfimprove push {run} --to s3://BUCKET/PREFIX"
        )
    kept.store.probe()
    with told(found.path, run), found.lock(), Moving(Console(stderr=True), "into the store") as bar:
        pushed = kept.push_all(bar.progress)
    print(kept.address)
    print(f"{len(pushed)} stages pushed" if pushed else "every stage was there already", file=sys.stderr)
    if not reading:
        return
    with Moving(Console(stderr=True), "reading back") as bar:
        wrong = kept.altered(bar.progress)
    for sentence in wrong:
        print(line(sentence))
    print(f"{len(wrong)} broken", file=sys.stderr)
    if wrong:
        raise typer.Exit(3)


@app.command()
def pull(
    address: Annotated[str, typer.Argument(metavar="STORE/RUN", help="For example s3://BUCKET/PREFIX/default.")],
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where the run's directory is made.")] = RUNS,
) -> None:
    """Make a run's directory from what a store has of it, or bring it whatever it lacks; every byte is checked."""
    from rich.console import Console

    from selfimprove import recipe_file
    from selfimprove.remote import mirror
    from selfimprove.report.escape import line
    from selfimprove.report.progress import Moving
    from selfimprove.run import point_links

    told: list[str] = []
    with Moving(Console(stderr=True), "from the store") as bar:
        found = mirror.pull(address, runs, bar.progress, told.append)
    point_links(found, recipe_file.load(found.recipe_file))
    print(found.path)
    for sentence in told or ["nothing was missing here"]:
        print(line(sentence), file=sys.stderr)
    print(f"\nhint: selfimprove resume {found.name}", file=sys.stderr)


@app.command()
def report(
    run: RunName,
    out: Annotated[Optional[Path], typer.Option(help="File to write; runs/RUN/report.html otherwise.")] = None,
    encoder: Annotated[
        Optional[str],
        typer.Option(metavar="PATH", help="A text encoder, directory or hub id: also measure how alike texts are."),
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run."""
    from selfimprove.report import html

    found, chosen = _open(run)
    encode = None
    if encoder is not None:
        from selfimprove.engine.encoder import Encoder
        from selfimprove.models import locate_model

        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        encode = Encoder(locate_model(encoder))
    path = out or found.path / "report.html"
    path.write_text(html.render(found, chosen, encode), encoding="utf-8")
    print(path)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN_A RUN_B ...", help="Runs in ./runs; the others are held against RUN_A.")
    ],
    as_json: AsJson = False,
    out: Annotated[
        Optional[Path], typer.Option(metavar="FILE.html", help="Also write one self-contained HTML page.")
    ] = None,
) -> None:
    """Runs side by side: recipes, scores, paired differences on the same held-out prompts, cost."""
    if len(set(runs)) < 2 or len(set(runs)) < len(runs):
        raise UsageError("compare needs two runs or more, each once", "selfimprove compare RUN_A RUN_B")
    from selfimprove import comparison
    from selfimprove.report import compare as drawing

    told = comparison.compare([comparison.side(*_open(run)) for run in runs])
    if out:
        out.write_text(drawing.page(told), encoding="utf-8")
        print(out, file=sys.stderr)
    if as_json:
        _json(told)
        return
    from rich.console import Console

    drawing.show(told, Console())


@app.command()
def export(
    run: RunName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to make; it must not hold anything.")],
    iteration: Annotated[Optional[int], typer.Option(min=1, help="Export this round.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Export the best round; the default.")] = False,
    latest: Annotated[bool, typer.Option("--latest", help="Export the latest round.")] = False,
    licence: Annotated[
        Optional[str],
        typer.Option("--license", metavar="ID", help="Licence in the cards, as apache-2.0; else unknown."),
    ] = None,
    push: Annotated[
        Optional[str], typer.Option(metavar="REPO", help="Also push model and pairs to the Hugging Face hub, private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Push to public repositories.")] = False,
) -> None:
    """Write a round's model with its card, and the pairs it learned from with theirs, ready for the hub."""
    if (iteration is not None) + best + latest > 1:
        raise UsageError("--iteration, --best and --latest do not go together", "give one of them")
    if public and not push:
        raise UsageError("--public goes with --push", "selfimprove export RUN --out DIR --push OWNER/NAME --public")
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise UsageError(f"--license {licence}: no identifier of the hub's", "for example apache-2.0, cc-by-4.0, other")
    from selfimprove import exporting, hub, release
    from selfimprove.report import cards

    found, chosen = _open(run)
    target = exporting.check_target(found, out)
    made = release.gather(found, chosen, *release.pick(found, chosen, iteration, latest), licence)
    repo = hub.open_repo(push, public) if push else None
    name = repo.name if repo else None
    for left_out in exporting.write(made, target, cards.model(made, name), cards.dataset(made, name)):
        print(f"left out: {left_out}", file=sys.stderr)
    print(out)
    if repo:
        message = f"Round {made.iteration} of {run}"
        for address in hub.push(
            repo, target / exporting.MODEL, target / exporting.CARD, target / exporting.DATASET, message
        ):
            print(address)


@app.command()
def gate(run: RunName, as_json: AsJson = False) -> None:
    """What the gate said of the latest round, and why; exit code 3 where it was not promoted."""
    from selfimprove.stages.gate import PROMOTE
    from selfimprove.status import last_decision

    found, chosen = _open(run)
    iteration, decision = last_decision(found, chosen)
    if as_json:
        _json({"run": run, "iteration": iteration, **decision})
    else:
        from selfimprove.report import decision as drawing

        print(drawing.told(run, iteration, decision))
    if decision["decision"] != PROMOTE:
        raise typer.Exit(3)


@app.command()
def audit(
    recipe: Annotated[
        Optional[str], typer.Argument(metavar="RECIPE", help="Its label judge is asked now; not with --verdicts.")
    ] = None,
    data: Annotated[
        Optional[list[Path]],
        typer.Option(metavar="FILE", help="Pairs labelled by people; with --verdicts one file for each subset."),
    ] = None,
    verdicts: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="Verdicts recorded earlier, of any number of judges.")
    ] = None,
    strategy: Annotated[Optional[str], typer.Option(help="Only the recorded verdicts of this strategy.")] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Ask about the first pairs only.")] = None,
    as_json: AsJson = False,
) -> None:
    """Hold a judge against pairs that people have labelled: agreement, position, length, ties; see docs/judges.md."""
    usage = "selfimprove audit RECIPE --data FILE, or selfimprove audit --data FILE --verdicts FILE"
    for wrong, sentence in [
        (not data, "audit needs --data"),
        (recipe is None and verdicts is None, "audit needs a recipe or --verdicts"),
        (recipe is not None and verdicts is not None, "a recipe and --verdicts do not go together"),
        (verdicts is None and strategy is not None, "--strategy goes with --verdicts"),
        (verdicts is None and data is not None and len(data) > 1, "several --data go with --verdicts"),
        (verdicts is not None and limit is not None, "--limit goes with a recipe: recorded verdicts are all counted"),
    ]:
        if wrong:
            raise UsageError(sentence, usage)
    assert data  # told above
    if verdicts is None:
        assert recipe is not None
        _audit_live(recipe, data[0], limit, as_json)
    else:
        _audit_recorded(data, verdicts, strategy, as_json)


def _audit_live(name: str, data: Path, limit: int | None, as_json: bool) -> None:
    import itertools

    from rich.console import Console

    from selfimprove import auditing, recipe_file
    from selfimprove.judges import labelled
    from selfimprove.judges.audit import plain
    from selfimprove.report import terminal

    chosen = recipe_file.absolute(recipe_file.load(recipe_file.find(name)))
    judge = auditing.label_judge(chosen)
    pairs = list(itertools.islice(labelled.read_pairs(data), limit))
    with terminal.Watcher(Console(stderr=True)) as watcher, auditing.open_panel(chosen, watcher.progress) as asked:
        panel, encode = asked
        found = auditing.audit_pairs(pairs, judge, panel, encode)
    if as_json:
        _json(plain(found))
        return
    from selfimprove.report import audit as report

    report.show(found, Console())


def _audit_recorded(data: list[Path], verdicts: Path, strategy: str | None, as_json: bool) -> None:
    from selfimprove import auditing
    from selfimprove.judges import labelled
    from selfimprove.judges.audit import plain

    pairs = auditing.by_subset([list(labelled.read_pairs(path)) for path in data])
    found = auditing.audit_recorded(pairs, labelled.read_verdicts(verdicts), strategy)
    if found.left_out:
        print(f"left out, no --data given: {', '.join(found.left_out)}", file=sys.stderr)
    if as_json:
        _json([plain(group) for group in found.groups])
        return
    from rich.console import Console

    from selfimprove.report import audit as report

    Console().print(report.groups_table(found.groups))


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes: those of the embedded default, then the papers' own settings."""
    import textwrap

    from selfimprove import recipe_file

    found = []
    for path in recipe_file.shipped_recipes():
        about = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix(f"# {path.stem}: ")
        found.append({"name": path.stem, "about": about, "path": str(path)})
    if as_json:
        _json(found)
        return
    width = 2 + max(len(entry["name"]) for entry in found)
    big = [entry for entry in found if entry["name"].endswith("_7b")]
    small = [entry for entry in found if entry not in big]
    for title, entries in [
        ("On the embedded default: selfimprove iterate NAME", small),
        ("With the papers' settings, on a model and data of your own:", big),
    ]:
        print(title)
        for entry in entries:
            first, *rest = textwrap.wrap(entry["about"], 98 - width)
            print(f"  {entry['name']:<{width}}{first}", *rest, sep="\n" + " " * (width + 2))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, CUDA, memory, disk, and the engine with a generation of two tokens."""
    from selfimprove import doctor as examination

    findings = examination.examine()
    if as_json:
        _json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.state:<5} {finding.what}: {finding.found}")
            if finding.remedy:
                print(f"      {finding.remedy}")
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(3)


@demo.command("build")
def demo_build(
    out: Annotated[Path, typer.Option(help="Directory to write the model to.")] = Path("demo-model"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and training data; 0 is the shipped one.")] = 0,
) -> None:
    """Train the embedded default's base model from scratch (a few CPU minutes)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from selfimprove.demo import build

    if (out / "config.json").exists():
        raise UserError(f"{out} already holds a model", "--out ANOTHER_DIRECTORY")
    began = time.monotonic()
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, loss="")
        build.build(
            out,
            seed=seed,
            progress=lambda step, steps, loss: bar.update(task, total=steps, completed=step, loss=f"loss {loss:.3f}"),
        )
    print(out)
    print(f"built in {time.monotonic() - began:.0f} s", file=sys.stderr)


def _open(name: str) -> tuple[Any, Any]:
    """A run that exists, and its recipe."""
    from selfimprove import recipe_file

    run = _place(name)
    return run, recipe_file.load(run.recipe_file)


def _place(name: str) -> Any:
    """A run that exists."""
    from selfimprove.boundary import is_run_name
    from selfimprove.store import Run

    run = Run(RUNS / name)
    if not is_run_name(name) or not run.exists():
        known = ", ".join(sorted(p.parent.name for p in RUNS.glob("*/recipe.toml"))) or "none"
        raise UserError(f"no run '{name}' in {RUNS.resolve()}", f"runs here: {known}")
    return run


def _json(value: Any) -> None:
    from selfimprove.report.escape import as_json

    print(as_json(value))


def main() -> NoReturn:
    """The program: what the user can mend is one sentence and a hint, anything else keeps its traceback."""
    try:
        app()
    except UserError as error:
        from selfimprove.report.escape import visible

        print(f"error: {visible(error.message)}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a missing folder, no permission: the machine's, not ours
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        print("\nhint: check the path, its permissions and the free space (df -h .)", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
