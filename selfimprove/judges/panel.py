"""The models that a judge may ask: the run's own policies, other local models, and servers."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from selfimprove import interrupts, recipe
from selfimprove.chat import Chat, is_unicode
from selfimprove.engine.checkpoints import context_length
from selfimprove.engine.protocol import Completion, Engine, Request, Sampling, Task
from selfimprove.judges import local
from selfimprove.judges.journal import Journal, request_key
from selfimprove.judges.protocol import SERVER, Opinion, Question, Replies
from selfimprove.judges.scorers import TOO_LONG

if TYPE_CHECKING:
    from selfimprove.judges.purse import Spent
    from selfimprove.judges.server import Client

RUN = frozenset({"current", "initial"})  # policies of the run, of one shape
NOT_UNICODE = "not valid unicode"
SCORED = 256  # rows of one call that scores
R = TypeVar("R", bound=tuple[str, ...])


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
    open_engine: Callable[[], Engine]  # the run's, for its policies
    open_other: Callable[[Path, Task], Any]  # an engine of another model's own
    scratch: Path
    cache: Path
    account: str  # under which servers' prices are counted towards their ceilings
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
        answers = remembered(
            self.journal,
            lambda: self._engine(model),
            self._identity(model),
            requests,
            sampling,
            lambda done, total: self.progress("judging", done, total),
        )
        for i, completions in zip(numbers, answers, strict=True):
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
        return score(self.journal, lambda: self._engine(model), self._identity(model), pieces, limit)

    def rewards(self, model: str, rows: Sequence[tuple[str, str]]) -> list[float | None]:
        """See protocol.Panel."""

        def score_rows(missing: Sequence[tuple[str, str]], put: Callable[[int, float | None], None]) -> None:
            chat, limit = self._chat(model)
            local.rewards(self.open_other(self.paths[model], "reward"), chat, missing, limit, put)

        return self._numbers("reward", model, rows, score_rows)

    def compare(self, model: str, rows: Sequence[tuple[str, str, str]]) -> list[float | None]:
        """See protocol.Panel."""

        def score_rows(missing: Sequence[tuple[str, str, str]], put: Callable[[int, float | None], None]) -> None:
            ranker = self.open_other(self.paths[model], "compare")
            self.cut += local.compare(ranker, missing, lambda i, one: put(i, one.logit)).truncated

        return self._numbers("compare", model, rows, score_rows)

    def _numbers(
        self,
        what: str,
        model: str,
        rows: Sequence[R],
        score_rows: Callable[[Sequence[R], Callable[[int, float | None], None]], None],
    ) -> list[float | None]:
        """A number for each row, those in the journal not asked for again; None where the model gave none."""
        readable = [row if all(is_unicode(text) for text in row) else None for row in rows]
        keys = [request_key({"what": what, "model": self._identity(model), "row": row}) for row in readable]
        known = self.journal.get(keys)
        found: dict[str, float | None] = {key: float(value) for key, value in known.items()}
        missing = [i for i, row in enumerate(readable) if row is not None and keys[i] not in found]

        def put(number: int, value: float | None) -> None:
            key = keys[missing[number]]
            if value is not None and math.isfinite(value):
                found[key] = value
                self.journal.put(key, repr(value).encode())
            self.progress("judging", len(found), len(rows))

        if missing:
            score_rows([rows[i] for i in missing], put)
        return [found.get(key) for key in keys]

    @cached_property
    def journal(self) -> Journal:
        """What local models have answered in this stage."""
        return Journal(self.scratch / "answers.sqlite")

    def _server(self, model: str) -> "Client":
        from selfimprove.judges.server import Client

        name = model.removeprefix(SERVER)
        if name not in self._clients:
            journal = Journal(self.cache / "servers.sqlite")
            self._clients[name] = Client(name, self.servers[name], journal, self.progress, self.account)
        return self._clients[name]

    @cached_property
    def _clients(self) -> dict[str, "Client"]:
        return {}

    @property
    def spent(self) -> dict[str, "Spent"]:
        """What each server was asked and what it cost."""
        return {name: client.spent for name, client in self._clients.items()}

    def _identity(self, model: str) -> str:
        return f"{self.identities[model]}/{self.engine_section.model_dump_json()}"

    def _engine(self, model: str) -> Engine:
        path = self.paths[model]
        engine: Engine = self.open_engine() if model in RUN else self.open_other(path, "generate")
        engine.swap(path)
        return engine

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


def remembered(
    journal: Journal,
    open_engine: Callable[[], Engine],
    identity: str,
    requests: Sequence[Request],
    sampling: Sampling,
    progress: Callable[[int, int], None],
) -> list[list[Completion]]:
    """What an engine answers; each request goes into the journal as it ends, and what is there is not asked again.

    The engine is opened only where something is left to ask.
    """
    sampled = msgspec.to_builtins(sampling)
    keys = [request_key({"model": identity, "request": msgspec.to_builtins(r), "sampling": sampled}) for r in requests]
    known = journal.get(keys)
    missing = [i for i, key in enumerate(keys) if key not in known]
    found = {i: msgspec.msgpack.decode(known[key], type=list[Completion]) for i, key in enumerate(keys) if key in known}

    def finished(number: int, completions: list[Completion]) -> None:
        found[missing[number]] = completions
        journal.put(keys[missing[number]], msgspec.msgpack.encode(completions))
        progress(len(found), len(requests))

    if not missing:
        progress(len(found), len(requests))
    else:  # the first that ends says so: an engine that is still starting would spoil the rate
        open_engine().generate([requests[i] for i in missing], sampling, finished)
    return [found[i] for i in range(len(requests))]


def score(
    journal: Journal,
    open_engine: Callable[[], Engine],
    identity: str,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    limit: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float] | None]:
    """Log-probability of each token of an answer, given its prompt and what stands before it.

    None for an empty answer, and where the context is too small: an engine scores a sequence only where one token more
    would fit. Rows go to the engine in parts of SCORED, and a part into the journal whole: a killed run asks in the
    same parts again, since what else is in a batch may move the last bits of a number.
    """
    fitting = [i for i, (prompt, ids) in enumerate(rows) if ids and len(prompt) + len(ids) < limit]
    asked = {i: [*rows[i][0], *rows[i][1]] for i in fitting}
    keys = {i: request_key({"model": identity, "score": ids}) for i, ids in asked.items()}
    known = journal.get(list(keys.values()))
    found: list[list[float] | None] = [None] * len(rows)
    for start in range(0, len(fitting), SCORED):
        part = fitting[start : start + SCORED]
        if any(keys[i] not in known for i in part):
            interrupts.check()
            scored = open_engine().prompt_logprobs([asked[i] for i in part])
            new = {keys[i]: msgspec.msgpack.encode(one) for i, one in zip(part, scored, strict=True)}
            new = {key: value for key, value in new.items() if key not in known}
            journal.put_all(new)
            known |= new
        for i in part:
            found[i] = msgspec.msgpack.decode(known[keys[i]], type=list[float])[len(rows[i][0]) - 1 :]
        progress(start + len(part), len(fitting))
    return found
