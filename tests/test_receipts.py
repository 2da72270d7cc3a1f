"""Receipts say with what a run was made; and nothing that a run writes lets another person in."""

import base64
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from selfimprove import columns, masking, receipts, recipe, store
from selfimprove.data import SHIPPED
from selfimprove.stages import evaluate
from tests.conftest import QUICK, cut, selfimprove
from tests.judges.misbehaving import Server

PLANTED = {
    "HF_TOKEN": "hf_plantedPlantedPlantedPlantedPl",
    "OPENAI_API_KEY": "sk-planted-0123456789abcdef0123456789",
    "WANDB_API_KEY": "0123456789abcdefplanted0123456789abcdef0",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED234567890",
    "AWS_SECRET_ACCESS_KEY": "planted/AwsSecret+0123456789abcdefghij",
    "JUDGE_KEY": 'planted"judge\\key-0123456789',
    "SOME_RANDOM_NAME": "planted-random-name-0123456789",
}
ADDRESS = "https://somebody:plantedpassword0123@example.invalid/repo.git"


def needles() -> dict[str, list[bytes]]:
    found = {}
    for name, secret in {**PLANTED, "git": "plantedpassword0123"}.items():
        raw = secret.encode()
        forms = [raw, base64.b64encode(raw).rstrip(b"="), urllib.parse.quote(secret, safe="").encode()]
        found[name] = [*forms, json.dumps(secret)[1:-1].encode(), raw.hex().encode(), repr(secret)[1:-1].encode()]
    return found


