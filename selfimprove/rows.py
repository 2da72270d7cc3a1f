"""Rows of published artifacts by kind, filtered and streamed: DuckDB reads the Parquet files, never all at once.

A filter is an SQL expression, as in the Hugging Face hub's dataset viewer, which runs it in DuckDB too. It is parsed
as one expression, so it cannot be a statement; the database behind it can read the run's directory and nothing
else, write nowhere, and load no extension.
"""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from selfimprove.errors import UserError
from selfimprove.plan import Step
from selfimprove.store import Manifest, Run, intact, read_manifest

SHARD = re.compile(r"(.+)-\d{5}\.parquet")
MAIN = {  # the kind of rows that a stage is mostly asked for
    "synthesize": "prompts",
    "generate": "generations",
    "improve": "refinements",
    "discriminate": "verdicts",
    "label": "pairs",
    "train": "losses",
    "evaluate": "samples",
    "control-evaluate": "samples",
    "sft-evaluate": "samples",
}
DERIVED = {  # by name: the columns it needs, and what it is
    "margin": (("chosen_score", "rejected_score"), "chosen_score - rejected_score"),
    "chosen_tokens": (("chosen_token_ids",), "len(chosen_token_ids)"),
    "rejected_tokens": (("rejected_token_ids",), "len(rejected_token_ids)"),
    "tokens": (("token_ids",), "len(token_ids)"),
    "mean_logp": (("logprobs",), "list_avg(logprobs)"),
}
HIDDEN = ("prompt_token_ids", "token_ids", "logprobs", "chosen_token_ids", "rejected_token_ids")  # long and unreadable
MEMORY = "512MB"  # that DuckDB may take
BATCH = 1_024  # rows handed over at a time


class Shards(NamedTuple):
    """The files that hold one kind of rows in one artifact, relative to the run."""

    step: Step
    files: list[str]


def published(run: Run, steps: Iterable[Step]) -> Iterator[tuple[Step, Manifest]]:
    """The artifacts that are there, in order; one being written is not."""
    for step in steps:
        if manifest := read_manifest(run.path / step.directory):
            yield step, manifest


def kinds(run: Run, steps: Iterable[Step]) -> dict[str, list[Shards]]:
    """What kinds of rows the published artifacts of these steps hold, and where."""
    found: dict[str, list[Shards]] = {}
    for step, manifest in published(run, steps):
        own: dict[str, list[str]] = {}
        for output in manifest.outputs:
            if shard := SHARD.fullmatch(output.path):
                own.setdefault(shard[1], []).append(f"{step.directory}/{output.path}")
        for kind, files in own.items():
            found.setdefault(kind, []).append(Shards(step, sorted(files)))
    return found


class Database:
    """DuckDB in memory, which can read these runs' directories and do nothing else to the machine."""

    def __init__(self, *runs: Run) -> None:
        import duckdb

        self.connection = duckdb.connect(
            ":memory:",
            config={
                "threads": "2",
                "memory_limit": MEMORY,
                "temp_directory": "",
                "allow_community_extensions": "false",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
                "python_enable_replacements": "false",
            },
        )
        inside = ", ".join(_quoted(str(run.path.resolve())) for run in runs)
        for setting in (
            f"allowed_directories = [{inside}]",
            "enable_external_access = false",
            "enable_progress_bar = false",  # which would stand among the rows on stdout
            "lock_configuration = true",
        ):
            self.connection.execute(f"SET {setting}")

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()


