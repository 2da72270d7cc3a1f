"""Every knob on one page: a recipe is one TOML file = one experiment, checked strictly before anything runs.

A recipe lists its stages and has one section per stage. Sections say WHAT to make and enter the keys of the
artifacts; `[machine]` says HOW (devices, memory) and enters none.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_origin

import pydantic
from pydantic import Field

from selfimprove import masking
from selfimprove.errors import UserError

STAGES = ("synthesize", "generate", "improve", "discriminate", "label", "train", "evaluate", "gate")
PACKAGE = Path(__file__).parent
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=pydantic.BaseModel)


def shipped(folder: str) -> Path:
    """The shipped `pipelines` or `prompts` folder: inside an installed package, beside it in a checkout."""
    installed = PACKAGE / folder
    return installed if installed.is_dir() else PACKAGE.parent / folder


class Section(pydantic.BaseModel):
    """A table of the recipe; an unknown key or a value of the wrong type is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Choice(pydantic.BaseModel):
    """A function chosen by name, with its parameters: `{name = "simpo", beta = 2.0}`, or `"simpo"` alone."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True, frozen=True)
    name: str

    @pydantic.model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    def bind(self, what: str, known: Mapping[str, F]) -> F:
        """The named function of `known` with this choice's parameters bound to its keyword-only arguments.

        Raises:
            UserError: unknown name, unknown or missing parameter, or a value of the wrong type.
        """
        if self.name not in known:
            raise UserError(f"unknown {what} '{self.name}'", f"known: {', '.join(sorted(known))}")
        function = known[self.name]
        signature = inspect.signature(function, eval_str=True)
        fields: dict[str, Any] = {
            p.name: (p.annotation, ... if p.default is p.empty else p.default)
            for p in signature.parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        accepted = ", ".join(fields) or "none"
        parameters: type[Section] = pydantic.create_model(self.name, __base__=Section, **fields)
        try:
            values = parameters.model_validate(self.model_extra or {})
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"{what} '{self.name}': parameter '{'.'.join(map(str, first['loc']))}': {_plain(first)}",
                f"parameters of {self.name}: {accepted}",
            ) from None
        return partial(function, **dict(values))  # type: ignore[return-value]  # same call, fewer arguments


class Model(Section):
    """The model a run starts from: `demo:model`, a local directory, or a hub id such as `org/name`."""

    path: str = "demo:model"  # its tokenizer has a chat template


class Data(Section):
    """Input files; `demo:NAME` is shipped with the package."""

    seeds: str = "demo:seeds"  # prompt, and completion where golds are used; forms in docs/concepts.md; JSON or Parquet
    corpus: str = "demo:corpus"  # plain text, one paragraph a line; keywords are drawn from it
    heldout: str = "demo:heldout"  # the same forms; the answer may be missing; never enters training
    selection: str | None = None  # the same, other prompts: what the gate looks at, so that reports stay untouched
    pairs: str | None = None  # prompt, chosen and rejected, for label.pairing = "given", which needs no seeds


class Sampling(Section):
    """Sampling of completions, under vLLM's names."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(64, ge=1)  # of a completion; one that is cut there is marked as truncated
    stop: list[str] = []  # texts at which a completion ends


class Adapter(Section):
    """LoRA (arXiv 2106.09685), or QLoRA (arXiv 2305.14314) with `quantize`; merged in full precision at the end."""

    rank: int = Field(16, ge=1, le=65536)
    alpha: float = Field(32.0, gt=0)
    target_modules: list[str] | None = Field(None, min_length=1)  # unset = every linear layer but the head
    quantize: Literal["nf4"] | None = None  # of the base weights while training; unset = they stay as they are


