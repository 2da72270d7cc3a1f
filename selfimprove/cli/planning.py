"""What comes before a run: its recipe, its data, its machine."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from selfimprove.cli.arguments import (
    RUNS,
    AsJson,
    From,
    MachineFile,
    Only,
    Settings,
    Until,
    machine_keys,
    open_run,
    print_json,
)
from selfimprove.errors import UserError

app = typer.Typer()
PANEL = "Before a run"
demo = typer.Typer(help="The embedded default: its data and its base model.", no_args_is_help=True)


@app.command(rich_help_panel=PANEL)
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes: those of the embedded default, then the papers' own settings."""
    import textwrap

    from selfimprove import recipe_file

    found = []
    for path in recipe_file.shipped_recipes():
        about = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix(f"# {path.stem}: ")
        found.append({"name": path.stem, "about": about, "path": str(path)})
    if as_json:
        print_json(found)
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


@app.command(rich_help_panel=PANEL)
def check(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a TOML file.")],
    machine: MachineFile = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe, its data and its model, and rehearse the first training step; needs no GPU."""
    from selfimprove import recipe_file
    from selfimprove.rehearsal import rehearse

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    named = recipe_file.find(recipe)
    chosen = recipe_file.absolute(recipe_file.load(named, settings, machine=machine_keys(machine)))
    found = rehearse(chosen)
    if as_json:
        print_json([one._asdict() for one in found])
        return
    for one in found:
        print(f"ok    {one.what}: {one.found}")


@app.command(rich_help_panel=PANEL)
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
    from selfimprove import estimates, machine_file, placement, preflight, recipe_file
    from selfimprove.plan import examine
    from selfimprove.run import place, select

    where = machine_file.read(machine) if machine else None
    keys = where.machine if where else None
    if (RUNS / run / "recipe.toml").is_file():
        found, _ = open_run(run)
        chosen = recipe_file.absolute(recipe_file.load(found.recipe_file, settings, machine=keys))
        if settings:
            preflight.settings(chosen)
    else:
        chosen = recipe_file.absolute(recipe_file.load(recipe_file.find(run), settings, machine=keys))
        found = place(RUNS, chosen.name)
        preflight.check(chosen)
    selection = select(chosen, again, until, only)
    examined = examine(found, chosen, selection.again)
    survey = estimates.survey(found, chosen, examined)
    taken = survey.estimates
    placed = placement.place(found, chosen, examined, survey, where.hardware) if where else {}
    shown = selection.of(examined)
    if as_json:
        print_json(
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


@app.command(rich_help_panel=PANEL)
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, CUDA, memory, disk, and the engine with a generation of two tokens."""
    from selfimprove import doctor as examination

    findings = examination.examine()
    if as_json:
        print_json([finding._asdict() for finding in findings])
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
