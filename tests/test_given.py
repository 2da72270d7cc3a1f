"""Pairs that were there before the run: every form says the same, each round trains on its own, no other gets in."""

import itertools
import json
import math
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfimprove import combinations, data, preflight, recipe_file
from selfimprove.chat import Chat
from selfimprove.errors import UserError
from selfimprove.records import Given, Pair
from selfimprove.stages.given import share
from selfimprove.store import read_manifest, read_rows
from tests.altered import change_manifest
from tests.conftest import selfimprove

SAID = [("Sort: b a.", "a b", "b a"), ("Sort: d c.", "c d", "d d")]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


FORMS = {
    "texts": lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r},
    "messages": lambda p, c, r: {"prompt": [user(p)], "chosen": [assistant(c)], "rejected": [assistant(r)]},
    "dialogues alone": lambda p, c, r: {"chosen": [user(p), assistant(c)], "rejected": [user(p), assistant(r)]},
    "dialogues beside their prompt": lambda p, c, r: {
        "prompt": p,
        "messages": [user(p), assistant(c)],
        "chosen": [user(p), assistant(c)],
        "rejected": [user(p), assistant(r)],
        "score_chosen": 8.0,
    },
    "question": lambda p, c, r: {"system": "", "question": p, "chosen": c, "rejected": r},
}


def written(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_form_says_the_same(tmp_path, form, kind):
    rows = [FORMS[form](*said) for said in SAID]
    file = written(tmp_path / "rows.jsonl", rows)
    if kind == "parquet":
        file = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(file)
    expected = [Given(f"pair-{number:05d}", *said) for number, said in enumerate(SAID)]
    assert data.read_pairs(file) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "no column 'rejected'"),
        ({"chosen": "Human: p Assistant: c", "rejected": "r"}, "no prompt beside chosen and rejected"),
        (
            {"chosen": [user("p"), assistant("c")], "rejected": [user("q"), assistant("r")]},
            "'rejected' answers another prompt than 'chosen' has",
        ),
        (
            {"prompt": "q", "chosen": [user("p"), assistant("c")], "rejected": "r"},
            "'chosen' answers another prompt than 'prompt' has",
        ),
        (
            {"prompt": "p", "chosen": [user("p"), assistant("c"), user("d"), assistant("e")], "rejected": "r"},
            "chosen holds 4 turns (user, assistant, user, assistant), and one prompt with its answer is taken",
        ),
        ({"prompt": "p", "chosen": [user("c")], "rejected": "r"}, "chosen holds 1 turns (user), and one message of"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "field 'chosen' must be a text that is not empty"),
        ({"prompt": "p", "chosen": "c", "rejected": 1}, "field 'rejected' must be a text that is not empty"),
        ({"system": "s", "prompt": "p", "chosen": "c", "rejected": "r"}, "column 'system' says more"),
    ],
)
def test_a_row_of_another_shape_is_refused_by_its_place(tmp_path, row, message):
    file = written(tmp_path / "rows.jsonl", [FORMS["texts"](*SAID[0]), row])
    with pytest.raises(UserError) as raised:
        data.read_pairs(file)
    assert raised.value.message.startswith(f"{file}, line 2: {message}")
    assert raised.value.hint


def test_two_pairs_of_one_prompt_are_two(tmp_path):
    rows = [FORMS["texts"]("p", "a", "b") | {"prompt_id": "same", "id": name} for name in ("x", "y")]
    assert [one.prompt_id for one in data.read_pairs(written(tmp_path / "rows.jsonl", rows))] == ["x", "y"]


def test_no_pair_is_of_two_rounds_and_the_order_is_the_files():
    pairs = [Given(f"{k:02d}", "p", "c", "r") for k in range(25)]
    rounds = [share(pairs, 10, 7, t) for t in (1, 2, 3, 4)]
    assert [len(one) for one in rounds] == [10, 10, 5, 0]
    names = [[one.prompt_id for one in part] for part in rounds]
    assert all(part == sorted(part) for part in names)
    assert sorted(itertools.chain(*names)) == [one.prompt_id for one in pairs]
    assert names[0] != [one.prompt_id for one in pairs[:10]]  # a file sorted by source would give rounds of one
    assert share(pairs, 10, 8, 1) != rounds[0]
    assert share(pairs, None, 7, 3) == pairs


RECIPE = """
name = "mine"
rounds = 2
stages = ["label", "train", "evaluate"]
data = {{ pairs = "{pairs}", heldout = "heldout.jsonl" }}
engine = {{ kind = "fake", dtype = "float32", max_model_len = 256 }}

[label]
pairing = "given"
quota = {quota}

[train]
loss = {{ name = "dpo", beta = 0.1 }}
reference = "previous"
chunks = {{ by = "source", number = 2, order = "easy_to_hard" }}
optimizer = {{ learning_rate = 1e-4, batch_size = 8 }}

[evaluate]
judge = {{ name = "verifier", checker = "demo_world" }}
n = 1
max_tokens = 48

[machine]
threads = 1
"""


