"""Training checkpoints: safetensors and JSON in one directory that is there whole or not at all."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfimprove.store import fsync
from selfimprove.training import distributed
from selfimprove.training.learner import Learner
from selfimprove.training.references import Live


def save(folder: Path, learner: Learner, progress: dict[str, Any]) -> None:
    """Keep everything that the rest of the training depends on; every process must call it.

    Args:
        folder: of the training; the checkpoint before goes once this one is there.
        learner: weights, moments, moving references, noise, what the loss remembers.
        progress: JSON-able values that `load` gives back.
    """
    tensors = {name: distributed.whole(t).cpu().contiguous().clone() for name, t in _tensors(learner)}
    if learner.world.first:
        state = learner.bound.state.dump() if learner.bound.state else None
        said = progress | {"steps_done": learner.steps_done, "tokens_done": learner.tokens_done, "loss_state": state}
        path = folder / f"checkpoint-{progress['chunk']:03d}-{learner.steps_done:08d}"
        temporary = path.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / "tensors.safetensors")
            (temporary / "progress.json").write_text(json.dumps(said), encoding="utf-8")
            for file in temporary.iterdir():
                fsync(file)
            fsync(temporary)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
        except BaseException:  # a full disk needs the room
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(folder)  # before the one before it goes
        for older in sorted(folder.glob("checkpoint-*")):
            if older != path:
                shutil.rmtree(older)
    distributed.barrier(learner.world)


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint; one that was torn, by a power cut or a bad disk, is passed over with a word."""
    for path in sorted((p for p in folder.glob("checkpoint-*") if p.suffix != ".tmp"), reverse=True):
        try:
            read_progress(path)
            with safe_open(path / "tensors.safetensors", framework="pt"):  # refuses a file of another length
                return path
        except (OSError, ValueError, SafetensorError) as error:
            print(f"training checkpoint {path} is damaged ({type(error).__name__}) and not used", file=sys.stderr)
    return None


def read_progress(path: Path) -> dict[str, Any]:
    """What `save` was given, with `steps_done`."""
    said: dict[str, Any] = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    return said


def load(path: Path, learner: Learner) -> None:
    """Make the learner what it was."""
    said, tensors = read_progress(path), load_file(path / "tensors.safetensors")
    for _, optimizer in _optimizers(learner):
        for group in optimizer.param_groups:
            for parameter in group["params"]:  # the moments' tensors must exist before they can be filled
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    with torch.no_grad():
        for name, tensor in _tensors(learner):
            if name in tensors:
                distributed.assign_(tensor, tensors[name])
    learner.steps_done, learner.tokens_done = said["steps_done"], said["tokens_done"]
    for _ in range(learner.steps_done):
        learner.schedule.step()
    if learner.bound.state is not None:
        learner.bound.state.load(said["loss_state"])


def _optimizers(learner: Learner) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    return [(learner.module, learner.optimizer), *(learner.player.optimizers() if learner.player else [])]


def _tensors(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """Everything by name, as it lies in memory."""
    for number, (module, optimizer) in enumerate(_optimizers(learner)):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                name = name.removeprefix("module.")  # DDP's wrapping
                yield f"{number}/weights/{name}", parameter.detach()
                for moment, value in sorted(optimizer.state.get(parameter, {}).items()):
                    yield f"{number}/{moment}/{name}", value
    for number, reference in enumerate(learner.references):
        if isinstance(reference, Live):
            for name, parameter in reference.module.named_parameters():
                yield f"reference-{number}/{name.removeprefix('module.')}", parameter.detach()
