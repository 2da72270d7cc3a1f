"""Rows in the forms that other tools write: each says the same; other shapes are refused by place."""

import json

import datasets
import pytest

from selfimprove import data
from selfimprove.errors import UserError

SAID = [("Sort: b a.", "a b"), ("Sort: d c.", "c d")]
USER, ASSISTANT = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}
FORMS = {
    "texts": lambda p, a: {"prompt": p, "completion": a},
    "trl": lambda p, a: {"prompt": [USER | {"content": p}], "completion": [ASSISTANT | {"content": a}]},
    "messages": lambda p, a: {"messages": [USER | {"content": p}, ASSISTANT | {"content": a}]},
    "sharegpt": lambda p, a: {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": a}]},
    "alpaca": lambda p, a: {"instruction": p, "input": "", "output": a},
    "alpaca without input": lambda p, a: {"instruction": p, "output": a},
    "gsm8k": lambda p, a: {"question": p, "answer": a},
    "prompt beside messages": lambda p, a: {
        "prompt": p,
        "messages": [USER | {"content": p}, ASSISTANT | {"content": a}],
    },
}


def seeds(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_form_says_the_same(tmp_path, form, kind):
    rows = [FORMS[form](*said) for said in SAID]
    file = seeds(tmp_path, *rows)
    if kind == "parquet":
        file = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(file)
    assert [(seed.prompt, seed.completion) for seed in data.read_seeds(file)] == SAID
    if form not in ("texts", "trl"):  # beside `prompt` a held-out answer is called so
        assert [(row.prompt, row.answer) for row in data.read_heldout(file)] == SAID


def test_an_input_follows_its_instruction(tmp_path):
    rows = [{"instruction": "Sort.", "input": text, "output": "a b"} for text in ("b a", "a b")]
    assert [seed.prompt for seed in data.read_seeds(seeds(tmp_path, *rows))] == ["Sort.\n\nb a", "Sort.\n\na b"]


def test_held_out_prompts_need_no_answer_and_a_given_one_counts_first(tmp_path):
    rows = [{"messages": [USER]}, {"messages": [USER, ASSISTANT], "answer": "7"}, {"prompt": [USER]}, {"question": "q"}]
    found = data.read_heldout(seeds(tmp_path, *rows))
    assert [(row.prompt, row.answer) for row in found] == [("p", None), ("p", "7"), ("p", None), ("q", None)]


def test_columns_that_say_nothing_are_no_reason_to_refuse(tmp_path):
    more = {"system": "", "history": [], "label": True, "topic": "sorting"}
    rows = [FORMS["texts"](*said) | more for said in SAID]
    assert [seed.prompt for seed in data.read_seeds(seeds(tmp_path, *rows))] == [prompt for prompt, _ in SAID]


def test_numbers_are_ids_and_a_prompt_id_is_one(tmp_path):
    rows = [{"id": 7, **FORMS["texts"](*SAID[0])}, {"prompt_id": "x", **FORMS["texts"](*SAID[1])}]
    assert [seed.prompt_id for seed in data.read_seeds(seeds(tmp_path, *rows))] == ["7", "x"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, "messages holds 4 turns (user, assistant, user, assistant)"),
        (
            {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]},
            "holds 3 turns (system, user, assistant)",
        ),
        ({"messages": [ASSISTANT, USER]}, "messages holds 2 turns (assistant, user)"),
        ({"messages": []}, "messages holds no turn"),
        ({"messages": "hello"}, "messages is no list of turns with 'role' and 'content'"),
        ({"conversations": [USER, ASSISTANT]}, "conversations is no list of turns with 'from' and 'value'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "field 'messages' must be a text"),
        ({"messages": [USER]}, "no answer to its messages"),
        ({"prompt": [USER, ASSISTANT, USER], "completion": "a"}, "prompt holds 3 turns"),
        ({"prompt": [USER], "completion": [USER]}, "completion holds 1 turns (user), and one message of the assistant"),
        ({"instruction": "i", "input": 3, "output": "o"}, "instruction and input must be texts"),
        ({"instruction": "i"}, "no answer to its instruction"),
        ({"text": "t", "label": 1}, "no prompt among the columns text, label"),
        ({"prompt": "p", "completion": "a", "system": "s"}, "column 'system' says more"),
        (
            {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "'system'",
        ),
        ({"prompt": "p", "completion": "a", "label": False}, "label is false"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "weight 0"),
        ({}, "no prompt among the columns (none)"),
        ({"id": True, "prompt": "p", "completion": "a"}, "field 'id' must be a text"),
    ],
)
def test_other_shapes_are_refused_by_place(tmp_path, row, says):
    good = FORMS["texts"](*SAID[0])
    with pytest.raises(UserError) as raised:
        data.read_golds(seeds(tmp_path, good, row))
    assert "rows.jsonl, line 2: " in raised.value.message
    assert says in raised.value.message
    assert raised.value.hint


def test_a_damaged_parquet_file_and_an_empty_cell_are_told(tmp_path):
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([FORMS["texts"](*SAID[0]), {"prompt": "p", "completion": None}]).to_parquet(file)
    with pytest.raises(UserError, match="row 2: no answer to its prompt"):
        data.read_golds(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="is no Parquet file, or a damaged one"):
        data.read_seeds(file)
