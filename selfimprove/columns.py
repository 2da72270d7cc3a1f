"""Rows as columns and back: records to Parquet in groups of a few thousand, so that a million rows need no memory.

Columns are built and read as such: a dictionary a row would cost several times the row itself.
"""

import contextlib
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS = 2_048  # of a row group: what a writer and a reader hold at once
Row = TypeVar("Row")


def arrow_schema(record: type) -> "pa.Schema":
    """The Arrow schema of a record type of records.py."""
    import pyarrow as pa

    scalars = {str: pa.string(), int: pa.int64(), float: pa.float64()}

    def arrow(annotation: Any) -> Any:
        if annotation in scalars:
            return scalars[annotation]
        if typing.is_typeddict(annotation):
            return pa.struct([pa.field(k, arrow(v)) for k, v in typing.get_type_hints(annotation).items()])
        if typing.get_origin(annotation) is list:
            return pa.list_(arrow(typing.get_args(annotation)[0]))
        if typing.get_origin(annotation) is types.UnionType:
            return arrow(next(a for a in typing.get_args(annotation) if a is not type(None)))
        raise TypeError(f"{record.__name__}: no Arrow type for {annotation}")

    return pa.schema([pa.field(k, arrow(v)) for k, v in typing.get_type_hints(record).items()])


def table(rows: Sequence[Row], schema: "pa.Schema") -> "pa.Table":
    """Records as a table of this schema."""
    import pyarrow as pa

    columns = zip(*map(operator.attrgetter(*schema.names), rows), strict=True) if rows else ([] for _ in schema.names)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def values(array: "pa.Array") -> list[Any]:
    """The values of a column as Python has them; what `to_pylist` gives, without an Arrow scalar for each number."""
    import pyarrow as pa

    if isinstance(array, pa.ListArray) and not array.null_count:
        ends = array.offsets.to_numpy().tolist()
        flat = values(array.values.slice(ends[0], ends[-1] - ends[0]))
        return [flat[a - ends[0] : b - ends[0]] for a, b in pairwise(ends)]
    if isinstance(array, pa.StructArray) and not array.null_count:
        names = [field.name for field in array.type]
        return [dict(zip(names, row, strict=True)) for row in zip(*map(values, array.flatten()), strict=True)]
    if pa.types.is_floating(array.type) or pa.types.is_integer(array.type):
        numbers: list[Any] = (array.fill_null(0) if array.null_count else array).to_numpy().tolist()
        if array.null_count:
            known = array.is_valid().to_numpy(zero_copy_only=False).tolist()
            return [number if valid else None for number, valid in zip(numbers, known, strict=True)]
        return numbers
    return list(array.to_pylist())


def read(path: Path, record: Callable[..., Row], schema: "pa.Schema", skip: int = 0) -> Iterator[Row]:
    """The records of a Parquet file but for the first, in order, a few thousand at a time.

    A column that the file lacks is unknown.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        groups = list(range(file.num_row_groups))
        while groups and (rows := file.metadata.row_group(groups[0]).num_rows) <= skip:
            del groups[0]
            skip -= rows
        there = set(file.schema_arrow.names)
        names = [name for name in schema.names if name in there]
        for batch in file.iter_batches(GROUP_ROWS, groups, names) if groups else ():
            batch, skip = batch.slice(skip), max(0, skip - len(batch))
            made = [
                values(batch.column(field.name).cast(field.type) if field.name in there else pa.nulls(len(batch)))
                for field in schema
            ]
            yield from map(record, *made)


def read_some(path: Path, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """Some columns of a Parquet file, row by row."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(4 * GROUP_ROWS, columns=names):
            yield from zip(*(values(batch.column(name)) for name in names), strict=True)


def read_plain(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file that somebody else has written, with all their columns."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(GROUP_ROWS):
            yield from batch.to_pylist()


def row_number(path: Path) -> int:
    """How many rows a Parquet file has, by its own word."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Rows, so many at a time."""
    iterator = iter(rows)
    while some := list(islice(iterator, size)):
        yield some


class Writer(Generic[Row]):
    """Writes records into the files `path(0)`, `path(1)`, ..., of `shard_rows` rows each; at least one, if empty.

    A group that is full is converted and written at once: no more than one is held.
    """

    def __init__(self, path: Callable[[int], Path], record: type[Row], shard_rows: int) -> None:
        self._path, self._shard_rows = path, shard_rows
        self._schema = arrow_schema(record)
        self._held: list[Row] = []
        self._file: Any = None
        self._shard = 0  # its number, and the rows that are in it
        self._written = 0
        self.rows = 0

    def add(self, row: Row) -> None:
        """Write a row."""
        self._held.append(row)
        self.rows += 1
        if len(self._held) >= min(GROUP_ROWS, self._shard_rows - self._written):
            self._flush()

    def extend(self, rows: Iterable[Row]) -> None:
        """Write rows."""
        iterator = iter(rows)
        while more := list(islice(iterator, min(GROUP_ROWS, self._shard_rows - self._written) - len(self._held))):
            self._held += more
            self.rows += len(more)
            if len(self._held) >= min(GROUP_ROWS, self._shard_rows - self._written):
                self._flush()

    def close(self) -> None:
        """Write what is held, and end the last file."""
        if self._held or not self.rows:
            self._flush()
        self.abandon()

    def abandon(self) -> None:
        """Let go of the file, whatever is in it."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __enter__(self) -> "Writer[Row]":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # on a full disk; what went wrong first is what is told
            self.abandon()

    def _flush(self) -> None:
        import pyarrow.parquet as pq

        if self._file is None:
            self._file = pq.ParquetWriter(self._path(self._shard), self._schema, compression="zstd")
        self._file.write_table(table(self._held, self._schema))
        self._written += len(self._held)
        self._held = []
        if self._written >= self._shard_rows:
            self.abandon()
            self._shard, self._written = self._shard + 1, 0
