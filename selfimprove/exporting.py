"""A policy as a directory that leaves its run: model, cards, pairs; there whole or not at all.

Everything is copied, nothing linked: whoever writes into the directory must not change the run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from selfimprove.engine import canary
from selfimprove.errors import UserError
from selfimprove.release import Release
from selfimprove.store import Run, is_model_file

CARD = "README.md"
MODEL, DATASET, DATA = "model", "dataset", "data"
TRAINING = ("trainer_state.json", "training_args.json", "_results.json", "-metrics.json")  # state that no model needs
PLACES = ("path", "file", "dir")  # what keys are called that hold a path


def check_target(run: Run, out: Path) -> Path:
    """The directory to be made, its name absolute.

    Raises:
        UserError: something is there already, or it would lie inside the run.
    """
    target = out.resolve()
    if target.is_relative_to(run.path.resolve()):
        raise UserError(f"{out} is inside the run", "--out ANOTHER_DIRECTORY, outside of it")
    if any((parent / "recipe.toml").is_file() and (parent / "run.json").is_file() for parent in target.parents):
        raise UserError(f"{out} is inside another run", "--out ANOTHER_DIRECTORY, outside of it")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{out} is there already", "--out ANOTHER_DIRECTORY")
    return target


def write(made: Release, target: Path, model_card: str, dataset_card: str) -> list[str]:
    """Write the directory in one rename; returns what of the policy's directory was left out."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / MODEL).mkdir(parents=True)
        (partial / DATASET / DATA).mkdir(parents=True)
        left_out = _copy_model(made.policy, partial / MODEL)
        for labelled in made.labelled:
            for shard in sorted(labelled.directory.glob("pairs-[0-9]*.parquet")):
                name = f"{shard_prefix(labelled.iteration)}{shard.name.removeprefix('pairs')}"
                shutil.copyfile(shard, partial / DATASET / DATA / name)
        (partial / CARD).write_text(model_card, encoding="utf-8")
        (partial / DATASET / CARD).write_text(dataset_card, encoding="utf-8")
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return left_out


def shard_prefix(iteration: int) -> str:
    """What the names of a round's parquet files begin with."""
    return f"round-{iteration:03d}"


def _copy_model(source: Path, target: Path) -> list[str]:
    left_out = []
    for path in sorted(source.iterdir()):
        if path.name == canary.FILE:
            continue
        if not path.is_file() or not is_model_file(path.name) or path.name.endswith(TRAINING):
            left_out.append(path.name)
        elif path.name.endswith("config.json"):
            told = json.loads(path.read_text(encoding="utf-8"))
            (target / path.name).write_text(json.dumps(without_places(told), indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, target / path.name)
    return left_out


def without_places(told: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that say where on a machine something was."""
    return {
        key: value
        for key, value in told.items()
        if not (key.endswith(PLACES) and isinstance(value, str) and Path(value).is_absolute())
    }
