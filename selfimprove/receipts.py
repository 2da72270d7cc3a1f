"""What a run was made with: command, every installed version, git, hardware, the model's files. No secrets.

A receipt is named by its content, so that runs of one day share one; each manifest names its own. Of the environment's
variables nothing is written, of git no address.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from selfimprove.masking import masked_all
from selfimprove.recipe import PACKAGE, Machine
from selfimprove.store import model_files, sha256, write_atomically

FOLDER = "receipts"
SPREAD = {"executor", "workers", "tensor_parallel", "num_processes", "nodes", "sharding"}  # what times depend on
SECONDS = 20  # that git and nvidia-smi may take
TOKENIZER = re.compile(r"tokenizer|vocab|merges|special_tokens|added_tokens|spiece|\.model$")


def write(run: Path, command: Sequence[str], seed: int, model: Path, identity: str, machine: Machine) -> str:
    """Write the receipt of what this process is about to make; returns the sha256 that names it.

    Args:
        run: directory of the run.
        command: the arguments of the command line; keys in them are masked.
        seed: of the run; those of rows stand in the rows, and derive from it (store.row_seed).
        model: that the run starts from.
        identity: of the same, hashed already.
        machine: how the work was spread; without its addresses.
    """
    told = {
        "command": masked_all(command),
        "seed": seed,
        "model": identity,
        **model_parts(model),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages(),
        "git": {"working directory": git(Path.cwd()), "selfimprove": git(PACKAGE)},
        "hardware": hardware(),
        "machine": machine.model_dump(include=SPREAD),
    }
    text = json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    name = hashlib.sha256(text.encode()).hexdigest()
    path = run / FOLDER / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text)
    return name


def adopt(run: Path, other: Path, name: str | None) -> None:
    """Take over the receipt that an artifact of another run names, where that run has it."""
    source = other / FOLDER / f"{name}.json"
    if name and re.fullmatch(r"[0-9a-f]{64}", name) and source.is_file() and not (run / FOLDER / source.name).exists():
        (run / FOLDER).mkdir(exist_ok=True)
        write_atomically(run / FOLDER / source.name, source.read_text(encoding="utf-8"))


@functools.cache
def packages() -> dict[str, str]:
    """Name and version of every installed distribution; of one that is installed twice, the one that is imported."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions():  # in the order of the path
        name = one.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), one.version)
    return dict(sorted(found.items()))


def model_parts(model: Path) -> dict[str, str | None]:
    """Hashes of the tokenizer's files and of the chat template; None where there is none."""
    files = [path for path in model_files(model) if TOKENIZER.search(path.name)]
    digest = hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()
    template = _template(model)
    return {
        "tokenizer": digest if files else None,
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template else None,
    }


def _template(model: Path) -> str | None:
    if (own := model / "chat_template.jinja").is_file():
        return own.read_text(encoding="utf-8")
    try:
        told = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return told if isinstance(told, str) else json.dumps(told, sort_keys=True) if told else None


def git(folder: Path) -> dict[str, Any] | None:
    """Commit and state of the checkout that a folder is in; None where it is in none, or git is not installed.

    Of changes that are not committed only a hash is kept: what they say may be private.
    """
    commit = _run(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None:
        return None
    inert = ["git", "-C", str(folder), "-c", "core.fsmonitor=false"]  # a checkout's configuration runs nothing
    changed = _run([*inert, "status", "--porcelain", "--untracked-files=normal"])
    diff = _run([*inert, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--binary"])
    dirty = None if changed is None else bool(changed.strip())
    return {
        "commit": commit.decode().strip(),
        "dirty": dirty,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff and dirty else None,
    }


def hardware() -> dict[str, Any]:
    """The machine; without its name."""
    return {
        "cpu": _cpu(),
        "machine": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }


def _cpu() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or None
    named = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or None


def _gpus() -> list[dict[str, str]] | None:
    """Name, driver and memory of each GPU, and the CUDA version that the driver can serve; None where none is known."""
    fields = ("name", "driver_version", "memory.total")
    listed = _run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    if listed is None:
        return None
    about = _run(["nvidia-smi"]) or b""
    cuda = re.search(rb"CUDA Version:\s*([\d.]+)", about)
    rows = [line.split(", ") for line in listed.decode("utf-8", "replace").splitlines() if line.strip()]
    return [dict(zip(fields, row, strict=False)) | {"cuda": cuda[1].decode() if cuda else ""} for row in rows]


def _run(command: list[str]) -> bytes | None:
    """What a program prints; None where it is missing, fails or does not end."""
    program = shutil.which(command[0])
    if program is None:
        return None
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
