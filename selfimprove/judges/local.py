"""What a panel hands to a scorer, and what it makes of numbers that models give."""

import math
from collections.abc import Sequence

from selfimprove.chat import Chat, is_unicode


def sequences(chat: Chat, rows: Sequence[tuple[str, str]], limit: int) -> tuple[list[int], list[list[int]]]:
    """The (prompt, answer) rows that a reward model can read: their numbers, and the token ids of each as a chat.

    Left out are chats of more than `limit` tokens and texts that are no valid unicode. `chat` is the reward model's
    own: its tokenizer and template, no system prompt of ours.
    """
    ending = _ending(chat)
    numbers, found = [], []
    for i, (prompt, answer) in enumerate(rows):
        if is_unicode(prompt) and is_unicode(answer):
            completion = chat.completion_ids(prompt, answer)
            written = completion[:-1] if ending is None else [*completion, *ending]
            ids = [*chat.prompt_ids(prompt), *written]
            if len(ids) <= limit:
                numbers.append(i)
                found.append(ids)
    return numbers, found


def finite(number: float) -> float | None:
    """A number, or None where a model gave none."""
    return number if math.isfinite(number) else None


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
