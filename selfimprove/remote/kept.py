"""What is published in a store, read without trust: names, manifests, sizes."""

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from selfimprove import collected, textfile
from selfimprove.remote.moving import THREADS
from selfimprove.remote.objects import Store
from selfimprove.store import Manifest, broken_seal, key_of

STAGE = r"iter-\d{3,}/\d+-[a-z][a-z0-9-]*"  # what an artifact's directory is called, whatever a store may list
OWN = ("manifest.json", collected.FILE)  # files of an artifact that no manifest lists


class Kept(NamedTuple):
    """An artifact in the store."""

    content: bytes  # of its manifest.json
    manifest: Manifest | None  # None where it is damaged
    sizes: Mapping[str, int]  # of its files that are there
    note: bytes | None  # what `selfimprove gc` had removed before it was pushed

    @property
    def removed(self) -> set[str]:
        """The files that the note explains."""
        if self.note is None or self.manifest is None:
            return set()
        try:
            said = collected.Collected.model_validate_json(self.note).files
        except ValueError:
            return set()
        return {o.path for o in self.manifest.outputs if o.path not in self.sizes and said.get(o.path) == o.sha256}

    @property
    def torn(self) -> str:
        """Why it cannot be pulled; empty where it can."""
        if self.manifest is None:
            return "its manifest.json is damaged"
        for output in self.manifest.outputs:
            if self.sizes.get(output.path) != output.bytes and output.path not in self.removed:
                there = self.sizes.get(output.path)
                return f"{output.path} {'is missing' if there is None else f'has {there} of {output.bytes} bytes'}"
        return ""


def artifacts(store: Store, run: str) -> dict[str, Kept]:
    """What is published of a run in a store, by directory and in order."""
    store.refuse_links(run)
    listed = store.sizes(run)
    published = re.compile(rf"({STAGE})/manifest\.json")
    names = sorted(match[1] for name in listed if (match := published.fullmatch(name)))
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda directory: artifact(store, run, directory, listed), names))
    return {directory: kept for directory, kept in zip(names, found, strict=True) if kept}


def artifact(store: Store, run: str, directory: str, listed: Mapping[str, int] | None = None) -> Kept | None:
    """An artifact; None where none is. What was listed before its manifest was read may be out of date."""
    content = store.read(f"{run}/{directory}/manifest.json")
    if content is None:
        return None
    inside = f"{directory}/{making(content)}/"
    manifest = _parsed(content, directory)
    for sizes in (listed, None):
        if sizes is None:
            sizes = {f"{inside}{n}": s for n, s in store.sizes(f"{run}/{inside[:-1]}").items()}
        own = {name.removeprefix(inside): size for name, size in sizes.items() if name.startswith(inside)}
        note = store.read(f"{run}/{inside}{collected.FILE}") if collected.FILE in own else None
        kept = Kept(content, manifest, own, note)
        if not kept.torn or manifest is None:
            break
    return kept


def making(content: bytes) -> str:
    """The folder of an artifact's files: what its manifest hashes to, so that no two makings share one."""
    return hashlib.sha256(content).hexdigest()[:16]


def _parsed(content: bytes, directory: str) -> Manifest | None:
    """The manifest; None where it is damaged or another stage's."""
    try:
        text = content.decode("utf-8")
        manifest = Manifest.model_validate(textfile.parse_json(text))
        wrong = broken_seal(text) or f"iter-{manifest.iteration:03d}/{manifest.stage}" != directory
    except ValueError:  # pydantic's and JSON's are that too
        return None
    paths = [output.path for output in manifest.outputs]
    odd = len(set(paths)) < len(paths) or any(Path(p).as_posix() != p or p in OWN for p in paths)
    return None if wrong or odd or key_of(manifest.ingredients) != manifest.key else manifest
