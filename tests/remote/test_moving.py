"""What is pushed is what is pulled, and nothing moves twice."""

from pathlib import Path

import pytest

from selfimprove import store
from selfimprove.remote import kept as reading
from selfimprove.remote import moving, objects
from selfimprove.remote.objects import Store
from tests.remote.helpers import (
    NAMES,
    STAGES,
    begin,
    check_readers,
    mirrored,
    nothing,
    objects_of,
    publish,
    pulled,
    tree,
)


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


def test_a_push_that_goes_on_skips_the_files_that_are_there(folder, tmp_path):
    run = begin(tmp_path / "here/run", STAGES[:1])
    mirrored(str(folder), run).push_all(nothing)
    Store(str(folder)).delete(f"run/{STAGES[0]}/manifest.json")
    Store(str(folder)).delete(objects_of(str(folder), STAGES[0], "model.safetensors"))
    put, together = [], moving.together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "together", lambda move, items, told: (put.extend(items), together(move, items, told)))
        assert mirrored(str(folder), run).push_all(nothing) == STAGES[:1]
    assert [item.name.rpartition("/")[2] for item in put] == ["model.safetensors"]
    assert list(check_readers(str(folder))) == STAGES[:1]


def test_a_listing_that_is_older_than_a_manifest_makes_nothing_torn(folder, tmp_path):
    """A reader lists, then a push ends, then the reader reads the manifest."""
    run = begin(tmp_path / "here/run", STAGES[:1])
    mirrored(str(folder), run).push_all(nothing)
    kept = reading.artifact(Store(str(folder)), "run", STAGES[0], {f"{STAGES[0]}/manifest.json": 1})
    assert kept
    assert not kept.torn
    assert kept.sizes.keys() == set(NAMES)
