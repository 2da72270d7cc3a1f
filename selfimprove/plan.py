"""What feeds what (`steps`), and what of it is done, to do, or stale and why (`examine`)."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from selfimprove import chat, collected, data, judges, reasons
from selfimprove.errors import UserError
from selfimprove.evaluation import lm_harness
from selfimprove.models import locate_model
from selfimprove.recipe import Choice, Evaluate, Recipe, Section
from selfimprove.stages import control, discriminate, evaluate, gate, generate, improve, label, sft, synthesize, train
from selfimprove.stages.io import LOSSES
from selfimprove.store import (
    SCHEMA,
    Manifest,
    Run,
    is_model_file,
    key_of,
    missing_outputs,
    model_files,
    read_json,
    read_manifest,
    read_memory,
    sha256,
    write_atomically,
)

BASE = 0  # the iteration that holds the base model's evaluation and the control
CONTROL_EVALUATE, SFT_EVALUATE = (
    "3-control-evaluate",
    "5-sft-evaluate",
)  # the evaluations of iteration 0 beside the base's
INITIAL = "initial"  # the source name of the model a run starts from
TEMPLATES = "templates"  # folder of the run with the texts of templates, by their hash


class Step(NamedTuple):
    """One stage of one iteration.

    Sources are `file:NAME`, `model:NAME`, `initial`, `iter-001/1-synthesize[/SUBDIRECTORY]`, or what a gate decided:
    `next:iter-001/6-gate`, the policy that the next round starts with, and `best:...`, the best evaluation so far.
    """

    iteration: int
    name: str  # of its directory, "2-generate"
    stage: ModuleType
    section: Section
    inputs: dict[str, str]
    models: dict[str, str]
    samples: bool  # whether it uses the engine's answers, whose numerics then enter the key
    servers: Sequence[str] = ()  # of the recipe, that it asks

    @property
    def directory(self) -> str:
        """The artifact's path in the run."""
        return f"iter-{self.iteration:03d}/{self.name}"


