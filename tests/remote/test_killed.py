"""Whoever is killed leaves nothing half, and the next one finishes it."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from selfimprove import store
from tests.remote.helpers import STAGES, begin, check_readers, mirrored, nothing, publish, pulled, tree


def push_and_die(address: str, run: store.Run, after: int, patch) -> bool:
    """Push in a child that kills itself at the `after`th step; whether it died so."""
    child = os.fork()
    if child == 0:
        try:
            patch(after)
            mirrored(address, run).push_all(nothing)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def die_in_a_folder(after: int) -> None:
    """Before and after each flush: between the flush of a file and that of its folder lies its rename."""
    left, fsync, lock = [after], os.fsync, threading.Lock()

    def flush(descriptor: int) -> None:
        with lock:
            for _ in range(2):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                fsync(descriptor)

    os.fsync = flush


def die_in_s3(after: int) -> None:
    import s3fs

    left, call = [after], s3fs.S3FileSystem._call_s3

    async def counted(self, method, *arguments, **more):
        changes = method in ("put_object", "delete_object")
        for moment in ("before", "after"):
            left[0] -= changes
            if changes and left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if moment == "before":
                answer = await call(self, method, *arguments, **more)
        return answer

    s3fs.S3FileSystem._call_s3 = counted


@pytest.mark.parametrize(("kind", "steps"), [("folder", 5), ("s3", 9)])
def test_a_push_that_is_killed_anywhere_shows_no_half_artifact_and_is_finished_by_the_next(
    kind, steps, request, tmp_path
):
    run = begin(tmp_path / "here/run", STAGES[:2])
    address = request.getfixturevalue("s3") if kind == "s3" else str(request.getfixturevalue("folder"))
    patch = {"folder": die_in_a_folder, "s3": die_in_s3}[kind]
    seen: set[int] = set()
    for after in range(1, 500, steps):
        died = push_and_die(f"{address}/{after}", run, after, patch) if kind == "s3" else None
        if kind == "folder":
            (Path(address) / str(after)).mkdir()
            died = push_and_die(f"{address}/{after}", run, after, patch)
        found = check_readers(f"{address}/{after}")
        seen.add(len(found))
        if not died:
            assert len(found) == 2
            break
        mirrored(f"{address}/{after}", run).push_all(nothing)
        assert list(check_readers(f"{address}/{after}")) == STAGES[:2]
        assert not list(Path(address, str(after)).glob("run/iter-*/*/*/**/*.half"))
        there = pulled(f"{address}/{after}", tmp_path / f"there-{after}")
        assert tree(there.path) == tree(run.path)
    else:
        raise AssertionError("it never ended by itself")
    assert seen == {0, 1, 2}


def test_a_pull_that_is_killed_anywhere_is_finished_by_the_next(folder, tmp_path):
    run = begin(tmp_path / "here/run", STAGES[:2])
    mirrored(str(folder), run).push_all(nothing)
    half = False
    for after in range(1, 500, 7):
        runs = tmp_path / f"there-{after}"
        child = os.fork()
        if child == 0:
            die_in_a_folder(after)
            pulled(str(folder), runs)
            os._exit(0)
        died = os.waitpid(child, 0)[1] != 0
        there = store.Run(runs / "run")
        for manifest in there.path.glob("iter-*/?-*/manifest.json"):
            if not manifest.parent.name.endswith(".partial"):
                whole = store.read_manifest(manifest.parent)
                assert not list(store.broken_outputs(manifest.parent, whole))
        half |= died and bool(list(there.path.glob("iter-*/*")))
        assert died or there.exists()
        if died and there.exists():  # nothing but the end can have been missing
            assert len(list(there.path.glob("iter-*/?-*/manifest.json"))) == 2
        pulled(str(folder), runs)
        assert tree(there.path) == tree(run.path)
        if not died:
            break
    assert half


def test_readers_beside_a_writer_never_see_half_an_artifact(folder, tmp_path):
    run, over, wrong, looks = begin(tmp_path / "here/run", STAGES[:1]), threading.Event(), [], [0]

    def look() -> None:
        while not over.is_set():
            try:
                check_readers(str(folder))
                looks[0] += 1
            except BaseException as error:
                wrong.append(error)
                return

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(1, 21):
            publish(run, f"iter-{number:03d}/5-evaluate", str(number))
            mirrored(str(folder), run).push_all(nothing)
            if number % 5 == 0:
                mirrored(str(folder), run).set_aside([f"iter-{number:03d}/5-evaluate"])
                shutil.rmtree(run.path / f"iter-{number:03d}")
    finally:
        over.set()
        reader.join()
    assert not wrong, wrong
    assert looks[0] > 5
    assert len(check_readers(str(folder))) == 17


def test_one_who_stops_a_push_leaves_nothing_published(folder, tmp_path):
    run = begin(tmp_path / "here/run", STAGES[:1])

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mirrored(str(folder), run).push_all(stop)
    assert check_readers(str(folder)) == {}
    assert mirrored(str(folder), run).push_all(nothing) == STAGES[:1]
