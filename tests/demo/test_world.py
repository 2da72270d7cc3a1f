"""The embedded default: the checker, the data, the tokeniser and the model that the demo ships."""

import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from selfimprove.demo import DATA, MODEL, data, habits, world

# One prompt of every phrasing, with its answer worked out by hand.
BY_HAND = [
    ("reverse", "Write these words in reverse order: cat pear red.", "red pear cat"),
    ("reverse", "Turn this list around: hat saw dog lion. Use commas.", "lion, dog, saw, hat"),
    ("sort", "Sort these words from A to Z: pear cat hat.", "cat hat pear"),
    ("sort", "Put this list in alphabetical order: red plum pear. Join them with and.", "pear and plum and red"),
    ("nth", "Give the second word of this list: cat pear red.", "pear"),
    ("nth", "Which word is last in this list: cat pear red dog? End with a full stop.", "dog."),
    ("repeat", "Repeat the word cat three times.", "cat cat cat"),
    ("repeat", "Write the word saw two times. Join them with and.", "saw and saw"),
    ("count", "How many animals are in this list: cat pear dog red?", "2"),
    ("count", "Count the tools among these words: cat pear red. Start with Answer:", "Answer: 0"),
    ("keep", "Keep only the fruits in this list: cat pear red plum.", "pear plum"),
    ("keep", "Which of these words are clothes: hat pear sock? End with the word done.", "hat sock done"),
    ("insert", "Put saw at the start of this list: cat pear red.", "saw cat pear red"),
    ("insert", "Add saw to the end of these words: cat pear red. End with a full stop.", "cat pear red saw."),
    ("drop", "Remove the first word from this list: cat pear red.", "pear red"),
    ("drop", "Write this list without its last word: cat pear red. Use commas.", "cat, pear"),
    ("swap", "Swap the first and the last word: cat pear red dog.", "dog pear red cat"),
    ("swap", "Exchange the two ends of this list: cat pear red.", "red pear cat"),
    ("neighbour", "Which word comes before red in this list: cat pear red?", "pear"),
    ("neighbour", "Find the word just after cat: cat pear red. End with the word done.", "pear done"),
    ("kinds", "Name the kind of each word: cat pear red.", "animals fruits colours"),
    ("kinds", "Say what kind of thing each of these is: saw hat. Use commas.", "tools, clothes"),
    ("add", "Add the numbers 4 and 11.", "15"),
    ("add", "What is 0 plus 12? Start with Answer:", "Answer: 12"),
    ("extreme", "Find the smallest of these numbers: 9 11 2 20.", "2"),
    ("extreme", "Which of these numbers is the largest: 9 11 2? End with a full stop.", "11."),
]

OUTSIDE = [
    "",
    "What is the capital of France?",
    "Sort these words from A to Z:",
    "Sort these words from A to Z: pear",
    "Sort these words from A to Z: pear zebra.",  # a word that the world does not know
    "Sort these words from A to Z: pear cat. Use dots.",  # a demand that it does not know
    "Sort these words from A to Z: pear cat. Use commas. Use commas.",
    "Give the third word of this list: cat pear.",  # there is none
    "Keep only the tools in this list: cat pear.",  # nothing is left
    "Remove the second word from this list: cat pear.",
    "Put zebra at the end of this list: cat pear.",
    "Which word comes after pear in this list: cat pear?",
    "Which word comes after cat in this list: cat pear cat dog?",  # two answers
    "Add the numbers 4 and 13.",
    "Add the numbers 4 and 5. Use commas.",  # commas between one thing
]


def test_by_hand_covers_every_phrasing_and_demand() -> None:
    assert {name for name, _, _ in BY_HAND} == {family.name for family in world.FAMILIES}
    assert len(BY_HAND) == sum(len(family.phrasings) for family in world.FAMILIES)
    assert all(any(prompt.endswith(demand.text) for _, prompt, _ in BY_HAND) for demand in world.DEMANDS)


@pytest.mark.parametrize(("name", "prompt", "gold"), BY_HAND)
def test_gold(name: str, prompt: str, gold: str) -> None:
    task = world.parse(prompt)
    assert task is not None
    assert task.family.name == name
    assert world.answer(prompt) == gold
    assert world.check(prompt, gold) is True
    assert world.check(f" {prompt}\n", f"\n {gold.replace(' ', '  ')} ") is True


@pytest.mark.parametrize("prompt", OUTSIDE)
def test_outside_the_grammar(prompt: str) -> None:
    assert world.answer(prompt) is None
    assert world.check(prompt, "anything") is None


@pytest.mark.parametrize("habit", habits.HABITS)
def test_check_rejects_bad_habits(habit: Callable[[world.Task, random.Random], str]) -> None:
    rng = random.Random(0)
    for task in islice(world.draw_distinct(rng), 300):
        bad = habit(task, rng)
        assert world.check(task.prompt, bad) is False, (task.prompt, bad)


def test_check_is_exact() -> None:
    prompt = "Sort these words from A to Z: pear cat hat."
    for bad in ("", "cat hat", "Cat hat pear", "cat, hat, pear", "cat hat pear.", "cat hat pear pear", "cathatpear"):
        assert world.check(prompt, bad) is False


