"""The rows of an artifact: readable to the end, of the schema of their kind, each id once, as many as is said."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from selfimprove import recipe
from selfimprove.columns import arrow_schema
from selfimprove.stages import control, discriminate, evaluate, generate, improve, label, synthesize, train
from selfimprove.verification.tables import IDS, ROWS, At, dicts, record, shards

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def check(at: At) -> Iterator[str]:
    """What is wrong with the rows of an artifact by themselves, a sentence each."""
    for table, numbers in sorted(_tables(at).items()):
        if numbers != list(range(len(numbers))):
            yield f"{at.directory / table}-*.parquet: a shard is missing between {numbers[0]:05d} and {numbers[-1]:05d}"
        yield from _read(at, table)


def _tables(at: At) -> dict[str, list[int]]:
    """The tables of an artifact, and the numbers of their shards."""
    found: dict[str, list[int]] = {}
    for name in sorted(output.path for output in at.manifest.outputs):
        if match := re.fullmatch(r"([^/]+)-(\d{5,})\.parquet", name):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def _read(at: At, table: str) -> Iterator[str]:
    """Read a table to its end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = record(at.step, table)
    ids = _Ids(IDS.get(kind, ())) if kind else _Ids(())
    for shard in shards(at.directory, table):
        try:
            file = pq.ParquetFile(shard)
            if kind and not file.schema_arrow.remove_metadata().equals(arrow_schema(kind)):
                yield f"{shard} has not the columns of {kind.__name__}: {_differing(file.schema_arrow, kind)}"
                continue
            empty: Counter[str] = Counter()
            number = 0
            for batch in file.iter_batches(ROWS):
                number += batch.num_rows
                ids.add(batch)
                if kind:
                    empty.update({name: batch.column(name).null_count for name in _needed(kind)})
            if number != file.metadata.num_rows:
                yield f"{shard} has {number} rows, and says {file.metadata.num_rows}"
            yield from (f"{shard}: {n} rows have no {name}" for name, n in empty.items() if n)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield f"{shard} cannot be read: {str(error).splitlines()[0]}"
    if twice := ids.twice(at.directory, table):
        yield f"{at.directory / table}-*.parquet: {twice} stands twice"


def _needed(kind: type) -> list[str]:
    """The fields that may not be null."""
    return [name for name, hint in get_type_hints(kind).items() if type(None) not in get_args(hint)]


def _differing(schema: "pa.Schema", kind: type) -> str:
    wanted = arrow_schema(kind)
    for name in wanted.names:
        if name not in schema.names:
            return f"'{name}' is missing"
        if schema.field(name).type != wanted.field(name).type:
            return f"'{name}' is {schema.field(name).type}, not {wanted.field(name).type}"
    more = [name for name in schema.names if name not in wanted.names]
    return f"'{more[0]}' is none of them" if more else "in another order"


class _Ids:
    """Whether an id stands twice: 8 bytes a row are kept, the ids themselves only where two of these are the same."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self.hashes: list[np.ndarray[Any, Any]] = []

    def add(self, batch: "pa.RecordBatch") -> None:
        """The ids of more rows."""
        import numpy as np

        if self.columns:
            of = zip(*(batch.column(name).to_pylist() for name in self.columns), strict=True)
            self.hashes.append(np.fromiter((hash(one) for one in of), dtype=np.int64, count=batch.num_rows))

    def twice(self, directory: Path, table: str) -> str:
        """An id that more than one row has, as text."""
        import numpy as np

        if not self.hashes:
            return ""
        values, numbers = np.unique(np.concatenate(self.hashes), return_counts=True)
        suspect = set(values[numbers > 1].tolist())
        seen: set[tuple[Any, ...]] = set()
        for row in dicts(directory, table, list(self.columns)) if suspect else ():
            one = tuple(row[name] for name in self.columns)
            if one in seen:
                return "/".join(map(str, one))
            if hash(one) in suspect:
                seen.add(one)
        return ""


# --- the row contract --------------------------------------------------------------------------------------------


def contract(at: At) -> Iterator[str]:
    """The manifest's counts against rows that can be read, a sentence for each that is another."""
    import pyarrow.parquet as pq

    counts = {
        table: sum(pq.ParquetFile(shard).metadata.num_rows for shard in shards(at.directory, table))
        for table in _tables(at)
    }
    rows, manifest = at.manifest.rows, at.directory / "manifest.json"
    reasons = Counter(row["reason"] for row in dicts(at.directory, "quarantine", ["reason"]))
    if dict(reasons) != rows.quarantined:
        yield f"{manifest} counts {rows.quarantined} as quarantined, and quarantine-*.parquet has {dict(reasons)}"
    for what, said, found in _counted(at, counts):
        if said != found:
            yield f"{manifest} says {said} {rows.unit}s {what}, and there are {found}"


def _counted(at: At, counts: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """What the manifest says and what the rows are, where these can be counted."""
    step, rows, section = at.step, at.manifest.rows, at.step.section
    if step.stage is synthesize and isinstance(section, recipe.Synthesize):
        yield "in", rows.rows_in, section.prompts
        yield "out", rows.rows_out, counts.get("prompts", 0)
    elif step.stage is generate:
        yield "out", rows.rows_out, counts.get("generations", 0)
    elif step.stage is improve and isinstance(section, recipe.Improve):
        if section.kind == "gold_distillation":
            yield "out", rows.rows_out, counts.get("refinements", 0)
    elif step.stage is label:
        own = {
            row["prompt_id"]
            for row in dicts(at.directory, "pairs", ["prompt_id", "iteration"])
            if row["iteration"] == step.iteration
        }
        yield "out", rows.rows_out, len(own)
    elif step.stage is discriminate:
        yield "out", rows.rows_out, counts.get("verdicts", 0)
    elif step.stage is evaluate:
        answers = [n for name, n in counts.items() if not name.endswith(("-verdicts", "-comparisons", "quarantine"))]
        yield "out", rows.rows_out, sum(answers)
    elif step.stage is train and rows.unit == "pair":
        given = [at.sources.path(source) for name, source in step.inputs.items() if name.startswith("pairs-")]
        yield "in", rows.rows_in, sum(1 for place in given for _ in dicts(place, "pairs", ["pair_id"]))
    elif step.stage is control:
        yield "in", rows.rows_in, len(at.seeds())
