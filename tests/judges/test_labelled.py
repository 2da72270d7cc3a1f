"""Pairs and verdicts are read as they were published; what is wrong is named with its file and line."""

import gzip
import json
from collections import Counter

import pytest

from selfimprove.errors import UserError
from selfimprove.judges import labelled
from tests.paths import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data with known answers is not beside the checkout")
PAIR = {"prompt": "p", "answer_a": "one", "answer_b": "two", "label": "a"}
VERDICT = {
    "subset": "s", "judge": "j", "strategy": "t", "index": 0, "label": "1", "fwd_winner": "1", "swp_winner": None
}  # fmt: skip


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@needs_data
class TestPublished:
    @pytest.mark.parametrize(
        ("subset", "labels"),
        [
            ("Natural", (42, 58)), ("Neighbor", (75, 59)), ("GPTInst", (45, 47)), ("GPTOut", (22, 25)),
            ("Manual", (22, 24)), ("FairEval", (41, 25)), ("MT-Bench", (101, 99)), ("LLMEval2", (92, 108)),
        ],
    )  # fmt: skip
    def test_llmbar(self, subset, labels):
        pairs = list(labelled.read_pairs(DATA / f"llmbar/dataset/{subset}.json"))
        counts = Counter(pair.human for pair in pairs)
        assert (counts["first"], counts["second"], counts["tie"], counts[None]) == (*labels, 0, 0)
        assert [pair.number for pair in pairs] == list(range(len(pairs)))
        assert {pair.subset for pair in pairs} == {subset}

    def test_autoj(self):
        pairs = list(labelled.read_pairs(DATA / "autoj_pairwise/autoj_pairwise.jsonl.gz"))
        assert Counter(pair.human for pair in pairs) == {"first": 520, "second": 499, "tie": 373}
        longer = [pair for pair in pairs if pair.human == "first" and len(pair.first) > len(pair.second)]
        assert len(longer) / 520 == pytest.approx(0.679, abs=1e-3)  # people prefer longer answers: 0 is the first

    def test_pandalm(self):
        expected = json.loads((DATA / "pandalm/expected.json").read_text())
        path = DATA / "pandalm/testset-v1.json.gz"
        pairs = list(labelled.read_pairs(path))
        names = {"0": "tie", "1": "first", "2": "second"}
        counts = {names[label]: number for label, number in expected["majority_counts"].items()}
        assert Counter(pair.human for pair in pairs) == counts
        assert len(pairs) == expected["n"]
        table: dict[str, Counter] = {}
        for pair, raw in zip(pairs, json.loads(gzip.decompress(path.read_bytes())), strict=True):
            table.setdefault(raw["cmp_key"].replace("_", "__vs__"), Counter())[pair.human] += 1
        found = {key: [n["first"], n["second"], n["tie"]] for key, n in table.items()}
        assert found == expected["pairwise_human_majority_win_lose_tie"]

    def test_the_verdicts_of_llmbar(self):
        found = list(labelled.read_verdicts(DATA / "llmbar/public/verdicts.jsonl.gz"))
        assert len(found) == 5028
        assert Counter(v.forward for v in found) == {1.0: 3168, 0.0: 1840, None: 20}
        assert Counter(v.swapped for v in found) == {0.0: 3351, 1.0: 1660, None: 17}

    def test_the_verdicts_of_pandalm(self):
        found = list(labelled.read_verdicts(DATA / "pandalm/gpt-3.5-turbo-testset-v1.json.gz"))
        assert Counter(v.forward for v in found) == {0.0: 476, 1.0: 460, 0.5: 38, None: 25}
        assert {(v.judge, v.both_orders) for v in found} == {("gpt-3.5-turbo-testset-v1", False)}


