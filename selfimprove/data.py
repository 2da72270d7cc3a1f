"""The input files: seeds, held-out prompts, raw text; and the keywords drawn from them."""

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from selfimprove import columns, exchanges, jsonl, textfile
from selfimprove.errors import UserError
from selfimprove.records import Given, Gold, HeldOut, Seed

Row = TypeVar("Row", Seed, Gold, HeldOut, Given)
DEMO = Path(__file__).parent / "demo"
SHIPPED = {
    "demo:model": DEMO / "model",
    "demo:seeds": DEMO / "data" / "seeds.jsonl",
    "demo:seeds_bad_golds": DEMO / "data" / "seeds_bad_golds.jsonl",
    "demo:corpus": DEMO / "data" / "corpus.txt",
    "demo:heldout": DEMO / "data" / "heldout.jsonl",
    "demo:selection": DEMO / "data" / "selection.jsonl",
}

STOP_WORDS = frozenset(
    [
        "a",
        "about",
        "above",
        "after",
        "again",
        "all",
        "also",
        "am",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "because",
        "been",
        "before",
        "being",
        "below",
        "between",
        "both",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "doing",
        "down",
        "during",
        "each",
        "either",
        "every",
        "few",
        "for",
        "from",
        "further",
        "give",
        "given",
        "had",
        "has",
        "have",
        "having",
        "he",
        "her",
        "here",
        "hers",
        "him",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "just",
        "let",
        "like",
        "made",
        "make",
        "many",
        "may",
        "me",
        "might",
        "more",
        "most",
        "much",
        "must",
        "my",
        "no",
        "nor",
        "not",
        "now",
        "of",
        "off",
        "on",
        "once",
        "one",
        "only",
        "or",
        "other",
        "our",
        "out",
        "over",
        "own",
        "please",
        "put",
        "said",
        "same",
        "say",
        "says",
        "she",
        "should",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "to",
        "too",
        "under",
        "until",
        "up",
        "us",
        "use",
        "used",
        "using",
        "very",
        "was",
        "we",
        "well",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
        "within",
        "without",
        "word",
        "words",
        "would",
        "write",
        "you",
        "your",
    ]
)


TABLES = (".csv", ".tsv", ".xls", ".xlsx")


def locate(name: str, what: str, section: str = "data") -> Path:
    """The file that an entry of the recipe names, one of [data] where nothing else is said.

    Raises:
        UserError: no such file, or an unknown `demo:` name.
    """
    if name.startswith("demo:"):
        if name not in SHIPPED:
            raise UserError(f"{section}.{what}: nothing is shipped as '{name}'", f"shipped: {', '.join(SHIPPED)}")
        return SHIPPED[name]
    path = Path(name)
    if (found := textfile.there(name)) != "file":
        but = {"directory": ", but a directory", "else": ", but a pipe or a device"}.get(found, "")
        sentence = f"{section}.{what}: no file {path} in {Path.cwd()}{but}"
        raise UserError(sentence, f"{section}.{what} of the recipe names it")
    return path.resolve()


def read_seeds(path: Path) -> list[Seed]:
    """Seed prompts, with their gold answers where the file has them, in any form of `exchanges`."""
    return _checked([(where, seed) for where, seed, _ in _seeds(path)], path)


def read_golds(path: Path) -> list[Gold]:
    """Seed prompts, each with its gold answer.

    Raises:
        UserError: one has none.
    """
    rows = []
    for where, seed, column in _seeds(path):
        if seed.completion is None:
            sentence = f"{where}: no answer to its {column}, for example in field 'completion'"
            raise UserError(sentence, f"known: {exchanges.FORMS}")
        rows.append((where, Gold(seed.prompt_id, seed.prompt, seed.completion, seed.source)))
    return _checked(rows, path)


def _seeds(path: Path) -> Iterator[tuple[str, Seed, str]]:
    """Each with its place, and the column of its prompt."""
    for number, (where, row) in enumerate(_rows(path)):
        said = exchanges.of(row, where, "completion")
        seed = Seed(
            _id(row, where, f"seed-{number:05d}"),
            _text(*said.prompt, where),
            _text(*said.answer, where) if said.answer else None,
            _text("source", row["source"], where) if "source" in row else "",
        )
        yield where, seed, said.prompt[0]


def read_heldout(path: Path, what: str = "heldout") -> list[HeldOut]:
    """Held-out prompts, in any form of `exchanges`; those without an id are named by `what` and their number."""
    rows = []
    for number, (where, row) in enumerate(_rows(path)):
        said = exchanges.of(row, where, "answer")
        answer = _text(*said.answer, where) if said.answer else None
        rows.append((where, HeldOut(_id(row, where, f"{what}-{number:05d}"), _text(*said.prompt, where), answer)))
    return _checked(rows, path)


def read_pairs(path: Path) -> list[Given]:
    """Preferences in any form of `exchanges.preference`; those without an id are named by their number."""
    rows = []
    for number, (where, row) in enumerate(_rows(path)):
        said = exchanges.preference(row, where)
        prompt, chosen, rejected = (_text(*part, where) for part in said)
        source = _text("source", row["source"], where) if row.get("source") else ""  # our own pairs have an empty one
        pair_id = _id(row, where, f"pair-{number:05d}", ("id", "pair_id"))
        rows.append((where, Given(pair_id, prompt, chosen, rejected, source)))
    return _checked(rows, path)


