"""What orchestration costs: `python -m tests.chaos.overhead --folder FOLDER` makes a run of the default and says.

The time of `run.iterate`, less that of the stages' own bodies (`stage.run`: engine, training, judging), is what plans,
keys, manifests, hashes, fsyncs and links cost. Imports and the program's start count as neither.
"""

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from selfimprove import cli
from selfimprove import run as running
from selfimprove.plan import steps


def main() -> None:
    """Make the run, print JSON: seconds of the whole, of the bodies, the share of the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("arguments", nargs="*", default=["--rounds", "4"], help="of selfimprove iterate")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    spent = {"bodies": 0.0, "iterate": 0.0, "stages": 0.0}
    cpu = dict(spent)

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            began, used = time.monotonic(), time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] += time.monotonic() - began
                cpu[name] += time.process_time() - used

        return call

    with contextlib.chdir(given.folder):
        shutil.rmtree("runs/overhead", ignore_errors=True)
        from selfimprove import recipe_file

        chosen = recipe_file.load(recipe_file.find("default"))
        for stage in {step.stage for step in steps(chosen)}:
            stage.run = timed("bodies", stage.run)  # type: ignore[attr-defined]
        running.check(chosen)  # imports transformers and what it needs, once
        running.iterate = timed("iterate", running.iterate)
        running.execute = timed("stages", running.execute)
        sys.argv = ["selfimprove", "iterate", *given.arguments, "--run", "overhead"]
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
            cli.main()
    outside = spent["iterate"] - spent["bodies"]
    told = {f"seconds of {name}": round(value, 2) for name, value in spent.items()}
    told |= {"seconds outside the bodies": round(outside, 2), "share": round(outside / spent["iterate"], 4)}
    told["processor seconds outside the bodies"] = round(cpu["iterate"] - cpu["bodies"], 2)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
