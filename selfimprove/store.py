"""The run directory: artifacts that are there whole or not at all, manifests, keys, the lock.

A stage writes into `<stage>.partial/`; `publish` writes the manifest last and renames the directory. Published
means immutable. A key is the hash of readable ingredients, so that a difference can be named.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import pydantic

from selfimprove import collected, columns, locks, textfile
from selfimprove.errors import UserError
from selfimprove.records import Quarantined

SCHEMA = 1
SHARD_ROWS = 100_000
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
Row = TypeVar("Row")


# --- hashes and keys ---------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(ingredients: Mapping[str, Any]) -> str:
    """The key of an artifact: the hash of its ingredients in canonical JSON."""
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def is_model_file(name: str) -> bool:
    """Whether a file of this name makes a model what it is: configuration, safetensors weights, tokenizer."""
    return name.endswith(MODEL_FILES) and name != "canary.json" and "/" not in name


def model_files(directory: Path) -> list[Path]:
    """The files that make a model what it is."""
    return sorted(p for p in directory.iterdir() if p.is_file() and is_model_file(p.name))


def model_identity(directory: Path) -> str:
    """Content hash of a model directory (weights, configuration, tokenizer)."""
    return key_of({path.name: sha256(path) for path in model_files(directory)})


def row_seed(seed: int, iteration: int, stage: str, row: str) -> int:
    """A 31-bit seed for one row, so that the order and the number of workers change nothing."""
    digest = hashlib.sha256(f"{seed}/{iteration}/{stage}/{row}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# --- rows --------------------------------------------------------------------------------------------------------


def read_rows(directory: Path, name: str, record: type[Row]) -> list[Row]:
    """All rows of the shards `<name>-*.parquet` of a published artifact, in order."""
    return list(iter_rows(directory, name, record))


def iter_rows(directory: Path, name: str, record: type[Row], start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """The same, or those from number `start` on and before `stop`, a few thousand in memory at a time.

    A shard is looked at as a whole before its first row comes.

    Raises:
        UserError: a shard is not what was published.
    """
    import itertools

    schema, before = columns.arrow_schema(record), 0
    for shard in shards(directory, name):
        first, before = before, before + (columns.row_number(shard) if start or stop is not None else 0)
        if start and before <= start:
            continue
        if stop is not None and first >= stop:
            return
        rows = columns.read(intact(shard), record, schema, max(0, start - first))
        yield from rows if stop is None else itertools.islice(rows, stop - max(start, first))


def iter_columns(directory: Path, name: str, wanted: list[str]) -> Iterator[tuple[Any, ...]]:
    """Some columns of all rows of an artifact, in order; see `iter_rows`."""
    for shard in shards(directory, name):
        yield from columns.read_some(intact(shard), wanted)


def row_number(directory: Path, name: str) -> int:
    """How many rows of one kind an artifact has, by the shards' own word."""
    return sum(map(columns.row_number, shards(directory, name)))


def shards(directory: Path, name: str) -> list[Path]:
    """The shards of one kind of row in order: those that were published, also where one is gone."""
    manifest = read_manifest(directory)
    if manifest is None:
        return sorted(directory.glob(f"{name}-[0-9]*.parquet"))
    listed = (output.path for output in manifest.outputs)
    return sorted(directory / path for path in listed if fnmatch.fnmatch(path, f"{name}-[0-9]*.parquet"))


