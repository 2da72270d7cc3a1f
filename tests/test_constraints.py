"""IFEval's checks beside the stored verdicts of google-research's program, and at their edges."""

import gzip
import json
import sys
import time

import pytest

from selfimprove import constraints
from selfimprove.constraints import CHECKS, Constraint, ConstraintError, language
from selfimprove.errors import UserError
from tests.paths import SHARED

IFEVAL = SHARED / "data" / "ifeval"
PUNKT = SHARED / "data" / "nltk_punkt_tab_english"
RANDOM_UPSTREAM = {1122, 1129}  # their "letter" is '#' or '!', which the reference replaces by a random one
needs_data = pytest.mark.skipif(not IFEVAL.is_dir(), reason="../shared/ifeval is not here")
needs_punkt = pytest.mark.skipif(not PUNKT.is_dir(), reason="../shared/nltk_punkt_tab_english is not here")


@pytest.fixture
def punkt(monkeypatch):
    nltk_data = pytest.importorskip("nltk.data")
    monkeypatch.setattr(nltk_data, "path", [str(PUNKT)])
    language._punkt.cache_clear()
    yield
    language._punkt.cache_clear()


def _answers():
    return sorted(path.name.removeprefix("expected_") for path in IFEVAL.glob("public/expected_*.jsonl"))


@needs_data
@needs_punkt
@pytest.mark.parametrize("name", _answers())
@pytest.mark.parametrize("how", [constraints.strict, constraints.loose])
def test_verdicts_are_those_of_the_reference(punkt, name, how):
    """All but the two prompts on which the reference itself throws dice; 99 % was asked for."""
    prompts = {row["key"]: row for row in map(json.loads, (IFEVAL / "input_data.jsonl").open(encoding="utf-8"))}
    with gzip.open(IFEVAL / "public" / f"responses_{name}.gz", "rt", encoding="utf-8") as lines:
        responses = {row["key"]: row["response"] for row in map(json.loads, lines)}
    expected = {row["key"]: row[how.__name__] for row in map(json.loads, (IFEVAL / f"public/expected_{name}").open())}
    found = {
        key: how(responses[key], constraints.read(prompts[key]["instruction_id_list"], prompts[key]["kwargs"]))
        for key in expected
    }
    different = {key for key in expected if found[key] != expected[key]}
    same = 1 - sum(all(found[key]) != all(expected[key]) for key in expected) / len(expected)
    print(f"{name} {how.__name__}: {same:.2%} of {len(expected)} prompts agree; not {sorted(different)}")
    assert len(expected) == 540
    assert different <= RANDOM_UPSTREAM


@needs_data
def test_the_whole_benchmark_can_be_read_and_uses_every_check():
    rows = [json.loads(line) for line in (IFEVAL / "input_data.jsonl").open(encoding="utf-8")]
    read = [constraints.read(row["instruction_id_list"], row["kwargs"]) for row in rows]
    assert {one.name for found in read for one in found} == set(CHECKS)
    assert len(CHECKS) == 25


@pytest.mark.parametrize(
    ("name", "parameters", "kept", "broken"),
    [
        ("keywords:existence", {"keywords": ["Ada", "c++"]}, "ADA likes C++", "Ada likes c"),
        ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat concat", "cat"),
        ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, "cat", "cat concat"),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concat", "a Cat."),
        ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "##", "#"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "it's so", "so so"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb", "a\n***\n***\nb"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
            'A b.\n\n"so, it is',
            "so\n\nA b.",
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [[b]]", "[a\n] [b]"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x p. s. y", "PS y"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "p.p. s", "p.s."),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "\n\n * a\n\n - b", "* a\n** b\n"),
        ("detectable_format:constrained_response", {}, "So: My answer is no.", "my answer is no."),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* *b*", "*a* ** *"),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Section", "num_sections": 2},
            "Section 1 a Section2",
            "section 1 Section 2",
        ),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
        ("detectable_format:json_format", {}, "1", "[" * 100_000),
        ("detectable_format:title", {}, "<<<a>>", "<<>>\n<< >>\n<<a\n>>"),
        ("combination:two_responses", {}, "a******b", "a******a"),
        ("combination:two_responses", {}, "******a******b******", "a************b"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Do it. "}, " do it. Done", "Done. Do it."),
        ("startend:end_checker", {"end_phrase": "The end."}, 'x. the END."', "The end. x"),
        ("startend:quotation", {}, ' "a" ', '"'),
        ("change_case:english_capital", {}, "THE CAT SAT ON THE MAT AND LOOKED AT THE DOG.", "The cat SAT."),
        ("change_case:english_lowercase", {}, "the cat sat on the mat and looked at the dog.", "The cat sat."),
        ("language:response_language", {"language": "de"}, "Die Katze sitzt auf der Matte.", "The cat sat on it."),
        ("punctuation:no_comma", {}, "a; b", "a, b"),
    ],
)
def test_each_check_at_its_edge(name, parameters, kept, broken):
    [constraint] = constraints.read([name], [parameters])
    assert constraints.strict(kept, [constraint]) == [True]
    assert constraints.strict(broken, [constraint]) == [False]
    assert not constraint.holds(" \n")  # an empty answer keeps nothing


