"""Runs side by side, in the terminal and as one self-contained HTML page; see comparison.compare for what is told."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfimprove.comparison import BEST, FINAL
from selfimprove.report.escape import line
from selfimprove.results import MODES, share, signed

TEMPLATE = Path(__file__).parent / "compare.html.jinja"
LONGEST = 300  # characters of one value of a recipe


def show(told: Mapping[str, Any], console: Console) -> None:
    """Print the tables and, in the place of the one of differences, a sentence each."""
    for title, headings, rows in tables(told, with_differences=False):
        table = Table(title=Text(title), box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
        for heading in headings:
            table.add_column(Text(heading), overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # what stands in a file is no markup
        console.print(table)
    for row in told["comparisons"]:
        console.print(Text(f"{conclusion(row)} Holm p {_p(row['p_holm'])}."), soft_wrap=True)
    console.print()
    for note in told["notes"]:
        console.print(Text(line(note), style="dim"), soft_wrap=True)


def page(told: Mapping[str, Any]) -> str:
    """The HTML page; everything from a file is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        names=[line(one["run"]) for one in told["runs"]],
        conclusions=[(row["called"], conclusion(row)) for row in told["comparisons"]],
        notes=[line(note) for note in told["notes"]],
        tables=tables(told),
    )


def tables(told: Mapping[str, Any], with_differences: bool = True) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and cells of each table that has rows."""
    names = [line(one["run"]) for one in told["runs"]]
    every = [
        ("Recipes, where they differ", ["", *names], _recipes(told["recipes"])),
        ("Scores, each on all its own held-out prompts", ["", "round", *MODES, "prompts"], _scores(told["runs"])),
        (
            f"Against {line(told['against'])}, prompt by prompt",
            ["", "rounds", "score", "difference [95 %]", "detectable", "p", "Holm p", "prompts", ""],
            [_comparison(row) for row in told["comparisons"] if with_differences],
        ),
        ("Cost: tokens, seconds, USD", ["stage", *names], _costs(told["runs"])),
    ]
    return [(title, headings, rows) for title, headings, rows in every if rows]


def conclusion(row: Mapping[str, Any]) -> str:
    """One comparison in a sentence."""
    which = f"{row['rounds']} round ({row['iteration']} against {row['against_iteration']})"
    return f"{line(row['run'])}, {which}, {row['mode']}, {row['n']} prompts: {row['sentence']}."


def _recipes(differences: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    return [[line(key), *map(_setting, values)] for key, values in differences.items()]


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    text = line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ({len(text) - LONGEST} more characters)"


def _scores(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for one in runs:
        for which in (FINAL, BEST):
            scores = one[which]["scores"]
            cells = [f"{share(s['value'])} [{share(s['ci95'][0])}, {share(s['ci95'][1])}]" for s in _modes(scores)]
            prompts = str(next(_modes(scores))["n"])
            rows.append([f"{line(one['run'])}, {which}", str(one[which]["iteration"]), *cells, prompts])
    return rows


def _modes(scores: Mapping[str, Any]) -> Any:
    return (scores[mode] for mode in MODES)


def _comparison(row: Mapping[str, Any]) -> list[str]:
    low, high = row["ci95"]
    return [
        line(row["run"]),
        row["rounds"],
        row["mode"],
        f"{signed(row['difference'])} [{signed(low)}, {signed(high)}]",
        share(row["mde"]),
        _p(row["p"]),
        _p(row["p_holm"]),
        str(row["n"]),
        {"better": "better", "worse": "worse"}.get(row["called"], "not told apart"),
    ]


def _costs(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    stages = dict.fromkeys(stage for one in runs for stage in one["cost"]["stages"])
    rows = [[stage, *(_cost(one["cost"]["stages"].get(stage)) for one in runs)] for stage in stages]
    return [*rows, ["all", *(_cost(one["cost"]["total"]) for one in runs)]]


def _cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "-"
    most = "at most " if cost["unmeasured"] else ""
    usd = "" if cost["usd"] is None else f", {most}${cost['usd']:.4f}"
    return f"{cost['tokens']:,}, {cost['seconds']:.1f} s{usd}"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else share(value)
