"""What a stage may see and do: its inputs and models by name, the engine, its seeds, and the artifact it writes."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from selfimprove import recipe
from selfimprove.chat import Chat
from selfimprove.columns import batched
from selfimprove.engine.protocol import Request, Sampling
from selfimprove.execution import Executor, Lost, Work, ask
from selfimprove.judges import Opinion
from selfimprove.judges.panel import Models, score
from selfimprove.records import Generation, Message, Verdict
from selfimprove.store import Artifact, model_identity, read_rows, row_seed
from selfimprove.training.job import Job, PairRow, Weights

TOKENIZED = 256  # prompts, or answers to so many, at a time
LOSSES = "losses-00000.parquet"
MEASURED = frozenset({"tokens_per_second", "peak_memory_mib"})  # they differ from run to run


class Ask(NamedTuple):
    """A user turn to be answered."""

    prompt_id: str
    text: str
    sample: int = 0  # number of the first completion
    given: Sequence[int] = ()  # token ids that the answer begins with
    earlier: Sequence[Message] = ()  # turns of the same dialogue before it


@dataclass
class StageIO:
    """One stage of one iteration; everything it can see has entered its key."""

    iteration: int
    stage: str
    seed: int
    engine_section: recipe.Engine
    machine: recipe.Machine
    inputs: Mapping[str, Path]
    models: Mapping[str, Path]
    identities: Mapping[str, str]  # of the models, by the same names
    out: Artifact
    scratch: Path  # of this artifact, see run.scratch_of; what a killed process left there is found again
    cache: Path  # reference log-probs of the run, by content
    executor: Executor
    policy: Path  # the run's first; its engine takes the weights of all others
    logs: Path
    servers: Mapping[str, recipe.Server]
    progress: Callable[[str, int, int], None]  # what, done, total
    arrived: Callable[[Generation], None] = lambda row: None  # told of each answer that is written

    @cached_property
    def chat(self) -> Chat:
        """The chat template and tokenizer of the run; every policy of a run shares them."""
        return Chat(next(iter(self.models.values())))

    def row_seed(self, row: str) -> int:
        """The seed of one row of this stage."""
        return row_seed(self.seed, self.iteration, self.stage, row)

    def complete(
        self, what: str, model: Path, asks: Iterable[Ask], n: int, sampling: recipe.Sampling, source: str
    ) -> Iterator[Generation]:
        """`n` completions of each ask by `model`, as they come, in the order of the asks.

        An ask that is too long for the context, or ends the engine, is quarantined, n rows of it.
        """
        policy = self._identity(model)
        total = len(asks) if isinstance(asks, Sized) else 0
        waiting: deque[tuple[Ask, Request]] = deque()
        answers = ask(
            self.executor,
            self.scratch / "shards",
            self._work("complete", model, self._sampling(sampling)),
            self._requests(asks, n, sampling.max_tokens, source, waiting),
            lambda done: self.progress(what, done, max(total, done)),
        )
        for some in batched(answers, TOKENIZED):
            written = [found.token_ids for answer in some if not isinstance(answer, Lost) for found in answer]
            texts = iter(self.chat.texts(written))
            for answer in some:
                asked, request = waiting.popleft()
                if isinstance(answer, Lost):
                    self._leave_out(asked, n, source, answer.reason)
                    continue
                for k, completion in enumerate(answer):
                    self.out.tokens += len(completion.token_ids)
                    yield Generation(
                        prompt_id=asked.prompt_id,
                        prompt=asked.text,
                        source=source,
                        sample=asked.sample + k,
                        text=next(texts),
                        prompt_token_ids=request.prompt_token_ids,
                        token_ids=completion.token_ids,
                        logprobs=completion.logprobs,
                        finish_reason=completion.finish_reason,
                        policy=policy,
                        seed=request.seed + k,
                    )

    def _requests(
        self, asks: Iterable[Ask], n: int, max_tokens: int, source: str, waiting: deque[tuple[Ask, Request]]
    ) -> Iterator[Request]:
        """What an engine is asked; `waiting` says for whom."""
        room = self.engine_section.max_model_len - max_tokens
        for some in batched(asks, TOKENIZED):
            prompts = self.chat.prompt_ids_of((one.text, one.earlier) for one in some)
            for one, prompt in zip(some, prompts, strict=True):
                ids = [*prompt, *one.given]
                if len(ids) > room:
                    too_long = f"{len(ids)} tokens, room for {room}"
                    self._leave_out(one, n, source, "prompt too long for the context", too_long)
                    continue
                request = Request(ids, n, self.row_seed(f"{source}/{one.prompt_id}/{one.sample}"))
                waiting.append((one, request))
                yield request

    def _leave_out(self, one: Ask, n: int, source: str, reason: str, detail: str = "") -> None:
        for k in range(n):
            self.out.quarantine(f"{one.prompt_id}/{source}/{one.sample + k}", reason, detail)

    def _sampling(self, sampling: recipe.Sampling) -> Sampling:
        return Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self.chat.stop_token_ids,
            stop=sampling.stop,
        )

    def _work(self, task: Literal["complete", "score"], model: Path, sampling: Sampling | None = None) -> Work:
        return Work(
            task=task,
            model=str(model),
            identity=self._identity(model),
            engine=self.engine_section.model_dump(mode="json"),
            policy=str(self.policy),
            logs=str(self.logs),
            sampling=sampling,
        )

    @cached_property
    def judging(self) -> Models:
        """The models that judges may ask."""
        opinions = {}
        if "opinions" in self.inputs:
            rows = read_rows(self.inputs["opinions"], "verdicts", Verdict)
            opinions = {(v.prompt_id, v.source, v.sample): Opinion(v.score, v.reason) for v in rows}
        return Models(
            seed=self.row_seed,
            engine_section=self.engine_section,
            servers=self.servers,
            paths=self.models,
            identities=self.identities,
            executor=self.executor,
            policy=self.policy,
            logs=self.logs,
            scratch=self.scratch,
            cache=self.cache,
            account=f"iter-{self.iteration:03d}/{self.out.directory.name}",  # whatever key it has: money is money
            progress=self.progress,
            opinions=opinions,
        )

    def note_judging(self) -> None:
        """Put what judges have cost so far into the manifest."""
        self.out.tokens += self.judging.tokens
        if self.judging.spent:
            self.out.metrics["servers"] = {name: asdict(spent) for name, spent in self.judging.spent.items()}
        if self.judging.cut:
            self.out.metrics["comparisons of cut answers"] = self.judging.cut

    def score(self, model: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float] | None]:
        """Log-probability under `model` of each token of an answer; see judges.panel.score."""
        work = self._work("score", model)
        return score(
            lambda sequences: ask(self.executor, self.scratch / "shards", work, sequences),
            rows,
            self.engine_section.max_model_len,
        )

    def _identity(self, model: Path) -> str:
        known = {path: self.identities[name] for name, path in self.models.items()}
        return known.get(model) or model_identity(model)  # a model trained within the stage is in no key

    def admit(
        self,
        rows: Sequence[PairRow],
        optimizer: recipe.Optimizer,
        dropped: Callable[[str, str], None] = lambda row_id, reason: None,
        preferences: bool = True,
    ) -> list[PairRow]:
        """The rows that `train` would train on; see training.rows."""
        from selfimprove.training.rows import admit

        bos = self.chat.tokenizer.bos_token_id
        return admit(rows, optimizer, self.chat.stop_token_ids, bos, dropped, preferences)

    def train(
        self,
        what: str,
        rows: Sequence[PairRow],
        start: str,
        out: str,
        optimizer: recipe.Optimizer,
        preference: recipe.Train | None = None,
        *,
        quarantine: bool = True,
        trial: bool = False,
    ) -> Path:
        """Train the model called `start` on the rows and write `out`/ and its metrics; returns where.

        Rows that cannot be trained on are counted by reason, and quarantined where they are what the stage accounts
        for. The engine gives the device's memory back before. A trial is looked at and thrown away: it is made in
        `scratch`, its metrics too, and says nothing in the manifest; all trials of a stage draw the same batches.
        """
        from selfimprove.training import launch

        reasons: Counter[str] = Counter()

        def dropped(row_id: str, reason: str) -> None:
            reasons[reason] += 1
            if quarantine and not trial:
                self.out.quarantine(row_id, reason)

        kept = self.admit(rows, optimizer, dropped, preference is not None)
        folder = self.scratch / out if trial else self.out.partial
        metrics = "metrics.jsonl" if out == "policy" else f"{out}-metrics.jsonl"
        self.free_device()
        job = Job(
            rows=kept,
            start=self._weights(start),
            out=folder / out,
            metrics=folder / metrics,
            scratch=self.scratch / out,
            cache=self.cache,
            optimizer=optimizer,
            machine=self.machine,
            seed=self.row_seed("trial" if trial else out),
            progress=lambda done, total: self.progress(what, done, total),
            preference=preference,
            references={name: self._weights(name) for name in self.models if name != "start"},
            name=f"{self.iteration}-{self.stage}-{out}",
            losses=folder / LOSSES if out == "policy" and preference and not trial else None,
        )
        last = launch.train(job)
        passes = optimizer.epochs
        tokens = passes * sum(len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in kept)
        self.out.tokens += tokens
        if trial:
            return job.out
        self.out.metrics |= {f"{out} rows": len(kept), f"{out} rows dropped": dict(reasons), f"{out} tokens": tokens}
        if preference is None:
            self.out.metrics[f"{out} loss"] = last["loss"]
        else:
            self.out.metrics |= {name: value for name, value in last.items() if name not in MEASURED}
        return job.out

    def free_device(self) -> None:
        """Let the engines give the device's memory back, and wait until they have; their processes keep a little."""
        from selfimprove.engine import device_memory

        self.executor.sleep(self._work("complete", self.policy))
        device_memory.settle(self.machine.gpu_memory_utilization - device_memory.SLEEPERS)

    def _weights(self, name: str) -> Weights:
        return Weights(self.models[name], self.identities[name])
