"""What a finished run holds, beside what an uninterrupted one holds."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfimprove.stages.io import MEASURED


def differences(run: Path, whole: Path) -> list[str]:
    """Every way in which a finished run is not what the uninterrupted one is; empty when it is the same."""
    found = []
    ours, theirs = contents(run), contents(whole)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            found.append(f"{name}: {'differs' if name in ours and name in theirs else 'only in one'}")
    for link in ("latest", "best"):
        if not (run / link).is_symlink() or (run / link).readlink() != (whole / link).readlink():
            found.append(f"{link} points elsewhere")
    return found + leftovers(run)


def contents(run: Path) -> dict[str, Any]:
    """Key, row contract, metrics and outputs' hashes of every artifact; less what is measured of the machine."""
    found: dict[str, Any] = {}
    for path in run.glob("iter-*/*/manifest.json"):
        stage, told = path.parent.relative_to(run), json.loads(path.read_text(encoding="utf-8"))
        found |= {f"{stage} {name}": told[name] for name in ("key", "ingredients", "rows", "tokens")}
        found[f"{stage} metrics"] = unmeasured(told["metrics"])
        for output in told["outputs"]:
            if output["path"].endswith("metrics.jsonl"):
                lines = (path.parent / output["path"]).read_text(encoding="utf-8").splitlines()
                found[f"{stage}/{output['path']}"] = [unmeasured(json.loads(line)) for line in lines]
            else:
                digest = hashlib.sha256((path.parent / output["path"]).read_bytes()).hexdigest()
                found[f"{stage}/{output['path']}"] = digest, output["sha256"]
    return found


def unmeasured(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics that must be the same each time."""
    return {name: value for name, value in metrics.items() if name not in MEASURED}


def leftovers(run: Path) -> list[str]:
    """What only a run that is being made may hold."""
    patterns = ("iter-*/*.partial", "scratch", "**/*.tmp", "**/.tmp*")
    return [f"{path.relative_to(run)} is left over" for pattern in patterns for path in run.glob(pattern)]


def rows(run: Path) -> Counter[str]:
    """A hash of every row of every table, with the table's name."""
    import pyarrow.parquet as pq

    found: Counter[str] = Counter()
    for path in sorted(run.glob("iter-*/*/*.parquet")):
        table = path.relative_to(run).as_posix()
        for row in pq.read_table(path).to_pylist():
            text = json.dumps([table, row], sort_keys=True)
            found[hashlib.sha256(text.encode()).hexdigest()] += 1
    return found


def read_ledger(path: Path) -> Iterator[tuple[str, str, str]]:
    """Moment, stage, detail of every line."""
    for line in path.read_text(encoding="utf-8").splitlines():
        moment, stage, detail = json.loads(line)
        yield moment, stage, detail


def moments(ledger: Path) -> Counter[tuple[str, str]]:
    """How often each moment came, by stage."""
    return Counter((stage, moment) for moment, stage, _ in read_ledger(ledger))


def kept(ledger: Path) -> Counter[tuple[str, str]]:
    """How often an answer was kept, in a shard or a journal, by stage and key."""
    return Counter((stage, key) for moment, stage, key in read_ledger(ledger) if moment == "kept")


def asked(ledger: Path) -> set[tuple[str, str]]:
    """Stage and key of every answer that came to be kept, kept or killed on the threshold."""
    return {(stage, key) for moment, stage, key in read_ledger(ledger) if moment in ("put", "repeated put")}


def repeated(ledger: Path) -> int:
    """Answers that were had again although they were kept: put twice, or put where they were known."""
    again = sum(moment == "repeated put" for moment, _, _ in read_ledger(ledger))
    return max(again, sum(times - 1 for times in kept(ledger).values()))
