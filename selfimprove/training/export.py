"""Model directories: a trained model written as a plain one, and the average of two of them."""

import re
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from selfimprove.engine import canary
from selfimprove.engine.checkpoints import SAFE
from selfimprove.store import model_files
from selfimprove.training import weights

SHARD = "5GB"  # of weights in one file; larger models have several and an index


def save(model: Any, out: Path, like: Path) -> None:
    """Write weights and configuration of `model`, everything else as it is in `like`, and the canary.

    Raises:
        OSError: the disk is full, or another error of the operating system.
    """
    model.eval()
    try:
        model.save_pretrained(out, max_shard_size=SHARD)
    except safetensors.SafetensorError as error:  # it hides the number of an operating system's error in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(out)) from None
    for path in model_files(like):
        if path.name != "config.json" and ".safetensors" not in path.name:
            shutil.copyfile(path, out / path.name)
    canary.save(out, canary.compute(model))


def average(before: Path, policy: Path, decay: float, out: Path) -> float:
    """Write decay * before + (1 - decay) * policy (SAPO, arXiv 2405.20830) as a model directory like the policy's.

    Returns:
        The distance between average and policy: the root of the summed squares over all parameters.
    """
    held, new = (_load(directory) for directory in (before, policy))
    own, theirs = weights.parameters(held), weights.parameters(new)
    weights.ema_(own, theirs, decay)
    distance = sum((own[name] - theirs[name]).double().square().sum().item() for name in own) ** 0.5
    save(held, out, policy)
    return float(distance)


def _load(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **SAFE)
