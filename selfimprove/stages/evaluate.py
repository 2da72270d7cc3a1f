"""Held-out accuracy, greedy and sampled, with 95 % intervals and paired tests against the base and the last round.

Benchmarks beside it are run by benchmarks.py.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from selfimprove import data, judges, recipe
from selfimprove.errors import UserError
from selfimprove.evaluation.splits import GREEDY, REPORT, SAMPLED, SELECTION, per_prompt
from selfimprove.judges import Candidate, Judge
from selfimprove.records import Generation, HeldOut, Sample
from selfimprove.stages import benchmark_check, benchmarks
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import read_rows

if TYPE_CHECKING:
    from selfimprove.evaluation.statistics import Comparison, Interval

VERSION = 2
TEMPLATES: tuple[str, ...] = ()
M0 = "m0"  # the model that round 1 begins with, to measure how far a policy has gone
SPLITS = {REPORT: "heldout", SELECTION: "selection"}  # and the input that has its prompts


def check(section: recipe.Evaluate) -> Judge:
    """The judge that a recipe names.

    Raises:
        UserError: unknown, or one that is no measure from outside the run.
    """
    judge = judges.bind(section.judge)
    if not judges.fixed(section.judge) or judges.models(section.judge):
        raise UserError(
            f"evaluate.judge '{section.judge.name}' cannot score held-out answers",
            'for example evaluate.judge = { name = "verifier", checker = "exact" }',
        )
    for benchmark in section.benchmarks or []:
        benchmark_check.check(benchmark)
    return judge


def all_judges(section: recipe.Evaluate) -> list[recipe.Choice]:
    """The judge of the held-out answers, those of benchmarks, and the members of ensembles."""
    return judges.everyone([section.judge, *(benchmark.judge for benchmark in section.benchmarks or [])])


def models(section: recipe.Evaluate) -> list[str]:
    """The local models that judges of benchmarks ask, "initial" or by directory or hub id."""
    return judges.asked(all_judges(section)).models


def servers(section: recipe.Evaluate) -> list[str]:
    """The servers of the recipe that judges of benchmarks ask."""
    return judges.asked(all_judges(section)).servers


def templates(section: recipe.Evaluate) -> list[str]:
    """The prompt templates that benchmarks ask in and show their judges."""
    kinds = [benchmark.kind for benchmark in section.benchmarks or []]
    return [of[kind] for kind in kinds for of in (benchmarks.ASKED, benchmarks.SHOWN) if kind in of]


def run(io: StageIO, section: recipe.Evaluate) -> None:
    """Write samples-*.parquet, scores.json, and what benchmarks.py writes."""
    samples: list[Sample] = []
    asked = 0
    for split, name in SPLITS.items():
        if name in io.inputs:
            heldout = data.read_heldout(io.inputs[name], name)
            samples += _answered(io, section, split, heldout)
            asked += len(heldout) * (1 + section.n)
    if len({sample.prompt_id for sample in samples}) < 2:
        raise UserError(
            "fewer than two held-out prompts fit into the context", "a larger engine.max_model_len, or shorter prompts"
        )
    io.out.write_rows("samples", Sample, samples)
    unknown = sum(sample.score is None for sample in samples)
    if unknown:
        raise UserError(
            f"{unknown} held-out answers could not be scored ({next(s.reason for s in samples if s.score is None)})",
            "evaluate.judge must be able to score every prompt of data.heldout and data.selection",
        )
    earlier = {name: read_rows(io.inputs[name], "samples", Sample) for name in benchmarks.EARLIER if name in io.inputs}
    found = scores(samples, earlier) | {"iteration": io.iteration}
    measured = benchmarks.run(io, section)
    if section.benchmarks:
        found["benchmarks"] = measured.figures
    io.out.contract("answer", asked + measured.asked, len(samples) + measured.answered)
    io.out.write_json("scores.json", found)


def _answered(io: StageIO, section: recipe.Evaluate, split: str, heldout: list[HeldOut]) -> list[Sample]:
    """Scored answers to the prompts, greedy and sampled."""
    asks = [Ask(row.prompt_id, row.prompt) for row in heldout]
    answers = {row.prompt_id: row.answer for row in heldout}
    judge, policy = check(section), io.models["policy"]
    prefix = "" if split == REPORT else f"{split} "
    samples: list[Sample] = []
    for mode, n, temperature in ((GREEDY, 1, 0.0), (SAMPLED, section.n, section.temperature)):
        sampling = recipe.Sampling(temperature=temperature, max_tokens=section.max_tokens)
        rows = list(io.complete(f"{prefix}answers ({mode})", policy, asks, n, sampling, mode))
        candidates = [
            Candidate(r.prompt_id, r.prompt, mode, r.sample, r.text, r.token_ids, r.finish_reason, answers[r.prompt_id])
            for r in rows
        ]
        under = _logps(io, rows) if (mode, split) == (SAMPLED, REPORT) else [(None, None)] * len(rows)
        samples += [
            Sample(
                c.prompt_id,
                c.prompt,
                mode,
                c.sample,
                c.text,
                c.finish_reason,
                opinion.score,
                opinion.reason,
                split,
                len(c.token_ids),
                *logps,
            )
            for c, opinion, logps in zip(candidates, judge(candidates, io.judging), under, strict=True)
        ]
        io.out.metrics[f"{prefix}{mode} mean tokens"] = sum(len(r.token_ids) for r in rows) / max(1, len(rows))
        cut = sum(r.finish_reason == "length" for r in rows)
        io.out.metrics[f"{prefix}{mode} truncated share"] = cut / max(1, len(rows))
    return samples


def _logps(io: StageIO, rows: list[Generation]) -> list[tuple[float | None, float | None]]:
    """Summed log-probs (nats) under the policy and under M_0 of the first answer to each prompt, where M_0 is known."""
    found: dict[int, tuple[float | None, float | None]] = {}
    firsts = [i for i, row in enumerate(rows) if row.sample == 0] if M0 in io.models else []
    pieces = [(rows[i].prompt_token_ids, rows[i].token_ids) for i in firsts]
    for i, logprobs in zip(firsts, io.score(io.models[M0], pieces) if firsts else [], strict=True):
        found[i] = sum(rows[i].logprobs), None if logprobs is None else sum(logprobs)
    return [found.get(i, (None, None)) for i in range(len(rows))]


def scores(samples: list[Sample], earlier: dict[str, list[Sample]]) -> dict[str, Any]:
    """The content of scores.json: each score with its interval, and each paired comparison."""
    from selfimprove.evaluation import statistics  # scipy takes a second to import: plans do without

    own = {mode: per_prompt(samples, mode) for mode in (GREEDY, SAMPLED)}
    found: dict[str, Any] = {"scores": _scores(own), "comparisons": {}}
    if any(sample.split == SELECTION for sample in samples):
        found[SELECTION] = {"scores": _scores({mode: per_prompt(samples, mode, SELECTION) for mode in own})}
    tests: dict[str, Callable[..., Comparison]] = {
        GREEDY: statistics.compare_scores,
        SAMPLED: statistics.compare_means,
    }
    for name, old_samples in earlier.items():
        found["comparisons"][name] = {}
        for mode, test in tests.items():
            old = per_prompt(old_samples, mode)
            shared = [prompt_id for prompt_id in own[mode] if prompt_id in old]
            result = test([old[p] for p in shared], [own[mode][p] for p in shared])
            found["comparisons"][name][mode] = {
                "difference": result.difference,
                "ci95": [result.low, result.high],
                "p": result.p,
                "test": result.test,
                "n": result.n,
                "mde": result.mde,
            }
    return found


def _scores(own: dict[str, dict[str, float]]) -> dict[str, Any]:
    from selfimprove.evaluation import statistics

    return {
        GREEDY: _interval(statistics.score(list(own[GREEDY].values()))),
        SAMPLED: _interval(statistics.mean_of_scores(list(own[SAMPLED].values()))),
    }


def _interval(interval: "Interval") -> dict[str, Any]:
    return {"value": interval.value, "ci95": [interval.low, interval.high], "n": interval.n}