class Optimizer(Section):
    """One pass of training with AdamW; schedulers are those of transformers, after a linear warm-up."""

    learning_rate: float = Field(gt=0)
    epochs: int = Field(1, ge=1, le=10_000)
    batch_size: int = Field(32, ge=1, le=10**7)  # pairs or examples per optimiser step, of all processes together
    scheduler: Literal["linear", "cosine", "constant_with_warmup", "inverse_sqrt"] = "linear"
    warmup_ratio: float = Field(0.1, ge=0, le=1)  # of all optimiser steps
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)  # of all gradients together; a longer one is shortened to it
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and moments stay float32
    adapter: Adapter | None = None  # unset = full fine-tuning
    max_length: int | None = Field(None, ge=2)  # tokens of prompt + answer; longer rows are dropped and counted
    max_dropped_share: float = Field(0.01, ge=0, le=1)  # a larger share of dropped rows is an error


class Synthesize(Section):
    """New prompts from keywords, written by a generator trained once from the initial model (SynPO section 3.1)."""

    prompts: int = Field(ge=1)  # keyword lists drawn, and generator samples taken, per iteration
    sampling: Sampling = Sampling(temperature=0.7)
    generator: Optimizer
    noise_keyword: bool = True  # the generator learns on two own keywords and a foreign one; off = three own ones
    max_similarity: float = Field(0.8, gt=0, le=1)  # Jaccard, of word trigrams; from here on a near duplicate
    decontamination_ngram: int = Field(13, ge=1)  # words in a row that a prompt may not share with the held-out ones


class Splice(Section):
    """SAPO's segment-level rejected answer (arXiv 2405.20830): only a segment of the gold is generated anew."""

    segment: int = Field(256, ge=1)  # tokens; what stands before and after it is the gold's


class Generate(Section):
    """Completions of this iteration's prompts."""

    n: int = Field(ge=1)  # completions per prompt by the current policy
    initial_n: int = Field(0, ge=0)  # and by the initial one, where a method compares with it
    policy: Literal["current", "average"] = "current"  # "average" = of the iterations' policies, see train.average
    splice: Splice | None = None  # unset = whole completions
    sampling: Sampling = Sampling()


class Improve(Section):
    """Rewrites of the current policy's answers by an improver trained from the initial model (SynPO section 3.2)."""

    kind: Literal["improver", "gold_distillation"] = "improver"  # the second, a control, never sees the draft
    min_gap: float = 0.0  # keep a seed triple when score(gold) - score(own answer) exceeds this
    n: int = Field(1, ge=1)  # rewrites per prompt, each of another draft
    sampling: Sampling = Sampling(temperature=0.7)
    improver: Optimizer


class Discriminate(Section):
    """D2PO's discriminator (arXiv 2405.01511), in its DPO form: trained on few gold labels, it scores all answers."""

    judge: Choice  # gives the gold labels
    labels: int = Field(ge=1)  # prompts that it judges per iteration
    acquisition: Literal["confidence", "random"] = "confidence"  # the last discriminator's smallest score gap first
    beta: float = Field(0.05, gt=0)  # of its DPO
    optimizer: Optimizer


class Acquire(Section):
    """Active preference learning (arXiv 2402.08114): which prompts are worth a label."""

    by: Literal["entropy", "certainty", "random"]
    prompts: int = Field(ge=1)  # labelled per iteration
    beta: float = Field(0.2, gt=0)  # of the implicit reward that certainty compares


class Audit(Section):
    """What is asked of the judge besides, in every round, to know how far it can be trusted."""

    anchors: int = Field(32, ge=2)  # answers of the first round that every round judges again, and twice
    second: Choice | None = None  # another judge of single answers ...
    sample: int = Field(64, ge=2)  # ... on the answers to this many prompts


class Label(Section):
    """Verdicts, and the rule that turns them into pairs."""

    acquire: Acquire | None = None  # unset = all prompts are labelled
    judge: Choice | None = None  # not for rules that look at no score, as SPIN's
    pairing: Choice  # the rule
    min_margin: float = Field(0.0, ge=0)  # smallest score gap of a pair
    max_length_ratio: float | None = Field(None, gt=0)  # of chosen to rejected, in tokens
    relabel: bool = False  # earlier pairs are scored again, turned where the scores say so, and join this iteration's
    quota: int | None = Field(None, ge=1)  # pairs kept per iteration; of given pairs each iteration takes others
    audit: Audit | None = None  # unset = the judge is not asked again


