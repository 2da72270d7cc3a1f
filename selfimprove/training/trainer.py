"""The training loop: load, check, optimiser steps, checkpoints, a plain model directory at the end."""

import itertools
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from selfimprove import interrupts, recipe
from selfimprove.engine.checkpoints import SAFE
from selfimprove.errors import UserError
from selfimprove.training import adapters, checkpoint, distributed, export, heap, losses, references, sharded, weights
from selfimprove.training.distributed import World
from selfimprove.training.job import Job, PairRow, Weights
from selfimprove.training.learner import Learner
from selfimprove.training.logps import Mode, Scorer, choose_mode
from selfimprove.training.losses import Bound
from selfimprove.training.packing import size, trees_of
from selfimprove.training.pair_losses import ByPair, PairLosses, cut, flushed
from selfimprove.training.player import Player
from selfimprove.training.references import Cached, Live, Reference
from selfimprove.training.trackers import open_trackers

STOP = "stop"  # a file in the scratch folder of a training in several processes
SAMPLE = 3  # trees of the run's rows on which the packed forward is compared with the plain one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fit(job: Job, world: World) -> dict[str, float]:
    """Train as one of the processes of `world`; returns the last step's metrics.

    Raises:
        KeyboardInterrupt: the user asked to stop; the next call goes on at this very step.
        TrainingFailed: loss or gradient not finite; names the pairs of the step.
        UserError: memory ran out, and which knob makes it last.
    """
    torch.manual_seed(job.seed)
    if job.machine.threads is not None:
        torch.set_num_threads(job.machine.threads)
    with heap.kept(world.device):
        return _fit(job, world)


def _fit(job: Job, world: World) -> dict[str, float]:
    policy, module = _policy(job, world)
    mode = _mode(job, policy, world)
    distributed.reshard(module)
    shown: dict[str, float] = {}
    resumed = checkpoint.latest(job.scratch, world)
    at = checkpoint.read_progress(resumed) if resumed else {"chunk": 0, "steps_done": 0}
    log = _Log(job, world, at.get("lines", 0), mode)
    chunks = _chunks(job, mode, world)
    tokens = 0
    try:
        for number, rows in enumerate(chunks):
            if number < at["chunk"]:
                continue
            batches = list(_batches(rows, job.optimizer, f"{job.seed}/{number}"))
            learner = _learner(job, policy, module, rows, number, len(batches), resumed is not None, world)
            learner.tokens_done = tokens
            if resumed:
                checkpoint.load(resumed, learner)
                resumed = None
            elif number == 0:
                _probe(learner, batches)
            else:  # the chunk's reference is the policy as it is now
                checkpoint.save(job.scratch, learner, log.at(number))
            for step, batch in enumerate(batches[learner.steps_done :], learner.steps_done + 1):
                shown = _step(learner, batch, first=step == 1)
                log.write(shown | {"epoch": step * job.optimizer.epochs / len(batches)}, batch, learner.by_pair)
                stop = step < len(batches) and _asked_to_stop(job, world)
                if (step % job.machine.checkpoint_steps == 0 or stop) and step < len(batches):
                    checkpoint.save(job.scratch, learner, log.at(number))
                log.progress(sum(len(c) for c in chunks[:number]), step, batches)
                if stop:
                    raise KeyboardInterrupt
            tokens = learner.tokens_done
        log.publish()
    finally:
        log.close()
    _save(job, policy, world)
    return shown | {"packed": float(mode == "packed"), "chunks": float(len(chunks))}


def _asked_to_stop(job: Job, world: World) -> bool:
    """Whether to stop after this step; several processes hear of it through a file, and all of the same one."""
    if world.size == 1:
        return interrupts.asked()
    found = torch.tensor(float(world.first and (job.scratch / STOP).exists()), device=world.device)
    return bool(distributed.sum_(found, world).item())


def _policy(job: Job, world: World) -> tuple[Scorer, torch.nn.Module]:
    """The policy, and the same as the processes run it."""
    adapter = job.optimizer.adapter
    attach = partial(adapters.attach, adapter=adapter) if adapter else None
    model = _model(job.start.path, job, world, attach)
    without_dropout(model)
    if job.machine.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()  # else adapters alone leave nothing to differentiate at the first layer
    scorer = _scorer(model, job)
    return scorer, _wrapped(scorer, job.start.path, job, world)


def _frozen(directory: Path, job: Job, mode: Mode, world: World) -> tuple[Scorer, torch.nn.Module]:
    """A reference: the same forward as the policy's, no gradient, cut like the policy."""
    scorer = _scorer(_model(directory, job, world).eval().requires_grad_(False), job)
    scorer.use(mode)
    return scorer, _wrapped(scorer, directory, job, world) if _cut(job, world) else scorer