@pytest.fixture
def mine(cut_data: Path) -> list[dict[str, str]]:
    """A recipe on 40 pairs: a seed's gold answer over the next seed's; of the last pair both answers are the same."""
    seeds = [json.loads(line) for line in Path("seeds.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [seed["completion"] for seed in seeds]
    others = [*answers[1:], answers[-1]]
    rows = [
        {"prompt": seed["prompt"], "chosen": chosen, "rejected": rejected, "source": f"set {number % 2}"}
        for number, (seed, chosen, rejected) in enumerate(zip(seeds, answers, others, strict=True))
    ]
    written(Path("pairs.jsonl"), rows)
    Path("mine.toml").write_text(RECIPE.format(pairs="pairs.jsonl", quota=20), encoding="utf-8")
    return rows


def test_a_run_trains_each_round_on_other_pairs_source_by_source(mine):
    result = selfimprove("iterate", "mine.toml")
    assert result.code == 0, result.err
    folders = [Path(f"runs/mine/iter-00{t}/1-label") for t in (1, 2)]
    pairs = [pair for folder in folders for pair in read_rows(folder, "pairs", Pair)]
    chat = Chat(data.SHIPPED["demo:model"])
    for pair in pairs:
        row = mine[int(pair.prompt_id.removeprefix("pair-"))]
        told = pair.prompt[0]["content"], pair.chosen[0]["content"], pair.rejected[0]["content"], pair.source
        assert told == (row["prompt"], row["chosen"], row["rejected"], row["source"])
        assert (pair.chosen_source, pair.rejected_source) == ("given", "given")
        assert pair.prompt_token_ids == chat.prompt_ids(row["prompt"])
        assert pair.rejected_token_ids == chat.completion_ids(row["prompt"], row["rejected"])
    assert sorted(pair.prompt_id for pair in pairs) == [f"pair-{number:05d}" for number in range(39)]
    aside = [read_manifest(folder).rows.quarantined for folder in folders]
    assert sorted(aside, key=len) == [{}, {"chosen equals rejected": 1}]
    for t in (1, 2):  # sDPO's invariant: each chunk, here a source, starts from its own reference
        lines = Path(f"runs/mine/iter-00{t}/2-train/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        starts = [k for k, step in enumerate(steps) if step["loss"] == pytest.approx(math.log(2), abs=1e-6)]
        assert len(starts) == 2
    assert selfimprove("verify", "mine").code == 0
    assert selfimprove("report", "mine").code == 0
    life = json.loads(selfimprove("inspect", "mine", "--pair", pairs[0].pair_id, "--json").out)
    assert life["prompt"] | {"origin": "given", "text": pairs[0].prompt[0]["content"]} == life["prompt"]
    [made] = life["rounds"]
    texts = [pairs[0].chosen[0]["content"], pairs[0].rejected[0]["content"]]
    assert [answer["text"] for answer in made["answers"]] == texts

    shutil.copy(folders[0] / "pairs-00000.parquet", "again.parquet")  # what a run has written is what another is given
    Path("again.toml").write_text(RECIPE.format(pairs="again.parquet", quota=10), encoding="utf-8")
    settings = ["--run", "again", "--rounds", "1", "--until", "1/label", "--set", "label.quota=20"]
    again = selfimprove("iterate", "again.toml", *settings)
    assert again.code == 0, again.err
    texts = [(p.prompt, p.chosen, p.rejected) for p in read_rows(Path("runs/again/iter-001/1-label"), "pairs", Pair)]
    assert texts == [(p.prompt, p.chosen, p.rejected) for p in read_rows(folders[0], "pairs", Pair)]


def test_verify_finds_a_pair_that_the_file_does_not_give(mine):
    assert selfimprove("iterate", "mine.toml", "--until", "1/label").code == 0
    assert selfimprove("verify", "mine").code == 0
    folder = Path("runs/mine/iter-001/1-label")
    shard = folder / "pairs-00000.parquet"
    first, *rows = pq.read_table(shard).to_pylist()
    turned = first | {"chosen_token_ids": first["rejected_token_ids"]}
    pq.write_table(pa.Table.from_pylist([turned, *rows], schema=pq.read_schema(shard)), shard)
    change_manifest(folder, lambda told: None)
    told = selfimprove("verify", "mine")
    assert told.code == 3
    assert f"{first['pair_id']} is not what verdicts and rule give (chosen_token_ids)" in told.out


def test_another_file_of_pairs_is_another_ingredient(mine):
    assert selfimprove("iterate", "mine.toml", "--until", "1/label").code == 0
    written(Path("pairs.jsonl"), [*mine[:-1], mine[-1] | {"rejected": "no such answer"}])
    plan = selfimprove("plan", "mine")
    assert "data.pairs changed" in plan.out + plan.err


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_plan_counts_the_pairs_of_a_round(mine, kind):
    datasets.Dataset.from_list(mine[:30]).to_parquet("pairs.parquet")
    written(Path("pairs.jsonl"), mine[:30])
    told = json.loads(selfimprove("plan", "mine.toml", "--json", "--set", f"data.pairs=pairs.{kind}").out)
    trained = [step["estimate"]["how"] for step in told if step["stage"] == "2-train"]
    assert [how.partition(" x ")[0] for how in trained] == ["at most 20 pairs", "at most 20 pairs"]


def test_check_rehearses_on_the_pairs(mine):
    told = selfimprove("check", "mine.toml", "--json", "--set", "data.seeds=there/is/none.jsonl")  # nothing uses seeds
    found = {entry["what"]: entry["found"] for entry in json.loads(told.out)}
    assert found["pairs"] == "40 given"
    assert found["rows"] == "40 of 40 can be trained on, 0 dropped, none truncated"
    assert found["loss at the first step"].startswith("0.693147")
    assert "seeds" not in found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["label.pairing=gold_vs_generated"], "label.pairing = 'given' and data.pairs go together"),
        (['label.judge="length"'], "pairing 'given' looks at no score"),
        (["label.min_margin=0.5"], "label.min_margin needs a judge"),
        (['label.acquire={by="random",prompts=4}'], "label.acquire looks at answers of the policy"),
        (["rounds=3"], "label.quota = 20: 40 given pairs are enough for 2 rounds, not for 3"),
        (["data.heldout=pairs.jsonl"], "40 prompts of data.pairs stand in data.heldout too"),
        (["data.pairs=one.jsonl"], "train.chunks by source needs pairs of two data sources or more"),
        (["data.pairs=none.jsonl"], "data.pairs: no file none.jsonl"),
    ],
)
def test_what_does_not_fit_given_pairs_is_said_before_anything_runs(mine, settings, message):
    written(Path("one.jsonl"), [row | {"source": "same"} for row in mine])
    written(Path("held.jsonl"), [{"prompt": row["prompt"], "answer": row["chosen"]} for row in mine])
    given = [part for setting in settings for part in ("--set", setting.replace("=pairs.jsonl", "=held.jsonl"))]
    result = selfimprove("check", "mine.toml", *given)
    assert result.code == 1
    assert result.err.startswith(f"error: {message}")
    assert "hint:" in result.err