def steps(recipe: Recipe) -> Iterator[Step]:
    """Every stage of a run in order."""
    seeds, corpus, heldout = "file:seeds", "file:corpus", "file:heldout"
    place: dict[str, str] = {stage: f"{number}-{stage}" for number, stage in enumerate(recipe.stages, 1)}

    def at(iteration: int, stage: str, inside: str = "") -> str:
        return f"iter-{iteration:03d}/{place[stage]}{inside}"

    base = f"iter-{BASE:03d}/1-evaluate"
    held_out = {"heldout": heldout} | ({"selection": "file:selection"} if recipe.data.selection else {})
    files = {name: f"file:{name}" for benchmark in recipe.evaluate.benchmarks or [] for name in benchmark.files}
    benchmarks = {name: source for name, source in files.items() if name.startswith("benchmark:")}
    measured = held_out | files
    asking = {  # by judges of benchmarks; "initial" is one and the same in all evaluations
        name: INITIAL if name == INITIAL else f"model:{name}" for name in evaluate.models(recipe.evaluate)
    }

    def evaluation(iteration: int, name: str, policy: str, compared: dict[str, str], m0: str | None = None) -> Step:
        models = {"policy": policy} | asking | ({evaluate.M0: m0} if m0 else {})
        servers = evaluate.servers(recipe.evaluate)
        return Step(iteration, name, evaluate, recipe.evaluate, measured | compared, models, True, servers)

    yield evaluation(BASE, "1-evaluate", INITIAL, {})
    if recipe.control:
        tuned = f"iter-{BASE:03d}/2-control/{control.POLICY}"
        yield Step(BASE, "2-control", control, recipe.control, {"seeds": seeds}, {"initial": INITIAL}, False)
        yield evaluation(BASE, CONTROL_EVALUATE, tuned, {"base": base})

    start, before = INITIAL, base  # what round 1 starts from, and its scores
    if recipe.sft:
        start, before = f"iter-{BASE:03d}/4-sft/{sft.POLICY}", f"iter-{BASE:03d}/{SFT_EVALUATE}"
        yield Step(BASE, "4-sft", sft, recipe.sft, {"seeds": seeds}, {"initial": INITIAL}, recipe.sft.ratings)
        yield evaluation(BASE, SFT_EVALUATE, start, {"base": base})

    def policy(iteration: int, which: str = train.POLICY) -> str:
        if iteration == BASE:
            return start
        if recipe.gate and which == train.POLICY:
            return f"next:{at(iteration, 'gate')}"
        return at(iteration, "train", f"/{which}")

    for t in range(1, recipe.rounds + 1):
        now = recipe.at(t)
        initial, current, average = start, policy(t - 1), policy(t - 1, train.AVERAGE)
        prompts = {"seeds": seeds}
        if now.synthesize:
            earlier = {f"prompts-{k}": at(k, "synthesize") for k in range(1, t)}
            generator = {synthesize.GENERATOR: at(1, "synthesize", f"/{synthesize.GENERATOR}")} if t > 1 else {}
            yield Step(
                t, place["synthesize"], synthesize, now.synthesize,
                {"seeds": seeds, "corpus": corpus, **held_out, **benchmarks, **earlier},
                {"initial": initial, **generator},
                True,
            )  # fmt: skip
            prompts = {"prompts": at(t, "synthesize")}

        writers = {"current": average if now.generate and now.generate.policy == "average" else current}
        both = writers | {"initial": initial}
        if now.generate:
            used = both if now.generate.initial_n else writers
            yield Step(t, place["generate"], generate, now.generate, prompts, used, True)

        completions = {"generations": at(t, "generate")} if now.generate else {"pairs": "file:pairs"}
        if now.improve:
            yield Step(t, place["improve"], improve, now.improve, {"seeds": seeds, **completions}, both, True)
            completions |= {"refinements": at(t, "improve")}
        golds = {"seeds": seeds} if now.generate and not now.synthesize else {}
        if now.discriminate:
            known = {f"labels-{k}": at(k, "discriminate") for k in range(1, t)}
            last = {discriminate.DISCRIMINATOR: at(t - 1, "discriminate", f"/{discriminate.DISCRIMINATOR}")}
            yield Step(
                t, place["discriminate"], discriminate, now.discriminate, completions | golds | known,
                {"initial": initial, **(last if t > 1 else {})}, True,
            )  # fmt: skip
            completions |= {"opinions": at(t, "discriminate")}

        if golds and t > 1:  # a gold is judged once
            completions |= {"earlier": at(t - 1, "label")}
            if now.label.acquire:  # and a prompt is acquired once
                completions |= {f"acquired-{k}": at(k, "label") for k in range(1, t)}
        if now.label.relabel and t > 1:
            completions |= {"relabelled": at(t - 1, "label")}
        if now.label.audit and t > 1:
            completions |= {"anchors": at(1, "label")}
        asked = label.models(now.label)
        policies = {"initial": initial, "current": current}
        judging = {name: policies.get(name, f"model:{name}") for name in asked}
        yield Step(
            t, place["label"], label, now.label, completions | golds, {"initial": initial} | judging, bool(asked),
            label.servers(now.label),
        )  # fmt: skip

        first = {"current": t, "previous_and_current": max(1, t - 1), "all": 1}[now.train.pairs]
        pairs = {f"pairs-{k}": at(k, "label") for k in range(first, t + 1)}
        by_name = {"initial": initial, "previous": current, "average": average}
        by_name["path"] = f"model:{now.train.reference_path}"
        trained = {"start": by_name[now.train.start]}
        trained |= {name: by_name[name] for name in now.train.references if name != "ema"}
        if now.train.average:
            trained["average"] = average
        if now.train.chunks:  # their order is by what the initial model finds easy
            trained["initial"] = initial
        yield Step(t, place["train"], train, now.train, pairs, trained, now.train.search is not None)

        compared = {"base": base, "previous": at(t - 1, "evaluate") if t > 1 else before}
        if compared["previous"] == base:
            del compared["previous"]
        trained_policy = at(t, "train", f"/{train.POLICY}")
        yield evaluation(t, place["evaluate"], trained_policy, compared, start)
        if now.gate:
            last = {"last": at(t - 1, "gate")} if t > 1 else {}
            judged = {"evaluation": at(t, "evaluate"), "best": f"best:{last['last']}" if last else before, "base": base}
            yield Step(t, place["gate"], gate, now.gate, judged | last, {"trained": trained_policy}, False)


