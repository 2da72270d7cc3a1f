"""The life of a pair or a prompt: where it came from, what was answered, judged, paired, turned over, and learned."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selfimprove.errors import UserError
from selfimprove.plan import INITIAL, Sources, Step, steps
from selfimprove.recipe import Recipe
from selfimprove.rows import Database, Reader, published
from selfimprove.stages import label, train
from selfimprove.stages.given import SOURCE as GIVEN
from selfimprove.store import Manifest, Run

NOT_RECORDED = "losses not recorded"
SCORED = ("prompt_id", "source", "sample")


def pair(run: Run, recipe: Recipe, pair_id: str) -> dict[str, Any]:
    """Everything that the run knows of a pair, as JSON values: its prompt's answers, verdicts, flips and losses.

    Raises:
        UserError: no published pair has this id.
    """
    with Database(run) as database:
        reader = Reader(run, list(steps(recipe)), database)
        rows = list(reader.open("pairs").equal("pair_id", pair_id)) if "pairs" in reader.kinds else []
        if not rows:
            raise _unknown(reader, "pair", pair_id, {"pairs": "pair_id"})
        told = _life(run, recipe, reader, rows[0]["prompt_id"], rows, int(rows[0]["iteration"]))
    return {"run": run.name, "pair_id": pair_id, **told}


def prompt(run: Run, recipe: Recipe, prompt_id: str) -> dict[str, Any]:
    """The same of a prompt: all its answers and pairs over all rounds, and why it gave none.

    Raises:
        UserError: no published row is of this prompt.
    """
    with Database(run) as database:
        reader = Reader(run, list(steps(recipe)), database)
        rows = list(reader.open("pairs").equal("prompt_id", prompt_id)) if "pairs" in reader.kinds else []
        told = _life(run, recipe, reader, prompt_id, rows, None)
        if not (told["prompt"]["text"] or told["rounds"] or told["held_out"] or told["prompt"]["set_aside"]):
            known: dict[str, str] = {
                kind: "prompt_id" for kind in ("prompts", "generations", "pairs", "samples") if kind in reader.kinds
            }
            raise _unknown(reader, "prompt", prompt_id, known)
    return {"run": run.name, "prompt_id": prompt_id, **told}


def _unknown(reader: Reader, what: str, name: str, where: Mapping[str, str]) -> UserError:
    near = [
        found
        for kind, column in where.items()
        if kind in reader.kinds
        for found in reader.open(kind).near(column, name)
    ]
    hint = (
        f"ids like it: {', '.join(dict.fromkeys(near))}"
        if near
        else f"selfimprove inspect {reader.run.name} shows what is there"
    )
    return UserError(f"run '{reader.run.name}' has no {what} '{name}'", hint)


def _life(
    run: Run, recipe: Recipe, reader: Reader, prompt_id: str, pairs: Sequence[dict[str, Any]], only: int | None
) -> dict[str, Any]:
    """The prompt, its rounds (or the one in which a pair was made), and the pairs' later appearances."""

    def rows(kind: str) -> list[dict[str, Any]]:
        return list(reader.open(kind).equal("prompt_id", prompt_id)) if kind in reader.kinds else []

    there = {step.directory: (step, manifest) for step, manifest in published(run, steps(recipe))}
    names = _policies(run, recipe, there.values())
    answers = [_answer(row, names) for kind in ("generations", "refinements") for row in rows(kind)]
    answers += _golds(rows("verdicts"), pairs)
    for kind in ("verdicts", "labels"):
        for row in rows(kind):
            for one in answers:
                if _iteration(one["stage"]) == _iteration(row["stage"]) and all(one[n] == row[n] for n in SCORED[1:]):
                    one["verdicts"].append({n: row.get(n) for n in ("stage", "judge", "score", "reason", "reply")})
    aside = list(reader.open("quarantine").of("row_id", prompt_id)) if "quarantine" in reader.kinds else []
    if pairs and "quarantine" in reader.kinds:  # a training sets pairs aside by their own ids
        aside += reader.open("quarantine").equal("row_id", *{p["pair_id"] for p in pairs})
    losses = list(reader.open("losses").equal("pair_id", *{p["pair_id"] for p in pairs})) if _has(reader, pairs) else []
    flips = rows("flips")
    told: dict[int, dict[str, Any]] = {}

    def at(stage: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"answers": [], "comparisons": [], "pairs": [], "flips": [], "set_aside": []}
        return told.setdefault(_iteration(stage), {"iteration": _iteration(stage), **empty})

    for one in answers:
        at(one["stage"])["answers"].append(one)
    for row in rows("comparisons"):
        at(row["stage"])["comparisons"].append({k: v for k, v in row.items() if k != "prompt_id"})
    for row in pairs:
        at(row["stage"])["pairs"].append(_pair(row, answers, losses, there, aside))
    for row in flips:
        if only is None or row["pair_id"] in {p["pair_id"] for p in pairs}:
            at(row["stage"])["flips"].append({k: v for k, v in row.items() if k != "prompt_id"})
    for row in aside:
        if _iteration(row["stage"]) > 0 and "synthesize" not in row["stage"]:
            at(row["stage"])["set_aside"].append(row)
    about = _prompt(rows, answers, aside, there)
    for one in answers:  # what was needed to tell which answers a pair is of
        del one["token_ids"], one["prompt"]
    if only is not None:  # a pair's: the answers of its own round, and later rounds where it turned up again
        told = {
            t: one if t == only else {**one, "answers": [], "comparisons": [], "set_aside": []}
            for t, one in told.items()
            if t == only or one["pairs"] or one["flips"]
        }
    return {
        "prompt": about,
        "rounds": [told[t] for t in sorted(told)],
        "held_out": []
        if only is not None
        else [{k: v for k, v in r.items() if k != "prompt_id"} for r in rows("samples")],
    }


