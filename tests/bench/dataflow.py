"""A million prompts through the real stages synthesize, generate and label (with pairs): what it takes.

The embedded world has templates and few words, so that nearly all of a million of its prompts would be near duplicates
of others, and are set aside. A stand-in writes what the fake engine would write: prompts of twelve words drawn from
the tokenizer's, which are distinct, and answers, half of which end in the word that the checker looks for. All else is
the product's own: templates, tokenizer, shards, decontamination and deduplication, files, manifests with their hashes.

    python -m tests.bench.dataflow --rows 10000 100000 --out FILE.json
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pyarrow.parquet as pq

from selfimprove import recipe_file, run
from selfimprove.data import SHIPPED
from selfimprove.engine import fake_engine
from selfimprove.execution import Executors
from selfimprove.plan import Step
from selfimprove.store import Manifest, Run

SAMPLES = 4
STAGES = ("synthesize", "generate", "label")
WORDS = 12  # of a prompt
SETTINGS = [
    "engine.kind='fake'",
    f"generate.n={SAMPLES}",
    "label.judge={name='verifier', checker='regex', pattern='done$'}",
    "label.pairing={name='best_vs_worst'}",
    "evaluate.n=1",
    "synthesize.generator.epochs=1",
    "data.seeds='seeds.jsonl'",
    "data.heldout='heldout.jsonl'",
]


class Stage(NamedTuple):
    """What a stage took."""

    prompts: int  # of the whole run
    name: str
    rows_in: int
    rows_out: int  # rows of all kinds that it wrote
    seconds: float
    cpu_seconds: float  # of this process, its threads and its ended children
    peak_mib: float  # resident set of this process, high-water mark within the stage
    before_mib: float  # resident set when it began
    output_mb: float

    @property
    def rate(self) -> float:
        """Rows written a second."""
        return self.rows_out / self.seconds


class Watch:
    """See run.Display: notes time and memory of each stage."""

    def __init__(self, folder: Path, prompts: int) -> None:
        self.folder, self.prompts = folder, prompts
        self.stages: list[Stage] = []

    def started(self, step: Step, number: int, total: int) -> None:
        """The high-water mark is set back."""
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")
        self._began = time.perf_counter(), _cpu()

    def finished(self, step: Step, manifest: Manifest, scores: dict[str, Any] | None) -> None:
        """A stage of the benchmark is published."""
        name = step.name.partition("-")[2]
        if name not in STAGES:
            return
        files = [self.folder / step.directory / output.path for output in manifest.outputs]
        rows = sum(pq.read_metadata(path).num_rows for path in files if path.suffix == ".parquet")
        self.stages.append(
            Stage(
                self.prompts,
                name,
                manifest.rows.rows_in,
                rows,
                time.perf_counter() - self._began[0],
                _cpu() - self._began[1],
                _resident("VmHWM"),
                self._before,
                sum(output.bytes for output in manifest.outputs) / 1e6,
            )
        )
        print(line(self.stages[-1]), flush=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """Nothing is drawn."""

    def stopping(self) -> None:
        """Nothing is drawn."""

    def waiting(self, what: str) -> None:
        """Nothing is drawn."""


def stand_in(words: Sequence[str]) -> Any:
    """What is written to a request: a prompt of these words, or an answer that is right half of the time."""

    def reply(text: str, rng: random.Random) -> str:
        if "using some of these keywords" in text:
            return f"<question> {' '.join(rng.choices(words, k=WORDS))} </question> <solution> none </solution>"
        said = " ".join(rng.choices(words, k=WORDS // 2))
        return f"{said} done" if rng.random() < 0.5 else said

    return reply


HOOK = """
import os
if os.environ.get("DATAFLOW_WORDS"):  # in a worker: its fake engine writes what the stand-in does
    from selfimprove.engine import fake_engine
    from tests.bench.dataflow import stand_in
    fake_engine._reply = stand_in(os.environ["DATAFLOW_WORDS"].split())
"""


def measure(prompts: int, folder: Path, workers: int = 1) -> list[Stage]:
    """One run of so many prompts in a fresh folder, which is the working directory meanwhile."""
    with _inside(folder):
        for name in ("seeds", "heldout"):
            lines = SHIPPED[f"demo:{name}"].read_text(encoding="utf-8").splitlines(keepends=True)
            Path(f"{name}.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
        settings = [*SETTINGS, f"synthesize.prompts={prompts}", f"machine.workers={workers}"]
        chosen = recipe_file.load(recipe_file.find("default"), settings)
        tokenizer = json.loads((SHIPPED["demo:model"] / "tokenizer.json").read_text(encoding="utf-8"))
        words = sorted(token[1:] for token in tokenizer["model"]["vocab"] if token[1:].isalpha() and token[0] == "Ġ")
        at, watch = Run(folder / "run"), Watch(folder / "run", prompts)
        (folder / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
        paths = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
        reaches_workers = mock.patch.dict(os.environ, {"PYTHONPATH": paths, "DATAFLOW_WORDS": " ".join(words)})
        with reaches_workers, mock.patch.object(fake_engine, "_reply", stand_in(words)), Executors() as executors:
            run.iterate(at, chosen, watch, [], executors, selection=run.select(chosen, None, "1/label", None))
        return watch.stages


def total(stages: Sequence[Stage]) -> dict[str, float]:
    """Of the whole flow."""
    rows, seconds = sum(stage.rows_out for stage in stages), sum(stage.seconds for stage in stages)
    return {
        "prompts": stages[0].prompts,
        "rows": rows,
        "seconds": seconds,
        "cpu_seconds": sum(stage.cpu_seconds for stage in stages),
        "rows_per_second": rows / seconds,
        "prompts_per_second": stages[0].prompts / seconds,
        "peak_mib": max(stage.peak_mib for stage in stages),
    }


HEAD = """\
|   prompts | stage      |   rows in |  rows out | seconds |     CPU |  rows/s | from MiB | peak MiB |     MB |
|----------:|:-----------|----------:|----------:|--------:|--------:|--------:|---------:|---------:|-------:|"""


def line(stage: Stage) -> str:
    """Of the table."""
    return (
        f"| {stage.prompts:9,} | {stage.name:10} | {stage.rows_in:9,} | {stage.rows_out:9,} | {stage.seconds:7.1f} |"
        f" {stage.cpu_seconds:7.1f} | {stage.rate:7,.0f} | {stage.before_mib:8.0f} | {stage.peak_mib:8.0f} |"
        f" {stage.output_mb:6.1f} |"
    )


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def _cpu() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    """Measure each number of prompts, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, default=1, help="processes of the fake engine; 1 = this process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="for the runs; each is removed when it is measured")
    given = parser.parse_args()
    print(HEAD)
    found = []
    for prompts in given.rows:
        folder = Path(tempfile.mkdtemp(dir=given.folder))
        try:
            found.append(measure(prompts, folder, given.workers))
        finally:
            shutil.rmtree(folder)
        told = total(found[-1])
        print(
            f"{told['prompts']:,} prompts: {told['rows']:,} rows in {told['seconds']:.1f} s"
            f" ({told['cpu_seconds']:.1f} s of CPU): {told['rows_per_second']:,.0f} rows/s,"
            f" {told['prompts_per_second']:,.0f} prompts/s, peak {told['peak_mib']:,.0f} MiB",
            file=sys.stderr,
        )
    if given.out:
        told = [{"total": total(stages), "stages": [stage._asdict() for stage in stages]} for stages in found]
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