class Examined(NamedTuple):
    """A step against the disk; `ingredients` is None while an input does not exist yet."""

    step: Step
    status: Literal["done", "to do", "stale"]
    reason: str
    ingredients: dict[str, Any] | None
    manifest: Manifest | None


class Sources:
    """Where the sources of a run's steps are, and the digests of their content."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        self.run = run
        self.recipe = recipe
        self.files = recipe.files
        self._digests: dict[str, str] = {}
        self._manifests: dict[str, Manifest | None] = {}
        self._templates: dict[str, str] = {}

    def manifest(self, directory: str) -> Manifest | None:
        """The manifest of an artifact of the run, read once."""
        if directory not in self._manifests:
            self._manifests[directory] = read_manifest(self.run.path / directory)
        return self._manifests[directory]

    def resolve(self, source: str) -> str | None:
        """What a gate has decided in the place of `next:` and `best:`; None while it has not."""
        which, _, directory = source.partition(":")
        if which not in ("next", "best"):
            return source
        if self.manifest(directory) is None:
            return None
        try:
            told = read_json(self.run.path / directory / gate.FILE)
        except UserError:  # damaged, which `examine` says of the gate itself
            return None
        iteration = told["goes_on_from"] if which == "next" else told["best"]
        return (self._policies if which == "next" else self._evaluations)[iteration]

    @cached_property
    def _policies(self) -> dict[int, str]:
        """What each round's evaluation evaluated; of the base, what round 1 starts with."""
        return {s.iteration: s.models["policy"] for s in self._evaluated}

    @cached_property
    def _evaluations(self) -> dict[int, str]:
        return {step.iteration: step.directory for step in self._evaluated}

    @cached_property
    def _evaluated(self) -> list[Step]:
        return [s for s in steps(self.recipe) if s.stage is evaluate and s.name != CONTROL_EVALUATE]

    def path(self, source: str) -> Path:
        """The file or directory of a source.

        Raises:
            RuntimeError: a gate has not decided on it yet.
        """
        resolved = self.resolve(source)
        if resolved is None:
            raise RuntimeError(f"{source} is not decided")
        source = resolved
        if source == INITIAL:
            return locate_model(self.recipe.model.path, self.run.about().get("revision"))
        if source.startswith("model:"):
            return locate_model(source.removeprefix("model:"))
        if source.startswith("file:"):
            name = source.removeprefix("file:")
            if ":" in name:
                what, *_, benchmark = name.split(":")
                key = f"{benchmark}.{'answers' if what == 'answers' else 'path'}"
                return data.locate(self.files[name], key, "evaluate.benchmarks")
            return data.locate(self.files[name], name)
        return self.run.path / source

    def digest(self, source: str) -> str | None:
        """Content hash of a source; None while it is not published or decided, or when it is gone."""
        resolved = self.resolve(source)
        if resolved is None:
            return None
        source = resolved
        if source == INITIAL or source.startswith(("file:", "model:")):
            if source not in self._digests:
                try:
                    self._digests[source] = self._content(source)
                except (UserError, OSError):  # gone, or not ours to read
                    return None
            return self._digests[source]
        iteration, name, *inside = source.split("/")
        manifest = self.manifest(f"{iteration}/{name}")
        if manifest is None:
            return None
        if not inside:  # what tells of a training; no stage reads it, and metrics hold what was measured of the machine
            told = ("metrics.jsonl", LOSSES)
            return key_of({o.path: o.sha256 for o in manifest.outputs if not o.path.endswith(told)})
        files = {
            o.path.removeprefix(f"{inside[0]}/"): o.sha256 for o in manifest.outputs if o.path.startswith(inside[0])
        }
        return key_of({name: files[name] for name in files if is_model_file(name)})  # = model_identity of the directory

    def key(self, directory: str) -> str | None:
        """The key of an artifact of the run, published or not; None while what it is made from is not there."""
        if manifest := self.manifest(directory):
            return manifest.key
        step = next(one for one in steps(self.recipe) if one.directory == directory)
        ingredients = ingredients_of(step, self.recipe, self)
        return key_of(ingredients) if ingredients else None

    def template(self, name: str) -> str:
        """Content hash of a prompt template, read once."""
        if name not in self._templates:
            self._templates[name] = sha256(chat.template_path(name))
        return self._templates[name]

    def _content(self, source: str) -> str:
        """Content hash of what is outside the run; of a task of lm-evaluation-harness with all files it is made of."""
        path = self.path(source)
        if not source.startswith(f"file:benchmark:{lm_harness.KIND}:"):
            return remembered_digest(self.run, path)
        return key_of({str(i): remembered_digest(self.run, one) for i, one in enumerate(lm_harness.task(path).files)})


