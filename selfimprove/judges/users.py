"""The user's own checkers: Python functions that a recipe names."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfimprove.errors import UserError

FORM = 'function = "package.module:name", of the current directory or of an installed package'


def load(function: str) -> Callable[[str, str, str | None], Any]:
    """The function of this name; its module is looked for in the current directory too.

    Raises:
        UserError: no such module or function, or its import fails.
    """
    module, colon, name = function.partition(":")
    if not (module and colon and name):
        raise UserError(f"'{function}' names no function", FORM)
    here = str(Path.cwd())
    added = here not in sys.path
    if added:  # as `python -m` has it; a console script does not
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise UserError(f"cannot import '{module}': {type(error).__name__}: {error}", FORM) from None
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    if not callable(found):
        raise UserError(f"'{module}' has no function '{name}'", FORM)
    checked: Callable[[str, str, str | None], Any] = found
    return checked


def source(function: str) -> Path | None:
    """The file of the function's module; None where it has none.

    Raises:
        UserError: see `load`.
    """
    load(function)
    path = getattr(sys.modules[function.partition(":")[0]], "__file__", None)
    return Path(path) if path else None
