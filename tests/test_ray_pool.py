"""The executor on Ray, as far as it can be told without a cluster; clusters are in tests/drills."""

import sys

import pytest

from selfimprove import recipe
from selfimprove.errors import UserError
from selfimprove.execution import Executors


def test_without_ray_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with Executors() as executors, pytest.raises(UserError, match="needs Ray") as error:
        executors.get(recipe.Machine(executor="ray"), tmp_path)
    assert error.value.hint == "pip install 'selfimprove[ray]'"
