"""Controls: what a judge that reads nothing would say."""

import random as dice
from collections.abc import Sequence
from typing import Literal

from selfimprove.judges.protocol import Candidate, Opinion, Panel


def length(
    candidates: Sequence[Candidate], panel: Panel | None = None, *, prefer: Literal["longer", "shorter"] = "longer"
) -> list[Opinion]:
    """The number of tokens of an answer, or its negative."""
    sign = 1 if prefer == "longer" else -1
    return [Opinion(float(sign * len(candidate.token_ids))) for candidate in candidates]


def random(candidates: Sequence[Candidate], panel: Panel) -> list[Opinion]:
    """A number between 0 and 1 that depends on the run's seed and the answer's name alone."""
    return [Opinion(dice.Random(panel.nonce(candidate.name)).random()) for candidate in candidates]
