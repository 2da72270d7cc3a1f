"""Several drivers, runs of one name, what is set aside, and what gc removed."""

import errno
import re
import shutil
import threading

import pytest

from selfimprove import collected, recipe_file, store
from selfimprove.errors import UserError
from selfimprove.remote import kept as reading
from selfimprove.remote.objects import Store
from tests.remote.helpers import (
    STAGES,
    begin,
    check_readers,
    mirrored,
    nothing,
    objects_of,
    publish,
    pulled,
    refused,
    tree,
)


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
    shutil.rmtree(ours.path / "iter-001")
    mirrored(address, ours).bring(nothing, nothing, without=STAGES[:1])
    assert not (ours.path / STAGES[0]).exists()
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


@pytest.mark.parametrize("knows", ["ignores the condition", "has no such condition"])
def test_a_store_without_conditions_never_replaces_what_it_shows(knows, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    put = MemoryFileSystem.pipe_file

    def careless(self, path, value, mode="overwrite", **more):
        if mode == "create" and knows == "has no such condition":
            raise OSError(errno.ENOSYS, "NotImplemented")
        put(self, path, value, **more)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", careless)
    place = Store(f"memory://{knows[:3]}")
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
    note = objects_of(address, STAGES[0], "collected.json")
    for other in (b"{}", b'{"on": "2026", "files": {"policy/model.safetensors": "0000"}}'):  # of another file
        Store(address).write(note, other)
        assert "torn: policy/model.safetensors is missing" in refused(pulled, address, tmp_path / "elsewhere")
