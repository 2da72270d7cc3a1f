"""Judges that live on an OpenAI-compatible server: many questions at once, each asked until it is answered, once."""

import asyncio
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from selfimprove import interrupts, recipe
from selfimprove.judges.calls import Line, Pace, Refused, Rejected, Stopped
from selfimprove.judges.endpoint import api_key, connect, no_logprobs, rejection
from selfimprove.judges.journal import Journal, request_key
from selfimprove.judges.protocol import Question, Replies
from selfimprove.judges.purse import Purse, Spent
from selfimprove.judges.wire import LONE, Answer, Reply

TICK = 0.25  # seconds between two calls of `progress`
TOP_LOGPROBS, FEWER_LOGPROBS = 20, 5  # as many as the API knows, and as many as older servers give
NOT_UNICODE = "not valid unicode"


class Kept(msgspec.Struct, omit_defaults=True):
    """A reply in the journal: its text, or the log-probs (nats) of what its first token could have been."""

    text: str = ""
    refused: str = ""
    top: list[tuple[str, float]] = []


class Row(NamedTuple):
    """A question, the keys of its replies in the journal, and the request without what only says how to ask."""

    text: str
    keys: tuple[str, ...]
    body: dict[str, Any]
    max_tokens: int
    seed: int | None  # of the first reply; reply k is sampled with seed + k, as vLLM does for n replies


