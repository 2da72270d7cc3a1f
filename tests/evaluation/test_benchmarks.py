"""`selfimprove score`: published numbers from published files, and faults told by file, line and field."""

import gzip
import json
import os

import pytest

from selfimprove.evaluation.benchmarks import alpaca_lc, arena_hard, fields, gsm8k, ratings
from tests.conftest import selfimprove
from tests.paths import ROOT, SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
PUNKT = DATA / "nltk_punkt_tab_english"
LC = DATA / "alpaca_lc"
TABLES = ("--difficulty", str(LC / "instruction_difficulty.csv"), "--gamed", str(LC / "gamed_baseline.csv"))


def scored(*arguments):
    found = selfimprove("score", *map(str, arguments), "--json")
    assert found.code == 0, found.err
    return json.loads(found.out), found.err


def write(path, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def judged(number=40):
    return [
        {"index": i, "preference": 1 + (i * 7 % 10) / 10, "len_1": 900 + 13 * i % 400, "len_2": 1000 + 31 * i % 700}
        for i in range(number)
    ]


@needs_data
class TestPublished:
    def test_alpaca(self):
        told = json.loads((LC / "public" / "published.json").read_text())["claude-2.1"]
        c = told["published_C"]
        found, said = scored("alpaca_lc", LC / "public" / "claude-2.1.jsonl", *TABLES, "--c", c, "--resamples", 300)
        assert found["win_rate"] == pytest.approx(told["published"]["win_rate"], abs=1e-9)
        assert found["standard_error"] == pytest.approx(told["published"]["standard_error"], abs=1e-9)
        assert found["avg_length"] == told["published"]["avg_length"]
        assert found["lc_win_rate"] == pytest.approx(told["published"]["length_controlled_winrate"], abs=0.02)
        assert found["lc_bootstrap_se"] == pytest.approx(1.74, rel=0.12)
        assert found["lc_interval"][0] < found["lc_win_rate"] < found["lc_interval"][1]
        assert (found["variant"], said) == ("length_controlled_v1", "")

    def test_alpaca_with_a_hole(self, tmp_path):
        """By place as published; by index right, whether the file's index is the instruction's or the row's place."""
        file = LC / "public" / "gpt35_turbo_instruct.jsonl"
        by_place, said = scored("alpaca_lc", file, *TABLES, "--resamples", 2)
        assert by_place["lc_win_rate"] == pytest.approx(17.728, abs=0.02)
        assert "804 rows for 805 instructions" in said
        assert by_place["avg_length"] == pytest.approx(1018, abs=1)
        by_length, said = scored("alpaca_lc", file, *TABLES, "--resamples", 2, "--align", "index")
        assert by_length["lc_win_rate"] == pytest.approx(14.96, abs=0.01)
        assert "instructions without a row: 409" in said
        rows = [json.loads(line) for line in file.open()]
        true = write(tmp_path / "true.jsonl", *(row | {"index": row["index"] + (row["index"] >= 409)} for row in rows))
        by_index, said = scored("alpaca_lc", true, *TABLES, "--resamples", 2, "--align", "index")
        assert by_index["lc_win_rate"] == pytest.approx(by_length["lc_win_rate"], abs=1e-9)
        assert said == ""
        backwards = write(
            tmp_path / "back.jsonl.gz", *(json.loads(line) for line in true.read_text().splitlines()[::-1])
        )
        again, _ = scored("alpaca_lc", backwards, *TABLES, "--resamples", 2, "--align", "index")
        assert again["lc_win_rate"] == pytest.approx(by_index["lc_win_rate"], abs=1e-5)

    def test_another_baseline_is_told(self, tmp_path):
        rows = [json.loads(line) for line in (LC / "public" / "claude-2.1.jsonl").open()]
        other = write(tmp_path / "other.jsonl", *(row | {"len_1": row["len_1"] + 1} for row in rows))
        _, said = scored("alpaca_lc", other, *TABLES, "--resamples", 2, "--align", "index")
        assert "805 rows, the first with index 0, have another len_1" in said

    def test_arena_hard(self):
        folder = DATA / "arena_hard" / "public"
        told = json.loads((folder / "battles_57a9881_expected.json").read_text())
        found, said = scored("arena_hard", folder / "battles_57a9881.jsonl", "--resamples", 50)
        assert (found["baseline"], found["battles"], said) == ("claude-3-haiku-20240307", told["n_battles"], "")
        for model, elo in told["elo_official"].items():
            assert found["models"][model]["elo"] == pytest.approx(elo, abs=1e-6)
            assert found["models"][model]["win_rate"] == pytest.approx(told["winrate_official"][model], abs=1e-6)

    def test_gsm8k(self):
        folder = DATA / "gsm8k" / "public"
        found, _ = scored("gsm8k", folder / "example_model_solutions_6b.jsonl.gz")
        told = json.loads((folder / "expected.json").read_text())["6b_finetuning__vs__6b_verification"]
        for name, accuracy in (("6b_finetuning", "acc_a"), ("6b_verification", "acc_b")):
            model = found["models"][name]
            assert model["accuracy"] == pytest.approx(told[accuracy], abs=1e-12)
            assert (model["published_flags"], model["other_than_published"]) == (told["n"], 0)
        (pair,) = found["paired"]
        for ours, theirs in [
            ("only_a", "n_a1b0"), ("only_b", "n_a0b1"), ("difference", "diff"), ("p_exact", "mcnemar_exact_p"),
            ("standard_error", "paired_se"), ("unpaired_standard_error", "unpaired_se"),
            ("chi2", "mcnemar_chi2_cc"), ("p_chi2", "mcnemar_chi2_cc_p"),
        ]:  # fmt: skip
            assert pair[ours] == pytest.approx(told[theirs], rel=1e-9), ours

    @pytest.mark.parametrize("split", ["test", "train"])
    def test_every_gold_answer_of_gsm8k_is_a_number(self, split):
        for line in (DATA / "gsm8k" / f"{split}.jsonl").open():
            float(gsm8k.marked_answer(json.loads(line)["answer"]))

    def test_arena_bench(self):
        folder = DATA / "arena_bench_v1" / "public"
        found = ratings.score(folder / "judgments.jsonl.gz", "arena_bench")
        told = json.loads((folder / "expected_scores.json").read_text())
        assert found["models"].keys() == told.keys()
        for name, expected in told.items():
            model = found["models"][name]
            assert (model["n"], model["answers"], model["other_than_stored"]) == (expected["n_valid"], expected["n"], 0)
            assert model["mean"] == pytest.approx(expected["mean"], abs=1e-12)
            n = model["n"]
            assert model["standard_error"] == pytest.approx(expected["sem"] * ((n - 1) / n) ** 0.5, rel=1e-9)
        assert len(found["paired"]) == 28

    def test_mt_bench(self):
        """Stored scores as FastChat has them, three of which it read out of code; ours leave those unknown."""
        folder = DATA / "mt_bench"
        told = json.loads((folder / "granite-7b-lab_expected.json").read_text())
        found, said = scored("mt_bench", folder / "granite-7b-lab_gpt-4_single.jsonl.gz")
        model = found["models"]["granite-7b-lab"]
        assert list(model["stored_turns"].values()) == pytest.approx([told["first_turn"], told["second_turn"]])
        assert (model["stored_mean"], model["stored_n"]) == (pytest.approx(told["average"]), sum(told["n"]))
        assert (model["other_than_stored"], model["n"]) == (3, 37)
        assert found["ignored"] == {"no rating in the judgment": told["n_invalid"] + 3}
        assert "ignored: no rating in the judgment: 123" in said

    @pytest.mark.parametrize(
        "name", ["gpt4_20231107", "Qwen__Qwen2.5-0.5B-Instruct-GPTQ-Int4", "Qwen__Qwen2.5-1.5B-Instruct-GPTQ-Int4"]
    )
    def test_ifeval(self, name, monkeypatch):
        nltk_data = pytest.importorskip("nltk.data")
        pytest.importorskip("langdetect")
        from selfimprove.constraints import language

        monkeypatch.setattr(nltk_data, "path", [str(PUNKT)])
        language._punkt.cache_clear()
        folder = DATA / "ifeval" / "public"
        found, said = scored("ifeval", folder / f"responses_{name}.jsonl.gz")
        told = json.loads((folder / "expected_aggregate.json").read_text())[name]
        expected = {str(row["key"]): row for row in map(json.loads, (folder / f"expected_{name}.jsonl").open())}
        ours = {one["key"]: one for one in found["per_prompt"]}
        assert ours.keys() == expected.keys()
        for how in ("strict", "loose"):
            same = sum(all(ours[key][how]) == all(expected[key][how]) for key in expected)
            assert same >= 0.99 * told["n"]
            assert found[how]["prompt"]["n"] == told["n"]
            assert found[how]["prompt"]["accuracy"] == pytest.approx(told[how]["prompt"], abs=0.01)
            assert found[how]["instruction"]["accuracy"] == pytest.approx(told[how]["inst"], abs=0.01)
        assert found["prompts_without_response"] == 1
        assert "input_data.jsonl" in said


class TestFaults:
    """One sentence that names file, line and field, a hint, and nothing on stdout."""

    def refused(self, *arguments, code=1, says=()):
        found = selfimprove("score", *map(str, arguments))
        assert (found.code, found.out) == (code, ""), found.err
        assert "hint: " in found.err
        assert "Traceback" not in found.err
        for text in says:
            assert text in found.err, found.err

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"index": -1}, "field 'index' is -1, not a whole number from 0"),
            ({"index": 1.5}, "field 'index' is 1.5"),
            ({"index": True}, "field 'index' is True"),
            ({"index": 0}, "index 0 stands in line 1 too"),
            ({"preference": "2"}, "field 'preference' is '2', not a number"),
            ({"preference": float("inf")}, "field 'preference' is inf"),
            ({"len_2": None}, "field 'len_2' is None"),
            ({"len_1": -3}, "field 'len_1' is -3"),
            ({"len_1": ...}, "no field 'len_1'"),
        ],
    )
    def test_alpaca(self, tmp_path, change, says):
        rows = judged(3)
        rows[1] = {name: value for name, value in (rows[1] | change).items() if value is not ...}
        file = write(tmp_path / "rows.jsonl", *rows)
        self.refused("alpaca_lc", file, says=[f"rows.jsonl, line {2}: ", says])

    def test_alpaca_tables(self, tmp_path):
        file = write(tmp_path / "rows.jsonl", *judged(3))
        table, gamed = tmp_path / "difficulty.csv", tmp_path / "gamed.csv"
        table.write_text("index,instruction_difficulty\n0,0.5\n1,x\n")
        self.refused("alpaca_lc", file, "--difficulty", table, says=["difficulty.csv, line 3: field", "'x'"])
        table.write_text("index,gamma\n0,0.5\n")
        self.refused("alpaca_lc", file, "--difficulty", table, says=["line 1: no column 'instruction_difficulty'"])
        table.write_text("index,instruction_difficulty\n0,0.5\n1,0.1\n")
        self.refused("alpaca_lc", file, "--difficulty", table, says=["has 3 rows, and there are 2 difficulties"])
        self.refused("alpaca_lc", file, "--difficulty", table, "--align", "index", says=["no difficulty for index 2"])
        gamed.write_text("model,index,len_1,std_delta_len,instruction_difficulty,preference\na,0,1,0.1,0,1.5\n")
        self.refused("alpaca_lc", file, "--difficulty", table, "--gamed", gamed, says=["from 0 to 1"])
        for wrong in (("--gamed", gamed), ("--align", "index"), ("--c", "0"), ("--c", "nan")):
            self.refused("alpaca_lc", file, *wrong, code=2)
        self.refused("alpaca_lc", tmp_path / "none.jsonl", says=["none.jsonl cannot be read"])

    def battle(self, **change):
        row = {"question_id": 1, "model_a": "base", "model_b": "m", "winner": "tie"} | change
        return {name: value for name, value in row.items() if value is not ...}

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"winner": "a"}, "field 'winner' is 'a', not one of model_a"),
            ({"winner": None}, "field 'winner' is None"),
            ({"model_b": "base"}, "another model than model_a"),
            ({"model_a": ""}, "field 'model_a' is ''"),
            ({"question_id": ...}, "no field 'question_id'"),
            ({"conv_metadata": {"sum_assistant_a_tokens": 1}}, "no field 'conv_metadata'"),
        ],
    )
    def test_arena_hard(self, tmp_path, change, says):
        file = write(tmp_path / "b.jsonl", self.battle(), self.battle(**change))
        self.refused("arena_hard", file, says=["b.jsonl, line ", says])

    def test_arena_hard_baselines(self, tmp_path):
        ring = [self.battle(model_a=a, model_b=b) for a, b in ("xy", "yz", "zx")]
        file = write(tmp_path / "b.jsonl", *ring)
        self.refused("arena_hard", file, says=["no one model is in every battle", "x, y, z"])
        self.refused("arena_hard", file, "--baseline", "w", says=["'w' is in no battle"])
        assert scored("arena_hard", file, "--baseline", "y")[0]["models"]["x"]["win_rate"] == pytest.approx(50)
        games = write(tmp_path / "g.jsonl", {"question_id": 1, "model": "m", "games": [None, {"score": "A>B"}]})
        self.refused("arena_hard", games, says=["do not name the baseline"])

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"answer": "no number", "response": "A: 1"}, "field 'answer' is 'no number'"),
            ({"answer": "#### 1", "response": None}, "field 'response' is None"),
            ({"answer": "#### 1"}, "no field 'response'"),
        ],
    )
    def test_gsm8k(self, tmp_path, row, says):
        file = write(tmp_path / "s.jsonl", {"answer": "#### 1", "response": "#### 1"}, row)
        self.refused("gsm8k", file, says=["s.jsonl, line 2: ", says])

    def test_gsm8k_formats(self, tmp_path):
        self.refused("gsm8k", write(tmp_path / "s.jsonl", {"a": 1}), says=["neither of the known formats"])
        row = {"question": "?", "ground_truth": "A: 1"}
        self.refused("gsm8k", write(tmp_path / "s.jsonl", row), says=["no model with a 'solution'"])
        rows = [row | {"m": {"solution": "A: 1"}}, row | {"n": {"solution": "A: 1"}}]
        self.refused("gsm8k", write(tmp_path / "s.jsonl", *rows), says=["line 2: no field 'm'"])

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"key": 2, "response": "x"}, "has no prompt with key '2'"),
            ({"key": 1, "response": "y"}, "a second response to prompt '1'"),
            ({"key": 1}, "no field 'response'"),
            ({"response": "x"}, "no field 'prompt'"),
        ],
    )
    def test_ifeval(self, tmp_path, row, says):
        asked = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        prompts = write(tmp_path / "prompts.jsonl", asked)
        file = write(tmp_path / "r.jsonl", {"key": 1, "response": "x"}, row)
        self.refused("ifeval", file, "--prompts", prompts, says=["r.jsonl, line 2: ", says])
        self.refused("ifeval", file, says=["r.jsonl has no instructions"])

    def test_ifeval_prompts(self, tmp_path):
        file = write(tmp_path / "r.jsonl", {"key": 1, "response": "x"})
        asked = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}
        prompts = write(tmp_path / "prompts.jsonl", asked)
        self.refused("ifeval", file, "--prompts", prompts, says=["prompts.jsonl, line 1: unknown instruction"])

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"judgment": 7}, "field 'judgment' is 7, not a text"),
            ({"score": "7"}, "field 'score' is '7'"),
            ({"turn": 0}, "field 'turn' is 0"),
            ({"question_id": 1}, "is judged in line 1 too"),
        ],
    )
    def test_mt_bench(self, tmp_path, change, says):
        row = {"question_id": 1, "model": "m", "turn": 1, "judgment": "[[7]]", "score": 7}
        file = write(tmp_path / "j.jsonl", row, row | {"question_id": 2} | change)
        self.refused("mt_bench", file, says=["j.jsonl, line 2: ", says])


