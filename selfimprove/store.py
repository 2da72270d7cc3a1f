"""The run directory: artifacts that are there whole or not at all, manifests, keys, the lock.

A stage writes into `<stage>.partial/`; `publish` writes the manifest last and renames the directory. Published
means immutable. A key is the hash of readable ingredients, so that a difference can be named.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
import time
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import filelock
import psutil
import pydantic

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


def arrow_schema(record: type) -> Any:
    """The Arrow schema of a record type of records.py."""
    import pyarrow as pa

    scalars = {str: pa.string(), int: pa.int64(), float: pa.float64()}

    def arrow(annotation: Any) -> Any:
        if annotation in scalars:
            return scalars[annotation]
        if typing.is_typeddict(annotation):
            return pa.struct([pa.field(k, arrow(v)) for k, v in typing.get_type_hints(annotation).items()])
        if typing.get_origin(annotation) is list:
            return pa.list_(arrow(typing.get_args(annotation)[0]))
        if typing.get_origin(annotation) is types.UnionType:
            return arrow(next(a for a in typing.get_args(annotation) if a is not type(None)))
        raise TypeError(f"{record.__name__}: no Arrow type for {annotation}")

    return pa.schema([pa.field(k, arrow(v)) for k, v in typing.get_type_hints(record).items()])


def read_rows(directory: Path, name: str, record: type[Row]) -> list[Row]:
    """All rows of the shards `<name>-*.parquet` of a published artifact, in order."""
    import pyarrow.parquet as pq

    rows: list[Row] = []
    for shard in sorted(directory.glob(f"{name}-[0-9]*.parquet")):
        rows += [record(**row) for row in pq.read_table(shard, schema=arrow_schema(record)).to_pylist()]
    return rows


def read_json(path: Path) -> Any:
    """The content of a JSON file of a published artifact."""
    return json.loads(path.read_text(encoding="utf-8"))


# --- manifests ---------------------------------------------------------------------------------------------------


class Output(pydantic.BaseModel):
    """One file of an artifact, path relative to it."""

    path: str
    bytes: int
    sha256: str


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


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a published artifact; None where nothing is published."""
    try:
        text = (directory / "manifest.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return Manifest.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{directory / 'manifest.json'} is damaged: {first['msg']}",
            f"move {directory} away, then selfimprove resume {directory.parent.parent.name}",
        ) from None


def missing_outputs(directory: Path, manifest: Manifest) -> list[str]:
    """The files of an artifact that are gone or of another size: what can be seen without reading them."""
    return [
        output.path
        for output in manifest.outputs
        if not (path := directory / output.path).is_file() or path.stat().st_size != output.bytes
    ]


