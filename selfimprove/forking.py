"""A new run that shares what an earlier one has made up to a stage, and goes on from there under a changed recipe.

What is shared are hard links, which cost no space: published files are never written into, only unlinked.
"""

import json
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import recipe_file
from selfimprove.errors import UsageError, UserError
from selfimprove.models import is_hub_id, locate_model
from selfimprove.plan import TEMPLATES, Examined, Step, called, examine, find_step, steps
from selfimprove.preflight import check
from selfimprove.recipe import Recipe
from selfimprove.run import environment, place, point_links
from selfimprove.store import Artifact, Run, read_manifest, write_atomically

KEPT = (TEMPLATES, "receipts")  # folders of a run that its artifacts refer to by content


class Forked(NamedTuple):
    """What a fork has in common with its parent."""

    run: Run
    at: Step  # the first stage that is its own
    shared: list[str]  # directories of artifacts
    shared_bytes: int
    copied: int  # files, where the file system makes no links


def parse(text: str) -> tuple[str, str]:
    """`RUN@2/label` or `RUN@2` as the run's name and the place.

    Raises:
        UsageError: it has no place.
    """
    name, at, where = text.rpartition("@")
    if not (name and at and where):
        raise UsageError(
            f"'{text}' does not say where to fork", f"for example selfimprove fork {text.strip('@')}@2/label"
        )
    return name, where


def point(recipe: Recipe, where: str) -> Step:
    """The first stage that a fork makes itself; `2` is the beginning of iteration 2.

    Raises:
        UserError: the recipe has no such stage or iteration.
    """
    if where.isdecimal():
        for step in steps(recipe):
            if step.iteration == int(where):
                return step
        raise UserError(f"no iteration {where}", f"the recipe has {recipe.rounds}; --set rounds=N gives it more")
    return find_step(recipe, where)


def fork(parent: Run, changed: Recipe, where: str, name: str | None, command: Sequence[str]) -> Forked:
    """Make the new run; it is there whole or not at all, and the parent stays as it is.

    Args:
        parent: a run; what comes before `where` must be done there.
        changed: the new run's recipe.
        where: `2/label` or `2`.
        name: of the new run; unset = the parent's and a number.
        command: what the user typed, for run.json.

    Raises:
        UserError: something before `where` is not made, or the changed recipe would make it otherwise.
    """
    at = point(changed, where)
    before = _before(parent, changed, at, command)
    new = place(parent.path.parent, name or _free_name(parent))
    if new.path.exists():
        raise UserError(f"run '{new.name}' exists already", "--run ANOTHER_NAME")
    check(changed)
    making = Run(new.path.with_name(f".{new.name}.{os.getpid()}.partial"))
    making.path.mkdir()
    try:
        copied = sum(_share(parent, making, one.step) for one in before)
        _describe(parent, making, new.name, changed, at, command)
        point_links(making, changed)
        making.path.rename(new.path)
    except BaseException:
        shutil.rmtree(making.path, ignore_errors=True)
        raise
    size = sum(output.bytes for one in before if one.manifest for output in one.manifest.outputs)
    return Forked(new, at, [one.step.directory for one in before], size, copied)


def _before(parent: Run, changed: Recipe, at: Step, command: Sequence[str]) -> list[Examined]:
    """What comes before a step, all of it made by the parent as the changed recipe would make it."""

    def earlier(step: Step) -> str:
        """The user's command with another place."""
        there = f"{parent.name}@{called(step)}"
        words = [there if word.startswith(f"{parent.name}@") else word for word in command]
        return shlex.join(["selfimprove", *(words if there in words else ["fork", there])])

    found: list[Examined] = []
    for one in examine(parent, changed):
        if one.step.directory == at.directory:
            return found
        if one.status == "to do":
            raise UserError(
                f"{one.step.directory} of run '{parent.name}' is not made yet, and {at.directory} comes after it",
                f"{earlier(one.step)}, or selfimprove resume {parent.name} first",
            )
        if one.status == "stale":
            raise UserError(
                f"{one.step.directory} comes before {at.directory} and cannot be shared: {one.reason}",
                f"fork earlier: {earlier(one.step)}",
            )
        found.append(one)
    raise UserError(f"a gate ended run '{parent.name}' before {at.directory}", f"selfimprove gate {parent.name}")


def _share(parent: Run, new: Run, step: Step) -> int:
    """Link an artifact; returns how many files had to be copied."""
    published = parent.path / step.directory
    manifest = read_manifest(published)
    try:
        if manifest is None:
            raise FileNotFoundError(published)
        return Artifact(new.path / step.directory).link(published, manifest)
    except FileNotFoundError:
        raise UserError(
            f"{step.directory} of run '{parent.name}' went away meanwhile", f"selfimprove status {parent.name}"
        ) from None


def _describe(parent: Run, new: Run, name: str, changed: Recipe, at: Step, command: Sequence[str]) -> None:
    """Write what a run has beside its artifacts; `name` is what it will be called."""
    (new.path / ".gitignore").write_text("*\n", encoding="utf-8")
    for folder in KEPT:
        if (parent.path / folder).is_dir():
            shutil.copytree(parent.path / folder, new.path / folder)
    if (parent.path / "digests.json").is_file():
        shutil.copyfile(parent.path / "digests.json", new.path / "digests.json")
    about: dict[str, Any] = {"run": name, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    about |= {"command": list(command), "environment": environment()}
    about["forked_from"] = {"run": parent.name, "at": at.directory}
    if is_hub_id(changed.model.path):
        same = recipe_file.load(parent.recipe_file).model == changed.model
        known = parent.about().get("revision") if same else None
        about["revision"] = known or locate_model(changed.model.path).name
    write_atomically(new.path / "run.json", json.dumps(about, indent=1) + "\n")
    write_atomically(new.recipe_file, recipe_file.dump(changed))


def _free_name(parent: Run) -> str:
    """`default-2`, or the first number that is free."""
    number = 2
    while Path(f"{parent.path}-{number}").exists():
        number += 1
    return f"{parent.name}-{number}"