class Reader:
    """A run's rows.

    Args:
        run: whose.
        steps: of which artifacts.
        database: that may read the run.
    """

    def __init__(self, run: Run, steps: Sequence[Step], database: Database) -> None:
        self.run, self._connection = run, database.connection
        self.kinds = kinds(run, steps)

    def open(self, kind: str) -> "Rows":
        """The rows of a kind, with the artifact each is of as `stage` and with what can be derived.

        Raises:
            UserError: no such rows, or a file of them is damaged.
        """
        if kind not in self.kinds:
            known = ", ".join(sorted(self.kinds)) or "none yet"
            raise UserError(f"there are no rows of the kind '{kind}' here", f"kinds here: {known}")
        root = self.run.path.resolve()
        files = [str(intact(root / file)) for shards in self.kinds[kind] for file in shards.files]
        listed = ", ".join(_quoted(file) for file in files)
        read = f"read_parquet([{listed}], union_by_name = true, hive_partitioning = false, filename = '__file')"
        with self.whole():
            names: list[str] = self._connection.sql(f"SELECT * EXCLUDE (__file) FROM {read}").columns
            derived = [
                f"{what} AS {name}"
                for name, (needs, what) in DERIVED.items()
                if name not in names and all(need in names for need in needs)
            ]
            stage = r"regexp_extract(__file, '(iter-\d+/[^/]+)/[^/]+$', 1) AS stage"
            columns = ", ".join([stage, "* EXCLUDE (__file)", *derived])
            return Rows(self, kind, self._connection.sql(f"SELECT {columns} FROM {read}"))

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Turn what goes wrong with a file into words."""
        import duckdb

        broken = (
            duckdb.IOException,
            duckdb.InvalidInputException,
            duckdb.SerializationException,
            duckdb.InternalException,
        )
        try:
            yield
        except broken as error:
            raise UserError(
                f"run '{self.run.name}': rows cannot be read ({_first_line(error)})",
                f"selfimprove verify {self.run.name} names what is damaged; a stage set aside meanwhile reads so too",
            ) from None


class Rows:
    """Rows of one kind, not read yet."""

    def __init__(self, reader: Reader, kind: str, relation: Any) -> None:
        self._reader, self.kind, self.relation = reader, kind, relation

    @property
    def columns(self) -> list[str]:
        """Their columns, derived ones too."""
        return list(self.relation.columns)

    def equal(self, column: str, *values: str) -> "Rows":
        """Those whose column has one of the values."""
        import duckdb

        wanted = [duckdb.ConstantExpression(value) for value in values]
        return self._with(self.relation.filter(duckdb.ColumnExpression(column).isin(*wanted)))

    def of(self, column: str, name: str) -> "Rows":
        """Those whose column is the name, or begins with it and a slash: ids are structured."""
        import duckdb

        own = duckdb.ColumnExpression(column)
        inside = duckdb.FunctionExpression("starts_with", own, duckdb.ConstantExpression(f"{name}/"))
        return self._with(self.relation.filter((own == duckdb.ConstantExpression(name)) | inside))

    def where(self, expression: str) -> "Rows":
        """Those for which an SQL expression is true.

        Raises:
            UserError: it is none, or names a column that is not there.
        """
        import duckdb

        with self._meant(expression):
            return self._with(self.relation.filter(duckdb.SQLExpression(expression)), expression)

    def readable(self) -> "Rows":
        """Without the columns of token ids."""
        kept = [f'"{name}"' for name in self.columns if name not in HIDDEN]
        return self._with(self.relation.project(", ".join(kept)))

    def near(self, column: str, name: str, most: int = 3) -> list[str]:
        """The values of a column that look most like a name."""
        import duckdb

        alike = duckdb.FunctionExpression(
            "jaro_winkler_similarity", duckdb.ColumnExpression(column), duckdb.ConstantExpression(name)
        )
        found = self.relation.select(duckdb.ColumnExpression(column), alike.alias("alike")).distinct()
        found = found.filter("alike > 0.6").order(f'alike DESC, "{column}"').limit(most)
        return [row[0] for row in found.fetchall()]

    def count(self) -> int:
        """How many there are."""
        with self._run():
            return int(self.relation.aggregate("count(*)").fetchall()[0][0])

    def first(self, number: int) -> list[dict[str, Any]]:
        """The first rows."""
        return list(self._with(self.relation.limit(number)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All rows in their order, a batch in memory at a time."""
        with self._run():
            for batch in self.relation.to_arrow_reader(BATCH):
                yield from batch.to_pylist()

    # --- inside ------------------------------------------------------------------------------------------------------

    _expression: str | None = None

    def _with(self, relation: Any, expression: str | None = None) -> "Rows":
        rows = Rows(self._reader, self.kind, relation)
        rows._expression = expression or self._expression
        return rows

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        with self._reader.whole(), self._meant(self._expression or ""):
            yield

    @contextlib.contextmanager
    def _meant(self, expression: str) -> Iterator[None]:
        """Turn what is wrong with an expression into a sentence that names the columns."""
        import duckdb

        wrong = (
            duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException, duckdb.ConversionException,
            duckdb.OutOfRangeException, duckdb.PermissionException, duckdb.NotImplementedException,
            duckdb.SyntaxException, duckdb.TypeMismatchException, duckdb.OutOfMemoryException,
        )  # fmt: skip
        try:
            yield
        except wrong as error:
            raise self._told(expression, _first_line(error)) from None
        except duckdb.InvalidInputException as error:
            if "xpression" not in str(error):
                raise
            raise self._told(expression, _first_line(error)) from None

    def _told(self, expression: str, said: str) -> UserError:
        hint = f"columns: {', '.join(self.columns)}"
        if missing := re.match(r'Referenced column "(.+)" not found', said):
            said = f"{self.kind} have no column '{missing[1]}'"
            if near := difflib.get_close_matches(missing[1], self.columns, 1):
                hint = f"is it {near[0]}? {hint}; texts stand in single quotes"
        return UserError(f'--where "{expression}": {said}', hint)


def main_kind(step: Step | None, there: Mapping[str, Any]) -> str:
    """The kind of rows that is meant where none is named: a stage's own, else pairs.

    Raises:
        UserError: the stage holds no rows, or none that stands out.
    """
    if step is None:
        return "pairs"
    name = MAIN.get(step.name.partition("-")[2])
    if name is None:
        raise UserError(
            f"{step.directory} has no rows of its own to filter",
            f"--rows KIND, one of {', '.join(sorted(there))}" if there else "choose another stage",
        )
    return name


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return re.sub(r"^[A-Za-z -]+ Error: ", "", text).rstrip("!")
