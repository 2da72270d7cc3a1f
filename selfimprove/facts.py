"""The figures of a run that its health is read from: every artifact once, column by column, in flat memory."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from selfimprove import plan, recipe
from selfimprove.evaluation import diversity, splits
from selfimprove.evaluation.round_facts import RoundFacts
from selfimprove.stages import evaluate, generate, label, synthesize, train
from selfimprove.store import Manifest, Run, intact, missing_outputs, read_json, read_lines, read_manifest, shards

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ROWS = 4096  # read at a time
NOT_ASKED = ("not acquired", "acquired in an earlier round", "over quota")  # prompts that were not to give a pair
Encode = Callable[[list[str]], "np.ndarray[Any, np.dtype[Any]]"]  # texts -> vectors, one a row
Figures = dict[str, Any]


class Pairs(NamedTuple):
    """What training needs to know of a round's pairs."""

    number: int
    chosen_tokens: int


def gather(run: Run, chosen: recipe.Recipe, encode: Encode | None = None) -> list[RoundFacts]:
    """The facts of every round that has begun, ascending; what is not made yet, or is gone, is None.

    Round 0 is the model that round 1 begins with: after [sft], where the recipe has it, else the base.

    Args:
        run: finished or not.
        chosen: its recipe.
        encode: a text encoder, for the mean cosines; without one they are None.
    """
    found: dict[int, Figures] = {}
    prompts: dict[int, list[str]] = {}
    answers: dict[int, list[str]] = {}
    pairs: dict[int, Pairs] = {}
    beside = {plan.CONTROL_EVALUATE, "1-evaluate" if chosen.sft else plan.SFT_EVALUATE}
    for step in plan.steps(chosen):
        directory, t = run.path / step.directory, step.iteration
        manifest = read_manifest(directory)
        if manifest is None or missing_outputs(directory, manifest) or (t == plan.BASE and step.name in beside):
            continue
        figures = found.setdefault(t, {})
        if step.stage is synthesize:
            figures |= _synthesized(manifest)
            prompts[t] = _drawn(batch["text"] for batch in _columns(directory, "prompts", ["text"]))
        elif step.stage is generate:
            figures |= _generated(directory)
        elif step.stage is label:
            pairs[t], labelled = _labelled(directory, manifest)
            figures |= labelled
        elif step.stage is train and isinstance(step.section, recipe.Train):
            used = [int(name.removeprefix("pairs-")) for name in step.inputs if name.startswith("pairs-")]
            figures |= _trained(directory, step.section, [pairs[k] for k in used if k in pairs])
        elif step.stage is evaluate and isinstance(step.section, recipe.Evaluate):
            figures |= _evaluated(directory, manifest, step.section)
            answers[t] = _drawn(batch["text"] for batch in _sampled(directory, ["text"]))
    for kind, texts in (("prompt", prompts), ("answer", answers)):
        for t, measured in zip(texts, diversity.compare(list(texts.values())), strict=True):
            found[t] |= _alike(kind, measured)
            if encode and len(texts[t]) > 1:
                found[t][f"{kind}_cosine"] = diversity.mean_cosine(encode(texts[t]))
    return [RoundFacts(iteration=t, **found[t]) for t in sorted(found)]


def _alike(kind: str, found: diversity.Diversity) -> Figures:
    figures = {
        f"{kind}_distinct": found.distinct,
        f"{kind}_self_bleu": found.self_bleu,
        f"{kind}_compression": found.compression,
    }
    return figures | ({"repetition": found.repetition} if kind == "answer" else {})


def _synthesized(manifest: Manifest) -> Figures:
    rows = manifest.rows
    duplicates = sum(number for reason, number in rows.quarantined.items() if "duplicate" in reason)
    return {"duplicate_share": duplicates / rows.rows_in if rows.rows_in else None}


