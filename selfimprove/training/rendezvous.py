"""Where the processes of a training meet: torchrun's command line on each node, from the recipe or the scheduler."""

import os
import re
import sys
from collections.abc import Mapping

from selfimprove.errors import UserError
from selfimprove.recipe import Machine

PORT = 29500  # torch's own, where MASTER_ADDR comes without MASTER_PORT
SECONDS = 600  # for all nodes to come


def torchrun(machine: Machine, node_rank: int, attempt: str) -> list[str]:
    """The command that starts this node's processes, but for the program and its arguments.

    The static rendezvous, and not c10d's: it lets nodes keep their ranks, so that process 0, which says what happens,
    is on the driver's node.

    Args:
        machine: processes of each node, nodes, rendezvous.
        node_rank: of this node; 0 is the driver's.
        attempt: names this very training, the same on all nodes.

    Raises:
        UserError: several nodes, and nothing says where they meet.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={machine.num_processes}"]
    if machine.nodes == 1:
        return [*command, "--standalone"]
    if not 0 <= node_rank < machine.nodes:
        raise UserError(f"there is no node {node_rank} of {machine.nodes}", "set machine.nodes to the number of nodes")
    return [
        *command,
        f"--nnodes={machine.nodes}",
        f"--node-rank={node_rank}",
        "--rdzv-backend=static",
        f"--rdzv-endpoint={endpoint(machine)}",
        f"--rdzv-id={attempt}",
        f"--rdzv-conf=timeout={SECONDS}",
    ]


def endpoint(machine: Machine, environment: Mapping[str, str] = os.environ) -> str:
    """host:port of the driver's node: `machine.rendezvous`, else MASTER_ADDR and MASTER_PORT, else SLURM's first host.

    Raises:
        UserError: none of them is set.
    """
    if machine.rendezvous:
        return machine.rendezvous
    if host := environment.get("MASTER_ADDR"):
        return f"{host}:{environment.get('MASTER_PORT') or PORT}"
    if hosts := environment.get("SLURM_JOB_NODELIST"):
        job = re.sub(r"\D", "", environment.get("SLURM_JOB_ID", ""))
        return f"{first_host(hosts)}:{10000 + int(job[-4:] or 0)}"  # jobs that share a node have ports of their own
    raise UserError(
        f"machine.nodes = {machine.nodes}, and nothing says where the nodes meet",
        'set machine.rendezvous = "HOST:PORT" of node 0, or MASTER_ADDR and MASTER_PORT',
    )


def first_host(hosts: str) -> str:
    """The first of SLURM's hosts, which are written as in `gpu[003-005,7],login1`: scontrol is not on every node."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])
