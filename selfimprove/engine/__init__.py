"""Inference: one Protocol, three engines (vLLM host process, transformers, fake)."""

from pathlib import Path

from selfimprove import recipe
from selfimprove.engine.protocol import Engine, Options


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
