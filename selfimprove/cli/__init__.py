"""The command line: parse, call one function, print. Imports nothing heavy, so that --help answers at once.

stdout is data, stderr is talk. Exit codes: 0 done, 1 user error, 2 usage, 3 the answer is no, 130 interrupted.
"""

import os
import sys
from typing import Annotated, NoReturn

import typer

from selfimprove import __version__
from selfimprove.cli import auditing, keeping, looking, making, planning, score
from selfimprove.errors import UsageError, UserError

app = typer.Typer(
    help="Iterative LLM self-improvement: synthesize, generate, label, train, evaluate; round after round.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for part in (making, planning, looking, keeping, auditing):
    app.add_typer(part.app)
app.add_typer(planning.demo, name="demo", rich_help_panel=planning.PANEL)
app.add_typer(score.score, name="score", rich_help_panel=auditing.PANEL)


def _version(shown: bool) -> None:
    if shown:
        print(f"selfimprove {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


def _open_what_is_closed() -> None:
    """After `>&-`, the next file to be opened would take the stream's number, and all that is printed to it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def main() -> NoReturn:
    """The program: what the user can mend is one sentence and a hint, anything else keeps its traceback."""
    _open_what_is_closed()
    try:
        app()
    except UserError as error:
        from selfimprove.report.escape import visible

        print(f"error: {visible(error.message)}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a missing folder, no permission: the machine's, not ours
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        print("\nhint: check the path, its permissions and the free space (df -h .)", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
