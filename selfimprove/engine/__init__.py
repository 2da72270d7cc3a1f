"""Inference: one Protocol, three engines (vLLM host process, transformers, fake)."""

from pathlib import Path

from selfimprove import recipe
from selfimprove.engine.protocol import Engine, Options


class Engines:
    """The engine that is open, started when first asked for; runs that want the same one share it.

    Args:
        log: file for its output; unset = the one that the caller names.
    """

    def __init__(self, log: Path | None = None) -> None:
        self._log = log
        self._open: Engine | None = None
        self._serves: tuple[recipe.Engine, recipe.Machine, Path] | None = None

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def get(self, section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path) -> Engine:
        """An engine of these settings for weights of the shape of `model`; another one that is open is closed."""
        wanted = (section, machine, model)
        if self._open is None or self._serves != wanted:
            self.close()  # two at a time may not fit into the memory
            self._open, self._serves = open_engine(section, machine, model, self._log or log), wanted
        return self._open

    def close(self) -> None:
        """End the engine that is open."""
        if self._open is not None:
            self._open.close()
            self._open = None


def open_engine(section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path) -> Engine:
    """The engine a recipe names, serving `model`; vLLM starts in the background while the caller goes on."""
    options = Options(
        dtype=section.dtype,
        max_model_len=section.max_model_len,
        max_num_seqs=machine.max_num_seqs,
        kv_cache_gib=machine.kv_cache_gib,
        gpu_memory_utilization=machine.gpu_memory_utilization,
        threads=machine.threads,
    )
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
