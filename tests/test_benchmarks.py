"""Benchmarks by name: in whole runs with the fake engine, with the real one, and what is refused before a run."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from selfimprove import data, plan, preflight, recipe, recipe_file, records, store
from selfimprove.constraints import language
from selfimprove.demo import world
from selfimprove.engine import fake_engine
from selfimprove.errors import UserError
from selfimprove.evaluation import bradley_terry, kinds, lm_harness
from selfimprove.stages import benchmark_check, benchmarks
from tests.conftest import QUICK, cut, selfimprove
from tests.paths import SHARED

JUDGE = 'name="pairwise", model="initial", max_tokens=32'
RATER = 'name="rubric", model="initial", template="ten", max_tokens=32'
KINDS = {
    "ife": 'kind="ifeval", path="ife.jsonl"',
    "gsm": 'kind="gsm8k", path="gsm.jsonl", limit=6',
    "alp": f'kind="alpaca_eval", path="alpaca.jsonl", judge={{{JUDGE}}}',
    "are": f'kind="arena_hard", path="arena.jsonl", answers="arena_answers.jsonl", judge={{{JUDGE}}}',
    "mt": f'kind="mt_bench", path="mt.jsonl", answers="mt_references.jsonl", judge={{{RATER}}}, max_tokens=20',
    "own": 'kind="prompts", path="own.jsonl", judge={name="verifier", checker="demo_world"}',
}
AGAIN = "Now say it again."


def named(*names):
    """A --set of the benchmarks of these names."""
    return "evaluate.benchmarks=[" + ", ".join(f'{{name="{name}", {KINDS[name]}}}' for name in names) + "]"


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def files():
    """Benchmarks of every kind over the embedded world, in their published formats, in the working directory."""
    cut(40)
    rows = data.read_heldout(data.SHIPPED["demo:selection"])[:24]
    write(
        "gsm.jsonl", [{"question": f"Tom has {k} pears and finds {k}.", "answer": f"#### {2 * k}"} for k in range(12)]
    )
    asked = ["punctuation:no_comma", "detectable_format:title"]
    write(
        "ife.jsonl",
        [
            {"key": i, "prompt": f"Write of {i} words.", "instruction_id_list": asked[i % 2 :][:1], "kwargs": [{}]}
            for i in range(8)
        ],
    )
    gold = [world.answer(row.prompt) for row in rows]
    alpaca = [gold[i] if i % 2 else "no idea about that at all, sorry" for i in range(24)]
    write("alpaca.jsonl", [{"instruction": r.prompt, "output": a} for r, a in zip(rows, alpaca, strict=True)])
    write("arena.jsonl", [{"uid": f"u{i}", "category": "x", "prompt": r.prompt} for i, r in enumerate(rows)])
    told = [gold[i] if i % 3 == 0 else "**no**" for i in range(24)]
    messages = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": a}}] for a in told]
    write("arena_answers.jsonl", [{"uid": f"u{i}", "messages": of} for i, of in enumerate(messages)])
    write("mt.jsonl", [{"question_id": 80 + i, "turns": [r.prompt, AGAIN]} for i, r in enumerate(rows[:8])])
    write("mt_references.jsonl", [{"question_id": 80, "choices": [{"turns": ["the first reference", "the second"]}]}])
    outside = [{"prompt": "What is this?"}, {"prompt": "And that?"}]
    write("own.jsonl", [{"id": r.prompt_id, "prompt": r.prompt} for r in rows] + outside)


@pytest.fixture
def in_files(in_tmp):
    files()
    return in_tmp


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished 2-round run with the fake engine, and what its engine was asked."""
    folder = tmp_path_factory.mktemp("benchmarks")
    seen = []
    reply = fake_engine._reply
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(language, "check", lambda: None)  # these constraints need no libraries
        patch.setattr(fake_engine, "_reply", lambda text, rng: seen.append(text) or reply(text, rng))
        files()
        result = selfimprove(
            "iterate", "iterative_dpo", "--rounds", "2", "--run", "run", *QUICK,
            "--set", "engine.max_model_len=1024", "--set", named(*KINDS),
        )  # fmt: skip
    assert result.code == 0, result.err
    return folder, seen


@pytest.fixture
def run(finished, monkeypatch):
    monkeypatch.chdir(finished[0])
    return finished[0] / "runs" / "run"


def scores(run, iteration, stage="4-evaluate"):
    return json.loads((run / f"iter-{iteration:03d}" / stage / "scores.json").read_text())


def rows(run, iteration, name, record=records.Sample, stage="4-evaluate"):
    return store.read_rows(run / f"iter-{iteration:03d}" / stage, f"benchmark-{name}", record)


def means(samples):
    """Each prompt's mean score, none where one is unknown; written once more, to check with."""
    found = {}
    for sample in samples:
        found.setdefault(sample.prompt_id, []).append(sample.score)
    return {prompt: np.mean(of) for prompt, of in found.items() if None not in of}