def _cut(job: Job, world: World) -> bool:
    return job.machine.sharding == "fsdp" and world.size > 1


def _quantized(job: Job) -> bool:
    return job.optimizer.adapter is not None and job.optimizer.adapter.quantize is not None


def _model(directory: Path, job: Job, world: World, attach: Callable[[Any], Any] | None = None) -> Any:
    """A model in the numbers that policy and references share, else they would differ at the first step."""
    if _cut(job, world):  # its weights are read once it is cut
        model = sharded.skeleton(directory)
        if attach:
            sharded.adapted(model, attach)
        return model
    model = adapters.load_quantized(directory) if _quantized(job) else _load(directory, world)
    return attach(model) if attach else model


def _load(directory: Path, world: World) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **SAFE)
    return model.to(world.device)


def _scorer(model: Any, job: Job) -> Scorer:
    return Scorer(model, job.machine.logits_mib << 20, DTYPES[job.optimizer.dtype])


def _wrapped(scorer: Scorer, directory: Path, job: Job, world: World) -> torch.nn.Module:
    module = distributed.wrap(scorer, sharded.layers(scorer.body), job.machine.sharding, world, scorer.dtype)
    if _cut(job, world):
        sharded.load(module, scorer.model, directory, world)
    return module


def without_dropout(model: Any) -> None:
    """Training mode, which gradient checkpointing needs, without what makes policy and reference differ at step 0.

    Besides modules, models call functional dropout, skip layers or disturb a router by a number of their own.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def _mode(job: Job, policy: Scorer, world: World) -> Mode:
    """The forward for this model, tried out on the longest tree and some others of the run's own rows."""
    trees = trees_of(job.rows).trees
    longest = max(trees, key=size)
    sample = [longest, *random.Random(job.seed).sample(trees, min(SAMPLE - 1, len(trees)))]
    with _OutOfMemory(job.machine.train_tokens):
        tried = choose_mode(policy, sample)
    if tried.why and world.first:
        warnings.warn(f"packed trees are wrong for this model ({tried.why}): training pads rows instead", stacklevel=2)
    return tried.mode


def _learner(
    job: Job,
    policy: Scorer,
    module: torch.nn.Module,
    rows: list[PairRow],
    chunk: int,
    steps: int,
    resumed: bool,
    world: World,
) -> Learner:
    section = job.preference
    known: list[Reference] = []
    player, margin = None, 0.0
    if section is None:
        bound = Bound(losses.sft, 1.0, 0, False, frozenset(), None)
    else:
        bound = losses.of(section, job.seed)
        unknown = sum(row.win_rates is None for row in rows) if bound.needs & {"win_rates", "win_probabilities"} else 0
        if unknown:
            raise UserError(
                f"{unknown} of {len(rows)} pairs have no scores, and this loss needs them",
                "a judge that scores the current policy's answers (label.judge), or another loss",
            )
        for name in section.references:
            known.append(_reference(job, section, name, policy, module, rows, chunk, resumed, world))
        if section.noise and section.noise.kind == "constant_margin":
            margin = section.noise.margin
        elif section.noise:
            scorer, beside = _frozen(job.references[section.references[0]].path, job, policy.mode, world)
            player = Player(section.noise, scorer, beside, job.optimizer.learning_rate, job.seed, world)
    learner = Learner(policy, module, bound, job.optimizer, steps, job.machine, world, known, player, margin)
    if section:
        identities = {job.references.get(name, job.start).identity for name in section.references}
        learner.begins_at_reference = chunk > 0 or identities == {job.start.identity}
    return learner


def _reference(
    job: Job,
    section: recipe.Train,
    name: str,
    policy: Scorer,
    module: torch.nn.Module,
    rows: list[PairRow],
    chunk: int,
    resumed: bool,
    world: World,
) -> Reference:
    trees = list(trees_of(rows).trees)
    if "mismatched" in losses.of(section).needs:
        trees += [tree for batch in _batches(rows, job.optimizer, f"{job.seed}/{chunk}") for tree in _foreign(batch)]
    if chunk > 0:  # sDPO: the policy at the start of the chunk, which a resumed run has no more
        store = references.Store(job.scratch / f"reference-{chunk}")
        if resumed and references.missing(trees, store.read()):
            raise UserError(
                f"reference log-probs in {job.scratch / f'reference-{chunk}'} are damaged or gone, and their policy has"
                " moved on since",
                f"remove {job.scratch}: this training then begins again",
            )
        return references.cached(policy, module, trees, job.machine.train_tokens, world, store)
    if name == "ema" or section.reference_sync:
        source = job.start if name == "ema" else job.references[name]
        _, live = _frozen(source.path, job, policy.mode, world)
        if name == "ema":
            return Live(live, "ema", section.ema_decay or 0.0)
        sync = section.reference_sync
        assert sync is not None
        return Live(live, "sync", sync.alpha, sync.steps)
    return _cached(job, job.references[name], trees, policy.mode, world)


