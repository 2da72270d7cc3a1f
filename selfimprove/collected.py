"""What `selfimprove gc` removed of an artifact: a note beside its manifest, which still lists the files.

An artifact without these files is as finished as before; whoever needs one of them is told how it is made again.
"""

from collections.abc import Mapping
from pathlib import Path

import pydantic

from selfimprove.errors import UserError

FILE = "collected.json"


class Collected(pydantic.BaseModel):
    """The note."""

    on: str  # UTC
    files: dict[str, str]  # path: sha256


def read(directory: Path) -> Collected | None:
    """The note of an artifact; None where nothing was removed."""
    try:
        return Collected.model_validate_json((directory / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, pydantic.ValidationError):
        return None  # unreadable: then its files count as missing, which is seen


def gone(directory: Path, listed: Mapping[str, str]) -> set[str]:
    """The files, of those listed with their sha256, that are not there and were removed on purpose."""
    note = read(directory)
    if note is None:
        return set()
    return {path for path, digest in listed.items() if note.files.get(path) == digest and not _there(directory / path)}


def told(directory: Path) -> str:
    """What plans and states say of an artifact: "weights removed by gc on DATE"; empty where nothing is gone."""
    note = read(directory)
    return f"weights removed by gc on {note.on[:10]}" if note and gone(directory, note.files) else ""


def require(run: Path, model: Path) -> None:
    """Refuse to use a model of a run whose weights were removed.

    Raises:
        UserError: when, and the command that makes them again.
    """
    if not model.is_relative_to(run):
        return
    iteration, name, *inside = model.relative_to(run).parts
    note = read(run / iteration / name)
    prefix = "".join(f"{part}/" for part in inside)
    if note and any(path.startswith(prefix) for path in gone(run / iteration / name, note.files)):
        raise UserError(
            f"the weights of {iteration}/{name} were removed by gc on {note.on[:10]}",
            f"selfimprove resume {run.name} --from {iteration}/{name} makes them again, and all that is made from them",
        )


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()
