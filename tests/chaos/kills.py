"""The campaign of kills: `make chaos`, or `python -m tests.chaos.kills --count 200 --folder FOLDER`.

A run of the embedded default is killed (SIGKILL, the program and all it started) again and again and resumed each
time until it is done; then the next run, until there were so many kills. Some kills come after a time drawn uniformly
from what is left of the run, the others at a moment of a stage that is still to come (driver.Ledger), each kind of
moment alike often, half of them exactly there and half up to 50 ms later. Every finished run is held against an
uninterrupted one. The state is a file, so that a campaign that is itself killed goes on.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfimprove.store import write_atomically
from tests.chaos import outcome
from tests.chaos.driver import STARTING
from tests.chaos.launch import Launch

DEFAULT = ["--rounds", "2"]  # of the embedded default as shipped: real vLLM
WHOLE, LIMIT = "whole", 900.0  # seconds that one start of the program may take
CLOCK, FIRST = 0.3, 0.6  # share of kills by the clock; of the others, that of the stage that comes next
START = 20.0  # seconds until a start has caught up: imports and the engine, a guess that only steers the draw


class Campaign:
    """All that a campaign knows, in `campaign.json` of its folder.

    Args:
        folder: holds `runs/`, ledgers and the state; made when it is not there.
        arguments: of `selfimprove iterate`, less the run's name.
        seed: of the draw of the kills.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "campaign.json"
        self.known: dict[str, Any] = {"arguments": list(arguments), "seed": seed, "kills": [], "runs": [], "seconds": 0}
        if self.file.is_file():
            self.known = json.loads(self.file.read_text(encoding="utf-8"))
            if self.known["arguments"] != list(arguments):
                raise SystemExit(f"{folder} holds a campaign of other arguments: {self.known['arguments']}")
        self.kills: list[dict[str, Any]] = self.known["kills"]
        self.runs: list[dict[str, Any]] = self.known["runs"]
        self.dice = random.Random(f"{self.known['seed']}/{len(self.kills)}")
        self.earlier, self.began = float(self.known["seconds"]), time.monotonic()

    def save(self) -> None:
        """Keep what is known."""
        self.known["seconds"] = round(self.earlier + time.monotonic() - self.began, 1)
        write_atomically(self.file, json.dumps(self.known, indent=1) + "\n")

    def perform(self, count: int) -> None:
        """Kill until there were `count` kills, and let the last run end."""
        self.make_whole()
        while len(self.kills) < count or self.unfinished():
            name = f"killed-{len(self.runs) + 1:03d}"
            self.make_killed(name, count)
            self.runs.append(self.examine(name))
            self.save()
            told = self.runs[-1]
            say(f"{name}: {told['kills']} kills, {told['repeated']} repeated, {told['lost']} lost, {told['wrong']}")
            if not told["wrong"] and not told["repeated"] and not told["lost"]:
                shutil.rmtree(self.folder / "runs" / name)
                (self.folder / f"{name}.ledger").unlink()

    def unfinished(self) -> bool:
        """Whether a run was begun that is not done yet."""
        return (self.folder / "runs" / f"killed-{len(self.runs) + 1:03d}").exists()

    def make_whole(self) -> None:
        """The uninterrupted run, with its ledger; it must not contain a repetition itself."""
        run = self.folder / "runs" / WHOLE
        if "whole" not in self.known:
            shutil.rmtree(run, ignore_errors=True)
            (self.folder / f"{WHOLE}.ledger").unlink(missing_ok=True)
            began = time.monotonic()
            launch = Launch(self.folder, WHOLE, ["iterate", *self.known["arguments"], "--run", WHOLE])
            try:
                assert launch.wait(LIMIT) == "ended", "the uninterrupted run did not end"
            finally:
                launch.kill()
            assert launch.process.returncode == 0, launch.said()
            assert not outcome.leftovers(run)
            self.known["whole"] = {"seconds": round(time.monotonic() - began, 1), "rows": outcome.rows(run).total()}
            self.save()
        self.rows = outcome.rows(run)
        self.whole = self.folder / f"{WHOLE}.ledger"
        assert outcome.repeated(self.whole) == 0
        self.moments = outcome.moments(self.whole)
        self.stages = list(dict.fromkeys(stage for stage, _ in self.moments if stage.startswith("iter-")))
        self.spent = {
            stage: json.loads((run / stage / "manifest.json").read_text(encoding="utf-8"))["seconds"]
            for stage in self.stages
        }

    def make_killed(self, name: str, count: int) -> None:
        """One run, killed and resumed until it ends by itself."""
        while True:
            run = self.folder / "runs" / name
            began = (run / "recipe.toml").is_file()
            start = ["resume", name] if began else ["iterate", *self.known["arguments"], "--run", name]
            left = [stage for stage in self.stages if not (run / stage).exists()]
            wanted = None if len(self.kills) >= count or not left else self.draw(left)
            target = wanted["target"] if wanted else None
            launch = Launch(self.folder, name, start, target)
            try:
                ended = launch.wait(wanted["after"] if wanted else LIMIT)
                if ended == "moment" and target and not target["exact"]:
                    time.sleep(self.dice.uniform(0, 0.05))
            finally:
                processes = launch.kill()
            if ended == "ended":
                assert launch.process.returncode == 0, f"{name} failed by itself: {launch.said()}"
                return
            assert wanted, f"{name} did not end within {LIMIT} s: {launch.said()}"
            *_, (moment, stage, _) = [("process start", STARTING, ""), *outcome.read_ledger(launch.ledger)]
            kill = {"run": name, "stage": stage, "moment": moment, "processes": processes, "how": wanted["how"]}
            self.kills.append(kill | {"engine": engine(launch.ledger)})
            self.save()
            self.progress(count)

    def draw(self, left: list[str]) -> dict[str, Any]:
        """When the next kill comes."""
        if self.dice.random() < CLOCK:
            after = self.dice.uniform(0, START + sum(self.spent[stage] for stage in left))
            return {"how": "clock", "after": after, "target": None}
        at = 0 if self.dice.random() < FIRST else self.dice.randrange(min(3, len(left)))
        stage = left[at]
        possible = [moment for of, moment in self.moments if of == stage]
        moment = self.dice.choice(possible)
        target = {
            "stage": stage,
            "later": [*self.stages[self.stages.index(stage) + 1 :], "ending"],
            "moment": moment,
            "count": self.dice.randint(1, self.moments[stage, moment]),
            "exact": self.dice.random() < 0.5,
        }
        return {"how": "moment", "after": LIMIT, "target": target}

    def examine(self, name: str) -> dict[str, Any]:
        """A finished run beside the uninterrupted one."""
        run, ledger = self.folder / "runs" / name, self.folder / f"{name}.ledger"
        checked = Launch(self.folder, name, ["verify", name])
        ended = checked.wait(LIMIT)
        checked.kill()
        wrong = outcome.differences(run, self.folder / "runs" / WHOLE)
        if ended != "ended" or checked.process.returncode != 0:
            wrong.append(f"verify ended with {checked.process.returncode}: {checked.said()}")
        missing = self.rows - outcome.rows(run)
        unasked = outcome.kept(self.whole).keys() - outcome.asked(ledger)
        return {
            "run": name,
            "kills": sum(kill["run"] == name for kill in self.kills),
            "finished": outcome.rows(run).total(),
            "kept": len(outcome.kept(ledger)),
            "repeated": outcome.repeated(ledger),
            "lost": missing.total() + len(unasked),
            "steps": steps(ledger),
            "steps repeated": steps(ledger) - steps(self.whole),
            "wrong": wrong,
        }

    def progress(self, count: int) -> None:
        """One line a kill."""
        done, seconds = len(self.kills), self.earlier + time.monotonic() - self.began
        each = seconds / done
        last = self.kills[-1]
        say(
            f"{done}/{count} kills, {each:.1f} s each, {each * (count - done) / 60:.0f} min left; {last['run']}: "
            f"{last['stage']} at {last['moment']} ({last['how']}), {last['processes']} processes, {last['engine']}"
        )

    def report(self) -> dict[str, Any]:
        """The campaign in numbers."""
        return {
            "kills": len(self.kills),
            "runs": len(self.runs),
            "seconds": self.known["seconds"],
            "seconds of an uninterrupted run": self.known["whole"]["seconds"],
            "resumes": len(self.kills),
            "rows finished": sum(run["finished"] for run in self.runs),
            "answers kept": sum(run["kept"] for run in self.runs),
            "rows repeated": sum(run["repeated"] for run in self.runs),
            "rows lost": sum(run["lost"] for run in self.runs),
            "steps": sum(run["steps"] for run in self.runs),
            "steps repeated": sum(run["steps repeated"] for run in self.runs),
            "wrong": [f"{run['run']}: {one}" for run in self.runs for one in run["wrong"]],
            "by stage": dict(sorted(Counter(kill["stage"] for kill in self.kills).items())),
            "by moment": dict(Counter(kill["moment"] for kill in self.kills).most_common()),
            "by engine": dict(Counter(kill["engine"] for kill in self.kills).most_common()),
            "by draw": dict(Counter(kill["how"] for kill in self.kills)),
        }


