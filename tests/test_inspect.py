"""A look into a run: rows for which something holds, and the lives of pairs and prompts, against the artifacts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfimprove import plan, recipe_file
from selfimprove.columns import arrow_schema
from selfimprove.records import Comparison, Flip, Generation, Pair, PairLoss, Prompt, Verdict
from selfimprove.report import paging
from selfimprove.rows import kinds
from selfimprove.stages import generate, label, synthesize, train
from selfimprove.store import Artifact, Run, read_manifest, read_rows
from tests.conftest import QUICK, cut, selfimprove
from tests.synthetic_run import recipe

EVIL = "\x1b[31mred\x1b[0m"
MEASURE = """
import resource, runpy, sys
sys.argv = ["selfimprove", *sys.argv[1:]]
try:
    runpy.run_module("selfimprove", run_name="__main__")
except SystemExit:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `two` of the default recipe; nobody writes into it."""
    folder = tmp_path_factory.mktemp("inspect[1]")  # a name that a glob would not take for itself
    before = Path.cwd()
    os.chdir(folder)
    try:
        cut(40)
        result = selfimprove("iterate", "--rounds", "2", "--run", "two", *QUICK, "--set", "synthesize.prompts=60")
        assert result.code == 0, result.err
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def two(two_rounds: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(two_rounds)
    return two_rounds / "runs" / "two"


@pytest.fixture
def copy(two_rounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(two_rounds / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "two"


def rows(*arguments: str) -> list[dict]:
    result = selfimprove("inspect", *arguments, "--jsonl")
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


class TestRows:
    @pytest.mark.parametrize(
        ("stage", "name", "record"),
        [
            ("2/synthesize", "prompts", Prompt),
            ("2/generate", "generations", Generation),
            ("2/label", "pairs", Pair),
            ("1/train", "losses", PairLoss),
        ],
    )
    def test_a_stages_own_rows_come_whole_and_in_order(self, two, stage, name, record):
        [directory] = (two / f"iter-00{stage[0]}").glob(f"*-{stage[2:]}")
        expected = read_rows(directory, name, record)
        found = rows("two", stage)
        assert [{k: row[k] for k in record.__struct_fields__} for row in found] == [
            {k: getattr(row, k) for k in record.__struct_fields__} for row in expected
        ]
        assert {row["stage"] for row in found} == {f"iter-00{stage[0]}/{directory.name}"}

    def test_where_is_what_python_makes_of_the_rows(self, two):
        pairs = [p for t in (1, 2) for p in read_rows(two / f"iter-00{t}/3-label", "pairs", Pair)]
        longer = {p.pair_id for p in pairs if len(p.chosen_token_ids) > len(p.rejected_token_ids)}
        assert 0 < len(longer) < len(pairs)
        assert {r["pair_id"] for r in rows("two", "--where", "chosen_tokens > rejected_tokens")} == longer
        margins = {p.pair_id: p.chosen_score - p.rejected_score for p in pairs}
        found = rows("two", "--where", "margin >= 1")
        assert {r["pair_id"]: r["margin"] for r in found} == {k: v for k, v in margins.items() if v >= 1}
        assert rows("two", "--where", "margin < 0.1") == []
        second = rows("two", "2", "--where", "prompt_id like 'i2-%'")
        assert [r["pair_id"] for r in second] == [p.pair_id for p in pairs if p.iteration == 2]

    def test_derived_columns(self, two):
        for row in rows("two", "1/generate", "--sample", "5"):
            assert row["tokens"] == len(row["token_ids"])
            assert row["mean_logp"] == pytest.approx(sum(row["logprobs"]) / len(row["logprobs"]))

    def test_other_kinds_and_the_document(self, two):
        verdicts = rows("two", "1/label", "--rows", "verdicts", "--where", "score = 1")
        told = json.loads(
            selfimprove("inspect", "two", "1/label", "--rows", "verdicts", "--where", "score = 1", "--json").out
        )
        assert told["total"] == len(verdicts) > len(told["rows"]) == 20
        assert "reply" in told["columns"]
        generations = json.loads(selfimprove("inspect", "two", "1/generate", "--where", "sample = 0", "--json").out)
        assert "token_ids" not in generations["rows"][0]
        assert generations["rows"][0]["tokens"] > 0

    def test_a_person_sees_the_first_and_how_to_see_more(self, two):
        shown = selfimprove("inspect", "two", "2/label", "--where", "margin > 0.5", "--sample", "2").out
        assert shown.count("pair_id: ") == 2
        assert "selfimprove inspect two 2/label --where 'margin > 0.5' --jsonl" in shown
        nothing = selfimprove("inspect", "two", "--where", "margin < 0")
        assert (nothing.code, nothing.out.strip()) == (0, "no pairs where margin < 0")

    @pytest.mark.parametrize(
        ("expression", "sentence", "hint"),
        [
            ("margn < 0.1", "pairs have no column 'margn'", "is it margin?"),
            ("margin <", "syntax error", "columns: stage, pair_id"),
            ("margin < 0.1; drop table x", "more than one statement", "columns"),
            ("margin < 0.1) or (1 = 1", "syntax error", "columns"),
            ("select 1", "syntax error", "columns"),
            ("margin < 0.1, 1", "single expression", "columns"),
            ("margin < 'high'", "Could not convert", "columns"),
            ("pair_id::int > 1", "Could not convert", "columns"),
            ("count(*) > 1", "aggregates", "columns"),
            ("os_system('id') = 1", "does not exist", "columns"),
            ("(select count(*) from read_csv('/etc/passwd')) > 0", "Cannot access", "columns"),
            ("(select count(*) from '../../secret.csv') > 0", "", "columns"),
            ("(select count(*) from pd) > 0", "", "columns"),
        ],
    )
    def test_a_wrong_expression_is_one_sentence_and_the_columns(self, two, expression, sentence, hint):
        result = selfimprove("inspect", "two", "--where", expression)
        assert (result.code, result.out) == (1, "")
        said, _, hinted = result.err.partition("\n\nhint: ")
        assert said.startswith("error: --where")
        assert sentence in said
        assert "\n" not in said
        assert hint in hinted

    def test_no_expression_reads_outside_the_run_or_writes(self, two_rounds, two):
        (two_rounds / "secret.csv").write_text("a\n1\n")
        for path in ("secret.csv", str(two_rounds / "secret.csv"), f"{two}/../../secret.csv"):
            result = selfimprove("inspect", "two", "--where", f"(select count(*) from '{path}') > 0")
            assert (result.code, result.out) == (1, "")
        before = {p: p.stat().st_mtime_ns for p in two.rglob("*")}
        rows("two", "2/label")
        assert {p: p.stat().st_mtime_ns for p in two.rglob("*")} == before

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--json", "--jsonl"],
            ["--pair", "a", "--prompt", "b"],
            ["--pair", "a", "--jsonl"],
            ["--pair", "a", "--where", "1"],
            ["2/label", "--prompt", "a"],
            ["--prompt", "a", "--sample", "0"],
            ["--prompt", "a", "--rows", "pairs"],
            ["--sample", "3"],
        ],
    )
    def test_options_that_do_not_go_together(self, two, arguments):
        result = selfimprove("inspect", "two", *arguments)
        assert (result.code, result.out) == (2, "")
        assert "hint: " in result.err

    def test_unknown_kinds_and_stages_without_rows(self, two):
        assert "kinds here: pairs" in selfimprove("inspect", "two", "1/label", "--rows", "pears").err
        assert "no rows of its own" in selfimprove("inspect", "two", "0/control", "--where", "1 = 1").err
        assert selfimprove("inspect", "two", "9/label", "--where", "1 = 1").code == 1

    def test_only_published_artifacts_are_read(self, copy):
        whole = rows("two", "--rows", "pairs")
        shutil.copytree(copy / "iter-002/3-label", copy / "iter-002/3-label.partial")
        stray = copy / "iter-002/3-label/pairs-00001.parquet"  # in no manifest
        shutil.copy(copy / "iter-002/3-label/pairs-00000.parquet", stray)
        (copy / "iter-001/3-label").rename(copy / "iter-001/3-label.partial")
        assert rows("two", "--rows", "pairs") == [r for r in whole if r["stage"].startswith("iter-002")]

    def test_a_damaged_file_is_said_to_be_one(self, copy):
        path = copy / "iter-002/3-label/pairs-00000.parquet"
        path.write_bytes(path.read_bytes()[:-100])
        result = selfimprove("inspect", "two", "2/label", "--where", "margin > 0")
        assert result.code == 1
        assert "differs from its manifest" in result.err
        assert "selfimprove verify two" in result.err


class TestLives:
    def test_of_every_pair_of_a_run(self, two):
        """The default recipe: the answers, scores and losses of a pair are those of the artifacts."""
        losses = {r["pair_id"]: r for r in pq.read_table(two / "iter-002/4-train/losses-00000.parquet").to_pylist()}
        texts = {(g.prompt_id, g.sample): g for g in read_rows(two / "iter-002/2-generate", "generations", Generation)}
        prompts = {p.prompt_id: p for p in read_rows(two / "iter-002/1-synthesize", "prompts", Prompt)}
        for pair in read_rows(two / "iter-002/3-label", "pairs", Pair)[:5]:
            told = json.loads(selfimprove("inspect", "two", "--pair", pair.pair_id, "--json").out)
            assert told["prompt"]["text"] == prompts[pair.prompt_id].text
            assert told["prompt"]["keywords"] == prompts[pair.prompt_id].keywords
            [one] = told["rounds"]
            [made] = one["pairs"]
            for side, score in (("chosen", pair.chosen_score), ("rejected", pair.rejected_score)):
                answer = texts[pair.prompt_id, made[side]["sample"]]
                assert made[side]["text"] == answer.text == getattr(pair, side)[0]["content"]
                assert made[side]["score"] == score
            assert made["rule"]["pairing"]["name"] == "best_vs_worst"
            assert len(one["answers"]) == 6
            for answer in one["answers"]:
                row = texts[pair.prompt_id, answer["sample"]]
                assert (answer["tokens"], answer["finish_reason"]) == (len(row.token_ids), row.finish_reason)
                assert (answer["policy"], answer["policy_is"]) == (row.policy, "iter-001/4-train")
                assert len(answer["verdicts"]) == 1
            [trained] = made["training"]
            own = losses[pair.pair_id]
            assert trained["first"] == trained["last"] == {k: own[k] for k in ("step", "epoch", "loss", "margin")}
            assert trained["stage"] == "iter-002/4-train"

    def test_of_a_prompt_that_gave_no_pair(self, two):
        [row, *_] = rows("two", "--rows", "quarantine", "--where", "stage like '%label'")
        told = json.loads(selfimprove("inspect", "two", "--prompt", row["row_id"], "--json").out)
        [one] = told["rounds"]
        assert one["pairs"] == []
        assert one["set_aside"] == [row]
        assert row["reason"] in selfimprove("inspect", "two", "--prompt", row["row_id"]).out

    def test_of_a_held_out_prompt(self, two):
        [first, *_] = rows("two", "0/1-evaluate", "--sample", "1")
        told = json.loads(selfimprove("inspect", "two", "--prompt", first["prompt_id"], "--json").out)
        assert told["prompt"]["origin"] == "held out"
        assert {row["stage"] for row in told["held_out"]} == {
            "iter-000/1-evaluate", "iter-000/3-control-evaluate", "iter-001/5-evaluate", "iter-002/5-evaluate",
        }  # fmt: skip

    def test_an_unknown_id_gets_those_like_it(self, two):
        pair = rows("two", "2/label", "--sample", "1")[0]["pair_id"]
        for option, name in (("--pair", pair), ("--prompt", pair.split("/")[1])):
            result = selfimprove("inspect", "two", option, f"{name[:-1]}{name[-1]}0")
            assert result.code == 1
            assert name in result.err.partition("hint: ")[2]

    def test_losses_of_an_older_run_are_not_recorded(self, copy):
        pair = rows("two", "2/label", "--sample", "1")[0]["pair_id"]
        folder = copy / "iter-002/4-train"
        (folder / "losses-00000.parquet").unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["outputs"] = [o for o in manifest["outputs"] if not o["path"].startswith("losses")]
        manifest.pop("seal", None)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert "losses not recorded" in selfimprove("inspect", "two", "--pair", pair).out
        run = Run(copy)
        assert {e.status for e in plan.examine(run, recipe_file.load(run.recipe_file))} == {"done"}

    def test_comparisons_words_flips_and_many_rounds(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        _judged(tmp_path / "runs" / "judged")
        told = json.loads(selfimprove("inspect", "judged", "--pair", "i1/p/0", "--json").out)
        first, second = told["rounds"]
        assert [a["verdicts"][0]["reply"] for a in first["answers"]] == [f"words {EVIL}", "other words"]
        assert first["comparisons"][0]["swapped_reply"] == "the other order"
        assert [p["pair_id"] for p in first["pairs"]] == ["i1/p/0"]
        trained = first["pairs"][0]["training"]
        assert [t["stage"] for t in trained] == ["iter-001/4-train", "iter-002/4-train"]
        assert (trained[0]["first"]["loss"], trained[0]["last"]["loss"], trained[0]["steps"]) == (0.7, 0.5, [1, 4, 9])
        assert trained[1]["why"] == "not trained on: longer than max_length"
        assert second["answers"] == []
        assert second["flips"][0]["why"] == "relabelled"
        assert second["pairs"][0]["chosen"]["sample"] == 1  # of the round that first paired them
        shown = selfimprove("inspect", "judged", "--pair", "i1/p/0").out
        assert "\x1b" not in shown
        for words in ("words ‹ESC›[31mred", "the other order", "flipped (relabelled)", "longer than max_length"):
            assert words in " ".join(shown.split())

    def test_a_terminal_gets_no_escape_codes_of_a_model(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        _judged(tmp_path / "runs" / "judged")
        for arguments in (["1/label", "--rows", "verdicts", "--where", "score > 0"], ["--prompt", "p"], ["1/generate"]):
            for form in ([], ["--json"], ["--jsonl"]):
                if arguments[0] != "--prompt" or form != ["--jsonl"]:
                    assert "\x1b" not in selfimprove("inspect", "judged", *arguments, *form).out
        assert rows("judged", "1/label", "--rows", "verdicts")[0]["reply"] == f"words {EVIL}"  # whole, as data


def _judged(path: Path) -> None:
    """A run of two rounds in which a pair is made, compared in both orders, and turned over."""
    chosen = recipe(2, "train.pairs='all'")
    path.mkdir(parents=True)
    Run(path).recipe_file.write_text(recipe_file.dump(chosen), encoding="utf-8")

    def pair(first: str, second: str) -> Pair:
        ids = {"good": [1, 2], "bad": [3]}
        message = {text: [{"role": "assistant", "content": text}] for text in ids}
        user = [{"role": "user", "content": "q"}]
        scores = (2.0, 1.0)
        return Pair(
            "i1/p/0", user, message[first], message[second], "p", 1, "current", "current", *scores, [9], ids[first],
            ids[second],
        )  # fmt: skip

    for step in plan.steps(chosen):
        artifact = Artifact(path / step.directory)
        artifact.begin()
        rows_in = rows_out = 1
        if step.stage is synthesize and step.iteration == 1:
            artifact.write_rows("prompts", Prompt, [Prompt("p", "q", "synthetic", 1, ["a", "b"])])
        elif step.stage is generate and step.iteration == 1:
            answers = [("good", [1, 2]), ("bad", [3])]
            made = [
                Generation("p", "q", "current", k, text, [9], ids, [-1.0] * len(ids), "stop", "m", k)
                for k, (text, ids) in enumerate(answers)
            ]
            artifact.write_rows("generations", Generation, made)
        elif step.stage is label:
            if step.iteration == 1:
                replies = [f"words {EVIL}", "other words"]
                verdicts = [Verdict("p", "current", k, "judge", 2.0 - k, "", reply) for k, reply in enumerate(replies)]
                artifact.write_rows("verdicts", Verdict, verdicts)
                both = Comparison(
                    "p", "current", 0, "current", 1, "judge", 0.9, None, "unread", "one", "the other order"
                )
                artifact.write_rows("comparisons", Comparison, [both])
                artifact.write_rows("pairs", Pair, [pair("good", "bad")])
            else:
                artifact.write_rows("pairs", Pair, [pair("bad", "good")])
                flip = Flip("i1/p/0", "p", 2, "relabelled", "current", "current", 1.0, 2.0)
                artifact.write_rows("flips", Flip, [flip])
        elif step.stage is train:
            known = [PairLoss("i1/p/0", s, s / 9, x, 0.1) for s, x in ((1, 0.7), (4, 0.6), (9, 0.5))]
            other = PairLoss("i2/r/0", 1, 0.5, 0.1, 0.1)
            artifact.write_rows("losses", PairLoss, [other, *known] if step.iteration == 1 else [other])
            if step.iteration == 2:
                artifact.quarantine("i1/p/0", "longer than max_length")
                rows_out = 0
        artifact.contract("row", rows_in, rows_out)
        artifact.publish(step.iteration, step.name, {"section": {}}, {})


class TestPaging:
    def test_only_on_a_terminal(self, two, monkeypatch):
        monkeypatch.setenv("PAGER", "sed s/^/paged:/")
        assert "paged:" not in selfimprove("inspect", "two", "2/label").out

    @pytest.mark.parametrize(("settings", "paged"), [({}, True), ({"NO_PAGER": "1"}, False)])
    def test_through_the_pager_that_is_set(self, two, settings, paged):
        command = f"{sys.executable} -m selfimprove inspect two 2/label"
        known = os.environ | {"PAGER": "sed s/^/paged:/", "TERM": "xterm", **settings}
        shown = subprocess.run(
            ["script", "-qec", command, "/dev/null"],
            env=known,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ("paged:" in shown.stdout) == paged, shown.stdout[:500]
        assert "pair_id" in shown.stdout

    def test_less_shows_colours_and_leaves_short_output(self, monkeypatch):
        monkeypatch.delenv("LESS", raising=False)
        monkeypatch.delenv("NO_PAGER", raising=False)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("PAGER", "true")
        with paging.paged() as console:
            console.print("x")
        assert os.environ["LESS"] == "FRX"


@pytest.mark.parametrize("arguments", [["--jsonl"], ["--where", "tokens > 10", "--sample", "1"]], ids=["all", "where"])
def test_memory_does_not_grow_with_the_rows(tmp_path, arguments):
    peaks = []
    for name, count in (("small", 5_000), ("large", 300_000)):
        lines, peak = _measured(tmp_path, name, count, arguments)
        assert lines == count or "--jsonl" not in arguments
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 200, peaks  # MiB; 300,000 rows as Python objects take more than 500


def _measured(folder: Path, name: str, count: int, arguments: list[str]) -> tuple[int, float]:
    path = folder / "runs" / name
    path.mkdir(parents=True)
    chosen = recipe(1)
    Run(path).recipe_file.write_text(recipe_file.dump(chosen), encoding="utf-8")
    [step] = [s for s in plan.steps(chosen) if s.stage is generate]
    artifact = Artifact(path / step.directory)
    artifact.begin()
    numbers = np.arange(count)
    lists = pa.ListArray.from_arrays(np.arange(0, 16 * count + 1, 16, dtype=np.int32), np.arange(16 * count) % 50_000)
    texts = pa.array([f"prompt {k}" for k in numbers])
    columns = {name: texts for name, kind in Generation.__annotations__.items() if kind is str}
    columns |= dict.fromkeys(("prompt_token_ids", "token_ids"), lists)
    columns |= {"logprobs": lists.cast(pa.list_(pa.float64())), "sample": pa.array(numbers), "seed": pa.array(numbers)}
    schema = arrow_schema(Generation)
    pq.write_table(pa.table({n: columns[n] for n in schema.names}, schema), artifact.path("generations-00000.parquet"))
    artifact.contract("row", count, count)
    artifact.publish(1, step.name, {}, {})
    with (folder / "out").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, "inspect", name, "1/generate", *arguments],
            cwd=folder, stdout=out, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert not (folder / "out").read_text()[:5].startswith("error")
    with (folder / "out").open() as lines:
        found = [line[:80] for line in lines if line.startswith('{"stage"') or "--jsonl" in arguments]
    assert all(line.startswith('{"stage"') for line in found), [line for line in found if line[0] != "{"]
    return len(found), int(done.stderr.split()[-1]) / 1024


def test_kinds_are_read_off_the_manifests(two):
    run = Run(two)
    found = kinds(run, list(plan.steps(recipe_file.load(run.recipe_file))))
    outputs = {
        f"{m.parent.relative_to(two)}/{o.path}"
        for m in two.glob("iter-*/*/manifest.json")
        for o in read_manifest(m.parent).outputs
        if o.path.endswith(".parquet")
    }
    assert {file for shards in found.values() for one in shards for file in one.files} == outputs
