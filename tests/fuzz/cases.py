"""One case: write something bad into a folder, give it to a command, see what must hold."""

import contextlib
import functools
import random
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from selfimprove import chat, data
from selfimprove.evaluation import lm_harness
from tests.fuzz import files, oracle, recipes

# besides its own name: by its entry in the recipe or by its row, by the file that it does not fit, or /proc/self/mem
NAMES = ("data.seeds", "data.heldout", "seed '", "right-", "labelled/", "/mem", "Punkt", "benchmarks.own")


@contextlib.contextmanager
def quick(folder: Path) -> Iterator[None]:
    """What is not under test, made quick: a short embedded data set in `folder`, its tokenizer loaded once."""
    import torch
    import transformers

    assert torch, transformers  # what they write when they are first imported is not ours
    with pytest.MonkeyPatch.context() as patch:
        for name in ("seeds", "heldout", "selection", "corpus"):
            path = data.SHIPPED[f"demo:{name}"]
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:12]
            short = folder / f"demo-{path.name}"
            short.write_text("".join(lines), encoding="utf-8")
            patch.setitem(data.SHIPPED, f"demo:{name}", short)
        patch.setattr(chat, "Chat", functools.cache(chat.Chat))
        patch.setattr(lm_harness, "installed", lambda: True)
        patch.setattr(oracle, "program", functools.cache(oracle.program))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


def recipe(folder: Path, rng: random.Random, number: int) -> oracle.Told:
    """A recipe, planned; with settings, a run of it begun as far as its checks."""
    path, *settings = recipes.write(folder, rng)
    before = oracle.snapshot(folder)
    told = oracle.run("plan", path)
    if settings:
        told = oracle.checked(path, settings[1::2])
    if oracle.snapshot(folder) != before:
        raise oracle.Finding(f"recipe {number}: something was written")
    return told


def file(folder: Path, rng: random.Random, number: int) -> oracle.Told:
    """A data file, given to the command that reads it."""
    if not (folder / "right-pairs.jsonl").exists():
        files.prepare(folder)
    form, path = files.write(folder, rng, number)
    told = oracle.Told("done", "", "")
    for command in form.commands(path.name):
        before = oracle.snapshot(folder)
        told = oracle.run(*command)
        if {
            name
            for name, of in oracle.snapshot(folder).items()
            if before.get(name) != of and not name.startswith("out")
        }:
            raise oracle.Finding(f"file {number}: something was written")
        target = path.readlink().name if path.is_symlink() else path.name
        named = any(name in told.sentence for name in (path.name, target, *NAMES))
        if told.kind == "user error" and form.name != "study" and not named:
            raise oracle.Finding(f"file {number}: the file is not named: {told.sentence!r}")
    path.unlink(missing_ok=True)
    return told
