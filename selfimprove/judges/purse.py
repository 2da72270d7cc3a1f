"""What asking a server costs, and a ceiling for it."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from selfimprove import recipe
from selfimprove.errors import UserError
from selfimprove.judges.journal import Journal

TEMPLATE_TOKENS = 256  # more than the chat templates that we know add to a message


@dataclass
class Spent:
    """What has been asked of a server and paid, by one client or under one account."""

    requests: int = 0  # sent, each attempt counted
    answers: int = 0  # replies received and kept
    cached: int = 0  # replies that the journal had
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    unmeasured: int = 0  # requests that may have cost something, the server did not say what: in `usd` at their worst


class Purse:
    """Lets a request go out only where even its worst case stays below the ceiling; lives in one event loop.

    A server that charges more for a request than its worst case, for a prompt of its own or for reasoning beyond
    max_tokens, is believed: requests after that are reckoned dearer by as much.

    Args:
        name: of the server in the recipe.
        server: prices and ceiling.
        journal: keeps the answers and what was paid for them.
        account: whose money it is, in the journal; the ceiling is the account's.
        spent: counts.
    """

    def __init__(self, name: str, server: recipe.Server, journal: Journal, account: str, spent: Spent) -> None:
        self._name, self._server, self._journal, self._account = name, server, journal, account
        self.spent = spent
        journal.settle(account)
        self._dearer = 1.0
        self._changed = asyncio.Condition()
        self._open = 0
        self._held = 0.0

    def worst(self, text: str, completion_tokens: int) -> float:
        """The most that a question can cost, in USD: no tokenizer makes more tokens than there are bytes."""
        return self._dearer * self._price(len(text.encode()) + TEMPLATE_TOKENS, completion_tokens)

    def pay(self, answers: Mapping[str, bytes], tokens: tuple[int, int] | None, worst: float) -> None:
        """Keep answers by key, and book the tokens (prompt, completion) they cost; None = unknown, so the worst."""
        usd = worst if tokens is None else self._price(*tokens)
        if worst and usd > worst:
            self._dearer *= usd / worst
        read, written = tokens or (0, 0)
        self._journal.put_paid(
            answers,
            self._account,
            usd,
            prompt_tokens=read,
            completion_tokens=written,
            unmeasured=int(tokens is None),
        )
        self.spent.answers += len(answers)
        self.spent.usd += usd
        self.spent.unmeasured += tokens is None
        self.spent.prompt_tokens += read
        self.spent.completion_tokens += written

    def lose(self, worst: float) -> None:
        """Book a request without an answer that may be charged for all the same."""
        if worst:
            self.pay({}, None, worst)

    @contextmanager
    def sent(self, worst: float) -> Iterator[None]:
        """Count a request; if this process is killed before it has paid, the next books it at its worst."""
        self.spent.requests += 1
        number = self._journal.begin(self._account, worst)
        try:
            yield
        finally:
            self._journal.end(number)

    @asynccontextmanager
    async def held(self, usd: float) -> AsyncIterator[None]:
        """Set an amount aside while a request is under way; waits for others to be settled where it has to.

        Raises:
            UserError: the ceiling leaves no room for it.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: not self._open or self._fits(usd))
            if not self._fits(usd):
                raise self._reached(usd)
            self._open += 1
            self._held += usd
        try:
            yield
        finally:
            async with self._changed:
                self._open -= 1
                self._held = self._held - usd if self._open else 0.0
                self._changed.notify_all()

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        server = self._server
        return (prompt_tokens * server.input_price + completion_tokens * server.output_price) / 1e6

    def _fits(self, usd: float) -> bool:
        ceiling = self._server.ceiling_usd
        return ceiling is None or self._journal.paid(self._account) + self._held + usd <= ceiling

    def _reached(self, usd: float) -> UserError:
        paid, ceiling = self._journal.paid(self._account), self._server.ceiling_usd
        return UserError(
            f"server '{self._name}': ${paid:.4f} of the ceiling of ${ceiling:.4f} is spent, "
            f"and the next request may cost ${usd:.4f}",
            f"everything answered is kept; raise servers.{self._name}.ceiling_usd in the run's recipe.toml, "
            "then `selfimprove resume RUN`",
        )
