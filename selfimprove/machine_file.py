"""Machine files: one recipe, and a file for each machine that it runs on.

`[machine]` stands in the place of those keys of the recipe's own; none of them enters a key, so that what a laptop has
made is not made anew on a cluster. `[hardware]` describes the devices, for `plan` alone.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from selfimprove.recipe import Machine, Section, validated
from selfimprove.recipe_file import read_toml


class Hardware(Section):
    """What the machine has; read by `plan --machine` alone."""

    device: str = Field(min_length=1)  # as the driver calls it, or part of that: "H100"; "cpu" = the node's processor
    memory_gib: float = Field(gt=0)  # of one device; of the node where that is the processor
    devices_per_node: int = Field(ge=1)
    ranks: int | None = Field(None, ge=1)  # of the executor `static`: WORLD_SIZE of the launch
    generation_tokens_per_s: float | None = Field(None, gt=0)  # measured: tokens that one worker writes
    training_tokens_per_s: float | None = Field(None, gt=0)  # measured: tokens that one process trains on

    @property
    def on_cpu(self) -> bool:
        """Whether there are no accelerators."""
        return self.device.lower() == "cpu"


class _File(Section):
    machine: Machine
    hardware: Hardware | None = None


class MachineFile(NamedTuple):
    """What a machine file says."""

    machine: dict[str, Any]  # the keys that it has, and no others
    hardware: Hardware | None


def read(path: Path) -> MachineFile:
    """Read a machine file.

    Raises:
        UserError: unreadable file, bad TOML, unknown key, a value of the wrong type, or no [machine].
    """
    table = read_toml(path, "machine file", "see examples/*/machine.toml", "compare with examples/*/machine.toml")
    found = validated(_File, table, f"machine file {path.name}")
    return MachineFile(found.machine.model_dump(exclude_unset=True), found.hardware)
