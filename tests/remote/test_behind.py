"""Pushes behind the stages: waited for at the end, told of where they fail, ended by a second Ctrl-C."""

import threading
import time
from pathlib import Path

import pytest

from selfimprove.errors import UserError
from selfimprove.remote import moving
from selfimprove.remote.behind import Behind
from selfimprove.remote.mirror import Mirror
from tests.remote.helpers import STAGES, begin, check_readers, mirrored, nothing


def two_published(tmp_path: Path) -> Mirror:
    (tmp_path / "store").mkdir()
    return mirrored(str(tmp_path / "store"), begin(tmp_path / "here/run", STAGES[:2]))


def test_a_push_goes_on_behind_the_stages_and_is_waited_for(tmp_path, monkeypatch):
    kept, may, pushed = two_published(tmp_path), threading.Event(), []
    push = kept.push

    def slowly(directory, told):
        may.wait(60)
        pushed.append(directory)
        return push(directory, told)

    monkeypatch.setattr(kept, "push", slowly)
    with Behind(kept, nothing, nothing) as behind:
        for directory in STAGES[:2]:
            behind.push(directory)
        assert not pushed
        may.set()
    assert pushed == STAGES[:2]
    assert list(check_readers(str(tmp_path / "store"))) == STAGES[:2]


def drive(kept: Mirror, end: BaseException | None = None, progress=nothing, failed=nothing, wait: bool = False) -> None:
    """A run of two stages that ends so; `wait`: the second comes when the first push is over."""
    with Behind(kept, progress, failed) as behind:
        behind.push(STAGES[0])
        while wait and not behind._queue[0].done():
            time.sleep(0.01)
        if wait or not end:
            behind.push(STAGES[1])
        if end:
            raise end


def test_what_a_push_met_is_raised_at_the_next_stage_or_at_the_end(tmp_path, monkeypatch):
    kept, told, asked = two_published(tmp_path), [], []

    def fail(directory, progress):
        asked.append(directory)
        time.sleep(0.5)
        raise UserError("the store is gone")

    monkeypatch.setattr(kept, "push", fail)
    with pytest.raises(UserError, match="the store is gone"):
        drive(kept, AssertionError("the second stage went on"), failed=told.append, wait=True)
    assert told == []  # the run notes it with the stage
    with pytest.raises(UserError, match="the store is gone"):
        drive(kept, failed=told.append)
    assert told == ["the store is gone"]
    assert asked == STAGES[:1] * 2  # what comes after it is not tried
    with pytest.raises(ZeroDivisionError):  # what came first is told
        drive(kept, ZeroDivisionError(), failed=told.append)
    assert len(told) == 1


@pytest.mark.parametrize("end", [KeyboardInterrupt(), UserError("stop")])
def test_however_a_run_ends_what_is_published_is_still_pushed(end, tmp_path):
    kept = two_published(tmp_path)
    with pytest.raises(type(end)):
        drive(kept, end, wait=True)
    assert list(check_readers(str(tmp_path / "store"))) == STAGES[:2]


def test_a_second_interrupt_ends_the_pushes_at_once(tmp_path, monkeypatch):
    kept = two_published(tmp_path)
    write = moving.write

    def slow(target, chunks, moved):
        def slowly():
            for chunk in chunks:
                for _ in range(400):
                    time.sleep(0.05)
                    moved(1)
                yield chunk

        write(target, slowly() if target.name.endswith("safetensors") else chunks, moved)

    def again(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moving, "write", slow)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            drive(kept, progress=again)
        assert time.monotonic() - began < 10
    assert check_readers(str(tmp_path / "store")) == {}
    assert kept.push_all(nothing) == STAGES[:2]
