"""The report of a study: every number anew from the rows of its finished runs, as JSON values and as Markdown."""

import statistics as plain
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove.errors import UserError
from selfimprove.evaluation import seeds, splits
from selfimprove.evaluation.statistics import holm
from selfimprove.plan import BASE, CONTROL_EVALUATE, SFT_EVALUATE, Step, steps
from selfimprove.recipe import Edit
from selfimprove.records import Sample
from selfimprove.results import signed
from selfimprove.run import place
from selfimprove.stages import evaluate
from selfimprove.store import Manifest, Run, read_manifest, read_rows
from selfimprove.study import Folder, Ledger, Planned, Study, finished, planned

MODES = (splits.GREEDY, splits.SAMPLED)
LEVEL = 0.05
BASE_ROW, CONTROL, SFT = "base", "SFT control", "after SFT"


@dataclass(frozen=True)
class Measured:
    """One evaluation: its key, and each prompt's mean score by mode."""

    key: str
    scores: Mapping[str, seeds.Scores]


@dataclass(frozen=True)
class Made:
    """A finished run."""

    planned: Planned
    evaluations: Mapping[str | int, Measured]  # by round, or by the name of a row that is none
    seconds: float
    environment: Mapping[str, str]

    @property
    def last(self) -> int:
        """The last round; earlier than the recipe's where the gate has stopped the run."""
        return max(row for row in self.evaluations if isinstance(row, int))


# --- what the runs hold ------------------------------------------------------------------------------------------


def collect(study: Study, folder: Folder) -> list[Made]:
    """The finished runs of a study, read from their rows."""
    read: dict[str, Measured] = {}  # runs share the artifacts of one key
    found = []
    for one in planned(study):
        run = place(folder.runs, one.name)
        if finished(run, one.recipe):
            found.append(_made(run, one, read))
    return found


def _made(run: Run, one: Planned, read: dict[str, Measured]) -> Made:
    evaluations: dict[str | int, Measured] = {}
    manifests: list[Manifest] = []
    for step in steps(one.recipe):
        manifest = read_manifest(run.path / step.directory)
        if manifest is None:  # the gate has stopped the run before
            continue
        manifests.append(manifest)
        if step.stage is evaluate:
            if manifest.key not in read:
                rows = read_rows(run.path / step.directory, "samples", Sample)
                scores = {mode: splits.per_prompt(rows, mode) for mode in MODES}
                read[manifest.key] = Measured(manifest.key, scores)
            evaluations[_row(step)] = read[manifest.key]
    return Made(one, evaluations, sum(m.seconds for m in manifests), manifests[0].environment)


def _row(step: Step) -> str | int:
    if step.iteration > BASE:
        return step.iteration
    return {CONTROL_EVALUATE: CONTROL, SFT_EVALUATE: SFT}.get(step.name, BASE_ROW)


# --- numbers -----------------------------------------------------------------------------------------------------


def numbers(study: Study, folder: Folder) -> dict[str, Any]:
    """Everything that the report says, as JSON values.

    Raises:
        UserError: no run is finished.
    """
    made, ledger, plan = collect(study, folder), folder.read(), planned(study)
    if not made:
        why = next(iter(ledger.failures.values()), "")
        raise UserError(
            f"no run of study '{study.name}' is finished{f'; one failed: {why}' if why else ''}",
            f"mend it, then the same command makes what is missing; logs are in {folder.path}"
            if why
            else "run it without --report-only",
        )
    complete = {one.planned.name for one in made}
    software = {item for one in made for item in one.environment.items() if item[0] not in ("platform", "receipt")}
    return {
        "study": study.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seeds": study.seeds,
        "versions": {name: sorted(v for n, v in software if n == name) for name in sorted({n for n, _ in software})},
        "runs": {"planned": len(plan), "finished": len(made)},
        "settings": _edit(study),
        "failed": {p.name: ledger.failures[p.name] for p in plan if p.name in ledger.failures.keys() - complete},
        "missing": [p.name for p in plan if p.name not in complete | ledger.failures.keys()],
        "stopped": {one.planned.name: one.last for one in made if one.last < one.planned.recipe.rounds},
        "arms": {name: _arm(study, name, plan) for name in study.arms},
        "worlds": {
            name: _world(study, name, [one for one in made if one.planned.world == name], ledger)
            for name in study.worlds
            if any(one.planned.world == name for one in made)
        },
    }