def _generated(directory: Path) -> Figures:
    """How the current policy's samples differ, and how many of them end; the rows of a prompt stand together."""
    import pyarrow.compute as pc

    ended: Counter[bool] = Counter()

    def rows() -> Iterator[tuple[str, str]]:
        for batch in _columns(directory, "generations", ["prompt_id", "source", "text", "finish_reason"]):
            own = batch.filter(pc.equal(batch["source"], "current"))
            stops = pc.sum(pc.equal(own["finish_reason"], "stop")).as_py() or 0
            ended.update({True: stops, False: len(own) - stops})
            yield from zip(own["prompt_id"].to_pylist(), own["text"].to_pylist(), strict=True)

    differ = []
    for _, group in itertools.groupby(rows(), key=lambda row: row[0]):
        counts = Counter(text for _, text in group)
        n = counts.total()
        if n > 1:
            differ.append(1 - sum(c * (c - 1) for c in counts.values()) / (n * (n - 1)))
    return {"answers_differ": _mean(differ), "ended_share": ended[True] / ended.total() if ended.total() else None}


def _labelled(directory: Path, manifest: Manifest) -> tuple[Pairs, Figures]:
    import pyarrow.compute as pc

    number = scored = chosen = rejected = 0
    gap = 0.0
    columns = ["chosen_score", "rejected_score", "chosen_token_ids", "rejected_token_ids"]
    for batch in _columns(directory, "pairs", columns):
        gaps = pc.subtract(batch["chosen_score"], batch["rejected_score"])  # null where one is unknown
        gap += pc.sum(gaps).as_py() or 0.0
        scored += len(gaps) - gaps.null_count
        chosen += pc.sum(pc.list_value_length(batch["chosen_token_ids"])).as_py() or 0
        rejected += pc.sum(pc.list_value_length(batch["rejected_token_ids"])).as_py() or 0
        number += len(batch)
    asked = manifest.rows.rows_in - sum(manifest.rows.quarantined.get(reason, 0) for reason in NOT_ASKED)
    figures: Figures = {
        "paired_share": manifest.rows.rows_out / asked if asked else None,
        "score_gap": gap / scored if scored else None,
        "pair_length_ratio": chosen / rejected if rejected else None,
    }
    return Pairs(number, chosen), figures | _audited(directory / "audit.json")


def _audited(path: Path) -> Figures:
    """What audit.json says of the judge; stages that asked none have no such file."""
    if not path.is_file():
        return {}
    told = read_json(path)
    pairs, scores, drift = told.get("pairs") or {}, told.get("scores") or {}, told.get("drift") or {}

    def rate(of: Figures, name: str) -> float | None:
        return of[name]["value"] if of.get(name) else None

    return {
        "length_correlation": (scores.get("length_within") or {}).get("spearman"),
        "prefers_longer": rate(pairs, "prefers_longer"),
        "flip_rate": rate(pairs, "flipped"),
        "unreadable_share": rate(pairs, "unreadable") if pairs else rate(scores, "unknown"),
        "leniency": drift.get("effect"),
        "lenient": drift.get("alarm"),
    }


def _trained(directory: Path, section: recipe.Train, pairs: Sequence[Pairs]) -> Figures:
    steps = list(read_lines(directory / "metrics.jsonl"))
    if section.references:  # while the policy is the reference all rewards are 0, and no pair is ranked
        moving = next((k for k, step in enumerate(steps) if step["learning_rate"] > 0), len(steps))
        steps = steps[moving + 1 :]

    def curve(name: str) -> list[float]:
        return [step[name] for step in steps if name in step]

    accuracies, logps, nats = curve("rewards/accuracies"), curve("logps/chosen"), _end(curve("logps/chosen_change"))
    number, tokens = sum(of.number for of in pairs), sum(of.chosen_tokens for of in pairs)
    if nats is None and not section.references and len(logps) > 1:  # batches of different pairs, so noisier
        nats = (_end(logps) or 0.0) - (_start(logps) or 0.0)
    spread, mean = _end(curve("gamma/sd")), _end(curve("gamma/mean"))
    trainable = section.noise is not None and section.noise.kind == "trainable"
    return {
        "accuracy_start": _start(accuracies),
        "accuracy_end": _end(accuracies),
        "chosen_change": nats * number / tokens if nats is not None and tokens else None,
        "noise_sigma": _end(curve("noise/sigma")) if trainable else None,
        "noise_bound": section.noise.bound if section.noise and trainable else None,
        "margin_spread": spread / mean if spread is not None and mean else None,
    }


