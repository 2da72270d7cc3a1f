"""Finished runs without any model: every artifact that a run's facts are read from, with what a test puts into it."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfimprove import plan, recipe_file
from selfimprove.recipe import Recipe
from selfimprove.records import Generation, Pair, Prompt, Sample
from selfimprove.stages import evaluate, generate, label, synthesize, train
from selfimprove.store import Artifact, Run

WORDS = [f"w{k}" for k in range(2000)]


def sentence(rng: random.Random, words: int = 20, vocabulary: int = 2000) -> str:
    return " ".join(rng.choices(WORDS[:vocabulary], k=words))


def healthy_metrics(t: int) -> list[dict[str, float]]:
    return [
        {
            "learning_rate": 1e-5 * (step > 0),
            "rewards/accuracies": 0.0 if step < 2 else 0.5 + 0.3 * step / 20,
            "logps/chosen_change": 0.05 * step,
        }
        for step in range(20)
    ]


def healthy_audit(t: int) -> dict[str, Any]:
    return {
        "scores": {"unknown": {"value": 0.01}, "length_within": {"spearman": 0.1}},
        "drift": {"effect": 0.05, "alarm": False},
    }


@dataclass
class World:
    """What a run looks like, by round; the defaults are healthy."""

    prompt: Callable[[random.Random, int], str] = lambda rng, t: sentence(rng, 12)
    answer: Callable[[random.Random, int], str] = lambda rng, t: sentence(rng)
    cut: Callable[[random.Random, int], bool] = lambda rng, t: rng.random() < 0.01
    chosen_words: Callable[[int], int] = lambda t: 21
    gap: Callable[[int], float] = lambda t: 2.0
    pairs: Callable[[int], int] = lambda t: 60  # of 100 prompts
    duplicates: Callable[[int], int] = lambda t: 2
    metrics: Callable[[int], list[dict[str, float]]] = healthy_metrics
    audit: Callable[[int], dict[str, Any]] = healthy_audit


def recipe(rounds: int, *settings: str) -> Recipe:
    """Synthesised prompts, pairs by score, DPO against the round's start."""
    reference = ["train.loss={name='dpo'}", "train.reference='previous'", "evaluate.n=3"]
    return recipe_file.load(recipe_file.find("default"), [f"rounds={rounds}", *reference, *settings])


def write(
    path: Path, chosen: Recipe, world: World, prompts: int = 100, samples: int = 4, *, keyed: bool = False
) -> Run:
    """A run of that recipe, finished; `keyed`: with the keys that the recipe makes, else with none."""
    path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    run.recipe_file.write_text(recipe_file.dump(chosen), encoding="utf-8")
    for step in plan.steps(chosen):
        t, rng = step.iteration, random.Random(f"{step.iteration}/{step.name}")
        artifact = Artifact(run.path / step.directory)
        artifact.begin()
        rows_in = rows_out = prompts
        if step.stage is synthesize:
            rows_in = prompts + world.duplicates(t)
            for k in range(world.duplicates(t)):
                artifact.quarantine(f"d{k}", "near duplicate of an earlier round")
            rows = (Prompt(f"i{t}-p{k}", world.prompt(rng, t), "synthetic", t, []) for k in range(prompts))
            artifact.write_rows("prompts", Prompt, rows)
        elif step.stage is generate:
            artifact.write_rows("generations", Generation, _generations(world, rng, t, prompts, samples))
        elif step.stage is label:
            rows_out = world.pairs(t) * prompts // 100
            for k in range(rows_out, prompts):
                artifact.quarantine(f"i{t}-p{k}", "no score gap")
            artifact.write_rows("pairs", Pair, (_pair(world, rng, t, k) for k in range(rows_out)))
            artifact.write_json("audit.json", world.audit(t))
        elif step.stage is train:
            lines = [json.dumps({"step": k, **step}) + "\n" for k, step in enumerate(world.metrics(t), 1)]
            artifact.path("metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        elif step.stage is evaluate:
            found = list(_samples(world, rng, t, prompts, chosen.evaluate.n))
            artifact.write_rows("samples", Sample, found)
            of = [len(row.text.split()) for row in found if row.mode == "sampled"]
            artifact.metrics["sampled mean tokens"] = sum(of) / len(of)
        artifact.contract("row", rows_in, rows_out)
        seen = plan.ingredients_of(step, chosen, plan.Sources(run, chosen)) if keyed else {}
        artifact.publish(t, step.name, seen or {}, {})
    return run


def _generations(world: World, rng: random.Random, t: int, prompts: int, samples: int):
    for k in range(prompts):
        for sample in range(samples):
            text = world.answer(rng, t)
            finish = "length" if world.cut(rng, t) else "stop"
            ids = list(range(len(text.split())))
            yield Generation(f"i{t}-p{k}", "p", "current", sample, text, [1], ids, [-1.0] * len(ids), finish, "m", 0)


def _pair(world: World, rng: random.Random, t: int, k: int) -> Pair:
    def said(text: str):
        return [{"role": "assistant", "content": text}]

    better, worse = sentence(rng, world.chosen_words(t)), sentence(rng, 20)
    return Pair(
        f"i{t}/p{k}/0", [{"role": "user", "content": "p"}], said(better), said(worse), f"i{t}-p{k}", t,
        "current", "current", 3.0 + world.gap(t), 3.0, [1],
        list(range(len(better.split()))), list(range(20)),
    )  # fmt: skip


def _samples(world: World, rng: random.Random, t: int, prompts: int, n: int):
    for mode, number in (("greedy", 1), ("sampled", n)):
        for k in range(prompts):
            for sample in range(number):
                finish = "length" if world.cut(rng, t) else "stop"
                yield Sample(f"h{k}", "p", mode, sample, world.answer(rng, t), finish, 1.0, "")
