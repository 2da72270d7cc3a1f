"""Addresses, keys, and stores that are not there."""

import errno
import re
from pathlib import Path

import fsspec
import pytest

from selfimprove.remote import mirror
from selfimprove.remote.objects import Store
from tests.conftest import QUICK, selfimprove
from tests.remote.helpers import (
    KEYS,
    begin,
    refused,
)


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
