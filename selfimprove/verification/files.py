"""Every file of every artifact against its manifest, and every manifest against its seal."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from selfimprove.errors import UserError
from selfimprove.store import Manifest, broken_outputs, broken_seal, read_manifest


class Hashed(NamedTuple):
    """What was found: broken ones as (directory in the run, sentence), and the number of files read."""

    broken: list[tuple[str, str]]
    notes: list[str]
    number: int


def artifacts(run: Path) -> list[str]:
    """The directories of a run's artifacts, whatever its recipe says; links among them are not followed."""
    found = []
    for iteration in sorted(run.glob("iter-*")):
        if iteration.is_symlink() or not iteration.is_dir():
            found.append(iteration.name)
            continue
        for one in sorted(iteration.iterdir()):
            if one.suffix not in (".partial", ".tmp"):  # of a stage that is being made, or was killed
                found.append(f"{iteration.name}/{one.name}")
    return found


def torn(run: Path, directory: str) -> bool:
    """Whether a stage's place cannot be read as an artifact's: a link, or no directory, on the way to it."""
    place = run / directory
    return any(p.is_symlink() or (p.exists() and not p.is_dir()) for p in (place, place.parent))


def check(run: Path, progress: Callable[[int, int], None]) -> Hashed:
    """Read every file of every artifact; `progress` is told of bytes."""
    broken: list[tuple[str, str]] = []
    notes: list[str] = []
    whole: list[tuple[str, Manifest]] = []
    number = 0
    for directory in artifacts(run):
        place = run / directory
        if torn(run, directory):
            broken.append(
                (directory, f"{place} is a symbolic link" if place.is_symlink() else f"{place} is no directory")
            )
            continue
        manifest, sentence = _manifest(place)
        number += 1
        if sentence or manifest is None:
            broken.append((directory, sentence))
            continue
        if not manifest.seal:
            notes.append(f"{place / 'manifest.json'} has no seal: it was written by an earlier version")
        whole.append((directory, manifest))
    total, done = sum(output.bytes for _, manifest in whole for output in manifest.outputs), 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for directory, manifest in whole:
        number += len(manifest.outputs)
        broken += [(directory, sentence) for sentence in _outputs(run, directory, manifest, read)]
    return Hashed(broken, notes, number)


def _outputs(run: Path, directory: str, manifest: Manifest, read: Callable[[int], None]) -> Iterator[str]:
    place = run / directory
    if f"iter-{manifest.iteration:03d}/{manifest.stage}" != directory:
        yield f"{place / 'manifest.json'} is of iter-{manifest.iteration:03d}/{manifest.stage}"
    yield from broken_outputs(place, manifest, read)


def _manifest(place: Path) -> tuple[Manifest | None, str]:
    """The manifest, or what is wrong with it."""
    file = place / "manifest.json"
    if file.is_symlink() or (file.exists() and not file.is_file()):
        return None, f"{file} is {'a symbolic link' if file.is_symlink() else 'no plain file'}"
    if not os.path.lexists(file):
        return None, f"{place} has no manifest.json"
    try:
        manifest = read_manifest(place)
        told = file.read_bytes().decode("utf-8")
    except UserError as error:
        return None, error.message
    wrong = broken_seal(told)
    return manifest, f"{file} {wrong}" if wrong else ""
