"""A rank that is not the driver's: carries out shards, sleeps and trains when the board says so, until the run ends."""

import json
import sys
import threading
import time
import traceback
from pathlib import Path

import msgspec

from selfimprove import interrupts, recipe
from selfimprove.engine import Engines
from selfimprove.errors import UsageError, UserError
from selfimprove.execution import board
from selfimprove.execution.carry import carry_out
from selfimprove.execution.inline import rest
from selfimprove.execution.ranks import rank_and_world
from selfimprove.execution.shard import Work, asked

FASTEST, SLOWEST = 0.02, 1.0  # seconds between two looks at the board
PATIENCE = 1800.0  # seconds that a rank waits for a driver
IDLE = 300.0  # where the run is done, and a driver would only come for further rounds


def follow(run: Path) -> None:
    """Serve the driver of a run until it ends; another one that comes after a death is served, too.

    Raises:
        KeyboardInterrupt: the user asked this rank to stop; what it answered is kept.
        UserError: no driver comes, or this machine cannot serve.
    """
    place = rank_and_world()
    if place.rank == 0:
        raise UsageError(
            "this is rank 0, which drives the run", "selfimprove iterate RECIPE, or selfimprove resume RUN"
        )
    _Follower(run, place.rank).follow()


class _Follower:
    def __init__(self, run: Path, rank: int) -> None:
        self._run, self._rank = run, rank
        self._board = run / board.FOLDER
        self._ear = board.Ear(self._board / board.DRIVER, board.Session)
        self._user = False  # asked to stop
        self._joined: set[tuple[Path, int]] = set()  # trainings

    def follow(self) -> None:
        with interrupts.Interrupts(self._asked) as self._stop:
            session = self._await("")
            voice = board.Voice(self._board / f"rank-{self._rank}", board.Report(session.id, slept=session.sleep))
            over = threading.Event()
            threading.Thread(target=self._watch, args=(over,), daemon=True).start()
            try:
                with Engines(self._run / "logs" / f"rank-{self._rank}.log") as engines:
                    self._serve(session, voice, engines)
            except UserError as error:
                voice.say(failed=error.message, hint=error.hint)
                raise
            except Exception as error:
                traceback.print_exc()
                voice.say(failed=f"{type(error).__name__}: {error}", hint="its own output says more")
                raise
            finally:
                over.set()
                self._release()
                voice.close(remove=not voice.said.failed)

    def _serve(self, session: board.Session, voice: "board.Voice[board.Report]", engines: Engines) -> None:
        pause = FASTEST
        self._say(f"follows the driver of {self._run}")
        self._release()
        while True:
            if self._user:
                raise KeyboardInterrupt
            now = self._ear.hear()
            if now and now.id == session.id and now.ended:
                return self._say("the driver has ended")
            if now is None or now.id != session.id or self._ear.silence > board.LOST:
                session = self._await(session.id)
                voice.say(session=session.id, slept=session.sleep)
                continue
            try:
                moved = self._step(now, voice, engines)
            except KeyboardInterrupt:
                if self._user:
                    raise
                moved = False
            self._stop.pending = self._user
            if not moved:
                time.sleep(pause)
            pause = FASTEST if moved else min(2 * pause, SLOWEST)

    def _step(self, session: board.Session, voice: "board.Voice[board.Report]", engines: Engines) -> bool:
        """Do the next thing that there is to do; whether there was one."""
        machine = recipe.Machine.model_validate_json(session.machine)
        if session.sleep > voice.said.slept:
            rest(engines, machine, msgspec.msgpack.decode(session.work, type=Work))
            voice.say(slept=session.sleep)
            return True
        if session.stop:
            return False
        if self._rank < machine.nodes and self._trained(machine):
            return True
        if (taken := board.take(self._board, self._rank)) is None:
            return False
        one, folder = taken
        try:
            work, shard = asked(folder, one.shard)
        except FileNotFoundError:  # damaged, or done by another: the driver looks
            one.path.unlink(missing_ok=True)
            return True
        voice.say(shard=one.shard, answered=0)
        told = time.monotonic()

        def answered(count: int) -> None:
            nonlocal told
            if time.monotonic() - told > board.BEAT:
                told = time.monotonic()
                voice.say(answered=count)

        try:
            carry_out(engines, machine, folder, work, shard, answered)
        except BaseException:
            board.give_back(one, self._rank)
            raise
        finally:
            voice.say(shard="")
        one.path.unlink(missing_ok=True)
        return True

    def _trained(self, machine: recipe.Machine) -> bool:
        """Take part in a training that the driver has begun."""
        from selfimprove.training import launch

        for path in self._run.glob("scratch/*/**/job.json"):
            try:
                attempt = (path, path.stat().st_mtime_ns)
                if attempt in self._joined or "attempt" not in json.loads(path.read_text(encoding="utf-8")):
                    continue
            except FileNotFoundError:
                continue
            self._joined.add(attempt)
            try:
                launch.join(path, machine, self._rank)  # type: ignore[attr-defined, unused-ignore]
            except UserError as error:  # the driver's fails as well, and it decides
                self._say(f"{error.message}; {error.hint}")
            return True
        return False

    def _await(self, known: str) -> board.Session:
        """A driver that lives, and is not the one that is gone.

        Raises:
            UserError: none comes.
        """
        began, said, pause = time.monotonic(), False, FASTEST
        while True:
            if self._user:
                raise KeyboardInterrupt
            session = self._ear.hear()
            if session and not session.ended and self._ear.silence < board.LOST:
                return session
            if not said and time.monotonic() - began > board.BEAT:
                said = True
                self._say(f"waits for a driver: selfimprove iterate or resume {self._run.name}, as rank 0")
            patience = IDLE if self._is_done() else PATIENCE
            if time.monotonic() - began > patience:
                if patience == IDLE:
                    raise UserError(f"the run {self._run} is done, and no driver has come", "selfimprove status RUN")
                raise UserError(
                    f"no driver of {self._run} for {patience / 60:.0f} minutes",
                    f"start rank 0: selfimprove iterate RECIPE --run {self._run.name}; --runs says where runs lie",
                )
            time.sleep(pause := min(2 * pause, SLOWEST))

    def _is_done(self) -> bool:
        try:
            return bool(json.loads((self._run / "state.json").read_text(encoding="utf-8")).get("state") == "done")
        except (FileNotFoundError, ValueError):
            return False

    def _watch(self, over: threading.Event) -> None:
        """Stop what is under way where the driver says so."""
        ear = board.Ear(self._board / board.DRIVER, board.Session)
        while not over.wait(board.BEAT / 4):
            session = ear.hear()
            if session and (session.stop or session.ended):
                self._stop.pending = True

    def _release(self) -> None:
        """Let others have what an earlier process of this rank was at."""
        for one in board.shown(self._board):
            if one.taken and one.rank == self._rank:
                board.give_back(one, self._rank)

    def _asked(self) -> None:
        self._user = True
        self._say("finishes the answers that it has begun")

    def _say(self, sentence: str) -> None:
        print(f"rank {self._rank}: {sentence}", file=sys.stderr, flush=True)
