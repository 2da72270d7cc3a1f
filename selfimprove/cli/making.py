"""Making runs: the main path begins here."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from selfimprove.cli.arguments import RUNS, From, MachineFile, Only, RunName, Settings, Until, machine_keys, open_run
from selfimprove.errors import UsageError, UserError

app = typer.Typer()
PANEL = "Make a run"


@app.command(rich_help_panel=PANEL)
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
    chosen = recipe_file.load(recipe_file.find(recipe), [*overrides, *(settings or [])], machine=machine_keys(machine))
    chosen = recipe_file.absolute(chosen)
    _go(chosen.name if run is None else run, chosen, again, until, only)


def _given(rounds: int | None, model: str | None, seed: int | None, engine: str | None) -> dict[str, Any]:
    values = {"rounds": rounds, "model.path": model, "seed": seed, "engine.kind": engine}
    return {key: value for key, value in values.items() if value is not None}


@app.command(rich_help_panel=PANEL)
def resume(
    run: RunName, machine: MachineFile = None, again: From = None, until: Until = None, only: Only = None
) -> None:
    """Finish a run that was stopped, killed or failed, or make a part of it."""
    from selfimprove import recipe_file

    found, chosen = open_run(run)
    if machine:
        chosen = recipe_file.load(found.recipe_file, machine=machine_keys(machine))
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
        how = f"selfimprove resume {name} goes on where it stopped" if found.exists() else "nothing was begun"
        talk.print(f"\nstopped; {how}", highlight=False)
        raise typer.Exit(130) from None
    Console().print(terminal.evaluations(summary(found, chosen)))
    if outcome.made:
        talk.print(f"{outcome.made} stages in {outcome.seconds:.0f} s, in {found.path}", highlight=False)
    elif until or only:
        talk.print(f"run '{name}': {until or only} is made already", highlight=False, markup=False)
    else:
        talk.print(f"run '{name}' is finished: nothing to do", highlight=False)


@app.command(rich_help_panel=PANEL)
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
    parent, _ = open_run(name)
    chosen = recipe_file.absolute(recipe_file.load(parent.recipe_file, settings))
    made = forking.fork(parent, chosen, at, run, sys.argv[1:])
    shared = f"{len(made.shared)} stages ({made.shared_bytes / 1e6:.1f} MB)" if made.shared else "nothing"
    print(made.run.path)
    print(f"shares {shared} with run '{line(name)}', begins at {made.at.directory}", file=sys.stderr)
    if made.copied:
        print(f"{made.copied} files were copied: the file system makes no hard links here", file=sys.stderr)
    print(f"\nhint: selfimprove resume {made.run.name}", file=sys.stderr)


@app.command(rich_help_panel=PANEL)
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
            "mend it, then the same command makes what is missing; a run whose settings have changed since: remove it, "
            f"or give the study another name; logs are in {folder.path}",
        )


@app.command(rich_help_panel=PANEL)
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
