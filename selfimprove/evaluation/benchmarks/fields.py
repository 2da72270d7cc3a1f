"""Fields of rows, checked; what is wrong is told with file, line and field."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import jsonl, textfile
from selfimprove.errors import UserError

LARGEST = 1 << 53  # beyond it floating-point numbers skip whole ones


class Row(NamedTuple):
    """A row and where it is: file and line."""

    where: str
    values: Mapping[str, Any]

    def has(self, name: str) -> bool:
        """Whether the row has a field."""
        return name in self.values

    def any(self, name: str, hint: str = "") -> Any:
        """A field of any type, null too.

        Raises:
            UserError: there is none.
        """
        if name not in self.values:
            told = printable(", ".join(self.values)) or "none"
            raise UserError(f"{self.where}: no field '{name}'", hint or f"fields of this row: {told}")
        return self.values[name]

    def text(self, name: str, hint: str = "") -> str:
        """A text; an empty one is one.

        Raises:
            UserError: it is absent or not a text.
        """
        value = self.any(name, hint)
        if not isinstance(value, str):
            raise self.wrong(name, "a text", hint)
        return value

    def name(self, name: str, hint: str = "") -> str:
        """A text or a whole number that names something, as text.

        Raises:
            UserError: it is absent, empty or of another type.
        """
        value = self.any(name, hint)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.wrong(name, "a text or a whole number", hint)
        return str(value)

    def whole(self, name: str, lowest: int = 0, hint: str = "") -> int:
        """A whole number that is not below the lowest.

        Raises:
            UserError: it is absent or something else.
        """
        value = self.any(name, hint)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= LARGEST:
            raise self.wrong(name, f"a whole number from {lowest}", hint)
        return value

    def number(self, name: str, hint: str = "") -> float | None:
        """A number; None where it is null or NaN.

        Raises:
            UserError: it is absent or of another type.
        """
        value = self.any(name, hint)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not _sane(value):
            raise self.wrong(name, "a number", hint)
        return None if math.isnan(value) else float(value)

    def wrong(self, name: str, needed: str, hint: str = "") -> UserError:
        """The error that a field is not what it has to be."""
        shown = repr(self.values[name])
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return UserError(
            f"{self.where}: field '{name}' is {shown}, not {needed}", hint or "mend the row, or take it out"
        )


def read(path: Path) -> list[Row]:
    """The rows of a JSON, JSONL or .gz file.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds no rows.
    """
    return [Row(f"{path}, line {number}", values) for number, values in jsonl.rows(path)]


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV file with a heading; numbers are numbers.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    try:
        with textfile.opened(path) as raw:
            table = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""))
            if twice := [name for name, n in Counter(table.fieldnames or []).items() if n > 1]:
                raise UserError(f"{path}, line 1: two columns are called '{twice[0]}'", "give each a name of its own")
            if missing := [name for name in columns if name not in (table.fieldnames or [])]:
                told = ", ".join(table.fieldnames or []) or "none"
                raise UserError(f"{path}, line 1: no column '{missing[0]}'", f"columns of this file: {told}")
            for values in table:
                where = f"{path}, line {table.line_num}"
                if None in values:
                    raise UserError(f"{where}: more cells than columns", "one heading, commas between cells, UTF-8")
                yield Row(where, {name: _cell(cell) for name, cell in values.items() if name})
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file: {error}", "one heading, commas between cells, UTF-8") from None


def unused(rows: Iterable[Row], used: Sequence[str]) -> list[str]:
    """The fields that rows have and nobody reads, sorted."""
    return sorted({printable(name) for row in rows for name in row.values if name not in used})


def printable(text: str) -> str:
    """A text from a file as a terminal can show it: what is not printable, as escape codes are, is spelled out."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _sane(value: float) -> bool:
    """Whether a number is one that arithmetic can go on with; NaN stands for none."""
    return (isinstance(value, float) and math.isnan(value)) or abs(value) <= 1e300  # isnan knows no huge integer


def _cell(text: str | None) -> int | float | str | None:
    for kind in (int, float):
        try:
            return kind(text or "")
        except ValueError:
            continue
    return text
