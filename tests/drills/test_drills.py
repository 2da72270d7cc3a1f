"""Runs that lose a worker, a node, a driver, a disk's bit or the network, and no row."""

import importlib.util
import os
import time

import pytest

from tests.drills import drills
from tests.drills.field import ROWS, Field

FULL = bool(os.environ.get("DRILLS_FULL"))


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    return Field(tmp_path_factory.mktemp("drills"))


def parameter(name: str, drill):
    apart = pytest.mark.skipif(
        "partition" in name and not drills.namespaces(), reason="this machine lets us make no network namespace"
    )
    ray = pytest.mark.skipif("ray" in name and not importlib.util.find_spec("ray"), reason="Ray is not installed")
    return pytest.param(drill, id=name, marks=[apart, ray])


@pytest.mark.parametrize("drill", [parameter(*one) for one in drills.quick()])
def test_quick(field: Field, drill) -> None:
    holds(drill(field, time.monotonic()))


@pytest.mark.skipif(not FULL, reason="takes minutes: DRILLS_FULL=1")
@pytest.mark.parametrize("drill", [parameter(*one) for one in drills.long()])
def test_full(field: Field, drill) -> None:
    holds(drill(field, time.monotonic()))


def holds(outcome: drills.Outcome) -> None:
    print(outcome)
    assert (outcome.lost, outcome.repeated, outcome.wrong) == (0, 0, 0)
    assert outcome.rows + outcome.quarantined == ROWS
    assert outcome.same_file == (outcome.quarantined == 0)