class Sync(Section):
    """TR-DPO (arXiv 2404.09656): every `steps`, reference <- alpha * policy + (1 - alpha) * reference."""

    alpha: float = Field(0.6, gt=0, le=1)
    steps: int = Field(512, ge=1)


class Chunks(Section):
    """sDPO (arXiv 2403.19270): steps inside one stage, each from and against the policy of the step before."""

    by: Literal["pair", "source"] = "pair"  # "source": the pairs of one data source stay together, as in the paper
    number: int = Field(2, ge=2, le=10_000)
    order: Literal["easy_to_hard", "random", "given"] = "easy_to_hard"  # easy: M_0 prefers the chosen answer clearly


class Noise(Section):
    """DNPO's noise on the reference's logits of the rejected answer (arXiv 2502.05400), or one of its two controls."""

    kind: Literal["trainable", "fixed_sigma", "constant_margin"] = "trainable"  # scale to learning_rate are its own
    scale: float = Field(0.5, gt=0)  # c, sigma where the net says nothing; well below the bound
    alpha: float = Field(1.0, ge=0)  # weight of the mean sigma
    bound: float = Field(4.0, gt=0)  # largest sigma; a mean near it stops the training
    learning_rate: float | None = Field(None, gt=0)  # of the noise net; unset = the policy's
    sigma: float = Field(0.5, ge=0)  # of fixed_sigma
    margin: float = Field(1.0, ge=0)  # of constant_margin, in nats


class Search(Section):
    """SynPO's search for beta, on pairs of prompts kept out of the training until it is chosen."""

    betas: list[float] = Field(min_length=2)  # the one that ranks most kept-out pairs right is taken
    heldout_share: float = Field(0.1, gt=0, lt=1)  # of the prompts


class Replay(Section):
    """SAPO's replay buffer: pairs drawn with weight 1 / (times drawn + 1), out of the last `capacity`."""

    draws: int = Field(ge=1)  # per iteration
    capacity: int = Field(2000, ge=1)


ReferenceName = Literal["initial", "previous", "ema", "path", "average"]


class Train(Section):
    """Preference training of this iteration's policy."""

    loss: Choice | list[Choice]  # a list is a convex mix, each with its `weight`
    reference: ReferenceName | list[ReferenceName] | None = None  # "previous" = the policy the iteration starts with
    reference_path: str | None = None  # of the reference "path": a directory or hub id
    reference_sync: Sync | None = None  # unset = the reference stays
    start: Literal["initial", "previous"] = "previous"  # the policy that is trained: the run's or the last round's
    pairs: Literal["current", "previous_and_current", "all"] = "current"  # of which iterations
    replay: Replay | None = None  # unset = each pair once an epoch
    search: Search | None = None  # unset = the loss's own beta
    ema_decay: float | None = Field(None, gt=0, lt=1)  # of the average that the reference "ema" is
    average: float | None = Field(None, gt=0, lt=1)  # average <- this * average + (1 - this) * policy, each iteration
    chunks: Chunks | None = None  # unset = all pairs in one training
    noise: Noise | None = None  # unset = none
    extrapolate: float | None = Field(None, gt=0)  # ExPO (arXiv 2404.16792): theta + alpha * (theta - start)
    optimizer: Optimizer

    @property
    def references(self) -> tuple[ReferenceName, ...]:
        """The reference policies by name, in order."""
        given = self.reference
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)

    @pydantic.model_validator(mode="after")
    def _settings_have_what_they_need(self) -> Self:
        for wrong, sentence in [
            (
                ("path" in self.references) != (self.reference_path is not None),
                "reference 'path' and reference_path go together",
            ),
            (("ema" in self.references) != (self.ema_decay is not None), "reference 'ema' and ema_decay go together"),
            ("average" in self.references and self.average is None, "reference 'average' needs train.average"),
            (self.replay and self.pairs != "all", "replay draws from the pairs of all iterations: set pairs = 'all'"),
            (self.search and isinstance(self.loss, list), "search needs one loss, not a mix"),
            (self.reference_sync and not self.references, "reference_sync needs a reference"),
            (self.reference_sync and "ema" in self.references, "reference_sync would overwrite the reference 'ema'"),
            (self.chunks and self.references != ("previous",), "chunks need reference = 'previous', as sDPO has it"),
            (self.chunks and self.start != "previous", "chunks need start = 'previous', as sDPO has it"),
            (self.chunks and (self.reference_sync or self.noise), "chunks go with neither reference_sync nor noise"),
            (self.noise and len(self.references) != 1, "noise needs exactly one reference"),
            (self.noise and self.reference_sync, "noise needs a reference that stays; drop reference_sync"),
            (self.noise and "ema" in self.references, "noise needs a reference that stays, 'ema' moves"),
            (len(set(self.references)) != len(self.references), "a reference stands twice"),
        ]:
            if wrong:
                raise ValueError(sentence)
        return self


