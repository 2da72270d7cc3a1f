"""Stores: whole or not at all, whoever is killed, competes or lies; and a run goes on from one on another machine."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from selfimprove import collected, plan, receipts, recipe_file, store
from selfimprove.errors import UserError
from selfimprove.remote import kept as reading
from selfimprove.remote import mirror, moving, objects
from selfimprove.remote.mirror import Mirror
from selfimprove.remote.objects import Store
from tests.conftest import QUICK, cut, selfimprove
from tests.paths import ROOT
from tests.test_run import contents, keys

NAMES = ["rows-00000.parquet", "policy/model.safetensors", "policy/a b#c %20 é&=+~.json", "empty.jsonl"]
STAGES = ["iter-001/1-synthesize", "iter-001/2-generate", "iter-001/3-label"]
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"}


def nothing(*told: object) -> None:
    """Hears, and does nothing."""


# --- stores and runs


@pytest.fixture(scope="module")
def s3_server():
    """An S3 server on loopback."""
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    server_of = pytest.importorskip("moto.server", reason="moto's S3 server is not installed")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, request) -> str:
    """A bucket of a test's own, and what s3fs needs to find it."""
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": s3_server, "AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    s3fs = fsspec.get_filesystem_class("s3")
    s3fs.clear_instance_cache()  # this one may have other keys than the last test's
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return f"s3://{name}/some prefix"


@pytest.fixture(params=["folder", "memory", "s3"])
def address(request, tmp_path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3")
    if request.param == "memory":
        return f"memory://{request.node.name}"
    (tmp_path / "store").mkdir()
    return str(tmp_path / "store")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def publish(run: store.Run, directory: str, seed: str = "", tokens: int = 0) -> store.Manifest:
    """An artifact of the run; `seed` is an ingredient, and part of what its files say."""
    iteration, stage = directory.split("/")
    artifact = store.Artifact(run.path / directory)
    artifact.begin()
    for name in NAMES:
        artifact.path(name).parent.mkdir(exist_ok=True)
        text = "" if name.startswith("empty") else f"{directory} {name} {seed}\n" * 50
        artifact.path(name).write_text(text, encoding="utf-8")
    artifact.contract("row", 0, 0)
    artifact.tokens = tokens  # enters no key
    return artifact.publish(int(iteration[5:]), stage, {"stage": directory, "seed": seed}, {"receipt": "r"})


def begin(path: Path, stages: list[str] = STAGES, created: str = "now", tokens: int = 0) -> store.Run:
    """A run with what one has beside its artifacts."""
    path.mkdir(parents=True)
    run = store.Run(path)
    store.write_atomically(path / "run.json", json.dumps({"run": path.name, "created": created}) + "\n")
    run.recipe_file.write_text(recipe_file.dump(recipe_file.load(recipe_file.find("default"))), encoding="utf-8")
    (path / ".gitignore").write_text("*\n", encoding="utf-8")
    for place, form in ((receipts.FOLDER, "{}.json"), (plan.TEMPLATES, "{}")):
        (path / place).mkdir()
        text = f"{place} é\n"
        name = form.format(hashlib.sha256(text.encode()).hexdigest())
        (path / place / name).write_text(text, encoding="utf-8")
    for directory in stages:
        publish(run, directory, tokens=tokens)
    return run


def tree(
    folder: Path, without: tuple[str, ...] = (".lock", ".lock.json", "state.json", "digests.json")
) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not p.is_symlink() and p.name not in without
    }


def mirrored(address: str, run: store.Run) -> Mirror:
    found = mirror.of(address, run)
    assert found
    return found


