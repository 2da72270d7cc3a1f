"""A look into a run: its iterations, a stage's manifest, some of its rows, the rows for which something holds."""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from selfimprove import plan, status
from selfimprove.errors import UserError
from selfimprove.recipe import Recipe
from selfimprove.report.escape import json_line, line
from selfimprove.rows import HIDDEN, Database, Reader, Rows, main_kind, published
from selfimprove.store import Manifest, Run, intact, read_manifest


def look(run: Run, recipe: Recipe, where: str | None, sample: int) -> dict[str, Any]:
    """What stands at `2` or `2/label` (or at the run itself), with `sample` rows of each kind.

    Raises:
        UserError: no such iteration or stage, or nothing published there.
    """
    if where is None:
        return status.summary(run, recipe)
    chosen, name = at(run, recipe, where), "/" in where
    stages = []
    for step in chosen:
        directory = run.path / step.directory
        manifest = read_manifest(directory)
        if manifest is None and name:
            raise UserError(f"{step.directory} is not made yet", f"selfimprove resume {run.name}")
        if manifest:
            stages.append(_stage(step.directory, directory, manifest, sample))
    return {"run": run.name, "stages": stages}


def at(run: Run, recipe: Recipe, where: str) -> list[plan.Step]:
    """The steps of `2`, or the one of `2/label`.

    Raises:
        UserError: the recipe has none there.
    """
    if "/" in where:
        return [plan.find_step(recipe, where)]
    steps = list(plan.steps(recipe))
    number = where.removeprefix("iter-")
    chosen = [s for s in steps if number.isdecimal() and s.iteration == int(number)]
    if not chosen:
        raise UserError(f"run '{run.name}' has no iteration '{where}'", f"0 to {steps[-1].iteration}, or as 2/label")
    return chosen


class Asked:
    """Rows of one kind that were asked for: of a stage, an iteration or the whole run, those for which something holds.

    Args:
        run: whose.
        recipe: of the run.
        stage: `2`, `2/label`, or None for all.
        kind: of the rows; the stage's own, or pairs, where it is None.
        where: an SQL expression over their columns, or None for all.
    """

    def __init__(self, run: Run, recipe: Recipe, stage: str | None, kind: str | None, where: str | None) -> None:
        steps = list(plan.steps(recipe)) if stage is None else at(run, recipe, stage)
        self.run, self.stage, self.kind_given, self.where = run, stage, kind, where
        self._database = Database(run)
        self._reader = Reader(run, steps, self._database)
        if not any(published(run, steps)):
            raise UserError(f"{stage or 'nothing'} is not made yet", f"selfimprove resume {run.name}")
        self.kind = kind or main_kind(steps[0] if stage and "/" in stage else None, self._reader.kinds)
        rows = self._reader.open(self.kind)
        self.rows: Rows = rows.where(where) if where else rows

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.__exit__()

    def first(self, number: int) -> dict[str, Any]:
        """How many there are, and the first of them, less their token ids."""
        rows = self.rows.readable()
        about = {"run": self.run.name, "stage": self.stage, "kind": self.kind, "where": self.where}
        return {**about, "total": self.rows.count(), "columns": rows.columns, "rows": rows.first(number)}

    def stream(self, number: int | None) -> None:
        """Print the rows whole, one a line; the first of them where a number is given."""
        for row in itertools.islice(self.rows, number):
            print(json_line(row))

    def show(self, number: int, console: Console) -> None:
        """Print how many there are and the first of them."""
        found = self.first(number)
        _show_rows(found["rows"], console)
        shown, total = len(found["rows"]), found["total"]
        of = f"{total:,} {line(self.kind)}" + (f" where {line(self.where)}" if self.where else "")
        if shown == total:
            console.print(Text(f"all of {of}" if total else f"no {of.removeprefix('0 ')}"))
            return
        options = [
            word
            for name, value in (("--rows", self.kind_given), ("--where", self.where))
            if value
            for word in (name, value)
        ]
        words = ["selfimprove", "inspect", self.run.name, *([self.stage] if self.stage else []), *options, "--jsonl"]
        console.print(Text(f"{shown:,} of {of}; all of them: {line(shlex.join(words))}"), soft_wrap=True)


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
            _show_rows(rows, console)


def _show_rows(rows: list[dict[str, Any]], console: Console) -> None:
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
