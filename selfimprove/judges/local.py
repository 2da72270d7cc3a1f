"""Numbers off local models: what a panel hands to a scorer or a ranker, and what it makes of the answers."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from selfimprove.chat import Chat, is_unicode
from selfimprove.engine.protocol import Comparison, Ranker, Scorer


def rewards(
    scorer: Scorer,
    chat: Chat,
    rows: Sequence[tuple[str, str]],
    limit: int,
    finished: Callable[[int, float | None], None] = lambda number, reward: None,
) -> list[float | None]:
    """The reward of each (prompt, answer), in order; `finished` hears of each that was scored.

    None where the chat has more than `limit` tokens or a text is no valid unicode, and for a reward that is not finite.
    `chat` is the reward model's own: its tokenizer and template, no system prompt of ours.
    """
    ending = _ending(chat)
    numbers, sequences = [], []
    for i, (prompt, answer) in enumerate(rows):
        if is_unicode(prompt) and is_unicode(answer):
            completion = chat.completion_ids(prompt, answer)
            written = completion[:-1] if ending is None else [*completion, *ending]
            ids = [*chat.prompt_ids(prompt), *written]
            if len(ids) <= limit:
                numbers.append(i)
                sequences.append(ids)
    scored = scorer.rewards(sequences, lambda k, reward: finished(numbers[k], _finite(reward))) if sequences else []
    found: list[float | None] = [None] * len(rows)
    for i, reward in zip(numbers, scored, strict=True):
        found[i] = _finite(reward)
    return found


class Comparisons(NamedTuple):
    """The logit that the first answer is better, by row, and the rows of which something was cut off."""

    logits: list[float | None]
    truncated: int


def compare(
    ranker: Ranker,
    rows: Sequence[tuple[str, str, str]],
    finished: Callable[[int, Comparison], None] = lambda number, comparison: None,
) -> Comparisons:
    """Each (prompt, first answer, second answer), in order; `finished` hears of each that was compared.

    None where a text is no valid unicode, and for a logit that is not finite. A ranker cuts what is too long, as it was
    trained to: the number of such rows is for the caller to show.
    """
    numbers = [i for i, row in enumerate(rows) if all(map(is_unicode, row))]
    compared = ranker.compare([rows[i] for i in numbers], lambda k, one: finished(numbers[k], one))
    found: list[float | None] = [None] * len(rows)
    for i, one in zip(numbers, compared, strict=True):
        found[i] = _finite(one.logit)
    return Comparisons(found, sum(one.cut > 0 for one in compared))


def _ending(chat: Chat) -> list[int] | None:
    """What the template writes behind an answer's end token, such as a line break; None where it writes no such token.

    A completion is given with its end token and without the rest; reward models were trained on whole chats as their
    template renders them, and are read at the last token of these.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    whole: list[int] = chat.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    rest = whole[len(chat.prompt_ids("a")) :]
    ends = [i for i, token in enumerate(rest) if token in chat.stop_token_ids]
    return rest[ends[-1] + 1 :] if ends else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