def _evaluated(directory: Path, manifest: Manifest, section: recipe.Evaluate) -> Figures:
    import pyarrow.compute as pc

    rows = cut = tokens = 0
    logps: dict[str, list[tuple[float, float]]] = {}  # of each prompt's answers: under the policy, under M_0
    for batch in _sampled(directory, ["prompt_id", "finish_reason", "tokens", "logps", "initial_logps"]):
        rows += len(batch)
        cut += pc.sum(pc.equal(batch["finish_reason"], "length")).as_py() or 0
        if "tokens" in batch.schema.names:
            tokens += pc.sum(batch["tokens"]).as_py() or 0
        if {"logps", "initial_logps"} <= set(batch.schema.names):
            columns = (batch[name].to_pylist() for name in ("prompt_id", "logps", "initial_logps"))
            for prompt_id, own, initial in zip(*columns, strict=True):
                if own is not None and initial is not None:
                    logps.setdefault(prompt_id, []).append((own, initial))
    exact = section.temperature == 1.0  # at another one the answers are not the policy's own
    return {
        "answer_tokens": tokens / rows if tokens else manifest.metrics.get(f"{splits.SAMPLED} mean tokens"),
        "truncated_share": cut / rows if rows else None,
        "kl": _mean([_mean([a - b for a, b in of]) or 0.0 for of in logps.values()]) if exact else None,
        "surprise": _mean([_mean([-b for _, b in of]) or 0.0 for of in logps.values()]) if exact else None,
    }


def _sampled(directory: Path, columns: Sequence[str]) -> Iterator["pa.RecordBatch"]:
    """The sampled answers of the report split."""
    import pyarrow.compute as pc

    for batch in _columns(directory, "samples", ["mode", "split", *columns]):
        kept = batch.filter(pc.equal(batch["mode"], splits.SAMPLED))
        yield kept.filter(pc.equal(kept["split"], "report")) if "split" in kept.schema.names else kept


def _columns(directory: Path, name: str, columns: Sequence[str]) -> Iterator["pa.RecordBatch"]:
    """Some columns of a table's shards, a few thousand rows at a time; those that it has not are left out."""
    import pyarrow.parquet as pq

    for shard in shards(directory, name):
        file = pq.ParquetFile(intact(shard))
        yield from file.iter_batches(ROWS, columns=[c for c in columns if c in file.schema_arrow.names])


def _drawn(columns: Iterable["pa.Array[Any]"]) -> list[str]:
    """At most diversity.TEXTS texts, at random: of each a number is drawn, and the smallest numbers stay."""
    import numpy as np

    rng = np.random.default_rng(0)
    numbers, texts = np.empty(0), np.empty(0, dtype=object)
    for column in columns:
        numbers = np.concatenate([numbers, rng.random(len(column))])
        texts = np.concatenate([texts, column.to_numpy(zero_copy_only=False)])
        if len(numbers) > diversity.TEXTS:
            smallest = np.sort(np.argpartition(numbers, diversity.TEXTS)[: diversity.TEXTS])
            numbers, texts = numbers[smallest], texts[smallest]
    return list(texts)


def _fifth(values: Sequence[float]) -> int:
    return max(1, len(values) // 5)


def _start(values: Sequence[float]) -> float | None:
    return _mean(values[: _fifth(values)])


def _end(values: Sequence[float]) -> float | None:
    return _mean(values[-_fifth(values) :])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