def read_json(path: Path) -> Any:
    """The content of a JSON file of a published artifact.

    Raises:
        UserError: it is not what was published.
    """
    try:
        return textfile.parse_json(textfile.read(intact(path)))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {textfile.why(error)}", _again(path.parent)) from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file of a published artifact.

    Raises:
        UserError: it is not what was published.
    """
    with textfile.opened(intact(path)) as file:
        for number, line in enumerate(file, 1):
            try:
                yield dict(textfile.parse_json(line))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}, line {number}: damaged: {error}", _again(path.parent)) from None


def read_memory(path: Path) -> dict[str, Any]:
    """What a file remembers that may be lost: nothing where it is not there, or is damaged."""
    try:
        found = textfile.parse_json(textfile.read(path))
    except (UserError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def intact(path: Path) -> Path:
    """The file of an artifact itself, once it is known to be what was published.

    A file in a folder without a manifest is not published yet and is taken as it is.

    Raises:
        UserError: it is not in the manifest, or its bytes are not those that the manifest has.
    """
    directory = next((d for d in list(path.parents)[:3] if textfile.there(d / "manifest.json")), None)
    manifest = read_manifest(directory) if directory else None
    if directory is None or manifest is None:
        return path
    listed = {output.path: output for output in manifest.outputs}
    output = listed.get(path.relative_to(directory).as_posix())
    if output is None:
        raise UserError(f"{path} is not in its manifest", _again(directory))
    with textfile.opened(path, _again(directory)) as file:
        same = os.fstat(file.fileno()).st_size == output.bytes
        if not same or hashlib.file_digest(file, "sha256").hexdigest() != output.sha256:
            raise UserError(f"{path} differs from its manifest", _again(directory))
    return path


def _again(directory: Path) -> str:
    """How an artifact that is damaged is made anew."""
    run, stage = directory.parent.parent.name, f"{directory.parent.name}/{directory.name}"
    return f"selfimprove verify {run} names all that is damaged; selfimprove resume {run} --from {stage} makes it anew"


# --- manifests ---------------------------------------------------------------------------------------------------


class Output(pydantic.BaseModel):
    """One file of an artifact, path relative to it."""

    path: str
    bytes: int
    sha256: str

    @pydantic.field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not path or "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"the output {path!r} would lie outside of the artifact")
        return path


class Rows(pydantic.BaseModel):
    """The row contract: in = out + quarantined, counted in `unit`s."""

    unit: str
    rows_in: int
    rows_out: int
    quarantined: dict[str, int]

    @pydantic.model_validator(mode="after")
    def _balance(self) -> "Rows":
        lost = self.rows_in - self.rows_out - sum(self.quarantined.values())
        if lost:
            raise ValueError(f"row contract broken: {lost} {self.unit}(s) neither came out nor were quarantined")
        return self


class Manifest(pydantic.BaseModel):
    """What an artifact is, what went into it, and what it cost; the last file a stage writes."""

    schema_number: int = SCHEMA
    iteration: int
    stage: str
    key: str
    ingredients: dict[str, Any]
    outputs: list[Output]
    rows: Rows
    metrics: dict[str, Any]
    environment: dict[str, str]
    seconds: float
    tokens: int
    finished: str
    seal: str = ""  # hash of all the rest; "" in manifests of versions that had none


def manifest_text(manifest: Manifest) -> str:
    """The content of manifest.json: one way to write it, and sealed, so that no byte of it can change unseen."""
    told = json.loads(manifest.model_dump_json(exclude={"seal"}))
    return json.dumps(told | {"seal": key_of(told)}, indent=1, ensure_ascii=False) + "\n"


def broken_seal(text: str) -> str:
    """What is wrong with the text of a manifest that can be read, in words; empty where nothing is."""
    told = json.loads(text)
    seal = told.pop("seal", "")
    if unknown := sorted(told.keys() - Manifest.model_fields.keys()):
        return f"has a field that no manifest has: {unknown[0]}"
    same = json.dumps(told | {"seal": seal}, indent=1, ensure_ascii=False) + "\n"
    if seal and (seal != key_of(told) or text != same):
        return "differs from its seal"
    return ""


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a published artifact; None where nothing is published.

    Raises:
        UserError: it is damaged.
    """
    path = directory / "manifest.json"
    try:
        path.lstat()
    except OSError:
        return None
    hint = f"move {directory} away, then selfimprove resume {directory.parent.parent.name}"
    text = textfile.read(path, hint)
    try:
        manifest = Manifest.model_validate(textfile.parse_json(text))
        sealed = broken_seal(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {field}{': ' if field else ''}{first['msg']}", hint) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {textfile.why(error)}", hint) from None
    if sealed:
        raise UserError(f"{path} {sealed}", hint)
    return manifest


