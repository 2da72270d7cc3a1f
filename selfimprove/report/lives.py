"""Draws the life of a pair or a prompt; whatever a model or a judge wrote is shown as text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from selfimprove.report.escape import line, visible

LONGEST = 1_500  # characters shown of a text
MOST = 40  # answers shown of a round


def show(told: Mapping[str, Any], console: Console) -> None:
    """Print what lineage.pair or lineage.prompt found."""
    what = f"pair {told['pair_id']}" if "pair_id" in told else f"prompt {told['prompt_id']}"
    console.print(Text(line(f"run {told['run']}, {what}"), "bold"))
    for text in _prompt(told["prompt"]):
        console.print(text)
    for one in told["rounds"]:
        console.print()
        console.print(Text(f"round {one['iteration']}", "bold"))
        for text in _round(one):
            console.print(text)
    if told["held_out"]:
        console.print()
        console.print(Text("held-out answers", "bold"))
        for row in told["held_out"][:MOST]:
            about = (
                f"{row['stage']} {row['mode']}/{row['sample']}, score {_number(row['score'])}, {row['finish_reason']}"
            )
            console.print(_field("  " + about, row["text"]))
        for text in _more(told["held_out"]):
            console.print(text)


def _prompt(prompt: Mapping[str, Any]) -> Iterator[Text]:
    if prompt["keywords"]:
        trained = " by the generator that was trained on the seeds" if prompt["origin"] == "synthetic" else ""
        yield _field("  keywords", ", ".join(prompt["keywords"]))
        yield _field("  written in", f"{prompt['stage']}{trained}")
    elif prompt["origin"]:
        yield _field("  origin", prompt["origin"])
    if prompt["text"] is not None:
        yield _field("  prompt", prompt["text"])
    for row in prompt["set_aside"]:
        yield _aside(row)


def _round(one: Mapping[str, Any]) -> Iterator[Text]:
    roles: dict[tuple[str, int | None], list[str]] = {}
    for pair in one["pairs"]:
        for side in ("chosen", "rejected"):
            roles.setdefault((pair[side]["source"], pair[side]["sample"]), []).append(side)
    for answer in one["answers"][:MOST]:
        role = " and ".join(dict.fromkeys(roles.get((answer["source"], answer["sample"]), [])))
        yield from _answer(answer, role)
    yield from _more(one["answers"])
    for row in one["comparisons"][:MOST]:
        two = f"{row['first_source']}/{row['first_sample']} against {row['second_source']}/{row['second_sample']}"
        both = f"P(first is better) {_number(row['forward'])}, shown the other way round {_number(row['swapped'])}"
        yield Text(line(f"  {two}, {row['judge']}: {both} {row['reason']}".rstrip()))
        for name in ("forward_reply", "swapped_reply"):
            if row.get(name):
                yield _field(f"    {name.replace('_', ' ')}", row[name])
    yield from _more(one["comparisons"])
    for pair in one["pairs"]:
        yield from _pair(pair)
    for flip in one["flips"]:
        scores = f"{_number(flip['was_chosen_score'])} to {_number(flip['was_rejected_score'])}"
        turned = f"{flip['was_chosen']} was chosen over {flip['was_rejected']}, and lost by {scores}"
        yield _field(f"  flipped ({flip['why']}) in {flip['stage']}", f"{flip['pair_id']}: {turned}")
    for row in one["set_aside"]:
        yield _aside(row)


def _answer(answer: Mapping[str, Any], role: str) -> Iterator[Text]:
    facts = [f"{answer['source']}/{answer['sample']}"]
    if answer["tokens"] is not None:
        facts.append(f"{answer['tokens']} tokens")
    if answer["finish_reason"]:
        facts.append(f"finish {answer['finish_reason']}")
    if answer["mean_logp"] is not None:
        facts.append(f"mean logp {answer['mean_logp']:.3f}")
    if answer["policy"]:
        called = f" ({answer['policy_is']})" if answer["policy_is"] else ""
        facts.append(f"policy {answer['policy'][:12]}{called}")
    yield Text.assemble("  ", (line(", ".join(facts)), "cyan"), (f"  {role}" if role else "", "bold"))
    if answer["text"] is not None:
        yield Text("    " + visible(answer["text"], "\n", LONGEST).replace("\n", "\n    "))
    for verdict in answer["verdicts"]:
        why = f" ({verdict['reason']})" if verdict["reason"] else ""
        yield _field(f"    {verdict['judge']}", f"score {_number(verdict['score'])}{why}")
        if verdict["reply"]:
            yield _field("    its words", verdict["reply"])


def _pair(pair: Mapping[str, Any]) -> Iterator[Text]:
    sides = [
        f"{s['source']}{'' if s['sample'] is None else '/' + str(s['sample'])}"
        for s in (pair["chosen"], pair["rejected"])
    ]
    scores = [pair[side]["score"] for side in ("chosen", "rejected")]
    by = f", {_number(scores[0])} to {_number(scores[1])}" if scores != [None, None] else ""
    margin = f", margin {_number(pair['margin'])}" if pair["margin"] is not None else ""
    made = (
        ""
        if pair["stage"].startswith(f"iter-{pair['iteration']:03d}/")
        else f", first paired in round {pair['iteration']}"
    )
    yield _field(f"  pair {pair['pair_id']}", f"{sides[0]} over {sides[1]}{by}{margin}{made}")
    for name, value in pair["rule"].items():
        if value is not None:
            yield _field(f"    {name}", json.dumps(value, ensure_ascii=False))
    for trained in pair["training"]:
        yield _field(f"    {trained['stage']}", trained["why"] if "why" in trained else _losses(trained))


def _losses(trained: Mapping[str, Any]) -> str:
    def at(which: Mapping[str, Any]) -> str:
        loss = "loss of its own unknown" if which["loss"] is None else f"loss {which['loss']:.4f}"
        return f"{loss}, rewards/margin {_number(which['margin'])} at step {which['step']}"

    steps = trained["steps"]
    if len(steps) == 1:
        return at(trained["first"])
    listed = ", ".join(map(str, steps[:10])) + (f" and {len(steps) - 10} more" if len(steps) > 10 else "")
    return f"first {at(trained['first'])}; last {at(trained['last'])}; steps {listed}"


def _aside(row: Mapping[str, Any]) -> Text:
    detail = f": {row['detail']}" if row["detail"] else ""
    return _field(f"  set aside in {row['stage']}", f"{row['row_id']}, {row['reason']}{detail}")


def _more(rows: Sequence[Any]) -> Iterator[Text]:
    if len(rows) > MOST:
        yield Text(f"  and {len(rows) - MOST} more: --json has them all", "dim")


def _field(name: str, value: str) -> Text:
    return Text.assemble((f"{line(name)}: ", "dim"), visible(str(value), "", LONGEST))


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
