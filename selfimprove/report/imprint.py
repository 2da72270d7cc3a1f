"""The last line of a report: which state of the run it shows, and a hash of the page, so that `verify` can tell.

One page of one state is one text: written twice, it is the same.
"""

import hashlib
import json
import re
from typing import Any, NamedTuple

from selfimprove import __version__
from selfimprove.plan import examine
from selfimprove.recipe import Recipe
from selfimprove.recipe_file import dump
from selfimprove.store import Run, key_of, sha256

GENERATOR = '<meta name="generator" content="selfimprove">'
_LAST = re.compile(r"<!-- selfimprove (\{[^<>]*\}) -->\n\Z")


class Imprint(NamedTuple):
    """What a page says of itself."""

    fingerprint: str  # of the run
    version: str  # of the program
    encoder: bool  # whether a text encoder measured something
    altered: bool  # whether the page is another one than was written


def stamp(page: str, run: Run, recipe: Recipe, encoder: bool) -> str:
    """The page with its imprint."""
    body = page.rstrip("\n") + "\n"
    told: dict[str, Any] = {"fingerprint": fingerprint(run, recipe), "version": __version__, "encoder": encoder}
    told["page"] = _hash(body, told)
    return f"{body}<!-- selfimprove {json.dumps(told, sort_keys=True)} -->\n"


def read(page: str) -> Imprint | None:
    """The imprint of a page; None where it has none that can be read."""
    found = _LAST.search(page)
    if found is None:
        return None
    try:
        told = json.loads(found[1])
        rest = {name: told[name] for name in ("fingerprint", "version", "encoder")}
    except (ValueError, KeyError):
        return None
    whole = found[1] == json.dumps(told, sort_keys=True) and told.get("page") == _hash(page[: found.start()], rest)
    return Imprint(str(rest["fingerprint"]), str(rest["version"]), bool(rest["encoder"]), not whole)


def fingerprint(run: Run, recipe: Recipe) -> str:
    """A hash of all that a page is made from: manifests, which hold the hash of every file, recipe, state and links.

    What became of the files outside the run is in the reasons why a stage is stale.
    """
    state = run.read_state()
    links = {name: str(p.readlink()) for name in ("latest", "best") if (p := run.path / name).is_symlink()}
    manifests = {
        path.parent.relative_to(run.path).as_posix(): sha256(path)
        for path in sorted(run.path.glob("iter-*/*/manifest.json"))
        if path.parent.suffix != ".partial"
    }
    return key_of(
        {
            "recipe": dump(recipe),
            "state": (state.state, state.error, state.iteration, state.stage) if state else None,
            "about": run.about(),
            "links": links,
            "manifests": manifests,
            "stale": {one.step.directory: one.reason for one in examine(run, recipe) if one.status == "stale"},
        }
    )


def _hash(body: str, told: dict[str, Any]) -> str:
    return hashlib.sha256((body + json.dumps(told, sort_keys=True)).encode()).hexdigest()
