"""Trees, their layout and how they are grouped: properties that hold for any pairs and any sizes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfimprove.training.job import PairRow, Tree
from selfimprove.training.packing import fill, fill_padded, pack, padded_size, share, size, trees_of

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=4)
PAIRS = st.lists(st.builds(PairRow, st.just("p"), IDS, IDS, st.lists(st.integers(0, 5), max_size=4)), min_size=1)
TREES = st.lists(
    st.builds(Tree, IDS, st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=5)), max_size=9
)
SIZES = st.lists(st.integers(1, 50), max_size=40)


@given(pairs=PAIRS)
def test_every_pair_can_be_read_back_from_the_trees(pairs):
    shared = trees_of(pairs)
    answers = [(tree.prompt_ids, response) for tree in shared.trees for response in tree.responses]
    for pair, chosen, rejected in zip(pairs, shared.chosen, shared.rejected, strict=True):
        assert answers[chosen] == (pair.prompt_ids, pair.chosen_ids)
        assert answers[rejected] == (pair.prompt_ids, pair.rejected_ids)
    assert set(shared.chosen + shared.rejected) == set(range(len(answers)))  # nothing is scored for nobody


@given(pairs=PAIRS)
def test_prompts_and_answers_stand_once(pairs):
    trees = trees_of(pairs).trees
    prompts = [tuple(tree.prompt_ids) for tree in trees]
    assert len(prompts) == len(set(prompts)) == len({tuple(pair.prompt_ids) for pair in pairs})
    for tree in trees:
        assert len({*map(tuple, tree.responses)}) == len(tree.responses)


def test_the_six_pairs_of_four_answers_are_one_tree_of_four():
    answers = [[1], [2, 2], [3], [4]]
    pairs = [PairRow("x", [9, 9], a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]]
    shared = trees_of(pairs)
    assert shared.trees == [Tree([9, 9], answers)]
    assert (shared.chosen, shared.rejected) == ([0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3])


@given(trees=TREES.filter(bool))
def test_a_packed_row_spells_every_prompt_and_answer(trees):
    """Walk from each target back: the token before it, its position, the response it belongs to."""
    packed = pack(trees)
    ids, positions = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
    assert len(ids) == len(positions) == sum(map(size, trees))
    scored = iter(zip(packed.score_rows.tolist(), packed.targets.tolist(), packed.responses.tolist(), strict=True))
    begin = number = 0
    for tree, (prompt, fed) in zip(trees, packed.spans, strict=True):
        assert ids[begin : begin + prompt] == tree.prompt_ids
        assert positions[begin : begin + prompt] == list(range(prompt))
        last, begin = begin + prompt - 1, begin + prompt
        for response, inner in zip(tree.responses, fed, strict=True):
            assert inner == max(0, len(response) - 1)
            assert ids[begin : begin + inner] == response[:inner]
            assert positions[begin : begin + inner] == list(range(prompt, prompt + inner))
            rows = [last, *range(begin, begin + inner)][: len(response)]
            for row, token in zip(rows, response, strict=True):
                assert next(scored) == (row, token, number)
            begin += inner
            number += 1
    assert next(scored, None) is None
    assert packed.targets.dtype == torch.long
    assert packed.score_rows.dtype == torch.long


@given(sizes=SIZES, budget=st.integers(1, 120))
def test_filling_keeps_every_index_once_within_the_budget(sizes, budget):
    groups = fill(sizes, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        assert sum(sizes[i] for i in group) <= budget or len(group) == 1
    totals = sorted(sum(sizes[i] for i in group) for group in groups)
    assert len(totals) < 2 or totals[0] + totals[1] > budget  # no two groups could have been one


@given(trees=TREES, budget=st.integers(1, 120))
def test_padded_groups_stay_within_the_budget_when_padded_together(trees, budget):
    """Rows of a group are as long as its longest, whichever tree that is in: their number times that length."""
    groups = fill_padded(trees, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(trees)))
    for group in groups:
        assert padded_together([trees[i] for i in group]) <= budget or len(group) == 1
    for tree in trees:
        assert padded_size(tree) == padded_together([tree])


def padded_together(trees: list[Tree]) -> int:
    lengths = [[len(t.prompt_ids) + len(r) - 1 for r in t.responses if r] or [len(t.prompt_ids)] for t in trees]
    return sum(map(len, lengths)) * max(map(max, lengths))


def test_padded_groups_hold_trees_of_like_length():
    draw = random.Random(0)
    trees = [Tree([1] * n, [[1] * n, [1] * n]) for n in draw.choices([5, 50], k=40)]
    groups = fill_padded(trees, 400)
    rows = [2 * (2 * len(trees[i].prompt_ids) - 1) for group in groups for i in group]
    spent = sum(padded_together([trees[i] for i in group]) for group in groups)
    assert spent <= 1.25 * sum(rows)  # one group at most mixes the two lengths


@given(sizes=SIZES, ranks=st.integers(1, 5))
def test_shares_cover_all_evenly_and_the_same_each_time(sizes, ranks):
    shares = share(sizes, ranks)
    assert len(shares) == ranks
    assert shares == share(list(sizes), ranks)
    assert sorted(i for one in shares for i in one) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in one) for one in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)  # else the largest would have gone elsewhere


@settings(max_examples=20)
@given(sizes=SIZES, budget=st.integers(1, 120))
def test_filling_is_deterministic(sizes, budget):
    assert fill(sizes, budget) == fill(list(sizes), budget)


@pytest.mark.parametrize(("responses", "tokens"), [([[1, 1, 1], [1]], 5), ([[1], []], 3), ([[]], 3)])
def test_a_tree_costs_its_prompt_and_what_is_fed_of_its_answers(responses, tokens):
    assert size(Tree([7, 7, 7], responses)) == tokens == pack([Tree([7, 7, 7], responses)]).input_ids.shape[1]
