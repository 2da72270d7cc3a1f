"""What changed between two texts, word by word."""

import difflib
import itertools
import re
from typing import Literal, NamedTuple

WORDS = re.compile(r"\s+|\w+|[^\w\s]")
MOST_WORDS = 800  # of either text: difflib takes time by the square


class Piece(NamedTuple):
    """A stretch of text: in both, only in the new one, or only in the old one."""

    kind: Literal["same", "ins", "del"]
    text: str


def words(old: str, new: str) -> list[Piece] | None:
    """The pieces in reading order, what went before what came; None where a text has more than MOST_WORDS words."""
    before, after = WORDS.findall(old), WORDS.findall(new)
    if max(len(before), len(after)) > MOST_WORDS:
        return None
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    steps = matcher.get_opcodes()
    changed: list[tuple[bool, str, str]] = []
    for k, (tag, a, b, c, d) in enumerate(steps):
        gone, come = "".join(before[a:b]), "".join(after[c:d])
        lone = gone.isspace() and 0 < k < len(steps) - 1  # a space between two changes is no anchor
        changed.append((tag != "equal" or lone, gone, come))
    pieces: list[Piece] = []
    for differs, run in itertools.groupby(changed, key=lambda one: one[0]):
        parts = list(run)
        gone, come = "".join(p[1] for p in parts), "".join(p[2] for p in parts)
        pieces += [Piece("del", gone), Piece("ins", come)] if differs else [Piece("same", gone)]
    return [piece for piece in pieces if piece.text]
