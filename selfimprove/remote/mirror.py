"""The part of a store that keeps one run: pushed when a stage is published, pulled where the run is to go on.

    <store>/<run>/run.json  recipe.toml  receipts/  templates/
                  iter-001/4-train/manifest.json
                  iter-001/4-train/<making>/policy/model.safetensors ...
                  aside/<time>/iter-001/4-train/manifest.json

Object stores have no rename, so the manifest is what publishes: an artifact is in the store if and only if its
manifest.json is, which is put last and never replaced. Its files lie in a folder named by the manifest's hash, so that
no other driver, no later making and no half push can ever put a file of its own among them.
"""

import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from selfimprove import boundary, collected, disk
from selfimprove.errors import UserError
from selfimprove.remote.beside import Beside
from selfimprove.remote.kept import STAGE, Kept, artifact, artifacts, making
from selfimprove.remote.moving import Item, Progress
from selfimprove.remote.objects import Store
from selfimprove.store import (
    Artifact,
    Manifest,
    Run,
    collected_outputs,
    missing_outputs,
    read_manifest,
)


class Mirror:
    """One run's part of a store.

    Raises:
        UserError: the store would lie in the run's directory, or the other way round.
    """

    def __init__(self, store: Store, run: Run) -> None:
        self.store, self.run = store, run
        self.address = store.show(run.name)
        self.beside = Beside(store, run)
        if store.folder:
            there, here = store.folder / run.name, run.path.resolve()
            if there.is_relative_to(here) or here.is_relative_to(there):
                raise UserError(f"the store {store.address} would lie in the run itself", "choose another folder")

    # --- there

    def push(self, directory: str, progress: Progress) -> int:
        """Keep a published artifact in the store, its manifest last; returns the bytes that were uploaded.

        Raises:
            UserError: it is not whole, another one is there already, or the store does not take it.
        """
        place = self.run.path / directory
        manifest = read_manifest(place)
        if manifest is None or (missing := missing_outputs(place, manifest)):
            what = place / missing[0] if manifest else place / "manifest.json"
            raise UserError(f"{what} is missing or was altered", f"selfimprove verify {self.run.name}")
        content = (place / "manifest.json").read_bytes()
        self.beside.push()
        kept = artifact(self.store, self.run.name, directory)
        if kept and kept.content != content:
            raise self._apart(directory, kept)
        base = f"{self.run.name}/{directory}/{making(content)}"
        sizes = kept.sizes if kept else self.store.sizes(base)
        self.store.sweep(base)
        gone = collected_outputs(place, manifest)
        lacking = [o for o in manifest.outputs if sizes.get(o.path) != o.bytes]
        if gone & {o.path for o in lacking}:
            self.store.write(f"{base}/{collected.FILE}", (place / collected.FILE).read_bytes())
        items = [Item(place / o.path, f"{base}/{o.path}", o.bytes, o.sha256) for o in lacking if o.path not in gone]
        self.store.upload(items, progress)
        if not kept and not self.store.create(f"{self.run.name}/{directory}/manifest.json", content):
            raise self._apart(directory, artifact(self.store, self.run.name, directory))
        return sum(item.bytes for item in items)

    def push_all(self, progress: Progress) -> list[str]:
        """Keep whatever is published of the run; returns what was not kept yet."""
        self.beside.same_run()
        self.beside.push()
        kept = artifacts(self.store, self.run.name)
        for directory in (here := self._here()):
            self._refuse_apart(directory, kept)
        todo = [directory for directory in here if directory not in kept or kept[directory].torn]
        self._each(todo, progress, {d: _bytes(read_manifest(self.run.path / d)) for d in todo}, self.push)
        return todo

    def set_aside(self, directories: Collection[str]) -> None:
        """Take artifacts out of the published ones, the last made first; their files stay where they are."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        for directory in reversed(list(directories)):
            name = f"{self.run.name}/{directory}/manifest.json"
            content = self.store.read(name)
            if content is not None:
                self.store.write(f"{self.run.name}/aside/{stamp}-{making(content)}/{directory}/manifest.json", content)
                self.store.delete(name)

    def altered(self, progress: Progress) -> list[str]:
        """The files in the store that are not what their manifests say, each as a sentence; reads every byte."""
        kept = artifacts(self.store, self.run.name)
        items = {}
        for directory, one in kept.items():
            for output in one.manifest.outputs if one.manifest and not one.torn else []:
                if output.path not in one.removed:
                    name = f"{self.run.name}/{directory}/{making(one.content)}/{output.path}"
                    items[name] = Item(Path(), name, output.bytes, output.sha256)
        torn = [f"{self.address}/{directory} is torn: {one.torn}" for directory, one in kept.items() if one.torn]
        wrong = self.store.hash(list(items.values()), progress)
        return torn + [f"{self.store.show(name)} differs from its manifest" for name in wrong]

    # --- here

    def bring(
        self, progress: Progress, tell: Callable[[str], None], without: Collection[str] = (), push: bool = True
    ) -> None:
        """Let the run's directory and the store have the same artifacts; the run's lock is held.

        What is here stays as it is: what `selfimprove gc` removed does not come back.

        Args:
            progress: told of bytes.
            tell: hears what was brought or kept.
            without: directories that are looked at neither here nor there.
            push: whether what is only here is kept in the store.

        Raises:
            UserError: the store has another run of this name or another artifact in a stage's place, or one that is
                torn or altered; nothing half-brought is left.
        """
        self.beside.same_run()
        found = artifacts(self.store, self.run.name)
        kept = {directory: one for directory, one in found.items() if directory not in without}
        here = [directory for directory in self._here() if directory not in without]
        for directory in here:
            self._refuse_apart(directory, kept)
        lacking = [directory for directory in kept if not os.path.lexists(self.run.path / directory)]
        size = {directory: _bytes(kept[directory].manifest) for directory in lacking}
        for directory in lacking:
            self._refuse_torn(directory, kept[directory])
        if lacking:
            disk.check(self.run.path, sum(size.values()), f"what {self.address} has")
        if lacking or not self.run.exists():
            self.beside.pull()
        self._each(lacking, progress, size, lambda directory, told: self._pull(directory, kept[directory], told))
        self.beside.pull_recipe()
        if lacking:
            tell(f"brought {_stages(lacking)} ({disk.size(sum(size.values()))}) from {self.address}")
        ahead = [d for d in here if d not in kept or kept[d].torn] if push else []
        ahead = [directory for directory in ahead if self._whole(directory)]  # of the others, the plan says why
        size = {directory: _bytes(read_manifest(self.run.path / directory)) for directory in ahead}
        self._each(ahead, progress, size, self.push)
        if ahead:
            tell(f"kept {_stages(ahead)} ({disk.size(sum(size.values()))}) in {self.address}")

    def _pull(self, directory: str, kept: Kept, progress: Progress) -> None:
        assert kept.manifest  # it is not torn
        artifact = Artifact(self.run.path / directory)
        base = f"{self.run.name}/{directory}/{making(kept.content)}"
        wanted = [o for o in kept.manifest.outputs if o.path not in kept.removed]
        artifact.begin()
        try:
            items = [Item(artifact.path(o.path), f"{base}/{o.path}", o.bytes, o.sha256) for o in wanted]
            self.store.download(items, progress)
            if kept.note is not None and kept.removed:
                artifact.path(collected.FILE).write_bytes(kept.note)
            artifact.receive(kept.content.decode("utf-8"))
        except BaseException:
            artifact.discard()
            raise

    # --- both

    def _here(self) -> list[str]:
        """The directories of the artifacts that are published here."""
        found = (f"{path.parts[-3]}/{path.parts[-2]}" for path in self.run.path.glob("iter-*/*/manifest.json"))
        return sorted(directory for directory in found if re.fullmatch(STAGE, directory))

    def _whole(self, directory: str) -> bool:
        manifest = read_manifest(self.run.path / directory)
        return manifest is not None and not missing_outputs(self.run.path / directory, manifest)

    def _refuse_torn(self, directory: str, kept: Kept) -> None:
        if kept.torn:
            raise UserError(
                f"{self.address}/{directory} is torn: {kept.torn}",
                f"selfimprove push {self.run.name} where the run is whole mends it; without "
                f"{self.address}/{directory}/manifest.json it is made again",
            )

    def _refuse_apart(self, directory: str, kept: Mapping[str, Kept]) -> None:
        one = kept.get(directory)
        if one and one.content != (self.run.path / directory / "manifest.json").read_bytes():
            raise self._apart(directory, one)

    def _apart(self, directory: str, there: Kept | None) -> UserError:
        ours = read_manifest(self.run.path / directory)
        same = ours and there and there.manifest and there.manifest.key == ours.key
        what = "was made another time, from the same ingredients," if same else "is made from other ingredients"
        return UserError(
            f"{self.address}/{directory} {what} than {self.run.path / directory}: another driver has put it there",
            f"move {self.run.path} away and selfimprove pull {self.address} to go on with what is there; "
            f"selfimprove resume {self.run.name} --from {directory} sets it aside and makes it anew",
        )

    def _each(
        self,
        directories: Collection[str],
        progress: Progress,
        size: Mapping[str, int],
        move: Callable[[str, Progress], object],
    ) -> None:
        total, before = sum(size.values()), 0
        for directory in directories:
            move(directory, lambda done, of, before=before: progress(before + done, total))  # type: ignore[misc]
            before += size[directory]
            progress(before, total)


def _bytes(manifest: Manifest | None) -> int:
    return sum(output.bytes for output in manifest.outputs) if manifest else 0


def _stages(directories: Collection[str]) -> str:
    return f"{len(directories)} stage{'s' if len(directories) > 1 else ''}"


def of(address: str | None, run: Run) -> Mirror | None:
    """The run's part of the store that a recipe names in machine.store; None where it names none.

    Raises:
        UserError: the address cannot be one, or its library is not installed.
    """
    return Mirror(Store(address), run) if address else None


def pull(address: str, runs: Path, progress: Progress, tell: Callable[[str], None]) -> Run:
    """Make a run's directory from STORE/RUN, or bring it whatever it lacks.

    Raises:
        UserError: no such run is there, another one of its name is here, or what is there is torn or altered.
    """
    where, _, name = address.rstrip("/").rpartition("/")
    if not where or where.endswith(":/") or not boundary.is_run_name(name):  # s3://BUCKET alone is no run
        raise UserError(f"'{address}' names no run in a store", "for example selfimprove pull s3://BUCKET/PREFIX/RUN")
    store, run = Store(where), Run(runs / name)
    mirror = Mirror(store, run)
    if mirror.beside.recipe() is None:
        there = ", ".join(sorted(filter(boundary.is_run_name, store.names("")))) or "nothing"
        raise UserError(f"no run '{name}' in {store.address}", f"there is {there}")
    with disk.told(run.path, name):
        run.path.mkdir(parents=True, exist_ok=True)
        with run.lock():
            boundary.refuse_links(run.path)
            mirror.bring(progress, tell, push=False)
    return run
