"""LoRA and QLoRA through peft: adapters that train in place of the weights, and plain models made of them afterwards.

Adapters are put into a model in place, so that its decoder and its head stay where the packed forward looks for them.
An adapter is merged into full-precision weights, never into quantised ones, and the result is compared with what the
adapter did (huggingface/peft#2368, unslothai/unsloth#2516: quality lost in merging goes unseen until the next round).
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from selfimprove.engine import checkpoints
from selfimprove.engine.checkpoints import SAFE
from selfimprove.errors import UserError
from selfimprove.training.logps import TOLERANCE


class Adapter(Protocol):
    """What `attach` reads of an adapter's settings."""

    @property
    def rank(self) -> int:
        """Of the two factors."""

    @property
    def alpha(self) -> float:
        """The product of the factors is scaled by alpha / rank."""

    @property
    def target_modules(self) -> Sequence[str] | None:
        """Names of linear layers, whole or from a dot on; None stands for all but the output head."""

    @property
    def quantize(self) -> str | None:
        """How the base is quantised while the adapter trains; None = not."""


class MergeMismatch(Exception):
    """A merged model does not compute what its adapter and base computed together."""


def attach(model: Any, adapter: Adapter) -> Any:
    """Freeze a transformers model and put fresh adapters into it; returns the same object.

    A is drawn from torch's global generator and B is zero, so the model computes what it did before (LoRA, arXiv
    2106.09685). Adapter weights are float32 whatever the base is: updates of 1e-6 vanish in bfloat16.

    Raises:
        UserError: a target module that is no linear layer of the model, or is its output head.
    """
    import peft

    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=0.0,
        target_modules=_targets(model, adapter),
    )
    peft.inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def check(directory: Path, adapter: Adapter) -> None:
    """Whether a model could be trained with an adapter, by its configuration alone: no weight is read.

    Raises:
        UserError: a target module that is no linear layer of the model, or is its output head; no bitsandbytes.
    """
    if adapter.quantize:
        _bitsandbytes()
    if adapter.target_modules is not None:
        _targets(checkpoints.built(directory, transformers.AutoModelForCausalLM), adapter)


def _targets(model: Any, adapter: Adapter) -> list[str]:
    """Full names of the layers to adapt. The head is none: the packed forward multiplies by its weight itself."""
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    if adapter.target_modules is None:
        return linear
    found = {target: [n for n in linear if f".{n}".endswith(f".{target}")] for target in adapter.target_modules}
    if unknown := [target for target, names in found.items() if not names]:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise UserError(
            f"target_modules names {', '.join(unknown)}, which {type(model).__name__} does not have as a linear layer "
            "besides its output head",
            f"known here: {known}",
        )
    return [name for names in found.values() for name in names]


def load_quantized(directory: Path) -> Any:
    """A causal language model in 4 bits as in QLoRA (arXiv 2305.14314): nf4, double quantisation, bfloat16 arithmetic.

    The embeddings, norms and head stay bfloat16, so that attention gets the dtype its kernels take. The model lies on
    the current CUDA device where there is one.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    bitsandbytes = _bitsandbytes()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        **SAFE,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 a layer in eval mode re-packs its weight at the first forward without gradient,
            # and from then on lets no gradient through, without an error.
            module.support_avx512bf16_for_cpu = False
    return model


def _bitsandbytes() -> ModuleType:
    try:
        return importlib.import_module("bitsandbytes")
    except ModuleNotFoundError:
        raise UserError(
            "adapter.quantize needs bitsandbytes, which is not installed", "pip install 'selfimprove[qlora]'"
        ) from None


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The trainable tensors by name; detached, not copied."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_state(model: torch.nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy what `state` gave into a model with the same trainable tensors.

    Raises:
        ValueError: names or shapes differ.
    """
    own = state(model)
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise ValueError(f"not the state of this model's trainable tensors: {sorted(own.keys() ^ saved.keys())[:4]}")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def merge(trained: Mapping[str, Tensor], adapter: Adapter, directory: Path, rows: Sequence[Sequence[int]]) -> Any:
    """The plain float32 model that a trained adapter and its base make, proven equal to the two.

    The base is loaded anew in float32, for QLoRA too: what its adapter learned is added to the weights that were
    quantised, not to their 4-bit copy. Draws from torch's global generator, as `attach` does.

    Args:
        trained: `state` of the adapted model. The merged model lies on its device.
        adapter: what the model was adapted with.
        directory: the base.
        rows: token ids to compare on, each of two or more.

    Raises:
        MergeMismatch: merged and unmerged give log-probs that differ by more than 1e-4 nats.
    """
    device = next(iter(trained.values())).device
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **SAFE)
    model = attach(base.to(device), adapter)
    load_state(model, trained)
    adapted = token_logps(model, rows)
    _merge_in_place(model)
    prove(token_logps(model, rows), adapted, torch.float32)
    return model


def _merge_in_place(model: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


@torch.no_grad()
def token_logps(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log-prob of each token but a row's first, row after row: (sum of lengths - rows,), float32, nats.

    By the model's own forward, a row at a time: the model must not be set to packed trees.
    """
    parts = []
    for row in rows:
        ids = torch.tensor([list(row)], device=model.device)
        logps = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        parts.append(logps.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(parts)


def prove(merged: Tensor, adapted: Tensor, dtype: torch.dtype) -> float:
    """The largest difference per token of two models' log-probs, in nats, where it is within the tolerance of `dtype`.

    1e-4 in float32 and 0.25 in bfloat16 (`logps.TOLERANCE`): there, rounding the merged weights and the activations
    moved the tokens of small models by up to 0.16.

    Raises:
        MergeMismatch: it is not, or is not a number.
    """
    difference = (merged.float() - adapted.float()).abs().max().item()
    if not difference <= TOLERANCE[dtype]:
        raise MergeMismatch(
            f"merged weights give other log-probs than base and adapter: they differ by {difference:.3g} nats, "
            f"{TOLERANCE[dtype]:.3g} allowed in {dtype}"
        )
    return difference
