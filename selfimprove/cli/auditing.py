"""Holding a judge against people."""

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from selfimprove.cli.arguments import AsJson, print_json
from selfimprove.errors import UsageError

app = typer.Typer()
PANEL = "Judges and benchmarks"


@app.command(rich_help_panel=PANEL)
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
        print_json(plain(found))
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
        print_json([plain(group) for group in found.groups])
        return
    from rich.console import Console

    from selfimprove.report import audit as report

    Console().print(report.groups_table(found.groups))