def count(path: Path, *, as_lines: bool = False) -> int | None:
    """Rows of an input file, or its lines that are not empty; None of one that holds no rows, as a task's YAML.

    Raises:
        UserError: it cannot be read.
    """
    if as_lines:
        return len(read_paragraphs(path))
    if path.suffix in (".yaml", ".yml"):
        return None
    return sum(1 for _ in _rows(path))


def read_paragraphs(path: Path) -> list[str]:
    """The non-empty lines of the corpus."""
    lines = [line.strip() for line in textfile.read(path, "check data.corpus of the recipe").splitlines()]
    paragraphs = [line for line in lines if line]
    if not paragraphs:
        raise UserError(f"{path} has no text", "give a file with one paragraph a line (data.corpus)")
    return paragraphs


@functools.lru_cache(4_096)  # a prompt is folded for each thing that it is compared with
def fold(text: str) -> str:
    """The words of a text in lower case: prompts that fold alike count as the same prompt."""
    return " ".join(re.findall(r"\w+", text.lower()))


def keywords(text: str) -> list[str]:
    """The content words and numbers of a text in order of appearance: no stop words, no names, each once."""
    words = re.findall(r"(?<![\w'])([A-Za-z]{3,}|\d+)(?![\w'])", text)
    starts = set(re.findall(r"(?:^|[.!?:]\s+)([A-Z][a-z]+)", text))  # a capital there does not mean a name
    kept = (w.lower() for w in words if w in starts or not w[0].isupper())
    return list(dict.fromkeys(w for w in kept if w not in STOP_WORDS))


def draw_training_keywords(
    seed: Seed, others: Sequence[Seed], rng: random.Random, *, noise: bool = True
) -> list[str] | None:
    """Two keywords of the seed's prompt and one noise keyword of another seed's, shuffled (SynPO, section 3.1).

    Without `noise` three of its own. None where the prompt has too few, or no other has a foreign one.
    """
    own = keywords(seed.prompt)
    if not noise:
        return rng.sample(own, 3) if len(own) >= 3 else None
    order = rng.sample(others, len(others))
    foreign = ([w for w in keywords(other.prompt) if w not in own] for other in order)
    strange = next((words for words in foreign if words), None)
    if len(own) < 2 or strange is None:
        return None
    drawn = [*rng.sample(own, 2), rng.choice(strange)]
    rng.shuffle(drawn)
    return drawn


def draw_corpus_keywords(paragraphs: Sequence[Sequence[str]], rng: random.Random) -> list[str]:
    """Three keywords that occur together in one paragraph, given as its `keywords`."""
    for _ in range(1000):
        words = rng.choice(paragraphs)
        if len(words) >= 3:
            return rng.sample(words, 3)
    raise UserError("the corpus has hardly a paragraph with three keywords", "give data.corpus longer paragraphs")


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows with their places, of a JSON or a Parquet file; in Parquet a cell without a value is no column."""
    if path.suffix.lower() in TABLES:
        raise UserError(
            f"{path}: {path.suffix} files are not read",
            "write it as JSON lines or Parquet, for example with pandas:"
            " read_csv(...).to_json(..., orient='records', lines=True)",
        )
    if path.suffix != ".parquet":
        for line, row in jsonl.rows(path):
            yield f"{path}, line {line}", row
        return
    import pyarrow as pa

    with textfile.opened(path):
        pass  # whatever can be wrong with a file as such
    try:
        for number, cells in enumerate(columns.read_plain(path), 1):
            yield f"{path}, row {number}", {name: value for name, value in cells.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        why = (str(error).splitlines() or ["it cannot be read"])[0]
        raise UserError(f"{path} is no Parquet file, or a damaged one: {why}", "fetch it again") from None


def _id(row: Mapping[str, Any], where: str, default: str, names: Sequence[str] = ("id", "prompt_id")) -> str:
    for column in names:
        if column in row:
            value = row[column]
            return str(value) if type(value) is int else _text(column, value, where)
    return default


def _text(field: str, value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: field '{field}' must be a text that is not empty", "mend the row or remove it")
    if wrong := re.search("[\ud800-\udfff\0]", value):
        what = "a null byte" if wrong[0] == "\0" else f"half a character (\\u{ord(wrong[0]):04x})"
        raise UserError(
            f"{where}: field '{field}' holds {what} at place {wrong.start()}, and that is no text",
            "mend the row or remove it",
        )
    return value


def _checked(rows: list[tuple[str, Row]], path: Path) -> list[Row]:
    """The rows without their places; each has an id of its own, and there are two or more."""
    if len(rows) < 2:
        raise UserError(f"{path} holds {len(rows)} rows, at least 2 are needed", "one JSON object a line")
    seen: dict[str, str] = {}
    for where, row in rows:
        if row.prompt_id in seen:
            first = seen[row.prompt_id].rpartition(", ")[2]
            raise UserError(
                f"{where}: id '{row.prompt_id}' stands twice, first in {first}", "give each row an id of its own"
            )
        seen[row.prompt_id] = where
    return [row for _, row in rows]
