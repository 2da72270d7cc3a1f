"""The answers that a round labels, a window of prompts at a time: what several files hold of a prompt comes together.

Each file, and each source within it, goes through the prompts in the same order, so that they are read side by side and
a window is all that is held. Ids are looked at before; where the orders differ, all answers are held at once. One
source may still be arriving.
"""

import itertools
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from selfimprove import data, judges, recipe
from selfimprove.judges import Candidate
from selfimprove.records import Generation, Seed
from selfimprove.stages.io import StageIO
from selfimprove.stages.pairs import candidates
from selfimprove.store import iter_columns, iter_rows

CANDIDATES = 16_384  # of a window: judges that ask a model want many at once
SOONER = 512  # of a window: for judges that can begin while answers are being written
TOKENS = 4_000_000  # of a window's answers
STREAMS = 16  # read side by side
Group = tuple[str, list[Generation]]  # a prompt and its answers


class Window(NamedTuple):
    """Some prompts with all their answers."""

    candidates: list[Candidate]  # to be judged; those of a prompt side by side, the gold first
    prompt_ids: dict[str, list[int]]  # token ids of every prompt, also of those that are not judged


class Stream(NamedTuple):
    """Rows of a table that stand together and have one source, and the hash of each prompt's id in their order."""

    directory: Path
    name: str
    start: int
    stop: int
    hashes: "array[int]"

    def groups(self) -> Iterator[Group]:
        """The prompts and their answers."""
        return _groups(iter_rows(self.directory, self.name, Generation, self.start, self.stop))


class OtherOrder(RuntimeError):
    """Sources that are read side by side do not go through the prompts in one order."""


class Answers:
    """All answers of a round.

    Args:
        tables: (directory, name) of the files, in order.
        golds: the seeds by prompt_id.
        worth: the prompts that are judged; None = all.
        completion_ids: the token ids of an answer to a prompt.
        size: candidates of a window, about.
    """

    def __init__(
        self,
        tables: Sequence[tuple[Path, str]],
        golds: Mapping[str, Seed],
        worth: Container[str] | None,
        completion_ids: Callable[[str, str], list[int]],
        size: int,
    ) -> None:
        self._tables, self.golds, self._worth, self._completion_ids = tables, golds, worth, completion_ids
        self._size = size
        self._answered = {name for name, seed in golds.items() if seed.completion is not None}
        self._streams = list(_streams(tables))
        self.aligned = len(self._streams) <= STREAMS and _aligned([stream.hashes for stream in self._streams])
        self.prompts = self.candidates = 0  # to be judged
        if self.aligned and worth is None and not self._answered:
            self.prompts = len(self._streams[0].hashes) if self._streams else 0
            self.candidates = sum(stream.stop - stream.start for stream in self._streams)
        else:
            self._count()

    def _count(self) -> None:
        """Look at all ids, which are in some other order, or which golds and worthy prompts are told by."""
        known: set[str] = set()  # needed only where prompts come back
        for number, (prompt_id, rows) in enumerate(_runs(self._tables)):
            if self._worth is not None and prompt_id not in self._worth:
                continue
            self.candidates += rows
            if self.aligned:
                first = number < len(self._streams[0].hashes)
            else:
                first = prompt_id not in known
                known.add(prompt_id)
            if first:
                self.prompts += 1
                self.candidates += prompt_id in self._answered

    def windows(self, arriving: Iterable[Generation] = ()) -> Iterator[Window]:
        """All answers in order, the prompts in that of their first answers.

        Args:
            arriving: the answers of one more source, as they come; the tables must be aligned.

        Raises:
            OtherOrder: they are of prompts that the tables do not have, or come in another order.
        """
        rows: list[Generation] = []
        tokens = 0
        for _, group in self._side_by_side(arriving) if self.aligned else self._sorted():
            rows += group
            tokens += sum(len(row.token_ids) for row in group)
            if len(rows) >= self._size or tokens >= TOKENS:
                yield self._window(rows)
                rows, tokens = [], 0
        if rows:
            yield self._window(rows)

    def _window(self, rows: Iterable[Generation]) -> Window:
        found, prompt_ids = candidates(rows, self.golds, self._completion_ids)
        return Window([c for c in found if self._worth is None or c.prompt_id in self._worth], prompt_ids)

    def _side_by_side(self, arriving: Iterable[Generation]) -> Iterator[Group]:
        first, *others = (*(stream.groups() for stream in self._streams), _groups(arriving))
        heads = [next(other, None) for other in others]
        for prompt_id, rows in first:
            for k, head in enumerate(heads):
                if head and head[0] == prompt_id:
                    rows += head[1]
                    heads[k] = next(others[k], None)
            yield prompt_id, rows
        if any(heads):
            raise OtherOrder("answers to prompts that the first table does not have, or in another order")

    def _sorted(self) -> Iterator[Group]:
        by_prompt: dict[str, list[Generation]] = {}
        for directory, name in self._tables:
            for row in iter_rows(directory, name, Generation):
                by_prompt.setdefault(row.prompt_id, []).append(row)
        yield from by_prompt.items()


def of_round(io: StageIO, judge: recipe.Choice | None, worth: Container[str] | None) -> Answers:
    """The answers that the stage label is given, as far as they are there, with the golds."""
    seeds = data.read_seeds(io.inputs["seeds"]) if "seeds" in io.inputs else []
    tables = [(io.inputs[name], name) for name in ("generations", "refinements") if name in io.inputs]
    size = SOONER if judge and judges.works_elsewhere(judge) else CANDIDATES
    return Answers(tables, {seed.prompt_id: seed for seed in seeds}, worth, io.chat.completion_ids, size)


def _groups(rows: Iterable[Generation]) -> Iterator[Group]:
    return ((prompt_id, list(group)) for prompt_id, group in itertools.groupby(rows, lambda row: row.prompt_id))


def _runs(tables: Iterable[tuple[Path, str]]) -> Iterator[tuple[str, int]]:
    """Prompts of rows that stand together, and how many rows."""
    for directory, name in tables:
        ids = iter_columns(directory, name, ["prompt_id", "source"])
        for (prompt_id, _), group in itertools.groupby(ids):
            yield prompt_id, sum(1 for _ in group)


def _streams(tables: Iterable[tuple[Path, str]]) -> Iterator[Stream]:
    for directory, name in tables:
        stop = 0
        ids = iter_columns(directory, name, ["prompt_id", "source"])
        for _, rows in itertools.groupby(ids, lambda row: row[1]):
            start, hashes = stop, array("q")
            for prompt_id, group in itertools.groupby(row[0] for row in rows):
                hashes.append(hash(prompt_id))
                stop += sum(1 for _ in group)
            yield Stream(directory, name, start, stop, hashes)


def _aligned(streams: Sequence["array[int]"]) -> bool:
    """Whether the first has each prompt once, and all others go through some of them in the same order."""
    import numpy as np

    if not streams:
        return True
    first = np.array(streams[0])
    order = np.argsort(first)
    known = first[order]
    if (known[1:] == known[:-1]).any():
        return False
    for other in streams[1:]:
        wanted = np.array(other)
        found = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        if (known[found] != wanted).any() or (np.diff(order[found]) <= 0).any():
            return False
    return True
