"""A request to an OpenAI-compatible server, repeated until it is answered: pace, attempts, what a refusal means."""

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from selfimprove import masking, recipe
from selfimprove.errors import UserError
from selfimprove.judges.purse import Purse
from selfimprove.judges.wire import Answer, Failure, read

FIRST_WAIT, LONGEST_BACKOFF = 1.0, 60.0  # seconds; doubled from attempt to attempt, half of it at random
LONGEST_WAIT = 600.0  # seconds that a server may ask for before it is better to come back later
ONE_REQUEST = re.compile(
    r"context.?(length|window|size)|too (long|many tokens)|reduce the length|string_above_max|maximum.{0,20}input"
    r"|content.{0,12}(policy|filter)|moderation|flagged|safety",
    re.IGNORECASE,
)


class Refused(Exception):
    """The server will not answer this request, whatever the others."""


class Rejected(Exception):
    """The server would reject any request of this form."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.said)
        self.said, self.status = failure.said, failure.status


class Stopped(Exception):
    """Another request ended the work."""


class Pace:
    """When the next attempt may start: at most so many a minute, and none while the server asks to wait."""

    def __init__(self, per_minute: int | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0  # by time.monotonic

    def seconds(self) -> float:
        """How long the caller has to wait; the place is taken."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._gap
        return start - now

    def hold(self, seconds: float) -> None:
        """Let nobody start before."""
        self._next = max(self._next, time.monotonic() + seconds)


class Line:
    """The way to a server, shared by all requests of a call; lives in one event loop.

    Args:
        name: of the server in the recipe.
        server: how to ask.
        key: the API key, removed from whatever the server says; None = none is sent.
        client: the openai client.
        pace: of this server's requests.
        purse: holds the money.
    """

    def __init__(self, name: str, server: recipe.Server, key: str | None, client: Any, pace: Pace, purse: Purse):
        self._name, self._server, self._key = name, server, key
        self._client, self._pace, self._purse = client, pace, purse
        self.stop = asyncio.Event()

    async def ask(self, body: Mapping[str, Any], worst: float, keep: Callable[[Answer], None]) -> None:
        """Ask until there is an answer, which `keep` keeps before anything else happens.

        Raises:
            Refused: this request alone.
            Rejected: all requests like it.
            Stopped: `stop` was set.
            UserError: no attempt was left, or the ceiling is reached.
        """
        last = ""
        for attempt in range(1, self._server.attempts + 1):
            await self._pause(self._pace.seconds())
            async with self._purse.held(worst):
                if self.stop.is_set():
                    raise Stopped
                with self._purse.sent(worst):
                    try:
                        found = await self._attempt(body)
                    except asyncio.CancelledError:
                        self._purse.lose(worst)
                        raise
                    if isinstance(found, Answer):
                        keep(found)
                    elif found.billed:
                        self._purse.lose(worst)
            if isinstance(found, Answer):
                return
            last = found.said
            self._give_up(found)
            if attempt < self._server.attempts:
                backoff = min(LONGEST_BACKOFF, FIRST_WAIT * 2.0 ** (attempt - 1))
                self._pace.hold(found.wait)  # for the others too
                await self._pause(found.wait + backoff * random.uniform(0.5, 1))
        raise UserError(
            f"server '{self._name}' gave no answer in {self._server.attempts} attempts; the last one: {last}",
            f"everything answered is kept; check {self._server.url}, then `selfimprove resume RUN` asks for the rest "
            f"(servers.{self._name}: attempts, timeout_seconds, concurrency, requests_per_minute)",
        )

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.stop.wait()
        if self.stop.is_set():
            raise Stopped

    async def _attempt(self, body: Mapping[str, Any]) -> Answer | Failure:
        import openai

        seconds = self._server.timeout_seconds
        headers = None if self._key else {"Authorization": openai.Omit()}
        try:
            async with asyncio.timeout(seconds):
                raw = await self._client.chat.completions.with_raw_response.create(**body, extra_headers=headers)
            response = raw.http_response
        except TimeoutError:
            return Failure(f"no answer within {seconds:g} s", billed=True)
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            what = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
            return Failure(self._clean(what), billed="Connect" not in type(cause).__name__)
        text = self._clean(response.content.decode("utf-8", "replace"))
        return read(response.status_code, text, response.headers)

    def _clean(self, text: str) -> str:
        """Without the key: as it is, or as JSON or Python writes it."""
        for form in {self._key, json.dumps(self._key)[1:-1], repr(self._key)[1:-1]} if self._key else set():
            text = text.replace(form, masking.MASK)
        return text

    def _give_up(self, failure: Failure) -> None:
        """Raise where another attempt would change nothing."""
        status = failure.status
        about_one = status == 413 or ONE_REQUEST.search(f"{failure.code} {failure.said}")
        if status in (400, 403, 413, 422) and about_one:
            raise Refused(failure.said)
        if failure.code == "insufficient_quota":
            raise Rejected(failure._replace(status=402))
        if failure.wait > LONGEST_WAIT:
            raise UserError(
                f"server '{self._name}' asks to wait for {failure.wait:.0f} s: {failure.said}",
                "everything answered is kept; `selfimprove resume RUN` later asks for the rest",
            )
        if status is not None and status < 500 and status not in (408, 409, 425, 429):
            raise Rejected(failure)