BenchmarkKind = Literal["gsm8k", "ifeval", "alpaca_eval", "arena_hard", "mt_bench", "prompts", "lm_eval"]


class Benchmark(Section):
    """A published benchmark, or prompts of one's own, answered greedily; see docs/evaluation.md."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")  # enters artifacts
    kind: BenchmarkKind
    path: str  # the prompts, in the benchmark's published format; of lm_eval the task's YAML
    answers: str | None = None  # arena_hard: the baseline's answers; mt_bench: reference answers
    judge: Choice | None = None  # not where the kind checks answers itself
    max_tokens: int | None = Field(None, ge=1)  # of an answer; unset = evaluate.max_tokens
    limit: int | None = Field(None, ge=2)  # the first so many prompts

    @property
    def files(self) -> dict[str, str]:
        """Its files, by the names under which stages see them.

        That of the prompts says of which kind they are, for stages that see no more of a benchmark.
        """
        found = {f"benchmark:{self.kind}:{self.name}": self.path}
        return found | ({f"answers:{self.name}": self.answers} if self.answers else {})


class Evaluate(Section):
    """Held-out accuracy, greedy and sampled; and benchmarks beside it."""

    judge: Choice  # a checker or function that asks no model
    n: int = Field(4, ge=1)  # sampled completions per prompt, besides the greedy one
    temperature: float = Field(1.0, gt=0)  # of the sampled ones
    max_tokens: int = Field(64, ge=1)  # of a completion
    benchmarks: list[Benchmark] | None = Field(None, min_length=1)

    @pydantic.model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [benchmark.name for benchmark in self.benchmarks or []]
        for name in names:
            if names.count(name) > 1 or name in ("greedy", "sampled"):
                raise ValueError(f"benchmarks: the name '{name}' is taken")
        return self


Metric = Literal["greedy", "sampled"]


class Limits(Section):
    """What a healthy round keeps within, beside the best one so far; unset = not looked at."""

    max_truncated_share: float | None = Field(0.1, ge=0, le=1)  # of the sampled held-out answers
    max_length_ratio: float | None = Field(2.0, gt=0)  # mean tokens of them, against the base model's
    min_diversity_ratio: float | None = Field(0.5, gt=0, le=1)  # distinct word bigrams of them, against the base's


class Gate(Section):
    """After each round: promote its policy, keep it without a promotion, or roll back to the best one so far.

    The gate looks at data.selection alone; what is reported is data.heldout, which it never sees.
    """

    metric: Metric = "sampled"  # the accuracy that a promotion goes by
    level: float = Field(0.05, gt=0, lt=0.5)  # chance that a run without gain promotes any round
    min_gain: float = Field(0.0, ge=0)  # promote where the gain's lower bound is above it
    guards: list[Metric] = ["greedy"]  # none of them may be surely worse ...
    max_drop: float = Field(0.0, ge=0)  # ... by more than this
    limits: Limits = Limits()
    roll_back: bool = True  # off = what is worse goes on all the same
    patience: int | None = Field(None, ge=1)  # rounds without a promotion after which the run stops


class Sft(Section):
    """Supervised fine-tuning on the seeds before the first round; the result is the run's initial model."""

    ratings: bool = False  # also on ratings of the model's own answers to the seeds, for a policy that judges itself
    sampling: Sampling = Sampling()  # of these answers
    optimizer: Optimizer


