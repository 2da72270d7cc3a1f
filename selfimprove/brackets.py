"""Verdicts that judges put in brackets, `[[7]]` and `[[A>B]]`, in the published benchmarks' forms."""

import re
from collections.abc import Mapping
from typing import Literal

ArenaLabel = Literal["A>>B", "A>B", "A=B", "B>A", "B>>A"]
ARENA: Mapping[str, ArenaLabel] = {
    "A>>B": "A>>B", "A>B": "A>B", "A=B": "A=B", "B>A": "B>A", "B>>A": "B>>A",
    "B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A",
}  # fmt: skip


def bracketed_rating(
    reply: str,
    lowest: float = 1,
    highest: float = 10,
    *,
    which: Literal["first", "last"] = "last",
    whole: bool = False,
    single: bool = False,
) -> float | None:
    """The number in double brackets (MT-bench's `[[7]]`); None outside the scale.

    Args:
        reply: the judge's words.
        lowest: of the scale.
        highest: of the scale.
        which: FastChat takes the first one; of ours the last counts.
        whole: arena-bench v1 reads whole numbers only, so that `[[9.5]]` is none.
        single: FastChat takes `[7]` where no `[[7]]` stands, and reads a rating out of code such as `array[0]`.
    """
    number = r"(\d+)" if whole else r"(\d+\.?\d*)"
    said = re.findall(rf"\[\[{number}\]\]", reply)
    if not said and single:
        said = re.findall(rf"\[{number}\]", reply)
    if not said:
        return None
    value = float(said[0] if which == "first" else said[-1])
    return value if lowest <= value <= highest else None


def arena_label(reply: str, *, single: bool = False) -> ArenaLabel | None:
    """The last of Arena-Hard's labels, `[[A>>B]]` to `[[B>>A]]`, in any spelling of it that upstream knows.

    Args:
        reply: the judge's words.
        single: take `[A>B]` where no label stands in double brackets, as upstream does.
    """
    label = "|".join(ARENA)
    said = re.findall(rf"\[\[({label})\]\]", reply.upper())
    if not said and single:
        said = re.findall(rf"\[({label})\]", reply.upper())
    return ARENA[said[-1]] if said else None