class TestOwnFiles:
    def test_alpaca_prompts_of_ones_own(self, tmp_path):
        rows = judged()
        rows[3]["preference"], rows[4]["preference"], rows[5]["preference"] = None, 3, float("nan")
        found, said = scored("alpaca_lc", write(tmp_path / "rows.jsonl.gz", *(row | {"note": "x"} for row in rows)))
        assert found["ignored"] == {"preference not readable": 2, "preference outside 1 to 2": 1}
        assert (found["rows"], found["n_total"], found["unused_fields"]) == (40, 37, ["note"])
        assert found["variant"] == "length_controlled_minimal"
        assert "ignored: preference not readable: 2" in said
        assert "fields not used: note" in said
        none, said = scored("alpaca_lc", write(tmp_path / "one.jsonl", judged(1)[0]))
        assert (none["lc_win_rate"], none["standard_error"]) == (None, None)
        assert "note: no length-controlled win rate" in said

    def test_arena_hard_judgments(self, tmp_path):
        rows = [
            {"question_id": 1, "model": "m", "games": [{"score": "A>>B"}, {"score": "A>B"}]},
            {"question_id": 2, "model": "m", "games": [None, {"judgment": "so [[B<A]]"}]},
            {"question_id": 3, "model": "m", "games": [{"score": None}, {"judgment": "none"}]},
        ]
        found, _ = scored("arena_hard", write(tmp_path / "g.jsonl", *rows), "--baseline", "base")
        assert (found["battles"], found["ignored"]) == (5, {"game without a verdict": 3})
        assert found["models"]["m"]["win_rate"] == pytest.approx(100 * 2 / 5, abs=1e-4)
        second = [{"uid": row.pop("question_id")} | row for row in rows]
        found, _ = scored("arena_hard", write(tmp_path / "v2.jsonl", *second), "--baseline", "base")
        assert (found["battles"], found["ignored"]) == (4, {"question with a game without a verdict": 2})

    def test_arena_hard_style(self, tmp_path):
        def counts(side, tokens):
            lists = {"ordered": 1, "unordered": 2}
            told = {"header": {"h1": 1, "h2": tokens % 3}, "list": lists, "bold": {"**": 3, "__": tokens % 2}}
            return {f"sum_assistant_{side}_tokens": tokens} | {f"{n}_count_{side}": v for n, v in told.items()}

        rows = [
            {"question_id": i, "model_a": "base", "model_b": "m", "winner": "model_b" if i * 7 % 5 < 3 else "model_a"}
            | {"conv_metadata": counts("a", 100 + i * 37 % 90) | counts("b", 150 + i * 53 % 120)}
            for i in range(60)
        ]
        found, _ = scored("arena_hard", write(tmp_path / "b.jsonl", *rows))
        assert {name: len(of["coefficients"]) for name, of in found["style_controlled"].items()} == {
            "length": 1,
            "markdown": 3,
            "both": 4,
        }
        assert 0 < found["style_controlled"]["both"]["models"]["m"]["win_rate"] < 100

    def test_gsm8k(self, tmp_path):
        rows = [
            {"question": "?", "answer": "#### 1,234", "response": "so\n#### 1234"},
            {"question": "?", "answer": "#### -5", "response": "it is -5."},
            {"question": "?", "answer": "#### 3", "response": "#### 4"},
        ]
        found, _ = scored("gsm8k", write(tmp_path / "mine.jsonl", *rows))
        assert found["models"]["mine"]["is_correct"] == [True, False, False]
        assert (found["models"]["mine"]["no_answer"], found["models"]["mine"]["flexible_accuracy"]) == (1, 2 / 3)

    def test_ifeval_with_its_own_instructions(self, tmp_path):
        asked = {"instruction_id_list": ["punctuation:no_comma", "change_case:no_such"], "kwargs": [{}, {}]}
        file = write(tmp_path / "r.jsonl", {"prompt": "p", "response": "x, y"} | asked)
        assert selfimprove("score", "ifeval", str(file)).code == 1
        asked = {
            "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
            "kwargs": [{}, {"unused": None}],
        }
        found, _ = scored("ifeval", write(tmp_path / "r.jsonl", {"prompt": "p", "response": "<<x>> y"} | asked,
                                          {"prompt": "q", "response": "<<x>>, y"} | asked))  # fmt: skip
        assert found["strict"]["prompt"]["accuracy"] == 0.5
        assert found["strict"]["instruction"]["accuracy"] == 0.75
        # one prompt with all of one sign: (1/4, 1/4 | 1/4, -3/4) -> sums 1/2, -1/2
        assert found["strict"]["instruction"]["standard_error"] == pytest.approx((2 * 0.25) ** 0.5 / 4)

    def test_tables_for_people(self, tmp_path):
        evil = "\x1b[31m[red]m[/red]"
        row = {"question_id": 1, "model": evil, "judgment": "[[7]]", "\x1b]0;title\x07": 1}
        file = write(tmp_path / "j.jsonl", row, row | {"question_id": 2, "judgment": "[[9]]"}, row | {"model": "n"})
        found = selfimprove("score", "mt_bench", str(file))
        assert found.code == 0, found.err
        assert "\x1b" not in found.out + found.err
        assert "8.000" in found.out
        assert "[red]" in found.out
        files = {
            "alpaca_lc": judged(),
            "arena_hard": [self_battle("model_b"), self_battle("model_a")],
            "gsm8k": [{"ground_truth": "A: 1", evil: {"solution": "A: 1"}, "n": {"solution": "A: 2"}}] * 2,
        }
        for name, rows in files.items():
            found = selfimprove("score", name, str(write(tmp_path / f"{name}.jsonl", *rows)))
            assert (found.code, "\x1b" in found.out + found.err) == (0, False), found.err
            assert "95 %" in found.out


