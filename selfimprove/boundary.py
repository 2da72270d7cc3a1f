"""What keeps a run inside its folder: names without a way out, and no symlinks on the way in."""

import os
import re
from pathlib import Path

from selfimprove.errors import UserError

OWN_LINKS = ("latest", "best", ".latest.tmp", ".best.tmp")  # they lead to iterations; a kill may leave the new one
FOREIGN = ("trackers",)  # wandb's folder has links of its own; nothing here writes or deletes in it


def is_run_name(name: str) -> bool:
    """Whether a run may be called so: it can be a folder, and no other one than its own."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None


def links_inside(root: Path) -> list[Path]:
    """Symlinks in a run's folders, down to the files of its artifacts, without those of its own."""
    found = []
    for folder, names, files in os.walk(root):  # which does not follow links
        inside = Path(folder)
        found += [inside / name for name in [*names, *files] if (inside / name).is_symlink()]
        if inside == root:
            names[:] = [name for name in names if name not in FOREIGN]
    return sorted(path for path in found if path.parent != root or path.name not in OWN_LINKS)


def refuse_links(root: Path) -> None:
    """Refuse to write into a run, or delete from it, that has symlinks in it.

    Whoever did so through one would do it outside of the run.

    Raises:
        UserError: names the first one.
    """
    if found := links_inside(root):
        raise UserError(
            f"{found[0]} is a symlink, which is not followed: a run writes nothing outside of its folder",
            f"put what it leads to in its place; for more room, let the folder {root.parent} itself be on another disk",
        )