def find_step(recipe: Recipe, text: str) -> Step:
    """The step that a user calls `2/label`, `2/3-label` or `iter-002/3-label`.

    Raises:
        UserError: none is called so; the hint has the names.
    """
    found = re.fullmatch(r"(?:iter-)?(\d+)/((?:\d+-)?[a-z-]+)", text)
    every = list(steps(recipe))
    for step in every:
        if found and step.iteration == int(found[1]) and found[2] in (step.name, step.name.partition("-")[2]):
            return step
    base = ", ".join(called(step) for step in every if step.iteration == BASE)
    rounds = f"1/ to {recipe.rounds}/" if recipe.rounds > 1 else "1/"
    raise UserError(f"no stage '{text}'", f"stages: {base}; {rounds} {', '.join(recipe.stages)}; for example 1/label")


def called(step: Step) -> str:
    """What a user calls a step: `2/label`."""
    return f"{step.iteration}/{step.name.partition('-')[2]}"


def dependents(recipe: Recipe, directories: Collection[str]) -> list[str]:
    """Those stages, and all whose artifacts are made from theirs, by directory and in order."""
    affected: list[str] = []
    for step in steps(recipe):  # in order, so that dependents of dependents are found in one pass
        if step.directory in directories or upstream(step) & set(affected):
            affected.append(step.directory)
    return affected


def examine(run: Run, recipe: Recipe, again: Step | None = None) -> list[Examined]:
    """Every step of the run: done, to do, or stale and why; `again` is one that is to be made again in any case."""
    sources = Sources(run, recipe)
    found: list[Examined] = []
    waiting: set[str] = set()  # artifacts that will be made again
    for step in steps(recipe):
        directory = run.path / step.directory
        there = directory.exists()  # asked before: it may be published at this moment
        manifest = sources.manifest(step.directory)
        pending = sorted(upstream(step) & waiting)
        seen = seen_by(step, recipe, sources)
        ingredients = None if pending or _gaps(seen) else seen
        if manifest is None:
            status = "stale" if there else "to do"
            why = ["its manifest.json is missing"] if there else [f"after {pending[-1]}" if pending else "not made yet"]
        else:
            why = list(_why(step, recipe, sources, manifest, seen, pending))
            if again and again.directory == step.directory:
                why.insert(0, f"--from {called(step)}")
            status = "stale" if why else "done"
            if not why and (removed := collected.told(directory)):
                why = [removed]
        if status != "done":
            waiting.add(step.directory)
        found.append(Examined(step, status, "; ".join(why), ingredients, manifest))  # type: ignore[arg-type]
        if status == "done" and stops(run, step):
            break
    return found


def _why(
    step: Step, recipe: Recipe, sources: Sources, manifest: Manifest, seen: dict[str, Any], pending: list[str]
) -> Iterator[str]:
    """Every reason why an artifact is not what the recipe makes; none where it is."""
    directory = sources.run.path / step.directory
    if missing := missing_outputs(directory, manifest):
        more = f" (and {len(missing) - 1} more of its files)" if len(missing) > 1 else ""
        yield f"{missing[0]} is missing or was altered{more}"
    elsewhere = {
        name: source
        for name, source in (step.inputs | step.models).items()
        if not {source_directory(source)} & set(pending)
    }
    if pending or _gaps(seen) or key_of(seen) != manifest.key:
        known = reasons.Known(
            stage=step.stage.__name__.rpartition(".")[2],
            files=sources.files,
            model=recipe.model.path,
            texts=sources.run.path / TEMPLATES,
            sources=elsewhere,
        )
        yield from reasons.of(manifest.ingredients, seen, known)
    if pending:
        more = f" and {len(pending) - 3} more" if len(pending) > 3 else ""
        yield f"{', '.join(pending[:3])}{more} will be made again"