class Edit(Section):
    """What is different, by dotted names: `drop` removes, then `set` replaces or adds."""

    set: dict[str, Any] = {}  # values by dotted name: { "train.loss.beta" = 0.2 }
    drop: list[str] = []  # dotted names

    def apply(self, table: dict[str, Any]) -> None:
        """Change a recipe's table in place.

        Raises:
            UserError: a name leads through a value that is no table, a dropped one is of nothing that there can be, or
                a section that is there would be replaced.
        """
        for key in self.drop:
            of_choice = not _known(key)
            *names, last = key.split(".")
            inner = functools.reduce(lambda at, name: at.get(name, {}) if isinstance(at, dict) else at, names, table)
            if not isinstance(inner, dict):
                raise UserError(f"drop '{key}': '{'.'.join(names)}' is no table", "set it as a whole")
            if of_choice and inner and last not in inner:
                raise UserError(f"drop '{key}': the recipe has no such key", f"known there: {', '.join(inner)}")
            inner.pop(last, None)
        for key, value in self.set.items():
            if isinstance(value, dict) and isinstance(table.get(key), dict):
                raise UserError(
                    f"set '{key}' would replace the whole section [{key}]",
                    f'name single keys in quotes: "{_first_leaf(key, value)}" = ...; or drop the section first',
                )
            put(table, key, value)


class Change(Edit):
    """What is different in some rounds, of all stages but evaluate and gate: `drop` removes, then `set` gives values.

    A recipe may have several; they are applied in order.
    """

    first: int = Field(1, ge=1)  # round
    last: int | None = Field(None, ge=1)  # round; unset = to the end

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last = {self.last} is before first = {self.first}, so it would change no round")
        return self


class Control(Section):
    """The control shown beside the result: plain SFT of the initial model on the seeds' gold answers."""

    optimizer: Optimizer


class Engine(Section):
    """What samples; the numerics of a sample depend on it, so it enters the keys of the stages that sample."""

    kind: Literal["vllm", "transformers", "fake"] = "vllm"  # "fake" computes no model: for rehearsals in seconds
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: int = Field(512, ge=16)  # tokens of prompt + completion