class TestARun:
    def test_every_number_follows_from_the_stored_rows_and_the_file(self, run):
        chosen = recipe_file.load(run / "recipe.toml")
        for benchmark in chosen.evaluate.benchmarks:
            read = kinds.questions(benchmark, {name: Path(path) for name, path in benchmark.files.items()})
            earlier = {
                "base": rows(run, 0, benchmark.name, stage="1-evaluate"),
                "previous": rows(run, 1, benchmark.name),
            }
            told = scores(run, 2)["benchmarks"][benchmark.name]
            again = benchmarks.figures(
                benchmark,
                rows(run, 2, benchmark.name),
                earlier,
                benchmarks.scale(benchmark),
                {question.prompt_id: question for question in read.questions},
                kinds.KINDS[benchmark.kind].extras,
            )
            assert json.loads(json.dumps(again)) == {k: v for k, v in told.items() if k not in ("asked", "in_file")}

    def test_values_are_the_means_over_prompts(self, run):
        for iteration, stage in [(0, "1-evaluate"), (0, "3-control-evaluate"), (1, "4-evaluate"), (2, "4-evaluate")]:
            for name, told in scores(run, iteration, stage)["benchmarks"].items():
                own = means(rows(run, iteration, name, stage=stage))
                assert told["value"] == pytest.approx(np.mean(list(own.values())), abs=1e-12)
                assert told["n"] == len(own)
                assert told["ci95"][0] <= told["value"] <= told["ci95"][1]

    @pytest.mark.parametrize("name", ["alp", "are", "mt"])
    def test_changes_are_scipys_paired_tests(self, name, run):
        now, before = means(rows(run, 2, name)), means(rows(run, 1, name))
        told = scores(run, 2)["benchmarks"][name]["comparisons"]["previous"]
        expected = stats.ttest_rel(list(now.values()), [before[prompt] for prompt in now])
        assert told["p"] == pytest.approx(expected.pvalue)
        assert told["ci95"] == pytest.approx(list(expected.confidence_interval()))
        assert "previous" not in scores(run, 1)["benchmarks"][name]["comparisons"]

    def test_right_and_wrong_are_compared_by_mcnemar(self, run):
        now, base = means(rows(run, 2, "own")), means(rows(run, 0, "own", stage="1-evaluate"))
        gained = sum(now[p] > base[p] for p in now)
        lost = sum(now[p] < base[p] for p in now)
        told = scores(run, 2)["benchmarks"]["own"]["comparisons"]["base"]
        assert told["test"] == "McNemar exact"
        assert told["p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)

    def test_what_cannot_be_scored_is_unknown_and_not_wrong(self, run):
        told = scores(run, 2)["benchmarks"]["own"]
        assert (told["n"], told["unknown"]) == (24, 2)
        samples = rows(run, 2, "own")
        assert [s.reason for s in samples if s.score is None] == ["prompt outside the grammar"] * 2
        checked = [float(world.check(s.prompt, s.text)) for s in samples if s.score is not None]
        assert checked == [s.score for s in samples if s.score is not None]

    def test_win_rates_are_the_judges_words_in_both_orders(self, run):
        worth = {"[[A]]": 1.0, "[[B]]": 0.0, "[[C]]": 0.5}
        for name in ("alp", "are"):
            words = rows(run, 1, f"{name}-comparisons", records.Comparison)
            ours = [(worth[c.forward_reply] + 1 - worth[c.swapped_reply]) / 2 for c in words]
            assert [s.score for s in rows(run, 1, name)] == ours
            assert 0 < np.mean(ours) < 1
            assert {c.second_source for c in words} == {"baseline"}

    def test_the_length_controlled_win_rate_is_that_of_score(self, run, tmp_path):
        baseline = [json.loads(line)["output"] for line in Path("alpaca.jsonl").read_text().splitlines()]
        judged = [
            {"index": i, "preference": 1 + s.score, "len_1": len(output), "len_2": len(s.text)}
            for i, (s, output) in enumerate(zip(rows(run, 2, "alp"), baseline, strict=True))
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, judged)))
        found = json.loads(selfimprove("score", "alpaca_lc", str(tmp_path / "rows.jsonl"), "--json").out)
        told = scores(run, 2)["benchmarks"]["alp"]
        assert 100 * told["value"] == pytest.approx(found["win_rate"])
        assert 100 * told["lc_win_rate"] == pytest.approx(found["lc_win_rate"])
        assert 100 * np.array(told["lc_ci95"]) == pytest.approx(found["lc_interval"])
        assert told["lc_win_rate"] != pytest.approx(told["value"], abs=1e-3)  # lengths do play a part here

    def test_elo_is_bradley_terrys(self, run):
        worth = {"[[A]]": 1.0, "[[B]]": 0.0, "[[C]]": 0.5}
        battles = []
        for c in rows(run, 2, "are-comparisons", records.Comparison):
            for won in (worth[c.forward_reply], 1 - worth[c.swapped_reply]):
                winner = {1.0: "first", 0.0: "second", 0.5: "tie"}[won]
                battles.append(bradley_terry.Battle(c.prompt_id, "model", "baseline", winner))
        expected = bradley_terry.rate(battles, "baseline", resamples=2)["model"]
        told = scores(run, 2)["benchmarks"]["are"]
        assert told["elo"] == pytest.approx(expected.elo, abs=1e-3)
        assert 100 * told["value"] == pytest.approx(expected.win_rate, abs=1e-5)
        low, high = told["style_controlled"]["ci95"]
        assert low < told["style_controlled"]["value"] < high

    def test_a_dialogue_goes_on_and_each_turn_is_rated(self, run, finished):
        samples = rows(run, 2, "mt")
        assert [(s.prompt_id, s.sample) for s in samples] == [(str(80 + i), turn) for turn in (0, 1) for i in range(8)]
        assert {s.prompt for s in samples if s.sample == 1} == {AGAIN}
        told = scores(run, 2)["benchmarks"]["mt"]
        first, second = ([s.score for s in samples if s.sample == turn] for turn in (0, 1))
        assert told["turns"] == {"1": {"value": np.mean(first), "n": 8}, "2": {"value": np.mean(second), "n": 8}}
        assert told["value"] == pytest.approx(np.mean(first + second))
        asked = [text for text in finished[1] if "You rate how good" in text and AGAIN in text]
        assert len(asked) == 8 * 4  # base, control, two rounds
        assert all("user: " in text and "assistant: " in text for text in asked)
        assert sum("the second" in text for text in asked) == 4  # the one question with references
        assert not any("the first reference" in text for text in asked)
        answered = [text for text in finished[1] if text.endswith(AGAIN) and "You rate" not in text]
        assert len(answered) == 8 * 4
        assert all(len(text) > len(AGAIN) + 20 for text in answered)  # the first turn and its answer stand before it

    def test_instructions_that_are_not_followed_are_named(self, run):
        told = scores(run, 2)["benchmarks"]["ife"]
        assert (told["value"], told["strict"]["prompt"]["accuracy"]) == (0.5, 0.5)
        reasons = [sample.reason for sample in rows(run, 2, "ife")]
        assert reasons == ["", "not kept: detectable_format:title"] * 4

    def test_only_as_many_prompts_as_the_limit_and_the_prompt_says_the_form(self, run, finished):
        told = scores(run, 1)["benchmarks"]["gsm"]
        assert (told["asked"], told["in_file"], told["n"]) == (6, 12, 6)
        asked = [text for text in finished[1] if "pears and finds" in text]
        assert len(asked) == 6 * 4
        assert all('"#### N"' in text for text in asked)

    def test_every_answer_is_accounted_for(self, run):
        manifest = store.read_manifest(run / "iter-001" / "4-evaluate")
        assert manifest.rows.rows_in == manifest.rows.rows_out == 40 * 2 + 8 + 6 + 24 + 24 + 16 + 26
        assert selfimprove("verify", "run").code == 0

    def test_status_tells_all_and_its_table_sends_on_to_json(self, run):
        told = json.loads(selfimprove("status", "run", "--json").out)
        assert told["iterations"][1]["benchmarks"] == scores(run, 2)["benchmarks"]
        assert told["control"]["benchmarks"] == scores(run, 0, "3-control-evaluate")["benchmarks"]
        assert "6 benchmarks: selfimprove status run --json" in selfimprove("status", "run").out
        page = Path(selfimprove("report", "run").out.strip()).read_text()
        assert '<h2 id="benchmarks">' in page
        assert all(f"<caption>{name}</caption>" in page for name in told["base"]["benchmarks"])

    def test_files_enter_keys_by_their_content(self, run, tmp_path, monkeypatch):
        shutil.copytree(run.parent.parent, tmp_path / "copy", symlinks=True)
        monkeypatch.chdir(tmp_path / "copy")
        moved = store.Run(Path("runs/run"))
        chosen = recipe_file.load(moved.recipe_file)
        elsewhere = [
            one.model_copy(update={k: v and v.replace(str(run.parent.parent), str(Path.cwd())) for k, v in
                                   [("path", one.path), ("answers", one.answers)]})
            for one in chosen.evaluate.benchmarks
        ]  # fmt: skip
        chosen = chosen.model_copy(update={"evaluate": chosen.evaluate.model_copy(update={"benchmarks": elsewhere})})
        assert all(e.status == "done" for e in plan.examine(moved, chosen))
        write("mt_references.jsonl", [{"question_id": 81, "choices": [{"turns": ["another", "and another"]}]}])
        stale = {e.step.directory: e.reason for e in plan.examine(moved, chosen) if e.status != "done"}
        assert set(stale) == {d for d in stale if d.endswith("evaluate")}
        assert stale["iter-000/1-evaluate"].startswith("evaluate.benchmarks.mt.answers changed (")


