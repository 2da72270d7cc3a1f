"""Trackers: tensorboard's files are read back; wandb and trackio are stand-ins that record what they were asked."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing import event_accumulator

from selfimprove.errors import UserError
from selfimprove.training import trackers
from selfimprove.training.trackers import TRACKERS, open_trackers

STEPS = [(1, {"loss": 0.5, "rewards/margins": -0.25}), (2, {"loss": 0.25, "rewards/margins": 1.0})]


def track(name, directory):
    [tracker] = open_trackers([name], directory, "round-1", {"beta": 0.1, "loss": "dpo"})
    for step, metrics in STEPS:
        tracker.log(step, metrics)
    tracker.close()


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    track("tensorboard", tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "round-1")).Reload()
    for name in STEPS[0][1]:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, metrics[name]) for step, metrics in STEPS]
    [text] = events.Tensors("config/text_summary")
    assert b'"beta": 0.1' in text.tensor_proto.string_val[0]


class StandIn:
    """In the place of wandb or trackio, with the calls of theirs that are used."""

    class Error(Exception):
        """As all of wandb's."""

    def __init__(self, mode="online", key=True):
        self.calls = []
        self.mode, self.key = mode, key

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, *, prompt, verify):  # wandb 0.31: without a prompt it says whether there are credentials
        assert not prompt
        assert not verify
        return self.key and self.mode == "online"

    def init(self, **settings):
        print("hello from the tracker")
        self.calls.append(("init", settings))
        return SimpleNamespace(
            log=lambda metrics, step: self.calls.append(("log", metrics, step)),
            finish=lambda: self.calls.append(("finish",)),
        )


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_opened_logged_to_and_finished(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, module := StandIn())
    track(name, tmp_path)
    (_, settings), *logged, last = module.calls
    expected = {"project": "selfimprove", "name": "round-1", "config": {"beta": 0.1, "loss": "dpo"}}
    # no mode: WANDB_MODE is the user's
    assert settings == (expected | {"dir": str(tmp_path)} if name == "wandb" else expected)
    assert logged == [("log", metrics, step) for step, metrics in STEPS]
    assert last == ("finish",)


def test_trackio_does_not_talk_on_stdout(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", StandIn())
    track("trackio", tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello" in err


def test_wandb_without_a_key_is_refused_before_it_is_needed_and_offline_needs_none(monkeypatch):
    for stand_in in (StandIn(), StandIn("offline", key=False), StandIn("disabled", key=False)):
        monkeypatch.setitem(sys.modules, "wandb", stand_in)
        trackers.check("wandb")
    monkeypatch.setitem(sys.modules, "wandb", StandIn(key=False))
    with pytest.raises(UserError, match="wandb has no API key") as raised:
        trackers.check("wandb")
    assert "WANDB_MODE=offline" in raised.value.hint


def test_what_wandb_says_when_it_begins_no_run_is_one_sentence(tmp_path, monkeypatch):
    def refuse(**_):
        raise module.Error("the network is down")

    monkeypatch.setitem(sys.modules, "wandb", module := StandIn())
    monkeypatch.setattr(module, "init", refuse)
    with pytest.raises(UserError, match="wandb begins no run: the network is down"):
        open_trackers(["wandb"], tmp_path, "round-1", {})


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_names_the_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, TRACKERS[name][0], None)  # import then says that there is none
    with pytest.raises(UserError, match=name) as raised:
        open_trackers([name], tmp_path, "round-1", {})
    assert raised.value.hint == f"pip install 'selfimprove[{name}]'"


def test_an_unknown_name_opens_nothing_and_names_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := StandIn())
    with pytest.raises(UserError, match="mlflow") as raised:
        open_trackers(["wandb", "mlflow"], tmp_path, "round-1", {})
    assert raised.value.hint == "known: tensorboard, wandb, trackio"
    assert module.calls == []


def test_no_names_no_trackers(tmp_path):
    assert open_trackers([], tmp_path, "round-1", {}) == []