def _has(reader: Reader, pairs: Sequence[dict[str, Any]]) -> bool:
    return bool(pairs) and "losses" in reader.kinds


def _iteration(stage: str) -> int:
    return int(stage[5:8])


def _policies(run: Run, recipe: Recipe, there: Iterable[tuple[Step, Manifest]]) -> dict[str, str]:
    """The identities of the policies and what they are called: where they were trained, or `initial`."""
    sources, names = Sources(run, recipe), {}
    for step, manifest in there:
        if step.stage is train and (identity := sources.digest(f"{step.directory}/{train.POLICY}")):
            names[identity] = step.directory
        if step.models.get(INITIAL) == INITIAL and isinstance(known := manifest.ingredients.get("models"), dict):
            names.setdefault(known.get(INITIAL, ""), INITIAL)
    return names


def _answer(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {
        **{name: row[name] for name in ("stage", "source", "sample", "text", "finish_reason", "tokens", "mean_logp")},
        "policy": row["policy"],
        "policy_is": names.get(row["policy"]),  # None: one trained within the stage, as the improver
        "token_ids": row["token_ids"],
        "prompt": row["prompt"],
        "verdicts": [],
    }


def _golds(verdicts: Iterable[Mapping[str, Any]], pairs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Golds and given answers are in no generation: what is known of one is its verdict, and its text by a pair."""
    texts = {
        (_iteration(row["stage"]), row[f"{side}_source"], number if row[f"{side}_source"] == GIVEN else 0): (
            row[side][0]["content"],
            row[f"{side}_token_ids"],
            row["prompt"][0]["content"],
        )
        for row in pairs
        for number, side in enumerate(("chosen", "rejected"))
        if row[f"{side}_source"] in ("gold", GIVEN)
    }
    found = []
    for row in verdicts:
        if row["source"] in ("gold", GIVEN):
            key = _iteration(row["stage"]), row["source"], row["sample"]
            text, ids, prompt = texts.get(key, (None, None, None))
            found.append(
                {
                    **{name: row[name] for name in ("stage", "source", "sample")},
                    **{"text": text, "finish_reason": None, "tokens": ids and len(ids), "mean_logp": None},
                    **{"policy": None, "policy_is": None, "token_ids": ids, "prompt": prompt, "verdicts": []},
                }
            )
    return found


def _prompt(
    rows: Any, answers: Sequence[Mapping[str, Any]], aside: Sequence[Mapping[str, Any]], there: Mapping[str, Any]
) -> dict[str, Any]:
    """Where the prompt is from; without a stage that wrote it, it is a seed or a held-out prompt."""
    dropped = [row for row in aside if "synthesize" in row["stage"]]
    if written := rows("prompts"):
        own = written[0]
        _, manifest = there[own["stage"]]
        about = {name: own[name] for name in ("stage", "text", "origin", "iteration", "keywords")}
        generator = manifest.ingredients.get("models", {}).get("generator")
        return about | {"generator": generator, "set_aside": dropped}
    texts = [answer["prompt"] for answer in answers if answer["prompt"]] or [row["prompt"] for row in rows("samples")]
    there_before = "given" if any(answer["source"] == GIVEN for answer in answers) else "seed"
    origin = "synthetic" if dropped else there_before if answers else "held out" if texts else None
    nothing: dict[str, Any] = {"stage": None, "iteration": None, "keywords": [], "generator": None}
    return {**nothing, "text": texts[0] if texts else None, "origin": origin, "set_aside": dropped}


def _pair(
    row: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    losses: Sequence[Mapping[str, Any]],
    there: Mapping[str, tuple[Step, Manifest]],
    aside: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A pair as a label stage published it, why these two, and what training made of it."""
    step, manifest = there[row["stage"]]
    section = manifest.ingredients.get("section", {})
    rule = {
        name: section[name]
        for name in ("pairing", "judge", "min_margin", "max_length_ratio", "quota")
        if name in section
    }
    sides = {}
    for side in ("chosen", "rejected"):
        same = [
            answer["sample"]
            for answer in answers
            if answer["source"] == row[f"{side}_source"]
            and answer["token_ids"] == row[f"{side}_token_ids"]
            and _iteration(answer["stage"]) == row["iteration"]
        ]
        sides[side] = {
            "source": row[f"{side}_source"],
            "sample": same[0] if same else None,
            "score": row[f"{side}_score"],
            "tokens": row[f"{side}_tokens"],
            "text": row[side][0]["content"],
        }
    about = {name: row[name] for name in ("stage", "pair_id", "iteration", "margin")}
    trained = _trained(row, losses, there, aside) if step.stage is label else []
    return {**about, "rule": rule, **sides, "training": trained}


def _trained(
    row: Mapping[str, Any],
    losses: Sequence[Mapping[str, Any]],
    there: Mapping[str, tuple[Step, Manifest]],
    aside: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """What each training that was given this label artifact made of the pair."""
    found = []
    for step, manifest in there.values():
        if step.stage is not train or row["stage"] not in step.inputs.values():
            continue
        own = [loss for loss in losses if (loss["pair_id"], loss["stage"]) == (row["pair_id"], step.directory)]
        told: dict[str, Any] = {"stage": step.directory, "steps": [loss["step"] for loss in own]}
        if own:
            told |= {
                which: {name: loss[name] for name in ("step", "epoch", "loss", "margin")}
                for which, loss in (("first", own[0]), ("last", own[-1]))
            }
        elif not any(output.path.startswith("losses-") for output in manifest.outputs):
            told["why"] = NOT_RECORDED
        else:
            reasons = [q["reason"] for q in aside if (q["row_id"], q["stage"]) == (row["pair_id"], step.directory)]
            told["why"] = f"not trained on: {reasons[0] if reasons else 'not drawn'}"
        found.append(told)
    return found