class Server(Section):
    """An OpenAI-compatible server that judges ask as `model = "server:NAME"`; `url` and `model` enter keys."""

    url: str = Field(pattern=r"^https?://")  # up to and with /v1
    model: str  # as the server calls it
    api_key_env: str | None = None  # the environment variable that holds the key; unset = none is sent
    structured_output: bool = False  # the server shapes replies by a JSON schema
    # how to ask, in no key:
    concurrency: int = Field(16, ge=1, le=1000)  # requests under way at once
    requests_per_minute: int | None = Field(None, ge=1)  # unset = no limit
    timeout_seconds: float = Field(120.0, gt=0)  # of one attempt
    attempts: int = Field(6, ge=1)  # of one request, with growing pauses
    input_price: float = Field(0.0, ge=0)  # USD per million tokens
    output_price: float = Field(0.0, ge=0)  # USD per million tokens
    ceiling_usd: float | None = Field(None, gt=0)  # of a stage, for this server; it stops there, to be resumed

    @property
    def identity(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {"url": self.url, "model": self.model, "structured_output": self.structured_output}

    @pydantic.model_validator(mode="after")
    def _holds_no_key(self) -> Self:
        for name, value in (("url", self.url), ("model", self.model), ("api_key_env", self.api_key_env or "")):
            if masking.holds_secret(value):  # a recipe is written down, in the run and in keys
                raise ValueError(f"{name} holds a key: put it into an environment variable and name it in api_key_env")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise ValueError("api_key_env is the name of an environment variable, not the key itself")
        return self

    @pydantic.model_validator(mode="after")
    def _ceiling_has_prices(self) -> Self:
        if self.ceiling_usd is not None and not (self.input_price or self.output_price):
            raise ValueError("ceiling_usd needs input_price and output_price")
        return self


class Machine(Section):
    """How to run; enters no key."""

    kv_cache_gib: int = Field(1, ge=1)  # vLLM on CPU
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)  # vLLM on GPU: share of the memory that it takes
    max_num_seqs: int = Field(256, ge=1)  # completions that the engine makes at once
    engine_timeout_s: float = Field(1800, gt=0)  # without a step or a reply: the engine hangs, and is started again
    threads: int | None = Field(None, ge=1)  # CPU threads of engine and of each training process; unset = all
    train_tokens: int = Field(8192, ge=1)  # tokens per forward and backward pass of training
    logits_mib: int = Field(256, ge=1, le=2**20)  # largest (tokens, vocabulary) tensor of training
    gradient_checkpointing: bool = False  # less memory for a second forward pass
    executor: Literal["local", "static", "ray"] = "local"  # who does the shards of generating, scoring, judging
    workers: int = Field(1, ge=1)  # of `local` and `ray`, each with an engine of its own
    tensor_parallel: int = Field(1, ge=1)  # GPUs of one engine
    ray_address: str | None = None  # of a running cluster, as ray.init takes it; unset = a local one
    num_processes: int = Field(1, ge=1, le=1024)  # of training, on each node
    nodes: int = Field(1, ge=1)  # of training
    rendezvous: str | None = None  # host:port of torchrun's, the same on all nodes; unset = the scheduler's variables
    store: str | None = None  # where published artifacts are kept too: a folder or a URL of fsspec (s3://, gs://)
    sharding: Literal["ddp", "fsdp"] = "ddp"  # "fsdp" spreads weights, gradients and moments over the processes
    checkpoint_steps: int = Field(100, ge=1)  # optimiser steps between training checkpoints
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []  # that get the metrics as well

    @pydantic.model_validator(mode="after")
    def _belongs_to_the_executor(self) -> Self:
        if self.executor == "static" and self.workers > 1:
            raise ValueError("workers are of local and ray: the scheduler starts the ranks of static")
        if self.ray_address and self.executor != "ray":
            raise ValueError('ray_address goes with executor = "ray"')
        if self.nodes > 1 and self.executor != "static":
            raise ValueError('nodes go with executor = "static", whose ranks join a training')
        return self


