"""Asking the judge of a round, a window of answers at a time: a part of the stage label, and `Ahead` of it.

What a judge that takes long has found of a window is kept until the stage is published, by the hash of what it was
asked, so that it is asked once, whoever asks first: the stage, `Ahead`, or a process that was killed since.
"""

import contextlib
import hashlib
import itertools
import queue
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from selfimprove import columns, data, interrupts, judges, recipe
from selfimprove.errors import UserError
from selfimprove.execution import shard
from selfimprove.interrupts import Interrupts, Stop
from selfimprove.judges import Candidate, Opinion, Preference
from selfimprove.judges.pairing import Key, shares_won
from selfimprove.records import Generation, Verdict
from selfimprove.stages.answers import Answers, OtherOrder, window_size
from selfimprove.stages.io import StageIO
from selfimprove.store import iter_rows

TICK = 0.2  # seconds between two looks at what is awaited
INSISTS = 5.0  # seconds that a second Ctrl-C waits for what is under way to be booked
ROWS = 256  # of a file that answers wait in
AWAITED = "the judge answers what it has been asked"


class Findings(NamedTuple):
    """What a judge made of some candidates, in their order; and of two at a time, where it compares."""

    opinions: list[Opinion]
    preferences: Mapping[tuple[Key, Key], Preference]


class Judging:
    """The judge of a round.

    Args:
        io: of the stage label.
        choice: the judge; None = none is asked.
        total: candidates of all windows, as far as is known by now; for progress.
    """

    def __init__(self, io: StageIO, choice: recipe.Choice | None, total: Callable[[], int]) -> None:
        self._io, self._choice, self._total = io, choice, total
        self._before = self._window = 0  # candidates of earlier windows, and of the one under way
        if choice:
            io.judging.progress = self._progress
        self._folder = io.scratch / "judged" if choice and judges.works_elsewhere(choice) else None
        self.earlier = self._scored_before(choice) if choice and not judges.compares(choice) else {}

    def find(self, candidates: Sequence[Candidate]) -> Findings:
        """What the judge finds of candidates, those of a prompt side by side; asked for where it is not known."""
        self._window = len(candidates)
        try:
            return self._found(candidates)
        finally:
            self._before, self._window = self._before + self._window, 0

    def _found(self, candidates: Sequence[Candidate]) -> Findings:
        if self._folder is None:
            return self._asked(candidates)
        name = hashlib.sha256(msgspec.msgpack.encode(candidates)).hexdigest()[:32]
        path = self._folder / f"{name}.done"
        with contextlib.suppress(msgspec.DecodeError):  # of another version
            if (known := shard.read(path)) is not None:
                opinions, preferences = msgspec.msgpack.decode(known, type=_KEPT)
                return Findings(opinions, dict(preferences))
        found = self._asked(candidates)
        shard.write(path, msgspec.msgpack.encode([found.opinions, list(found.preferences.items())]))
        return found

    def _progress(self, what: str, done: int, total: int) -> None:
        """What is done of a window, as a part of all."""
        if self._window:
            done = self._before + self._window * done // max(1, total)
            total = max(self._total(), self._before + self._window)
        self._io.progress(what, done, total)

    def _asked(self, candidates: Sequence[Candidate]) -> Findings:
        if self._choice is None:
            return Findings([Opinion(None, "no judge asked")] * len(candidates), {})
        if judges.compares(self._choice):
            preferences = self._preferences(self._choice, candidates)
            won = shares_won(preferences)
            unknown = Opinion(None, "no readable comparison")
            return Findings([won.get(candidate.key, unknown) for candidate in candidates], preferences)
        return Findings(self._opinions(self._choice, candidates), {})

    def _scored_before(self, choice: recipe.Choice) -> dict[str, Opinion]:
        """The scores of golds that a judge which stays has given; a policy that judges itself is another each round."""
        if not judges.fixed(choice) or "earlier" not in self._io.inputs:
            return {}
        identity = judges.identity(choice)
        return {
            v.prompt_id: Opinion(v.score, v.reason, v.reply)
            for v in iter_rows(self._io.inputs["earlier"], "verdicts", Verdict)
            if v.source == "gold" and v.judge == identity and v.score is not None
        }

    def _opinions(self, choice: recipe.Choice, candidates: Sequence[Candidate]) -> list[Opinion]:
        """A score of each candidate; of a gold that was scored before, that score."""
        earlier = self.earlier
        if not earlier:
            return judges.bind(choice)(candidates, self._io.judging)
        before = [c.source == "gold" and c.prompt_id in earlier for c in candidates]
        new = [c for c, known in zip(candidates, before, strict=True) if not known]
        asked = iter(judges.bind(choice)(new, self._io.judging))
        return [earlier[c.prompt_id] if known else next(asked) for c, known in zip(candidates, before, strict=True)]

    def _preferences(self, choice: recipe.Choice, candidates: Sequence[Candidate]) -> dict[tuple[Key, Key], Preference]:
        """Every two answers of a prompt that differ, compared."""
        pairs = [
            (a, b)
            for _, group in itertools.groupby(candidates, key=lambda c: c.prompt_id)
            for a, b in itertools.combinations(list(group), 2)
            if a.text != b.text
        ]
        found = judges.bind_comparer(choice)(pairs, self._io.judging)
        return {(a.key, b.key): preference for (a, b), preference in zip(pairs, found, strict=True)}


