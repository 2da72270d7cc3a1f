"""What the report is made of, read from a run's artifacts column by column; text is read for the few rows shown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from selfimprove.evaluation import splits
from selfimprove.plan import BASE, CONTROL_EVALUATE, SFT_EVALUATE, Examined, Step
from selfimprove.stages import evaluate, train
from selfimprove.store import intact, read_json, read_lines, shards

if TYPE_CHECKING:
    import pyarrow as pa

MOST_POINTS = 100  # of a curve of one round; more steps are averaged


class Evaluation(NamedTuple):
    """The scores of one policy on the held-out prompts."""

    label: str  # "iteration 3"
    short: str  # "3"
    kind: Literal["base", "sft", "round", "control"]
    iteration: int
    directory: Path
    scores: Mapping[str, Mapping[str, Any]]  # by mode: value, ci95, n
    comparisons: Mapping[str, Mapping[str, Any]]
    by_prompt: Mapping[str, Mapping[str, float]]  # by mode: the mean score of each prompt's answers
    benchmarks: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # by name: kind, value, ci95, n, comparisons


class Point(NamedTuple):
    """A step of a curve; `value` is None where it was not recorded or is no number."""

    step: float
    value: float | None


def evaluations(root: Path, examined: Iterable[Examined]) -> list[Evaluation]:
    """Base, the policy after SFT, the rounds, the control: what of them is there, in this order."""
    found = [_evaluation(root, one.step) for one in examined if one.step.stage is evaluate and one.manifest]
    order = ("base", "sft", "round", "control")
    return sorted(found, key=lambda one: (order.index(one.kind), one.iteration))


def _evaluation(root: Path, step: Step) -> Evaluation:
    directory = root / step.directory
    told = read_json(directory / "scores.json")
    label, short, kind = _called(step)
    by_prompt = {mode: per_prompt(directory, mode) for mode in told["scores"]}
    return Evaluation(
        label, short, kind, step.iteration, directory, told["scores"], told["comparisons"], by_prompt,
        told.get("benchmarks", {}),
    )  # fmt: skip


def _called(step: Step) -> tuple[str, str, Literal["base", "sft", "round", "control"]]:
    if step.iteration > BASE:
        return f"iteration {step.iteration}", str(step.iteration), "round"
    if step.name == SFT_EVALUATE:
        return "after SFT", "SFT", "sft"
    if step.name == CONTROL_EVALUATE:
        return "SFT control", "control", "control"
    return "base", "base", "base"


def per_prompt(directory: Path, mode: str) -> dict[str, float]:
    """Mean score of each prompt's answers in a mode, of the report split."""
    import pyarrow.compute as pc

    rows = columns(directory, "samples", ("prompt_id", "mode", "score", "split"))
    rows = rows.filter(pc.and_(pc.equal(rows["mode"], mode), pc.is_valid(rows["score"])))
    if "split" in rows.column_names:
        rows = rows.filter(pc.equal(rows["split"], splits.REPORT))
    means = rows.group_by("prompt_id", use_threads=False).aggregate([("score", "mean")])
    return dict(zip(means["prompt_id"].to_pylist(), means["score_mean"].to_pylist(), strict=True))


def columns(directory: Path, name: str, wanted: Sequence[str]) -> "pa.Table":
    """Those columns of the shards `<name>-*.parquet` that they have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for shard in shards(directory, name):
        file = pq.ParquetFile(intact(shard))
        tables.append(file.read([column for column in wanted if column in file.schema_arrow.names]))
    return pa.concat_tables(tables) if tables else pa.table({})


def rows_at(directory: Path, name: str, wanted: Sequence[str], positions: Iterable[int]) -> dict[int, dict[str, Any]]:
    """The rows at these places, counted over all shards; a batch at a time, so that text does not fill the memory."""
    import pyarrow.parquet as pq

    left, found, offset = sorted(set(positions)), {}, 0
    for shard in shards(directory, name):
        file = pq.ParquetFile(intact(shard))
        for batch in file.iter_batches(batch_size=4096, columns=[*wanted]):
            here = [p for p in left if offset <= p < offset + batch.num_rows]
            for position in here:
                found[position] = batch.slice(position - offset, 1).to_pylist()[0]
            offset += batch.num_rows
    return found


def in_rounds(root: Path, file: str) -> dict[int, dict[str, Any]]:
    """A JSON file that a published stage of each iteration may have, as gate.json, by iteration."""
    found = {}
    for path in sorted(root.glob(f"iter-*/*/{file}")):
        if path.parent.suffix != ".partial":
            found[int(path.parts[-3].removeprefix("iter-"))] = read_json(path)
    return found


def curves(root: Path, examined: Iterable[Examined], names: Sequence[str]) -> dict[str, dict[int, list[Point]]]:
    """Training metrics by name and round; a metric that no round recorded has no entry."""
    found: dict[str, dict[int, list[Point]]] = {}
    for one in examined:
        path = root / one.step.directory / "metrics.jsonl"
        if one.step.stage is train and one.manifest and path.is_file():
            for name, points in _curves(path, names).items():
                found.setdefault(name, {})[one.step.iteration] = thinned(points)
    return {name: found[name] for name in names if name in found}


def _curves(path: Path, names: Sequence[str]) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {name: [] for name in names}
    for number, told in enumerate(read_lines(path), 1):
        for name in names:
            points[name].append(Point(told.get("step", number), finite(told.get(name))))
    return {name: those for name, those in points.items() if any(point.value is not None for point in those)}


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points, each the mean of as many steps in a row."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[k : k + size] for k in range(0, len(points), size or 1)]
    return [Point(group[-1].step, _mean([p.value for p in group if p.value is not None])) for group in groups]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def finite(value: Any) -> float | None:
    """The value where it is a number; infinity and NaN, which JSON lines may hold, are unknown."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
