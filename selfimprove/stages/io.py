"""What a stage may see and do: its inputs and models by name, the engine, its seeds, and the artifact it writes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import recipe
from selfimprove.chat import Chat
from selfimprove.engine.protocol import Engine, Request, Sampling, Task
from selfimprove.judges import Opinion
from selfimprove.judges.panel import Models, remembered, score
from selfimprove.records import Generation, Message, Verdict
from selfimprove.store import Artifact, model_identity, read_rows, row_seed
from selfimprove.training.job import Job, PairRow, Weights

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
    scratch: Path  # of this very artifact; what a killed process left there is this artifact's and no other's
    cache: Path  # reference log-probs of the run, by content
    open_engine: Callable[[], Engine]
    open_other: Callable[[Path, Task], Any]  # an engine of another model's own
    servers: Mapping[str, recipe.Server]
    progress: Callable[[str, int, int], None]  # what, done, total

    @cached_property
    def chat(self) -> Chat:
        """The chat template and tokenizer of the run; every policy of a run shares them."""
        return Chat(next(iter(self.models.values())))

    def row_seed(self, row: str) -> int:
        """The seed of one row of this stage."""
        return row_seed(self.seed, self.iteration, self.stage, row)

    def complete(
        self, what: str, model: Path, asks: Iterable[Ask], n: int, sampling: recipe.Sampling, source: str
    ) -> list[Generation]:
        """`n` completions of each ask by `model`; an ask too long for the context is quarantined, n rows of it."""
        room = self.engine_section.max_model_len - sampling.max_tokens
        asked, requests = [], []
        for ask in asks:
            ids = [*self.chat.prompt_ids(ask.text, ask.earlier), *ask.given]
            if len(ids) > room:
                for k in range(n):
                    row = f"{ask.prompt_id}/{source}/{ask.sample + k}"
                    self.out.quarantine(row, "prompt too long for the context", f"{len(ids)} tokens, room for {room}")
                continue
            seed = self.row_seed(f"{source}/{ask.prompt_id}/{ask.sample}")
            asked.append(ask)
            requests.append(Request(ids, n, seed))
        parameters = Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self.chat.stop_token_ids,
            stop=sampling.stop,
        )
        policy = self._identity(model)
        answers = remembered(
            self.judging.journal,
            lambda: self._serving(model),
            f"{policy}/{self.engine_section.model_dump_json()}",
            requests,
            parameters,
            lambda done, total: self.progress(what, done, total),
        )
        rows = [
            Generation(
                prompt_id=ask.prompt_id,
                prompt=ask.text,
                source=source,
                sample=ask.sample + k,
                text=self.chat.text(completion.token_ids),
                prompt_token_ids=request.prompt_token_ids,
                token_ids=completion.token_ids,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                policy=policy,
                seed=request.seed + k,
            )
            for ask, request, completions in zip(asked, requests, answers, strict=True)
            for k, completion in enumerate(completions)
        ]
        self.out.tokens += sum(len(row.token_ids) for row in rows)
        return rows

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
            open_engine=self.open_engine,
            open_other=self.open_other,
            scratch=self.scratch,
            cache=self.cache,
            account=self.scratch.name,
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
        return score(
            self.judging.journal,
            lambda: self._serving(model),
            f"{self._identity(model)}/{self.engine_section.model_dump_json()}",
            rows,
            self.engine_section.max_model_len,
        )

    def _serving(self, model: Path) -> Engine:
        engine = self.open_engine()
        engine.swap(model)
        return engine

    def _identity(self, model: Path) -> str:
        known = {path: self.identities[name] for name, path in self.models.items()}
        return known.get(model) or model_identity(model)  # a model trained within the stage is in no key

    def admit(
        self,
        rows: Sequence[PairRow],
        optimizer: recipe.Optimizer,
        dropped: Callable[[str, str], None] = lambda row_id, reason: None,
    ) -> list[PairRow]:
        """The rows that `train` would train on; see training.rows."""
        from selfimprove.training.rows import admit

        return admit(rows, optimizer, self.chat.stop_token_ids, self.chat.tokenizer.bos_token_id, dropped)

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

        kept = self.admit(rows, optimizer, dropped)
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
        """Let the engine give the device's memory back, and wait until it has; its process keeps a little."""
        from selfimprove.engine import device_memory

        self.open_engine().sleep()
        device_memory.settle(self.machine.gpu_memory_utilization - device_memory.SLEEPERS)

    def _weights(self, name: str) -> Weights:
        return Weights(self.models[name], self.identities[name])