def _arm(study: Study, name: str, plan: Sequence[Planned]) -> dict[str, Any]:
    arm = study.arms[name]
    return {
        "recipe": arm.recipe,
        "rounds": sorted({one.recipe.rounds for one in plan if one.arm == name}),
        "settings": _edit(arm),
        "in": {world: _edit(edit) for world, edit in arm.within.items()},
        "claim": arm.claim,
        "control_of": arm.control_of,
    }


def _edit(edit: Edit) -> dict[str, Any]:
    return {"set": edit.set, "drop": edit.drop}


def _world(study: Study, name: str, made: Sequence[Made], ledger: Ledger) -> dict[str, Any]:
    arms = {arm: runs for arm in study.arms if (runs := [one for one in made if one.planned.arm == arm])}
    last = {arm: {one.planned.seed: one.evaluations[one.last] for one in runs} for arm, runs in arms.items()}
    against_base = {arm: (_by_seed(runs, BASE_ROW), last[arm]) for arm, runs in arms.items()}
    for row in (CONTROL, SFT):
        for label, runs in _shared(arms, row).items():
            against_base[label] = (_by_seed(runs, BASE_ROW), _by_seed(runs, row))
    return {
        "title": study.worlds[name].title,
        "settings": _edit(study.worlds[name]),
        "heldout": len(made[0].evaluations[BASE_ROW].scores[splits.GREEDY]),
        "rows": _rows(arms),
        "against base": _table(against_base),
        "against": {
            b: _table({arm: (last[b], last[arm]) for arm in arms if arm != b}) for b in study.baselines if b in arms
        },
        "controls": _table(
            {
                f"{arm} against {of}": (last[of], last[arm])
                for arm in arms
                if (of := study.arms[arm].control_of) is not None and of in arms
            }
        ),
        "seconds": {arm: _seconds(runs, ledger) for arm, runs in arms.items()},
    }


def _by_seed(runs: Iterable[Made], row: str | int) -> dict[int, Measured]:
    return {one.planned.seed: one.evaluations[row] for one in runs if row in one.evaluations}


def _shared(arms: Mapping[str, Sequence[Made]], row: str) -> dict[str, list[Made]]:
    """The runs that have this row, under one label where it is the same artifacts for all arms."""
    groups: list[tuple[dict[int, str], list[str]]] = []  # keys by seed, arms
    for arm, runs in arms.items():
        keys = {seed: measured.key for seed, measured in _by_seed(runs, row).items()}
        for known, members in groups:
            if keys.keys() & known.keys() and all(known.get(seed, key) == key for seed, key in keys.items()):
                known |= keys
                members.append(arm)
                break
        else:
            groups += [(keys, [arm])] if keys else []
    return {
        row if len(groups) == 1 else f"{row} of {', '.join(members)}": [one for arm in members for one in arms[arm]]
        for _, members in groups
    }


def _rows(arms: Mapping[str, Sequence[Made]]) -> list[dict[str, Any]]:
    """What was scored, round by round; round 0 is before the first."""
    found: list[dict[str, Any]] = []
    for row in (BASE_ROW, CONTROL, SFT):
        for label, of in _shared(arms, row).items():
            found.append({"arm": label, "round": 0, **_pooled(_by_seed(of, row))})
    for arm, runs in arms.items():
        for number in range(1, max(one.last for one in runs) + 1):
            found.append({"arm": arm, "round": number, **_pooled(_by_seed(runs, number))})
    return found