def collected_outputs(directory: Path, manifest: Manifest) -> set[str]:
    """The files of this manifest that are gone and were removed on purpose."""
    return collected.gone(directory, {output.path: output.sha256 for output in manifest.outputs})


def missing_outputs(directory: Path, manifest: Manifest) -> list[str]:
    """The files of an artifact that are gone or of another size: what can be seen without reading them.

    Those that `selfimprove gc` removed are not among them.
    """
    removed = collected_outputs(directory, manifest)
    expected = [output for output in manifest.outputs if output.path not in removed]
    return [
        output.path
        for output in expected
        if not (path := directory / output.path).is_file() or path.stat().st_size != output.bytes
    ]


def broken_outputs(directory: Path, manifest: Manifest, read: Callable[[int], None] | None = None) -> Iterator[str]:
    """The files of an artifact that are missing, altered, or not in its manifest, each as one sentence.

    Links are named and not followed; nothing outside the directory is read.

    Args:
        directory: the artifact's.
        manifest: its own.
        read: told how many bytes have been read, again and again.
    """
    files, others = _walked(directory)
    listed = {output.path for output in manifest.outputs} | {"manifest.json", collected.FILE}
    removed = collected_outputs(directory, manifest)
    for output in manifest.outputs:
        path = directory / output.path
        if output.path in others or output.path in removed:
            continue  # links are named below
        if output.path not in files:
            yield f"{path} is missing"
        elif path.stat().st_size != output.bytes or _read(path, read) != output.sha256:
            yield f"{path} differs from its manifest"
    if key_of(manifest.ingredients) != manifest.key:
        yield f"{directory / 'manifest.json'} has a key that is not the hash of its ingredients"
    for name, what in sorted(others.items()):
        yield f"{directory / name} is {what}"
    for name in sorted(files - listed):
        yield f"{directory / name} is not in its manifest"


def _walked(directory: Path) -> tuple[set[str], dict[str, str]]:
    """The plain files below a directory, and what is neither that nor a directory: links, pipes, devices."""
    files: set[str] = set()
    others: dict[str, str] = {}
    for at, folders, names in os.walk(directory, followlinks=False):
        for name in [*folders, *names]:
            path = Path(at) / name
            mode, inside = path.lstat().st_mode, path.relative_to(directory).as_posix()
            if stat.S_ISLNK(mode):
                others[inside] = "a symbolic link"
            elif stat.S_ISREG(mode):
                files.add(inside)
            elif not stat.S_ISDIR(mode):
                others[inside] = "no plain file"
    return files, others


def _read(path: Path, read: Callable[[int], None] | None) -> str:
    """`sha256` that tells how far it is."""
    if read is None:
        return sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            read(len(chunk))
    return digest.hexdigest()


# --- writing an artifact -----------------------------------------------------------------------------------------


