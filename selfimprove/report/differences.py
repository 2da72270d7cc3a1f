"""Draws what differs between two iterations or artifacts."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfimprove.report import diff
from selfimprove.report.escape import line, visible

LONGEST = 1_500  # characters shown of a text
MARKS = {"same": ("", "", ""), "del": ("[-", "-]", "red"), "ins": ("{+", "+}", "green")}  # as git's word diff has them


def show(told: Mapping[str, Any], console: Console) -> None:
    """Print what difference.difference found."""
    console.print(Text(line(f"{told['old']} -> {told['new']}"), "bold"))
    console.print(_stages(told))
    for text in _changes(told):
        console.print(text)
    for part in (_scores(told), _prompts(told["prompts"]), _answers(told), _labels(told["labels"])):
        lines = list(part)
        if lines:
            console.print()
        for text in lines:
            console.print(text)


def _stages(told: Mapping[str, Any]) -> Table:
    """Rows and cost of both, stage by stage."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("stage", "in", "out", "quarantined", "tokens", "seconds", "USD"):
        table.add_column(heading, justify="left" if heading == "stage" else "right", overflow="fold")
    for stage in told["stages"]:
        cells = [_cells(stage[which]) for which in ("old", "new")]
        table.add_row(line(stage["stage"]), *(a if a == b else f"{a} -> {b}" for a, b in zip(*cells, strict=True)))
    return table


def _cells(side: Mapping[str, Any] | None) -> list[str]:
    if side is None:
        return ["-"] * 6
    rows, cost = side["rows"], side["cost"]
    usd = "-" if cost["usd"] is None else f"{cost['usd']:.2f}"
    counts = rows["rows_in"], rows["rows_out"], sum(rows["quarantined"].values()), cost["tokens"]
    return [*(f"{count:,}" for count in counts), f"{cost['seconds']:.1f}", usd]


def _changes(told: Mapping[str, Any]) -> Iterator[Text]:
    for stage in told["stages"]:
        found = [f"  {change}" for change in stage.get("changes", [])]
        both = [stage[which]["rows"]["quarantined"] if stage[which] else {} for which in ("old", "new")]
        for reason in dict.fromkeys([*both[0], *both[1]]):
            if both[0].get(reason) != both[1].get(reason):
                found.append(f"  quarantined, {reason}: {both[0].get(reason, 0)} -> {both[1].get(reason, 0)}")
        found += [f"  {name}: {_number(a)} -> {_number(b)}" for name, (a, b) in stage.get("metrics", {}).items()]
        if found:
            yield Text(line(stage["stage"]), "bold")
            yield from (Text(line(one)) for one in found)


def _scores(told: Mapping[str, Any]) -> Iterator[Text]:
    if told["scores"] or told["notes"]:
        yield Text("scores on the held-out prompts", "bold")
    for row in told["scores"]:
        old, new = (f"{row[which]['value']:.3f}" for which in ("old", "new"))
        values = f"{old} -> {new} (n = {row['n']})"
        if row["left_out"]:  # each score is of all its prompts, the difference of the shared ones
            values = f"{old} (n = {row['old']['n']}) -> {new} (n = {row['new']['n']}), on the {row['n']} they share"
        yield Text(line(f"  {row['mode']} {values}: {row['sentence']}"))
        if row["left_out"]:
            yield Text(
                line(f"  {row['left_out']} prompts of one of them have no counterpart; paired by {row['paired_by']}")
            )
    for note in told["notes"]:
        yield Text(line(f"  {note}"))


def _prompts(prompts: Mapping[str, Any] | None) -> Iterator[Text]:
    if prompts is None:
        return
    yield Text.assemble(
        ("prompts", "bold"), f": {prompts['shared']:,} shared, {prompts['new']:,} new, {prompts['gone']:,} gone"
    )
    for name in ("new", "gone"):
        for text in prompts["examples"][name]:
            yield Text.assemble((f"  {name}: ", "dim"), visible(text, "", LONGEST))


def _answers(told: Mapping[str, Any]) -> Iterator[Text]:
    for one in told["answers"]:
        scored = f" ({one['better']:,} better, {one['worse']:,} worse)" if one["scored"] else ""
        count = f": {one['changed']:,} of {one['shared']:,} to the same prompt changed{scored}"
        yield Text.assemble((f"answers ({one['stage']})", "bold"), count)
        for example in one["examples"]:
            yield Text.assemble(("  prompt: ", "dim"), visible(example["prompt"], "", LONGEST))
            scores = [example[which]["score"] for which in ("old", "new")]
            if scores != [None, None]:
                yield Text(f"  score {_number(scores[0])} -> {_number(scores[1])}", "dim")
            yield from _marked(example["old"]["text"], example["new"]["text"])


def _marked(old: str, new: str) -> Iterator[Text]:
    pieces = diff.words(old, new)
    if pieces is None:  # too long to be compared word by word
        yield Text.assemble(("    was: ", "dim"), visible(old, "", LONGEST))
        yield Text.assemble(("    is: ", "dim"), visible(new, "", LONGEST))
        return
    text = Text("    ")
    for piece in pieces:
        before, after, style = MARKS[piece.kind]
        text.append(f"{before}{visible(piece.text, '', LONGEST)}{after}", style=style)
    yield text


def _labels(labels: Mapping[str, Any] | None) -> Iterator[Text]:
    if labels is None:
        return
    counts = f": {labels['pairs'][0]:,} -> {labels['pairs'][1]:,}, {labels['shared']:,} of the same two answers, "
    yield Text.assemble(("pairs", "bold"), counts, f"{labels['flipped']:,} of them turned over")
    if any(labels["flips_recorded"]):
        yield Text("  flips recorded: {} -> {}".format(*labels["flips_recorded"]))
    for example in labels["examples"]:
        yield Text.assemble(("  prompt: ", "dim"), visible(example["prompt"], "", LONGEST))
        yield Text.assemble(("    was chosen: ", "dim"), visible(example["was_chosen"], "", LONGEST))
        yield Text.assemble(("    is chosen: ", "dim"), visible(example["is_chosen"], "", LONGEST))


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"