class Recipe(Section):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # of its runs, where --run gives no other
    seed: int = Field(0, ge=0)  # of all that is drawn
    rounds: int = Field(4, ge=1, le=999)  # iterations are named by three digits
    stages: list[Literal["synthesize", "generate", "improve", "discriminate", "label", "train", "evaluate", "gate"]]
    model: Model = Model()
    data: Data = Data()
    engine: Engine = Engine()
    synthesize: Synthesize | None = None
    generate: Generate | None = None
    improve: Improve | None = None
    discriminate: Discriminate | None = None
    label: Label
    train: Train
    evaluate: Evaluate
    gate: Gate | None = None
    sft: Sft | None = None
    control: Control | None = None
    schedule: list[Change] = []
    servers: dict[str, Server] = {}
    machine: Machine = Machine()

    @pydantic.model_validator(mode="after")
    def _stages_and_sections_agree(self) -> Self:
        ordered = [stage for stage in STAGES if stage in self.stages]
        if self.stages != ordered:
            raise ValueError(f"stages must stand once each in the order {', '.join(ordered)}")
        for stage in STAGES:
            if (stage in self.stages) != (getattr(self, stage) is not None):
                raise ValueError(f"stage '{stage}' and section [{stage}] go together")
        if (self.gate is None) != (self.data.selection is None):
            raise ValueError("data.selection and the stage gate go together")
        for change in self.schedule:
            for key in [*change.set, *change.drop]:
                if key.split(".")[0] not in self.stages or key.startswith(("evaluate", "gate")):
                    raise ValueError(f"schedule: '{key}' cannot change from round to round")
        return self

    @property
    def files(self) -> dict[str, str]:
        """Its input files, by the names under which stages see them."""
        own = {name: path for one in self.evaluate.benchmarks or [] for name, path in one.files.items()}
        return self.data.model_dump(exclude_none=True) | own

    def at(self, iteration: int) -> "Recipe":
        """The recipe as it stands in an iteration, its schedule applied.

        Raises:
            UserError: the schedule makes something of it that is no recipe.
        """
        if not self.schedule:
            return self
        table = self.model_dump(exclude_none=True, exclude={"schedule"})
        for change in self.schedule:
            if change.first <= iteration <= (change.last or iteration):
                change.apply(table)
        return validated(Recipe, table, f"schedule, round {iteration}")


def validated(model: type[M], table: Mapping[str, Any], what: str) -> M:
    """The table as a model.

    Raises:
        UserError: names the first key that is wrong, and the keys that are known in its place.
    """
    try:
        return model.model_validate(table)
    except pydantic.ValidationError as error:
        unknown_first = sorted(
            error.errors(), key=lambda e: e["type"] != "extra_forbidden"
        )  # a typo hides as "missing"
        first = unknown_first[0]
        where = ".".join(str(part) for part in first["loc"] if "Choice" not in str(part))  # pydantic names the class
        raise UserError(f"{what}: {where}{': ' if where else ''}{_plain(first)}", _hint(first, model)) from None


def _known(key: str) -> bool:
    """Refuse a name that no recipe can have, which dropping would pass over in silence.

    Whether that is all there is to know: a choice has parameters of its own.
    """
    model: Any = Recipe
    parts = iter(key.split("."))
    for part in parts:
        if part not in model.model_fields:
            raise UserError(f"drop '{key}': a recipe has no such key", f"known there: {', '.join(model.model_fields)}")
        annotation = model.model_fields[part].annotation
        if get_origin(annotation) is dict and next(parts, None) is None:  # [servers] itself
            return True
        sections = [a for a in [annotation, *getattr(annotation, "__args__", ())] if inspect.isclass(a)]
        model = next((a for a in sections if issubclass(a, Section)), None)
        if model is None:  # a value, or a choice
            return next(parts, None) is None
    return True


def _first_leaf(key: str, value: Any) -> str:
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def put(table: dict[str, Any], key: str, value: Any) -> None:
    """Give the key of this dotted name a value; tables on the way are made.

    Raises:
        UserError: one on the way is no table.
    """
    *names, last = key.split(".")
    for name in names:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"'{name}' is not a table", "see the recipe's sections")
    table[last] = value


def _plain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "model_type" and error["ctx"]["class_name"] == Choice.__name__:
        return 'is no choice: a name, or { name = "...", parameters }'
    message: str = error["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _hint(error: Any, model: Any) -> str:
    """The keys known at the place of the error, so that a typo is seen at once."""
    for part in error["loc"][:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            break
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        options += [inner for option in options[1:] for inner in getattr(option, "__args__", ())]  # list[...] | None
        model = next((o for o in options if inspect.isclass(o) and issubclass(o, pydantic.BaseModel)), model)
    return f"known keys here: {', '.join(field.alias or name for name, field in model.model_fields.items())}"
