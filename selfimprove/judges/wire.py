"""What an OpenAI-compatible server sends back: a chat completion, or what is wrong with it."""

import email.utils
import json
import re
import time
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
LONE = re.compile("[\ud800-\udfff]")  # half of a character, which no file can hold


class Message(msgspec.Struct):
    """What a model says."""

    content: str | None = None
    refusal: str | None = None


class Token(msgspec.Struct):
    """A token that could have come, and its log-prob (nats)."""

    token: str
    logprob: float


class Position(msgspec.Struct):
    """A place in a reply."""

    top_logprobs: list[Token] | None = None


class Logprobs(msgspec.Struct):
    """The places of a reply."""

    content: list[Position] | None = None


class Reply(msgspec.Struct):
    """One of the `n` choices."""

    message: Message
    index: int | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Answer(msgspec.Struct):
    """The part of a chat completion that judges need."""

    choices: list[Reply]
    usage: Any = None  # read apart: counts that make no sense are no reason to lose an answer that is paid for

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Of prompt and completion as the server counts them; None where it does not, or its counts are no numbers."""
        counts = self.usage if isinstance(self.usage, dict) else {}
        found = [_count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        return None if found[0] is None or found[1] is None else (found[0], found[1])


class Failure(NamedTuple):
    """An attempt without an answer."""

    said: str
    status: int | None = None  # of HTTP, or that an error inside a reply names; None = no answer came
    code: str = ""
    wait: float = 0.0  # seconds that the server asks for
    billed: bool = False  # it may have been computed, and charged


def read(status: int, text: str, headers: Mapping[str, str]) -> Answer | Failure:
    """A server's response as an answer, whatever its content type says, or as what is wrong with it."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if status < 300:
        try:
            answer = msgspec.convert(table, Answer)
        except msgspec.ValidationError:
            answer = None
        if answer and answer.choices and all(map(_said_something, answer.choices)):
            return answer
    error = table.get("error", table) if isinstance(table, dict) else None
    error = {"message": error} if isinstance(error, str) else error if isinstance(error, dict) else {}
    code = str(error.get("code") or "")
    said = str(error.get("message") or error.get("detail") or text)
    shown = re.sub(r"\s+", " ", LONE.sub("\ufffd", said)).strip()[:300] or "an empty body"
    if status < 300:
        kind = headers.get("content-type", "no content type")
        inner = int(code) if re.fullmatch(r"[45]\d\d", code) else None
        named = shown if error.get("message") else f"no chat completion ({kind}): {shown}"
        return Failure(f"HTTP {status}, {named}", inner or 500, code, billed=inner is None)
    return Failure(f"HTTP {status}, {shown}", status, code, _wait(headers))


def _count(value: Any) -> int | None:
    try:
        found: int = msgspec.convert(value, Count, strict=False)
    except msgspec.ValidationError:
        return None
    return found


def _said_something(reply: Reply) -> bool:
    """An empty reply counts where the server says that the model ended it."""
    ended = reply.finish_reason not in (None, "error")
    return ended or bool(reply.message.content and reply.finish_reason is None)


def _wait(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 where there is none that can be read."""
    if (given := headers.get("retry-after")) is None:
        return 0.0
    try:
        return max(0.0, float(given)) if re.fullmatch(r"\s*\d+(\.\d*)?\s*", given) else _until(given)
    except ValueError:
        return 0.0


def _until(date: str) -> float:
    return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - time.time())
