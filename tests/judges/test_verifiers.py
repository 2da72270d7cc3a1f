"""The checkers beside human flags, another program's verdicts, and answers that mean harm."""

import gzip
import itertools
import json
import threading
import time
from pathlib import Path

import pytest

from selfimprove import judges, sandbox
from selfimprove.errors import UserError
from selfimprove.judges import Candidate, Opinion, numeric, programs, verifiers
from selfimprove.judges.verifiers import verifier
from selfimprove.recipe import Choice
from tests.paths import SHARED

GSM8K = SHARED / "data" / "gsm8k"
HUMANEVAL = SHARED / "data" / "humaneval" / "HumanEval.jsonl.gz"

try:
    sandbox.check()
    walls = True
except UserError:
    walls = False
needs_sandbox = pytest.mark.skipif(not walls, reason="no sandbox on this machine: see selfimprove doctor")


def _candidate(text: str, answer: str | None = None, prompt: str = "p") -> Candidate:
    return Candidate("id", prompt, "current", 0, text, [1], "stop", answer)


def _one(text: str, answer: str | None = None, **parameters: object) -> Opinion:
    [opinion] = verifier([_candidate(text, answer)], **parameters)  # type: ignore[arg-type]
    return opinion


# parameters


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"checker": "exact", "pattern": "x"}, "checker 'exact' takes no 'pattern'"),
        ({"checker": "regex", "function": "a:b"}, "checker 'regex' takes no 'function'"),
        ({"checker": "numeric", "timeout_seconds": 3.0}, "checker 'numeric' takes no 'timeout_seconds'"),
        ({"checker": "python"}, "checker 'python' needs 'function'"),
        ({"checker": "json_schema"}, "checker 'json_schema' needs 'json_schema'"),
        ({"checker": "regex", "pattern": "("}, "no regular expression"),
        ({"checker": "json_schema", "json_schema": {"type": "nonsense"}}, "'json_schema' is no JSON schema"),
        ({"checker": "json_schema", "json_schema": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"checker": "python", "function": "nowhere_to_be_found:f"}, "cannot import 'nowhere_to_be_found'"),
        ({"checker": "python", "function": "numpy:nothing"}, "'numpy' has no function 'nothing'"),
        ({"checker": "python", "function": "math"}, "'math' names no function"),
        ({"checker": "oracle"}, "parameter 'checker'"),
        ({"checker": "unit_tests", "timeout_seconds": 0.0}, "parameter 'timeout_seconds"),
        ({}, "parameter 'checker': is missing"),
    ],
)
def test_parameters_that_do_not_go_together_are_refused_before_anything_runs(parameters, words):
    with pytest.raises(UserError) as caught:
        judges.bind(Choice.model_validate({"name": "verifier"} | parameters))
    assert words in caught.value.message
    assert caught.value.hint


@needs_sandbox
def test_every_checker_binds():
    for checker, parameters in {
        "demo_world": {}, "exact": {}, "numeric": {}, "regex": {"pattern": "x"}, "json_schema": {"json_schema": {}},
        "unit_tests": {"timeout_seconds": 3}, "python": {"function": "numpy:isclose"},
    }.items():  # fmt: skip
        judges.bind(Choice.model_validate({"name": "verifier", "checker": checker} | parameters))
    judges.bind(Choice.model_validate({"name": "verifier", "checker": "regex"}))


def test_a_missing_library_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setattr(numeric.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        verifier([], checker="numeric")
    assert "selfimprove[math]" in caught.value.hint


@pytest.mark.parametrize("checker", ["exact", "numeric", "regex", "ifeval", "unit_tests"])
def test_without_a_reference_answer_nothing_is_known(checker, monkeypatch):
    monkeypatch.setattr(verifiers.language, "check", lambda: None)
    monkeypatch.setattr(programs.sandbox, "check", lambda: None)
    opinion = _one("4", checker=checker)
    assert opinion.score is None
    assert "reference answer" in opinion.reason


# numeric


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("So it is 18.", "9 + 9 = 18\n#### 18", 1.0),
        ("#### 1,234", "#### 1234", 1.0),
        ("#### 17", "#### 18", 0.0),
        ("She pays $18.00", "18", 1.0),
        ("It is 18 today\n#### 3", "18", 0.0),  # what is marked counts
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("The answer is $x^2 + 2x + 1$", "$(x+1)^2$", 1.0),
        ("The answer is $x^2 + 2x$", "$(x+1)^2$", 0.0),
        ("I do not know", "18", 0.0),
        ("", "18", 0.0),
        ("18", "a cat", None),
        ("18", "", None),
    ],
)
def test_numbers_and_formulas(text, answer, score):
    opinion = _one(text, answer, checker="numeric")
    assert opinion.score == score
    assert (opinion.reason == "the reference answer holds no number or formula") == (score is None)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="../shared/data/gsm8k is not here")
