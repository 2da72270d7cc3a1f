"""`make fuzz`: many cases of bad input, each named by a seed and a number, so that any can be run again alone.

python -m tests.fuzz --recipes 10000 --files 10000 --artifacts 2000 [--seed 0] [--first 0] [--only N]
"""

import argparse
import collections
import contextlib
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import artifacts, cases, oracle


def main() -> int:
    parser = argparse.ArgumentParser(description="Bad input, case after case.")
    for name in ("recipes", "files", "artifacts"):
        parser.add_argument(f"--{name}", type=int, default=0, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case: go on where a call stopped")
    parser.add_argument("--most", type=int, default=50, help="findings after which it stops")
    given = parser.parse_args()
    found = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if given.artifacts:
            (Path(folder) / "artifacts").mkdir()
            os.chdir(Path(folder) / "artifacts")
            artifacts.prepare(Path.cwd())
        os.chdir(folder)
        stack.enter_context(cases.quick(Path(folder)))
        for name, one in (("recipes", cases.recipe), ("files", cases.file), ("artifacts", artifacts.case)):
            if number := getattr(given, name):
                found += many(name, one, range(given.first, number), given.seed, given.most - found)
        os.chdir("/")
    return 1 if found else 0


def many(
    name: str, one: Callable[[Path, random.Random, int], oracle.Told], numbers: range, seed: int, most: int
) -> int:
    """All cases of a kind; returns how many findings there were."""
    folder = Path(name).resolve()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    began, shown, slowest = time.monotonic(), time.monotonic(), (0.0, 0)
    ended: collections.Counter[str] = collections.Counter()
    findings = 0
    for number in numbers:
        start = time.monotonic()
        try:
            ended[one(folder, random.Random(f"{seed}/{name}/{number}"), number).kind] += 1
        except oracle.Finding as error:
            findings += 1
            print(f"FINDING {name} {number}: {error}", flush=True)
            cause = error.__cause__
            if cause:
                print("".join(traceback.format_exception(cause)[-3:]), flush=True)
            if findings >= most:
                break
        slowest = max(slowest, (time.monotonic() - start, number))
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            done = number + 1 - numbers.start
            print(
                f"{name}: {done} of {len(numbers)}, {done / (shown - began):.0f} a second", file=sys.stderr, flush=True
            )
    seconds = time.monotonic() - began
    print(
        f"{name}: {len(numbers)} cases, seed {seed}, {seconds:.0f} s: {dict(ended)}, {findings} findings;"
        f" slowest {slowest[0]:.1f} s (number {slowest[1]})",
        flush=True,
    )
    os.chdir(folder.parent)
    return findings


if __name__ == "__main__":
    sys.exit(main())
