"""Runs that lose a worker, a node, a driver, a disk's bit or the network, and no row."""

import os
import time

import pytest

from tests.drills import drills
from tests.drills.field import ROWS, Field

FULL = bool(os.environ.get("DRILLS_FULL"))


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    return Field(tmp_path_factory.mktemp("drills"))


@pytest.mark.parametrize(("name", "drill"), [pytest.param(*one, id=one[0]) for one in drills.quick()])
def test_quick(field: Field, name: str, drill) -> None:
    holds(drill(field, time.monotonic()))


@pytest.mark.skipif(not FULL, reason="takes minutes: DRILLS_FULL=1")
@pytest.mark.parametrize(("name", "drill"), [pytest.param(*one, id=one[0]) for one in drills.long()])
def test_full(field: Field, name: str, drill) -> None:
    holds(drill(field, time.monotonic()))


def holds(outcome: drills.Outcome) -> None:
    print(outcome)
    assert (outcome.lost, outcome.repeated, outcome.wrong) == (0, 0, 0)
    assert outcome.rows + outcome.quarantined == ROWS
    assert outcome.same_file == (outcome.quarantined == 0)
