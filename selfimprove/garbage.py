"""`selfimprove gc`: what of finished work takes room and is needed by nobody; sizes first, removed when told so.

Rows, scores, metrics, reports and receipts always stay. Of weights there stay those of the best and the latest round,
the initial ones, whatever the run or one more round of it would read, and whatever another run reads. A file that
another run shares (a hard link) stays too: to remove it here would free nothing.
"""

import os
import stat
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import boundary, collected, recipe_file
from selfimprove.errors import UserError
from selfimprove.plan import BASE, CONTROL_EVALUATE, INITIAL, Sources, examine, steps
from selfimprove.recipe import Recipe
from selfimprove.stages import evaluate
from selfimprove.status import standing
from selfimprove.store import Run, read_manifest, sha256, write_atomically

WEIGHTS, CACHES, SCRATCH, ASIDE, LOGS = "weights of rounds", "caches", "scratch", "weights set aside", "logs"
KINDS = (WEIGHTS, CACHES, SCRATCH, ASIDE, LOGS)


class Item(NamedTuple):
    """A file that can go."""

    kind: str
    path: Path
    bytes: int
    inode: tuple[int, int]
    links: int


class Survey(NamedTuple):
    """What of a run can go, and what stays and why (bytes by reason)."""

    run: Run
    items: list[Item]
    kept: dict[str, int]

    def by_kind(self) -> dict[str, int]:
        """Bytes that removing would free."""
        found: Counter[str] = Counter()
        for item in _each_once(self.items):
            found[item.kind] += item.bytes
        return {kind: found[kind] for kind in KINDS if kind in found}


def survey(runs: Sequence[Run]) -> list[Survey]:
    """Look at runs, all in one folder; their neighbours there may need something of them."""
    read = _read_elsewhere({run.path.resolve() for run in runs}, runs[0].path.parent) if runs else {}
    found = [_survey(run, read.get(run.path.resolve(), set())) for run in runs]
    names = Counter(item.inode for one in found for item in one.items)
    return [_without_shared(one, names) for one in found]


def remove(one: Survey) -> int:
    """Remove what a survey found, as far as it still can go; returns the bytes that this freed.

    What is removed of artifacts is noted first, so that whoever is stopped in between leaves nothing unexplained.

    Raises:
        UserError: somebody writes the run, or a symlink leads out of it.
    """
    with one.run.lock():
        boundary.refuse_links(one.run.path)
        root = one.run.path.resolve()
        now = {
            item.path for item in _survey(one.run, _read_elsewhere({root}, one.run.path.parent).get(root, set())).items
        }
        items = [item for item in one.items if item.path in now]  # the run may have gone on meanwhile
        _note(one.run, [item.path for item in items if item.kind in (WEIGHTS, ASIDE)])
        freed = 0
        for item in items:
            last = item.path.stat().st_nlink == 1
            item.path.unlink()
            freed += item.bytes if last else 0
        for folder in ("scratch", "cache", "logs"):
            _drop_empty(one.run.path / folder)
        return freed


def _survey(run: Run, elsewhere: set[str]) -> Survey:
    chosen = recipe_file.load(run.recipe_file)
    needed = _needed(run, chosen) | dict.fromkeys(elsewhere, "another run starts from it")
    longer = chosen.model_copy(update={"rounds": chosen.rounds + 1})
    examined = {e.step.directory: e for e in examine(run, longer)}
    finished = all(e.status == "done" for e in examine(run, chosen))
    items: list[Item] = []
    kept: Counter[str] = Counter()
    for step in steps(chosen):
        directory = run.path / step.directory
        manifest = read_manifest(directory)
        for output in manifest.outputs if manifest else []:
            if not output.path.endswith(".safetensors") or not _plain(run, path := directory / output.path):
                continue
            source = f"{step.directory}/{output.path.rpartition('/')[0]}"
            known = examined.get(step.directory)
            reason = needed.get(source) or ("" if known and known.status == "done" else "its stage is not finished")
            if reason:
                kept[reason] += output.bytes
            else:
                items.append(_item(WEIGHTS, path))
    items += [_item(ASIDE, path) for path in _files(run, "aside") if path.name.endswith(".safetensors")]
    rest = [
        *(_item(CACHES, path) for path in _files(run, "cache") if path.suffix == ".safetensors"),  # others cost money
        *(_item(SCRATCH, path) for path in _files(run, "scratch")),
        *(_item(LOGS, path) for path in _files(run, "logs")),
    ]
    if finished:
        return Survey(run, items + rest, dict(kept))
    for item in rest:
        kept["the run is not finished"] += item.bytes
    return Survey(run, items, dict(kept))


