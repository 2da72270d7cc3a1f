"""The models that a judge may ask: the run's own policies, other local models, and servers."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfimprove import recipe
from selfimprove.chat import Chat, is_unicode
from selfimprove.engine.checkpoints import context_length
from selfimprove.engine.protocol import Request, Sampling
from selfimprove.execution import Executor, Lost, Work, ask
from selfimprove.execution.shard import Task
from selfimprove.judges import local
from selfimprove.judges.journal import Journal
from selfimprove.judges.protocol import SERVER, Opinion, Question, Replies
from selfimprove.judges.scorers import TOO_LONG

if TYPE_CHECKING:
    from selfimprove.judges.purse import Spent
    from selfimprove.judges.server import Client

RUN = frozenset({"current", "initial"})  # policies of the run, of one shape
NOT_UNICODE = "not valid unicode"


@dataclass
class Models:
    """See protocol.Panel.

    Answers of local models are kept in `scratch` until the stage is published, those of servers in `cache`, for the
    run: money is not spent twice.
    """

    seed: Callable[[str], int]  # of a row of the stage
    engine_section: recipe.Engine
    servers: Mapping[str, recipe.Server]
    paths: Mapping[str, Path]  # of local models, by the names that judges use
    identities: Mapping[str, str]  # of the same
    executor: Executor
    policy: Path  # whose engine serves the policies of the run
    logs: Path
    scratch: Path
    cache: Path
    account: str  # under which each server's prices are counted towards its ceiling
    progress: Callable[[str, int, int], None]
    opinions: Mapping[tuple[str, str, int], Opinion] = field(default_factory=dict)
    tokens: int = 0  # written by local models
    cut: int = 0  # pairs of answers of which a ranker saw only a part

    def nonce(self, name: str) -> str:
        """See protocol.Panel."""
        return hashlib.sha256(f"nonce/{self.seed(f'nonce/{name}')}/{name}".encode("utf-8", "replace")).hexdigest()[:12]

    def ask(
        self,
        model: str,
        questions: Sequence[Question],
        n: int,
        temperature: float,
        max_tokens: int,
        schema: Mapping[str, Any] | None = None,
    ) -> list[Replies]:
        """See protocol.Panel."""
        seeds = [self.seed(f"judge/{question.name}") for question in questions]
        if model.startswith(SERVER):
            return self._server(model).ask(questions, seeds, n, temperature, max_tokens, schema)
        chat, limit = self._chat(model)
        replies: list[Replies] = [Replies((), NOT_UNICODE) for _ in questions]
        numbers, requests = [], []
        for i, (question, seed) in enumerate(zip(questions, seeds, strict=True)):
            if not is_unicode(question.text):
                continue
            ids = chat.prompt_ids(question.text)
            if len(ids) > limit - max_tokens:
                replies[i] = Replies((), TOO_LONG)
            else:
                numbers.append(i)
                requests.append(Request(ids, n, seed))
        sampling = Sampling(temperature, 1.0, max_tokens, chat.stop_token_ids)
        for i, completions in zip(numbers, self._answers("complete", model, requests, sampling), strict=True):
            if isinstance(completions, Lost):
                replies[i] = Replies((), completions.reason)
                continue
            replies[i] = Replies(tuple(chat.text(completion.token_ids) for completion in completions))
            self.tokens += sum(len(completion.token_ids) for completion in completions)
        return replies

    def choose(self, model: str, questions: Sequence[Question], options: Sequence[str]) -> list[list[float] | None]:
        """See protocol.Panel."""
        if model.startswith(SERVER):
            return self._server(model).choose(questions, options)
        readable = [i for i, question in enumerate(questions) if is_unicode(question.text)]
        chat, _ = self._chat(model)
        rows = [
            (questions[i].text, chat.completion_ids(questions[i].text, option)[:-1])  # the end is no part of a label
            for i in readable
            for option in options
        ]
        scored = self.logps(model, rows)
        found: list[list[float] | None] = [None] * len(questions)
        for k, i in enumerate(readable):
            of = scored[k * len(options) : (k + 1) * len(options)]
            sums = [sum(logprobs) for logprobs in of if logprobs is not None]
            if len(sums) == len(options):
                top = max(sums)
                weights = [math.exp(one - top) for one in sums]
                found[i] = [weight / sum(weights) for weight in weights]
        return found

    def logps(self, model: str, rows: Sequence[tuple[str, Sequence[int]]]) -> list[list[float] | None]:
        """See protocol.Panel."""
        chat, limit = self._chat(model)
        pieces = [(chat.prompt_ids(text), ids) if is_unicode(text) else ([], []) for text, ids in rows]
        return score(lambda sequences: self._answers("score", model, sequences), pieces, limit)

    def rewards(self, model: str, rows: Sequence[tuple[str, str]]) -> list[float | None]:
        """See protocol.Panel."""
        chat, limit = self._chat(model)
        numbers, sequences = local.sequences(chat, rows, limit)
        found: list[float | None] = [None] * len(rows)
        for i, reward in zip(numbers, self._answers("reward", model, sequences), strict=True):
            found[i] = None if isinstance(reward, Lost) else local.finite(reward)
        return found

    def compare(self, model: str, rows: Sequence[tuple[str, str, str]]) -> list[float | None]:
        """See protocol.Panel."""
        numbers = [i for i, row in enumerate(rows) if all(map(is_unicode, row))]
        found: list[float | None] = [None] * len(rows)
        compared = self._answers("compare", model, [tuple(rows[i]) for i in numbers])
        for i, comparison in zip(numbers, compared, strict=True):
            if not isinstance(comparison, Lost):
                found[i] = local.finite(comparison.logit)
                self.cut += comparison.cut > 0
        return found

    def _answers(self, task: Task, model: str, rows: Sequence[Any], sampling: Sampling | None = None) -> Iterator[Any]:
        """A model's answer to each row; asked for only where a killed process has not left it."""
        work = Work(
            task=task,
            model=str(self.paths[model]),
            identity=self.identities[model],
            engine=self.engine_section.model_dump(mode="json"),
            policy=str(self.policy) if model in RUN else None,
            logs=str(self.logs),
            sampling=sampling,
        )
        total = len(rows)
        return ask(
            self.executor, self.scratch / "shards", work, rows, lambda done: self.progress("judging", done, total)
        )

    def _server(self, model: str) -> "Client":
        from selfimprove.judges.server import Client

        name = model.removeprefix(SERVER)
        if name not in self._clients:
            journal = Journal(self._journal)
            self._clients[name] = Client(name, self.servers[name], journal, self.progress, self._account(name))
        return self._clients[name]

    @property
    def _journal(self) -> Path:
        return self.cache / "servers.sqlite"

    def _account(self, server: str) -> str:
        return f"{self.account}/{server}"

    @cached_property
    def _clients(self) -> dict[str, "Client"]:
        return {}

    @property
    def spent(self) -> dict[str, "Spent"]:
        """What each server was asked and paid by the stage, in earlier processes too; `cached` is of this one."""
        from selfimprove.judges.purse import Spent

        if not self._journal.exists():
            return {}
        found, journal = {}, Journal(self._journal)
        for name in self.servers:
            account, client = self._account(name), self._clients.get(name)
            journal.settle(account)
            counted = journal.counts(account)
            if client or counted["requests"]:
                cached = client.spent.cached if client else 0
                found[name] = Spent(cached=cached, usd=journal.paid(account), **counted)
        journal.close()
        return found

    def _chat(self, model: str) -> tuple[Chat, int]:
        """A model's chat, and the tokens that its context holds."""
        path = self.paths[model]
        if model not in self._chats:
            self._chats[model] = Chat(path)
        section = self.engine_section
        return self._chats[model], section.max_model_len if model in RUN else context_length(path, section)

    @cached_property
    def _chats(self) -> dict[str, Chat]:
        return {}


def score(
    answers: Callable[[Sequence[Sequence[int]]], Iterable[list[float] | Lost]],
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    limit: int,
) -> list[list[float] | None]:
    """Log-probability of each token of an answer, given its prompt and what stands before it.

    None for an empty answer, for one that ends the engine, and where the context is too small: an engine scores a
    sequence only where one token more would fit.
    """
    fitting = [i for i, (prompt, ids) in enumerate(rows) if ids and len(prompt) + len(ids) < limit]
    found: list[list[float] | None] = [None] * len(rows)
    scored = answers([[*rows[i][0], *rows[i][1]] for i in fitting])
    for i, one in zip(fitting, scored, strict=True):
        found[i] = None if isinstance(one, Lost) else one[len(rows[i][0]) - 1 :]
    return found
