"""Setting aside what is broken, with what was made from it. Nothing is made here: the run's next resume does that."""

from typing import NamedTuple

from selfimprove import recipe_file
from selfimprove.errors import UserError
from selfimprove.plan import dependents, steps
from selfimprove.run import move_aside, point_links
from selfimprove.store import Run
from selfimprove.verification.checking import Found, Problem


class Repaired(NamedTuple):
    """What was set aside, which stages will run again, and what cannot be mended so."""

    moved: list[str]
    again: list[str]
    left: list[Problem]


def repair(run: Run, found: Found) -> Repaired:
    """Set aside every broken artifact, what was made from it, and files of the run that are made again by themselves.

    Raises:
        UserError: another process writes the run, or its recipe cannot be read.
    """
    left = [problem for problem in found.broken if problem.directory is None and problem.file is None]
    broken = list(dict.fromkeys(problem.directory for problem in found.broken if problem.directory))
    own = list(dict.fromkeys(problem.file for problem in found.broken if problem.file))
    if not broken and not own:
        return Repaired([], [], left)
    try:
        chosen = recipe_file.load(run.recipe_file)
    except UserError as error:
        raise UserError(
            f"nothing was set aside: what follows from what is in {run.recipe_file}, and {error.message}",
            "put the recipe back first: it is what `selfimprove iterate` was given, with every default filled in",
        ) from None
    affected = dependents(chosen, broken)
    strays = [name for name in broken if name not in affected]
    with run.lock():
        moved = move_aside(run, [*affected, *strays, *own])
        point_links(run, chosen)
    known = {step.directory for step in steps(chosen)}
    return Repaired(moved, [name for name in affected if name in known], left)
