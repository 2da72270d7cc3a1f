"""One process or several (torchrun): who we are, wrapping a module, sums over all, whole tensors from shards."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")
Sharding = Literal["ddp", "fsdp"]
# of one exchange: as long as the slowest process may load or save; one that died is noticed at once, by torchrun or
# by its closed connection, and only one that hangs takes this long
TIMEOUT = timedelta(minutes=30)


class World(NamedTuple):
    """The processes that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


ALONE = World(0, 1, torch.device("cpu"))


def device() -> torch.device:
    """The device of this process: one GPU per local rank, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def joined() -> Iterator[World]:
    """Join the process group that torchrun's variables describe; alone where there are none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, device())
        return
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), size, here)
    finally:
        dist.destroy_process_group()


def wrap(module: nn.Module, layers: list[nn.Module], sharding: Sharding, world: World, dtype: torch.dtype) -> nn.Module:
    """The module as the processes train it: DDP, or FSDP2 with one group per layer. Alone it stays as it is.

    Args:
        module: what is called forward.
        layers: its decoder layers.
        sharding: "ddp" copies weights to every process, "fsdp" shards weights, gradients and optimiser state.
        world: the processes.
        dtype: of the computation; FSDP2 casts gathered weights to it.
    """
    if world.size == 1:
        return module
    if sharding == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def reshard(module: nn.Module) -> None:
    """Drop what FSDP2 gathered in a forward pass without a backward one: `parameters` are those that are kept again."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def gradients_wait(module: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside add up gradients locally; the next one outside exchanges them."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()  # FSDP2 reduces each time, so that no process ever holds a whole gradient


def sum_(tensor: Tensor, world: World) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def everywhere(part: Callable[[], T], world: World) -> list[T]:
    """What `part` gives on each process, known to all; every process must call it.

    Raises:
        Exception: that of the first process where `part` raised one, on all of them: none waits for another in vain.
    """
    if world.size == 1:
        return [part()]
    found: T | Exception
    try:
        found = part()
    except Exception as error:
        found = error
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, found)
    for one in every:
        if isinstance(one, Exception):
            raise one
    return every


def gathered(found: dict[bytes, Tensor], world: World) -> dict[bytes, Tensor]:
    """What all processes found."""
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, found)
    return {name: value for part in parts for name, value in part.items()}


def barrier(world: World) -> None:
    """Wait for all processes."""
    if world.size > 1:
        dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor that every process has, cut as `target` is."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def hand_out_(target: Tensor, value: Tensor) -> None:
    """Write the first process's value into a tensor of all, cut or not; that of the others only has the shape."""
    value = value.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
    else:
        dist.broadcast(value, 0)
        target.copy_(value)