@needs_punkt
def test_sentences_and_capital_words_are_those_of_nltk(punkt):
    text = "Dr. Ada Lovelace spoke at 3 p.m. on Monday. NASA and the U.S. heard!"
    assert language.sentences(text) == 2
    at_least = {"capital_frequency": 2, "capital_relation": "at least"}
    assert Constraint("change_case:capital_word_frequency", at_least).holds(text)
    assert not Constraint("change_case:capital_word_frequency", at_least | {"capital_frequency": 3}).holds(text)


def test_a_loose_verdict_forgives_a_first_line_and_asterisks():
    read = constraints.read(["startend:quotation", "punctuation:no_comma"], [{}, {}])
    assert constraints.strict('Sure, here:\n**"a"**', read) == [False, False]
    assert constraints.loose('Sure, here:\n**"a"**', read) == [True, True]


@pytest.mark.parametrize(
    ("names", "kwargs", "words"),
    [
        (["keywords:nonsense"], [{}], "unknown instruction 'keywords:nonsense'"),
        (["startend:end_checker"], [{"end_phrase": None}], "startend:end_checker: 'end_phrase' is missing"),
        (["punctuation:no_comma"], [{"num_words": 3}], "unknown parameter 'num_words'"),
        (["keywords:existence"], [{"keywords": []}], "'keywords' is []"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}], "'relation' is \"about\""),
        (["length_constraints:number_words"], [{"num_words": True, "relation": "at least"}], "'num_words' is true"),
        (["punctuation:no_comma"], [], "1 instructions, but parameters for 0"),
    ],
)
def test_what_nobody_can_check_is_an_error_and_no_dice(names, kwargs, words):
    with pytest.raises(ConstraintError, match=None) as caught:
        constraints.read(names, kwargs)
    assert words in str(caught.value)


HOSTILE = ["[" * 100_000, "<" * 100_000, "\n" * 100_000 + "x", "* " * 50_000, " " * 100_000 + "x", "a" * 100_000]
HOSTILE += ["<<a" * 30_000, "p. " * 30_000, "\r" * 100_000 + "x", "'" * 100_000, "x. " * 30_000]


@needs_punkt
@needs_data
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:3]))
def test_a_long_hostile_answer_takes_no_long_time(punkt, text):
    rows = [json.loads(line) for line in (IFEVAL / "input_data.jsonl").open(encoding="utf-8")]
    each = {one.name: one for row in rows for one in constraints.read(row["instruction_id_list"], row["kwargs"])}
    slow = {}
    for constraint in each.values():
        start = time.process_time()
        constraints.loose(text, [constraint])
        slow[constraint.name] = time.process_time() - start
    assert max(slow.values()) < 10, {name: seconds for name, seconds in slow.items() if seconds > 1}


def test_what_is_not_installed_is_said_with_the_remedy(monkeypatch):
    nltk_data = pytest.importorskip("nltk.data")
    monkeypatch.setattr(nltk_data, "path", [])
    language._punkt.cache_clear()
    with pytest.raises(UserError) as caught:
        language.sentences("A cat. A dog.")
    assert "NLTK_DATA" in caught.value.hint
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(UserError) as caught:
        language.detect("A cat.")
    assert "selfimprove[ifeval]" in caught.value.hint