def _needed(run: Run, chosen: Recipe) -> dict[str, str]:
    """The model directories that stay, as sources of plan.steps, and why."""
    evaluated = [s for s in steps(chosen) if s.stage is evaluate and s.name != CONTROL_EVALUATE]
    policies = {step.iteration: step.models["policy"] for step in evaluated}
    needed: dict[str, str] = {}
    longer = chosen.model_copy(update={"rounds": chosen.rounds + 1})
    sources = Sources(run, longer)
    for one in examine(run, longer):
        for source in one.step.models.values() if one.status != "done" else []:
            resolved = sources.resolve(source)
            for each in policies.values() if resolved is None else [resolved]:  # a gate may decide on any of them
                needed[each] = "the next stages read it"
    if found := standing(run, chosen):
        needed[policies[found.latest]] = "the latest round"
        needed[policies[found.best]] = "the latest and best round" if found.best == found.latest else "the best round"
    return needed | {policies[BASE]: "what the run starts from", INITIAL: "what the run starts from"}


def _read_elsewhere(roots: set[Path], folder: Path) -> dict[Path, set[str]]:
    """The directories within runs that the recipes of runs in the same folder name, as sources."""
    found: dict[Path, set[str]] = {}
    for path in folder.glob("*/recipe.toml"):
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # no run that could go on
        for text in _strings(table):
            named = Path(text)
            if not named.is_absolute():
                continue
            named = named.resolve()
            for root in roots:
                if named.is_relative_to(root):
                    found.setdefault(root, set()).add(named.relative_to(root).as_posix())
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _without_shared(one: Survey, names: Counter[tuple[int, int]]) -> Survey:
    """Without files that have names which this call would not remove."""
    kept, items = Counter(one.kept), []
    for item in one.items:
        if item.links > names[item.inode]:
            kept["shared with another run, so that it frees nothing"] += item.bytes
        else:
            items.append(item)
    return one._replace(items=items, kept=dict(kept))


def _note(run: Run, paths: Iterable[Path]) -> None:
    """Write into each artifact what of it goes."""
    by_artifact: dict[Path, list[Path]] = {}
    for path in paths:
        artifact = next((p for p in path.parents if (p / "manifest.json").is_file()), None)
        if artifact is not None and artifact.is_relative_to(run.path):
            by_artifact.setdefault(artifact, []).append(path)
    for artifact, gone in by_artifact.items():
        manifest, before = read_manifest(artifact), collected.read(artifact)
        listed = {o.path: o.sha256 for o in manifest.outputs} if manifest else {}
        names = [path.relative_to(artifact).as_posix() for path in gone]
        files = {name: listed.get(name) or sha256(artifact / name) for name in names}
        on = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        note = collected.Collected(on=on, files=(before.files if before else {}) | files)
        write_atomically(artifact / collected.FILE, note.model_dump_json(indent=1) + "\n")


def _files(run: Run, folder: str) -> list[Path]:
    """The plain files below a folder of the run; nothing behind a symlink."""
    if (run.path / folder).is_symlink():
        return []
    found = [Path(at) / name for at, _, names in os.walk(run.path / folder) for name in names]
    return sorted(path for path in found if _plain(run, path))


def _plain(run: Run, path: Path) -> bool:
    """Whether a path is a file of the run itself: no link leads to it."""
    try:
        there = stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
    return there and path.parent.resolve() == run.path.resolve() / path.parent.relative_to(run.path)


def _item(kind: str, path: Path) -> Item:
    told = path.stat()
    return Item(kind, path, told.st_size, (told.st_dev, told.st_ino), told.st_nlink)


def _each_once(items: Iterable[Item]) -> Iterator[Item]:
    yield from {item.inode: item for item in items}.values()


def _drop_empty(folder: Path) -> None:
    for at, _, _ in os.walk(folder, topdown=False):
        if not any(Path(at).iterdir()):
            Path(at).rmdir()


def runs_in(folder: Path, name: str | None) -> list[Run]:
    """The run of this name, or all that are here.

    Raises:
        UserError: there is none.
    """
    named = [name] if name else sorted(path.parent.name for path in folder.glob("*/recipe.toml"))
    found = [Run(folder / one) for one in named if boundary.is_run_name(one)]
    found = [run for run in found if run.exists()]
    if not found:
        raise UserError(f"no run {name!r} here" if name else f"no runs in {folder.resolve()}", "selfimprove iterate")
    return found