def _cached(job: Job, source: Weights, trees: list[Any], mode: Mode, world: World) -> Cached:
    numbers = job.optimizer.dtype + ("/nf4" if _quantized(job) else "")
    store = references.place(job.cache, source.identity, numbers, mode)
    known = store.read()
    if not references.missing(trees, known):
        return references.cached_from(known)
    scorer, beside = _frozen(source.path, job, mode, world)
    return references.cached(scorer, beside, trees, job.machine.train_tokens, world, store)


def _foreign(batch: list[PairRow]) -> list[Any]:
    from selfimprove.training.learner import lay_out

    laid = lay_out(batch, mismatched=True)
    return [tree for tree, first in zip(laid.trees, laid.first, strict=True) if first in laid.mismatched]


def _chunks(job: Job, mode: Mode, world: World) -> list[list[PairRow]]:
    """The rows in sDPO's chunks; one chunk where the recipe has none."""
    section = job.preference
    if section is None or section.chunks is None:
        return [job.rows]
    if section.chunks.by == "source":
        return _source_chunks(job, section.chunks, mode, world)
    rows = list(job.rows)
    if len(rows) < section.chunks.number:
        raise UserError(f"{len(rows)} pairs cannot make {section.chunks.number} chunks", "lower train.chunks.number")
    if section.chunks.order == "random":
        random.Random(f"{job.seed}/chunks").shuffle(rows)
    elif section.chunks.order == "easy_to_hard":
        ease = _eases(job, rows, mode, world)
        rows = [rows[i] for i in sorted(range(len(rows)), key=lambda i: -ease[i])]
    cuts = [round(k * len(rows) / section.chunks.number) for k in range(section.chunks.number + 1)]
    return [rows[a:b] for a, b in pairwise(cuts)]


def _source_chunks(job: Job, section: recipe.Chunks, mode: Mode, world: World) -> list[list[PairRow]]:
    """Each data source whole in one chunk, the easy sources first: by the reward accuracy of the initial model.

    A policy has no implicit reward against itself, so "accuracy" is how often the initial model gives the chosen
    answer more log-prob per token than the rejected one (sDPO does not say which reward it measures).
    """
    sources: dict[str, list[PairRow]] = {}
    for row in job.rows:
        sources.setdefault(row.source, []).append(row)
    if len(sources) < 2:
        raise UserError(
            "chunks by source need pairs of two data sources or more, and all are of one",
            "name the 'source' of each row of data.seeds or data.pairs, or set train.chunks.by = \"pair\"",
        )
    names = list(sources)
    if section.order == "random":
        random.Random(f"{job.seed}/chunks").shuffle(names)
    elif section.order == "easy_to_hard":
        accuracy = {
            name: sum(ease > 0 for ease in _eases(job, rows, mode, world)) / len(rows) for name, rows in sources.items()
        }
        names.sort(key=lambda name: -accuracy[name])
    parts = contiguous([len(sources[name]) for name in names], section.number)
    return [[row for name in names[part.start : part.stop] for row in sources[name]] for part in parts]


def contiguous(sizes: Sequence[int], number: int) -> list[range]:
    """Cut a sequence into at most `number` runs of about equal sums, none of them empty."""
    number = min(number, len(sizes))
    ends = [0, *itertools.accumulate(sizes)]
    cuts = [0]
    for k in range(1, number):
        possible = range(cuts[-1] + 1, len(sizes) - (number - k) + 1)
        cuts.append(min(possible, key=lambda i: abs(ends[i] - k * ends[-1] / number)))
    return [range(a, b) for a, b in pairwise([*cuts, len(sizes)])]


def _eases(job: Job, rows: list[PairRow], mode: Mode, world: World) -> list[float]:
    """By how many nats a token the initial model prefers each pair's chosen answer."""
    under = _cached(job, job.references["initial"], list(trees_of(rows).trees), mode, world)

    def mean(prompt: list[int], answer: list[int]) -> float:
        return under.sum(prompt, answer) / max(1, len(answer))

    return [mean(row.prompt_ids, row.chosen_ids) - mean(row.prompt_ids, row.rejected_ids) for row in rows]


def _batches(rows: Sequence[PairRow], settings: recipe.Optimizer, seed: str) -> Iterator[list[PairRow]]:
    """Rows in another order each epoch; those of one prompt stay neighbours, so that a step encodes it once."""
    groups: dict[tuple[int, ...], list[PairRow]] = {}
    for row in rows:
        groups.setdefault(tuple(row.prompt_ids), []).append(row)
    for epoch in range(settings.epochs):
        order = list(groups.values())
        random.Random(f"{seed}/{epoch}").shuffle(order)
        flat = [row for group in order for row in group]
        yield from (flat[i : i + settings.batch_size] for i in range(0, len(flat), settings.batch_size))


