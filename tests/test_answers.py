"""Answers read side by side in windows, against all of them sorted by prompt at once, as label did before."""

import random

import pytest

from selfimprove import columns, store
from selfimprove.records import Generation, Seed
from selfimprove.stages import answers
from selfimprove.stages.pairs import candidates

PROMPTS = [f"p{k}" for k in range(30)]
GOLDS = {p: Seed(p, f"say {p}", "gold") for p in PROMPTS[::3]}


def rows(prompts, source, n):
    return [
        Generation(p, f"say {p}", source, k, f"{p} {k}", [1, 2], [3] * (k + 1), [-1.0] * (k + 1), "stop", "m", k)
        for p in prompts
        for k in range(n)
    ]


def tables(folder, *given):
    found = []
    for number, some in enumerate(given):
        artifact = store.Artifact(folder / str(number))
        artifact.begin()
        artifact.write_rows("rows", Generation, some)
        artifact.contract("row", len(some), len(some))
        artifact.publish(1, "x", {}, {})
        found.append((artifact.directory, "rows"))
    return found


def completion_ids(prompt, completion):
    return [7, 8]


def some(rng, share):
    return [p for p in PROMPTS if rng.random() < share]


def cases(rng):
    """Name, rows of each table, and whether they can be read side by side."""
    current = rows(PROMPTS, "current", 3)
    yield "one source", [current], True
    yield (
        "others for some prompts",
        [current + rows(some(rng, 0.5), "initial", 2), rows(some(rng, 0.7), "improver", 4)],
        True,
    )
    yield "nothing", [[], []], True
    yield "nothing first", [[], rows(some(rng, 0.5), "improver", 2)], True
    yield "prompts of the second alone", [rows(some(rng, 0.5), "current", 2), rows(PROMPTS, "improver", 1)], False
    yield "another order", [current + rows(PROMPTS[::-1], "initial", 1)], False
    yield "a prompt comes back", [current + rows(PROMPTS[:1], "initial", 1) + rows(PROMPTS[:2], "current", 1)], True
    yield "a prompt comes back at once", [rows([*PROMPTS, "p0"], "current", 1)], False
    mixed = [row for p in PROMPTS for source in ("current", "initial") for row in rows([p], source, 1)]
    yield "sources in turn", [mixed], False


@pytest.mark.parametrize("worth", [None, set(PROMPTS[1::2])], ids=["all", "half"])
@pytest.mark.parametrize("golds", [{}, GOLDS], ids=["no golds", "golds"])
def test_windows_hold_what_sorting_gives(golds, worth, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "GROUP_ROWS", 4)
    monkeypatch.setattr(store, "SHARD_ROWS", 13)
    for name, given, aligned in cases(random.Random(0)):
        found = answers.Answers(tables(tmp_path / name, *given), golds, worth, completion_ids, 10)
        windows = list(found.windows())
        expected, prompt_ids = candidates([row for table in given for row in table], golds, completion_ids)
        expected = [c for c in expected if worth is None or c.prompt_id in worth]
        assert [c for window in windows for c in window.candidates] == expected, name
        assert [item for window in windows for item in window.prompt_ids.items()] == list(prompt_ids.items()), name
        assert found.candidates == len(expected), name
        assert found.prompts == len({c.prompt_id for c in expected}), name
        assert found.aligned == aligned, name
        assert all(len(window.prompt_ids) <= 10 for window in windows), name


def test_long_answers_make_small_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "TOKENS", 12)
    found = answers.Answers(tables(tmp_path, rows(PROMPTS, "current", 3)), {}, None, completion_ids, 10)
    assert [len(window.prompt_ids) for window in found.windows()] == [2] * 15  # 1 + 2 + 3 tokens a prompt
