"""What a store has lost, tore, altered or made up is found."""

import json
import shutil

import pytest

from selfimprove import store
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
