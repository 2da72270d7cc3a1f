"""Arguments that several commands take, and what they name."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from selfimprove.errors import UserError

RUNS = Path("runs")

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
    typer.Option(
        "--machine", metavar="FILE.toml", help="Where it runs; its machine section goes before the recipe's own."
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run in ./runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def machine_keys(file: Path | None) -> dict[str, Any] | None:
    """The keys of [machine] in a machine file."""
    if file is None:
        return None
    from selfimprove import machine_file

    return machine_file.read(file).machine


def open_run(name: str) -> tuple[Any, Any]:
    """A run that exists, and its recipe."""
    from selfimprove import recipe_file

    run = place_of(name)
    return run, recipe_file.load(run.recipe_file)


def place_of(name: str) -> Any:
    """A run that exists."""
    from selfimprove.boundary import is_run_name
    from selfimprove.store import Run

    run = Run(RUNS / name)
    if not is_run_name(name) or not run.exists():
        known = ", ".join(sorted(p.parent.name for p in RUNS.glob("*/recipe.toml"))) or "none"
        raise UserError(f"no run '{name}' in {RUNS.resolve()}", f"runs here: {known}")
    return run


def print_json(value: Any) -> None:
    """For --json: one document on stdout."""
    from selfimprove.report.escape import as_json

    print(as_json(value))
