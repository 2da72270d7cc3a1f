"""Keeping a run whole, small, elsewhere, and giving its model away."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from selfimprove.cli.arguments import RUNS, AsJson, RunName, open_run, place_of, print_json
from selfimprove.errors import UsageError, UserError

app = typer.Typer()
PANEL = "Keep a run"


@app.command(rich_help_panel=PANEL)
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

    place = place_of(run)
    with Checking(Console(stderr=True)) as bar:
        found = verification.verify(place, bar.progress)
    mended = verification.repair(place, found) if repair else None
    sentences = [problem.sentence for problem in found.broken]
    if as_json:
        told = {"run": run, "files": found.files, "broken": sentences, "notes": found.notes, "seconds": found.seconds}
        if mended:
            told["repair"] = {"set_aside": mended.moved, "again": mended.again}
        print_json(told)
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


@app.command(rich_help_panel=PANEL)
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

    found = garbage.survey([open_run(run)[0]] if run else garbage.runs_in(RUNS, None))
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
        print_json({"runs": told, "freed": freed if yes else None})
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


@app.command(rich_help_panel=PANEL)
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

    from selfimprove import boundary
    from selfimprove.disk import told
    from selfimprove.remote import mirror
    from selfimprove.report.escape import line
    from selfimprove.report.progress import Moving

    found, chosen = open_run(run)
    boundary.refuse_links(found.path)
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


@app.command(rich_help_panel=PANEL)
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
    begun = any(found.path.glob("iter-*/*/manifest.json"))
    none = "nothing was missing here" if begun else "the store has no finished stage of it: push it where it was made"
    for sentence in told or [none]:
        print(line(sentence), file=sys.stderr)
    where = "" if runs.resolve() == RUNS.resolve() else f"move it into a folder called {RUNS}, and beside that folder: "
    print(f"\nhint: {where}selfimprove resume {found.name}", file=sys.stderr)


@app.command(rich_help_panel=PANEL)
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

    found, chosen = open_run(run)
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