def steps(ledger: Path) -> int:
    """Optimiser steps done."""
    return sum(moment == "step" for moment, _, _ in outcome.read_ledger(ledger))


def engine(ledger: Path) -> str:
    """What the last start's engine was doing when the kill came: an engine that has answered nothing yet starts."""
    state = "no engine"
    for moment, stage, _ in outcome.read_ledger(ledger):
        if moment == "lock" and stage == STARTING:
            state = "no engine"
        elif moment == "engine start":
            state = "engine starting"
        elif moment == "put" and state == "engine starting":
            state = "engine serving"
    return state


def table(told: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = []
    for name, value in told.items():
        if isinstance(value, dict):
            lines += ["", f"{name}:", *(f"  {count:5d}  {what}" for what, count in value.items())]
        elif isinstance(value, list):
            lines += [f"{name:32s}{len(value)}", *(f"  {one}" for one in value)]
        else:
            lines.append(f"{name:32s}{value}")
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress is talk."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def main() -> None:
    """Run a campaign and print its table; exit code 3 when a run was not what it had to be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="kills")
    parser.add_argument("--folder", type=Path, required=True, help="where runs and state lie")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    parser.add_argument("arguments", nargs="*", default=DEFAULT, help="of selfimprove iterate")
    given = parser.parse_args()
    campaign = Campaign(given.folder, given.arguments, given.seed)
    campaign.perform(given.count)
    told = campaign.report()
    print(table(told))
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if told["wrong"] or told["rows repeated"] or told["rows lost"]:
        sys.exit(3)


if __name__ == "__main__":
    main()
