"""Finished runs made into others: their scores, recipes and decisions changed, their manifests kept true."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfimprove import recipe_file
from selfimprove.columns import arrow_schema
from selfimprove.recipe import Recipe
from selfimprove.records import Sample
from selfimprove.stages import evaluate
from selfimprove.store import (
    Artifact,
    Manifest,
    Output,
    key_of,
    manifest_text,
    read_manifest,
    read_rows,
    sha256,
)


def copied(run: Path, name: str) -> Path:
    """Another run with everything that this one has."""
    return Path(shutil.copytree(run, run.with_name(name), symlinks=True))


def stage(run: Path, iteration: int, name: str) -> Path:
    """The directory of a stage; of iteration 0 the base's own."""
    return min(run.glob(f"iter-{iteration:03d}/*-{name}"))


def change_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest; its outputs, its key and its seal are made true again."""
    manifest = read_manifest(directory)
    assert manifest
    told = manifest.model_dump()
    change(told)
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    told["outputs"] = [
        Output(path=p.relative_to(directory).as_posix(), bytes=p.stat().st_size, sha256=sha256(p)) for p in files
    ]
    told["key"] = key_of(told["ingredients"])
    write_manifest(directory, told)


def write_manifest(directory: Path, told: Mapping[str, Any]) -> None:
    """Write a manifest that says so, under a true seal."""
    (directory / "manifest.json").write_text(manifest_text(Manifest.model_validate(told)), encoding="utf-8")


def resample(run: Path, iteration: int, change: Callable[[list[Sample]], list[Sample]]) -> list[Sample]:
    """Change an evaluation's answers; its scores and manifest follow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = stage(run, iteration, "evaluate")
    rows = change(read_rows(directory, "samples", Sample))
    table = pa.Table.from_pylist(
        [{name: getattr(row, name) for name in Sample.__struct_fields__} for row in rows], schema=arrow_schema(Sample)
    )
    pq.write_table(table, directory / "samples-00000.parquet")
    (directory / "scores.json").write_text(json.dumps(evaluate.scores(rows, {})), encoding="utf-8")
    change_manifest(directory, lambda told: None)
    return rows


def change_recipe(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a run's recipe."""
    path = run / "recipe.toml"
    told = recipe_file.load(path).model_dump(exclude_none=True)
    change(told)
    path.write_text(recipe_file.dump(Recipe.model_validate(told)), encoding="utf-8")


def gated(run: Path, decisions: Mapping[int, Mapping[str, Any]]) -> None:
    """Give a run a gate that decided so, by iteration."""

    def change(told: dict[str, Any]) -> None:
        told["stages"] = [*told["stages"], "gate"]
        told["data"]["selection"] = "demo:selection"
        told["gate"] = {}

    change_recipe(run, change)
    for iteration, decision in decisions.items():
        out = Artifact(run / f"iter-{iteration:03d}" / "6-gate")
        out.begin()
        out.write_json("gate.json", decision)
        out.contract("prompt", 40, 40)
        out.publish(iteration, "6-gate", {"section": {}, "inputs": {}, "models": {}}, {})


def decision(word: str, best: int, goes_on_from: int, **more: Any) -> dict[str, Any]:
    """The content of gate.json."""
    change = {
        "metric": "sampled",
        "difference": 0.021,
        "low": 0.003,
        "high": 0.039,
        "level": 0.0125,
        "mde": 0.02,
        "n": 300,
    }
    told = {
        "decision": word,
        "best": best,
        "goes_on_from": goes_on_from,
        "stop": False,
        "reasons": ["Sampled against the best: +2.1 points."],
        "primary": change,
        "guards": {"greedy": {**change, "metric": "greedy", "difference": -0.004, "low": -0.02, "high": 0.01}},
        "health": {"truncated_share": {"value": 0.02, "limit": 0.1, "ok": True}},
    }
    return told | more


def everything(directory: Path) -> list[str]:
    """The relative paths of all files below, also of hidden ones."""
    return sorted(
        str((Path(at) / name).relative_to(directory)) for at, _, names in os.walk(directory) for name in names
    )
