"""A training over two nodes, here two torchruns on one machine that meet on the loopback."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from selfimprove.errors import UserError
from selfimprove.recipe import Machine
from selfimprove.training import checkpoint, launch, rendezvous
from tests.training.conftest import job, lines, weights
from tests.training.processes import CONTEXT, fit, free_port

DPO = {"loss": {"name": "dpo", "beta": 0.1}, "reference": "previous"}
SETTINGS = {"epochs": 6, "learning_rate": 1e-4}
SECONDS = 120


def follow(specification: Path, machine: Machine, told: Path) -> None:
    """The node beside the driver's: joins one training."""
    while not specification.exists():
        time.sleep(0.05)
    try:
        launch.join(specification, machine, 1)
        told.write_text("done")
    except UserError as error:
        told.write_text(str(error))


@pytest.fixture
def beside(tmp_path):
    """Starts such a node."""
    started = []

    def start(machine):
        process = CONTEXT.Process(target=follow, args=(tmp_path / "two/scratch/job.json", machine, tmp_path / "told"))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def test_two_nodes_equal_one_process_and_a_lost_node_ends_all_and_is_resumed(tmp_path, pairs, beside):
    assert fit(tmp_path / "one", pairs, DPO, **SETTINGS) == [0]
    machine = {
        "executor": "static",
        "nodes": 2,
        "rendezvous": f"127.0.0.1:{free_port()}",
        "sharding": "fsdp",
        "checkpoint_steps": 2,
    }
    training = job(tmp_path / "two", pairs, DPO, machine, **SETTINGS)
    node = beside(training.machine)
    lost = []

    def lose(done: int, total: int) -> None:
        if done >= 4 and not lost:
            [torchrun] = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
            os.kill(int(torchrun), signal.SIGKILL)
            lost.append(time.monotonic())

    with pytest.raises(UserError, match="a training process ended with code 1") as raised:
        launch.train(training._replace(progress=lose))
    assert time.monotonic() - lost[0] < SECONDS
    assert f"all 2 nodes must be there and reach {training.machine.rendezvous}" in raised.value.hint
    node.join(SECONDS)
    assert (tmp_path / "told").read_text().startswith("the training processes of node 1 ended with code -9")
    assert checkpoint.latest(training.scratch) is not None
    assert not (training.scratch / "job.json").exists()

    node = beside(training.machine)
    launch.train(training)
    node.join(SECONDS)
    assert (tmp_path / "told").read_text() == "done"
    shared = lines(tmp_path / "two")
    assert [line["step"] for line in shared] == list(range(1, 19))
    assert {line["processes"] for line in shared} == {2.0}
    for one, two in zip(lines(tmp_path / "one"), shared, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4, abs=1e-5)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=0, atol=5e-5, msg=name)


def test_a_node_whose_driver_gives_up_ends_too(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    specification = tmp_path / "job.json"
    specification.write_text('{"attempt": "a"}')
    machine = Machine(executor="static", nodes=2, rendezvous=f"127.0.0.1:{free_port()}")  # where nobody is

    def gone() -> None:
        specification.unlink(missing_ok=True)

    monkeypatch.setattr(launch.interrupts, "check", gone)
    began = time.monotonic()
    with pytest.raises(UserError, match="of node 1 ended with code -9"):
        launch.join(specification, machine, 1)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("hosts", "first"),  # of Slurm's own documentation of hostlists
    [
        ("login1", "login1"),
        ("gpu[003-005,7],login1", "gpu003"),
        ("a1,b[2-3]", "a1"),
        ("linux[0-3]", "linux0"),
        ("rack[2-3]n[01,05]-ib,x", "rack2n01-ib"),
        ("node-[7]", "node-7"),
    ],
)
def test_the_first_host_of_a_scheduler(hosts, first):
    assert rendezvous.first_host(hosts) == first
    found = rendezvous.endpoint(
        Machine(executor="static", nodes=2), {"SLURM_JOB_NODELIST": hosts, "SLURM_JOB_ID": "123456"}
    )
    assert found == f"{first}:13456"


def test_where_nodes_meet():
    several, slurm = Machine(executor="static", nodes=2), {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
    variables = {"MASTER_ADDR": "m", "MASTER_PORT": "1234", **slurm}
    assert rendezvous.endpoint(several.model_copy(update={"rendezvous": "h:1"}), variables) == "h:1"
    assert rendezvous.endpoint(several, variables) == "m:1234"
    assert rendezvous.endpoint(several, {"MASTER_ADDR": "m"}) == "m:29500"
    assert rendezvous.endpoint(several, slurm) == "n1:10007"
    with pytest.raises(UserError, match="nothing says where the nodes meet"):
        rendezvous.endpoint(several, {})
    with pytest.raises(UserError, match="no node 2 of 2"):
        rendezvous.torchrun(several, 2, "a")