def _pooled(measured: Mapping[int, Measured]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode in MODES:
        told = seeds.pooled({seed: one.scores[mode] for seed, one in measured.items()})
        found[mode] = {
            "value": told.interval.value,
            "ci95": [told.interval.low, told.interval.high],
            "n": told.interval.n,
            "per_seed": told.per_seed,
        }
    return found


def _table(pairs: Mapping[str, tuple[Mapping[int, Measured], Mapping[int, Measured]]]) -> list[dict[str, Any]]:
    """A row for each pair (old, new) and mode; the correction is over all of them."""
    found: list[dict[str, Any]] = []
    for name, (old, new) in pairs.items():
        for mode in MODES:
            told = seeds.paired(
                {seed: one.scores[mode] for seed, one in old.items()},
                {seed: one.scores[mode] for seed, one in new.items()},
            )
            if told is None:
                continue
            difference, low, high, p, test, n, mde = told.comparison
            found.append(
                {
                    "arm": name, "mode": mode, "difference": difference, "ci95": [low, high], "p": p, "test": test,
                    "n": n, "mde": mde, "per_seed": told.per_seed, "same_sign": told.same_sign,
                    "excludes_zero": not low <= 0 <= high,
                }
            )  # fmt: skip
    for row, corrected in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = corrected
        row["verdict"] = _verdict(row)
    return found


def _verdict(row: Mapping[str, Any]) -> str:
    if row["p_holm"] >= LEVEL:
        return "no difference shown"
    return "improves" if row["difference"] > 0 else "worse"


def _seconds(runs: Sequence[Made], ledger: Ledger) -> dict[str, Any]:
    values = [one.seconds for one in runs]
    return {
        "mean": plain.fmean(values),
        "sd": plain.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "runs": len(values),
        "at_once": sorted({ledger.at_once[one.planned.name] for one in runs if one.planned.name in ledger.at_once}),
    }


# --- Markdown ----------------------------------------------------------------------------------------------------


def markdown(told: Mapping[str, Any]) -> str:
    """The page."""
    parts = [f"# Study {told['study']}", *_header(told), _settings(told)]
    for name, world in told["worlds"].items():
        parts += _section(told, name, world)
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(told: Mapping[str, Any]) -> list[str]:
    runs = told["runs"]
    versions = ", ".join(f"{name} {' and '.join(found)}" for name, found in told["versions"].items())
    lines = [
        f"Written {told['date']} by `selfimprove study`; do not edit. {runs['finished']} of {runs['planned']} runs are "
        f"finished, seeds {', '.join(map(str, told['seeds']))}. {versions}.",
        "Every score is computed anew from the stored answers (samples-*.parquet): the mean over seeds; in brackets "
        "its 95 % interval over prompts (a prompt's answers and seeds count as one observation; Student's t), in "
        "parentheses the lowest and the highest seed. The interval speaks for other prompts, given these seeds; what "
        "another seed may do is seen in the parentheses and in the column of signs.",
        "Differences are paired by prompt and seed, tested by a paired t-test on the prompts' means over the shared "
        "seeds. **Bold**: the interval, uncorrected, excludes zero. Holm p is corrected over its table; the words go "
        f'by it: "improves" and "worse" where it is below {LEVEL}, "no difference shown" elsewhere, which is not the '
        "same as no difference.",
    ]
    if told["failed"]:
        rows = [[f"`{name}`", why] for name, why in told["failed"].items()]
        lines.append("## Failed runs\n\nThey are in no table below.\n\n" + _grid(["run", "why"], rows))
    if told["missing"]:
        lines.append(f"Not finished, and in no table: {', '.join(f'`{name}`' for name in told['missing'])}.")
    if told["stopped"]:
        named = ", ".join(f"`{name}` after round {last}" for name, last in told["stopped"].items())
        lines.append(f"Stopped by their gate, so that this is their last round below: {named}.")
    return lines


def _settings(told: Mapping[str, Any]) -> str:
    rows = [["everywhere", "", "", changes]] if (changes := _changes(told["settings"])) else []
    rows += [[f"world {name}", "", "", _changes(world["settings"])] for name, world in told["worlds"].items()]
    for name, arm in told["arms"].items():
        inside = "".join(f"; in {world}: {_changes(edit)}" for world, edit in arm["in"].items())
        rows.append(
            [
                name,
                f"`{arm['recipe']}`",
                ", ".join(map(str, arm["rounds"])),
                (_changes(arm["settings"]) + inside).strip("; "),
            ]
        )
    return "## Settings\n\nWhat differs from the recipes.\n\n" + _grid(["", "recipe", "rounds", "settings"], rows)


def _changes(edit: Mapping[str, Any]) -> str:
    changed = [f"`{key} = {_toml(value)}`" for key, value in edit["set"].items()]
    return ", ".join([*changed, *(f"without `{key}`" for key in edit["drop"])])


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _section(told: Mapping[str, Any], name: str, world: Mapping[str, Any]) -> list[str]:
    title = world["title"] or name
    parts = [f"## {title}", f"World `{name}`, {world['heldout']} held-out prompts.", _summary(told, world)]
    for mode in MODES:
        parts.append(f"### {mode.capitalize()}, round by round\n\n{_rounds(world['rows'], mode)}")
    parts.append(f"### Last round against the base\n\n{_differences(world['against base'])}")
    for baseline, rows in world["against"].items():
        if rows:
            parts.append(f"### Last round against {baseline}\n\n{_differences(rows)}")
    if world["controls"]:
        parts.append(
            "### Controls against the arm they are a control of\n\nA control that is no worse than its arm leaves the "
            f"arm's idea unproved.\n\n{_differences(world['controls'])}"
        )
    return [*parts, _times(world["seconds"])]


def _summary(told: Mapping[str, Any], world: Mapping[str, Any]) -> str:
    """One row an arm: the claim beside what was found."""
    tables = {"the base": world["against base"], **world["against"]}
    rows = []
    for arm in world["seconds"]:
        cells = [arm, told["arms"][arm]["claim"]]
        for table in tables.values():
            verdicts = {row["mode"]: row["verdict"] for row in table if row["arm"] == arm}
            same = len(set(verdicts.values())) == 1
            both = next(iter(verdicts.values())) if same else ", ".join(f"{m}: {v}" for m, v in verdicts.items())
            cells.append(both or "-")
        rows.append(cells)
    return "### Claims and findings\n\n" + _grid(["arm", "claim", *(f"against {name}" for name in tables)], rows)


def _rounds(rows: Sequence[Mapping[str, Any]], mode: str) -> str:
    numbers_of_rounds = sorted({row["round"] for row in rows})
    grid = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = {row["round"]: _score(row[mode]) for row in rows if row["arm"] == arm}
        count = max(len(row[mode]["per_seed"]) for row in rows if row["arm"] == arm)
        grid.append([arm, str(count), *(cells.get(number, "") for number in numbers_of_rounds)])
    headings = ["before" if number == 0 else f"round {number}" for number in numbers_of_rounds]
    return _grid(["", "seeds", *headings], grid)


def _score(told: Mapping[str, Any]) -> str:
    spread = told["per_seed"].values()
    low, high = told["ci95"]
    return f"{_short(told['value'])} [{_short(low)}, {_short(high)}] ({_short(min(spread))} to {_short(max(spread))})"


def _differences(rows: Sequence[Mapping[str, Any]]) -> str:
    grid = []
    for row in rows:
        low, high = row["ci95"]
        interval = f"{signed(row['difference'])} [{signed(low)}, {signed(high)}]"
        grid.append(
            [
                row["arm"],
                row["mode"],
                f"**{interval}**" if row["excludes_zero"] else interval,
                _p(row["p"]),
                _p(row["p_holm"]),
                f"{row['same_sign']} of {len(row['per_seed'])}",
                row["verdict"],
            ]
        )
    return _grid(["arm", "score", "difference [95 %]", "p", "Holm p", "seeds of this sign", ""], grid)


def _times(seconds: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for arm, told in seconds.items():
        spread = "-" if told["sd"] is None else f"{told['sd']:.1f}"
        at_once = ", ".join(map(str, told["at_once"])) or "unknown"
        cells = [f"{told['mean']:.1f}", spread, f"{told['min']:.1f} to {told['max']:.1f}", str(told["runs"]), at_once]
        rows.append([arm, *cells])
    return (
        "### Time\n\nSeconds of a run's stages together, as its manifests have them; a stage that runs share counts in "
        "each of them, as if it were made there. Engine starts are mostly not in it: workers keep their engine. Where "
        "several runs were made at once, they took from each other.\n\n"
        + _grid(["arm", "mean s", "sd", "range", "runs", "at once"], rows)
    )


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if 0 <= value < 1 else f"{value:.3f}"


def _p(value: float) -> str:
    if value < 0.001:
        return f"{value:.0e}".replace("e-0", "e-") if value else "0"
    return "1" if value > 0.9995 else f"{value:.3f}".removeprefix("0")