class Artifact:
    """An artifact being written, in `<directory>.partial`, until `publish`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.partial = directory.with_name(directory.name + ".partial")
        self.started = time.monotonic()
        self.rows: Rows | None = None
        self.metrics: dict[str, Any] = {}
        self.tokens = 0
        self.quarantined: Counter[str] = Counter()  # rows by reason
        self._quarantine: columns.Writer[Quarantined] | None = None

    def begin(self) -> None:
        """Make an empty directory to write into; whatever a killed process left there goes."""
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)

    def path(self, name: str) -> Path:
        """Where a file or directory of this artifact is to be written."""
        return self.partial / name

    def writer(self, name: str, record: type[Row]) -> columns.Writer[Row]:
        """Writes rows as `<name>-00000.parquet` and so on, as they come; to be closed."""
        return columns.Writer(lambda shard: self.path(f"{name}-{shard:05d}.parquet"), record, SHARD_ROWS)

    def write_rows(self, name: str, record: type[Row], rows: Iterable[Row]) -> int:
        """Write rows as `<name>-00000.parquet` and so on, as they come; returns their number."""
        with self.writer(name, record) as writer:
            writer.extend(rows)
        return writer.rows

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON file."""
        self.path(name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def quarantine(self, row_id: str, reason: str, detail: str = "") -> None:
        """Set a row aside with a short, countable reason."""
        if self._quarantine is None:
            self._quarantine = self.writer("quarantine", Quarantined)
        self.quarantined[reason] += 1
        self._quarantine.add(Quarantined(row_id, reason, detail))

    def contract(self, unit: str, rows_in: int, rows_out: int) -> None:
        """State how many units went in and came out; the difference must have been quarantined.

        Raises:
            pydantic.ValidationError: the numbers do not add up (a bug, not bad input).
        """
        self.rows = Rows(unit=unit, rows_in=rows_in, rows_out=rows_out, quarantined=dict(self.quarantined))

    def publish(self, iteration: int, stage: str, ingredients: dict[str, Any], environment: dict[str, str]) -> Manifest:
        """Write the manifest, flush everything to disk, and make the artifact visible in one rename."""
        if self.rows is None:
            raise RuntimeError(f"stage {stage} stated no row contract")
        if self._quarantine is not None:
            self._quarantine.close()
        files = sorted(p for p in self.partial.rglob("*") if p.is_file())
        for path in files:
            fsync(path)
        manifest = Manifest(
            iteration=iteration,
            stage=stage,
            key=key_of(ingredients),
            ingredients=ingredients,
            outputs=[
                Output(path=p.relative_to(self.partial).as_posix(), bytes=p.stat().st_size, sha256=sha256(p))
                for p in files
            ],
            rows=self.rows,
            metrics=self.metrics,
            environment=environment,
            seconds=round(time.monotonic() - self.started, 3),
            tokens=self.tokens,
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        text = manifest_text(manifest)
        write_atomically(self.partial / "manifest.json", text)
        self._reveal()
        return Manifest.model_validate_json(text)

    def link(self, published: Path, manifest: Manifest) -> int:
        """Publish the files of another artifact as this one: hard links, copies where the file system has none.

        What `selfimprove gc` removed there is removed here too, and the note of it comes along.

        Returns:
            How many files were copied.

        Raises:
            FileNotFoundError: the other one went away meanwhile, or is not what this manifest says.
        """
        self.begin()
        copied, removed = 0, collected_outputs(published, manifest)
        note = [collected.FILE] if removed else []
        for name in [*(o.path for o in manifest.outputs if o.path not in removed), *note, "manifest.json"]:
            target = self.path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(published / name, target)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or too many links
                shutil.copyfile(published / name, target)
                fsync(target)
                copied += 1
        if read_manifest(self.partial) != manifest or missing_outputs(self.partial, manifest):
            raise FileNotFoundError(f"{published} changed while it was linked")
        self._reveal()
        return copied

    def receive(self, text: str) -> Manifest:
        """Publish the files that were brought here from elsewhere under that manifest.json; each is flushed already.

        Raises:
            UserError: they are not what the manifest says, as far as their sizes tell, or it is damaged.
        """
        write_atomically(self.partial / "manifest.json", text)
        manifest = read_manifest(self.partial)
        missing = missing_outputs(self.partial, manifest) if manifest else ["manifest.json"]
        if manifest is None or missing:
            raise UserError(f"{self.partial / missing[0]} is missing or was altered", "the same command again")
        self._reveal()
        return manifest

    def _reveal(self) -> None:
        """Flush the folders and make the artifact visible in one rename."""
        for folder in [self.partial, *(p for p in self.partial.rglob("*") if p.is_dir())]:
            fsync(folder)
        self.partial.rename(self.directory)
        fsync(self.directory.parent)

    def discard(self) -> None:
        """Leave nothing half-written behind."""
        if self._quarantine is not None:
            with contextlib.suppress(OSError):  # on a full disk
                self._quarantine.abandon()
        shutil.rmtree(self.partial, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW  # a link left there must not lead out of the run
    try:
        with open(os.open(temporary, flags, 0o666), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # a full disk: what is torn goes
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def fsync(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the run -----------------------------------------------------------------------------------------------------


class State(pydantic.BaseModel):
    """What the writer of a run last said; a dead process id means that it was killed."""

    state: Literal["running", "done", "failed", "stopped"]
    pid: int
    process_started: float
    host: str
    iteration: int = 0
    stage: str = ""
    error: str = ""


class Run:
    """The directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.recipe_file = path / "recipe.toml"
        self.locked = False  # by this object

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.recipe_file.is_file()

    def iteration(self, number: int) -> Path:
        """The directory of an iteration; 0 holds the base model's evaluation."""
        return self.path / f"iter-{number:03d}"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the writer's lock.

        Raises:
            UserError: another process writes this run; says which and since when.
        """
        with locks.held(self.path, f"run '{self.name}'", f"selfimprove status {self.name}"):
            self.locked = True
            try:
                yield
            finally:
                self.locked = False

    def holder(self) -> locks.Holder | None:
        """Who writes the run now; None where nobody is known to."""
        return locks.holder(self.path)

    def sweep(self) -> None:
        """Remove what killed writers left half-written; the lock is held, so no one else writes there."""
        for pattern in ("*.tmp", ".tmp*"):  # ours, and safetensors' own
            for path in (self.path / "cache").rglob(pattern):
                path.unlink(missing_ok=True)
        for path in self.path.glob(".*.tmp"):  # a link that was about to take the place of the old one
            path.unlink(missing_ok=True)

    def write_state(self, state: str, iteration: int = 0, stage: str = "", error: str = "") -> None:
        """Say what the writer is doing."""
        process = psutil.Process()
        said = State.model_validate(
            {
                "state": state,
                "pid": process.pid,
                "process_started": process.create_time(),
                "host": socket.gethostname(),
                "iteration": iteration,
                "stage": stage,
                "error": error,
            }
        )
        write_atomically(self.path / "state.json", said.model_dump_json(indent=1) + "\n")

    def read_state(self) -> State | None:
        """What the writer last said; "running" only while that very process lives (on this host)."""
        try:
            if not os.path.lexists(self.path / "state.json"):
                return None
            state = State.model_validate(textfile.parse_json(textfile.read(self.path / "state.json")))
        except (UserError, ValueError):
            return State(state="stopped", pid=0, process_started=0, host="", error="state.json cannot be read")
        if state.state == "running" and state.host == socket.gethostname() and not _alive(state):
            return state.model_copy(update={"state": "stopped", "error": "the process was killed"})
        return state

    def about(self) -> dict[str, Any]:
        """The content of run.json; empty before the run exists.

        Raises:
            UserError: it is damaged.
        """
        path = self.path / "run.json"
        if not os.path.lexists(path):
            return {}
        hint = f"put back a copy, or move it away: {self.name} goes on without what it says of the beginning"
        try:
            found = textfile.parse_json(textfile.read(path, hint))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {textfile.why(error)}", hint) from None
        if not isinstance(found, dict):
            raise UserError(f"{path} is damaged: no JSON object", hint)
        for name, kind in (("revision", str), ("created", str), ("command", list), ("environment", dict)):
            if name in found and not isinstance(found[name], kind):
                raise UserError(f"{path} is damaged: {name} is {found[name]!r}", hint)
        return found

    def point(self, link: str, iteration: int) -> None:
        """Let `latest` or `best` point at an iteration."""
        if (self.path / link).is_symlink() and (self.path / link).readlink() == Path(f"iter-{iteration:03d}"):
            return
        temporary = self.path / f".{link}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"iter-{iteration:03d}")
        temporary.replace(self.path / link)


def _alive(state: State) -> bool:
    try:
        started: float = psutil.Process(state.pid).create_time()
        return abs(started - state.process_started) < 1
    except psutil.Error:
        return False
