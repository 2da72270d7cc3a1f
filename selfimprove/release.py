"""What there is to say of a policy that leaves its run: how it was made, from what, what was measured, and what not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import collected, data, method
from selfimprove.comparison import compared
from selfimprove.errors import UserError
from selfimprove.method import anonymous
from selfimprove.models import is_hub_id
from selfimprove.plan import BASE, CONTROL_EVALUATE, Sources, Step, steps
from selfimprove.recipe import Recipe
from selfimprove.results import Round, read_round, whole
from selfimprove.stages import evaluate, label, sft, train
from selfimprove.status import read_decision, standing
from selfimprove.store import Manifest, Run, broken_outputs, intact, shards

OWN = "this model"
PICKED = {
    "gate": "the round that the run's gate promoted last",
    "score": "the round of the highest sampled score on the report prompts themselves, which flatters its scores",
    "latest": "the latest round",
    "number": "a round named by its number",
}


class Model(NamedTuple):
    """The model that the run started from."""

    name: str  # a hub id, `demo:model`, or the last part of a directory's path
    hub: bool
    revision: str | None
    identity: str  # content hash


class DataFile(NamedTuple):
    """An input file: what it was for is known by its name."""

    name: str
    file: str
    sha256: str
    rows: int | None  # None where it is gone or was changed since


class Trained(NamedTuple):
    """A training that the policy went through."""

    iteration: int
    manifest: Manifest
    pairs: list[int]  # of which rounds


class Labelled(NamedTuple):
    """The preference pairs of a round."""

    iteration: int
    directory: Path
    manifest: Manifest
    counts: dict[str, dict[str, int]]  # rows by value of `chosen_source`, `rejected_source`, `source`
    unscored: int  # rows with a side whose score is unknown


@dataclass(frozen=True)
class Release:
    """Everything that the cards of a policy say."""

    run: str
    recipe: Recipe
    iteration: int
    picked: str  # a key of PICKED
    policy: Path
    base: Model
    sft: Manifest | None
    trained: list[Trained]
    labelled: list[Labelled]
    data: list[DataFile]
    models: list[tuple[str, str]]  # others that judged or were references: name, hash
    rounds: dict[str, Round]  # OWN, "base", "after SFT", "SFT control"
    comparisons: list[dict[str, Any]]  # of this model against the others
    decision: dict[str, Any] | None
    method: method.Method | None
    papers: list[str]  # arXiv numbers
    licence: str | None


def pick(run: Run, chosen: Recipe, iteration: int | None, latest: bool) -> tuple[int, str]:
    """The iteration to export and how it was picked: the one given, the latest, or the best.

    Raises:
        UserError: no such round, none is evaluated, or a gate has promoted none.
    """
    if iteration is not None:
        if iteration > chosen.rounds:
            raise UserError(f"run '{run.name}' has no round {iteration}", f"its recipe has rounds 1 to {chosen.rounds}")
        return iteration, "number"
    found = standing(run, chosen)
    if found is None:
        raise UserError(f"no round of run '{run.name}' is evaluated yet", f"selfimprove resume {run.name}")
    if latest:
        return found.latest, "latest"
    if found.best == BASE:
        raise UserError(
            f"the gate of run '{run.name}' has promoted no round, so there is no best one to export",
            "--latest or --iteration N exports a round all the same",
        )
    return found.best, "gate" if chosen.gate else "score"


def gather(run: Run, chosen: Recipe, iteration: int, picked: str, licence: str | None) -> Release:
    """The facts of a finished iteration, its files checked against their manifests.

    Raises:
        UserError: a stage of the iteration is not published, or a file is not what its manifest says.
    """
    every = [step for step in steps(chosen) if step.iteration <= iteration]
    for step in every:
        if step.iteration == iteration:
            whole(run, step)
    trained, labelled = _lineage(run, chosen, every, iteration)
    leaving = {(iteration, train), *((of.iteration, label) for of in labelled)}
    for step in every:
        if (step.iteration, step.stage) in leaving:
            _inside(run, run.path / step.directory)
            for wrong in broken_outputs(run.path / step.directory, whole(run, step)):
                raise UserError(wrong, f"selfimprove verify {run.name} says all that is broken")
    rounds = _rounds(run, every, iteration)
    last = next(step for step in every if step.iteration == iteration and step.stage is train)
    decided = [d for step in every if step.iteration == iteration and (d := read_decision(run, step))]
    tuned = next((step for step in every if step.stage is sft), None)
    said = method.method(chosen)
    collected.require(run.path, run.path / last.directory / train.POLICY)
    return Release(
        run=run.name,
        recipe=chosen,
        iteration=iteration,
        picked=picked,
        policy=run.path / last.directory / train.POLICY,
        base=_base(run, chosen, every),
        sft=whole(run, tuned) if tuned else None,
        trained=trained,
        labelled=labelled,
        data=_data(run, chosen, every),
        models=_models(run, every),
        rounds=rounds,
        comparisons=_comparisons(rounds),
        decision=decided[0] if decided else None,
        method=said,
        papers=method.papers(chosen, said),
        licence=licence,
    )


def _inside(run: Run, directory: Path) -> None:
    """Nothing that leaves the run may have come from outside it by a link."""
    root = run.path.resolve()
    for path in [directory, *sorted(directory.rglob("*"))]:
        if not path.resolve().is_relative_to(root):
            raise UserError(
                f"{path} is a link to something outside the run",
                f"put the file itself there; selfimprove verify {run.name} says whether it is the right one",
            )


def _lineage(run: Run, chosen: Recipe, every: Sequence[Step], iteration: int) -> tuple[list[Trained], list[Labelled]]:
    """The trainings behind a policy in order, from the initial model on, and the pairs that they were given."""
    sources = Sources(run, chosen)
    makers = {f"{step.directory}/{train.POLICY}": step for step in every if step.stage is train}
    step: Step | None = next(of for of in makers.values() if of.iteration == iteration)
    trained: list[Trained] = []
    while step:
        pairs = sorted(int(name.removeprefix("pairs-")) for name in step.inputs if name.startswith("pairs-"))
        trained.insert(0, Trained(step.iteration, whole(run, step), pairs))
        step = makers.get(sources.resolve(step.models["start"]) or "")
    given = {number for of in trained for number in of.pairs}
    return trained, [_labelled(run, of) for of in every if of.stage is label and of.iteration in given]


def _labelled(run: Run, step: Step) -> Labelled:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    manifest, directory = whole(run, step), run.path / step.directory
    columns = ["chosen_source", "rejected_source", "source", "chosen_score", "rejected_score"]
    counts: dict[str, dict[str, int]] = {name: {} for name in columns[:3]}
    unscored = 0
    for shard in shards(directory, "pairs"):
        table = pq.read_table(intact(shard), columns=columns)
        unknown = pc.or_(pc.is_null(table["chosen_score"]), pc.is_null(table["rejected_score"]))
        unscored += pc.sum(unknown).as_py() or 0
        for name, of in counts.items():
            for row in table[name].value_counts().to_pylist():
                of[row["values"]] = of.get(row["values"], 0) + row["counts"]
    return Labelled(step.iteration, directory, manifest, counts, unscored)


def _base(run: Run, chosen: Recipe, every: Sequence[Step]) -> Model:
    path = chosen.model.path
    hub = is_hub_id(path)
    identity = str(whole(run, every[0]).ingredients["models"]["policy"])
    revision = run.about().get("revision") if hub else None
    return Model(path if hub or path.startswith("demo:") else Path(path).name, hub, revision, identity)


def _data(run: Run, chosen: Recipe, every: Sequence[Step]) -> list[DataFile]:
    """The input files that stages up to the iteration have read, by the hashes in their manifests."""
    sources = Sources(run, chosen)
    found: dict[str, DataFile] = {}
    for name, source, digest in _outside(run, every, "inputs", "file:"):
        key = source.removeprefix("file:")
        known = sources.digest(source) == digest
        rows = data.count(sources.path(source), as_lines=key == "corpus") if known else None
        found.setdefault(key, DataFile(name, anonymous(sources.files[key]), digest, rows))
    return list(found.values())


def _models(run: Run, every: Sequence[Step]) -> list[tuple[str, str]]:
    found = _outside(run, every, "models", "model:")
    return list(dict.fromkeys((anonymous(source.removeprefix("model:")), digest) for _, source, digest in found))


def _outside(run: Run, every: Sequence[Step], kind: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Name, source and hash of what stages have read from outside the run."""
    for step in every:
        named = step.inputs if kind == "inputs" else step.models
        wanted = {name: source for name, source in named.items() if source.startswith(prefix)}
        if wanted:
            known = whole(run, step).ingredients[kind]
            yield from ((name, source, known[name]) for name, source in wanted.items() if name in known)


def _rounds(run: Run, every: Sequence[Step], iteration: int) -> dict[str, Round]:
    names = {CONTROL_EVALUATE: "SFT control", "1-evaluate": "base"}
    found: dict[str, Round] = {}
    for step in every:
        if step.stage is evaluate and step.iteration in (BASE, iteration):
            name = OWN if step.iteration == iteration else names.get(step.name, "after SFT")
            found[name] = read_round(run, step)
    return found


def _comparisons(rounds: Mapping[str, Round]) -> list[dict[str, Any]]:
    """The exported model against each of the others, paired by prompt, Holm's correction over all of them."""
    others = [(name, of) for name, of in rounds.items() if name != OWN]
    return compared([({"against": name}, of, rounds[OWN]) for name, of in others])
