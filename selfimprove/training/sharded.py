"""Models cut into parts by FSDP2: built without memory, read part by part, gathered tensor by tensor.

No process ever holds a whole model but the first, on the CPU, when the finished policy is written.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as read_parts

from selfimprove.engine.checkpoints import SAFE
from selfimprove.training import distributed
from selfimprove.training.distributed import World


def skeleton(directory: Path) -> Any:
    """A causal language model of a directory's configuration: its parameters are on the meta device, buffers are there.

    Buffers are computed and not saved in part (rotary frequencies), so that they cannot be made afterwards.
    """
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with accelerate.init_empty_weights(include_buffers=False):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    return model


def layers(body: Any) -> list[nn.Module]:
    """The decoder layers of a model, each of which is gathered by itself; none where it calls them otherwise."""
    return next((list(getattr(body, name)) for name in ("layers", "h") if hasattr(body, name)), [])


def adapted(model: Any, attach: Callable[[Any], object]) -> None:
    """Attach adapters to a skeleton: drawn as they would be on a whole model, since peft puts them beside the base.

    So for that moment the base lies on the CPU: one zero, seen as many times as a weight has elements.
    """
    seeming = {p: nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape)) for p in model.parameters()}
    _exchange(model, seeming)
    attach(model)
    _exchange(model, {seen: nn.Parameter(p, seen.requires_grad) for p, seen in seeming.items()})


def _exchange(model: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in new:
                module._parameters[name] = new[parameter]


def load(module: nn.Module, model: Any, directory: Path, world: World) -> None:
    """Give a wrapped skeleton its weights, each process reading the parts that it keeps; every process must call it.

    Where files name tensors otherwise than the model does, and transformers converts them, the first process reads
    them whole and hands out the parts.

    Args:
        module: as the processes run it.
        model: the skeleton in it, with or without adapters.
        directory: of the weights.
        world: the processes.
    """
    missing = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    module._apply(lambda t: torch.empty_like(t, device=world.device) if t.is_meta else t)  # type: ignore[no-untyped-call]
    wanted = {_plain(name): p.detach() for name, p in model.named_parameters() if name in missing}
    aliases = {_plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    saved = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    reader = HuggingFaceStorageReader(str(directory))
    known = reader.read_metadata().state_dict_metadata.keys()
    found: dict[str, Tensor] = {}
    for name, tensor in wanted.items():
        names = [name, *(other for other, p in aliases.items() if p is aliases[name])]  # tied weights have several
        if inside := next((other for other in names if other in known), None):
            found[inside] = tensor
    if len(found) < len(wanted):
        _hand_out(wanted | saved, directory, world)
        return
    found |= {name: buffer for name, buffer in saved.items() if name in known}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is new in the layout's reader
        read_parts(found, storage_reader=reader)


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")  # where an adapter was put around it


@torch.no_grad()
def _hand_out(wanted: dict[str, Tensor], directory: Path, world: World) -> None:
    whole: dict[str, Tensor] = {}
    if world.first:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **SAFE)
        whole = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in wanted.items():
        value = whole.pop(name).detach() if world.first else torch.empty(tensor.shape, dtype=tensor.dtype)
        distributed.hand_out_(tensor, value)


def whole(model: Any, directory: Path, world: World) -> Any | None:
    """The model as one, float32 on the CPU, for the first process; None for the others, which must ask too.

    Args:
        model: with FSDP2's parameters.
        directory: of its configuration.
        world: the processes.
    """
    found: dict[str, Tensor] = {}
    saved = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *(b for b in model.named_buffers() if b[0] in saved)]:
        one = distributed.whole(tensor.detach())  # the only one that a process has whole, but for the first
        if world.first:
            found[name] = one.cpu()
    if not world.first:
        return None
    plain = skeleton(directory)
    plain.load_state_dict(found, assign=True, strict=False)
    plain.tie_weights()
    return plain
