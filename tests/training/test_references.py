"""The cache of reference log-probs: what hits, what misses, what a damaged or half-written file does."""

import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from selfimprove.store import model_identity
from selfimprove.training import references
from selfimprove.training.distributed import World
from selfimprove.training.job import Tree
from selfimprove.training.logps import Scorer
from selfimprove.training.references import Store, cached, digest, missing, place
from tests.training.families import TREES, build, by_rows, forest, oracle

ALONE = World(0, 1, torch.device("cpu"))
IDS = st.lists(st.integers(0, 3), max_size=4)
ANSWERS = [(tree.prompt_ids, response) for tree in TREES for response in tree.responses]


class Counting(Scorer):
    """Counts what it is asked to score."""

    def __init__(self) -> None:
        super().__init__(build("llama tied"))
        self.answers = 0

    def forward(self, packed):
        self.answers += sum(len(tree.responses) for tree in packed.trees)
        return super().forward(packed)


def asked(trees, store, budget: int = 30):
    """The sums of all answers, and how many of them the model was asked for."""
    scorer = Counting()
    found = cached(scorer, scorer, trees, budget, ALONE, store)
    return [found.sum(t.prompt_ids, r) for t in trees for r in t.responses], scorer.answers


def test_sums_equal_a_fresh_scoring_and_the_second_run_scores_nothing(tmp_path):
    store = Store(tmp_path / "model")
    fresh, count = asked(TREES, None)
    first = asked(TREES, store)
    second = asked(TREES, store)
    assert count == first[1] == len([r for _, r in ANSWERS if r])  # each once; the empty answer is no work
    assert second[1] == 0
    assert first[0] == second[0] == pytest.approx(fresh, abs=1e-9)
    rows = by_rows(oracle(build("llama tied")), TREES).split([len(r) for _, r in ANSWERS])
    assert fresh == pytest.approx([row.sum().item() for row in rows], abs=1e-4)
    assert fresh[ANSWERS.index((TREES[2].prompt_ids, []))] == 0.0


def test_only_what_is_new_is_scored(tmp_path):
    store = Store(tmp_path)
    asked(TREES[:2], store)
    more = [Tree(TREES[0].prompt_ids, [*TREES[0].responses, [5, 6]]), TREES[2]]
    sums, count = asked(more, store)
    assert count == 1 + 2
    assert sums == pytest.approx(asked(more, None)[0], abs=1e-5)  # in other micro-batches than there
    assert asked([*TREES, *more], store)[1] == 0


def test_the_cache_is_found_by_content_not_by_path(tmp_path):
    """The same weights elsewhere hit; other weights, dtype, forward or token ids miss."""
    build("llama tied").save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere" / "copy")
    here, there = (model_identity(tmp_path / name) for name in ("model", "elsewhere/copy"))
    store = place(tmp_path / "cache", here, "fp32", "packed")
    asked(TREES, store)
    assert asked(TREES, place(tmp_path / "cache", there, "fp32", "packed"))[1] == 0
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    others = [
        (model_identity(tmp_path / "model"), "fp32", "packed"),
        (here, "bf16", "packed"),
        (here, "fp32", "padded"),
    ]
    for other in others:
        assert asked(TREES, place(tmp_path / "cache", *other))[1] == len([r for _, r in ANSWERS if r])
    assert asked(forest([(7, [6, 9])], seed=1), store)[1] == 2


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=4), st.lists(st.integers(0, 3), max_size=4)), max_size=9)
)
def test_a_digest_names_a_prompt_and_its_answer(answers):
    """Also where prompt and answer joined are the same ids."""
    distinct = {(tuple(prompt), tuple(response)) for prompt, response in answers}
    assert len({digest(*answer) for answer in distinct}) == len(distinct)


@settings(max_examples=30)
@given(known=st.sets(st.integers(0, len(ANSWERS) - 1)))
def test_missing_is_what_is_not_known_each_once(known):
    have = {digest(*ANSWERS[i]): torch.zeros(1) for i in known}
    found = [(t.prompt_ids, r) for t in missing([*TREES, *TREES], have) for r in t.responses]
    wanted = [answer for i, answer in enumerate(ANSWERS) if i not in known and answer[1]]
    assert sorted(found) == sorted(wanted)


def test_what_is_stored_comes_back_per_token_and_to_the_bit(tmp_path):
    store = Store(tmp_path)
    logps = {digest([1], [n]): torch.randn(n) for n in (3, 1, 4)}
    store.add(logps)
    store.add({})
    store.add({digest([2], [2]): torch.randn(2)})
    found = store.read()
    assert len(found) == 4
    assert len(list(tmp_path.iterdir())) == 2
    for name, tokens in logps.items():
        assert torch.equal(found[name], tokens)


def test_half_written_files_are_ignored(tmp_path):
    store = Store(tmp_path)
    asked(TREES, store)
    [shard] = tmp_path.iterdir()
    whole = shard.read_bytes()
    shard.unlink()
    shard.with_suffix(".tmp").write_bytes(whole[: len(whole) // 2])  # what a killed process leaves
    assert store.read() == {}
    assert asked(TREES, store)[1] > 0
    assert asked(TREES, store)[1] == 0
    assert shard.read_bytes() == whole  # written over the leftover


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def dies(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(references, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        store.add({digest([1], [2]): torch.zeros(1)})
    assert store.read() == {}


def test_reading_beside_a_writer_never_sees_a_part(tmp_path):
    """As another process of the run does: every file that is there can be read."""
    store = Store(tmp_path)
    shards = [{digest([i], [k]): torch.full((200,), float(i)) for k in range(20)} for i in range(60)]
    writer = threading.Thread(target=lambda: [store.add(shard) for shard in shards])
    writer.start()
    sizes = []
    while writer.is_alive():
        sizes.append(len(store.read()))
    writer.join()
    assert all(size % 20 == 0 for size in sizes)
    assert len(store.read()) == 60 * 20


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def garbage(path):
    path.write_bytes(b"\xff" * 300)


def foreign(path):
    save_file({"something": torch.zeros(2)}, path)


def shortened(path):
    tensors = load_file(path)
    save_file({**tensors, "logps": tensors["logps"][:-1].clone()}, path)


def nothing(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncated, garbage, foreign, shortened, nothing])
def test_a_damaged_file_is_named_and_scored_anew(damage, tmp_path, capsys):
    store = Store(tmp_path)
    before = asked(TREES, store)[0]
    [shard] = tmp_path.iterdir()
    damage(shard)
    assert asked(TREES, store)[0] == before
    assert f"{shard} are damaged" in capsys.readouterr().err
    assert asked(TREES, store)[1] == 0  # kept again


def test_a_kill_between_two_parts_loses_the_part_that_was_not_kept_and_no_more(tmp_path, monkeypatch):
    whole = asked(TREES, Store(tmp_path / "whole"))[0]
    monkeypatch.setattr(references, "SCORED", 1)
    add, kept = Store.add, []

    def killed(self, logps):
        if len(kept) == 1:
            raise KeyboardInterrupt
        kept.append(len(logps))
        add(self, logps)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            asked(TREES, Store(tmp_path / "cut"))
    total = asked(TREES, Store(tmp_path / "other"))[1]
    found, scored = asked(TREES, Store(tmp_path / "cut"))
    assert found == pytest.approx(whole, abs=1e-4)
    assert 0 < scored < total
