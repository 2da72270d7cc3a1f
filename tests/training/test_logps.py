"""The padded forward against the simplest thing that can be written: one row at a time, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfimprove.training.job import Row
from selfimprove.training.logps import sequence_logps
from tests.training.conftest import tiny

IDS = st.lists(st.integers(0, 96), min_size=1, max_size=12)
MODELS = {tied: tiny(tied) for tied in (True, False)}


def by_hand(model, row: Row) -> float:
    ids = row.prompt_ids + row.completion_ids
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(row.prompt_ids), len(ids)))


@pytest.mark.parametrize("tied", [True, False])
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5))
def test_equals_one_row_at_a_time(tied, rows):
    rows = [Row(*row) for row in rows]
    with torch.no_grad():
        found = sequence_logps(MODELS[tied], rows)
        for row, logp in zip(rows, found.tolist(), strict=True):
            assert logp == pytest.approx(by_hand(MODELS[tied], row), abs=1e-4)


def test_a_longer_neighbour_changes_nothing():
    row = Row([1, 2, 3], [4, 5])
    with torch.no_grad():
        alone = sequence_logps(MODELS[True], [row])
        beside = sequence_logps(MODELS[True], [row, Row([9] * 40, [8] * 30)])
    assert beside[0].item() == pytest.approx(alone[0].item(), abs=1e-5)
