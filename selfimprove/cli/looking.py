"""Looking at what a run has made."""

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from selfimprove.cli.arguments import AsJson, RunName, open_run, print_json
from selfimprove.errors import UsageError

app = typer.Typer()
PANEL = "Look at a run"


@app.command(rich_help_panel=PANEL)
def status(run: RunName, as_json: AsJson = False) -> None:
    """State, rows, seconds and scores of every iteration."""
    from selfimprove.status import summary

    found, chosen = open_run(run)
    told = summary(found, chosen)
    if as_json:
        print_json(told)
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


@app.command(rich_help_panel=PANEL)
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

    found, chosen = open_run(run)
    if lives:
        from selfimprove import lineage
        from selfimprove.report import lives as drawing

        told = lineage.pair(found, chosen, pair) if pair is not None else lineage.prompt(found, chosen, prompt or "")
        if as_json:
            print_json(told)
            return
        with paging.paged() as console:
            drawing.show(told, console)
    elif asked:
        with inspection.Asked(found, chosen, stage, rows, where) as wanted:
            if as_jsonl:
                wanted.stream(sample)
            elif as_json:
                print_json(wanted.first(20 if sample is None else sample))
            else:
                with paging.paged() as console:
                    wanted.show(20 if sample is None else sample, console)
    else:
        looked = inspection.look(found, chosen, stage, 3 if sample is None else sample)
        if as_json:
            print_json(looked)
            return
        with paging.paged() as console:
            inspection.show(looked, console)


@app.command(rich_help_panel=PANEL)
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
        run, chosen = open_run(name)
        sides.append(difference.Side(text, run, chosen, inspection.at(run, chosen, where)))
    if ("/" in old.rpartition("@")[2]) != ("/" in new.rpartition("@")[2]):
        raise UsageError(f"{old} and {new}: an iteration and a stage", "give two iterations, or the same stage of two")
    told = difference.difference(sides[0], sides[1], sample)
    if as_json:
        print_json(told)
        return
    from selfimprove.report import differences as drawing

    with paging.paged() as console:
        drawing.show(told, console)


@app.command(rich_help_panel=PANEL)
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

    told = comparison.compare([comparison.side(*open_run(run)) for run in runs])
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(drawing.page(told), encoding="utf-8")
        print(out, file=sys.stderr)
    if as_json:
        print_json(told)
        return
    from rich.console import Console

    drawing.show(told, Console())


@app.command(rich_help_panel=PANEL)
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

    found, chosen = open_run(run)
    encode = None
    if encoder is not None:
        from selfimprove.engine.encoder import Encoder
        from selfimprove.models import locate_model

        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        encode = Encoder(locate_model(encoder))
    path = out or found.path / "report.html"
    path.write_text(html.render(found, chosen, encode), encoding="utf-8")
    print(path)


@app.command(rich_help_panel=PANEL)
def gate(run: RunName, as_json: AsJson = False) -> None:
    """What the gate said of the latest round, and why; exit code 3 where it was not promoted."""
    from selfimprove.stages.gate import PROMOTE
    from selfimprove.status import last_decision

    found, chosen = open_run(run)
    iteration, decision = last_decision(found, chosen)
    if as_json:
        print_json({"run": run, "iteration": iteration, **decision})
    else:
        from selfimprove.report import decision as drawing

        print(drawing.told(run, iteration, decision))
    if decision["decision"] != PROMOTE:
        raise typer.Exit(3)
