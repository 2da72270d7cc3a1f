"""Answers that must be JSON of a given shape."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfimprove import textfile
from selfimprove.errors import UserError
from selfimprove.judges.protocol import Candidate, Opinion

FORM = "json_schema = a JSON file, or an inline table"
FENCED = re.compile(r"\A\s*```(?:json|JSON)?[^\S\n]*\n(.*?)```\s*\Z", re.DOTALL)


def schema_checker(schema: dict[str, Any] | str) -> Callable[[Candidate], Opinion]:
    """Whether an answer, a ```json fence taken off, is JSON that satisfies the schema: a table, or a file's name.

    Raises:
        UserError: no such file, or no JSON schema.
    """
    import jsonschema
    import referencing
    from jsonschema.exceptions import best_match

    table = read_schema(schema) if isinstance(schema, str) else schema
    kind = jsonschema.validators.validator_for(table, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(table)
    except jsonschema.SchemaError as error:
        raise UserError(f"'json_schema' is no JSON schema: {error.message}", "see json-schema.org") from None
    validator = kind(table, registry=referencing.Registry())  # nothing is fetched from elsewhere

    def check(candidate: Candidate) -> Opinion:
        try:
            found = _json(candidate.text)
            error = best_match(validator.iter_errors(found))
        except (ValueError, RecursionError) as broken:
            return Opinion(0.0, f"no valid JSON: {broken}"[:200])
        except referencing.exceptions.Unresolvable as missing:
            raise UserError(
                f"'json_schema' refers to {missing.ref}, which is not in it", "put it under $defs"
            ) from None
        return Opinion(1.0) if error is None else Opinion(0.0, f"{error.json_path}: {error.message}"[:200])

    return check


def read_schema(path: str) -> dict[str, Any]:
    """A schema from a file.

    Raises:
        UserError: no such file, or it holds no JSON object.
    """
    try:
        table = textfile.parse_json(textfile.read(Path(path)))
    except ValueError as error:
        raise UserError(
            f"cannot read the schema {path}: {error}", "json_schema = a JSON file, or an inline table"
        ) from None
    if not isinstance(table, dict):
        raise UserError(f"the schema {path} is no JSON object", FORM)
    return table


def _json(text: str) -> Any:
    fenced = FENCED.match(text)
    return json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