def test_a_format_of_ones_own_in_every_kind_of_file(tmp_path):
    rows = [PAIR, {**PAIR, "label": "b"}, {**PAIR, "label": "tie"}, {**PAIR, "label": None, "answer_a": ""}]
    plain = lines(tmp_path / "mine.jsonl", *rows)
    array = tmp_path / "mine.json"
    array.write_text(json.dumps(rows, indent=1))
    packed = tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    found = list(labelled.read_pairs(plain))
    assert [pair.human for pair in found] == ["first", "second", "tie", None]
    assert found[3].first == ""
    assert list(labelled.read_pairs(array)) == list(labelled.read_pairs(packed)) == found


@pytest.mark.parametrize(("votes", "human"), [((1, 1, 0), "first"), ((0, 0, 2), "tie"), ((0, 1, 2), None)])
def test_the_majority_of_annotators_counts(tmp_path, votes, human):
    row = {"instruction": "i", "input": "x", "response1": True, "response2": "b"}
    path = lines(tmp_path / "t.jsonl", row | {f"annotator{k}": vote for k, vote in enumerate(votes, 1)})
    [pair] = labelled.read_pairs(path)
    assert (pair.human, pair.prompt, pair.first) == (human, "i\n\nx", "true")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no rows"),
        ("[]", "holds no rows"),
        ("[1]", "line 1: not a JSON object"),
        ('{"a": 1}\n', "line 1: no known format has the columns a"),
        (f"{json.dumps(PAIR)}\n\nnonsense\n", "line 3: not JSON"),
        (f"[\n{json.dumps(PAIR)},\n{{\n'x'}}]", "line 4: not JSON"),
        (f"[\n{json.dumps(PAIR)},\n\n{json.dumps(PAIR | {'label': 'c'})}]", "line 4: 'label' is 'c'"),
        (f"[{json.dumps(PAIR)}]\nmore", "line 1: something follows the array"),
        (json.dumps(PAIR | {"label": True}), "line 1: 'label' is True"),
        (json.dumps(PAIR | {"label": ["a"]}), "line 1: 'label' is ['a']"),
        (json.dumps(PAIR | {"answer_b": None}), "line 1: field 'answer_b' must be a text"),
        (f'{json.dumps(PAIR)}\n{{"prompt": "p"}}', "line 2: no field 'answer_a'"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, says):
    path = tmp_path / "pairs.json"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        list(labelled.read_pairs(path))
    assert says in told.value.message
    assert str(path) in told.value.message
    assert told.value.hint


def test_an_unknown_format_is_told_the_known_ones(tmp_path):
    with pytest.raises(UserError) as told:
        list(labelled.read_pairs(lines(tmp_path / "x.jsonl", {"question": "q", "good": "g"})))
    assert "question, good" in told.value.message
    for name in ("llmbar: input, output_1", "autoj: prompt, response 1", "pandalm: instruction", "plain: prompt"):
        assert name in told.value.hint


@pytest.mark.parametrize(
    "damage",
    [b"no gzip", gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:-9], gzip.compress(b"\xff\xfe\n", mtime=0)],
    ids=["no gzip", "cut", "no UTF-8"],
)
def test_a_damaged_file(tmp_path, damage):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(damage)
    with pytest.raises(UserError) as told:
        list(labelled.read_pairs(path))
    assert str(path) in told.value.message
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(labelled.read_pairs(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fwd_winner": "3"}, "line 1: 'fwd_winner' is '3'"),
        ({"label": "3"}, "line 1: 'label' is '3'"),
        ({"index": "0"}, "line 1: field 'index' must be a whole number"),
    ],
)
def test_a_verdict_that_is_wrong(tmp_path, change, says):
    with pytest.raises(UserError) as told:
        list(labelled.read_verdicts(lines(tmp_path / "v.jsonl", VERDICT | change)))
    assert says in told.value.message


def test_verdicts_of_an_unknown_format(tmp_path):
    with pytest.raises(UserError, match="no known format of verdicts has the columns idx, result"):
        list(labelled.read_verdicts(lines(tmp_path / "v.jsonl", {"idx": 0, "result": 1})))
