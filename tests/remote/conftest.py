"""Stores of each kind: a folder, memory, and an S3 server on loopback."""

import hashlib
import logging
from pathlib import Path

import fsspec
import pytest

from tests.remote.helpers import KEYS


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
