"""Inference: the policy's engine (vLLM host process, transformers, fake) and the models of judges beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, overload

from selfimprove import recipe
from selfimprove.engine.protocol import Engine, Options, Ranker, Scorer, Task


@dataclass
class _Open:
    """A model that is held open, what was wanted, and the folder of logs of the run that used it last."""

    model: Engine | Scorer | Ranker
    wanted: tuple[recipe.Engine, recipe.Machine, Path, Task]
    run: Path


class Engines:
    """The models that are open, each started when first asked for; runs that want the same one share it.

    One of them serves the policies of a run, whose weights are swapped; the others belong to judges and keep their
    weights. On a GPU all others sleep before one is handed out, and a policy wakes at its next swap: whoever asks for a
    model swaps and uses it before asking for another. On a CPU all stay awake.

    Args:
        log: file for their output; unset = the one that the caller names.
    """

    def __init__(self, log: Path | None = None) -> None:
        self._log = log
        self._policy: _Open | None = None
        self._judges: list[_Open] = []

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def get(self, section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path) -> Engine:
        """An engine of these settings for weights of the shape of `model`; another such one that is open is closed."""
        wanted: tuple[recipe.Engine, recipe.Machine, Path, Task] = (section, machine, model, "generate")
        if self._policy is None or self._policy.wanted != wanted:
            if self._policy:
                self._policy.model.close()  # two at a time may not fit into the memory
                self._policy = None
            self._prepare(None, log)
            _await_memory(section, machine)
            self._policy = _Open(open_engine(section, machine, model, self._log or log), wanted, log.parent)
        self._prepare(self._policy, log)
        return cast(Engine, self._policy.model)

    @overload
    def judge(
        self, section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path, task: Literal["generate"]
    ) -> Engine: ...
    @overload
    def judge(
        self, section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path, task: Literal["reward"]
    ) -> Scorer: ...
    @overload
    def judge(
        self, section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path, task: Literal["compare"]
    ) -> Ranker: ...
    @overload
    def judge(
        self, section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path, task: Task
    ) -> Engine | Scorer | Ranker: ...
    def judge(
        self, section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path, task: Task
    ) -> Engine | Scorer | Ranker:
        """A judge's own model, which is kept open beside the policy's engine; see `open_judge`.

        Those that only an earlier run has used are closed when another one is opened.
        """
        wanted = (section, machine, model, task)
        held = next((one for one in self._judges if one.wanted == wanted), None)
        if held is None:
            self._prepare(None, log)
            _await_memory(section, machine)
            held = _Open(open_judge(section, machine, model, self._log or log, task), wanted, log.parent)
            self._judges.append(held)
        self._prepare(held, log)
        return held.model

    def sleep(self) -> None:
        """Let all that are open give the device's memory back."""
        self._sleep_but(None)

    def close(self) -> None:
        """End all that are open."""
        for held in (*([self._policy] if self._policy else []), *self._judges):
            held.model.close()
        self._policy, self._judges = None, []

    def _prepare(self, chosen: _Open | None, log: Path) -> None:
        """Make room for the chosen one, or for a new one: the judges of other runs go, the rest sleep."""
        if chosen is None:
            for held in [one for one in self._judges if one.run != log.parent]:
                held.model.close()
                self._judges.remove(held)
        else:
            chosen.run = log.parent
        self._sleep_but(chosen)

    def _sleep_but(self, chosen: _Open | None) -> None:
        for held in (*([self._policy] if self._policy else []), *self._judges):
            if held is not chosen:
                held.model.sleep()  # a no-op on CPU


def open_engine(section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path) -> Engine:
    """The engine a recipe names, serving `model`; vLLM starts in the background while the caller goes on."""
    options = _options(section, machine, section.max_model_len)
    match section.kind:
        case "vllm":
            from selfimprove.engine.vllm_engine import VllmEngine

            return VllmEngine(model, options, log)
        case "transformers":
            from selfimprove.engine.transformers_engine import TransformersEngine

            return TransformersEngine(model, options)
        case "fake":
            from selfimprove.engine.fake_engine import FakeEngine

            return FakeEngine(model)


def open_judge(
    section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path, task: Task
) -> Engine | Scorer | Ranker:
    """A model that is no policy of the run; its context is checkpoints.context_length, which its memory is sized by.

    Raises:
        UserError: the directory does not hold a model for this task.
    """
    from selfimprove.engine import checkpoints

    if section.kind == "fake":
        from selfimprove.engine.fake_engine import FakeEngine, FakeRanker, FakeScorer

        match task:
            case "generate":
                return FakeEngine(model)
            case "reward":
                return FakeScorer(model)
            case "compare":
                return FakeRanker(model)
    length = checkpoints.context_length(model, section)
    match task:
        case "generate":
            checkpoints.check_weights(model)
            return open_engine(section.model_copy(update={"max_model_len": length}), machine, model, log)
        case "reward":
            checkpoints.check_reward_model(model)
            options = _options(section, machine, length)
            if section.kind == "vllm":
                from selfimprove.engine.vllm_scorer import VllmScorer

                return VllmScorer(model, options, log)
            from selfimprove.engine.transformers_scorer import TransformersScorer

            return TransformersScorer(model, options)
        case "compare":
            checkpoints.check_ranker(model)
            from selfimprove.engine.ranker import PairRanker

            return PairRanker(model, section.dtype)


def _await_memory(section: recipe.Engine, machine: recipe.Machine) -> None:
    if section.kind != "fake":
        from selfimprove.engine import device_memory

        device_memory.settle(machine.gpu_memory_utilization)


def _options(section: recipe.Engine, machine: recipe.Machine, max_model_len: int) -> Options:
    return Options(
        dtype=section.dtype,
        max_model_len=max_model_len,
        max_num_seqs=machine.max_num_seqs,
        kv_cache_gib=machine.kv_cache_gib,
        gpu_memory_utilization=machine.gpu_memory_utilization,
        threads=machine.threads,
        timeout=machine.engine_timeout_s,
        tensor_parallel=machine.tensor_parallel,
    )
