"""A judge of the embedded world that errs."""

import random
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from selfimprove.demo import world
from selfimprove.judges.protocol import Candidate, Opinion, Panel, squeezed


def demo_rubric(
    candidates: Sequence[Candidate],
    panel: Panel | None = None,
    *,
    noise: Annotated[float, Field(ge=0)] = 20.0,
    gap: Annotated[float, Field(ge=0)] = 40.0,
) -> list[Opinion]:
    """A judge of the embedded world that errs: 0 to 100 in steps of 5, right answers `gap` higher, `noise` = sd.

    The noise belongs to the answer's text: asked twice, the judge says the same, as a model does at temperature 0.
    """
    opinions = []
    for candidate in candidates:
        right = world.check(candidate.prompt, candidate.text)
        if right is None:
            opinions.append(Opinion(None, "prompt outside the grammar"))
            continue
        error = random.Random(f"{candidate.prompt}\n{squeezed(candidate.text)}").gauss(0, noise)
        score = 50 + gap * (float(right) - 0.5) + error
        opinions.append(Opinion(float(min(100, max(0, 5 * round(score / 5))))))
    return opinions