def test_few_benchmarks_have_a_column_each(in_files):
    result = selfimprove("iterate", "iterative_dpo", "--rounds", "1", "--run", "run", *QUICK, "--set", named("own"))
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["own"])
    told = [
        scores(Path("runs/run"), 0, "1-evaluate"),
        scores(Path("runs/run"), 1),
        scores(Path("runs/run"), 0, "3-control-evaluate"),
    ]
    shown = [line.split("[")[0].split()[-1] for line in lines[start + 2 : start + 5]]
    assert shown == [f"{one['benchmarks']['own']['value']:.3f}".removeprefix("0") for one in told]


def test_without_benchmarks_keys_are_what_they_were(in_files):
    chosen = recipe_file.load(recipe_file.find("iterative_dpo"))
    run = store.Run(Path("runs/none"))
    [base] = [s for s in plan.steps(chosen) if s.directory == "iter-000/1-evaluate"]
    found = plan.ingredients_of(base, chosen, plan.Sources(run, chosen))
    assert "benchmarks" not in found["section"]
    assert found["templates"] == {}
    assert set(found["inputs"]) == {"heldout"}


def test_what_a_judge_is_asked_with_enters_the_key(in_files):
    chosen = recipe_file.load(recipe_file.find("iterative_dpo"), [named("alp", "mt", "gsm")])
    [base] = [s for s in plan.steps(chosen) if s.directory == "iter-000/1-evaluate"]
    found = plan.ingredients_of(base, chosen, plan.Sources(store.Run(Path("runs/none")), chosen))
    assert set(found["templates"]) == {"judge/pairwise", "judge/ten", "benchmark/mt_bench", "benchmark/gsm8k"}
    assert set(found["models"]) == {"policy", "initial"}
    assert list(base.models) == ["policy", "initial"]  # the policy's chat template is the run's


