"""Judging answers while the others of their round are being written, before the stage label begins."""

import queue
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from selfimprove import columns, interrupts, judges, recipe
from selfimprove.errors import UserError
from selfimprove.interrupts import Interrupts, Stop
from selfimprove.records import Generation
from selfimprove.stages.answers import OtherOrder, of_round
from selfimprove.stages.io import StageIO
from selfimprove.stages.judging import Judging

TICK = 0.2  # seconds between two looks at what is awaited
INSISTS = 5.0  # seconds that a second Ctrl-C waits for what is under way to be booked
ROWS = 256  # of a file that answers wait in
AWAITED = "the judge answers what it has been asked"


def can_begin(writing: recipe.Section, following: recipe.Section) -> bool:
    """Whether the answers that a stage writes can be judged, by label that follows, while it writes them; by settings.

    The judge may not need the devices that write, and a prompt's answers have to come together.
    """
    if not isinstance(following, recipe.Label) or following.judge is None or following.acquire:
        return False
    by_prompt = isinstance(writing, recipe.Improve)
    if isinstance(writing, recipe.Generate):
        by_prompt = not (writing.n and writing.initial_n) and not writing.splice
    return by_prompt and judges.works_elsewhere(following.judge)


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
        except Exception:  # of the judge: where it is no passing one, label fails of it, in the main thread
            print("the judge failed while answers were being written; label asks it again", file=sys.stderr)
            traceback.print_exc()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _judge(self) -> None:
        answers = of_round(self._io, self._section.judge, None)
        if not answers.aligned:
            return
        judging = Judging(self._io, self._section.judge, lambda: self._rows)
        for window in answers.windows(self._arriving()):
            judging.find(window.candidates)
