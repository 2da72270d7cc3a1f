"""`--model org/name`: the real download code against a hub of our own on localhost."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from selfimprove.data import SHIPPED

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in SHIPPED["demo:model"].iterdir() if path.is_file()}


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes of the Hub that a snapshot download uses."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/tiny/base/tree/"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in FILES.items()]
            tree.append({"type": "file", "path": "pytorch_model.bin", "size": 1, "oid": "1" * 40})
            self._send(json.dumps(tree).encode(), body)
        elif path.startswith("/api/models/tiny/base"):
            siblings = [{"rfilename": name} for name in [*FILES, "pytorch_model.bin"]]
            self._send(json.dumps({"id": "tiny/base", "sha": COMMIT, "siblings": siblings}).encode(), body)
        elif path.startswith(f"/tiny/base/resolve/{COMMIT}/") and (name := path.rpartition("/")[2]) in FILES:
            etag = hashlib.sha256(FILES[name]).hexdigest()
            self._send(FILES[name], body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def _send(self, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()


LOCATE = """
import sys
from selfimprove.errors import UserError
from selfimprove.models import locate_model
try:
    print(locate_model(sys.argv[1]))
except UserError as error:
    print(error.message, "|", error.hint)
"""


def locate(name: str, environment: dict[str, str]) -> str:
    ended = subprocess.run([sys.executable, "-c", LOCATE, name], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_a_hub_id_is_downloaded_once_and_only_what_is_needed(hub):
    directory = Path(locate("tiny/base", hub))
    assert {path.name for path in directory.iterdir()} == set(FILES)
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert Path(locate("tiny/base", {**hub, "HF_HUB_OFFLINE": "1"})) == directory


def test_what_the_hub_does_not_have_is_one_sentence(hub):
    told = locate("tiny/nothing", hub)
    assert told.startswith("'tiny/nothing' is no local directory and the hub did not give it")
    assert "|" in told