_KEPT = tuple[list[Opinion], list[tuple[tuple[Key, Key], Preference]]]


class Ahead:
    """Asks the judge about answers while the others of their round are being written, in a thread of its own.

    The stage label, which comes next, finds what is kept. Whatever goes wrong here is met again there, so that it is
    said in one place. Answers wait in files: neither the writer nor a slower judge holds the other up. Nothing is begun
    before the first answer.

    Args:
        io: of the stage label; its inputs lack what is being written.
        section: the recipe's [label].
    """

    def __init__(self, io: StageIO, section: recipe.Label) -> None:
        self._io, self._section = io, section
        self._folder = io.scratch / "arriving"
        self._schema = columns.arrow_schema(Generation)
        self._held: list[Generation] = []
        self._files: queue.SimpleQueue[Path | OSError | None] = queue.SimpleQueue()  # None = no more
        self._count = self._rows = 0  # files, and rows that were handed over
        self._told = ("judging", 0, 0)
        self._show: Callable[[str, int, int], None] = lambda what, done, total: None
        self._stop, self._insists = Interrupts(lambda: None), False
        io.progress = self._progress
        self._thread = threading.Thread(target=self._work, name="judging ahead", daemon=True)
        self._begun = False

    def put(self, row: Generation) -> None:
        """Hand over an answer, in the order in which it is written."""
        if not self._begun:
            self._begin()
        self._held.append(row)
        if len(self._held) >= ROWS:
            self._pass_on()

    def finish(self, io: StageIO) -> None:
        """All answers are there: wait for what the judge finds of them, before the stage begins.

        Args:
            io: of the stage label, all inputs there; what the judge has cost goes on in it.

        Raises:
            KeyboardInterrupt: the user asked to stop.
        """
        if not self._begun:
            return
        self._pass_on()
        self._files.put(None)
        while self._thread.is_alive():
            self._thread.join(TICK)
            if self._told[2]:
                io.progress(*self._told)
        interrupts.check()
        self._show = io.progress
        io.judging = self._io.judging

    def stop(self) -> None:
        """Ask no more; what is under way is awaited, since it may be paid for, unless the user insists.

        Raises:
            KeyboardInterrupt: the user insists; what was under way is booked as paid.
        """
        self._stop.pending = True
        self._files.put(None)
        stop = Stop(AWAITED)
        try:
            while self._thread.is_alive():
                self._thread.join(TICK)
                stop.due()
        except KeyboardInterrupt:
            self._insists = True
            self._thread.join(INSISTS)
            raise

    def _begin(self) -> None:
        """Start the thread; here, since what is imported first in two threads at once may be there by half."""
        self._begun = True
        shutil.rmtree(self._folder, ignore_errors=True)  # of a process that was killed
        try:
            self._folder.mkdir(parents=True)
            self._io.chat  # noqa: B018
        except (UserError, OSError):
            return
        self._thread.start()

    def _pass_on(self) -> None:
        import pyarrow.parquet as pq

        if self._held and self._thread.is_alive():
            path = self._folder / f"{self._count}.parquet"
            self._count += 1
            self._rows += len(self._held)
            try:
                pq.write_table(columns.table(self._held, self._schema), path)
                self._files.put(path)
            except OSError as error:  # the judge goes no further here; the writer does
                self._files.put(error)
        self._held = []

    def _progress(self, what: str, done: int, total: int) -> None:
        if self._insists:
            raise KeyboardInterrupt
        self._told = (what, done, total)
        self._show(what, done, total)

    def _arriving(self) -> Iterator[Generation]:
        while (path := self._files.get()) is not None:
            if isinstance(path, OSError):
                raise path
            yield from columns.read(path, Generation, self._schema)
            path.unlink()
        interrupts.check()

    def _work(self) -> None:
        try:
            with self._stop:
                self._judge()
        except (KeyboardInterrupt, UserError, OSError, OtherOrder):
            pass  # the stage itself meets it again, or is not made
        except Exception:
            self._io.logs.mkdir(parents=True, exist_ok=True)
            with (self._io.logs / "judging.log").open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _judge(self) -> None:
        io, section = self._io, self._section
        golds = {seed.prompt_id: seed for seed in data.read_seeds(io.inputs["seeds"])} if "seeds" in io.inputs else {}
        tables = [(io.inputs[name], name) for name in ("generations", "refinements") if name in io.inputs]
        answers = Answers(tables, golds, None, io.chat.completion_ids, window_size(section.judge))
        if not answers.aligned:
            return
        judging = Judging(io, section.judge, lambda: self._rows)
        for window in answers.windows(self._arriving()):
            judging.find(window.candidates)
