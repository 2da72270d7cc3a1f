"""Rows of JSON files, one by one, with their line numbers; what is wrong with a file is told in a sentence."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from selfimprove.errors import UserError

Line = tuple[int, Mapping[str, Any]]  # line number, row
AS_JSON = "one JSON object a line, or a JSON array of objects"


def rows(path: Path) -> Iterator[Line]:
    """The objects of a JSON array, or of one JSON object a line, with their line numbers; also of a .gz file.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds no rows.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as raw:
            file = io.TextIOWrapper(raw, encoding="utf-8-sig")
            for number, row in _parsed(file, path):
                yield number, row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}", "check the path") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}", "fetch it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}", "save it as UTF-8") from None
    if not number:
        raise UserError(f"{path} holds no rows", AS_JSON)


def _parsed(file: TextIO, path: Path) -> Iterator[Line]:
    first = True
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _array(line + file.read(), number, path)
            return
        first = False
        where = f"{path}, line {number}"
        try:
            yield number, _object(json.loads(line), where)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {_why(error)}", AS_JSON) from None


def _array(text: str, number: int, path: Path) -> Iterator[Line]:
    """The objects of an array one by one, so that a wrong one can be told by its line."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, seen = text.index("[") + 1, 0
    while True:
        at = between.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty text too
        number += text.count("\n", seen, at)
        seen = at
        where = f"{path}, line {number}"
        if text.startswith("]", at):
            if text[at + 1 :].strip():
                raise UserError(f"{where}: something follows the array", AS_JSON)
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = number + text.count("\n", at, getattr(error, "pos", at))
            raise UserError(f"{path}, line {line}: not JSON: {_why(error)}", AS_JSON) from None
        yield number, _object(row, where)


def _why(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object", AS_JSON)
    return row
