"""What a device of a machine holds: an engine's weights and cache, or a training's state. Nothing is loaded for it."""

from typing import Any

from selfimprove import bounds
from selfimprove.bounds import Rules
from selfimprove.engine.checkpoints import configuration
from selfimprove.errors import UserError
from selfimprove.machine_file import Hardware
from selfimprove.plan import INITIAL, Step
from selfimprove.recipe import Machine, Optimizer, Recipe, Train
from selfimprove.training.footprint import footprint

GIB = 2**30
WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a weight


def of_engine(recipe: Recipe, rules: Rules, hardware: Hardware | None) -> dict[str, int] | None:
    """Bytes of weights and of the KV cache on one device; None where the model is not there, or nothing is loaded.

    On a GPU vLLM's cache takes what `gpu_memory_utilization` leaves beside the weights, so it is known once the
    memory of the device is. On the CPU it takes `kv_cache_gib`.
    """
    if rules.model is None or recipe.engine.kind == "fake":
        return None
    machine = recipe.machine
    weights = rules.model.parameters * WIDTH[recipe.engine.dtype] // machine.tensor_parallel
    if recipe.engine.kind != "vllm":
        return {"weights": weights}
    if hardware is None:
        return {"weights": weights}
    if hardware.on_cpu:
        return {"weights": weights, "cache": machine.kv_cache_gib * GIB}
    return {"weights": weights, "cache": max(0, _granted(machine, hardware) - weights)}


def of_training(step: Step, optimizer: Optimizer, recipe: Recipe, model: bounds.Model | None) -> dict[str, int] | None:
    """Bytes of weights, gradients, moments, references and logits of one training process; None without a model."""
    if model is None:
        return None
    trained = model.trained(optimizer)
    parameters = model.parameters + (trained if optimizer.adapter else 0)
    found = footprint(parameters, trained, optimizer, recipe.machine, _beside(step, optimizer))
    held = {what: number for what, number in found._asdict().items() if number}
    return held | {"logits": recipe.machine.logits_mib * 2**20}


def _beside(step: Step, optimizer: Optimizer) -> int:
    """Models that lie beside the policy while it is trained.

    A reference that stays scores before the training and is gone then: that is less than gradients and moments of a
    whole policy take, and more than an adapter's.
    """
    section = step.section
    if not isinstance(section, Train):
        return 0
    moving = len(section.references) if section.reference_sync else int("ema" in section.references)
    noisy = section.noise is not None and section.noise.kind != "constant_margin"
    return max(moving + noisy, int(optimizer.adapter is not None and bool(section.references)))


def sharing(kind: str, machine: Machine, hardware: Hardware) -> int:
    """How many workers a device is shared by: all of a node where the processor is the device, else one."""
    if not hardware.on_cpu:
        return 1
    return machine.num_processes if kind == "train" else machine.workers


def tight(held: dict[str, int], recipe: Recipe, rules: Rules, hardware: Hardware) -> list[str]:
    """Why an engine would not start: nothing left for its cache, or less than one sequence needs."""
    machine = recipe.machine
    if hardware.on_cpu:
        needed, there = machine.workers * sum(held.values()), round(hardware.memory_gib * GIB)
        few = f"{machine.workers} engines hold {needed / GIB:.1f} GiB, and the node has {hardware.memory_gib:g} GiB"
        return [few] if needed > there else []
    granted = _granted(machine, hardware) / GIB
    share = f"{granted:.1f} GiB (gpu_memory_utilization {machine.gpu_memory_utilization:g} of {hardware.memory_gib:g})"
    if recipe.engine.kind == "vllm" and not held["cache"]:
        return [f"weights of {held['weights'] / GIB:.1f} GiB leave no cache in {share}: a larger tensor_parallel"]
    if recipe.engine.kind != "vllm" and held["weights"] > hardware.memory_gib * GIB:
        return [f"weights of {held['weights'] / GIB:.1f} GiB do not fit into {hardware.memory_gib:g} GiB"]
    token = _token(recipe, rules)
    if token is None or "cache" not in held or held["cache"] >= token * recipe.engine.max_model_len:
        return []
    longest = token * recipe.engine.max_model_len / GIB
    return [
        f"a cache of {held['cache'] / GIB:.1f} GiB holds no sequence of engine.max_model_len ="
        f" {recipe.engine.max_model_len} tokens ({longest:.1f} GiB): a larger tensor_parallel"
    ]


def _granted(machine: Machine, hardware: Hardware) -> int:
    return round(machine.gpu_memory_utilization * hardware.memory_gib * GIB)


def _token(recipe: Recipe, rules: Rules) -> int | None:
    """Bytes that a token takes in the cache of one device; None where config.json does not say."""
    try:
        config: dict[str, Any] = configuration(rules.sources.path(INITIAL))
        config = config.get("text_config", config)
        heads = int(config["num_attention_heads"])
        width = config.get("head_dim") or config["hidden_size"] // heads
        kept = max(1, (config.get("num_key_value_heads") or heads) // recipe.machine.tensor_parallel)
        return 2 * int(config["num_hidden_layers"]) * kept * int(width) * WIDTH[recipe.engine.dtype]
    except (UserError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
