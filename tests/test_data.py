"""Input files: bad rows are named, keywords are content words."""

import random

import pytest

from selfimprove import data
from selfimprove.errors import UserError
from selfimprove.records import Seed

GOOD = '{"prompt": "Sort: b a.", "completion": "a b"}\n{"prompt": "Sort: d c.", "completion": "c d"}\n'


def test_ids_are_given_where_none_are(tmp_path):
    file = tmp_path / "seeds.jsonl"
    file.write_text("\ufeff" + GOOD.replace("\n", "\r\n") + "\n", encoding="utf-8")
    assert [s.prompt_id for s in data.read_seeds(file)] == ["seed-00000", "seed-00001"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no rows"),
        (GOOD.encode().split(b"\n")[0], "holds 1 rows"),
        (b"not json\n", "line 1: not JSON"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b'{"prompt": "a"}\n', "line 1: no answer to its prompt, for example in field 'completion'"),
        (b'{"prompt": "", "completion": "b"}\n', "line 1: field 'prompt'"),
        (b'{"prompt": 3, "completion": "b"}\n', "line 1: field 'prompt'"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'{"prompt": "a\\ud800", "completion": "b"}\n', "line 1: field 'prompt' holds half a character (\\ud800)"),
        (b'{"prompt": "a\\u0000", "completion": "b"}\n', "line 1: field 'prompt' holds a null byte"),
        (b'{"id": "x", "prompt": "a", "completion": "b"}\n' * 2, "line 2: id 'x' stands twice, first in line 1"),
    ],
)
def test_bad_seed_files_are_one_sentence(tmp_path, content, says):
    file = tmp_path / "seeds.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        data.read_golds(file)
    assert says in raised.value.message
    assert raised.value.hint


def test_seeds_may_have_no_answers_where_no_golds_are_asked_for(tmp_path):
    file = tmp_path / "seeds.jsonl"
    file.write_text(GOOD + '{"prompt": "Sort: f e."}\n')
    assert [seed.completion for seed in data.read_seeds(file)] == ["a b", "c d", None]
    with pytest.raises(UserError, match="line 3: no answer to its prompt"):
        data.read_golds(file)


def test_line_separators_inside_a_json_string_do_not_split_a_row(tmp_path):
    file = tmp_path / "seeds.jsonl"
    file.write_text(GOOD + '{"prompt": "a\u2028b\\nc", "completion": "d"}\n', encoding="utf-8")
    assert data.read_seeds(file)[2].prompt == "a\u2028b\nc"


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(UserError, match="no file"):
        data.locate(str(tmp_path / "none"), "seeds")
    with pytest.raises(UserError, match="nothing is shipped"):
        data.locate("demo:sedes", "seeds")


def test_prompts_fold_alike_whatever_their_case_and_punctuation():
    assert data.fold("Sort: b, a.") == data.fold("sort b a") != data.fold("sort a b")


def test_keywords_are_content_words_without_names():
    text = "Yesterday Peter and the old fox counted 12 apples; the fox said that I can't."
    assert data.keywords(text) == ["yesterday", "old", "fox", "counted", "12", "apples"]


def test_training_keywords_are_two_own_and_one_foreign():
    own = Seed("a", "reverse apple banana", "x")
    other = Seed("b", "count tigers lions", "y")
    for k in range(50):
        drawn = data.draw_training_keywords(own, [other], random.Random(k))
        assert len([w for w in drawn if w in data.keywords(own.prompt)]) == 2
        assert len([w for w in drawn if w in data.keywords(other.prompt)]) == 1
    both = [own, other]
    assert all(data.draw_training_keywords(own, both, random.Random(k)) for k in range(50))  # never its own noise
    assert data.draw_training_keywords(Seed("c", "the of", "z"), [other], random.Random(0)) is None


def test_without_noise_all_three_training_keywords_are_own():
    own, other = Seed("a", "reverse apple banana cherry", "x"), Seed("b", "count tigers lions", "y")
    drawn = [data.draw_training_keywords(own, [other], random.Random(k), noise=False) for k in range(50)]
    assert all(len(set(words)) == 3 and set(words) <= set(data.keywords(own.prompt)) for words in drawn)
    assert len({tuple(words) for words in drawn}) > 10  # other words and other orders
    two = Seed("c", "reverse apple", "z")
    assert data.draw_training_keywords(two, [other], random.Random(0), noise=False) is None
    assert data.draw_training_keywords(two, [other], random.Random(0)) is not None


def test_corpus_keywords_share_a_paragraph():
    paragraphs = ["the red fox met a tiger", "a green boat left port", "too short"]
    for k in range(50):
        drawn = set(data.draw_corpus_keywords([data.keywords(p) for p in paragraphs], random.Random(k)))
        assert any(drawn <= set(data.keywords(p)) for p in paragraphs)
        assert len(drawn) == 3
    with pytest.raises(UserError):
        data.draw_corpus_keywords([data.keywords("no no")], random.Random(0))
