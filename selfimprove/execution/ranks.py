"""Which of a scheduler's processes this one is."""

import os
from collections.abc import Mapping
from typing import NamedTuple

from selfimprove.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS")


class Place(NamedTuple):
    """One process among those of the run; rank 0 drives, the others follow."""

    rank: int
    world: int


def rank_and_world(environ: Mapping[str, str] = os.environ) -> Place:
    """What RANK and WORLD_SIZE say, else SLURM_PROCID and SLURM_NTASKS.

    Raises:
        UserError: neither pair is set, or it makes no sense.
    """
    names = next((pair for pair in (TORCHRUN, SLURM) if any(name in environ for name in pair)), None)
    hint = "set RANK (from 0) and WORLD_SIZE for each process, or start them with srun"
    if names is None:
        raise UserError("machine.executor = 'static', and nothing says which rank this process is", hint)
    said = [environ.get(name, "") for name in names]
    shown = " and ".join(f"{name}={value!r}" for name, value in zip(names, said, strict=True))
    if not all(value.isascii() and value.isdigit() for value in said):
        raise UserError(f"{shown}: both must be whole numbers", hint)
    rank, world = map(int, said)
    if rank >= world:
        raise UserError(f"{shown}: a rank is less than the number of ranks", hint)
    return Place(rank, world)


def driver(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process, which is to drive a run.

    Raises:
        UserError: it is not rank 0, or has no rank.
    """
    place = rank_and_world(environ)
    if place.rank:
        raise UserError(f"this is rank {place.rank}, and rank 0 alone drives a run", "selfimprove work RUN follows it")
    return place