def broken_outputs(directory: Path, manifest: Manifest) -> Iterator[str]:
    """The files of an artifact that are missing, altered, or not in its manifest, each as one sentence."""
    for output in manifest.outputs:
        path = directory / output.path
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != output.bytes or sha256(path) != output.sha256:
            yield f"{path} differs from its manifest"
    if key_of(manifest.ingredients) != manifest.key:
        yield f"{directory / 'manifest.json'} has a key that is not the hash of its ingredients"
    listed = {output.path for output in manifest.outputs} | {"manifest.json"}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        if path.relative_to(directory).as_posix() not in listed:
            yield f"{path} is not in its manifest"


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
        self.quarantined: list[Quarantined] = []

    def begin(self) -> None:
        """Make an empty directory to write into; whatever a killed process left there goes."""
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)

    def path(self, name: str) -> Path:
        """Where a file or directory of this artifact is to be written."""
        return self.partial / name

    def write_rows(self, name: str, record: type[Row], rows: Iterable[Row]) -> int:
        """Write rows as `<name>-00000.parquet` and so on; returns their number."""
        import itertools

        import pyarrow as pa
        import pyarrow.parquet as pq

        schema, total, iterator = arrow_schema(record), 0, iter(rows)
        for shard in itertools.count():
            chunk = list(itertools.islice(iterator, SHARD_ROWS))
            if not chunk and shard:
                return total
            table = pa.Table.from_pylist([dataclasses.asdict(row) for row in chunk], schema=schema)  # type: ignore[call-overload]
            pq.write_table(table, self.path(f"{name}-{shard:05d}.parquet"), compression="zstd")
            total += len(chunk)
        raise AssertionError("unreachable")

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON file."""
        self.path(name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def quarantine(self, row_id: str, reason: str, detail: str = "") -> None:
        """Set a row aside with a short, countable reason."""
        self.quarantined.append(Quarantined(row_id, reason, detail))

    def contract(self, unit: str, rows_in: int, rows_out: int) -> None:
        """State how many units went in and came out; the difference must have been quarantined.

        Raises:
            pydantic.ValidationError: the numbers do not add up (a bug, not bad input).
        """
        counts: dict[str, int] = {}
        for row in self.quarantined:
            counts[row.reason] = counts.get(row.reason, 0) + 1
        self.rows = Rows(unit=unit, rows_in=rows_in, rows_out=rows_out, quarantined=counts)

    def publish(self, iteration: int, stage: str, ingredients: dict[str, Any], environment: dict[str, str]) -> Manifest:
        """Write the manifest, flush everything to disk, and make the artifact visible in one rename."""
        if self.rows is None:
            raise RuntimeError(f"stage {stage} stated no row contract")
        if self.quarantined:
            self.write_rows("quarantine", Quarantined, self.quarantined)
        files = sorted(p for p in self.partial.rglob("*") if p.is_file())
        for path in files:
            _fsync(path)
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
        write_atomically(self.partial / "manifest.json", manifest.model_dump_json(indent=1) + "\n")
        self._reveal()
        return manifest

    def link(self, published: Path, manifest: Manifest) -> None:
        """Publish the files of another artifact as this one: hard links, copies where the file system has none.

        Raises:
            FileNotFoundError: the other one went away meanwhile, or is not what this manifest says.
        """
        self.begin()
        for name in [*(output.path for output in manifest.outputs), "manifest.json"]:
            target = self.path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(published / name, target)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or too many links
                shutil.copyfile(published / name, target)
                _fsync(target)
        if read_manifest(self.partial) != manifest or missing_outputs(self.partial, manifest):
            raise FileNotFoundError(f"{published} changed while it was linked")
        self._reveal()

    def _reveal(self) -> None:
        """Flush the folders and make the artifact visible in one rename."""
        for folder in [self.partial, *(p for p in self.partial.rglob("*") if p.is_dir())]:
            _fsync(folder)
        self.partial.rename(self.directory)
        _fsync(self.directory.parent)

    def discard(self) -> None:
        """Leave nothing half-written behind."""
        shutil.rmtree(self.partial, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _fsync(path: Path) -> None:
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
        self._lock = filelock.FileLock(path / ".lock", timeout=0)
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
            UserError: another process writes this run.
        """
        try:
            self._lock.acquire()
        except filelock.Timeout:
            state = self.read_state()
            who = f" by process {state.pid} on {state.host}" if state else ""
            raise UserError(f"run '{self.name}' is being written{who}", f"selfimprove status {self.name}") from None
        self.locked = True
        try:
            yield
        finally:
            self.locked = False
            self._lock.release()

    def sweep(self) -> None:
        """Remove what killed writers left half-written in the cache; the lock is held, so no one else writes there."""
        for pattern in ("*.tmp", ".tmp*"):  # ours, and safetensors' own
            for path in (self.path / "cache").rglob(pattern):
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
            state = State.model_validate_json((self.path / "state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, pydantic.ValidationError):
            return None
        if state.state == "running" and state.host == socket.gethostname() and not _alive(state):
            return state.model_copy(update={"state": "stopped", "error": "the process was killed"})
        return state

    def about(self) -> dict[str, Any]:
        """The content of run.json; empty before the run exists."""
        try:
            found: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
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
