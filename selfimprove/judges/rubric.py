"""A model as a judge of single answers, in words that end with a score."""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from selfimprove import chat
from selfimprove.judges import reading
from selfimprove.judges.protocol import Candidate, Opinion, Panel, Question, Replies


class Scale(NamedTuple):
    """What a template asks for."""

    lowest: float
    highest: float


TEMPLATES = {"hundred": Scale(0, 100), "ten": Scale(1, 10), "additive": Scale(0, 5), "demo": Scale(0, 5)}


def rubric(
    candidates: Sequence[Candidate],
    panel: Panel,
    *,
    model: str = "current",
    template: Literal["hundred", "ten", "additive", "demo"] = "hundred",
    n: Annotated[int, Field(ge=1)] = 1,
    temperature: Annotated[float, Field(ge=0)] = 0.0,
    max_tokens: Annotated[int, Field(ge=1)] = 512,
) -> list[Opinion]:
    """A model rates each answer: the mean of the `n` replies that can be read.

    `hundred`: 0 to 100 (DNPO's labelling, arXiv 2502.05400, section 3.1). `ten`: 1 to 10, the scale of MT-Bench (arXiv
    2306.05685). `additive`: 0 to 5, one point for each of
    five merits (self-rewarding, arXiv 2401.10020, section 2.2, which takes three replies at temperature 1). `demo`: 0
    to 5, as short as the embedded default's model can read.

    The same answer to a prompt is rated once: two ratings of it would make a preference out of nothing.
    """
    scale = TEMPLATES[template]
    questions: dict[tuple[str, str], Question] = {}
    for c in candidates:
        if (c.prompt, c.text) not in questions:
            words = {"question": c.prompt, "answer": c.text}
            if template != "demo":
                words["nonce"] = panel.nonce(c.name)
            questions[c.prompt, c.text] = Question(c.name, chat.render(f"judge/{template}", words))
    schema = reading.score_schema(scale.lowest, scale.highest)
    replies = panel.ask(model, list(questions.values()), n, temperature, max_tokens, schema)
    opinions = {key: _mean(found, scale) for key, found in zip(questions, replies, strict=True)}
    return [opinions[c.prompt, c.text] for c in candidates]


def _mean(replies: Replies, scale: Scale) -> Opinion:
    scores = [s for text in replies.texts if (s := reading.score(text, scale.lowest, scale.highest)) is not None]
    words = "\n---\n".join(replies.texts)
    if scores:
        return Opinion(sum(scores) / len(scores), f"{len(scores)} of {len(replies.texts)} replies readable", words)
    return Opinion(None, replies.reason or "no reply readable", words)
