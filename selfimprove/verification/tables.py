"""The rows of artifacts: which file holds which kind, and reading them a batch at a time."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from selfimprove import data, records
from selfimprove.plan import Sources, Step
from selfimprove.recipe import Recipe
from selfimprove.records import Seed
from selfimprove.stages import discriminate, evaluate, generate, improve, label, synthesize, train
from selfimprove.store import Manifest, Run, row_seed

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 4096  # read at a time
Row = TypeVar("Row")

TABLES: Mapping[str, Mapping[str, type]] = {  # by the stage's module
    synthesize.__name__: {"prompts": records.Prompt},
    generate.__name__: {"generations": records.Generation},
    improve.__name__: {"refinements": records.Generation},
    discriminate.__name__: {"labels": records.Verdict, "pairs": records.Pair, "verdicts": records.Verdict},
    label.__name__: {
        "verdicts": records.Verdict,
        "comparisons": records.Comparison,
        "pairs": records.Pair,
        "flips": records.Flip,
        "anchors": records.Anchor,
    },
    train.__name__: {"losses": records.PairLoss},
    evaluate.__name__: {"samples": records.Sample},
}
IDS: Mapping[type, tuple[str, ...]] = {  # what no two rows of a table share
    records.Prompt: ("prompt_id",),
    records.Generation: ("prompt_id", "source", "sample"),
    records.Verdict: ("prompt_id", "source", "sample"),
    records.Comparison: ("prompt_id", "first_source", "first_sample", "second_source", "second_sample"),
    records.Pair: ("pair_id",),
    records.Flip: ("pair_id",),
    records.Anchor: ("prompt_id", "source", "sample"),
    records.Sample: ("prompt_id", "mode", "sample", "split"),
}


class Unchecked(Exception):
    """Something could not be checked, and why; it is no fault of the run."""


class At(NamedTuple):
    """An artifact that is looked at."""

    run: Run
    recipe: Recipe
    step: Step
    manifest: Manifest
    sources: Sources

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.run.path / self.step.directory

    def input(self, name: str) -> Path:
        """An input of the stage."""
        return self.sources.path(self.step.inputs[name])

    def seed(self, row: str) -> int:
        """The stage's seed of a row."""
        return row_seed(self.recipe.seed, self.step.iteration, self.step.name, row)

    def seeds(self) -> dict[str, Seed]:
        """The seeds by their ids, where the stage sees them."""
        if "seeds" not in self.step.inputs:
            return {}
        return {seed.prompt_id: seed for seed in data.read_seeds(self.input("seeds"))}


def record(step: Step, table: str) -> type | None:
    """The kind of a table's rows; None of one that is not known here."""
    if table == "quarantine":
        return records.Quarantined
    if step.stage is evaluate and table.startswith("benchmark-"):
        if table.endswith("-verdicts"):
            return records.Verdict
        return records.Comparison if table.endswith("-comparisons") else records.Sample
    return TABLES.get(step.stage.__name__, {}).get(table)


def shards(directory: Path, table: str) -> list[Path]:
    """The files of a table, in order."""
    return sorted(directory.glob(f"{table}-[0-9]*.parquet"))


def batches(directory: Path, table: str, columns: list[str] | None = None) -> Iterator["pa.RecordBatch"]:
    """The rows of a table, a few thousand at a time."""
    import pyarrow.parquet as pq

    for shard in shards(directory, table):
        yield from pq.ParquetFile(shard).iter_batches(ROWS, columns=columns)


def dicts(directory: Path, table: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some columns of a table, row by row."""
    for batch in batches(directory, table, columns):
        yield from batch.to_pylist()


def read(
    directory: Path, table: str, kind: Callable[..., Row], keep: Callable[["pa.RecordBatch"], "pa.RecordBatch"]
) -> Iterator[Row]:
    """The rows of a table that a filter keeps, as records."""
    for batch in batches(directory, table):
        for row in keep(batch).to_pylist():
            yield kind(**row)


class Lazy:
    """The chat template of a run, loaded when an answer's token ids are first wanted."""

    def __init__(self, at: At) -> None:
        self.at = at

    @cached_property
    def chat(self) -> Any:
        """See chat.Chat."""
        from selfimprove.chat import Chat

        return Chat(self.at.sources.path("initial"))

    def ids(self, prompt: str, completion: str) -> list[int]:
        """The token ids of a gold answer."""
        found: list[int] = self.chat.completion_ids(prompt, completion)
        return found