def _probe(learner: Learner, batches: list[list[PairRow]]) -> None:
    """The largest micro-batch of the whole training first: memory that will not last runs out in the first minute."""
    with _memory(learner):
        learner.probe(max(batches, key=learner.load))


def _step(learner: Learner, batch: list[PairRow], *, first: bool) -> dict[str, float]:
    with _memory(learner):
        return learner.step(batch, first=first)


def _memory(learner: Learner) -> Any:
    return nullcontext() if learner.world.device.type == "cpu" else _OutOfMemory(learner.machine.train_tokens)


class _OutOfMemory:
    """Says which knob makes the memory last."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                f"the device's memory does not hold a micro-batch of {self.tokens} tokens",
                f"machine.train_tokens = {self.tokens // 2}, or machine.gradient_checkpointing = true",
            ) from None


class _Log:
    """metrics.jsonl, the pairs' losses, the trackers, the progress bar; the first process's only."""

    def __init__(self, job: Job, world: World, lines: int, mode: Mode) -> None:
        self.job, self.first, self.lines, self.mode = job, world.first, lines, mode
        self.path = job.scratch / "metrics.jsonl"
        self.processes = distributed.sum_(torch.ones((), device=world.device), world).item()  # that really answered
        self._trackers: list[Any] = []
        self._losses: PairLosses | None = None
        if self.first:
            cut(self.path, lines)
            if job.losses:
                self._losses = PairLosses(job.scratch / "losses.jsonl", job.losses, lines)
            settings = {"optimizer": job.optimizer.model_dump(), "seed": job.seed}
            self._trackers = open_trackers(job.machine.trackers, job.cache.parent / "trackers", job.name, settings)

    def write(self, metrics: dict[str, float], pairs: Sequence[PairRow], by_pair: ByPair) -> None:
        """One optimiser step."""
        self.lines += 1
        if self.first:
            if self._losses:
                self._losses.write(self.lines, metrics["epoch"], pairs, by_pair)
            about = {
                "packed": float(self.mode == "packed"),
                "processes": self.processes,
                "peak_memory_mib": _peak_mib(),
            }
            line = {"step": self.lines, **metrics, **about}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for tracker in self._trackers:
                tracker.log(self.lines, line)

    def at(self, chunk: int) -> dict[str, int]:
        """What a checkpoint says of the lines that it goes with, which are on the disk then."""
        for path in [self.path, *([self._losses.path] if self._losses else [])] if self.first else []:
            if path.exists():
                flushed(path)
        return {"chunk": chunk, "lines": self.lines}

    def publish(self) -> None:
        """Leave the pairs' losses where the artifact wants them."""
        if self._losses:
            self._losses.publish()

    def progress(self, before: int, step: int, batches: list[list[PairRow]]) -> None:
        """Steps done, of all chunks."""
        if self.first:
            size = self.job.optimizer.batch_size
            total = max(len(batches), -(-len(self.job.rows) * self.job.optimizer.epochs // size))
            self.job.progress(min(total, before * self.job.optimizer.epochs // size + step), total)

    def close(self) -> None:
        """Leave metrics.jsonl where the artifact wants it."""
        for tracker in self._trackers:
            tracker.close()
        if self.first and self.path.exists():
            shutil.copyfile(self.path, self.job.metrics)


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _save(job: Job, policy: Scorer, world: World) -> None:
    """A plain model directory: our weights, everything else as it was where we started, and the canary."""
    adapter = job.optimizer.adapter
    if adapter:
        trained = {n.removeprefix("model."): distributed.whole(t) for n, t in adapters.state(policy).items()}
        if world.first:
            if _cut(job, world):  # one device does not hold the merged model
                trained = {name: tensor.cpu() for name, tensor in trained.items()}
            rows = [row.prompt_ids + row.chosen_ids for row in job.rows[:SAMPLE]]
            _write(job, adapters.merge(trained, adapter, job.start.path, rows))
    elif _cut(job, world):
        whole = sharded.whole(policy.model, job.start.path, world)
        if whole is not None:
            _write(job, whole)
    elif world.first:
        policy.use("padded")
        _write(job, policy.model)
    distributed.barrier(world)


def _write(job: Job, model: Any) -> None:
    if job.preference and job.preference.extrapolate:
        start = weights.parameters(_load(job.start.path, World(0, 1, model.device)))
        weights.extrapolate_(weights.parameters(model), start, job.preference.extrapolate)
    export.save(model, job.out, job.start.path)
