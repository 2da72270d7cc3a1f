"""What a run has beside its artifacts, and needs where it is to go on: run.json, the recipe, receipts, templates."""

import hashlib
import os
import re
import tomllib
from pathlib import Path

from selfimprove import receipts, recipe_file
from selfimprove.errors import UserError
from selfimprove.plan import TEMPLATES
from selfimprove.recipe import Recipe, validated
from selfimprove.remote.objects import Store
from selfimprove.store import Run, write_atomically

NAMED = {receipts.FOLDER: re.compile(r"[0-9a-f]{64}\.json"), TEMPLATES: re.compile(r"[0-9a-f]{64}")}  # by content


class Beside:
    """These texts of one run, here and in a store."""

    def __init__(self, store: Store, run: Run) -> None:
        self.store, self.run = store, run
        self.address = store.show(run.name)
        self._claimed = False  # whether the run.json there is known to be ours
        self._known: set[str] = set()  # receipts and templates that are known to be there
        self._recipe = b""  # that is known to be there

    def recipe(self) -> Recipe | None:
        """The recipe of the run in the store; None where no such run is.

        Raises:
            UserError: it is damaged.
        """
        content = self.store.read(f"{self.run.name}/recipe.toml")
        if content is None:
            return None
        try:
            table = tomllib.loads(content.decode("utf-8"))
        except (ValueError, RecursionError):
            raise UserError(f"{self.address}/recipe.toml is damaged", "put back a copy of the run's own") from None
        return validated(Recipe, table, f"recipe {self.address}/recipe.toml")

    def same_run(self) -> None:
        """Refuse a store that has another run of this name."""
        there, here = self.store.read(f"{self.run.name}/run.json"), _bytes_of(self.run.path / "run.json")
        if there is not None and here is not None and there != here:
            raise UserError(
                f"{self.address} holds another run than {self.run.path}: their run.json differ",
                "--run ANOTHER_NAME, or another machine.store",
            )

    def push(self) -> None:
        """Keep what tells of the run, and the texts that its artifacts name by their hashes."""
        about, recipe = _bytes_of(self.run.path / "run.json"), _bytes_of(self.run.recipe_file)
        if not self._claimed and about is not None and not self.store.create(f"{self.run.name}/run.json", about):
            self.same_run()
        self._claimed = True
        if recipe is not None and recipe != self._recipe:
            if self.store.read(f"{self.run.name}/recipe.toml") != recipe:
                self.store.write(f"{self.run.name}/recipe.toml", recipe)
            self._recipe = recipe
        for folder, form in NAMED.items():
            here = {path.name: path for path in self.run.path.glob(f"{folder}/*") if form.fullmatch(path.name)}
            if here.keys() - self._known:
                self._known |= self.store.sizes(f"{self.run.name}/{folder}").keys()
            for name in sorted(here.keys() - self._known):
                self.store.write(f"{self.run.name}/{folder}/{name}", here[name].read_bytes())
                self._known.add(name)

    def pull(self) -> None:
        """Bring what is not here yet, but for the recipe."""
        if not (self.run.path / ".gitignore").exists():
            (self.run.path / ".gitignore").write_text("*\n", encoding="utf-8")
        self._bring_text("run.json")
        for folder, form in NAMED.items():
            for name in self.store.sizes(f"{self.run.name}/{folder}"):
                if form.fullmatch(name):
                    (self.run.path / folder).mkdir(exist_ok=True)
                    self._bring_text(f"{folder}/{name}", name.partition(".")[0])

    def _bring_text(self, name: str, digest: str = "") -> None:
        """A text that is not here yet; one that is named by its hash must have it."""
        if os.path.lexists(self.run.path / name) or (content := self.store.read(f"{self.run.name}/{name}")) is None:
            return
        if digest and hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"{self.address}/{name} is not the text that its name says", "remove it from the store")
        try:
            write_atomically(self.run.path / name, content.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{self.address}/{name} is damaged: no UTF-8 text", "remove it from the store") from None

    def pull_recipe(self) -> None:
        """The recipe comes last: a directory that has one is a run with all that the store had. More rounds win."""
        theirs = self.recipe()
        if theirs is None:
            return
        if not self.run.exists():
            self._bring_text("recipe.toml")
            return
        ours = recipe_file.load(self.run.recipe_file)
        if theirs.rounds > ours.rounds:
            longer = ours.model_copy(update={"rounds": theirs.rounds})
            write_atomically(self.run.recipe_file, recipe_file.dump(longer))


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
