"""Text that others have written, read without trust: whatever is wrong with a file is told in one sentence."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from selfimprove.errors import UserError

MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
DEEPEST = 200  # tables and lists within one another; Python's own readers give up at about 1000
TOO_DEEP = f"nested more than {DEEPEST} deep"


@contextlib.contextmanager
def opened(path: Path, hint: str = "check the path") -> Iterator[BufferedReader]:
    """A plain file opened for reading its bytes; a pipe or a device, which could wait for ever, is refused.

    Raises:
        UserError: it cannot be read, is a directory, a pipe or a device; also where reading inside the block fails.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise UserError(f"{path} is a pipe or a device, not a file", "save its content to a file first")
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}", hint) from None
    except ValueError as error:  # a name with a null byte; what comes from the block is a UserError or a bug
        if "null byte" not in str(error):
            raise
        raise UserError(f"{str(path)!r} is no file's name: it has a null byte", hint) from None


def read(path: Path, hint: str = "check the path", most: int | None = None) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.
        hint: what to do where it cannot be read.
        most: bytes that it may have.

    Raises:
        UserError: it cannot be read, is no UTF-8 text, or is larger.
    """
    with opened(path, hint) as file:
        content = file.read() if most is None else file.read(most + 1)
    if most is not None and len(content) > most:
        raise UserError(f"{path} is larger than {most >> 20} MiB, which nobody writes by hand", "is it the right file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{path}, line {line}", error, content[:2]) from None


def there(name: str | Path) -> Literal["file", "directory", "else", ""]:
    """What stands at a path; nothing where no file can have that name, or where it is not ours to see."""
    try:
        mode = os.stat(name).st_mode  # noqa: PTH116  # a name that is too long or has a null byte is no error here
    except (OSError, ValueError):
        return ""
    return "file" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "else"


def not_utf8(where: str, error: UnicodeDecodeError, begins: bytes) -> UserError:
    """The error that a text is in another encoding; `begins` is how its file begins."""
    encoding = MARKS.get(begins[:2])
    what = f"it is {encoding}" if encoding else f"{error.reason} at byte {error.start}"
    return UserError(f"{where}: not UTF-8 text: {what}", "save it as UTF-8")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. A key that stands twice is an error: the first would be lost in silence.

    Raises:
        ValueError: no JSON, nested too deep, a number with too many digits, a key that stands twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=table)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if too_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def too_deep(value: Any, left: int = DEEPEST) -> bool:
    """Whether tables and lists stand deeper within one another than our own code, which recurses, can follow."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return left == 0 or any(too_deep(one, left - 1) for one in inner)


def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values, for a JSON decoder's `object_pairs_hook`.

    Raises:
        ValueError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return found


def why(error: ValueError) -> str:
    """What a JSON reader says, in one line."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(";")[0]
