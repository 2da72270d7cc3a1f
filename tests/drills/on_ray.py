"""Drills on Ray clusters of two nodes on this machine: a raylet each."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests.drills.field import Field, Outcome, Process, ended, said, until

SLOW = 0.01
NETWORK = "10.99.7"  # of the two nodes of `partition`
SMALL = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@contextlib.contextmanager
def cluster(field: Field) -> Iterator[object]:
    """A head that holds the driver and one actor, and another node with one."""
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with mock.patch.dict(os.environ, {**field.environment(), **quiet}):
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=SMALL)
        try:
            yield made
        finally:
            made.shutdown()


def finish(process: Process, seconds: float = 300.0) -> None:
    """It ends well."""
    assert process.wait(seconds) == 0, said(process)


def nothing(field: Field, began: float) -> Outcome:
    """Two actors, one on each node."""
    field.spoil()
    with cluster(field) as nodes:
        nodes.add_node(**SMALL)  # type: ignore[attr-defined]
        driver = field.drive(
            "two-ray", executor="ray", workers=2, ray_address=nodes.address, environment=QUIET  # type: ignore[attr-defined]
        )  # fmt: skip
        with ended(driver):
            finish(driver)
    return field.outcome("two workers, no fault", "ray", "two-ray", began)


def node_lost(field: Field, began: float) -> Outcome:
    """The second node goes in the middle of a shard, with all its processes."""
    field.spoil(delay=SLOW)
    with cluster(field) as nodes:
        second = nodes.add_node(**SMALL)  # type: ignore[attr-defined]
        driver = field.drive(
            "node-ray", executor="ray", workers=2, ray_address=nodes.address, environment=QUIET  # type: ignore[attr-defined]
        )  # fmt: skip
        with ended(driver):
            until(lambda: len(field.parts("node-ray")) >= 2, driver)
            nodes.remove_node(second, allow_graceful=False)  # type: ignore[attr-defined]
            finish(driver)
    return field.outcome("node lost", "ray", "node-ray", began)


def partition(field: Field, began: float) -> Outcome:
    """The second node's raylet lives in a network namespace; its cable is cut in the middle of a shard."""
    field.spoil(delay=SLOW)
    space, ours, theirs = f"drill{os.getpid()}", f"dr{os.getpid()}a"[-15:], f"dr{os.getpid()}b"[-15:]
    inside = ["ip", "netns", "exec", space]
    patience = {f"RAY_health_check_{name}": value for name, value in HEALTH.items()}
    environment = {**field.environment(), **QUIET, **patience}
    head = other = None
    try:
        for command in [
            ["ip", "netns", "add", space],
            ["ip", "link", "add", ours, "type", "veth", "peer", "name", theirs],
            ["ip", "link", "set", theirs, "netns", space],
            ["ip", "addr", "add", f"{NETWORK}.1/24", "dev", ours],
            ["ip", "link", "set", ours, "up"],
            [*inside, "ip", "addr", "add", f"{NETWORK}.2/24", "dev", theirs],
            [*inside, "ip", "link", "set", theirs, "up"],
            [*inside, "ip", "link", "set", "lo", "up"],
        ]:
            subprocess.run(command, check=True)
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
        ray += ["--object-store-memory=80000000", "--disable-usage-stats"]
        logs = [(field.folder / f"{name}.raylet").open("wb") for name in ("head", "other")]
        head = Process(
            [*ray, "--head", f"--node-ip-address={NETWORK}.1", "--port=6399", "--include-dashboard=false"],
            env=environment, stdout=logs[0], stderr=logs[0], start_new_session=True,
        )  # fmt: skip
        head.log = field.folder / "head.raylet"
        until(lambda: "Ray runtime started" in said(head), head)
        other = Process(
            [*inside, *ray, f"--address={NETWORK}.1:6399", f"--node-ip-address={NETWORK}.2"],
            env=environment, stdout=logs[1], stderr=logs[1], start_new_session=True,
        )  # fmt: skip
        other.log = field.folder / "other.raylet"
        until(lambda: "Ray runtime started" in said(other), other)
        driver = field.drive("cut", executor="ray", workers=2, ray_address=f"{NETWORK}.1:6399", environment=environment)
        with ended(driver):
            until(lambda: len(field.parts("cut")) >= 2, driver)
            subprocess.run(["ip", "link", "set", ours, "down"], check=True)
            cut = time.monotonic()
            finish(driver)
        note = f"{time.monotonic() - cut:.0f} s after the cut"
    finally:
        for node in (other, head):
            if node is not None:
                node.kill_group()
        subprocess.run(["ip", "link", "del", ours], check=False)
        subprocess.run(["ip", "netns", "del", space], check=False)
    return field.outcome("network partition", "ray", "cut", began, note)


QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
HEALTH = {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "3", "initial_delay_ms": "1000"}
