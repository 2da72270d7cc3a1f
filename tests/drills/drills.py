"""The drills; each ends a run of ROWS rows in spite of a fault, and returns what it published beside the whole run."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from selfimprove.execution.shard import POISONED
from tests.drills.asking import prompts
from tests.drills.field import ROWS, Field, Outcome, Process, ended, place, published, said, until

SLOW = 0.004  # seconds for a row, where something is to happen meanwhile
LOST = 4.0  # seconds of silence after which a rank is dead
VICTIM = 1300  # number of the poisoned row


def finish(process: Process, seconds: float = 240.0) -> None:
    """It ends well."""
    assert process.wait(seconds) == 0, said(process)


def stopped(process: Process, field: Field, run: str, shards: int = 2) -> None:
    """Wait until some shards are done and another is begun."""
    until(lambda: len(field.done(run)) >= shards and field.parts(run), process)


def workers(process: Process, module: str) -> list[psutil.Process]:
    """The processes below this one that run a module."""
    return [one for one in psutil.Process(process.pid).children(recursive=True) if module in " ".join(one.cmdline())]


def by_two(field: Field, executor: str, run: str) -> None:
    """A run by two workers, or by two ranks, from beginning to end."""
    if executor == "static":
        driver, follower = field.drive(run, executor="static", environment=place(0, 2)), field.follow(run, 1, 2)
        with ended(driver, follower):
            finish(driver)
            finish(follower)
    else:
        with ended(driver := field.drive(run, executor=executor, workers=2)):
            finish(driver)


def nothing(field: Field, executor: str, began: float) -> Outcome:
    """No fault: two workers in place of one."""
    field.spoil()
    run = f"two-{executor}"
    by_two(field, executor, run)
    return field.outcome("two workers, no fault", executor, run, began)


def worker_killed(field: Field, began: float) -> Outcome:
    """SIGKILL for one of two local workers in the middle of a shard."""
    field.spoil(delay=SLOW)
    with ended(driver := field.drive("worker", workers=2)):
        stopped(driver, field, "worker", 1)
        victim = workers(driver, "selfimprove.execution.worker")[0]
        victim.kill()
        finish(driver)
    return field.outcome("worker killed", "local", "worker", began)


def rank_lost(field: Field, began: float) -> Outcome:
    """SIGKILL for a follower and its whole process group; the driver takes its shards over."""
    field.spoil(delay=SLOW, lost=LOST)
    driver, follower = field.drive("rank", executor="static", environment=place(0, 2)), field.follow("rank", 1, 2)
    with ended(driver, follower):
        until(lambda: list((field.folder / "runs/rank/work").glob("*.taken-1")), driver)
        follower.kill_group()
        finish(driver)
    assert "rank 1 has said nothing" in said(driver)
    return field.outcome("node lost", "static", "rank", began)


def rank_late(field: Field, began: float) -> Outcome:
    """The driver begins alone; a rank comes later, goes, and comes again."""
    field.spoil(delay=3 * SLOW, lost=60.0)
    with ended(driver := field.drive("late", executor="static", environment=place(0, 2))):
        stopped(driver, field, "late", 1)
        with ended(follower := field.follow("late", 1, 2)):
            until(lambda: list((field.folder / "runs/late/work").glob("*.taken-1")), driver)
        with ended(follower := field.follow("late", 1, 2)):
            finish(driver)
            finish(follower)
        assert "has said nothing" not in said(driver)
    return field.outcome("rank late, killed, restarted", "static", "late", began)


def driver_killed(field: Field, executor: str, began: float) -> Outcome:
    """SIGKILL for the driver alone; the same command goes on. Ranks stay and follow the new one."""
    field.spoil(delay=SLOW, lost=LOST)
    run = f"driver-{executor}"
    static = executor == "static"
    settings = {"executor": executor} | ({} if static else {"workers": 2})
    environment = place(0, 2) if static else {}
    followers = [field.follow(run, 1, 2)] if static else []
    driver = field.drive(run, environment=environment, **settings)
    with ended(driver, *followers):
        stopped(driver, field, run)
        below = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        before = len(field.done(run))
        if not static:
            _, alive = psutil.wait_procs(below, timeout=15)
            # Ray's agents hold no engine, and end when they miss their raylet
            left = [one for one in alive if one.status() != psutil.STATUS_ZOMBIE and "Agent" not in one.name()]
            assert not left, left
        with ended(again := field.drive(run, environment=environment, **settings)):
            finish(again)
        for follower in followers:
            finish(follower)
    return field.outcome("driver killed", executor, run, began, f"{before} of 8 shards were kept")


def straggler(field: Field, executor: str, began: float) -> Outcome:
    """One worker takes ten times as long for each row."""
    field.spoil(delay=SLOW / 2, slow=10)
    run = f"straggler-{executor}"
    if executor == "static":
        follower = field.follow(run, 1, 2)
        driver = field.drive(run, executor="static", environment=place(0, 2))
        with ended(driver, follower):
            finish(driver)
            finish(follower)
    else:
        with ended(driver := field.drive(run, executor=executor, workers=2)):
            finish(driver)
    assert Path(f"{field.settings}.slow").exists()
    return field.outcome("straggler, 10x", executor, run, began)


def poisoned(field: Field, executor: str, began: float) -> Outcome:
    """A row ends its process each time; of ranks, which share the process with the driver, it ends the engine."""
    text = prompts()[VICTIM]
    field.spoil(poison=text, die="exit" if executor != "static" else "engine")
    run = f"poison-{executor}"
    by_two(field, executor, run)
    assert published(field.folder / "runs" / run).quarantined == {f"{VICTIM:05d}": POISONED}
    deaths = len(Path(f"{field.settings}.deaths").read_text().splitlines())
    return field.outcome("poisoned row", executor, run, began, f"{deaths} deaths")


def corrupted(field: Field, began: float) -> Outcome:
    """A byte flipped in a finished shard and in one under way, while the run is stopped; and in one while it runs."""
    field.spoil(delay=2 * SLOW)
    while not field.parts("disk"):  # on a busy machine the shard may end before the kill
        with ended(driver := field.drive("disk", workers=2)):
            stopped(driver, field, "disk", 1)
            driver.kill_group()
    done, part = field.done("disk")[0], field.parts("disk")[0]
    for path in (done, part):
        flip(path)
    with ended(driver := field.drive("disk", workers=2)):
        until(lambda: f"{done.name} is damaged" in said(driver), driver)
        inodes = {path: path.stat().st_ino for path in field.done("disk")}
        until(lambda: [path for path in field.done("disk") if path not in inodes], driver)
        finish(driver)
    return field.outcome("shard corrupted, run stopped", "local", "disk", began)


def corrupted_meanwhile(field: Field, began: float) -> Outcome:
    """A byte flipped in each shard as soon as it is there, once, before the driver may have read it."""
    field.spoil(delay=SLOW)
    flipped: set[str] = set()
    with ended(driver := field.drive("meanwhile", workers=2)):
        while driver.poll() is None and len(flipped) < 3:
            for path in field.done("meanwhile"):
                if path.name not in flipped:
                    flipped.add(path.name)
                    flip(path)
            time.sleep(0.002)
        finish(driver)
    noticed = said(driver).count("is damaged")
    return field.outcome("shard corrupted, run under way", "local", "meanwhile", began, f"{noticed} noticed")


def flip(path: Path) -> None:
    """Flip a bit in the middle, in place."""
    try:
        with path.open("r+b") as file:
            middle = path.stat().st_size // 2
            file.seek(middle)
            byte = file.read(1)[0]
            file.seek(middle)
            file.write(bytes([byte ^ 1]))
    except (FileNotFoundError, IndexError):
        pass  # it was read and removed


def rank_partitioned(field: Field, began: float) -> Outcome:
    """A follower in a network namespace of its own with no interface: ranks share the file system alone."""
    field.spoil(delay=SLOW)
    driver = field.drive("apart", executor="static", environment=place(0, 2))
    follower = field.follow("apart", 1, 2, prefix=["unshare", "--net"])
    taken: set[str] = set()
    with ended(driver, follower):
        while driver.poll() is None:
            taken |= {path.name for path in (field.folder / "runs/apart/work").glob("*.taken-1")}
            time.sleep(0.02)
        finish(driver)
        finish(follower)
    assert taken
    return field.outcome("network partition", "static", "apart", began, f"{len(taken)} of 8 shards by the rank apart")


def namespaces() -> bool:
    """Whether this machine lets us make network namespaces."""
    return shutil.which("ip") is not None and os.system("unshare --net true 2>/dev/null") == 0


def quick() -> Iterator[tuple[str, Callable[[Field, float], Outcome]]]:
    """Those that take seconds."""
    yield "two-static", lambda field, began: nothing(field, "static", began)
    yield "rank-lost", rank_lost
    yield "driver-killed-static", lambda field, began: driver_killed(field, "static", began)
    yield "poisoned-static", lambda field, began: poisoned(field, "static", began)
    yield "worker-killed", worker_killed
    yield "rank-partitioned", rank_partitioned


def long() -> Iterator[tuple[str, Callable[[Field, float], Outcome]]]:
    """The others."""
    from tests.drills import on_ray

    yield "two-local", lambda field, began: nothing(field, "local", began)
    yield "rank-late", rank_late
    yield "driver-killed-local", lambda field, began: driver_killed(field, "local", began)
    yield "straggler-local", lambda field, began: straggler(field, "local", began)
    yield "straggler-static", lambda field, began: straggler(field, "static", began)
    yield "poisoned-local", lambda field, began: poisoned(field, "local", began)
    yield "corrupted", corrupted
    yield "corrupted-meanwhile", corrupted_meanwhile
    yield "two-ray", on_ray.nothing
    yield "node-lost-ray", on_ray.node_lost
    yield "driver-killed-ray", lambda field, began: driver_killed(field, "ray", began)
    yield "straggler-ray", lambda field, began: straggler(field, "ray", began)
    yield "poisoned-ray", lambda field, began: poisoned(field, "ray", began)
    yield "partition-ray", on_ray.partition


assert ROWS > VICTIM