def everything(folder: Path) -> dict[str, bytes]:
    """All bytes of all files; of Parquet and SQLite what is in them too."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_file() or ".git/" in path.as_posix():
            continue
        found[str(path)] = path.read_bytes()
        if path.suffix == ".parquet":
            found[f"{path}!"] = repr(pq.read_table(path).to_pylist()).encode()
        if path.suffix == ".sqlite":
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as opened:
                tables = [name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
                rows = [opened.execute(f"SELECT * FROM {name}").fetchall() for name in tables]
            found[f"{path}!"] = repr(rows).encode() + b"".join(
                cell if isinstance(cell, bytes) else str(cell).encode()
                for table in rows
                for row in table
                for cell in row
            )
    return found


def leaks(of: dict[str, bytes]) -> list[tuple[str, str]]:
    return [
        (name, where) for where, raw in of.items() for name, forms in needles().items() if any(f in raw for f in forms)
    ]


def test_the_search_finds_what_is_there(tmp_path):
    record = columns.arrow_schema(store.Quarantined)
    secret = PLANTED["SOME_RANDOM_NAME"]
    pq.write_table(
        record.empty_table().from_pylist([{"row_id": secret * 3, "reason": "", "detail": ""}], schema=record),
        tmp_path / "x.parquet", compression="zstd",
    )  # fmt: skip
    with sqlite3.connect(tmp_path / "x.sqlite") as opened:
        opened.execute("CREATE TABLE t (a)")
        opened.execute("INSERT INTO t VALUES (?)", (base64.b64encode(PLANTED["HF_TOKEN"].encode()),))
    (tmp_path / "log").write_text(f"Authorization: Bearer {PLANTED['JUDGE_KEY']}")
    assert {name for name, _ in leaks(everything(tmp_path))} == {"SOME_RANDOM_NAME", "HF_TOKEN", "JUDGE_KEY"}


@pytest.mark.parametrize("engine", ["fake", "vllm"])
def test_no_secret_is_in_any_byte_that_a_run_writes(in_tmp, monkeypatch, engine):
    for name, secret in PLANTED.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if shutil.which("git"):
        for command in (["init", "-q"], ["remote", "add", "origin", ADDRESS]):
            subprocess.run(["git", *command], check=True)
    cut(40)
    kind = ["401"]

    def behave(handler, asked, number):
        given = asked.headers.get("authorization", "")
        assert PLANTED["JUDGE_KEY"] in given  # it does reach the server
        if kind[0] == "401":
            handler.say(401, {"error": {"message": f"no such key: {given}", "code": given}})
        elif kind[0] == "500":
            handler.say(500, f"Traceback\nheaders={asked.headers}", {"Content-Type": "text/plain"})
        else:
            handler.answer(asked, message={"role": "assistant", "content": f"Score: {len(asked.text) % 6} {given}"})

    server, said = Server(behave), {}
    command = [
        "iterate", "--run", "r", *QUICK, "--engine", engine, "--rounds", "1",
        "--set", "synthesize.prompts=40", "--set", "generate.n=3", "--set", "synthesize.generator.epochs=1",
        "--set", f"servers.s={{url='{server.url}', model='m', api_key_env='JUDGE_KEY', attempts=1}}",
        "--set", "label.judge={name='rubric', model='server:s', template='demo', max_tokens=8}",
    ]  # fmt: skip
    try:
        for kind[0], code in (("401", 1), ("500", 1), ("crash", None), ("fine", 0)):
            with pytest.MonkeyPatch.context() as patch:
                if kind[0] == "crash":
                    patch.setattr(evaluate, "run", lambda io, section: {}["crash"])
                    with pytest.raises(KeyError):
                        selfimprove(*command)
                    continue
                result = selfimprove(*command)
            assert result.code == code, result.err
            said[kind[0]] = (result.out + result.err).encode()
    finally:
        server.shutdown()
        server.server_close()
    for more in (
        ["report", "r"],
        ["verify", "r"],
        ["status", "r"],
        ["plan", "r"],
        ["gc", "r"],
        ["inspect", "r", "1/label"],
    ):
        result = selfimprove(*more)
        assert result.code == 0, result.err
        said[more[0]] = (result.out + result.err).encode()
    assert selfimprove("export", "r", "--latest", "--out", "out").code == 0
    found = everything(in_tmp)
    assert any("servers.sqlite!" in where for where in found)
    assert any("verdicts" in where and where.endswith("!") for where in found)
    assert engine == "fake" or any("engine.log" in where for where in found)
    assert leaks(found | said) == []


@pytest.fixture
def finished(cut_data):
    result = selfimprove(
        "iterate", "--run", "r", *QUICK, "--rounds", "1",
        "--set", "synthesize.prompts=40", "--set", "generate.n=3", "--set", "synthesize.generator.epochs=1",
    )  # fmt: skip
    assert result.code == 0, result.err
    return Path("runs/r")


def test_every_manifest_names_a_receipt_that_is_named_by_its_content(finished):
    named = set()
    for path in finished.glob("iter-*/*/manifest.json"):
        environment = json.loads(path.read_text())["environment"]
        named.add(environment["receipt"])
        assert {"python", "platform", "torch", "transformers", "numpy"} <= environment.keys()
    assert {f"{name}.json" for name in named} == {path.name for path in (finished / "receipts").iterdir()}
    for path in (finished / "receipts").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def test_a_receipt_says_what_pip_and_git_and_the_files_say(finished):
    [path] = (finished / "receipts").iterdir()
    told = json.loads(path.read_text())
    listed = subprocess.run(  # another program's view
        [sys.executable, "-c", "import pkgutil, numpy, torch, typer; print(numpy.__version__, torch.__version__)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    numpy, torch = listed.stdout.split()
    assert (told["packages"]["numpy"], told["packages"]["torch"].split("+")[0]) == (numpy, torch.split("+")[0])
    assert len(told["packages"]) > 50
    config = json.loads((SHIPPED["demo:model"] / "tokenizer_config.json").read_text())
    jinja = SHIPPED["demo:model"] / "chat_template.jinja"
    template = jinja.read_text() if jinja.exists() else config["chat_template"]
    assert told["chat_template"] == hashlib.sha256(template.encode()).hexdigest()
    assert told["model"] == store.model_identity(SHIPPED["demo:model"])
    assert told["hardware"]["threads"] == os.cpu_count()
    assert told["command"][:3] == ["iterate", "--run", "r"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_state_of_a_checkout_is_told_by_commit_and_the_hash_of_its_changes(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.invalid"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert receipts.git(tmp_path) is None
    git("init", "-q")
    assert receipts.git(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1\n")
    git("add", "a")
    git("commit", "-qm", "x")
    git("remote", "add", "origin", ADDRESS)
    clean = receipts.git(tmp_path)
    assert clean == {"commit": git("rev-parse", "HEAD"), "dirty": False, "diff_sha256": None}
    (tmp_path / "a").write_text("2\n")
    first = receipts.git(tmp_path)
    (tmp_path / "a").write_text("3\n")
    second = receipts.git(tmp_path)
    assert (first["dirty"], second["dirty"]) == (True, True)
    assert re.fullmatch("[0-9a-f]{64}", first["diff_sha256"])
    assert first["diff_sha256"] != second["diff_sha256"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert receipts.git(tmp_path) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--set", "servers.x.api_key=abcdef"], ["--set", "servers.x.api_key=***"]),
        (["--set", "servers.x={url='u', api_key = 'a b'}"], ["--set", "servers.x={url='u', api_key = ***}"]),
        (["--set", "servers.x.api_key_env=JUDGE_KEY"], ["--set", "servers.x.api_key_env=JUDGE_KEY"]),
        (["--set", "evaluate.max_tokens=64"], ["--set", "evaluate.max_tokens=64"]),
        (["--token", "abc"], ["--token", "***"]),
        (["http://me:pw@host/v1"], ["http://***@host/v1"]),
        (["http://host/v1?access_token=abc&x=1"], ["http://host/v1?access_token=***&x=1"]),
        ([f"--model={PLANTED['HF_TOKEN']}"], ["--model=***"]),
        (["in the middle some-long-value here"], ["in the middle *** here"]),
        (["--rounds", "4", "default"], ["--rounds", "4", "default"]),
    ],
)
def test_command_lines_are_masked(given, expected, monkeypatch):
    monkeypatch.setenv("PLANTED_PASSWORD", "some-long-value")
    assert masking.masked_all(given) == expected


@pytest.mark.parametrize(
    "server",
    [
        {"url": "http://me:plantedpw@host/v1", "model": "m"},
        {"url": "http://host/v1?api_key=plantedpw", "model": "m"},
        {"url": "http://host/v1", "model": "m", "api_key_env": "sk-plantedpw0123456789abcdef"},
        {"url": "http://host/v1", "model": "m", "api_key_env": PLANTED["HF_TOKEN"]},
        {"url": "http://host/v1", "model": "m", "api_key_env": "two words plantedpw"},
        {"url": "http://host/v1", "model": "m", "api_key": "plantedpw"},
    ],
)
def test_a_recipe_with_a_key_in_it_is_refused_without_repeating_it(server):
    from selfimprove.errors import UserError

    with pytest.raises(UserError) as refused:
        recipe.validated(recipe.Server, server, "recipe x")
    assert "planted" not in str(refused.value) + refused.value.hint
