"""What an audit found, as tables."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfimprove.auditing import Audited, Group
from selfimprove.judges.audit import CLASSES, UNREADABLE, Agreement, PairAudit, Rate
from selfimprove.judges.audit_scores import ScoreAudit
from selfimprove.report.escape import line

LEGEND = (
    "right, swap: as people say, in either order; both: in both; kappa: with people; same: both orders agree; "
    "1st: for the answer shown first; long: for the longer one; unread: verdicts not readable"
)


def show(found: Audited, console: Console) -> None:
    """Everything about one judge."""
    console.print(_pairs_table(found))
    best = found.pairs.combined
    if best is not None:
        console.print(_confusion_table(best))
    if found.scores is not None:
        console.print(_scores_table(found.scores))
    for reason, number in found.reasons.items():
        console.print(f"unknown: {line(reason)}: {number}", highlight=False, markup=False, soft_wrap=True)


def groups_table(groups: Sequence[Group]) -> Table:
    """One row a group of recorded verdicts: shares of pairs; their intervals are in the JSON."""
    table = Table(box=box.SIMPLE, padding=0, caption=LEGEND, caption_justify="left")
    table.add_column("subset/judge/strategy", overflow="fold")
    for heading in ("n", "right", "swap", "both", "kappa", "same", "1st", "long", "tie", "unread"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups:
        pairs = group.pairs
        table.add_row(
            Text(line("/".join(filter(None, (group.subset, group.judge, group.strategy))))),  # from a file: no markup
            str(pairs.n),
            _value(pairs.forward and pairs.forward.accuracy),
            _value(pairs.swapped and pairs.swapped.accuracy),
            _value(pairs.both_right),
            _number(pairs.combined and pairs.combined.kappa),
            _value(pairs.consistent),
            _value(pairs.first_position),
            _value(pairs.prefers_longer),
            _value(pairs.ties),
            str(pairs.unreadable_verdicts),
        )
    return table


def _pairs_table(found: Audited) -> Table:
    table = _figures(f"{found.judge}: {found.pairs.n} pairs, {found.pairs.labelled} labelled by people")
    for name, value in _rates(found.pairs):
        if value is not None:
            table.add_row(name, _short(value.value), f"[{_short(value.low)}, {_short(value.high)}]", str(value.n))
    for name, number in _numbers(found.pairs):
        if number is not None:
            table.add_row(name, _short(number), "", "")
    return table


def _rates(pairs: PairAudit) -> list[tuple[str, Rate | None]]:
    both = pairs.swapped is not None
    return [
        ("right, first order" if both else "right", pairs.forward and pairs.forward.accuracy),
        ("right, swapped", pairs.swapped and pairs.swapped.accuracy),
        ("right, mean of both", pairs.mean_right if both else None),
        ("right in both", pairs.both_right),
        ("right, a tie counts half", pairs.half_right),
        ("same in both orders", pairs.consistent),
        ("flipped with the order", pairs.flipped),
        ("prefers the first shown", pairs.first_position),
        ("prefers the longer", pairs.prefers_longer),
        ("people prefer the longer", pairs.humans_prefer_longer),
        ("ties", pairs.ties),
        ("pairs not readable", pairs.unreadable),
    ]


def _numbers(pairs: PairAudit) -> list[tuple[str, float | None]]:
    best = pairs.combined
    return [
        ("kappa with people", best.kappa if best else None),
        ("macro-F1", best.macro_f1 if best else None),
        ("kappa between orders", pairs.kappa_orders),
    ]


def _confusion_table(best: Agreement) -> Table:
    table = Table(title="people say, judge says", box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("")
    for name in (*CLASSES, UNREADABLE):
        table.add_column(name, justify="right")
    for label, row in best.confusion.items():
        table.add_row(label, *(str(row[name]) for name in (*CLASSES, UNREADABLE)))
    return table


def _scores_table(scores: ScoreAudit) -> Table:
    table = _figures(f"scores of {scores.n} answers")
    named: list[tuple[str, Any]] = [
        ("mean", scores.mean),
        ("standard deviation", scores.sd),
        ("Spearman with length", scores.length.spearman),
        ("Pearson with length", scores.length.pearson),
        ("Spearman, within prompts", scores.length_within.spearman),
        ("Pearson, within prompts", scores.length_within.pearson),
    ]
    for name, number in named:
        table.add_row(name, _number(number), "", "")
    for name, value in (("ties between two answers", scores.ties), ("unknown", scores.unknown)):
        if value is not None:
            table.add_row(name, _short(value.value), f"[{_short(value.low)}, {_short(value.high)}]", str(value.n))
    return table


def _figures(title: str) -> Table:
    table = Table(title=Text(line(title)), box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 %", no_wrap=True)
    table.add_column("of", justify="right")
    return table


def _value(rate: Rate | None) -> str:
    return _number(rate.value if rate else None)


def _number(value: float | None) -> str:
    return "-" if value is None else _short(value)


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:.3f}"
