"""The part of the stage `evaluate` that runs benchmarks: greedy answers, what is found of each, and the figures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from selfimprove import chat, judges, recipe
from selfimprove.errors import UserError
from selfimprove.evaluation import lm_harness, scored
from selfimprove.judges import Candidate, Opinion
from selfimprove.judges.protocol import Preference
from selfimprove.records import Comparison, Generation, Message, Sample, Verdict
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import read_rows

if TYPE_CHECKING:
    from selfimprove.evaluation.kinds import Kind, Question
    from selfimprove.evaluation.kinds.question import Extras

BASELINE = "baseline"  # source of the answers that are compared with
ASKED = {"gsm8k": "benchmark/gsm8k"}  # templates that prompts are asked in, by kind
SHOWN = {"mt_bench": "benchmark/mt_bench"}  # and those of what a judge is shown as the question
EARLIER = ("base", "previous")  # evaluations that an evaluation is compared with


class Outcome(NamedTuple):
    """The figures of every benchmark by name, and how many answers were asked for and came."""

    figures: dict[str, Any]
    asked: int
    answered: int


def scale(benchmark: recipe.Benchmark) -> scored.Scale:
    """On what scale its scores are, which says how they are tested; of a task of the harness see `_harness`."""
    if benchmark.kind in ("gsm8k", "ifeval"):
        return "flags"
    if benchmark.kind in ("alpaca_eval", "arena_hard"):
        return "share"
    judge = benchmark.judge
    checker = (judge.model_extra or {}).get("checker") if judge and judge.name == "verifier" else None
    return "flags" if benchmark.kind == "prompts" and checker not in (None, "python") else "any"


def run(io: StageIO, section: recipe.Evaluate) -> Outcome:
    """Write benchmark-NAME-*.parquet of every benchmark, with the verdicts or comparisons of its judge."""
    figures: dict[str, Any] = {}
    asked = answered = 0
    for benchmark in section.benchmarks or []:
        if benchmark.kind == lm_harness.KIND:
            samples, figures[benchmark.name] = _harness(io, benchmark)
            count = len(samples)
        else:
            samples, figures[benchmark.name], count = _measured(io, section, benchmark)
        asked += count
        answered += len(samples)
        io.out.write_rows(_rows(benchmark), Sample, samples)
    io.note_judging()
    return Outcome(figures, asked, answered)


def _measured(
    io: StageIO, section: recipe.Evaluate, benchmark: recipe.Benchmark
) -> tuple[list[Sample], dict[str, Any], int]:
    """A benchmark's scored answers, its figures, and how many answers were asked for."""
    from selfimprove.evaluation import kinds

    read = kinds.questions(benchmark, io.inputs)
    kind = kinds.KINDS[benchmark.kind]
    by_id = {question.prompt_id: question for question in read.questions}
    rows = _answers(io, section, benchmark, read.questions)
    opinions = _opinions(io, benchmark, kind, by_id, rows)
    samples = [
        Sample(
            row.prompt_id,
            row.prompt,
            benchmark.name,
            row.sample,
            row.text,
            row.finish_reason,
            opinion.score,
            opinion.reason,
            tokens=len(row.token_ids),
        )
        for row, opinion in zip(rows, opinions, strict=True)
    ]
    found = figures(benchmark, samples, _earlier(io, benchmark), scale(benchmark), by_id, kind.extras)
    asked = sum(len(question.turns) for question in read.questions)
    return samples, found | {"asked": len(read.questions), "in_file": read.total}, asked


def _answers(
    io: StageIO, section: recipe.Evaluate, benchmark: recipe.Benchmark, questions: "Sequence[Question]"
) -> list[Generation]:
    """Greedy answers, turn by turn; `sample` is the number of the turn."""
    sampling = recipe.Sampling(temperature=0.0, max_tokens=benchmark.max_tokens or section.max_tokens)
    dialogues: dict[str, list[Message]] = {question.prompt_id: [] for question in questions}
    found: list[Generation] = []
    for turn in range(max(len(question.turns) for question in questions)):
        asks = []
        for question in (one for one in questions if len(one.turns) > turn):
            earlier = dialogues[question.prompt_id]
            if len(earlier) < 2 * turn:
                io.out.quarantine(f"{question.prompt_id}/{benchmark.name}/{turn}", "no answer to the turn before")
                continue
            text = question.turns[turn]
            asked = chat.render(ASKED[benchmark.kind], {"question": text}) if benchmark.kind in ASKED else text
            asks.append(Ask(question.prompt_id, asked, turn, (), tuple(earlier)))
        what = f"{benchmark.name} (turn {turn + 1})" if turn else benchmark.name
        rows = list(io.complete(what, io.models["policy"], asks, 1, sampling, benchmark.name))
        for row in rows:
            turns = [Message(role="user", content=row.prompt), Message(role="assistant", content=row.text)]
            dialogues[row.prompt_id] += turns
        found += rows
    return found


