"""What a run has to show: its rounds' scores by prompt, and what it cost; read from its published artifacts.

Scores are read by column, so that the answers themselves need no memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove.errors import UserError
from selfimprove.evaluation import splits
from selfimprove.plan import CONTROL_EVALUATE, Step, steps
from selfimprove.recipe import Recipe
from selfimprove.stages import evaluate
from selfimprove.status import read_scores
from selfimprove.store import Manifest, Run, intact, missing_outputs, read_manifest, shards

MODES = (splits.GREEDY, splits.SAMPLED)


@dataclass(frozen=True)
class Round:
    """The evaluation of one iteration; 0 is what round 1 starts with."""

    iteration: int
    directory: Path
    manifest: Manifest
    scores: Mapping[str, Any]  # of scores.json

    @property
    def heldout(self) -> str:
        """Hash of the file that its prompts are from."""
        return str(self.manifest.ingredients["inputs"]["heldout"])

    @cached_property
    def by_prompt(self) -> dict[str, dict[tuple[str, str], float]]:
        """Of each mode, the mean score of each prompt of the report split, by its id and text."""
        return read_means(self.directory)


class Cost(NamedTuple):
    """What stages took; `usd` is of the servers with a price, None where none of those asked has one."""

    tokens: int
    seconds: float
    usd: float | None
    unmeasured: int  # requests whose cost the servers did not say: in `usd` at their worst


def evaluated(run: Run, chosen: Recipe, iteration: int) -> Round:
    """The evaluation of an iteration's policy; of 0, of what round 1 starts with.

    Raises:
        UserError: it is not published, or a file of it is gone.
    """
    return read_round(run, evaluation(chosen, iteration))


def read_round(run: Run, step: Step) -> Round:
    """An evaluation that must be there.

    Raises:
        UserError: it is not published, or a file of it is gone.
    """
    manifest, scores = whole(run, step), read_scores(run, step)
    assert scores is not None  # the manifest lists it
    return Round(step.iteration, run.path / step.directory, manifest, scores["scores"])


def whole(run: Run, step: Step) -> Manifest:
    """The manifest of a step's artifact that must be there.

    Raises:
        UserError: it is not published, or a file of it is gone.
    """
    directory = run.path / step.directory
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{step.directory} of run '{run.name}' is not made yet", f"selfimprove resume {run.name}")
    if missing := missing_outputs(directory, manifest):
        raise UserError(
            f"{step.directory}/{missing[0]} of run '{run.name}' is missing or was altered",
            f"selfimprove resume {run.name} --from {step.directory}",
        )
    return manifest


def evaluation(chosen: Recipe, iteration: int) -> Step:
    """The step that evaluates an iteration's policy."""
    return [
        step
        for step in steps(chosen)
        if step.iteration == iteration and step.stage is evaluate and step.name != CONTROL_EVALUATE
    ][-1]


def read_means(directory: Path) -> dict[str, dict[tuple[str, str], float]]:
    """Of each mode, the mean score of each prompt of the report split, by its id and text."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    means: dict[str, dict[tuple[str, str], float]] = {mode: {} for mode in MODES}
    for shard in shards(directory, "samples"):
        wanted = ["prompt_id", "prompt", "mode", "score"]
        names = pq.read_schema(intact(shard)).names
        split = ["split"] if "split" in names else []  # older runs have the one split only
        table = pq.read_table(shard, columns=wanted + split)
        if split:
            table = table.filter(pc.equal(table["split"], splits.REPORT))
        grouped = table.group_by(["mode", "prompt_id", "prompt"]).aggregate([("score", "mean")])
        for row in grouped.to_pylist():
            if row["score_mean"] is not None:
                means[row["mode"]][row["prompt_id"], row["prompt"]] = row["score_mean"]
    return means


def costs(run: Run, chosen: Recipe) -> dict[str, Cost]:
    """What each stage took, of all iterations together, as the manifests have it."""
    found: dict[str, Cost] = {}
    for step in steps(chosen):
        if manifest := read_manifest(run.path / step.directory):
            name = step.name.partition("-")[2]
            own = cost(manifest, chosen)
            found[name] = total([found[name], own]) if name in found else own
    return found


def total(parts: Sequence[Cost]) -> Cost:
    """The sum; its USD is None where no part has any."""
    paid = [part.usd for part in parts if part.usd is not None]
    return Cost(
        sum(part.tokens for part in parts),
        sum(part.seconds for part in parts),
        sum(paid) if paid else None,
        sum(part.unmeasured for part in parts),
    )


def cost(manifest: Manifest, chosen: Recipe) -> Cost:
    """What a stage of a run took, as its manifest has it."""
    asked: Mapping[str, Mapping[str, Any]] = manifest.metrics.get("servers", {})
    paid = {name: float(spent["usd"]) for name, spent in asked.items()}
    prices = [chosen.servers[name] for name in asked if name in chosen.servers]
    known = any(paid.values()) or any(server.input_price or server.output_price for server in prices)
    return Cost(
        manifest.tokens,
        manifest.seconds,
        sum(paid.values()) if known else None,
        sum(int(spent["unmeasured"]) for spent in asked.values()),
    )


# --- how a score is written ----------------------------------------------------------------------------------------


def share(value: float) -> str:
    """`.021`, `-.004`, `1.000`."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:.3f}"


def signed(value: float) -> str:
    """`+.021`."""
    return f"{'-' if round(value, 3) < 0 else '+'}{share(abs(value))}"
