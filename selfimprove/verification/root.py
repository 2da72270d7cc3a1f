"""What a run keeps beside its artifacts: run.json, digests.json, templates, the links to the latest and the best."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfimprove.errors import UserError
from selfimprove.plan import TEMPLATES
from selfimprove.recipe import Recipe
from selfimprove.status import standings
from selfimprove.store import Run, key_of, model_files, sha256

DIGESTS = "digests.json"


def check(run: Run, chosen: Recipe | None) -> Iterator[tuple[str, str | None]]:
    """What is wrong, and which file to set aside, where it is made again by itself."""
    for name in ("run.json", DIGESTS):
        path = run.path / name
        told, wrong = _table(path)
        mended = DIGESTS if name == DIGESTS else None
        if wrong:
            yield f"{path} {wrong}", mended
        elif name == DIGESTS and told:
            yield from ((f"{path} has a wrong hash of {outside}", mended) for outside in _wrong_digests(told))
    for text in sorted((run.path / TEMPLATES).glob("*")):
        if text.is_file() and not text.is_symlink() and sha256(text) != text.name and text.suffix != ".tmp":
            yield f"{text} is not the template of that hash", f"{TEMPLATES}/{text.name}"
    for name in ("latest", "best"):
        link = run.path / name
        if link.is_symlink() and len(link.readlink().parts) != 1:
            yield f"{link} points out of the run", name
    if chosen is not None:
        yield from ((sentence, name) for sentence, name, behind in _links(run, chosen) if not behind)


def notes(run: Run, chosen: Recipe) -> list[str]:
    """Links that a run which did not come to its end has not moved yet."""
    later = f"selfimprove resume {run.name} moves it"
    return [f"{sentence}; {later}" for sentence, _, behind in _links(run, chosen) if behind]


def _table(path: Path) -> tuple[dict[str, Any], str]:
    if path.is_symlink():
        return {}, "is a symbolic link"
    if not path.exists():
        return {}, "is missing" if path.name == "run.json" else ""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, f"is damaged: {error}"
    return (told, "") if isinstance(told, dict) else ({}, "is damaged: no table")


def _wrong_digests(told: dict[str, Any]) -> Iterator[str]:
    """Files outside the run that look as they did and hash to something else than is remembered."""
    for name, known in told.items():
        path = Path(name)
        if not isinstance(known, dict) or not {"stamp", "digest"} <= known.keys():
            yield name
            continue
        if not path.exists():
            continue
        inside = model_files(path) if path.is_dir() else [path]
        stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in inside]
        if stamp == known["stamp"]:
            digest = key_of({file.name: sha256(file) for file in inside}) if path.is_dir() else sha256(path)
            if digest != known["digest"]:
                yield name


def _links(run: Run, chosen: Recipe) -> Iterator[tuple[str, str, bool]]:
    """What is wrong with a link, its name, and whether it is only that the run has not moved it yet.

    A run that goes on publishes, then moves the links, then says that it is done. What is read here is read the other
    way round, so that a link is never held against an older standing, nor an older link against a run that is done.
    """
    state = run.read_state()
    unfinished = state is not None and state.state != "done"
    links = {name: run.path / name for name in ("latest", "best")}
    found = {name: link.readlink() if link.is_symlink() else None for name, link in links.items()}
    try:
        known = standings(run, chosen)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return  # scores.json or gate.json is damaged, which is told elsewhere
    for name, target in found.items() if known else ():
        *earlier, wanted = (Path(f"iter-{getattr(standing, name):03d}") for standing in known)
        if target is None:
            yield f"{links[name]} is missing: it would point to {wanted}", name, unfinished
        elif target != wanted and len(target.parts) == 1:
            behind = unfinished and target in earlier and (run.path / target).is_dir()
            yield f"{links[name]} points to {target}, and the {name} round is {wanted}", name, behind
