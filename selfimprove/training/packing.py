"""From preference pairs to packed trees: every distinct token of a step stands once.

A tree is a prompt and its K responses. Trees are packed side by side into one row of at most `budget` tokens; the last
token of a response predicts nothing and is not fed in. Which trees share a micro-batch changes no gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfimprove.training.job import PairRow, Tree


class Pairing(NamedTuple):
    """The trees of some pairs, and where each pair's answers are among all responses of all trees in order."""

    trees: list[Tree]
    chosen: list[int]
    rejected: list[int]


def trees_of(pairs: Sequence[PairRow]) -> Pairing:
    """Share prompts and responses among pairs: K responses of one prompt stand once, whatever the number of pairs.

    Example: the six pairs of four responses give one tree of four.
    """
    places: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for pair in pairs:
        responses = places.setdefault(tuple(pair.prompt_ids), {})
        for ids in (pair.chosen_ids, pair.rejected_ids):
            responses.setdefault(tuple(ids), len(responses))
    trees = [Tree(list(prompt), [list(r) for r in responses]) for prompt, responses in places.items()]
    first, total = {}, 0
    for prompt, responses in places.items():
        first[prompt] = total
        total += len(responses)

    def place(prompt: list[int], response: list[int]) -> int:
        key = tuple(prompt)
        return first[key] + places[key][tuple(response)]

    return Pairing(
        trees,
        [place(pair.prompt_ids, pair.chosen_ids) for pair in pairs],
        [place(pair.prompt_ids, pair.rejected_ids) for pair in pairs],
    )


def size(tree: Tree) -> int:
    """Tokens a tree costs when packed."""
    return len(tree.prompt_ids) + sum(max(0, len(r) - 1) for r in tree.responses)


def padded_size(tree: Tree) -> int:
    """Tokens a tree costs when each response is a row of its own, padded to the longest of them."""
    rows, length = _rows(tree)
    return rows * length


def _rows(tree: Tree) -> tuple[int, int]:
    """How many rows a tree makes, and the length of the longest."""
    return max(1, sum(map(bool, tree.responses))), len(tree.prompt_ids) + max(0, max(map(len, tree.responses)) - 1)


def fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in groups of at most `budget` in sum, first fit by decreasing size; what exceeds it stands alone."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for number, left in enumerate(room):
            if sizes[index] <= left:
                groups[number].append(index)
                room[number] -= sizes[index]
                break
        else:
            groups.append([index])
            room.append(budget - sizes[index])
    return groups


def fill_padded(trees: Sequence[Tree], budget: int) -> list[list[int]]:
    """Indices of trees of like length in groups whose rows, all padded to the longest, hold at most `budget` tokens."""
    shapes = [_rows(tree) for tree in trees]
    groups: list[list[int]] = []
    rows = longest = 0
    for index in sorted(range(len(trees)), key=lambda i: (-shapes[i][1], i)):
        count, length = shapes[index]
        if groups and (rows + count) * longest <= budget:
            groups[-1].append(index)
            rows += count
        else:
            groups.append([index])
            rows, longest = count, length
    return groups


def share(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank so that the sums are close: largest first, to the rank that has least."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = load.index(min(load))
        shares[rank].append(index)
        load[rank] += sizes[index]
    return [sorted(one) for one in shares]


class Packed(NamedTuple):
    """Trees in one row of T tokens, with N scored tokens in R responses."""

    trees: list[Tree]
    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T); a response's positions continue its prompt's
    spans: list[tuple[int, list[int]]]  # per tree: tokens of the prompt, tokens fed of each response
    score_rows: Tensor  # (N,) position in the row whose hidden state predicts the target
    targets: Tensor  # (N,) token ids
    responses: Tensor  # (N,) which response each target belongs to, 0 .. R-1


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu") -> Packed:
    """Lay trees side by side. The last prompt position is scored once for each response: it predicts K first tokens."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    spans = []
    response = 0
    for tree in trees:
        length = len(tree.prompt_ids)
        last = len(ids) + length - 1
        ids += tree.prompt_ids
        positions += range(length)
        fed = []
        for answer in tree.responses:
            begin, inner = len(ids), max(0, len(answer) - 1)
            if answer:
                rows += [last, *range(begin, begin + inner)]
                targets += answer
                owners += [response] * len(answer)
            ids += answer[:inner]
            positions += range(length, length + inner)
            fed.append(inner)
            response += 1
        spans.append((length, fed))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Packed(
        list(trees), tensor(ids)[None], tensor(positions)[None], spans, tensor(rows), tensor(targets), tensor(owners)
    )