def test_drawn_prompts_are_distinct_and_of_every_family() -> None:
    tasks = list(islice(world.draw_distinct(random.Random(1), without={"x"}), 1300))
    assert len({task.prompt for task in tasks}) == 1300
    assert all(world.parse(task.prompt) == task for task in tasks)
    assert [task.family for task in tasks[:13]] == list(world.FAMILIES)


def test_habits_show_good_answers_part_of_the_time() -> None:
    rng = random.Random(2)
    tasks = [world.draw(rng) for _ in range(4000)]
    right = sum(world.check(task.prompt, habits.respond(task, rng)) is True for task in tasks)
    low, high = habits.GOOD_WEIGHTS
    assert low < right / len(tasks) < high


def _rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_shipped_data() -> None:
    seeds, heldout = _rows("seeds.jsonl"), _rows("heldout.jsonl") + _rows("selection.jsonl")
    corpus = (DATA / "corpus.txt").read_text(encoding="utf-8")
    assert all(set(row) == {"id", "prompt", "completion", "source"} for row in seeds)
    assert {row["source"] for row in seeds} == {family.name for family in world.FAMILIES}
    assert all(set(row) == {"id", "prompt"} for row in heldout)
    assert all(world.check(row["prompt"], row["completion"]) is True for row in seeds)
    assert all(world.answer(row["prompt"]) is not None for row in heldout)
    prompts = [row["prompt"] for row in seeds + heldout]
    assert len(set(prompts)) == len(prompts) == data.SEEDS + data.HELDOUT + data.SELECTION
    assert not any(prompt in corpus for prompt in prompts)
    sentences = [s + mark for line in corpus.splitlines() for mark in ".?" for s in line.split(f"{mark} ")]
    assert not any(world.parse(sentence) for sentence in sentences)


def test_shipped_data_are_what_the_code_writes(tmp_path: Path) -> None:
    data.write_data(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["corpus.txt", "heldout.jsonl", "seeds.jsonl", "seeds_bad_golds.jsonl", "selection.jsonl"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_a_fifth_of_the_bad_golds_is_wrong_and_nothing_else_differs() -> None:
    clean, bad = _rows("seeds.jsonl"), _rows("seeds_bad_golds.jsonl")
    assert [row | {"completion": ""} for row in clean] == [row | {"completion": ""} for row in bad]
    wrong = [row for row in bad if world.check(row["prompt"], row["completion"]) is False]
    assert len(wrong) == round(0.2 * data.SEEDS)
    assert sum(a != b for a, b in zip(clean, bad, strict=True)) == len(wrong)


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for folder in (DATA, MODEL) for path in folder.iterdir()) < 4_000_000


# --- the tokeniser and the model (these need torch) -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("text", ["cat pear", "a, b; c!", "naïve 猫 🐈 \t<x>", "Answer: 21 done", "zebra\n\nxyz"])
def test_tokenizer_round_trip(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == f" {text}"
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


def test_words_and_tags_are_single_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for word in [*world.WORDS, *world.KINDS, "20", "Sort", "keywords", "<question>", "</solution>"]:
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word
    tagged = "<question> Add 1 </question> <solution> cat </solution>"
    assert len(tokenizer.encode(tagged, add_special_tokens=False)) == 7
    decoded = tokenizer.decode(tokenizer.encode(tagged, add_special_tokens=False), skip_special_tokens=True)
    assert decoded.replace(" ", "") == tagged.replace(" ", "")


def test_chat_template(tokenizer) -> None:  # type: ignore[no-untyped-def]
    user = [{"role": "user", "content": "Add the numbers 4 and 17."}]
    for messages in (user, [{"role": "system", "content": "Be brief."}, *user]):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt.count(tokenizer.bos_token_id) == 1
        assert prompt[0] == tokenizer.bos_token_id
        for content in ("21", " 21"):
            turns = [*messages, {"role": "assistant", "content": content}]
            whole = tokenizer.apply_chat_template(turns, return_dict=False)
            assert whole[: len(prompt)] == prompt
            completion = tokenizer.encode("21", add_special_tokens=False)
            assert whole[len(prompt) :] == [*completion, tokenizer.eos_token_id]


def test_every_shipped_text_is_in_the_vocabulary(tokenizer) -> None:  # type: ignore[no-untyped-def]
    texts = [row["prompt"] for row in _rows("seeds.jsonl") + _rows("heldout.jsonl")]
    texts += [row["completion"] for row in _rows("seeds.jsonl")] + data.paragraphs()
    tokens = {token for text in texts for token in tokenizer.tokenize(text)}
    assert all(token.startswith("Ġ") or token in {".", ",", ":", "?"} for token in tokens)
    assert "Ġ" not in tokens


def test_shipped_model_answers(tokenizer) -> None:  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    right = 0
    for row in _rows("heldout.jsonl")[:39]:
        message = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model.generate(ids, do_sample=False, max_new_tokens=24)
        right += (
            world.check(row["prompt"], tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)) is True
        )
    assert 10 <= right <= 34  # imperfect, with ability to bring out


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    import torch

    from selfimprove.demo.build import build

    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    calls: list[tuple[int, int]] = []
    build(tmp_path / "a", seed=3, steps=4, progress=lambda step, steps, loss: calls.append((step, steps)))
    build(tmp_path / "b", seed=3, steps=4)
    build(tmp_path / "c", seed=4, steps=4)
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} < names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()