def refused(call, *arguments, **more) -> str:
    """The sentence and the hint of an error."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **more)
    assert "\n" not in caught.value.message
    return f"{caught.value.message} | {caught.value.hint}"


def check_readers(address: str, name: str = "run") -> dict[str, reading.Kept]:
    """What a reader sees now; nothing of it may be half."""
    place = Store(address)
    found = reading.artifacts(place, name)
    for directory, one in found.items():
        assert not one.torn, (directory, one.torn)
        for output in one.manifest.outputs:
            content = place.read(f"{name}/{directory}/{reading.making(one.content)}/{output.path}")
            assert hashlib.sha256(content).hexdigest() == output.sha256
    return found


def pulled(address: str, runs: Path) -> store.Run:
    return mirror.pull(f"{address}/run", runs, nothing, nothing)


# --- there and back


def test_what_is_pulled_is_what_was_pushed_file_by_file(address, tmp_path):
    run = begin(tmp_path / "here/run")
    told: list[tuple[int, int]] = []
    assert mirrored(address, run).push_all(lambda done, total: told.append((done, total))) == STAGES
    total = sum(o.bytes for d in STAGES for o in store.read_manifest(run.path / d).outputs)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    there = pulled(address, tmp_path / "there")
    assert tree(there.path) == tree(run.path)
    assert len(tree(run.path)) == 5 + 1 + 3 * (len(NAMES) + 1) - 1
    assert list(check_readers(address)) == STAGES
    assert mirrored(address, run).altered(nothing) == []


def test_what_is_there_is_not_moved_again(address, tmp_path):
    run = begin(tmp_path / "here/run")
    mirrored(address, run).push_all(nothing)
    there = pulled(address, tmp_path / "there")
    moved: list[objects.Item] = []
    before = {p: p.stat().st_mtime_ns for p in there.path.rglob("*") if p.name not in (".lock", there.path.name)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "together", lambda move, items, progress: moved.extend(items))
        assert mirrored(address, run).push_all(nothing) == []
        pulled(address, tmp_path / "there")
    assert not moved
    assert before == {p: p.stat().st_mtime_ns for p in before}
    publish(run, "iter-001/4-train")
    with pytest.MonkeyPatch.context() as patch:
        put = []
        original = objects.together
        patch.setattr(objects, "together", lambda m, items, p: (put.extend(items), original(m, items, p)))
        assert mirrored(address, run).push_all(nothing) == ["iter-001/4-train"]
    assert {item.name.split("/")[2] for item in put} == {"4-train"}


def test_a_manifest_is_the_last_object_that_a_push_writes(folder, tmp_path, monkeypatch):
    run, order = begin(tmp_path / "here/run", STAGES[:1]), []
    write = moving.write
    monkeypatch.setattr(moving, "write", lambda target, *more: (order.append(target.name), write(target, *more)))
    monkeypatch.setattr(objects.moving, "create", lambda target, content: order.append(target.name) or True)
    mirrored(str(folder), run).push(STAGES[0], nothing)
    assert order[-1] == "manifest.json"
    assert set(order[:-1]) >= {Path(name).name for name in NAMES}


# --- killed


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


# --- damaged


def objects_of(address: str, directory: str, ending: str) -> str:
    place = Store(address)
    [name] = [n for n in place.sizes("run") if n.startswith(f"{directory}/") and n.endswith(ending)]
    return f"run/{name}"


def test_an_object_of_another_size_is_never_pulled_and_a_push_mends_it(address, tmp_path):
    run = begin(tmp_path / "here/run")
    mirrored(address, run).push_all(nothing)
    name = objects_of(address, STAGES[1], "rows-00000.parquet")
    Store(address).write(name, b"torn")
    said = refused(pulled, address, tmp_path / "there")
    assert "iter-001/2-generate is torn: rows-00000.parquet has 4 of" in said
    assert "selfimprove push run where the run is whole" in said
    assert not list((tmp_path / "there").glob("run/iter-*/*"))
    assert not (tmp_path / "there/run/recipe.toml").exists()
    assert "is torn: rows-00000.parquet has 4 of" in mirrored(address, run).altered(nothing)[0]
    assert mirrored(address, run).push_all(nothing) == [STAGES[1]]
    assert tree(pulled(address, tmp_path / "there").path) == tree(run.path)


def test_an_object_that_is_gone_is_told(address, tmp_path):
    run = begin(tmp_path / "here/run")
    mirrored(address, run).push_all(nothing)
    Store(address).delete(objects_of(address, STAGES[1], "model.safetensors"))
    assert "2-generate is torn: policy/model.safetensors is missing" in refused(pulled, address, tmp_path / "there")


def test_an_object_that_was_altered_is_found_by_its_sha256_and_leaves_nothing_half(address, tmp_path):
    run = begin(tmp_path / "here/run")
    mirrored(address, run).push_all(nothing)
    name = objects_of(address, STAGES[1], "model.safetensors")
    content = Store(address).read(name)
    Store(address).write(name, content[:-2] + b"X\n")
    said = refused(pulled, address, tmp_path / "there")
    assert f"{name} differs from its manifest" in said
    assert [p.name for p in (tmp_path / "there/run/iter-001").iterdir()] == ["1-synthesize"]
    assert not (tmp_path / "there/run/recipe.toml").exists()  # no run that would go on without the rest
    assert mirrored(address, run).altered(nothing) == [f"{Store(address).show(name)} differs from its manifest"]
    Store(address).delete(name)
    mirrored(address, run).push_all(nothing)
    assert tree(pulled(address, tmp_path / "there").path) == tree(run.path)


@pytest.mark.parametrize("change", [
    lambda m: b"{",
    lambda m: b"\xff\xfe",
    lambda m: m.replace(b'"tokens": 0', b'"tokens": 1'),
    lambda m: m.replace(b'"stage": "2-generate"', b'"stage": "3-label"'),
    lambda m: forged(m, path="../../../out"),
    lambda m: forged(m, path="/etc/passwd"),
    lambda m: forged(m, path="manifest.json"),
    lambda m: forged(m, path="./collected.json"),
    lambda m: forged(m, path="rows-00000.parquet"),
    lambda m: forged(m, key="0" * 64),
])  # fmt: skip
def test_a_manifest_that_is_none_or_lies_is_not_believed(change, folder, tmp_path):
    run = begin(tmp_path / "here/run")
    mirrored(str(folder), run).push_all(nothing)
    file = folder / "run" / STAGES[1] / "manifest.json"
    changed = change(file.read_bytes())
    assert changed != file.read_bytes()
    making = folder / "run" / STAGES[1]
    (making / reading.making(file.read_bytes())).rename(making / reading.making(changed))  # as its liar would do
    file.write_bytes(changed)
    said = refused(pulled, str(folder), tmp_path / "there")
    assert "iter-001/2-generate is torn: its manifest.json is damaged" in said
    assert not list((tmp_path / "there").glob("run/iter-*/*"))


def forged(manifest: bytes, path: str | None = None, key: str | None = None) -> bytes:
    """A manifest with a right seal that says something else."""
    told = json.loads(manifest)
    if path:
        told["outputs"][0]["path"] = path
    told["key"] = key or told["key"]
    told.pop("seal")
    return (json.dumps(told | {"seal": store.key_of(told)}, indent=1, ensure_ascii=False) + "\n").encode()


def test_names_that_a_store_lists_lead_nowhere(folder, tmp_path):
    run = begin(tmp_path / "here/run")
    mirrored(str(folder), run).push_all(nothing)
    place, manifest = folder / "run", (folder / "run" / STAGES[0] / "manifest.json").read_bytes()
    for name in (
        "iter-001/..evil",
        "iter-001/6-x.partial",
        "evil/1-synthesize",
        "iter-1/1-synthesize",
        "aside/iter-001/1-a",
    ):
        (place / name).mkdir(parents=True)
        (place / name / "manifest.json").write_bytes(manifest)
    (place / "templates/evil").write_text("x")
    (place / "receipts" / ("0" * 64 + ".json.tmp")).write_text("x")
    there = pulled(str(folder), tmp_path / "there")
    assert tree(there.path) == tree(run.path)
    (place / "templates" / ("0" * 64)).write_text("not what its name says")
    shutil.rmtree(there.path)
    assert "is not the text that its name says" in refused(pulled, str(folder), tmp_path / "there")


def test_symlinks_in_a_store_that_is_a_folder_are_not_followed(folder, tmp_path):
    run = begin(tmp_path / "here/run")
    mirrored(str(folder), run).push_all(nothing)
    (tmp_path / "outside").mkdir()
    (folder / "run/iter-002").symlink_to(tmp_path / "outside")
    publish(run, "iter-002/1-synthesize")
    for call in (mirrored(str(folder), run).push_all, lambda told: pulled(str(folder), tmp_path / "there")):
        assert "iter-002 is a symlink, which is not followed" in refused(call, nothing)
    assert not list((tmp_path / "outside").iterdir())


def test_what_is_altered_or_missing_here_is_not_pushed(folder, tmp_path):
    run = begin(tmp_path / "here/run", STAGES[:2])
    file = run.path / STAGES[0] / "policy/model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"X\n")
    assert "model.safetensors differs from its manifest" in refused(mirrored(str(folder), run).push_all, nothing)
    file.unlink()
    assert "model.safetensors is missing or was altered" in refused(mirrored(str(folder), run).push_all, nothing)
    assert check_readers(str(folder)) == {}
    told: list[str] = []
    mirrored(str(folder), run).bring(nothing, told.append)  # a plan says why that one is stale
    assert list(check_readers(str(folder))) == STAGES[1:2]
    assert told[0].startswith("kept 1 stage (")


def test_a_store_that_takes_less_than_it_was_given_is_found_out(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    run, put = begin(tmp_path / "here/run", STAGES[:1]), MemoryFileSystem.put_file

    def short(self, local, remote, **more):
        put(self, local, remote, **more)
        if remote.endswith("safetensors"):
            self.store[remote].truncate(7)

    monkeypatch.setattr(MemoryFileSystem, "put_file", short)
    said = refused(mirrored("memory://short", run).push_all, nothing)
    assert "model.safetensors has 7 bytes after it was written" in said
    assert check_readers("memory://short") == {}


# --- two drivers


def test_what_another_driver_has_published_is_never_replaced(address, tmp_path):
    ours, theirs = begin(tmp_path / "a/run", STAGES[:1]), begin(tmp_path / "b/run", STAGES[:1], tokens=1)
    mirrored(address, theirs).push_all(nothing)
    before = Store(address).sizes("run")
    for call in (mirrored(address, ours).push_all, lambda t: mirrored(address, ours).bring(t, t),
                 lambda t: mirrored(address, ours).push(STAGES[0], t)):  # fmt: skip
        said = refused(call, nothing)
        assert "1-synthesize was made another time, from the same ingredients, than" in said
        assert "another driver has put it there" in said
        assert "selfimprove resume run --from iter-001/1-synthesize" in said
    assert Store(address).sizes("run") == before
    shutil.rmtree(ours.path / "iter-001")
    publish(ours, STAGES[0], "other")
    assert "is made from other ingredients" in refused(mirrored(address, ours).push_all, nothing)
    mirrored(address, ours).bring(nothing, nothing, without=STAGES[:1])  # what --from sets aside
    assert list(check_readers(address)) == STAGES[:1]


def test_of_two_drivers_at_the_same_moment_one_is_told(address, tmp_path):
    """Both have seen that nothing is there; the files of both are there when the first manifest comes."""
    runs = [begin(tmp_path / f"{n}/run", STAGES[:1], tokens=n) for n in range(2)]
    both, said, create = threading.Barrier(2), [], Store.create

    def wait(self, name, content):
        if name.endswith("manifest.json"):
            both.wait(20)
        return create(self, name, content)

    def drive(run: store.Run) -> None:
        try:
            mirrored(address, run).push_all(nothing)
        except UserError as error:
            said.append(error.message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "create", wait)
        threads = [threading.Thread(target=drive, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(said) == 1, said
    assert "another driver has put it there" in said[0]
    [kept] = check_readers(address).values()
    assert kept.content in [(run.path / STAGES[0] / "manifest.json").read_bytes() for run in runs]


def test_a_manifest_whose_answer_was_lost_is_our_own(address, tmp_path):
    place = Store(address)
    assert place.create("x/manifest.json", b"one")
    assert place.create("x/manifest.json", b"one")
    assert not place.create("x/manifest.json", b"two")
    assert place.read("x/manifest.json") == b"one"


def test_another_run_of_the_same_name_is_refused(address, tmp_path):
    mirrored(address, begin(tmp_path / "a/run", STAGES[:1], created="yesterday")).push_all(nothing)
    other = begin(tmp_path / "b/run", STAGES[1:2])
    for call in (mirrored(address, other).push_all, lambda t: pulled(address, tmp_path / "b")):
        said = refused(call, nothing)
        assert "holds another run than" in said
        assert "--run ANOTHER_NAME" in said
    assert list(check_readers(address)) == STAGES[:1]


def test_what_is_set_aside_is_no_longer_published_and_nothing_of_it_is_lost(address, tmp_path):
    run = begin(tmp_path / "here/run")
    kept = mirrored(address, run)
    kept.push_all(nothing)
    before = Store(address).sizes("run")
    kept.set_aside(STAGES[1:])
    assert list(check_readers(address)) == STAGES[:1]
    after = Store(address).sizes("run")
    assert {n for n in before if "manifest" not in n} <= after.keys()
    aside = sorted(n for n in after if n.startswith("aside/"))
    assert len(aside) == 2
    for name in aside:  # its files are still found by what it hashes to
        content = Store(address).read(f"run/{name}")
        directory = re.search(reading.STAGE, name)[0]
        assert any(n.startswith(f"{directory}/{reading.making(content)}/") for n in after)
    shutil.rmtree(run.path / STAGES[1])
    publish(run, STAGES[1], "anew")
    shutil.rmtree(run.path / STAGES[2])
    assert mirrored(address, run).push_all(nothing) == [STAGES[1]]
    assert list(check_readers(address)) == STAGES[:2]


def test_a_longer_run_there_makes_the_run_here_longer(address, tmp_path):
    run = begin(tmp_path / "a/run", STAGES[:1])
    mirrored(address, run).push_all(nothing)
    other = pulled(address, tmp_path / "b")
    longer = recipe_file.load(other.recipe_file).model_copy(update={"rounds": 9})
    store.write_atomically(other.recipe_file, recipe_file.dump(longer))
    publish(other, "iter-009/1-synthesize")
    mirrored(address, other).push_all(nothing)
    told: list[str] = []
    mirrored(address, run).bring(nothing, told.append)
    assert recipe_file.load(run.recipe_file).rounds == 9
    assert (run.path / "iter-009/1-synthesize/manifest.json").is_file()
    assert told == [
        f"brought 1 stage ({told[0].partition('(')[2].partition(')')[0]}) from {Store(address).show('run')}"
    ]


# --- what gc removed


def collect(run: store.Run, directory: str, name: str = "policy/model.safetensors") -> None:
    manifest = store.read_manifest(run.path / directory)
    [digest] = [o.sha256 for o in manifest.outputs if o.path == name]
    note = collected.Collected(on="2026-01-01T00:00:00Z", files={name: digest})
    (run.path / directory / collected.FILE).write_text(note.model_dump_json(), encoding="utf-8")
    (run.path / directory / name).unlink()


def test_what_gc_removed_here_does_not_come_back_and_stays_there(address, tmp_path):
    run = begin(tmp_path / "here/run")
    mirrored(address, run).push_all(nothing)
    collect(run, STAGES[0])
    mirrored(address, run).bring(nothing, nothing)
    assert mirrored(address, run).push_all(nothing) == []
    pulled(address, tmp_path / "here")
    assert not (run.path / STAGES[0] / "policy/model.safetensors").exists()
    there = pulled(address, tmp_path / "there")  # another machine, on which nobody removed it
    assert (there.path / STAGES[0] / "policy/model.safetensors").is_file()


def test_what_gc_removed_before_a_push_is_explained_there_too(address, tmp_path):
    run = begin(tmp_path / "here/run")
    collect(run, STAGES[0])
    assert mirrored(address, run).push_all(nothing) == STAGES
    there = pulled(address, tmp_path / "there")
    assert tree(there.path) == tree(run.path)
    assert collected.told(there.path / STAGES[0]) == "weights removed by gc on 2026-01-01"
    Store(address).write(objects_of(address, STAGES[0], "collected.json"), b"{}")  # a note that explains nothing
    assert "torn: policy/model.safetensors is missing" in refused(pulled, address, tmp_path / "elsewhere")


# --- addresses, keys, and stores that are not there


@pytest.mark.parametrize("address", [
    f"s3://{KEYS['AWS_ACCESS_KEY_ID']}:{KEYS['AWS_SECRET_ACCESS_KEY']}@bucket/p",
    "s3://user:pass/word1234@bucket/p",
    "s3://token1234567@bucket",
    "gs://bucket/p?access_token=abcdefgh12345678",
    "s3://bucket/p?secret=abcdefgh12345678",
])  # fmt: skip
def test_an_address_with_a_key_is_refused_and_never_said(address, cut_data):
    result = selfimprove("iterate", "--run", "r", *QUICK, "--set", f"machine.store={address}")
    assert result.code == 1
    assert "the address of the store has a user, a key or a password in it" in result.err
    assert "AWS_PROFILE" in result.err
    for secret in re.split(r"s3://|gs://|bucket|[:@/?=]", address):
        assert len(secret) < 6 or secret not in result.err + result.out or secret in ("secret", "access_token")
    assert not Path("runs").exists()


@pytest.mark.parametrize(("address", "said"), [
    ("s3://", "s3:// is no address of a store"),
    ("s3:///prefix", "is no address of a store"),
    ("s3://bucket/a/../b", "is no address of a store"),
    ("simplecache::s3://bucket/x", "is no address of a store"),
    ("s3://bucket/x?versionId=1", "is no address of a store"),
    ("ftb://host/x", "is no address of a store: Protocol not known: ftb"),
])  # fmt: skip
def test_what_is_no_address_is_refused(address, said):
    assert said in refused(Store, address)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    def missing(url, **options):
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert "pip install 'selfimprove[gcs]'" in refused(Store, "gs://bucket/x")
    assert "pip install 'selfimprove[s3]'" in refused(Store, "s3://bucket/x")


def test_a_store_and_a_run_do_not_lie_in_one_another(tmp_path):
    run = begin(tmp_path / "runs/run", [])
    for place in (tmp_path / "runs", run.path, run.path / "inside", tmp_path):
        place.mkdir(exist_ok=True)
        if place != tmp_path:
            assert "would lie in the run itself" in refused(mirror.of, str(place), run)
    assert mirror.of(str(tmp_path), run)


def test_a_folder_or_bucket_that_is_not_there_is_told_before_anything_is_made(cut_data, s3):
    for address, said in (
        (str(cut_data / "mnt/none"), f"mkdir -p {cut_data / 'mnt/none'}"),
        ("s3://no-such-bucket-here/p", "there is no such bucket"),
    ):
        result = selfimprove("iterate", "--run", "r", *QUICK, "--set", f"machine.store={address}")
        assert result.code == 1
        assert said in result.err
        assert "Traceback" not in result.err
        assert not Path("runs").exists()


def test_a_store_that_gives_no_permission_or_does_not_answer_is_told_in_one_sentence(s3, monkeypatch):
    fs = fsspec.get_filesystem_class("s3")

    def answer(error):
        async def fail(self, *arguments, **more):
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fs, "_pipe_file", fail)
            fs.clear_instance_cache()
            return refused(Store(s3).probe)

    assert "gives no permission to write .probe-" in answer(PermissionError("Access Denied"))
    said = answer(OSError(errno.EIO, f"secret_key={KEYS['AWS_SECRET_ACCESS_KEY']} user {KEYS['AWS_ACCESS_KEY_ID']}"))
    assert "could not write .probe-" in said
    assert not any(value in said for value in KEYS.values())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
    fs.clear_instance_cache()
    assert "Could not connect to the endpoint URL" in refused(Store(s3).probe)
    fs.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "Unable to locate credentials" in refused(Store(s3).probe)


def test_a_bug_is_no_answer_of_a_store(monkeypatch, folder):
    place = Store(str(folder))
    monkeypatch.setattr(type(place._fs), "find", lambda self, *a, **k: 1 + "a")
    with pytest.raises(TypeError):
        place.sizes("run")


@pytest.mark.parametrize("fault", ["changes what it was given", "keeps what is deleted"])
def test_a_probe_finds_a_store_that_cannot_be_relied_on(fault, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    if fault == "keeps what is deleted":
        monkeypatch.setattr(MemoryFileSystem, "rm_file", lambda self, path: None)
    else:
        monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, *a, **k: b"else")
    said = refused(Store("memory://probe").probe)
    assert ("nothing can be deleted" in said) == (fault == "keeps what is deleted")
    monkeypatch.undo()
    Store("memory://probe").probe()


# --- whole runs

TINY = [*QUICK, "--rounds", "1", "--set", "synthesize.prompts=30", "--set", "generate.n=2",
        "--set", "synthesize.generator.epochs=1"]  # fmt: skip


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory) -> Path:
    """A folder with a finished run `r` in `runs` and in `store`."""
    place = tmp_path_factory.mktemp("kept")
    (place / "store").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        cut(40)
        result = selfimprove("iterate", "--run", "r", *TINY, "--set", "machine.store=store")
        assert result.code == 0, result.err
    return place


@pytest.fixture
def at_kept_run(kept_run, tmp_path, monkeypatch) -> Path:
    """A copy of it, whose recipe names the copy of the store; the working directory."""
    shutil.copytree(kept_run, tmp_path / "w", symlinks=True)
    for recipe in (tmp_path / "w").glob("*/r/recipe.toml"):
        recipe.write_text(recipe.read_text().replace(f"{kept_run}/", f"{tmp_path}/w/"))
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def test_every_stage_is_in_the_store_when_the_run_ends(at_kept_run):
    run = store.Run(Path("runs/r"))
    found = check_readers(str(at_kept_run / "store"), "r")
    assert len(found) == 8
    for directory, one in found.items():
        assert one.content == (run.path / directory / "manifest.json").read_bytes()
    for name in ("recipe.toml", "run.json"):
        assert Path(f"store/r/{name}").read_bytes() == Path(f"runs/r/{name}").read_bytes()
    result = selfimprove("push", "r", "--verify")
    assert (result.code, result.out) == (0, f"{at_kept_run}/store/r\n")
    assert "every stage was there already" in result.err
    assert "0 broken" in result.err


def test_a_new_machine_goes_on_from_the_store(at_kept_run):
    shutil.move("runs", "first")
    result = selfimprove("pull", "store/r")
    assert result.code == 0, result.err
    assert result.out == "runs/r\n"
    assert "brought 8 stages" in result.err
    assert "selfimprove resume r" in result.err
    assert tree(Path("runs/r")) == tree(Path("first/r"))
    assert Path("runs/r/best").readlink() == Path("first/r/best").readlink()
    verified = selfimprove("verify", "r")
    assert verified.code == 0, verified.out
    again = selfimprove("resume", "r")
    assert again.code == 0, again.err
    assert "nothing to do" in again.err
    assert selfimprove("fork", "r@1/train", "--run", "child").code == 0
    assert selfimprove("pull", "store/r").err.startswith("nothing was missing here")


def test_the_same_command_on_a_new_machine_brings_what_is_there_and_makes_the_rest(at_kept_run):
    shutil.move("runs", "first")
    command = ["iterate", "--run", "r", *TINY, "--set", "machine.store=store"]
    other = selfimprove(*command, "--set", "train.loss.beta=3.0")
    assert other.code == 1
    assert "run 'r' exists with another recipe: train.loss.beta" in other.err
    assert not list(Path("runs/r").glob("iter-*"))
    command[command.index("--rounds") + 1] = "2"
    result = selfimprove(*command)
    assert result.code == 0, result.err
    assert "brought 8 stages" in result.err
    assert f"from {at_kept_run}/store/r" in result.err.replace("\n", "")
    assert "5 stages in" in result.err
    found = check_readers(str(at_kept_run / "store"), "r")
    assert len(found) == 13
    whole = selfimprove("iterate", "--run", "whole", *TINY[:-6], "--rounds", "2", *TINY[-6:])
    assert whole.code == 0, whole.err
    assert keys(Path("runs/r")) == keys(Path("runs/whole"))
    assert contents(Path("runs/r")) == contents(Path("runs/whole"))


def test_a_store_that_goes_away_fails_the_run_in_one_sentence_and_the_next_resume_pushes(cut_data, monkeypatch):
    (cut_data / "store").mkdir()
    write, left = moving.write, [25]

    def gone(target, *more):
        left[0] -= str(target).startswith(str(cut_data / "store"))
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        write(target, *more)

    with monkeypatch.context() as patch:
        patch.setattr(moving, "write", gone)
        result = selfimprove("iterate", "--run", "r", *TINY, "--set", "machine.store=store")
    assert result.code == 1
    assert re.search(rf"error: the store {cut_data}/store could not write \S+: \[Errno 28\] No space left", result.err)
    assert "Traceback" not in result.err
    there, here = check_readers(str(cut_data / "store"), "r"), keys(Path("runs/r"))
    assert 0 < len(there) < len(here) < 8  # the one that could not be pushed is here
    told = json.loads(selfimprove("status", "r", "--json").out)
    assert told["state"] == "failed"
    assert "could not write" in told["error"]
    before = {d: (Path("runs/r") / d / "manifest.json").read_bytes() for d in here}
    resumed = selfimprove("resume", "r")
    assert resumed.code == 0, resumed.err
    assert "kept 1 stage (" in resumed.err
    found = check_readers(str(cut_data / "store"), "r")
    assert len(found) == 8
    assert before.items() <= {d: one.content for d, one in found.items()}.items()


def test_what_from_sets_aside_is_replaced_in_the_store_too(at_kept_run):
    old = check_readers("store", "r")
    result = selfimprove("resume", "r", "--from", "1/label")
    assert result.code == 0, result.err
    assert "set aside iter-001/3-label" in result.err
    assert "brought" not in result.err
    new = check_readers("store", "r")
    assert new.keys() == old.keys()
    assert {d for d in new if new[d].content != old[d].content} == {
        "iter-001/3-label", "iter-001/4-train", "iter-001/5-evaluate",
    }  # fmt: skip
    aside = [p.read_bytes() for p in Path("store/r/aside").rglob("manifest.json")]
    assert sorted(aside) == sorted(old[d].content for d in old if new[d].content != old[d].content)


def test_what_verify_sets_aside_comes_back_from_the_store(at_kept_run):
    before = tree(Path("runs/r"))
    file = Path("runs/r/iter-001/3-label/pairs-00000.parquet")
    file.write_bytes(b"x" * file.stat().st_size)
    assert selfimprove("verify", "r", "--repair").code == 0
    assert not file.exists()
    result = selfimprove("resume", "r")
    assert result.code == 0, result.err
    assert "brought 3 stages" in result.err
    assert "nothing to do" in result.err
    assert {name: what for name, what in tree(Path("runs/r")).items() if not name.startswith("aside/")} == before


def test_no_key_is_written_anywhere(cut_data, s3):
    result = selfimprove("iterate", "--run", "r", *TINY, "--until", "0/evaluate", "--set", f"machine.store={s3}")
    assert result.code == 0, result.err
    assert len(check_readers(s3, "r")) == 1
    written = b"".join(p.read_bytes() for p in Path("runs").rglob("*") if p.is_file())
    written += b"".join(Store(s3).read(f"r/{name}") or b"" for name in Store(s3).sizes("r"))
    for value in KEYS.values():
        assert value.encode() not in written
        assert value not in result.err + result.out


def test_check_tries_the_store(cut_data):
    assert "mkdir -p" in selfimprove("check", "default", *QUICK[2:], "--set", "machine.store=none").err
    assert not Path("none").exists()
    Path("some").mkdir()
    result = selfimprove("check", "default", *QUICK[2:], "--set", "machine.store=some")
    assert result.code == 0, result.err
    assert "ok    store: can be written, read and deleted in" in result.out
    assert not list(Path("some").iterdir())


def test_the_commands_say_what_they_lack(at_kept_run):
    assert selfimprove("pull", "r").code == 1
    assert "no run 'x' in" in (said := selfimprove("pull", "store/x").err)
    assert "there is r" in said
    assert not Path("runs/x").exists()
    assert "names no run in a store" in selfimprove("pull", "store/..").err
    Path("else").mkdir()
    pushed = selfimprove("push", "r", "--to", "else")
    assert pushed.code == 0, pushed.err
    assert "8 stages pushed" in pushed.err
    recipe = Path("runs/r/recipe.toml")
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("store =")))
    lacking = selfimprove("push", "r")
    assert lacking.code == 2
    assert "selfimprove push r --to" in lacking.err
    name = next(Path("else/r/iter-001/3-label").glob("*/pairs-00000.parquet"))
    name.write_bytes(b"x" * name.stat().st_size)
    verified = selfimprove("push", "r", "--to", "else", "--verify")
    assert verified.code == 3
    assert "pairs-00000.parquet differs from its manifest" in verified.out
    moved = selfimprove("pull", "else/r", "--runs", "other")
    assert moved.code == 1
    assert "pairs-00000.parquet differs from its manifest" in moved.err


def test_a_program_that_is_killed_while_it_pushes_goes_on(cut_data):
    """The command itself, killed right after its first artifact was published here and half pushed."""
    script = (
        "import os, signal, sys\n"
        "from selfimprove.remote import moving\n"
        "write = moving.write\n"
        "def stop(target, *more):\n"
        "    write(target, *more)\n"
        "    if '/iter-000/2-control/' in str(target): os.kill(os.getpid(), signal.SIGKILL)\n"
        "moving.write = stop\n"
        "sys.argv = ['selfimprove', *sys.argv[1:]]\n"
        "from selfimprove import cli\n"
        "cli.main()\n"
    )
    (cut_data / "store").mkdir()
    command = ["iterate", "--run", "r", *TINY, "--set", "machine.store=store", "--until", "0/control"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ended = subprocess.run(
        [sys.executable, "-c", script, *command],
        capture_output=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list(check_readers("store", "r")) == ["iter-000/1-evaluate"]
    assert list(Path("store/r/iter-000/2-control").rglob("*"))
    control = Path("runs/r/iter-000/2-control/manifest.json").read_bytes()
    result = selfimprove(*command)
    assert result.code == 0, result.err
    assert "kept 1 stage (" in result.err
    assert "0/control is made already" in result.err
    found = check_readers("store", "r")
    assert list(found) == ["iter-000/1-evaluate", "iter-000/2-control"]
    assert found["iter-000/2-control"].content == control
    assert not list(Path("store").rglob("*.half"))
