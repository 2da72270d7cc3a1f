"""A look into a run: its iterations, a stage's manifest, some of its rows."""

import itertools
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from selfimprove import plan, status
from selfimprove.errors import UserError
from selfimprove.recipe import Recipe
from selfimprove.report.escape import line
from selfimprove.store import Manifest, Run, intact, read_manifest

HIDDEN = ("prompt_token_ids", "token_ids", "logprobs", "chosen_token_ids", "rejected_token_ids")  # long and unreadable


def look(run: Run, recipe: Recipe, where: str | None, sample: int) -> dict[str, Any]:
    """What stands at `2` or `2/label` (or at the run itself), with `sample` rows of each kind.

    Raises:
        UserError: no such iteration or stage, or nothing published there.
    """
    steps = list(plan.steps(recipe))
    if where is None:
        return status.summary(run, recipe)
    number, _, name = where.removeprefix("iter-").partition("/")
    chosen = [s for s in steps if number.isdecimal() and s.iteration == int(number) and _called(s.name, name)]
    if not chosen:
        known = ", ".join(f"{s.iteration}/{s.name.partition('-')[2]}" for s in steps)
        raise UserError(f"run '{run.name}' has no stage '{where}'", f"stages: {known}")
    stages = []
    for step in chosen:
        directory = run.path / step.directory
        manifest = read_manifest(directory)
        if manifest is None and name:
            raise UserError(f"{step.directory} is not made yet", f"selfimprove resume {run.name}")
        if manifest:
            stages.append(_stage(step.directory, directory, manifest, sample))
    return {"run": run.name, "stages": stages}


def show(looked: dict[str, Any], console: Console) -> None:
    """Print what `look` found; whatever a model wrote is shown as text."""
    if "iterations" in looked:
        from selfimprove.report import terminal

        console.print(terminal.stages_table(looked))
        console.print(terminal.evaluations(looked))
        return
    for stage in looked["stages"]:
        about = f"  key {stage['key'][:12]}, {stage['seconds']} s, {stage['finished']}"
        console.print(Text.assemble((stage["stage"], "bold"), line(about)))
        for heading in ("rows", "metrics", "section"):
            console.print(f"  {heading}: {_plain(stage[heading])}", markup=False, highlight=False)
        console.print(f"  files: {line(', '.join(stage['files']))}", markup=False, highlight=False)
        for kind, rows in stage["samples"].items():
            console.print(Text(f"  {line(kind)}", "bold"))
            for row in rows:
                for field, value in row.items():
                    console.print(Text.assemble((f"    {line(field)}: ", "dim"), _plain(value)))
                console.print()


def _stage(name: str, directory: Path, manifest: Manifest, sample: int) -> dict[str, Any]:
    return {
        "stage": name,
        "key": manifest.key,
        "finished": manifest.finished,
        "seconds": manifest.seconds,
        "tokens": manifest.tokens,
        "rows": manifest.rows.model_dump(),
        "metrics": manifest.metrics,
        "section": manifest.ingredients["section"],
        "files": [output.path for output in manifest.outputs],
        "samples": rows_of(directory, sample),
    }


def rows_of(directory: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """The first `count` rows of each kind of row in an artifact, without the columns of token ids."""
    import pyarrow.parquet as pq

    found: dict[str, list[dict[str, Any]]] = {}
    for shard in sorted(directory.glob("*-00000.parquet")):
        file = pq.ParquetFile(intact(shard))
        columns = [name for name in file.schema_arrow.names if name not in HIDDEN]
        batches = file.iter_batches(batch_size=max(1, count), columns=columns)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        found[shard.name.removesuffix("-00000.parquet")] = list(itertools.islice(rows, count))
    return found


def _called(name: str, wanted: str) -> bool:
    return not wanted or wanted in (name, name.partition("-")[2])


def _plain(value: Any) -> str:
    return line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
