"""A store: a folder, or whatever fsspec reaches (s3://, gs://), as objects by their names.

An object is there whole or not at all: a PUT of an object store is atomic, and in a folder a file is written beside
its place, flushed and renamed. Retries are the library's own. Whatever goes wrong is told in one sentence, in which no
key can stand.
"""

import contextlib
import errno
import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from selfimprove import boundary, disk, masking
from selfimprove.errors import UserError
from selfimprove.remote import address as address_
from selfimprove.remote import moving
from selfimprove.remote.address import LOGIN
from selfimprove.remote.moving import CHUNK, Item, Progress, Stopped, chunks, together
from selfimprove.store import sha256

if TYPE_CHECKING:
    from fsspec.callbacks import Callback

SMALL = 64 << 20  # bytes of a manifest or a recipe; what is larger is none
ALTERED = "where the run is whole, selfimprove push RUN puts it there again once this object is removed"
BUGS = (TypeError, AttributeError, NameError, AssertionError)  # never a store's answer


class Store:
    """Objects by their names, "/" between the parts, below the store's address.

    Raises:
        UserError: the address cannot be one, holds a key or a password, or its library is not installed.
    """

    def __init__(self, address: str) -> None:
        from fsspec.implementations.local import LocalFileSystem

        self.folder = address_.folder(address)  # of a store on a file system of this machine
        self.address = str(self.folder or address.rstrip("/"))
        self._fs, self._root = (LocalFileSystem(), str(self.folder)) if self.folder else address_.connect(address)

    def show(self, name: str) -> str:
        """The address of an object, for a person."""
        return f"{self.address}/{name}"

    def probe(self) -> None:
        """Write a small object, read it back and delete it.

        Raises:
            UserError: that does not work.
        """
        if self.folder and not self.folder.is_dir():
            raise UserError(
                f"the store {self.address} is no folder that is there",
                f"mkdir -p {self.address}, if the file system that it is to be on is mounted",
            )
        name, content = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
        self.write(name, content)
        try:
            same = self.read(name) == content
        finally:
            self.delete(name)
        if not same:
            raise UserError(f"the store {self.address} gave back something else than was written", "choose another one")
        if name in self.names(""):
            raise UserError(f"nothing can be deleted in the store {self.address}", "allow it: --from needs it")

    def read(self, name: str) -> bytes | None:
        """A small object; None where it is not there.

        Raises:
            UserError: the store does not answer, or the object is far too large.
        """
        with self._told(f"read {name}"):
            try:
                size = self._fs.info(self._at(name))["size"]
                content: bytes = self._fs.cat_file(self._at(name)) if size <= SMALL else b""
            except (FileNotFoundError, NotADirectoryError):
                return None
        if size > SMALL:
            raise UserError(f"{self.show(name)} has {disk.size(size)}, which no manifest or recipe has", "remove it")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Put a small object, in the place of another one of that name."""
        with self._told(f"write {name}"):
            if self.folder:
                moving.write(self.folder / name, [content], lambda done: None)
            else:
                self._fs.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Put a small object where none of that name is; False where one is, which stays as it is.

        The store decides, so that of two that do it at the same time one is told False. One that knows no conditions
        is asked before, and shows the last of two that come at the very same moment.
        """
        there = self.read(name)
        if there is not None:
            return there == content
        with self._told(f"write {name}"):
            if self.folder:
                return moving.create(self.folder / name, content)
            try:
                self._fs.pipe_file(self._at(name), content, mode="create")
            except FileExistsError:
                return self.read(name) == content  # our own, sent again because its answer was lost
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                self._fs.pipe_file(self._at(name), content)
        return True

    def delete(self, name: str) -> None:
        """Remove an object; one that is gone already is no error."""
        with self._told(f"delete {name}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def sizes(self, below: str) -> dict[str, int]:
        """The bytes of every object below a name, by its name from there on."""
        base = self._at(below)
        with self._told(f"list {below}"):
            try:
                found = self._fs.find(base, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        return {name.removeprefix(f"{base}/"): told["size"] for name, told in found.items() if name != base}

    def names(self, below: str) -> list[str]:
        """What stands directly below a name."""
        with self._told(f"list {below or self.address}"):
            try:
                found = self._fs.ls(self._at(below), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return [name.rstrip("/").rpartition("/")[2] for name in found]

    def upload(self, items: Sequence[Item], progress: Progress) -> None:
        """Put files that are what their manifest says; each has its size in the store afterwards.

        Raises:
            UserError: a file is not what its manifest says, or the store does not take it.
        """

        def put(item: Item, moved: Callable[[int], None]) -> None:
            if item.path.stat().st_size != item.bytes or sha256(item.path) != item.sha256:
                raise UserError(f"{item.path} differs from its manifest", "selfimprove verify RUN names all that does")
            with self._told(f"write {item.name}"):
                if self.folder:
                    moving.write(self.folder / item.name, chunks(item.path), moved)
                else:
                    self._fs.put_file(str(item.path), self._at(item.name), callback=_callback(moved))
                size = self._fs.info(self._at(item.name))["size"]
            if size != item.bytes:
                raise UserError(
                    f"{self.show(item.name)} has {size} bytes after it was written, and {item.path} {item.bytes}",
                    "does another process write there? selfimprove push RUN tries again",
                )

        together(put, items, progress)

    def download(self, items: Sequence[Item], progress: Progress) -> None:
        """Bring objects here, each checked against its manifest's size and sha256.

        Raises:
            UserError: one is gone or altered, or the store does not answer.
        """

        def get(item: Item, moved: Callable[[int], None]) -> None:
            item.path.parent.mkdir(parents=True, exist_ok=True)
            with self._told(f"read {item.name}", ours=True):
                if self.folder:
                    moving.write(item.path, chunks(self.folder / item.name), moved)
                else:
                    self._fs.get_file(self._at(item.name), str(item.path), callback=_callback(moved))
            if item.path.stat().st_size != item.bytes or sha256(item.path) != item.sha256:
                raise UserError(f"{self.show(item.name)} differs from its manifest", ALTERED)

        together(get, items, progress)

    def hash(self, items: Sequence[Item], progress: Progress) -> list[str]:
        """The names of objects whose content is not what their manifest says; every byte is read."""
        wrong: list[str] = []

        def check(item: Item, moved: Callable[[int], None]) -> None:
            digest, done = hashlib.sha256(), 0
            with self._told(f"read {item.name}"), self._fs.open(self._at(item.name), "rb", block_size=CHUNK) as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    moved(done := done + len(chunk))
            if digest.hexdigest() != item.sha256:
                wrong.append(item.name)

        together(check, items, progress)
        return sorted(wrong)

    def sweep(self, below: str) -> None:
        """Remove half-written files in a part of a store that is a folder; object stores have none."""
        if self.folder:
            moving.sweep(self.folder / below)

    def refuse_links(self, below: str) -> None:
        """Refuse symlinks in a part of a store that is a folder: a writer would leave the store through them.

        Raises:
            UserError: names the first.
        """
        if self.folder:
            boundary.refuse_links(self.folder / below)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    @contextlib.contextmanager
    def _told(self, doing: str, ours: bool = False) -> Iterator[None]:
        """What a library says of a store, as one sentence; where `ours`, our own disk may fail, which is no store's."""
        try:
            yield
        except (UserError, Stopped, *BUGS):
            raise
        except Exception as error:  # botocore, aiohttp, google.auth: each has its own, and few are OSErrors
            if ours and disk.number_of(error) is not None:
                raise
            raise self._sentence(error, doing) from None

    def _sentence(self, error: Exception, doing: str) -> UserError:
        if isinstance(error, FileNotFoundError):
            what = "there is no such object" if doing.startswith("read") else "there is no such bucket or folder"
            return UserError(f"the store {self.address}: {what} ({doing})", "check machine.store; the store makes none")
        if isinstance(error, PermissionError):
            return UserError(f"the store {self.address} gives no permission to {doing}", LOGIN)
        said = masking.masked(" ".join(str(error).split()))[:300] or type(error).__name__
        return UserError(
            f"the store {self.address} could not {doing}: {said}",
            f"check the network and the address, and {LOGIN}; then the same command goes on",
        )


def _callback(moved: Callable[[int], None]) -> "Callback":
    from fsspec.callbacks import Callback

    return Callback(hooks={"moved": lambda size, value, **more: moved(value)})