def self_battle(winner):
    return {"question_id": 1, "model_a": "base", "model_b": "[b]m", "winner": winner}


def test_places_of_lengths():
    assert alpaca_lc.places([3, 5], [3, 4, 5]) == [0, 2]
    assert alpaca_lc.places([3, 6], [3, 4, 5]) is None
    assert alpaca_lc.places([3, 5], [3, 5, 5]) is None  # either of the fives


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("#### 18", "18", "18"),
        ("so 3.\nA: 1,000", "1000", "1000"),
        ("#### 1\n\nQ: next\n#### 2", "1", "2"),
        ("It costs $70,000.", None, "70000"),
        ("Option A: 5 apples", None, "5"),
        ("#### $5", None, "5"),
        ("nothing", None, None),
        ("#### -3", "-3", "-3"),
    ],
)
def test_answers_in_solutions(text, marked, last):
    assert (gsm8k.marked_answer(text), gsm8k.last_number(text)) == (marked, last)


def test_scoring_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, selfimprove.cli; print([m for m in ('numpy', 'scipy', 'torch', 'rich') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "numpy" not in told.stdout
    assert "scipy" not in told.stdout


def test_winners_are_the_published_ones():
    assert set(arena_hard.WINNERS) == {"model_a", "model_b", "tie", "tie (bothbad)"}


@pytest.mark.parametrize(("value", "sane"), [(10**400, False), (-(10**400), False), (7, True), (1e301, False)])
def test_a_number_that_no_float_holds_is_not_sane(value, sane):
    assert fields._sane(value) is sane
