"""Checkers that say right or wrong without a model."""

import functools
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove import constraints
from selfimprove.constraints import language
from selfimprove.demo import world
from selfimprove.errors import UserError
from selfimprove.judges import numeric, programs, users
from selfimprove.judges.protocol import Candidate, Opinion, Panel, squeezed
from selfimprove.judges.schemas import schema_checker
from selfimprove.judges.users import load, source

Checker = Literal[
    "demo_world", "exact", "numeric", "regex", "json_schema", "ifeval", "unit_tests", "python"
]  # of these, the ones with parameters:
TAKES: Mapping[str, str] = {
    "regex": "pattern",
    "json_schema": "json_schema",
    "unit_tests": "timeout_seconds",
    "python": "function",
}
NEEDED = ("json_schema", "python")  # they cannot do without their parameter
REGEX_SECONDS = 1.0
NO_ANSWER = Opinion(None, "no reference answer")
Check = Callable[[Candidate], Opinion]


def verifier(
    candidates: Sequence[Candidate],
    panel: Panel | None = None,
    *,
    checker: Checker,
    pattern: str | None = None,
    json_schema: dict[str, Any] | str | None = None,
    function: str | None = None,
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None,
) -> list[Opinion]:
    """Right (1) or wrong (0) by a named checker.

    `demo_world` parses the prompt of the embedded default. All others look at the reference answer or a parameter:
    `exact` compares texts, up to white space; `numeric` compares numbers and formulas; `regex` searches for `pattern`,
    or for the reference answer as a pattern; `json_schema` wants JSON that satisfies `json_schema`, a table or a file;
    `ifeval` wants the constraints of the reference answer kept (JSON: instruction_id_list, kwargs); `unit_tests` runs
    the answer's code and the reference answer's tests in a sandbox, `timeout_seconds` each (default 10); `python` asks
    `function`, "module:name", which gets prompt, completion and answer and returns bool, float or None.

    Raises:
        UserError: a parameter that the checker does not take, lacks or cannot use, or a library that is not installed.
    """
    return prepared(checker, pattern, json_schema, function, timeout_seconds)(candidates)


def prepared(
    checker: Checker,
    pattern: str | None = None,
    json_schema: dict[str, Any] | str | None = None,
    function: str | None = None,
    timeout_seconds: float | None = None,
) -> Callable[[Sequence[Candidate]], list[Opinion]]:
    """The checker with its parameters looked through and all that it needs at hand.

    Raises:
        UserError: see `verifier`.
    """
    given = {"pattern": pattern, "json_schema": json_schema, "function": function, "timeout_seconds": timeout_seconds}
    for name in [name for name, value in given.items() if value is not None and TAKES.get(checker) != name]:
        owner = next(of for of, its in TAKES.items() if its == name)
        raise UserError(f"checker '{checker}' takes no '{name}'", f"it belongs to checker '{owner}'")
    if checker in NEEDED and given[TAKES[checker]] is None:
        raise UserError(f"checker '{checker}' needs '{TAKES[checker]}'", f"add {TAKES[checker]} = ... beside checker")
    if checker == "numeric":
        return numeric.checker()
    if checker == "unit_tests":
        return programs.checker(timeout_seconds or programs.SECONDS)
    one = _single(checker, pattern, json_schema, function)
    return lambda candidates: [one(candidate) for candidate in candidates]


def _single(checker: Checker, pattern: str | None, schema: dict[str, Any] | str | None, function: str | None) -> Check:
    if checker == "regex":
        return _regex(pattern)
    if checker == "json_schema" and schema is not None:
        return schema_checker(schema)
    if checker == "python" and function is not None:
        return _python(function)
    if checker == "ifeval":
        language.check()
        return _ifeval
    return _demo_world if checker == "demo_world" else _exact


def _demo_world(candidate: Candidate) -> Opinion:
    right = world.check(candidate.prompt, candidate.text)
    return Opinion(None, "prompt outside the grammar") if right is None else Opinion(float(right))


def _exact(candidate: Candidate) -> Opinion:
    if candidate.answer is None:
        return NO_ANSWER
    return Opinion(float(squeezed(candidate.text) == squeezed(candidate.answer)))


def _regex(pattern: str | None) -> Check:
    import regex  # like re, but it can be told to stop: an answer may be made to match for ever

    compiled = functools.lru_cache(4096)(regex.compile)  # its own cache is as slow as a search
    try:
        fixed = None if pattern is None else compiled(pattern)
    except regex.error as error:
        raise UserError(f"the pattern {pattern!r} is no regular expression: {error}", "mend 'pattern'") from None

    def check(candidate: Candidate) -> Opinion:
        if fixed is None and candidate.answer is None:
            return Opinion(None, "no pattern and no reference answer")
        try:
            found = (fixed or compiled(candidate.answer)).search(candidate.text, timeout=REGEX_SECONDS)
        except regex.error as error:
            return Opinion(None, f"the reference answer is no regular expression: {error}")
        except TimeoutError:
            return Opinion(None, f"the pattern took more than {REGEX_SECONDS:g} s")
        return Opinion(float(found is not None))

    return check


def _ifeval(candidate: Candidate) -> Opinion:
    if candidate.answer is None:
        return NO_ANSWER
    try:
        wanted = constraints.parse(candidate.answer)
    except constraints.ConstraintError as error:
        return Opinion(None, str(error))
    kept = constraints.strict(candidate.text, wanted)
    broken = [one.name for one, holds in zip(wanted, kept, strict=True) if not holds]
    return Opinion(float(not broken), f"not kept: {', '.join(broken)}" if broken else "")


def _python(function: str) -> Check:
    call = load(function)

    def check(candidate: Candidate) -> Opinion:
        try:
            with users.aside():
                found = call(candidate.prompt, candidate.text, candidate.answer)
        except (Exception, SystemExit) as error:  # a library of theirs may call sys.exit
            return Opinion(None, f"{function} raised {type(error).__name__}: {error}")
        if found is None:
            return Opinion(None, f"{function} does not know")
        try:
            score = float(found) if isinstance(found, int | float) else math.nan
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            return Opinion(None, f"{function} returned {reprlib.repr(found)}")
        return Opinion(score)

    return check


def files(json_schema: object = None, function: object = None, **others: object) -> dict[str, Path]:
    """The files outside the recipe on whose content the verdicts depend, by the name that the recipe gives them."""
    found = {json_schema: Path(json_schema)} if isinstance(json_schema, str) else {}
    if isinstance(function, str) and (path := source(function)):
        found[function] = path
    return found


def needs_answer(checker: object = None, pattern: object = None, **others: object) -> bool:
    """Whether a checker knows nothing where there is no reference answer."""
    return checker in ("exact", "numeric", "ifeval", "unit_tests") or (checker == "regex" and pattern is None)
