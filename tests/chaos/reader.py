"""Readers of a run that is being made: `python -m tests.chaos.reader RUN NUMBER FOLDER` until FOLDER/stop is there.

Each of them is a process that asks for everything again and again. What it saw goes to FOLDER/NUMBER.json: how often
each command ended with which code, and what may not be: a traceback, a table that cannot be read.
"""

import contextlib
import io
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

EARLY = ("no run", "no recipe called", "is not evaluated yet", "not made yet")  # what is asked for is not there yet
COMMANDS = (
    ("status", "{run}", "--json"),
    ("plan", "{run}", "--json"),
    ("verify", "{run}", "--json"),
    ("inspect", "{run}", "--json"),
    ("report", "{run}", "--out", "{page}"),
)


def read(run: str, number: int, folder: Path) -> None:
    """One reader's life."""
    from selfimprove import cli

    dice, seen, wrong = random.Random(number), Counter[str](), []
    while not Path("runs", run).exists():
        time.sleep(0.05)
    while not (folder / "stop").exists():
        command = [part.format(run=run, page=folder / f"{number}.html") for part in dice.choice(COMMANDS)]
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                sys.argv = ["selfimprove", *command]
                try:
                    cli.main()
                except SystemExit as ended:
                    code = ended.code
            seen[f"{command[0]} {code}"] += 1
            if code == 0 and "--json" in command:
                json.loads(out.getvalue())
            early = code == 1 and any(text in err.getvalue() for text in EARLY)
            if (code != 0 and not early) or "Traceback" in err.getvalue():
                wrong.append(f"{command}: {code} {out.getvalue()[-500:]} {err.getvalue()[-500:]}")
            seen["tables read"] += tables(Path("runs", run), dice)
        except Exception:
            wrong.append(f"{command}: {traceback.format_exc()}")
        time.sleep(0.01)
    (folder / f"{number}.json").write_text(json.dumps({"seen": seen, "wrong": wrong}), encoding="utf-8")


def tables(run: Path, dice: random.Random) -> int:
    """Read one published table as a peer would; its rows must be those that its manifest tells of."""
    import datasets

    found = sorted(run.glob("iter-*/*[!l]/*.parquet"))  # no *.partial
    if not found:
        return 0
    path = dice.choice(found)
    rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True, cache_dir=f"cache-{os.getpid()}")
    assert path.parent.joinpath("manifest.json").is_file()
    assert rows.num_rows >= 0
    return 1


def main(run: str, number: int, folder: Path) -> None:
    """Start the readers and wait for them; what they all import is imported once."""
    import datasets

    import selfimprove.cli
    import selfimprove.report.html
    import selfimprove.report.inspection

    del datasets, selfimprove
    (folder / "ready").touch()
    children = []
    for one in range(number):
        if not (child := os.fork()):
            read(run, one, folder)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
