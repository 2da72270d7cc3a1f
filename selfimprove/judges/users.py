"""The user's own checkers: Python functions that a recipe names.

They may print and call `sys.exit`, which is then neither our output nor our end.
"""

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selfimprove.errors import UserError

_ASIDE = threading.RLock()
FORM = 'function = "package.module:name", of the current directory or of an installed package'


def load(function: str) -> Callable[[str, str, str | None], Any]:
    """The function of this name; its module is looked for in the current directory too.

    Raises:
        UserError: no such module or function, or its import fails.
    """
    module, colon, name = function.partition(":")
    if not (module and colon and name):
        raise UserError(f"'{function}' names no function", FORM)
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"'{function}' is a function of Python itself and no checker", FORM)
    with _here(), aside():
        try:
            found = getattr(importlib.import_module(module), name, None)
        except (Exception, SystemExit) as error:
            raise UserError(f"cannot import '{module}': {type(error).__name__}: {error}", FORM) from None
    if not callable(found):
        raise UserError(f"'{module}' has no function '{name}'", FORM)
    if getattr(found, "__module__", module).partition(".")[0] in sys.stdlib_module_names:  # handed on by the module
        raise UserError(f"'{function}' is a function of Python itself and no checker", FORM)
    checked: Callable[[str, str, str | None], Any] = found
    return checked


def source(function: str) -> Path | None:
    """The file of the function's module, which is not imported; None where there is none."""
    with _here():
        try:
            spec = importlib.util.find_spec(function.partition(":")[0])
        except (ImportError, ValueError):
            return None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What the user's code prints goes to stderr, as stdout is data; one thread at a time, stdout being for all."""
    with _ASIDE, contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """The current directory on the path, as `python -m` has it and a console script has not."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
