"""Why an artifact is not what a recipe makes, told by the recipe's keys, its files and templates."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import chat

LONGEST = 60  # characters of a value that are told


class Known(NamedTuple):
    """What a step's ingredients are called outside their keys."""

    stage: str  # its section in the recipe
    files: Mapping[str, str]  # of the recipe by source, "seeds": "my/seeds.jsonl"
    model: str  # of the recipe
    texts: Path  # folder with the texts of templates, by their hash
    sources: Mapping[str, str]  # of inputs and models, without those that are told elsewhere


def of(old: Mapping[str, Any], new: Mapping[str, Any], known: Known) -> Iterator[str]:
    """What differs between two sets of ingredients; see plan.seen_by."""
    section = values(known.stage, old.get("section"), new.get("section"))
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name) or {}, new.get(name) or {}
        if name == "section":
            yield from section
        elif name in ("inputs", "models"):
            yield from _sources(a, b, known)
        elif name == "templates":
            yield from _templates(a, b, known.texts)
        elif name == "files":
            yield from (f"file of {one} changed" for one in _differing(a, b))
        elif name == "version":
            if a != b:
                yield f"version of stage {known.stage} {a} -> {b}"
        else:
            yield from values(name, old.get(name), new.get(name))


def values(key: str, old: Any, new: Any) -> list[str]:
    """`train.loss.beta 0.1 -> 0.2` for each value that differs under a key of the recipe."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [told for name in sorted(old.keys() | new.keys()) for told in _member(key, name, old, new)]
    if isinstance(old, list) and isinstance(new, list) and _names(old) and _names(old) == _names(new):
        return [told for a, b in zip(old, new, strict=True) for told in values(f"{key}.{a['name']}", a, b)]
    if isinstance(old, dict | list) and new is None:
        return [f"{key} removed"]
    if isinstance(new, dict | list) and old is None:
        return [f"{key} added"]
    return [f"{key} {_short(old)} -> {_short(new)}"]


def _member(key: str, name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return values(f"{key}.{name}" if key else name, old.get(name), new.get(name))


def _names(entries: list[Any]) -> list[str] | None:
    """The names of a list of choices, as of losses or benchmarks; None where it is none."""
    found = [one.get("name") for one in entries if isinstance(one, dict)]
    return found if len(found) == len(entries) and None not in found else None  # type: ignore[return-value]


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]


def _sources(old: Mapping[str, Any], new: Mapping[str, Any], known: Known) -> Iterator[str]:
    """Inputs and models; each thing that changed is told once, however many names a step has for it."""
    told: list[str] = []
    for name in _differing(old, new):
        if name not in new:
            told.append(f"no longer made from {name}")
        elif name in known.sources:
            told.append(_source(name, known.sources[name], new[name] is None, name in old, known))
    yield from dict.fromkeys(told)


def _source(name: str, source: str, gone: bool, had: bool, known: Known) -> str:
    """One input: what it is called in the recipe, or where in the run it is, and what became of it."""
    which, _, rest = source.partition(":")
    became = "is gone" if gone else "changed" if had else "came in"
    if which == "file":
        return f"{_key(rest)} {became} ({known.files.get(rest, rest)})"
    if which == "model":
        return f"model {rest} {became}"
    if source == "initial":
        return f"model.path {became} ({known.model})"
    if which in ("next", "best"):
        return f"{rest} decided otherwise on '{name}'"
    return f"{'/'.join(source.split('/')[:2])} {'is gone' if gone else 'was made again' if had else 'came in'}"


def _key(name: str) -> str:
    """The recipe's key of an input file: `seeds`, `benchmark:gsm8k:NAME` or `answers:NAME`."""
    if ":" not in name:
        return f"data.{name}"
    what, *_, benchmark = name.split(":")
    return f"evaluate.benchmarks.{benchmark}.{'answers' if what == 'answers' else 'path'}"


def _templates(old: Mapping[str, str], new: Mapping[str, str], texts: Path) -> Iterator[str]:
    for name in _differing(old, new):
        kind = f"{name.partition('/')[0]} " if "/" in name else ""
        what = f"{kind}template {name}.jinja"
        if name not in old or name not in new:
            yield f"{what} {'came in' if name in new else 'is used no longer'}"
            continue
        try:
            before = (texts / old[name]).read_text(encoding="utf-8")
            lines = changed_lines(before, chat.template_path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):  # its text was not kept: it is older than this folder
            lines = ""
        yield f"{what} changed{': ' if lines else ''}{lines}"


def changed_lines(old: str, new: str) -> str:
    """`lines 3-5, line 9`, numbered as in the new text; of what is gone, after which line it stood."""
    a, b = old.splitlines(keepends=True), new.splitlines(keepends=True)
    found = []
    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "delete":
            found.append(f"{i_end - i} line{'s' if i_end - i > 1 else ''} gone after line {j}")
        elif kind != "equal":
            found.append(f"line {j + 1}" if j_end == j + 1 else f"lines {j + 1}-{j_end}")
    return ", ".join(found)
