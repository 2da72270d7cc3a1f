"""One round of a recipe on a GPU, watched: which share of the time the device is idle, stage by stage.

    python -m tests.gpu.round MODEL --runs FOLDER [--recipe synpo] [--out FILE.json] [--set key=value ...]

Idle: NVML's share of the time in which no kernel ran, read ten times a second (its own window is about as long),
between the end of the stage before and the end of this one. What the run wrote of its engine (starts, swaps) is told.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pynvml

from selfimprove.store import read_manifest

PAUSE = 0.1  # seconds between readings


class Watch(threading.Thread):
    """Readings of the first GPU: (time, share in use, MiB in use, watts)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        pynvml.nvmlInit()
        self._gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.name = pynvml.nvmlDeviceGetName(self._gpu)
        self.readings: list[tuple[float, float, float, float]] = []
        self.over = threading.Event()

    def run(self) -> None:
        """Read until `over`."""
        while not self.over.wait(PAUSE):
            busy = pynvml.nvmlDeviceGetUtilizationRates(self._gpu).gpu / 100
            used = pynvml.nvmlDeviceGetMemoryInfo(self._gpu).used / 2**20
            self.readings.append((time.time(), busy, used, pynvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000))


def mean(values: list[float]) -> float | None:
    """None of nothing."""
    return round(sum(values) / len(values), 3) if values else None


def main() -> None:
    """Run, then tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--recipe", default="synpo")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    settings = [f"model.path={given.model.resolve()}", *given.settings]
    command = [sys.executable, "-m", "selfimprove", "iterate", given.recipe, "--rounds", "1", "--run", "gpu"]
    for one in settings:
        command += ["--set", one]
    watch = Watch()
    watch.start()
    began = time.time()
    ended = subprocess.run(command, cwd=given.runs, check=False)
    took = time.time() - began
    watch.over.set()
    watch.join()
    run, stages, last = given.runs / "runs" / "gpu", [], began
    found = [(path, manifest) for path in sorted(run.glob("iter-*/*")) if (manifest := read_manifest(path))]
    for path, manifest in sorted(found, key=lambda one: (one[1].finished, one[0])):
        end = datetime.strptime(manifest.finished, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp() + 1
        seen = [reading for reading in watch.readings if last <= reading[0] < end]
        stages.append(
            {
                "stage": f"{path.parent.name}/{path.name}",
                "seconds": round(end - last, 1),
                "stage seconds": manifest.seconds,
                "idle": None if not seen else round(1 - sum(r[1] for r in seen) / len(seen), 3),
                "watts": mean([r[3] for r in seen]),
                "peak MiB": max((r[2] for r in seen), default=None),
                "tokens": manifest.tokens,
                "rows": manifest.rows.model_dump(),
                "metrics": {k: v for k, v in manifest.metrics.items() if isinstance(v, int | float)},
            }
        )
        last = end
    log = (run / "logs" / "engine.log").read_text(errors="replace") if (run / "logs" / "engine.log").exists() else ""
    busy = [r[1] for r in watch.readings]
    told = {
        "device": watch.name,
        "command": command[3:],
        "exit code": ended.returncode,
        "seconds": round(took, 1),
        "idle": round(1 - sum(busy) / max(1, len(busy)), 3),
        "engine": re.findall(r"selfimprove: (.*)", log),
        "stages": stages,
    }
    print(json.dumps(told, indent=1))
    if given.out:
        given.out.write_text(json.dumps(told | {"readings": watch.readings}) + "\n", encoding="utf-8")
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
