"""A judge of two answers at a time, shown in both orders."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from selfimprove import chat
from selfimprove.judges import reading
from selfimprove.judges.protocol import Candidate, Panel, Preference, Question, Replies

Two = tuple[Candidate, Candidate]


def pairwise(
    pairs: Sequence[Two],
    panel: Panel,
    *,
    model: str = "current",
    read: Literal["reply", "logprobs"] = "reply",
    temperature: Annotated[float, Field(ge=0)] = 0.0,
    max_tokens: Annotated[int, Field(ge=1)] = 1024,
) -> list[Preference]:
    """A model says which of two answers is better, asked twice with the answers swapped.

    `reply` reads the last [[A]], [[B]] or [[C]] (a tie) of its words (MT-bench, arXiv 2306.05685); `logprobs` takes the
    probability of A among A and B as the first token (AlpacaEval 2's weighted judge) and reads no words.
    """
    template = "judge/pairwise" if read == "reply" else "judge/pairwise_label"
    questions = [
        Question(
            f"{a.name}|{b.name}",
            chat.render(
                template,
                {"question": a.prompt, "first": a.text, "second": b.text, "nonce": panel.nonce(f"{a.name}|{b.name}")},
            ),
        )
        for one, other in pairs
        for a, b in ((one, other), (other, one))
    ]
    if read == "logprobs":
        chosen = panel.choose(model, questions, ("A", "B"))
        firsts: list[float | None] = [None if p is None else p[0] for p in chosen]
        words = [""] * len(questions)
        why = ["" if p is not None else "no label has a known probability" for p in chosen]
    else:
        replies = panel.ask(model, questions, 1, temperature, max_tokens, reading.LABEL_SCHEMA)
        firsts = [reading.first_is_better(reply.texts[0]) if reply.texts else None for reply in replies]
        words = [reply.texts[0] if reply.texts else "" for reply in replies]
        why = [_why(p, reply) for p, reply in zip(firsts, replies, strict=True)]
    found = []
    for k in range(0, len(questions), 2):
        forward, back = firsts[k], firsts[k + 1]
        swapped = None if back is None else 1 - back
        found.append(Preference(forward, swapped, why[k] or why[k + 1], (words[k], words[k + 1])))
    return found


def _why(preference: float | None, reply: Replies) -> str:
    return "" if preference is not None else reply.reason or "reply not readable"


def pairwise_ranker(pairs: Sequence[Two], panel: Panel, *, model: str) -> list[Preference]:
    """A two-answer encoder such as PairRM (arXiv 2306.02561), asked in both orders; P = sigmoid(logit)."""
    import math

    rows = [(a.prompt, a.text, b.text) for one, other in pairs for a, b in ((one, other), (other, one))]
    logits = panel.compare(model, rows)
    found = []
    for forward, back in zip(logits[::2], logits[1::2], strict=True):
        if forward is None or back is None:
            found.append(Preference(None, None, "too long for the judge's context"))
        else:
            found.append(Preference(1 / (1 + math.exp(-forward)), 1 / (1 + math.exp(back))))
    return found
