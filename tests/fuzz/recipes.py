"""Recipes that are nearly right: shipped ones and ones built from the models' fields, changed; and `--set` strings."""

import inspect
import json
import random
import tomllib
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
import tomlkit

from selfimprove import recipe_file
from selfimprove.judges import JUDGES
from selfimprove.judges.pairing import RULES
from selfimprove.recipe import Choice, Recipe
from tests.fuzz import mutation

NAMES = ["dpo", "simpo", "ipo", "kto", "sppo", "verifier", "rubric", "pairwise", "self_consistency", *JUDGES, *RULES]


@cache
def tables() -> list[dict[str, Any]]:
    """The shipped recipes."""
    return [tomllib.loads(path.read_text(encoding="utf-8")) for path in recipe_file.shipped_recipes()]


def draw(rng: random.Random) -> tuple[bytes, list[str]]:
    """A recipe file and `--set` values."""
    table: Any = rng.choice(tables())
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        table = mutation.structure(rng, table, mutation.toml_value) if rng.random() < 0.4 else known(rng, table)
        if not isinstance(table, dict):
            table = {"recipe": table}
    try:
        text = tomlkit.dumps(table).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError):  # what no TOML can say
        text = b"name = 3\n"
    if rng.random() < 0.15:
        text = mutation.content(rng, text)
    return text, [setting(rng, table) for _ in range(rng.choice([0, 0, 0, 1, 2]))]


def known(rng: random.Random, table: dict[str, Any]) -> dict[str, Any]:
    """A field that the models have, with a value that its type may or may not allow."""
    path, annotation = rng.choice(every_field())
    changed: dict[str, Any] = json.loads(json.dumps(table, default=str))
    at: Any = changed
    for name in path[:-1]:
        if not isinstance(at.get(name), dict):
            at[name] = {}
        at = at[name]
    at[path[-1]] = of(rng, annotation) if rng.random() < 0.7 else mutation.toml_value(rng)
    return changed


@cache
def every_field() -> list[tuple[tuple[str, ...], Any]]:
    """The paths of all fields of a recipe, and their types."""
    return list(_fields(Recipe, ()))


def _fields(model: type[pydantic.BaseModel], prefix: tuple[str, ...]) -> Any:
    for name, field in model.model_fields.items():
        yield (*prefix, name), field.annotation
        for option in [field.annotation, *typing.get_args(field.annotation)]:
            if inspect.isclass(option) and issubclass(option, pydantic.BaseModel) and option is not Choice:
                yield from _fields(option, (*prefix, name))


def of(rng: random.Random, annotation: Any) -> Any:
    """A value of a type, its edges and beyond included."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return rng.choice(arguments)
    if origin in (types.UnionType, typing.Union):
        return of(rng, rng.choice([a for a in arguments if a is not type(None)]))
    if origin is list:
        return [of(rng, arguments[0]) for _ in range(rng.randrange(3))]
    if origin is dict:
        return {rng.choice(["a", "x.y", ""]): of(rng, arguments[1]) for _ in range(rng.randrange(2))}
    if inspect.isclass(annotation) and issubclass(annotation, pydantic.BaseModel):
        table = {
            name: of(rng, field.annotation)
            for name, field in annotation.model_fields.items()
            if field.is_required() or rng.random() < 0.2
        }
        if annotation is Choice:
            table |= {"name": rng.choice(NAMES)}
            table |= (
                {rng.choice(["beta", "model", "checker", "weight", "judges"]): mutation.toml_value(rng)}
                if rng.random() < 0.3
                else {}
            )
        return table
    return {
        bool: lambda: rng.random() < 0.5,
        int: lambda: rng.choice([0, 1, 2, 3, 8, 64, 1000, -1, 1 << 40, 10**20]),
        float: lambda: rng.choice([0.0, 0.1, 0.5, 1.0, 2.0, 1e-7, 1e300, float("inf"), float("nan"), -1.0, 1]),
        str: lambda: rng.choice([*mutation.TEXTS, *NAMES, "seeds.jsonl", "folder", "pipe"]),
    }.get(annotation, lambda: mutation.toml_value(rng))()


def setting(rng: random.Random, table: Any) -> str:
    """KEY=VALUE, more or less."""
    path = rng.choice([".".join(map(str, rng.choice(every_field())[0])), rng.choice(mutation.TEXTS), "train.loss.beta"])
    value = rng.choice(
        [
            json.dumps(mutation.value(rng), default=str),
            rng.choice(mutation.TEXTS),
            "{name='dpo'}",
            "[" * 2000,
            "1e400",
            "9" * 5000,
            "2026-01-02",
            "\udcff",
            "0x10",
            "'''",
            "{a=" * 300,
        ]
    )
    return rng.choice([f"{path}={value}", f"{path}={value}", path, f"={value}", f"{path} = {value}"])


def write(folder: Path, rng: random.Random) -> list[str]:
    """Writes `recipe.toml` of a case; returns the arguments after the verb."""
    text, settings = draw(rng)
    path = folder / "recipe.toml"
    path.write_bytes(text)
    return [str(path), *(part for one in settings for part in ("--set", one))]
