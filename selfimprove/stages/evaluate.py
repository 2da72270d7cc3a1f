"""Held-out accuracy, greedy and sampled, with 95 % intervals and paired tests against the base and the last round."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from selfimprove import data, judges, recipe
from selfimprove.errors import UserError
from selfimprove.judges import Candidate, Judge
from selfimprove.records import Sample
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import read_rows

if TYPE_CHECKING:
    from selfimprove.evaluation.statistics import Comparison, Interval

VERSION = 1
TEMPLATES: tuple[str, ...] = ()
GREEDY, SAMPLED = "greedy", "sampled"


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
    return judge


def run(io: StageIO, section: recipe.Evaluate) -> None:
    """Write samples-*.parquet and scores.json."""
    heldout = data.read_heldout(io.inputs["heldout"])
    asks = [Ask(row.prompt_id, row.prompt) for row in heldout]
    answers = {row.prompt_id: row.answer for row in heldout}
    judge, policy = check(section), io.models["policy"]
    samples: list[Sample] = []
    for mode, n, temperature in ((GREEDY, 1, 0.0), (SAMPLED, section.n, section.temperature)):
        sampling = recipe.Sampling(temperature=temperature, max_tokens=section.max_tokens)
        rows = io.complete(f"held-out answers ({mode})", policy, asks, n, sampling, mode)
        candidates = [
            Candidate(r.prompt_id, r.prompt, mode, r.sample, r.text, r.token_ids, r.finish_reason, answers[r.prompt_id])
            for r in rows
        ]
        samples += [
            Sample(c.prompt_id, c.prompt, mode, c.sample, c.text, c.finish_reason, opinion.score, opinion.reason)
            for c, opinion in zip(candidates, judge(candidates, io.judging), strict=True)
        ]
        io.out.metrics[f"{mode} mean tokens"] = sum(len(r.token_ids) for r in rows) / max(1, len(rows))
        io.out.metrics[f"{mode} truncated share"] = sum(r.finish_reason == "length" for r in rows) / max(1, len(rows))
    if len({sample.prompt_id for sample in samples}) < 2:
        raise UserError(
            "fewer than two held-out prompts fit into the context", "a larger engine.max_model_len, or shorter prompts"
        )
    io.out.write_rows("samples", Sample, samples)
    io.out.contract("answer", len(heldout) * (1 + section.n), len(samples))
    unknown = sum(sample.score is None for sample in samples)
    if unknown:
        raise UserError(
            f"{unknown} held-out answers could not be scored ({next(s.reason for s in samples if s.score is None)})",
            "evaluate.judge must be able to score every prompt of data.heldout",
        )
    earlier = {name: read_rows(path, "samples", Sample) for name, path in io.inputs.items() if name != "heldout"}
    io.out.write_json("scores.json", scores(samples, earlier) | {"iteration": io.iteration})


def scores(samples: list[Sample], earlier: dict[str, list[Sample]]) -> dict[str, Any]:
    """The content of scores.json: each score with its interval, and each paired comparison."""
    from selfimprove.evaluation import statistics  # scipy takes a second to import: plans do without

    own = {mode: per_prompt(samples, mode) for mode in (GREEDY, SAMPLED)}
    found: dict[str, Any] = {
        "scores": {
            GREEDY: _interval(statistics.proportion(list(own[GREEDY].values()))),
            SAMPLED: _interval(statistics.clustered_mean(list(own[SAMPLED].values()))),
        },
        "comparisons": {},
    }
    tests: dict[str, Callable[..., Comparison]] = {
        GREEDY: statistics.compare_binary,
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
            }
    return found


def per_prompt(samples: list[Sample], mode: str) -> dict[str, float]:
    """Mean score of each prompt's answers in a mode."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        if sample.mode == mode and sample.score is not None:
            values.setdefault(sample.prompt_id, []).append(sample.score)
    return {prompt_id: sum(of) / len(of) for prompt_id, of in values.items()}


def _interval(interval: "Interval") -> dict[str, Any]:
    return {"value": interval.value, "ci95": [interval.low, interval.high], "n": interval.n}
