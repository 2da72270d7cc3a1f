"""What method a recipe is, in words, and its settings without what names the machine that it ran on."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomlkit

from selfimprove import recipe_file
from selfimprove.recipe import Recipe

KEPT = ("Method", "Labels", "Deviates")  # of a header; its other fields are about other runs
UNSAID = ("url", "api_key_env")  # of a server: where it is, and where its key is


class Method(NamedTuple):
    """What the shipped recipe of the same name says."""

    about: str
    told: dict[str, str]  # the fields KEPT of its header
    changed: dict[str, tuple[Any, Any]]  # settings: the shipped recipe's, this run's


def method(chosen: Recipe) -> Method | None:
    """The header of the shipped recipe of this name, and what the run has changed; None where none is shipped."""
    path = next((path for path in recipe_file.shipped_recipes() if path.stem == chosen.name), None)
    if path is None:
        return None
    header = path.read_text(encoding="utf-8").partition("\n\n")[0]
    first, *lines = [line.removeprefix("#") for line in header.splitlines()]
    told: dict[str, str] = {}
    name = ""
    for line in lines:
        if field := re.match(r" ([A-Z][a-z]+): +(.*)", line):
            name, line = field[1], field[2]
        if name in KEPT:
            told[name] = f"{told.get(name, '')} {line.strip()}".strip()
    known = recipe_file.absolute(recipe_file.load(path))
    changed = {
        key: (anonymous(a), anonymous(b))
        for key, (a, b) in recipe_file.side_by_side([known, chosen], {"machine", "rounds"}).items()
        if not (key.startswith("servers.") and key.endswith(UNSAID))
    }
    return Method(first.strip().removeprefix(f"{path.stem}: "), told, changed)


def papers(chosen: Recipe, said: Method | None) -> list[str]:
    """The arXiv numbers that the recipe's header and the losses of the run name, in order."""
    from selfimprove.training.losses import LOSSES  # torch takes seconds to import

    losses = chosen.train.loss if isinstance(chosen.train.loss, list) else [chosen.train.loss]
    texts = [said.about, *said.told.values()] if said else []
    texts += [inspect.getdoc(LOSSES[loss.name].function) or "" for loss in losses]
    return list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", " ".join(texts))))


def settings(chosen: Recipe) -> str:
    """The recipe as TOML without [machine], absolute paths and the addresses of servers."""
    table = chosen.model_dump(exclude_none=True, exclude={"machine"})
    for server in table["servers"].values():
        for key in UNSAID:
            server.pop(key, None)
    return tomlkit.dumps(anonymous(table))


def anonymous(value: Any) -> Any:
    """The value with every absolute path in it shortened to its last part."""
    if isinstance(value, Mapping):
        return {key: anonymous(of) for key, of in value.items()}
    if isinstance(value, list):
        return [anonymous(of) for of in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
