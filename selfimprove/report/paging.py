"""Long output through a pager where a person reads it; as it is where a program does."""

import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console


@contextlib.contextmanager
def paged() -> Iterator[Console]:
    """A console whose output goes through PAGER (less, else more) on a terminal, unless NO_PAGER is set."""
    console = Console()
    if not sys.stdout.isatty() or os.environ.get("NO_PAGER"):
        yield console
        return
    os.environ.setdefault("LESS", "FRX")  # as git has it: colours, and no pager for what fits on the screen
    with console.pager(styles=True):
        yield console