def test_gsm8k_solutions_are_judged_as_their_authors_did():
    """300 problems, two models, not one verdict different."""
    with gzip.open(GSM8K / "public" / "example_model_solutions_6b.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 300)]
    solutions = [(row["ground_truth"], row[model]) for row in rows for model in ("6b_finetuning", "6b_verification")]
    # the marks "A: 12" are given GSM8K's own form, since "A" is a variable to a parser of formulas
    marked = [
        _candidate(s["solution"].replace("\nA: ", "\n#### "), g.replace("\nA: ", "\n#### ")) for g, s in solutions
    ]
    opinions = verifier(marked, checker="numeric")
    different = [
        (c.text[-40:], c.answer[-20:], o) for c, o, (_, s) in zip(marked, opinions, solutions, strict=True)
        if o.score != float(s["is_correct"])
    ]  # fmt: skip
    assert len(opinions) == 600
    assert 100 < sum(o.score or 0 for o in opinions) < 300
    assert different == []


def test_a_hostile_formula_neither_hangs_nor_spoils_its_neighbours(monkeypatch):
    monkeypatch.setattr(numeric, "SECONDS", 3.0)
    tower = "$9^{9^{9^{9^{9}}}}$"
    texts = ["18", tower, "18", "\\boxed{" * 3000, "1" * 100_000, "\ud800 18", "18\n\x00", "17"]
    start = time.monotonic()
    found: list[Opinion] = []
    thread = threading.Thread(  # where signals do not reach
        target=lambda: found.extend(verifier([_candidate(t, "18") for t in texts], checker="numeric"))
    )
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    assert time.monotonic() - start < 60
    assert [found[i].score for i in (0, 2, 5, 6, 7)] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert found[1].score != 1.0
    assert not any(o.reason.startswith("math-verify broke") for o in found)


def test_a_comparison_without_end_is_ended_and_unknown(monkeypatch):
    monkeypatch.setattr(numeric, "SECONDS", 2.0)
    hang = "import sys, json, time\nfor line in sys.stdin:\n  time.sleep(99 * ('hang' in line))\n"
    hang += "  sys.exit(1) if 'die' in line else print(json.dumps([True, '']), flush=True)\n"
    monkeypatch.setattr(numeric.subprocess, "Popen", _instead(hang))
    opinions = verifier([_candidate(t, "1") for t in ("a", "hang", "b", "die", "c")], checker="numeric")
    assert [o.score for o in opinions] == [1.0, None, 1.0, None, 1.0]
    assert opinions[1].reason == "took more than 2 s"
    assert opinions[3].reason == "math-verify broke down"


def _instead(script: str):
    import subprocess

    original = subprocess.Popen
    return lambda command, **options: original([command[0], "-c", script], **options)


def test_rows_keep_their_order_over_several_processes(monkeypatch):
    monkeypatch.setattr(numeric, "ROWS_PER_PROCESS", 2)
    rows = [_candidate(str(i), str(i // 2 * 2) if i % 5 else None) for i in range(12)]
    scores = [o.score for o in verifier(rows, checker="numeric")]
    assert scores == [None if i % 5 == 0 else float(i % 2 == 0) for i in range(12)]


# regex


@pytest.mark.parametrize(
    ("text", "answer", "pattern", "score"),
    [
        ("The cat.", None, "cat", 1.0),
        ("The Cat.", None, "cat", 0.0),
        ("The Cat.", "ignored", "(?i)cat", 1.0),
        ("yes", "^(yes|no)$", None, 1.0),
        ("yes!", "^(yes|no)$", None, 0.0),
        ("x", "(", None, None),
        ("\ud800", None, ".", 1.0),
    ],
)
def test_patterns(text, answer, pattern, score):
    assert _one(text, answer, checker="regex", pattern=pattern).score == score


def test_an_answer_that_matches_for_ever_is_unknown():
    start = time.monotonic()
    opinion = _one("a" * 5000 + "!", checker="regex", pattern=r"^(a|a)*$|^(a?){5000}b")
    assert time.monotonic() - start < 10
    assert opinion == Opinion(None, "the pattern took more than 1 s")


# JSON

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ('{"n": 3}', 1.0, ""),
        ('```json\n{"n": 3}\n```', 1.0, ""),
        ('\n```\n{"n": 3}\n```\n', 1.0, ""),
        ('{"n": 0}', 0.0, "$.n: 0 is less than the minimum of 1"),
        ("{}", 0.0, "$: 'n' is a required property"),
        ('Here: {"n": 3}', 0.0, "no valid JSON"),
        ('{"n": NaN}', 0.0, "no valid JSON: NaN is not JSON"),
        ("", 0.0, "no valid JSON"),
        ("[" * 100_000, 0.0, "no valid JSON"),
        ('"\ud800"', 0.0, "$: "),
        ("1" * 100_000, 0.0, "no valid JSON"),
    ],
)
def test_json_of_a_shape(text, score, reason):
    opinion = _one(text, checker="json_schema", json_schema=SCHEMA)
    assert opinion.score == score
    assert opinion.reason.startswith(reason)


def test_a_schema_from_a_file_and_one_that_refers_elsewhere(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    assert _one('{"n": 1}', checker="json_schema", json_schema=str(tmp_path / "s.json")).score == 1.0
    (tmp_path / "s.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="is no JSON object"):
        _one("{}", checker="json_schema", json_schema=str(tmp_path / "s.json"))
    with pytest.raises(UserError, match="refers to http"):
        _one("{}", checker="json_schema", json_schema={"$ref": "http://127.0.0.1:9/schema"})


# constraints


def test_constraints_of_the_reference_answer(monkeypatch):
    monkeypatch.setattr(verifiers.language, "check", lambda: None)
    answer = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    assert _one('"a"', json.dumps(answer), checker="ifeval") == Opinion(1.0)
    assert _one('"a, b', json.dumps(answer), checker="ifeval").reason == (
        "not kept: punctuation:no_comma, startend:quotation"
    )
    for wrong in ("{}", "no JSON", "3", json.dumps(answer | {"kwargs": {}}), json.dumps(answer | {"kwargs": [{}]})):
        assert _one('"a"', wrong, checker="ifeval").score is None
    nothing = {"instruction_id_list": [], "kwargs": []}
    assert _one('"a"', json.dumps(nothing), checker="ifeval") == Opinion(None, "no constraint is given")


# unit tests

ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (ADD, ADD),
        (f"Sure:\n```python\n{ADD}\n```\nDone.", ADD + "\n"),
        (
            f"```py\ndef add(a, b): pass\n```\nBetter:\n```\n{ADD}\n```\nUse:\n```python\nprint(add(1, 2))\n```",
            ADD + "\n",
        ),
        (f"```python\n{ADD}\n```\n```bash\npip install x\n```", ADD + "\n"),
        (f"```python\n{ADD}", ADD),  # cut off
        ("```python\nprint(1)\n```\n```python\nprint(2)\n```", "print(2)\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
    ],
)
def test_the_code_of_an_answer(text, code):
    assert programs.code(text) == code


def test_humaneval_answers_are_bodies_or_whole_functions():
    answer = json.dumps(
        {"test": "def check(f):\n    assert f(1) == 2", "entry_point": "inc", "prompt": "def inc(x):\n"}
    )
    body = programs.job("    return x + 1", answer)
    whole = programs.job(
        "```python\ndef twice(x): ...\ndef inc(x):\n    return x + 1\n```\n```python\ndef x(): 1\n```", answer
    )
    assert isinstance(body, sandbox.Job)
    assert body.code == "def inc(x):\n    return x + 1"
    assert body.tests.endswith("check(inc)")
    assert isinstance(whole, sandbox.Job)
    assert "def twice" in whole.code
    assert programs.job("x", '{"test": "a"}') == "the reference answer lacks 'test' or 'entry_point'"
    assert programs.job("x", '{"test": "a", "entry_point": "f(); evil"}') == (
        "the reference answer lacks 'test' or 'entry_point'"
    )


@needs_sandbox
def test_generated_code_passes_or_fails_its_tests_with_the_reason():
    tests = "assert add(1, 2) == 3"
    texts = [ADD, "def add(a, b): return a - b", "import os; os._exit(0)", "while True: pass", ADD]
    found = verifier(
        [*(_candidate(text, tests) for text in texts), _candidate(ADD, "assert (")],
        checker="unit_tests",
        timeout_seconds=3.0,
    )
    assert found == [
        Opinion(1.0),
        Opinion(0.0, "assertion failed: assert add(1, 2) == 3"),
        Opinion(0.0, "ended early with exit status 0"),
        Opinion(0.0, "timeout after 3 s"),
        Opinion(1.0),
        Opinion(None, "the tests cannot be run: '(' was never closed (<tests>, line 1)"),
    ]


@needs_sandbox
@pytest.mark.skipif(not HUMANEVAL.exists(), reason="../shared/data/humaneval is not here")
def test_humaneval_through_the_judge():
    """Twelve problems as a model would answer them; tests/sandbox runs them all."""
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 32, 44)]  # some heads define helpers
    answers = [json.dumps({name: row[name] for name in ("test", "entry_point", "prompt")}) for row in rows]
    solved = [row["prompt"] + row["canonical_solution"] for row in rows]
    fenced = [_candidate(f"Here:\n```python\n{text}\n```", a) for text, a in zip(solved, answers, strict=True)]
    bodies = [_candidate(row["canonical_solution"], a) for row, a in zip(rows, answers, strict=True)]
    wrong = [_candidate("    return None\n", a) for a in answers]
    found = verifier([*fenced, *bodies, *wrong], checker="unit_tests", timeout_seconds=30.0)
    assert [o.score for o in found] == [1.0] * 24 + [0.0] * 12, found


# the user's own function


def test_a_function_of_the_current_directory(in_tmp, capsys):
    (in_tmp / "own_checks.py").write_text(
        "import sys\n"
        "print('loaded')\n"
        "def grade(prompt, completion, answer):\n"
        "    print('asked')\n"
        "    if completion == 'end':\n"
        "        sys.exit(0)\n"
        "    return {'big': 10**400, 'yes': True, 'half': 0.5, 'none': None, 'text': 'x', 'nan': float('nan')}"
        "[completion]\n",
        encoding="utf-8",
    )
    texts = ["yes", "half", "none", "text", "nan", "other", "end", "big"]
    found = verifier([_candidate(t) for t in texts], checker="python", function="own_checks:grade")
    assert [o.score for o in found] == [1.0, 0.5, None, None, None, None, None, None]
    out, err = capsys.readouterr()
    assert not out  # which is for data
    assert err == "loaded\n" + "asked\n" * 8
    big = found.pop()
    assert big.reason.startswith("own_checks:grade returned 1000")
    assert len(big.reason) < 100
    assert [o.reason for o in found[2:]] == [
        "own_checks:grade does not know",
        "own_checks:grade returned 'x'",
        "own_checks:grade returned nan",
        "own_checks:grade raised KeyError: 'other'",
        "own_checks:grade raised SystemExit: 0",
    ]


def test_files_outside_the_recipe_are_known(in_tmp):
    (in_tmp / "graders.py").write_text("def grade(prompt, completion, answer): return True", encoding="utf-8")
    (in_tmp / "s.json").write_text("{}", encoding="utf-8")

    def files(**parameters):
        return judges.files(Choice.model_validate({"name": "verifier"} | parameters))

    assert files(checker="exact") == {}
    assert files(checker="json_schema", json_schema={"type": "object"}) == {}
    assert files(checker="json_schema", json_schema="s.json") == {"s.json": Path("s.json")}
    assert files(checker="python", function="graders:grade") == {"graders:grade": in_tmp / "graders.py"}
    both = [{"name": "length"}, {"name": "verifier", "checker": "json_schema", "json_schema": "s.json"}]
    assert judges.files(Choice.model_validate({"name": "ensemble", "judges": both})) == {"s.json": Path("s.json")}


def test_a_module_that_fails_names_the_error(in_tmp):
    (in_tmp / "broken_checks.py").write_text("1 / 0", encoding="utf-8")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        verifier([], checker="python", function="broken_checks:grade")