class Client:
    """What a judge may ask of a server, see protocol.Panel.

    Args:
        name: of the server in the recipe.
        server: its section.
        journal: answers that were paid for, found again by the content of the request.
        progress: told (what, done, total) a few times a second, also while nothing arrives; may raise
            KeyboardInterrupt.
        account: a name for the stage; what it pays under this name counts towards the ceiling, by earlier processes
            too. None = this client's own.
    """

    def __init__(
        self,
        name: str,
        server: recipe.Server,
        journal: Journal,
        progress: Callable[[str, int, int], None],
        account: str | None = None,
    ) -> None:
        self.spent = Spent()
        self._name, self._server, self._journal, self._progress = name, server, journal, progress
        self._account = account or uuid.uuid4().hex
        self._pace = Pace(server.requests_per_minute)
        self._at_once = True  # the server gives n replies to one request
        self._top = TOP_LOGPROBS
        self._limit = "max_tokens"

    def ask(
        self,
        questions: Sequence[Question],
        seeds: Sequence[int],
        n: int,
        temperature: float,
        max_tokens: int,
        schema: Mapping[str, Any] | None = None,
    ) -> list[Replies]:
        """See protocol.Panel; white space around a reply is cut, as everywhere.

        Raises:
            KeyboardInterrupt: the user asked to stop; what was under way is answered and kept.
            UserError: the server rejects the requests, does not answer, or would pass the ceiling.
        """
        body: dict[str, Any] = {"temperature": temperature}
        if schema is not None and self._server.structured_output:
            shape = {"name": "verdict", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": shape}
        rows = [
            self._row(question.text, body, max_tokens, seed, n) for question, seed in zip(questions, seeds, strict=True)
        ]
        refused = self._answer(rows)
        known = self._journal.get([key for row in rows if row for key in row.keys])
        found = []
        for row in rows:
            if row is None:
                found.append(Replies((), NOT_UNICODE))
            elif row.keys in refused:
                found.append(Replies((), refused[row.keys]))
            else:
                kept = [msgspec.json.decode(known[key], type=Kept) for key in row.keys]
                why = next((one.refused for one in kept if one.refused), "")
                found.append(Replies((), why) if why else Replies(tuple(one.text for one in kept)))
        return found

    def choose(self, questions: Sequence[Question], options: Sequence[str]) -> list[list[float] | None]:
        """See protocol.Panel: the first token's log-probs, of the most probable tokens alone.

        White space around a token is no part of an option; an option that is not among the tokens has probability 0.

        Raises:
            UserError: as `ask`, or the server gives no log-probs.
        """
        body = {"temperature": 1.0, "logprobs": True}  # a server that scales log-probs by temperature leaves them alone
        rows = [self._row(question.text, body, 1, None, 1) for question in questions]
        refused = self._answer(rows)
        known = self._journal.get([key for row in rows if row for key in row.keys])
        found: list[list[float] | None] = []
        for row in rows:
            if row is None or row.keys in refused:
                found.append(None)
            else:
                found.append(_shares(msgspec.json.decode(known[row.keys[0]], type=Kept).top, options))
        return found

    def _row(self, text: str, body: dict[str, Any], max_tokens: int, seed: int | None, n: int) -> Row | None:
        """None where the text cannot be sent."""
        if LONE.search(text):
            return None
        said = {"messages": [{"role": "user", "content": text}], **body}
        whole = {**said, "url": self._server.url.rstrip("/"), "model": self._server.model, "max_tokens": max_tokens}
        keys = tuple(request_key({**whole, "seed": None if seed is None else seed + k}) for k in range(n))
        return Row(text, keys, said, max_tokens, seed)

    def _answer(self, rows: Sequence[Row | None]) -> dict[tuple[str, ...], str]:
        """See that the journal holds the answers to all rows; those that the server refuses, and why, by their keys."""
        distinct = {row.keys: row for row in rows if row}
        known = self._journal.get([key for keys in distinct for key in keys])
        left = [row for row in distinct.values() if any(key not in known for key in row.keys)]
        self.spent.cached += len(known)
        if not left:
            return {}
        return asyncio.run(self._converse(left, len(rows), api_key(self._name, self._server)))

    async def _converse(self, left: Sequence[Row], total: int, key: str | None) -> dict[tuple[str, ...], str]:
        purse = Purse(self._name, self._server, self._journal, self._account, self.spent)
        refused: dict[tuple[str, ...], str] = {}
        ahead = iter(left)
        done = total - len(left)

        async def work(line: Line) -> None:
            nonlocal done
            for row in ahead:
                try:
                    await self._one(line, purse, row)
                except Refused as error:
                    refused[row.keys] = str(error)
                done += 1

        async with connect(self._name, self._server, key) as client:
            line = Line(self._name, self._server, key, client, self._pace, purse)
            workers = {asyncio.create_task(work(line)) for _ in range(min(self._server.concurrency, len(left)))}
            try:
                running, failed = workers, None
                stop = interrupts.Stop(f"server '{self._name}' answers what it has been asked")
                while running:
                    self._tell(done, total)
                    if stop.due():
                        line.stop.set()  # those under way are waited for and kept
                    ended, running = await asyncio.wait(running, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
                    errors = [error for task in ended if (error := task.exception()) and not isinstance(error, Stopped)]
                    if errors and failed is None:
                        failed = errors[0]
                        line.stop.set()  # what is under way may be paid for already: it is waited for and kept
                if failed:
                    raise failed
                if done < total:
                    interrupts.check()
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        self._tell(done, total)
        return refused

    async def _one(self, line: Line, purse: Purse, row: Row) -> None:
        """Ask for the replies to a row that are not in the journal, by now and whoever put them there."""
        while True:
            known = self._journal.get(row.keys)
            missing = [k for k, key in enumerate(row.keys) if key not in known]
            if not missing:
                return
            first = missing[0]
            gap = next((k for k in range(first, len(row.keys)) if row.keys[k] in known), len(row.keys))
            asked = range(first, gap)
            body = self._body(row, asked)
            worst = purse.worst(row.text, row.max_tokens * body.get("n", 1))

            def keep(answer: Answer, asked: range = asked, worst: float = worst) -> None:
                replies = sorted(answer.choices, key=lambda reply: reply.index or 0)
                self._at_once = self._at_once and len(replies) >= len(asked)
                kept = {row.keys[k]: self._read(reply, row) for k, reply in zip(asked, replies, strict=False)}
                purse.pay(kept, answer.tokens, worst)

            try:
                await line.ask(body, worst, keep)
            except Rejected as error:
                self._adapt(error, body)
                if self._body(row, asked) == body:
                    raise rejection(self._name, self._server, error) from None

    def _body(self, row: Row, asked: range) -> dict[str, Any]:
        """The request for replies `asked`, or for the first of them, as this server takes it."""
        body = {**row.body, "model": self._server.model, self._limit: row.max_tokens}
        if row.seed is not None:
            body["seed"] = row.seed + asked[0]
        if len(asked) > 1 and self._at_once:
            body["n"] = len(asked)
        if "logprobs" in body:
            body["top_logprobs"] = self._top
        return body

    def _adapt(self, error: Rejected, body: Mapping[str, Any]) -> None:
        """Ask for the same in another way where servers are known to differ."""
        if error.status not in (400, 422):
            return
        if "max_tokens" in body and "max_completion_tokens" in error.said:
            self._limit = "max_completion_tokens"
        elif body.get("top_logprobs", 0) > FEWER_LOGPROBS and "logprobs" in error.said:
            self._top = FEWER_LOGPROBS
        elif "n" in body:
            self._at_once = False

    def _read(self, reply: Reply, row: Row) -> bytes:
        """A reply as the journal keeps it."""
        if "logprobs" in row.body:
            if reply.logprobs is None or reply.logprobs.content is None:
                raise no_logprobs(self._name)
            top = reply.logprobs.content[0].top_logprobs if reply.logprobs.content else []
            if top is None or (reply.logprobs.content and not top):
                raise no_logprobs(self._name)
            return msgspec.json.encode(Kept(top=[(LONE.sub("\ufffd", one.token), one.logprob) for one in top]))
        text = LONE.sub("\ufffd", reply.message.content or "").strip()
        if not text and reply.message.refusal:
            return msgspec.json.encode(Kept(refused=f"the model refuses: {reply.message.refusal[:200]}"))
        if not text and reply.finish_reason == "content_filter":
            return msgspec.json.encode(Kept(refused="the server's content filter holds the reply back"))
        return msgspec.json.encode(Kept(text))

    def _tell(self, done: int, total: int) -> None:
        costs = self._server.input_price or self._server.output_price
        self._progress(f"judging (${self._journal.paid(self._account):.2f})" if costs else "judging", done, total)


def _shares(top: Sequence[tuple[str, float]], options: Sequence[str]) -> list[float] | None:
    """The probability of each option among the options."""
    weights = [math.fsum(math.exp(logprob) for token, logprob in top if token.strip() == option) for option in options]
    whole = math.fsum(weights)
    return [weight / whole for weight in weights] if whole > 0 else None
