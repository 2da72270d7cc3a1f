"""Training checkpoints: safetensors and JSON in one directory that is there whole or not at all.

Every process writes the parts that it holds and reads the parts that it needs (torch.distributed.checkpoint), so that
one format does for one process, DDP and FSDP2, and a training goes on with another number of processes. We take torch's
safetensors layout for it: in its own one the directory is a pickle.
"""

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_parts
from torch.distributed.checkpoint.state_dict_saver import save as write_parts

from selfimprove.store import fsync, sha256
from selfimprove.training import distributed
from selfimprove.training.distributed import ALONE, World
from selfimprove.training.learner import Learner
from selfimprove.training.references import Live

SUMS = "SHA256SUMS"  # of all other files, as `sha256sum --check` reads it
FILE_BYTES = 512 << 20  # of a file, which is put together in memory, twice


def save(folder: Path, learner: Learner, progress: dict[str, Any]) -> None:
    """Keep everything that the rest of the training depends on; every process must call it.

    Args:
        folder: of the training, on a file system that all processes see; the checkpoint before goes once this one is
            there.
        learner: weights, moments, moving references, noise, what the loss remembers.
        progress: JSON-able values that `load` gives back.

    Raises:
        OSError: of any process, on all of them; nothing is left of this checkpoint.
    """
    world = learner.world
    state = learner.bound.state.dump() if learner.bound.state else None
    said = progress | {"steps_done": learner.steps_done, "tokens_done": learner.tokens_done, "loss_state": state}
    path = folder / f"checkpoint-{progress['chunk']:03d}-{learner.steps_done:08d}"
    temporary = path.with_suffix(".tmp")
    try:
        distributed.everywhere(lambda: _begun(temporary) if world.first else None, world)
        _write(dict(_tensors(learner)), temporary, world)
        sums = distributed.everywhere(lambda: _flushed(temporary, f"shard-{world.rank + 1:05d}-*"), world)
        distributed.everywhere(lambda: _publish(temporary, path, said, sums) if world.first else None, world)
    except BaseException:  # a full disk needs the room
        if world.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _begun(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write(tensors: dict[str, Tensor], folder: Path, world: World) -> None:
    """Each process its own file or files; what all hold alike is shared out among them."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + size // (FILE_BYTES * world.size)
        size += tensor.numel() * tensor.element_size()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    writer.sync_files = False  # we do, so that there is one place that does
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process only
            write_parts(dict(tensors), storage_writer=writer, no_dist=world.size == 1)
    except CheckpointException as failed:  # hides what happened, and is no Exception
        raise _reason(failed) from None


def _reason(failed: CheckpointException) -> BaseException:
    return next(iter(failed.failures.values()))[0]


def _flushed(folder: Path, pattern: str) -> dict[str, str]:
    """Bring files to the disk; their names and digests."""
    found = {}
    for file in sorted(folder.glob(pattern)):
        fsync(file)
        found[file.name] = sha256(file)
    return found


def _publish(temporary: Path, path: Path, said: dict[str, Any], sums: list[dict[str, str]]) -> None:
    (temporary / "progress.json").write_text(json.dumps(said), encoding="utf-8")
    sums = [*sums, _flushed(temporary, "progress.json")]
    lines = [f"{digest}  {name}\n" for part in sums for name, digest in part.items()]
    (temporary / SUMS).write_text("".join(lines), encoding="utf-8")
    fsync(temporary / SUMS)
    fsync(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    fsync(path.parent)  # before the one before it goes
    for older in sorted(path.parent.glob("checkpoint-*")):
        if older != path:
            shutil.rmtree(older)


def latest(folder: Path, world: World = ALONE) -> Path | None:
    """The last whole checkpoint, the same on every process, each of which must call it.

    One that is not what was written, by a power cut or a bad disk, is passed over with a word.
    """
    found = sorted((p for p in folder.glob("checkpoint-*") if p.suffix != ".tmp"), reverse=True)
    for path in distributed.everywhere(lambda: found, world)[0]:
        damage = [why for why in distributed.everywhere(partial(_damage, path, world), world) if why]
        if not damage:
            return path
        if world.first:
            print(f"training checkpoint {path} is damaged ({damage[0]}) and not used", file=sys.stderr)
    return None


def _damage(path: Path, world: World) -> str | None:
    """What is wrong with this process's share of the files."""
    try:
        sums = [line.split("  ", 1) for line in (path / SUMS).read_text(encoding="utf-8").splitlines()]
        for digest, name in sums[world.rank :: world.size]:
            if sha256(path / name) != digest:
                return f"{name} is not what was written"
        return None if "progress.json" in [name for _, name in sums] else f"{SUMS} is torn"
    except (OSError, ValueError) as error:
        return type(error).__name__


def read_progress(path: Path) -> dict[str, Any]:
    """What `save` was given, with `steps_done`."""
    said: dict[str, Any] = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    return said


def load(path: Path, learner: Learner) -> None:
    """Make the learner what it was; every process must call it."""
    said, reader = read_progress(path), HuggingFaceStorageReader(str(path))
    known = reader.read_metadata().state_dict_metadata.keys()
    for number, (module, optimizer) in enumerate(_optimizers(learner)):
        for name, parameter in _trained(module):  # the moments' tensors must exist before they can be filled
            if f"{number}/exp_avg/{name}" in known:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_parts(dict(_tensors(learner)), storage_reader=reader, no_dist=learner.world.size == 1)
    except CheckpointException as failed:
        raise _reason(failed) from None
    learner.steps_done, learner.tokens_done = said["steps_done"], said["tokens_done"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses the optimiser's steps, which were before
        for _ in range(learner.steps_done):
            learner.schedule.step()
    if learner.bound.state is not None:
        learner.bound.state.load(said["loss_state"])


def _optimizers(learner: Learner) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    return [(learner.module, learner.optimizer), *(learner.player.optimizers() if learner.player else [])]


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name.removeprefix("module."), parameter  # DDP's wrapping


def _tensors(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """Everything by name, as it lies in memory."""
    for number, (module, optimizer) in enumerate(_optimizers(learner)):
        for name, parameter in _trained(module):
            yield f"{number}/weights/{name}", parameter.detach()
            for moment, value in sorted(optimizer.state.get(parameter, {}).items()):
                yield f"{number}/{moment}/{name}", value
    for number, reference in enumerate(learner.references):
        if isinstance(reference, Live):
            for name, parameter in reference.module.named_parameters():
                yield f"reference-{number}/{name.removeprefix('module.')}", parameter.detach()
