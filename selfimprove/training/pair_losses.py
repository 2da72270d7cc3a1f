"""What every pair cost at every step: a line a step while training goes on, a table of rows once it is done.

The lines lie in the job's scratch beside metrics.jsonl and are cut back with it to the last checkpoint, so that a
training that was killed ends with the same table as one that was not.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from selfimprove.columns import arrow_schema
from selfimprove.records import PairLoss
from selfimprove.training.job import PairRow

GROUP = 65_536  # rows written at a time, so that memory does not grow with the pairs


class ByPair(NamedTuple):
    """Of the pairs of one step, in their order: loss and rewards' margin, as records.PairLoss has them."""

    losses: Sequence[float | None]
    margins: Sequence[float | None]


class PairLosses:
    """The file of one training; the first process's only.

    Args:
        lines: where to keep a line for each step.
        table: the Parquet file to write in the end.
        steps: how many steps are done already, and have their lines.
    """

    def __init__(self, lines: Path, table: Path, steps: int) -> None:
        self.path, self.table = lines, table
        self.whole = cut(lines, steps) == steps  # else a version that kept none began this training
        self._file = lines.open("ab")

    def write(self, step: int, epoch: float, pairs: Sequence[PairRow], found: ByPair) -> None:
        """Keep one step's."""
        names = [pair.pair_id for pair in pairs]
        self._file.write(msgspec.json.encode([step, epoch, names, found.losses, found.margins]) + b"\n")
        self._file.flush()

    def publish(self) -> None:
        """Write the table, a row for each pair and step; none where the lines of some steps are not known."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.whole:
            return
        schema = arrow_schema(PairLoss)
        with pq.ParquetWriter(self.table, schema, compression="zstd") as writer:
            for columns in self._groups():
                writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))

    def _groups(self) -> Iterator[list[list[Any]]]:
        """The table's columns, some rows at a time."""
        columns: list[list[Any]] = [[], [], [], [], []]
        with self.path.open("rb") as lines:
            for line in lines:
                step, epoch, names, losses, margins = msgspec.json.decode(line)
                count = len(names)
                for column, values in zip(
                    columns, (names, [step] * count, [epoch] * count, losses, margins), strict=True
                ):
                    column += values
                if len(columns[0]) >= GROUP:
                    yield columns
                    columns = [[], [], [], [], []]
        if columns[0]:
            yield columns


def cut(path: Path, lines: int) -> int:
    """Keep the first `lines` lines of a file, which is made where it is not there; returns how many it had of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        found = sum(file.readline().endswith(b"\n") for _ in range(lines))
        file.truncate(file.tell())
    return found


def flushed(path: Path) -> None:
    """Wait until a file's lines are on the disk: a checkpoint counts on them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
