"""Runs of a few small artifacts, and what a reader sees of them in a store."""

import hashlib
import json
from pathlib import Path

import pytest

from selfimprove import plan, receipts, recipe_file, store
from selfimprove.errors import UserError
from selfimprove.remote import kept as reading
from selfimprove.remote import mirror
from selfimprove.remote.mirror import Mirror
from selfimprove.remote.objects import Store

NAMES = ["rows-00000.parquet", "policy/model.safetensors", "policy/a b#c %20 é&=+~.json", "empty.jsonl"]
STAGES = ["iter-001/1-synthesize", "iter-001/2-generate", "iter-001/3-label"]
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"}


def nothing(*told: object) -> None:
    """Hears, and does nothing."""


def publish(run: store.Run, directory: str, seed: str = "", tokens: int = 0) -> store.Manifest:
    """An artifact of the run; `seed` is an ingredient, and part of what its files say."""
    iteration, stage = directory.split("/")
    artifact = store.Artifact(run.path / directory)
    artifact.begin()
    for name in NAMES:
        artifact.path(name).parent.mkdir(exist_ok=True)
        text = "" if name.startswith("empty") else f"{directory} {name} {seed}\n" * 50
        artifact.path(name).write_text(text, encoding="utf-8")
    artifact.contract("row", 0, 0)
    artifact.tokens = tokens  # enters no key
    return artifact.publish(int(iteration[5:]), stage, {"stage": directory, "seed": seed}, {"receipt": "r"})


def begin(path: Path, stages: list[str] = STAGES, created: str = "now", tokens: int = 0) -> store.Run:
    """A run with what one has beside its artifacts."""
    path.mkdir(parents=True)
    run = store.Run(path)
    store.write_atomically(path / "run.json", json.dumps({"run": path.name, "created": created}) + "\n")
    run.recipe_file.write_text(recipe_file.dump(recipe_file.load(recipe_file.find("default"))), encoding="utf-8")
    (path / ".gitignore").write_text("*\n", encoding="utf-8")
    for place, form in ((receipts.FOLDER, "{}.json"), (plan.TEMPLATES, "{}")):
        (path / place).mkdir()
        text = f"{place} é\n"
        name = form.format(hashlib.sha256(text.encode()).hexdigest())
        (path / place / name).write_text(text, encoding="utf-8")
    for directory in stages:
        publish(run, directory, tokens=tokens)
    return run


def tree(
    folder: Path, without: tuple[str, ...] = (".lock", ".lock.json", "state.json", "digests.json")
) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not p.is_symlink() and p.name not in without
    }


def mirrored(address: str, run: store.Run) -> Mirror:
    found = mirror.of(address, run)
    assert found
    return found


def refused(call, *arguments, **more) -> str:
    """The sentence and the hint of an error."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **more)
    assert "\n" not in caught.value.message
    return f"{caught.value.message} | {caught.value.hint}"


def check_readers(address: str, name: str = "run") -> dict[str, reading.Kept]:
    """What a reader sees now; nothing of it may be half."""
    place = Store(address)
    found = reading.artifacts(place, name)
    for directory, one in found.items():
        assert not one.torn, (directory, one.torn)
        for output in one.manifest.outputs:
            content = place.read(f"{name}/{directory}/{reading.making(one.content)}/{output.path}")
            assert hashlib.sha256(content).hexdigest() == output.sha256
    return found


def pulled(address: str, runs: Path) -> store.Run:
    return mirror.pull(f"{address}/run", runs, nothing, nothing)


def objects_of(address: str, directory: str, ending: str) -> str:
    place = Store(address)
    [name] = [n for n in place.sizes("run") if n.startswith(f"{directory}/") and n.endswith(ending)]
    return f"run/{name}"
