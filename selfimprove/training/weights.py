"""Arithmetic on the weights of whole models: moving averages, reference updates, extrapolation.

Pure functions over tensors by name, in place on the first argument. They compute in float32 or wider and round once, to
the dtype of what they change. Give them `parameters`, not a state dict: that holds buffers, and tied weights twice.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, tied ones once, no buffers; detached, not copied."""
    return {name: p.detach() for name, p in model.named_parameters()}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float32 or wider: in bfloat16 an average with decay 0.999 stands still, its steps being rounded off."""
    return {name: _wide(tensor).clone() for name, tensor in tensors.items()}


@torch.no_grad()
def ema_(average: Mapping[str, Tensor], tensors: Mapping[str, Tensor], decay: float) -> None:
    """A moving average: average <- decay average + (1 - decay) tensors (SAPO, arXiv 2405.20830: decay 0.5 each step).

    Raises:
        ValueError: names or shapes differ.
    """
    for old, new in _paired(average, tensors):
        old.copy_(decay * _wide(old) + (1 - decay) * _wide(new).to(old.device))


@torch.no_grad()
def sync_(reference: Mapping[str, Tensor], policy: Mapping[str, Tensor], alpha: float) -> None:
    """TR-DPO's update (arXiv 2404.09656): reference <- alpha policy + (1 - alpha) reference; 1 replaces it.

    Raises:
        ValueError: names or shapes differ.
    """
    for old, new in _paired(reference, policy):
        old.copy_(alpha * _wide(new).to(old.device) + (1 - alpha) * _wide(old))


@torch.no_grad()
def extrapolate_(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], alpha: float) -> None:
    """ExPO (arXiv 2404.16792): theta <- theta + alpha (theta - start), where training led from `start` to theta.

    Raises:
        ValueError: names or shapes differ.
    """
    for theta, origin in _paired(tensors, start):
        wide = _wide(theta)
        theta.copy_(wide + alpha * (wide - _wide(origin).to(theta.device)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _paired(changed: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of the same name; all checked before the first is given, so that an error leaves nothing half done."""
    shapes, others = ({name: t.shape for name, t in tensors.items()} for tensors in (changed, other))
    if shapes != others:
        names = sorted(n for n in shapes.keys() | others.keys() if shapes.get(n) != others.get(n))
        raise ValueError(f"not the same tensors: {', '.join(names[:4])} ({len(names)} in all)")
    return ((tensor, other[name]) for name, tensor in changed.items())