def _gaps(seen: dict[str, Any]) -> bool:
    """Whether an input of a step is not there."""
    return None in seen["inputs"].values() or None in seen["models"].values()


def stops(run: Run, step: Step) -> bool:
    """Whether a gate that is published ends the run."""
    return step.stage is gate and bool(read_json(run.path / step.directory / gate.FILE)["stop"])


def upstream(step: Step) -> set[str]:
    """The directories of the artifacts that a step reads."""
    return {source_directory(source) for source in [*step.inputs.values(), *step.models.values()]}


def source_directory(source: str) -> str:
    """The artifact that a source is of, or is decided by; of what is outside the run, the source itself."""
    return "/".join(source.removeprefix("next:").removeprefix("best:").split("/")[:2])


def ingredients_of(step: Step, recipe: Recipe, sources: Sources) -> dict[str, Any] | None:
    """Everything a stage can see, readable; its hash is the artifact's key. None while an input is missing."""
    seen = seen_by(step, recipe, sources)
    return None if _gaps(seen) else seen


def seen_by(step: Step, recipe: Recipe, sources: Sources) -> dict[str, Any]:
    """The same, with None as the digest of an input or model that is not there."""
    inputs = {name: sources.digest(source) for name, source in step.inputs.items()}
    models = {name: sources.digest(source) for name, source in step.models.items()}
    files = {
        name: sha256(path) if path.is_file() else "missing"
        for choice in _choices(step.section)
        for name, path in judges.files(choice).items()
    }
    templates = dict.fromkeys([*step.stage.TEMPLATES, *_templates(step.section)])
    optional = {"servers": {name: recipe.servers[name].identity for name in step.servers}, "files": files}
    return {
        "schema": SCHEMA,
        "stage": step.name,
        "version": step.stage.VERSION,
        "iteration": step.iteration,
        "seed": recipe.seed,
        "section": _told(step.section),
        "engine": recipe.engine.model_dump() if step.samples else {},
        "templates": {name: sources.template(name) for name in templates},
        "inputs": inputs,
        "models": models,
    } | {name: what for name, what in optional.items() if what}


def _told(section: Section) -> dict[str, Any]:
    """A section as keys have it: files of benchmarks enter by their content, not by their places."""
    table = section.model_dump(exclude_none=True)
    for benchmark in table.get("benchmarks", []):
        benchmark.pop("path")
        benchmark.pop("answers", None)
    return table


def _templates(section: Section) -> list[str]:
    """The prompt templates that a section's judges and benchmarks read."""
    found = [name for choice in _choices(section) for name in judges.templates(choice)]
    return found + (evaluate.templates(section) if isinstance(section, Evaluate) else [])


def _choices(section: Section) -> Iterator[Choice]:
    for _, value in section:
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Choice):
                yield one
            elif isinstance(one, Section):
                yield from _choices(one)


def keep_templates(run: Run, ingredients: dict[str, Any]) -> None:
    """Keep the texts of the templates that a stage is made with, so that a later change can be shown by its lines."""
    for name, digest in ingredients["templates"].items():
        kept = run.path / TEMPLATES / digest
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            write_atomically(kept, chat.template_path(name).read_bytes().decode("utf-8"))


def remembered_digest(run: Run, path: Path) -> str:
    """Content hash of a file or model directory outside the run, hashed again only when size or time changed."""
    files = model_files(path) if path.is_dir() else [path]
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    memory = run.path / "digests.json"
    known = read_memory(memory)
    match known.get(str(path)):
        case {"stamp": seen, "digest": str(remembered)} if seen == stamp and re.fullmatch("[0-9a-f]{64}", remembered):
            return remembered
    digest = key_of({f.name: sha256(f) for f in files}) if path.is_dir() else sha256(path)
    if run.locked:  # readers of a run write nothing
        known[str(path)] = {"stamp": stamp, "digest": digest}
        write_atomically(memory, json.dumps(known, indent=1) + "\n")
    return digest
