"""Rows of JSON files, one by one, with their line numbers; what is wrong with a file is told in a sentence."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from selfimprove import textfile
from selfimprove.errors import UserError

Line = tuple[int, Mapping[str, Any]]  # line number, row
AS_JSON = "one JSON object a line, or a JSON array of objects"
BOM = b"\xef\xbb\xbf"


def rows(path: Path) -> Iterator[Line]:
    """The objects of a JSON array, or of one JSON object a line, with their line numbers; also of a .gz file.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds no rows.
    """
    number = 0
    with textfile.opened(path) as file:
        try:
            lines = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            for number, row in _parsed(lines, path):
                yield number, row
        except gzip.BadGzipFile as error:
            raise UserError(f"{path} is no .gz file: {error}", "name it without .gz, or compress it") from None
        except (EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}", "fetch it again") from None
    if not number:
        raise UserError(f"{path} holds no rows", AS_JSON)


def _parsed(file: Iterable[bytes], path: Path) -> Iterator[Line]:
    first, begins = True, b""
    lines = iter(file)
    for number, raw in enumerate(lines, 1):
        begins = begins or raw[:2]
        line = _decoded(raw.removeprefix(BOM) if number == 1 else raw, path, number, begins)
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            rest = (_decoded(one, path, at, begins) for at, one in enumerate(lines, number + 1))
            yield from _array(line + "".join(rest), number, path)
            return
        first = False
        where = f"{path}, line {number}"
        try:
            yield number, _object(textfile.parse_json(line), where)
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {textfile.why(error)}", AS_JSON) from None


def _decoded(raw: bytes, path: Path, number: int, begins: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise textfile.not_utf8(f"{path}, line {number}", error, begins) from None


def _array(text: str, number: int, path: Path) -> Iterator[Line]:
    """The objects of an array one by one, so that a wrong one can be told by its line."""
    decoder = json.JSONDecoder(object_pairs_hook=textfile.table)
    between = re.compile(r"\s*(,?)\s*")
    at, seen, some = text.index("[") + 1, 0, False
    while True:
        found = between.match(text, at)
        assert found  # it matches the empty text too
        at = found.end()
        number += text.count("\n", seen, at)
        seen = at
        where = f"{path}, line {number}"
        if text.startswith("]", at):
            if text[at + 1 :].strip():
                raise UserError(f"{where}: something follows the array", AS_JSON)
            if some and found[1]:
                raise UserError(f"{where}: not JSON: a comma before the array's end", AS_JSON)
            return
        try:
            if some != bool(found[1]):
                raise ValueError("a comma stands where none belongs" if found[1] else "a comma is missing")
            row, at = decoder.raw_decode(text, at)
            if textfile.too_deep(row):
                raise ValueError(textfile.TOO_DEEP)
        except (ValueError, RecursionError) as error:
            line = number + text.count("\n", at, getattr(error, "pos", at))
            told = textfile.why(error) if isinstance(error, ValueError) else textfile.TOO_DEEP
            raise UserError(f"{path}, line {line}: not JSON: {told}", AS_JSON) from None
        some = True
        yield number, _object(row, where)


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object", AS_JSON)
    return row