def test_synthesised_prompts_keep_off_benchmarks(in_tmp):
    cut(40)
    settings = [*QUICK, "--set", "synthesize.prompts=30", "--set", "synthesize.generator.epochs=1"]
    assert selfimprove("iterate", "default", "--rounds", "1", "--run", "free", *settings).code == 0
    free = store.read_rows(Path("runs/free/iter-001/1-synthesize"), "prompts", records.Prompt)
    write("own.jsonl", [{"prompt": prompt.text} for prompt in free[:5]])
    result = selfimprove("iterate", "default", "--rounds", "1", "--run", "kept", *settings, "--set", named("own"))
    assert result.code == 0, result.err
    kept = store.read_rows(Path("runs/kept/iter-001/1-synthesize"), "prompts", records.Prompt)
    assert {prompt.text for prompt in kept}.isdisjoint(prompt.text for prompt in free[:5])
    manifest = store.read_manifest(Path("runs/kept/iter-001/1-synthesize"))
    assert manifest.rows.quarantined["in the evaluation set"] >= 5


def benchmark_of(**changes):
    table = {"name": "b", "kind": "prompts", "path": "own.jsonl", "judge": {"name": "length"}} | changes
    return {key: value for key, value in table.items() if value is not None}


@pytest.mark.parametrize(
    ("table", "says", "hint"),
    [
        ({"kind": "gsm8k", "path": "gsm.jsonl"}, "checks answers by itself", "drop its judge"),
        ({"judge": None}, "needs a judge that scores", "rubric"),
        ({"judge": {"name": "pairwise", "model": "initial"}}, "needs a judge that scores", "rubric"),
        ({"kind": "alpaca_eval", "path": "alpaca.jsonl"}, "needs a judge that compares", "pairwise"),
        ({"kind": "arena_hard", "path": "arena.jsonl", "judge": {"name": "pairwise", "model": "initial"}},
         "needs the baseline's answers", "answers ="),
        ({"answers": "own.jsonl"}, "has no file of answers", "drop answers"),
        ({"judge": {"name": "rubric"}}, "is another one in every round", "server:NAME"),
        ({"judge": {"name": "self_consistency"}}, "is another one in every round", "server:NAME"),
        ({"judge": {"name": "ensemble", "judges": [{"name": "length"}, {"name": "rubric"}]}},
         "is another one in every round", "server:NAME"),
        ({"judge": {"name": "rubrik"}}, "unknown judge 'rubrik'", "rubric"),
        ({"judge": {"name": "rubric", "model": "server:none"}}, "the recipe has no [servers.none]", "none"),
        ({"judge": {"name": "rubric", "model": "/no/such"}}, "no model directory '/no/such'", "hub id"),
        ({"judge": {"name": "verifier", "checker": "exact"}}, "needs reference answers", "another judge"),
        ({"path": "nowhere.jsonl"}, "evaluate.benchmarks.b.path: no file nowhere.jsonl", "evaluate.benchmarks.b.path"),
        ({"path": "seeds.jsonl"}, "40 prompts of data.seeds stand in evaluate.benchmarks.b too", "trained on"),
        ({"kind": "alpaca_eval", "judge": {"name": "pairwise", "model": "initial"}},
         "no field 'instruction'", "prompt"),
        ({"max_tokens": 300}, "evaluate.benchmarks.b.max_tokens = 300 leaves no room", "engine.max_model_len"),
        ({"name": "greedy"}, "the name 'greedy' is taken", "known keys"),
        ({"name": "a-b"}, "evaluate.benchmarks.0.name", "known keys here: name, kind, path"),
        ({"kind": "mmlu"}, "evaluate.benchmarks.0.kind", "known keys here: name, kind, path"),
        ({"limit": 1}, "evaluate.benchmarks.0.limit", "known keys here: name, kind, path"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_runs(table, says, hint, in_files):
    chosen = recipe_file.load(recipe_file.find("iterative_dpo"), ["data.seeds=seeds.jsonl"])
    dumped = chosen.model_dump(exclude_none=True)
    dumped["evaluate"]["benchmarks"] = [benchmark_of(**table)]
    with pytest.raises(UserError) as raised:
        preflight.check(recipe.validated(recipe.Recipe, dumped, "recipe"))
    assert says in raised.value.message
    assert hint in raised.value.hint


def test_two_benchmarks_have_two_names():
    with pytest.raises(UserError, match="the name 'own' is taken"):
        recipe_file.load(recipe_file.find("iterative_dpo"), [named("own", "own")])


def test_paths_are_made_absolute(in_files):
    chosen = recipe_file.absolute(recipe_file.load(recipe_file.find("iterative_dpo"), [named("are")]))
    [benchmark] = chosen.evaluate.benchmarks
    assert (benchmark.path, benchmark.answers) == (str(in_files / "arena.jsonl"), str(in_files / "arena_answers.jsonl"))
    assert recipe_file.load(_written(chosen)) == chosen


def _written(chosen):
    Path("copy.toml").write_text(recipe_file.dump(chosen))
    return Path("copy.toml")


class TestFiles:
    """Wrong rows are told with their line."""

    @pytest.mark.parametrize(
        ("kind", "rows", "says"),
        [
            ("gsm8k", [{"question": "q", "answer": "18"}] * 2, "line 1: field 'answer'"),
            (
                "ifeval",
                [{"key": 1, "prompt": "p", "instruction_id_list": ["x:y"], "kwargs": [{}]}],
                "unknown instruction",
            ),
            ("mt_bench", [{"question_id": 1, "turns": []}], "line 1: field 'turns'"),
            ("mt_bench", [{"question_id": 1, "turns": ["a"]}] * 2, "id '1' stands twice"),
            ("alpaca_eval", [{"instruction": "a", "output": "b"}], "holds 1 prompts, at least 2"),
            ("alpaca_eval", [{"instruction": " ", "output": "b"}] * 2, "the prompt of '00000' is empty"),
            ("alpaca_eval", [{"instruction": "\ud800", "output": "b"}] * 2, "a character that is no text"),
            ("arena_hard", [{"uid": "u", "prompt": "a"}] * 2, "has no answer to question u"),
        ],
    )
    def test_of_prompts(self, kind, rows, says, in_tmp):
        write("b.jsonl", rows)
        write("a.jsonl", [{"uid": "other", "messages": [{"role": "assistant", "content": "yes"}]}])
        benchmark = recipe.Benchmark(
            name="b", kind=kind, path="b.jsonl", answers="a.jsonl" if kind == "arena_hard" else None
        )
        with pytest.raises(UserError) as raised:
            kinds.questions(benchmark, {name: Path(path) for name, path in benchmark.files.items()})
        assert says in raised.value.message

    @pytest.mark.parametrize("choices", [[], [{"turns": "a"}], [{"turns": [1]}], "a", [{}]])
    def test_of_answers(self, choices, in_tmp):
        write("b.jsonl", [{"question_id": 1, "turns": ["a"]}] * 2)
        write("a.jsonl", [{"question_id": 1, "choices": choices}])
        benchmark = recipe.Benchmark(name="b", kind="mt_bench", path="b.jsonl", answers="a.jsonl")
        with pytest.raises(UserError, match="field 'choices'"):
            kinds.questions(benchmark, {name: Path(path) for name, path in benchmark.files.items()})


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here")
@pytest.mark.parametrize(
    ("kind", "path", "answers", "prompts", "with_answers"),
    [
        ("gsm8k", "gsm8k/test.jsonl", None, 1319, 1319),
        ("ifeval", "ifeval/input_data.jsonl", None, 541, 541),
        ("mt_bench", "mt_bench/question.jsonl", "mt_bench/reference_answer_gpt-4.jsonl", 80, 30),
        ("arena_hard", "arena_hard/v0.1_question.jsonl", "arena_hard/v0.1_model_answer/gpt-4-0314.jsonl.gz", 500, 500),
    ],
)
def test_published_files_are_read_whole(kind, path, answers, prompts, with_answers):
    folder = SHARED / "data"
    benchmark = recipe.Benchmark(
        name="b", kind=kind, path=str(folder / path), answers=answers and str(folder / answers)
    )
    read = kinds.questions(benchmark, {name: Path(path) for name, path in benchmark.files.items()})
    assert (len(read.questions), read.total) == (prompts, prompts)
    assert sum(bool(question.answers) for question in read.questions) == with_answers
    held_out = kinds.held_out({next(iter(benchmark.files)): folder / path})
    assert [prompt for _, prompt in held_out] == [question.turns[0] for question in read.questions]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here")
def test_gold_solutions_of_gsm8k_are_right_and_a_neighbours_are_not():
    benchmark = recipe.Benchmark(name="b", kind="gsm8k", path=str(SHARED / "data/gsm8k/test.jsonl"))
    questions = kinds.questions(benchmark, {name: Path(path) for name, path in benchmark.files.items()}).questions
    check = kinds.KINDS["gsm8k"].check
    assert all(check(question, question.answers[0]).right for question in questions)
    swapped = [check(one, other.answers[0]).right for one, other in itertools.pairwise(questions)]
    assert np.mean(swapped) < 0.05


@pytest.mark.parametrize(
    ("text", "right"), [("So\n#### 18", True), ("#### 18.", True), ("18", False), ("#### 81", False), ("", False)]
)
def test_gsm8k_looks_for_the_mark(text, right):
    assert kinds.KINDS["gsm8k"].check(kinds.Question("a", ("q",), ("x\n#### 18",)), text).right is right


def test_ifeval_has_its_four_figures():
    """Two prompts of two and one constraints, of which one is kept in letter, one only loosely, one not."""
    table = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    one = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    questions = {
        "1": kinds.Question("1", ("p",), (json.dumps(table),)),
        "2": kinds.Question("2", ("p",), (json.dumps(one),)),
    }
    texts = {"1": 'Here, you are:\n"no comma here"', "2": "a, b"}
    kind = kinds.KINDS["ifeval"]
    checked = {key: kind.check(questions[key], text) for key, text in texts.items()}
    assert [c.right for c in checked.values()] == [False, False]
    assert checked["1"].reason == "not kept: punctuation:no_comma, startend:quotation"
    samples = [
        records.Sample(key, "p", "b", 0, text, "stop", float(checked[key].right), "") for key, text in texts.items()
    ]
    told = kind.extras(questions, samples)
    shares = {(how, level): told[how][level]["accuracy"] for how in told for level in told[how]}
    assert shares == {
        ("strict", "prompt"): 0, ("strict", "instruction"): 0,
        ("loose", "prompt"): 0.5, ("loose", "instruction"): pytest.approx(2 / 3),
    }  # fmt: skip


def test_one_loss_of_all_has_no_elo_and_five_prompts_are_needed_for_length_control():
    questions = {str(i): kinds.Question(str(i), ("p",), ("four",)) for i in range(4)}
    samples = [records.Sample(str(i), "p", "b", 0, "text" * i, "stop", 1.0, "") for i in range(4)]
    told = kinds.KINDS["arena_hard"].extras(questions, samples)
    assert told == {"elo": None, "style_controlled": None}
    told = kinds.KINDS["alpaca_eval"].extras(questions, samples)
    assert (told["lc_win_rate"], told["lc_reason"]) == (None, "fewer than 5 prompts")


def test_a_judge_that_can_read_nothing_stops_the_run(in_files):
    write("own.jsonl", [{"prompt": "What is this?"}, {"prompt": "And that?"}])
    result = selfimprove("iterate", "iterative_dpo", "--rounds", "1", "--run", "run", *QUICK, "--set", named("own"))
    assert result.code == 1
    assert "benchmark 'own': fewer than two prompts have a score (prompt outside the grammar)" in result.err


def test_a_second_turn_without_a_first_answer_is_set_aside(in_files):
    long = "word " * 400
    write("mt.jsonl", [{"question_id": i, "turns": [turn, AGAIN]} for i, turn in enumerate(["a b c", "d e f", long])])
    asked = 'evaluate.benchmarks=[{name="mt", kind="mt_bench", path="mt.jsonl", judge={name="length"}}]'
    result = selfimprove("iterate", "iterative_dpo", "--rounds", "1", "--run", "run", *QUICK, "--set", asked)
    assert result.code == 0, result.err
    reasons = store.read_manifest(Path("runs/run/iter-000/1-evaluate")).rows.quarantined
    assert reasons == {"prompt too long for the context": 1, "no answer to the turn before": 1}


def test_the_real_engine_answers_as_transformers_does(in_files):
    """Greedy answers of the embedded model, a second turn among them, against plain generate on the same chat."""
    import torch
    import transformers

    second = ["Give the first word of this list: saw pear hammer.", "Sort these words from A to Z: white saw horse."]
    first = "Repeat the word lemon five times."
    write("mt.jsonl", [{"question_id": i, "turns": [first, turn]} for i, turn in enumerate(second)])
    asked = (
        'evaluate.benchmarks=[{name="own", kind="prompts", path="demo:selection", limit=30, '
        'judge={name="verifier", checker="demo_world"}}, '
        '{name="mt", kind="mt_bench", path="mt.jsonl", judge={name="length"}}]'
    )
    settings = ["--engine", "transformers", *QUICK[2:], "--set", "evaluate.max_tokens=24", "--set", asked]
    settings += ["--set", "generate.n=2", "--set", "generate.sampling.max_tokens=16"]
    result = selfimprove("iterate", "iterative_dpo", "--rounds", "1", "--run", "run", *settings)
    assert result.code == 0, result.err
    run = Path("runs/run")
    samples = rows(run, 0, "own", stage="1-evaluate")
    assert len(samples) == 30
    assert [s.score for s in samples] == [float(world.check(s.prompt, s.text)) for s in samples]
    assert 0.2 < scores(run, 0, "1-evaluate")["benchmarks"]["own"]["value"] < 1
    directory = data.SHIPPED["demo:model"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    by_turn = {(s.prompt_id, s.sample): s for s in rows(run, 0, "mt", stage="1-evaluate")}
    for (prompt_id, turn), sample in by_turn.items():
        chat = [{"role": "user", "content": by_turn[prompt_id, 0].prompt}]
        if turn:
            chat += [{"role": "assistant", "content": by_turn[prompt_id, 0].text}]
            chat += [{"role": "user", "content": sample.prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, do_sample=False, max_new_tokens=24, eos_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert sample.text == text


TASK = """
task: mini
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: exact_match
"""
STRIPPED = """
generation_kwargs: {do_sample: false, max_gen_toks: 24, until: ["\\n"]}
filter_list:
  - name: stripped
    filter: [{function: remove_whitespace}, {function: take_first}]
"""
HARNESS = 'evaluate.benchmarks=[{name="mini", kind="lm_eval", path="mini.yaml", limit=3}]'
STUB = """
import json, os, sys
request = json.load(open(sys.argv[1]))
assert os.environ["HF_DATASETS_OFFLINE"] == "1"
assert os.path.isfile("rows.jsonl")
rows = [{"doc_id": i, "prompt": "p", "text": "t", "score": float(i % 2), "reason": ""} for i in range(request["limit"])]
told = {"metric": "exact_match,none", "metrics": {"exact_match,none": 1 / 3}, "backend": request["model"]}
told |= {"version": "0.4.13", "samples": rows}
json.dump(told, open(sys.argv[2], "w"))
"""


@pytest.fixture
def task(in_files, monkeypatch):
    """A task of lm-evaluation-harness, as if the harness were installed."""
    Path("mini.yaml").write_text(TASK)
    write("rows.jsonl", [{"q": f"Say {k}.", "gold": f"{k}"} for k in range(4)])
    monkeypatch.setattr(lm_harness, "installed", lambda: True)
    return in_files


class TestHarness:
    def test_the_command_and_what_the_driver_is_told(self, task, monkeypatch):
        benchmark = recipe.Benchmark(name="b", kind="lm_eval", path="mini.yaml", limit=7)
        command = lm_harness.command(Path("a"), Path("b"))
        assert command == [sys.executable, "-P", str(lm_harness.DRIVER), "a", "b"]
        assert lm_harness.DRIVER.is_file()
        path = Path("mini.yaml").resolve()
        machine = recipe.Machine(threads=2, gpu_memory_utilization=0.5)
        told = lm_harness.request(
            benchmark, path, Path("/m"), recipe.Engine(kind="transformers", max_model_len=99), machine
        )
        assert told == {
            "include_path": str(task), "task": "mini", "metric": "exact_match", "model": "hf", "limit": 7,
            "model_args": {"pretrained": "/m", "dtype": "float32", "max_length": 99},
        }  # fmt: skip
        vllm = recipe.Engine(kind="vllm", dtype="bfloat16")
        monkeypatch.setattr(lm_harness, "backend", lambda engine: "vllm")
        told = lm_harness.request(benchmark, path, Path("/m"), vllm, machine)
        assert told["model"] == "vllm"
        assert told["model_args"] == {
            "pretrained": "/m", "dtype": "bfloat16", "max_model_len": 512, "gpu_memory_utilization": 0.5, "seed": 0,
        }  # fmt: skip
        assert lm_harness.environment(machine)["OMP_NUM_THREADS"] == "2"
        driver = lm_harness.DRIVER.read_text()
        assert "include_defaults=False" in driver
        assert "selfimprove" not in driver

    def test_its_prompts_scores_and_figures_are_kept(self, task, monkeypatch):
        Path("stub.py").write_text(STUB)
        stub = str(Path("stub.py").resolve())
        monkeypatch.setattr(
            lm_harness, "command", lambda request, answer: [sys.executable, stub, str(request), str(answer)]
        )
        settings = ["--engine", "transformers", *QUICK[2:], "--set", HARNESS, "--set", "evaluate.max_tokens=8"]
        settings += ["--set", "generate.n=2", "--set", "generate.sampling.max_tokens=16"]
        result = selfimprove("iterate", "iterative_dpo", "--rounds", "1", "--run", "run", *settings)
        assert result.code == 0, result.err
        told = scores(Path("runs/run"), 1)["benchmarks"]["mini"]
        assert (told["value"], told["n"], told["asked"]) == (pytest.approx(1 / 3), 3, 3)
        assert (told["mean_tokens"], told["metrics"]) == (None, {"exact_match,none": 1 / 3})
        assert told["backend"] == "hf"
        assert told["comparisons"]["base"]["test"] == "McNemar exact"
        assert [s.score for s in rows(Path("runs/run"), 1, "mini")] == [0, 1, 0]
        found, chosen = store.Run(Path("runs/run")), recipe_file.load(Path("runs/run/recipe.toml"))
        assert {e.status for e in plan.examine(found, chosen)} == {"done"}
        write("rows.jsonl", [{"q": "Say 5.", "gold": "5"}, {"q": "Say 6.", "gold": "6"}])
        stale = {e.step.directory for e in plan.examine(found, chosen) if e.status != "done"}
        assert stale == {"iter-000/1-evaluate", "iter-000/3-control-evaluate", "iter-001/4-evaluate"}

    def test_the_cpu_build_of_vllm_is_none_for_the_harness(self, monkeypatch):
        def absent(name):
            raise lm_harness.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(lm_harness.importlib.metadata, "version", absent)
        assert lm_harness.backend(recipe.Engine(kind="vllm")) == "hf"
        assert lm_harness.backend(recipe.Engine(kind="transformers")) == "hf"

    def test_the_harness_itself_agrees_with_our_own_checker(self, in_files):
        """Where it is installed: the same prompts as a task of its own and as prompts with the checker `exact`."""
        pytest.importorskip("lm_eval")
        prompts = [row.prompt for row in data.read_heldout(data.SHIPPED["demo:selection"])[:24]]
        gold = [world.answer(prompt) for prompt in prompts]
        write("rows.jsonl", [{"q": q, "gold": a} for q, a in zip(prompts, gold, strict=True)])
        write("own.jsonl", [{"prompt": q, "answer": a} for q, a in zip(prompts, gold, strict=True)])
        Path("mini.yaml").write_text(TASK + STRIPPED)
        asked = HARNESS.replace(", limit=3", "").replace("]", ', {name="own", kind="prompts", path="own.jsonl", ')
        asked += 'judge={name="verifier", checker="exact"}, max_tokens=24}]'
        settings = ["--engine", "transformers", *QUICK[2:], "--set", asked, "--set", "generate.n=2"]
        result = selfimprove("iterate", "iterative_dpo", "--rounds", "1", "--run", "run", *settings)
        assert result.code == 0, result.err
        for iteration, stage in [(0, "1-evaluate"), (0, "3-control-evaluate"), (1, "4-evaluate")]:
            theirs, ours = (rows(Path("runs/run"), iteration, name, stage=stage) for name in ("mini", "own"))
            assert [s.text.strip() for s in theirs] == [s.text for s in ours]
            assert [s.score for s in theirs] == [s.score for s in ours]
            assert 0 < np.mean([s.score for s in ours]) < 1

    def test_what_it_says_when_it_fails_is_told(self, task, monkeypatch):
        failing = [sys.executable, "-c", "print('ValueError: no such metric'); print('10 %'); raise SystemExit(1)"]
        monkeypatch.setattr(lm_harness, "command", lambda request, answer: failing)
        settings = ["--engine", "transformers", *QUICK[2:], "--set", HARNESS, "--set", "evaluate.max_tokens=8"]
        result = selfimprove("iterate", "iterative_dpo", "--rounds", "1", "--run", "run", *settings)
        assert result.code == 1
        assert "lm-evaluation-harness failed on 'mini': ValueError: no such metric" in result.err
        [log] = Path("runs/run/scratch").glob("*/mini.log")
        assert log.read_text().splitlines() == ["ValueError: no such metric", "10 %"]

    def test_without_the_package_the_hint_installs_it(self, in_files, monkeypatch):
        Path("mini.yaml").write_text(TASK)
        monkeypatch.setattr(lm_harness, "installed", lambda: False)
        told = selfimprove("check", "iterative_dpo", "--set", HARNESS)
        assert told.code == 1
        assert "needs lm-evaluation-harness" in told.err
        assert "pip install 'selfimprove[lm-eval]'" in told.err

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            ("task: mini", "task: [a, b]", "names no single task"),
            ("dataset_path: json", "dataset_path: openai/gsm8k", "reads no local files"),
            ("test: rows.jsonl", "test: none.jsonl", "no file"),
            ("metric_list:\n  - metric: exact_match", "", "has no metric_list"),
            ("test_split: test", "", "cannot be kept out of training"),
            ('doc_to_text: "{{q}}"', "doc_to_text: !function u.text", "no file"),
            ("task: mini", "task: [", "no YAML file"),
        ],
    )
    def test_a_task_that_cannot_be_followed_is_refused(self, old, new, says, task):
        Path("mini.yaml").write_text(TASK.replace(old, new))
        with pytest.raises(UserError) as raised:
            lm_harness.prompts(Path("mini.yaml").resolve())
        assert says in raised.value.message

    def test_what_it_includes_and_calls_is_part_of_it(self, task):
        Path("mini.yaml").write_text("include: below.yaml\ntask: mine\ndoc_to_target: !function help.gold\n")
        Path("below.yaml").write_text(TASK)
        Path("help.py").write_text("gold = None")
        found = lm_harness.task(task / "mini.yaml")
        assert found.name == "mine"
        assert {path.name for path in found.files} == {"mini.yaml", "below.yaml", "help.py", "rows.jsonl"}
        assert lm_harness.prompts(task / "mini.yaml")[1] == ("00001", "Say 1.")

    @pytest.mark.parametrize("name", ["judge", "answers", "max_tokens"])
    def test_settings_that_the_task_has_are_refused(self, name, task):
        given = {"judge": recipe.Choice(name="length"), "answers": "x", "max_tokens": 3}[name]
        benchmark = recipe.Benchmark(name="b", kind="lm_eval", path="mini.yaml", **{name: given})
        with pytest.raises(UserError, match=f"{name} is no part of it"):
            benchmark_check.check(benchmark)

    def test_the_fake_engine_has_no_model_for_it(self, task):
        told = selfimprove("check", "iterative_dpo", "--set", HARNESS, "--set", "engine.kind=fake")
        assert told.code == 1
        assert "loads the model itself" in told.err
