"""What a stage takes at most, computed from the recipe, the model and the files, before anything was measured."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from selfimprove import columns
from selfimprove.errors import UserError
from selfimprove.plan import INITIAL, Sources, Step
from selfimprove.recipe import Optimizer, Recipe
from selfimprove.stages import control, discriminate, evaluate, gate, generate, improve, label, sft, synthesize, train

FLOAT = 4  # bytes: weights and moments of a training stay float32, and so do the weights that it writes
MOMENTS = 2  # AdamW's, per weight
ROW, TOKEN = 1024, 24  # bytes of a row's names and texts, and of a token: id, log-prob, text


class Bound(NamedTuple):
    """The most that a stage takes; None = cannot be told without measuring."""

    tokens: int | None
    disk_bytes: int | None
    memory_bytes: int | None
    usd: float | None
    how: str
    passing_bytes: int = 0


class Model(NamedTuple):
    """What is known of a model's size without loading it."""

    parameters: int
    low_rank: int  # weights of an adapter of rank 1 on every matrix

    @classmethod
    def of(cls, sources: Sources) -> "Model | None":
        """The model that a run starts from; None where it is not there."""
        try:
            directory = sources.path(INITIAL)
            shapes = [s for file in sorted(directory.glob("*.safetensors")) for s in _shapes(file)]
        except (UserError, OSError, ValueError, struct.error):
            return None
        return cls(sum(math.prod(s) for s in shapes), sum(sum(s) for s in shapes if len(s) == 2))

    @property
    def bytes(self) -> int:
        """Of a model directory that a training writes."""
        return self.parameters * FLOAT

    def trained(self, optimizer: Optimizer) -> int:
        """Weights that a training moves."""
        return self.low_rank * optimizer.adapter.rank if optimizer.adapter else self.parameters

    def checkpoints(self, optimizer: Optimizer, rows: float, every: int) -> int:
        """Bytes of a training's checkpoints at their most: the last is kept until the next is there.

        Args:
            optimizer: epochs and batch size say how many steps there are.
            rows: trained on in an epoch.
            every: steps between two.
        """
        kept = min(2, int(rows * optimizer.epochs / optimizer.batch_size) // every)
        return kept * self.trained(optimizer) * FLOAT * (1 + MOMENTS)


def _shapes(file: Path) -> list[list[int]]:
    """The shapes of the tensors, from the header of a safetensors file."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(min(length, 100_000_000)))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]


def optimizer_of(step: Step) -> Optimizer | None:
    """What a step trains with; None where it trains nothing."""
    if step.stage is synthesize and synthesize.GENERATOR in step.models:
        return None  # it is trained in the first round
    for name in ("optimizer", "generator", "improver"):
        found = getattr(step.section, name, None)
        if isinstance(found, Optimizer):
            return found
    return None


def memory(step: Step, recipe: Recipe, model: Model | None) -> int | None:
    """Bytes of weights, gradients and moments in a training, or of weights and cache in the engine."""
    if model is None or step.stage in (gate, label):
        return None
    optimizer = optimizer_of(step)
    if optimizer is None:
        per_weight = 2 if recipe.engine.dtype == "bfloat16" else 4
        cache = recipe.machine.kv_cache_gib * 2**30 if recipe.engine.kind == "vllm" else 0
        return None if recipe.engine.kind == "fake" else model.parameters * per_weight + cache
    frozen = model.bytes // (8 if optimizer.adapter and optimizer.adapter.quantize else 1)
    references = len(getattr(step.section, "references", ()))
    moved = model.trained(optimizer) * FLOAT * (1 + MOMENTS)  # gradients and moments
    return frozen * (1 + references) + moved + recipe.machine.logits_mib * 2**20


class Rules:
    """Upper bounds for the steps of a run; an amount is what comes out of a step: prompts, completions, pairs."""

    def __init__(self, recipe: Recipe, sources: Sources, model: Model | None) -> None:
        self.recipe, self.model = recipe, model
        self.sources = sources
        self._rows: dict[str, int] = {}

    def most(self, step: Step, amounts: Mapping[str, float]) -> float:
        """The rows that come out of a step at most; 0 where no other step needs to know.

        Raises:
            UserError: a file of the recipe is gone.
        """
        now = self.recipe.at(step.iteration) if step.iteration else self.recipe
        if step.stage is synthesize and now.synthesize:
            return now.synthesize.prompts
        if step.stage is label and now.generate is None:
            given = self.count("file:pairs")
            return min(given, now.label.quota or given)
        answers = now.generate.n + now.generate.initial_n if now.generate else 0
        if step.stage is generate:
            return self.prompts(step, amounts) * answers
        if step.stage is improve and now.improve:
            return amounts[step.inputs["generations"]] / answers * now.improve.n
        if step.stage is label:
            prompts = amounts[step.inputs["generations"]] / answers
            if now.label.acquire:
                prompts = min(prompts, now.label.acquire.prompts)
            pairs = prompts * _pairs_of_a_prompt(now, answers + (now.improve.n if now.improve else 0))
            again = amounts.get(step.inputs.get("relabelled", ""), 0.0)
            return min(pairs, now.label.quota or pairs) + again
        return 0.0

    def bound(self, step: Step, amounts: Mapping[str, float]) -> Bound:
        """What a step takes at most.

        Raises:
            UserError: a file of the recipe is gone.
        """
        tokens, rows, how = self._tokens(step, amounts)
        optimizer = optimizer_of(step)
        passing, weights = 0, 0
        if optimizer and self.model:
            passing = self.model.checkpoints(optimizer, rows, self.recipe.machine.checkpoint_steps)
            weights = self.model.bytes * (2 if getattr(step.section, "average", None) else 1)
        written = (0 if step.stage in (train, control, sft) else tokens or 0) * TOKEN + int(rows) * ROW
        unknown = optimizer is not None and self.model is None
        disk = None if unknown else written + weights + passing
        return Bound(tokens, disk, memory(step, self.recipe, self.model), self._usd(step), how, passing)

    def _usd(self, step: Step) -> float | None:
        ceilings = [self.recipe.servers[name].ceiling_usd for name in step.servers]
        return None if None in ceilings else sum(one for one in ceilings if one is not None)

    def _tokens(self, step: Step, amounts: Mapping[str, float]) -> tuple[int | None, float, str]:
        """Tokens, rows that are written or trained on, and the rule in words."""
        now = self.recipe.at(step.iteration) if step.iteration else self.recipe
        room = now.engine.max_model_len
        if step.stage is synthesize and now.synthesize:
            prompts, longest = now.synthesize.prompts, now.synthesize.sampling.max_tokens
            return (
                prompts * longest + self.training_tokens(step),
                prompts,
                f"at most {prompts} prompts x {longest} tokens",
            )
        if step.stage is generate and now.generate:
            completions, longest = self.most(step, amounts), now.generate.sampling.max_tokens
            return int(completions * longest), completions, f"at most {completions:.0f} answers x {longest} tokens"
        if step.stage is improve and now.improve:
            rewrites, longest = self.most(step, amounts), now.improve.sampling.max_tokens
            training = self.seeds * longest * now.improve.n + self.training_tokens(step)
            return int(rewrites * longest) + training, rewrites, f"at most {rewrites:.0f} rewrites x {longest} tokens"
        if step.stage is label and now.generate is None:
            return 0, self.most(step, amounts), "asks no model"
        if step.stage is label:
            answers = amounts[step.inputs["generations"]]
            asked = bool(step.samples or step.servers)
            how = f"{answers:.0f} answers, of which the judge's tokens are not known" if asked else "asks no model"
            return None if asked else 0, answers, how
        if step.stage is train:
            pairs = sum(a for name, d in step.inputs.items() if name.startswith("pairs") and (a := amounts.get(d)))
            pairs = now.train.replay.draws if now.train.replay else pairs
            passes = now.train.optimizer.epochs * (1 + (len(now.train.search.betas) if now.train.search else 0))
            longest = min(now.train.optimizer.max_length or room, room)
            how = f"at most {pairs:.0f} pairs x {2 * longest} tokens x {passes} passes"
            return int(pairs * 2 * longest * passes), pairs, how
        if step.stage in (control, sft):
            optimizer = optimizer_of(step)
            epochs = optimizer.epochs if optimizer else 1
            rows = self.seeds * (3 if getattr(step.section, "ratings", False) else 1)
            return rows * room * epochs, rows, f"at most {rows} examples x {room} tokens x {epochs} epochs"
        if step.stage is evaluate:
            return self._evaluation(step)
        if step.stage is discriminate:
            return None, amounts[step.inputs["generations"]], "the judge's tokens are not known"
        return 0, 1, "asks no model"

    def _evaluation(self, step: Step) -> tuple[int | None, float, str]:
        section = self.recipe.evaluate
        prompts = sum(self.count(step.inputs[name]) for name in ("heldout", "selection") if name in step.inputs)
        answers, tokens = prompts * (1 + section.n), prompts * (1 + section.n) * section.max_tokens
        how = f"at most {answers} answers x {section.max_tokens} tokens"
        for benchmark in section.benchmarks or []:
            asked = self.count(f"file:{next(iter(benchmark.files))}")
            asked = min(asked, benchmark.limit or asked)
            answers += asked
            tokens += 2 * asked * (benchmark.max_tokens or section.max_tokens)  # a dialogue has two turns
        judged = any(benchmark.judge and evaluate.models(section) for benchmark in section.benchmarks or [])
        if judged or step.servers:
            return None, answers, f"{how}, and the judges' tokens, which are not known"
        return tokens, answers, how + (" and benchmarks" if section.benchmarks else "")

    def training_tokens(self, step: Step) -> int:
        """Of the tokens of a stage that trains a model of its own to write with, those it is trained on."""
        now = self.recipe.at(step.iteration) if step.iteration else self.recipe
        optimizer = optimizer_of(step) if step.stage in (synthesize, improve) else None
        return self.seeds * now.engine.max_model_len * optimizer.epochs if optimizer else 0

    def prompts(self, step: Step, amounts: Mapping[str, float]) -> float:
        """The prompts that a step answers."""
        return amounts[step.inputs["prompts"]] if "prompts" in step.inputs else self.seeds

    @property
    def seeds(self) -> int:
        """The rows of data.seeds."""
        return self.count("file:seeds")

    def count(self, source: str) -> int:
        """The rows of a file of the recipe: of a Parquet file by its own word, else the lines that are not empty."""
        if source not in self._rows:
            path = self.sources.path(source)
            if path.suffix == ".parquet":
                self._rows[source] = columns.row_number(path)
            else:
                with path.open("rb") as file:
                    self._rows[source] = sum(bool(line.strip()) for line in file)
        return self._rows[source]


def _pairs_of_a_prompt(recipe: Recipe, answers: int) -> int:
    """The most pairs that the pairing rule makes of so many answers to a prompt."""
    given = recipe.label.pairing.model_extra or {}
    every = answers * (answers - 1) // 2
    match recipe.label.pairing.name:
        case "all_pairs":
            return every
        case "top_k":
            return min(every, int(given.get("k", 2)) * answers)
        case "gold_vs_generated" | "dynamic":
            return answers
        case _:
            return int(given.get("max_pairs", 1))
