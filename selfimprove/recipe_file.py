"""Recipes as files: found by name, read, changed by `--set`, compared and written."""

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit

from selfimprove import textfile
from selfimprove.errors import UsageError, UserError
from selfimprove.recipe import Benchmark, Choice, Data, Edit, Model, Recipe, put, shipped, validated

LARGEST = 1 << 20  # bytes of a recipe or a study


def shipped_recipes() -> list[Path]:
    """The shipped recipes in order of their names; the study beside them is no recipe."""
    return sorted(path for path in shipped("pipelines").glob("*.toml") if path.stem != "study")


def load(
    path: Path,
    settings: list[str] | None = None,
    edits: Sequence[Edit] = (),
    machine: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe file, and apply edits, the keys of a machine file, and then `a.b=value` settings to it.

    Raises:
        UserError: unreadable file, bad TOML, unknown key, or a value of the wrong type.
    """
    table = read_toml(path, "recipe", "selfimprove recipes", "compare with pipelines/default.toml")
    for edit in edits:
        edit.apply(table)
    if machine and "executor" in machine:  # what another machine's executor was told is nothing to this one
        for name in ("workers", "ray_address", "nodes", "rendezvous"):
            table.get("machine", {}).pop(name, None)
    for name, value in (machine or {}).items():
        put(table, f"machine.{name}", value)
    for setting in settings or []:
        _set(table, setting)
    return validated(Recipe, table, f"recipe {path.name}")


def read_toml(path: Path, what: str, gone: str, bad: str) -> dict[str, Any]:
    """The table of a TOML file; the two hints are for one that cannot be read and for one that is no TOML."""
    text = textfile.read(path, gone, LARGEST)
    try:
        table = tomllib.loads(text)
    except ValueError as error:  # bad TOML, or a number with more digits than Python reads
        raise UserError(f"{what} {path} is not valid TOML: {textfile.why(error)}", bad) from None
    except RecursionError:
        raise UserError(f"{what} {path} is not valid TOML: {textfile.TOO_DEEP}", bad) from None
    if textfile.too_deep(table):
        raise UserError(f"{what} {path}: tables {textfile.TOO_DEEP}", bad)
    return table


def find(name: str) -> Path:
    """The recipe file called `name`: a path to a TOML file, or the name of a shipped recipe."""
    if name.endswith(".toml") or "/" in name:
        return Path(name)
    path = shipped("pipelines") / f"{name}.toml"
    if textfile.there(path) != "file":
        known = ", ".join(p.stem for p in shipped_recipes())
        raise UserError(f"no recipe called '{name}'", f"known: {known}; or give a path ending in .toml")
    return path


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that a run stays whole wherever it is resumed from."""
    changed: dict[str, Any] = {
        "model": Model(path=_absolute(recipe.model.path)),
        "data": Data(**{name: value and _absolute(value) for name, value in recipe.data.model_dump().items()}),
    }
    if recipe.train.reference_path:
        path = _absolute(recipe.train.reference_path)
        changed["train"] = recipe.train.model_copy(update={"reference_path": path})
    if recipe.label.judge:
        update: dict[str, Any] = {"judge": _absolute_judge(recipe.label.judge)}
        if recipe.label.audit and recipe.label.audit.second:
            second = _absolute_judge(recipe.label.audit.second)
            update["audit"] = recipe.label.audit.model_copy(update={"second": second})
        changed["label"] = recipe.label.model_copy(update=update)
    if recipe.evaluate.benchmarks:
        benchmarks = [_absolute_benchmark(one) for one in recipe.evaluate.benchmarks]
        changed["evaluate"] = recipe.evaluate.model_copy(update={"benchmarks": benchmarks})
    if recipe.machine.store and "://" not in recipe.machine.store:
        store = str(Path(recipe.machine.store).expanduser().resolve())
        changed["machine"] = recipe.machine.model_copy(update={"store": store})
    return recipe.model_copy(update=changed)


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if not name.startswith("demo:") and textfile.there(name) else name


def _absolute_benchmark(benchmark: Benchmark) -> Benchmark:
    changed: dict[str, Any] = {"path": _absolute(benchmark.path)}
    if benchmark.answers:
        changed["answers"] = _absolute(benchmark.answers)
    if benchmark.judge:
        changed["judge"] = _absolute_judge(benchmark.judge)
    return benchmark.model_copy(update=changed)


def _absolute_judge(choice: Choice) -> Choice:
    """A judge whose model is a directory, with its whole path; those of an ensemble too."""
    table = choice.model_dump()
    inner = table.get("judges")
    for one in [table, *(inner if isinstance(inner, list) else [])]:
        if isinstance(one, dict) and isinstance(one.get("model"), str):
            one["model"] = _absolute(one["model"])
    return Choice.model_validate(table)


def dump(recipe: Recipe) -> str:
    """The recipe as TOML; `load` of it gives an equal recipe."""
    return tomlkit.dumps(recipe.model_dump(exclude_none=True))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """What changes between two recipes, as `train.beta 0.1 -> 0.2`, without `rounds` and `[machine]`."""
    return [f"{key} {a} -> {b}" for key, (a, b) in side_by_side([old, new], {"rounds", "machine"}).items()]


def side_by_side(recipes: Sequence[Recipe], without: Collection[str] = ()) -> dict[str, list[Any]]:
    """The keys, less some sections, that are not the same in all recipes: each one's value, None where it has none."""
    flat = [_flat(r.model_dump(exclude=set(without))) for r in recipes]
    values = {key: [of.get(key) for of in flat] for key in sorted(set().union(*flat))}
    return {key: given for key, given in values.items() if any(value != given[0] for value in given)}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _set(table: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    names = key.strip().split(".")
    if len(setting) > LARGEST or re.search("[\ud800-\udfff]", setting):
        raise UsageError("--set: a value is no UTF-8 text, or far too long", "write long values into a recipe file")
    if not equals or not all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in names):
        raise UsageError(f"--set {setting}: expected KEY=VALUE", "for example --set train.optimizer.epochs=3")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()  # a bare word is a string, so that a shell needs no nested quotes
    try:
        put(table, key.strip(), value)
    except UserError as error:
        raise UsageError(f"--set {setting}: {error.message}", error.hint) from None
