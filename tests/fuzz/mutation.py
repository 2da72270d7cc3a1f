"""Wrong values and broken bytes, drawn from a `random.Random`: a number names a case, hypothesis can shrink one."""

import copy
import datetime
import json
import random
from collections.abc import Callable
from typing import Any

TEXTS = [
    "",
    " ",
    "\n",
    "0",
    "-1",
    "nan",
    "null",
    "true",
    "a\x00b",
    "\ufeffx",
    "x" * 5000,
    "../../../etc/passwd",
    "/dev/zero",
    "/",
    ".",
    "demo:seeds",
    "demo:nothing",
    "org/name",
    "\u202egnp.exe",
    "e\u0301" * 40,
    "{{ 7 * 7 }}",
    "$(touch /tmp/x)",
    "<|user|>",
    "a.b.c",
    "\x1b[2J",
    "server:none",
    "initial",
    "current",
    "dpo",
    "'; DROP TABLE",
    "😀",
    "e" * 300 + ".toml",
]
NUMBERS = [0, -1, 1, 2, 3, 7, 1 << 31, 1 << 63, 1 << 64, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, 0.1]
STRANGE = [float("inf"), float("-inf"), float("nan")]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any value that JSON has, and its numbers that are none."""
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(STRANGE),
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.randrange(-5, 50),
        lambda: rng.uniform(-2, 2),
        lambda: [],
        lambda: {},
    ]
    if depth < 3:
        kinds += [
            lambda: [value(rng, depth + 1) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(3))},
        ]
    return rng.choice(kinds)()


def toml_value(rng: random.Random) -> Any:
    """One that TOML has: no null, but dates."""
    found = value(rng)
    if rng.random() < 0.03:
        return datetime.datetime(2026, 1, 2, 3, 4, 5)
    return (
        json.loads(json.dumps(found), object_hook=lambda t: {k: "" if v is None else v for k, v in t.items()})
        if isinstance(found, dict)
        else ""
        if found is None
        else [one for one in found if one is not None]
        if isinstance(found, list)
        else found
    )


def places(table: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a value."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    found = []
    for key, inner in items:
        found += [(*prefix, key), *places(inner, (*prefix, key))]
    return found


def structure(rng: random.Random, table: Any, draw: Callable[[random.Random], Any] = value) -> Any:
    """A copy of a value with one thing in it replaced, taken away, doubled or added."""
    changed = copy.deepcopy(table)
    known = places(changed)
    if not known:
        return draw(rng)
    *path, last = rng.choice(known)
    at = changed
    for key in path:
        at = at[key]
    match rng.randrange(5):
        case 0 | 1:
            at[last] = draw(rng)
        case 2:
            del at[last]
        case 3 if isinstance(at, dict):
            at[rng.choice([*TEXTS[1:], str(last) + "s"])] = draw(rng)
        case 3:
            at.append(copy.deepcopy(at[last]))
        case 4:
            other = rng.choice(known)
            inner = table
            for key in other:
                inner = inner[key]
            at[last] = copy.deepcopy(inner)
    return changed


def content(rng: random.Random, text: bytes) -> bytes:
    """Bytes with one thing wrong with them."""
    at = rng.randrange(len(text) + 1)
    line = text.split(b"\n")
    k = rng.randrange(len(line))
    deep = rng.choice([50, 300, 5000, 100_000])
    kinds: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: text[:at],
        lambda: text[at:],
        lambda: text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :],
        lambda: text[:at] + rng.randbytes(rng.randrange(1, 9)) + text[at:],
        lambda: text.replace(b"\n", b"\r\n"),
        lambda: text.replace(b"\n", b"\r"),
        lambda: b"\xef\xbb\xbf" + text,
        lambda: b"\xef\xbb\xbf" * 2 + text,
        lambda: text.decode("utf-8", "replace").encode("utf-16"),
        lambda: text.decode("utf-8", "replace").encode("utf-16-le"),
        lambda: text.decode("utf-8", "replace").encode("utf-32"),
        lambda: text.decode("utf-8", "replace").encode("latin-1", "replace") + b"\xe9",
        lambda: text[:at] + b"\x00" + text[at:],
        lambda: b"\n".join([*line[:k], line[k], *line[k:]]),
        lambda: b"\n".join([*line[:k], *line[k + 1 :]]),
        lambda: b"\n".join([*line[:k], line[k][: at % (len(line[k]) + 1)], *line[k + 1 :]]),
        lambda: text[:at] + b"x" * rng.choice([1000, 100_000]) + text[at:],
        lambda: text + b"[" * deep,
        lambda: b"[" * deep + b"]" * deep,
        lambda: b'{"a":' * deep + b"1" + b"}" * deep,
        lambda: text[:at] + rng.choice([b"NaN", b"Infinity", b"1e400", b"-1e400", b"9" * 5000, b"1e-400"]) + text[at:],
        lambda: (
            text[:at] + rng.choice([b"\\ud800", b"\\u0000", b'"', b"\\", b"}", b"]", b",", b"\xed\xa0\x80"]) + text[at:]
        ),
        lambda: text * rng.choice([2, 3]),
        lambda: rng.randbytes(rng.randrange(200)),
    ]
    return rng.choice(kinds)()