def _opinions(
    io: StageIO,
    benchmark: recipe.Benchmark,
    kind: "Kind",
    questions: "Mapping[str, Question]",
    rows: Sequence[Generation],
) -> list[Opinion]:
    """What the kind's own check or the judge finds of each answer; a judge's words are written."""
    if kind.check:
        checked = [kind.check(questions[row.prompt_id], row.text) for row in rows]
        return [Opinion(float(one.right), one.reason) for one in checked]
    assert benchmark.judge is not None
    identity = judges.identity(benchmark.judge)
    dialogues: dict[str, list[Message]] = {}
    candidates = []
    for row in rows:
        question, earlier = questions[row.prompt_id], dialogues.setdefault(row.prompt_id, [])
        answer = question.answers[row.sample] if question.answers else None
        shown = row.prompt
        if benchmark.kind in SHOWN:
            values = {"question": shown, "earlier": list(earlier), "reference": answer or ""}
            shown = chat.render(SHOWN[benchmark.kind], values)
        earlier += [Message(role="user", content=row.prompt), Message(role="assistant", content=row.text)]
        candidates.append(
            Candidate(
                row.prompt_id, shown, benchmark.name, row.sample, row.text, row.token_ids, row.finish_reason, answer
            )
        )
    if kind.judge == "scores":
        opinions = judges.bind(benchmark.judge)(candidates, io.judging)
        verdicts = (
            Verdict(c.prompt_id, c.source, c.sample, identity, o.score, o.reason, o.reply)
            for c, o in zip(candidates, opinions, strict=True)
        )
        io.out.write_rows(f"{_rows(benchmark)}-verdicts", Verdict, verdicts)
        return opinions
    pairs = [(c, Candidate(c.prompt_id, c.prompt, BASELINE, 0, c.answer or "", [], "stop")) for c in candidates]
    preferences = judges.bind_comparer(benchmark.judge)(pairs, io.judging)
    comparisons = (
        Comparison(
            a.prompt_id, a.source, a.sample, b.source, b.sample, identity, p.forward, p.swapped, p.reason, *p.replies
        )
        for (a, b), p in zip(pairs, preferences, strict=True)
    )  # fmt: skip
    io.out.write_rows(f"{_rows(benchmark)}-comparisons", Comparison, comparisons)
    return [_opinion(preference) for preference in preferences]


def _opinion(preference: Preference) -> Opinion:
    """P(the answer is better than the baseline's), the mean of both orders."""
    return Opinion(preference.mean, preference.reason)


def figures(
    benchmark: recipe.Benchmark,
    samples: Sequence[Sample],
    earlier: Mapping[str, Sequence[Sample]],
    on: scored.Scale,
    questions: "Mapping[str, Question]",
    extras: "Extras",
) -> dict[str, Any]:
    """What scores.json says of a benchmark: its figures, and the change since earlier evaluations.

    Args:
        benchmark: as the recipe has it.
        samples: its answers.
        earlier: its answers in the evaluations that this one is compared with.
        on: the scale of the scores.
        questions: what was asked, by id.
        extras: further figures of the kind.

    Raises:
        UserError: fewer than two prompts have a score.
    """
    if len(scored.per_prompt(samples)) < 2:
        reasons = next(
            (sample.reason for sample in samples if sample.score is None), "prompts too long for the context"
        )
        raise UserError(
            f"benchmark '{benchmark.name}': fewer than two prompts have a score ({reasons})",
            "a larger engine.max_model_len, or another judge",
        )
    changes = {name: scored.compared(samples, old, on) for name, old in earlier.items()}
    return {
        "kind": benchmark.kind,
        **scored.figures(samples, on, questions, extras),
        "comparisons": {name: change for name, change in changes.items() if change},
    }


def _earlier(io: StageIO, benchmark: recipe.Benchmark) -> dict[str, list[Sample]]:
    return {name: read_rows(io.inputs[name], _rows(benchmark), Sample) for name in EARLIER if name in io.inputs}


def _harness(io: StageIO, benchmark: recipe.Benchmark) -> tuple[list[Sample], dict[str, Any]]:
    """A task of lm-evaluation-harness, in a process of its own, while the engine gives its memory back."""
    [path] = (io.inputs[name] for name in benchmark.files)
    request = lm_harness.request(benchmark, path, io.models["policy"], io.engine_section, io.machine)
    io.free_device()
    answer = lm_harness.run(
        benchmark.name, path, request, io.machine, io.scratch,
        lambda: io.progress(f"{benchmark.name} (lm-evaluation-harness)", 0, 0),
    )  # fmt: skip
    samples, told = lm_harness.samples(answer, benchmark.name)
    on: scored.Scale = "flags" if request["metric"] in lm_harness.FLAGS else "any"
    found = figures(benchmark, samples, _earlier(io, benchmark), on, {}, lambda questions, answered: told)
    return samples, found | {"mean_tokens": None, "truncated_share": None, "asked": len(samples)}


def _rows(benchmark: recipe.Benchmark) -> str:
    return f"benchmark-{benchmark.name}"