def test_rounds_without_a_quota_would_train_on_the_same_pairs(mine):
    Path("mine.toml").write_text(Path("mine.toml").read_text(encoding="utf-8").replace("quota = 20", ""), "utf-8")
    result = selfimprove("check", "mine.toml")
    assert result.err.startswith("error: each of 2 rounds would train on all given pairs")
    assert selfimprove("check", "mine.toml", "--set", "rounds=1").code == 0


def test_stages_that_write_answers_are_refused_beside_given_pairs_and_missed_without():
    shipped = recipe_file.find("iterative_dpo")
    beside = ["data.pairs=pairs.jsonl", "label.pairing=given"]
    with pytest.raises(UserError, match="the stage generate would be for nothing"):
        combinations.fits_together(recipe_file.load(shipped, beside))
    bare = recipe_file.load(recipe_file.find("sdpo_7b"))
    table = bare.model_dump(exclude_none=True)
    del table["data"]["pairs"]
    table["label"]["pairing"] = "gold_vs_generated"
    with pytest.raises(UserError, match="pairing 'gold_vs_generated' needs the stage generate"):
        combinations.fits_together(type(bare).model_validate(table))


def test_a_schedule_cannot_change_which_pairs_are_whose():
    table = recipe_file.load(recipe_file.find("sdpo_7b")).model_dump(exclude_none=True)
    table["schedule"] = [{"first": 2, "set": {"label.quota": 5}}]
    table["label"]["quota"] = 4
    table["rounds"] = 2
    chosen = type(recipe_file.load(recipe_file.find("sdpo_7b"))).model_validate(table)
    with pytest.raises(UserError, match=r"label\.quota is not in round 2 what it is in round 1"):
        combinations.follows(chosen.at(2), chosen.at(1), 2)


def test_the_papers_recipe_of_sdpo_fits_together():
    preflight.trainable(recipe_file.load(recipe_file.find("sdpo_7b")))
    combinations.fits_together(recipe_file.load(recipe_file.find("sdpo_7b")))
