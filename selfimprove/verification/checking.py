"""The order of the checks: files first; of artifacts whose files are whole the rows, then what follows from them."""

import re
import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from selfimprove import recipe_file
from selfimprove.errors import UserError
from selfimprove.plan import Sources, Step, dependents, examine, steps, upstream
from selfimprove.recipe import Recipe
from selfimprove.store import Run, read_manifest
from selfimprove.verification import derive, files, lineage, page, root, rows
from selfimprove.verification.tables import At, Unchecked

Progress = Callable[[str, int, int], None]  # what ("hashing", in bytes, or "checking", in stages), done, total


class Problem(NamedTuple):
    """One thing that is wrong."""

    sentence: str
    directory: str | None  # of the artifact, where setting it aside would mend it; else None
    file: str | None = None  # of the run's own, that can be made again


class Found(NamedTuple):
    """What a verification found."""

    broken: list[Problem]
    notes: list[str]  # what could not be checked, or is no fault
    files: int
    seconds: float


def verify(run: Run, progress: Progress = lambda what, done, total: None) -> Found:
    """Check everything that a run has published.

    Args:
        run: its recipe may be damaged.
        progress: told how far it is.
    """
    began = time.monotonic()
    broken: list[Problem] = []
    notes: list[str] = []
    chosen = _recipe(run, broken)
    hashed = files.check(run.path, lambda done, total: progress("hashing", done, total))
    broken += [Problem(sentence, directory) for directory, sentence in hashed.broken]
    notes += hashed.notes
    broken += [Problem(sentence, None, file) for sentence, file in root.check(run, chosen)]
    if chosen is not None:
        notes += root.notes(run, chosen)
        _meaning(run, chosen, broken, notes, progress)
        if not broken:
            told = page.check(run, chosen)
            notes += told.notes
            broken += [Problem(sentence, None, page.FILE) for sentence in told.broken]
    return Found(broken, list(dict.fromkeys(notes)), hashed.number, time.monotonic() - began)


def _recipe(run: Run, broken: list[Problem]) -> Recipe | None:
    try:
        return recipe_file.load(run.recipe_file)
    except UserError as error:
        broken.append(Problem(f"{run.recipe_file} is damaged: {error.message}", None))
        return None


def _meaning(run: Run, chosen: Recipe, broken: list[Problem], notes: list[str], progress: Progress) -> None:
    """What files that are whole say; of one that is made from a broken one nothing is said."""
    known = {step.directory: step for step in steps(chosen)}
    for directory in files.artifacts(run.path):
        if directory not in known:
            broken.append(Problem(f"{run.path / directory} is no stage of {run.recipe_file}", directory))
    faulty = {problem.directory for problem in broken if problem.directory}
    faulty |= {name for name in known if files.torn(run.path, name)}
    stale = dict(_stale(run, chosen, faulty, notes))
    broken += [Problem(sentence, None) for sentences in stale.values() for sentence in sentences]
    sources = Sources(run, chosen)
    published = [s for s in known.values() if (run.path / s.directory / "manifest.json").is_file()]
    sound = [s for s in published if not ({s.directory} | upstream(s)) & faulty]
    for number, step in enumerate(sound):
        progress("checking", number, len(sound))
        if upstream(step) & faulty:  # found just now
            continue
        found = list(_of_step(run, chosen, step, sources, notes, step.directory not in stale))
        broken += [Problem(sentence, step.directory) for sentence in found]
        if found:
            faulty.add(step.directory)
    progress("checking", len(sound), len(sound))


def _of_step(
    run: Run, chosen: Recipe, step: Step, sources: Sources, notes: list[str], comparable: bool
) -> Iterator[str]:
    """What is wrong in one artifact; one that was made from other inputs is not held against those of now."""
    manifest = read_manifest(run.path / step.directory)
    assert manifest is not None  # it was looked at
    at = At(run, chosen, step, manifest, sources)
    wrong = list(rows.check(at))
    yield from wrong
    if wrong or not comparable:  # rows that cannot be read, or are of another kind, can be held against nothing
        return
    for check in (rows.contract, lineage.check, derive.check):
        try:
            yield from check(at)
        except Unchecked as error:
            notes.append(f"{step.directory}: {error}")
        except UserError as error:  # a file outside the run
            notes.append(f"{step.directory}: not checked whole: {error.message}")


def _stale(run: Run, chosen: Recipe, faulty: Collection[str], notes: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Artifacts that the run's recipe does not make, or whose inputs are not those that are there now, and why."""
    try:
        examined = examine(run, chosen)
    except (UserError, ValueError, KeyError, OSError):
        if not faulty:
            raise
        return  # what is broken is named already
    beyond = set(dependents(chosen, faulty)) if faulty else set()
    for one in examined:
        where = run.path / one.step.directory
        if one.status != "stale" or one.step.directory in beyond:
            continue
        sentences, others = [], []
        for reason in one.reason.split("; "):
            if reason.endswith("will be made again"):
                lacking = [name for name in re.findall(r"iter-\d+/[\w-]+", reason) if not (run.path / name).exists()]
                sentences += [f"{where} was made from {name}, which is not there" for name in lacking]
            elif " is gone" in reason:
                notes.append(f"{where}: {reason}")
            else:
                others.append(reason)
        if others:
            sentences.append(f"{where} is not what {run.recipe_file.name} makes: {'; '.join(others)}")
        if sentences:
            yield one.step.directory, sentences
