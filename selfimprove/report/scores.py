"""Scores of published benchmarks as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from selfimprove.evaluation.benchmarks.fields import printable

MOST_PAIRS = 10  # of models, shown; all are in the JSON


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of a result of `selfimprove.evaluation.benchmarks`."""
    return {
        "alpaca_lc": _alpaca,
        "arena_hard": _arena,
        "gsm8k": _gsm8k,
        "ifeval": _ifeval,
        "mt_bench": _ratings,
        "arena_bench": _ratings,
    }[result["benchmark"]](result)


def _alpaca(result: Mapping[str, Any]) -> list[Table]:
    controlled = [
        f"length-controlled ({result['variant'].removeprefix('length_controlled_')})",
        _number(result["lc_win_rate"], 2),
        _number(result["lc_bootstrap_se"], 2),
        _interval(result, "lc_interval", 2),
    ]
    table = _table("AlpacaEval 2", ("", "win rate %", "standard error", "95 %"))
    table.add_row("raw", _number(result["win_rate"], 2), _number(result["standard_error"], 2), "")
    table.add_row(*controlled)
    counts = "{n_wins} won, {n_wins_base} lost, {n_draws} drawn of {n_total}; {avg_length} characters".format(**result)
    table.caption = counts + (f"; C = {result['c']:.4g}, {result['c_by']}" if "c" in result else "")
    return [table]


def _arena(result: Mapping[str, Any]) -> list[Table]:
    title = f"Arena-Hard against {result['baseline']}: {result['battles']} battles, {result['questions']} questions"
    found = [_ratings_of_models(title, result["models"])]
    for control, under in result.get("style_controlled", {}).items():
        found.append(_ratings_of_models(f"style controlled: {control}", under["models"]))
    return found


def _ratings_of_models(title: str, models: Mapping[str, Any]) -> Table:
    table = _table(title, ("model", "win rate %", "95 %", "Elo", "battles"))
    for name, of in sorted(models.items(), key=lambda item: -(item[1]["win_rate"] or 0)):
        bounds = "" if of["low"] is None else f"[{of['low']:.1f}, {of['high']:.1f}]"
        table.add_row(_name(name), _number(of["win_rate"], 1), bounds, _number(of["elo"], 0), str(of["battles"]))
    return table


def _gsm8k(result: Mapping[str, Any]) -> list[Table]:
    table = _table("GSM8K", ("model", "accuracy", "95 %", "n", "no answer", "last number", "not as published"))
    for name, of in result["models"].items():
        table.add_row(
            _name(name),
            _number(of["accuracy"], 4),
            f"[{of['low']:.3f}, {of['high']:.3f}]",
            str(of["n"]),
            str(of["no_answer"]),
            _number(of["flexible_accuracy"], 4),
            f"{of['other_than_published']} of {of['published_flags']}" if of["published_flags"] else "-",
        )
    rows = [
        (one["a"], one["b"], f"{one['difference']:+.4f}", f"{one['only_b']} : {one['only_a']}", f"{one['p_exact']:.2g}")
        for one in result["paired"]
    ]
    return [table, *_pairs(("a", "b", "b - a", "only b : only a right", "p (McNemar)"), rows)]


def _ifeval(result: Mapping[str, Any]) -> list[Table]:
    table = _table("IFEval", ("", "share", "95 %", "n"))
    for how in ("strict", "loose"):
        for level in ("prompt", "instruction"):
            of = result[how][level]
            bounds = f"[{of['low']:.3f}, {of['high']:.3f}]"
            table.add_row(f"{how}, {level}s", _number(of["accuracy"], 4), bounds, str(of["n"]))
    return [table]


def _ratings(result: Mapping[str, Any]) -> list[Table]:
    turns = sorted({turn for of in result["models"].values() for turn in of["turns"]})
    columns = [f"turn {turn}" for turn in turns] if len(turns) > 1 else []
    table = _table(result["benchmark"], ("model", "mean", "standard error", *columns, "read", "stored mean"))
    for name, of in result["models"].items():
        by_turn = [_number(of["turns"].get(turn, {}).get("mean"), 3) for turn in turns] if columns else []
        read = f"{of['n']} of {of['answers']}"
        error, stored = _number(of["standard_error"], 3), _number(of["stored_mean"], 3)
        table.add_row(_name(name), _number(of["mean"], 3), error, *by_turn, read, stored)
    rows = [
        (
            one["a"],
            one["b"],
            f"{one['difference']:+.3f}",
            f"[{one['low']:.3f}, {one['high']:.3f}]",
            "-" if one["p_t"] is None else f"{one['p_t']:.2g}",
        )
        for one in result["paired"]
    ]
    return [table, *_pairs(("a", "b", "b - a", "95 %", "p (paired t)"), rows)]


def _pairs(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Table]:
    told = list(rows)
    if not told:
        return []
    table = _table("paired", headings)
    for row in told[:MOST_PAIRS]:
        table.add_row(*(_name(cell) for cell in row))
    if len(told) > MOST_PAIRS:
        table.caption = f"{MOST_PAIRS} of {len(told)} pairs; --json has all"
    return [table]


def _table(title: str, headings: Sequence[str]) -> Table:
    style = {"box": box.SIMPLE, "padding": (0, 1, 0, 0), "title_justify": "left", "caption_justify": "left"}
    table = Table(title=_name(title), **style)  # type: ignore[arg-type]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "model", "a", "b") else "right", overflow="fold")
    return table


def _name(text: str) -> Text:
    """Names come from files: no markup, no escape codes."""
    return Text(printable(text))


def _interval(result: Mapping[str, Any], name: str, digits: int) -> str:
    if name not in result:
        return ""
    low, high = result[name]
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
