"""A checkpoint of any number of processes goes on in any other: losses and weights of one uninterrupted process."""

import shutil
from collections import Counter

import pytest
import torch

from selfimprove.training import checkpoint
from tests.training.conftest import lines, losses, weights
from tests.training.processes import fit

DPO = {"loss": {"name": "dpo", "beta": 0.1}, "reference": "previous"}
KINDS = {  # between them every kind of state that a checkpoint holds
    "queue of gaps and trainable noise": (
        {"loss": {"name": "gamma_dpo", "beta": 0.5}, "reference": "previous", "noise": {"kind": "trainable"}},
        {},
    ),
    "moving reference": ({**DPO, "reference": "ema", "ema_decay": 0.5}, {}),
    "adapter": (DPO, {"adapter": {"rank": 2, "alpha": 8.0}}),  # of 4 processes two hold nothing of its A
}
ONE = {"num_processes": 1}
DDP = {"num_processes": 2, "sharding": "ddp"}
TWO, FOUR = ({"num_processes": n, "sharding": "fsdp", "train_tokens": 200} for n in (2, 4))
WAYS = [  # written by, resumed by
    ("queue of gaps and trainable noise", TWO, [ONE, FOUR]),
    ("queue of gaps and trainable noise", ONE, [TWO]),
    ("moving reference", TWO, [FOUR]),
    ("adapter", TWO, [ONE, FOUR]),
    ("adapter", DDP, [TWO]),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pairs):
    found = {}
    for kind, (preference, settings) in KINDS.items():
        found[kind] = tmp_path_factory.mktemp("whole") / "run"
        assert fit(found[kind], pairs, preference, ONE, **settings) == [0]
    return found


def small_files(rank: int) -> None:
    checkpoint.FILE_BYTES = 1 << 20


@pytest.mark.parametrize(("kind", "writers", "readers"), WAYS)
def test_another_number_of_processes_goes_on(tmp_path, pairs, uninterrupted, kind, writers, readers):
    preference, settings = KINDS[kind]
    written, whole = tmp_path / "written", uninterrupted[kind]
    before = small_files if kind == "moving reference" else None
    assert set(fit(written, pairs, preference, writers, stop_after=3, before=before, **settings)) == {0}
    [path] = (written / "scratch").glob("checkpoint-*")
    own = Counter(file.name.split("-")[1] for file in path.glob("*.safetensors"))
    assert len(own) == writers["num_processes"]  # each wrote its own part
    assert set(own.values()) == {1} if before is None else min(own.values()) > 1
    for number, machine in enumerate(readers):
        resumed = tmp_path / str(number)
        shutil.copytree(written, resumed)
        assert set(fit(resumed, pairs, preference, machine, **settings)) == {0}
        assert [line["step"] for line in lines(resumed)] == list(range(1, 7))
        assert {line["processes"] for line in lines(resumed)[3:]} == {float(machine["num_processes"])}
        for one, other in zip(lines(whole), lines(resumed), strict=True):
            for name in one.keys() - {"tokens_per_second", "peak_memory_mib", "processes"}:
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
        for one, other in zip(losses(whole), losses(resumed), strict=True):
            assert (one["pair_id"], one["step"]) == (other["pair_id"], other["step"])  # the same global batches
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=5e-5, msg=name)
