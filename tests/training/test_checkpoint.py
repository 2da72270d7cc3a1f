"""A training killed at any moment and resumed ends with the same weights, bit for bit."""

import multiprocessing
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import save_file

from selfimprove.store import model_identity
from selfimprove.training import checkpoint, launch
from tests.training.conftest import job, lines

DPO = {"loss": {"name": "dpo", "beta": 0.1}, "reference": "previous"}
KINDS = {  # between them every kind of state that a checkpoint holds
    "queue of gaps and trainable noise": (
        {"loss": {"name": "gamma_dpo", "beta": 0.5}, "reference": "previous", "noise": {"kind": "trainable"}},
        {},
    ),
    "moving reference": ({**DPO, "reference": "ema", "ema_decay": 0.5}, {}),
    "chunks": ({**DPO, "chunks": {"number": 2}}, {}),
    "adapter": ({"loss": {"name": "beta_dpo"}, "reference": "initial"}, {"adapter": {"rank": 4, "alpha": 8.0}}),
}
KILLS = 5  # of each kind


@pytest.fixture(scope="module")
def processes():
    """Forks of a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfimprove.training.launch", "transformers.models.llama.modeling_llama", "peft"])
    return context


def train(folder, rows, preference, settings):
    folder.mkdir(exist_ok=True)
    launch.train(job(folder, rows, preference, {"checkpoint_steps": 1}, epochs=8, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_steps_the_weights_are_those_of_an_uninterrupted_run(tmp_path, pairs, processes, kind):
    preference, settings = KINDS[kind]
    rng = random.Random(kind)
    arguments = (pairs, preference, settings)
    folder, resumed = tmp_path / "killed", set()
    for _ in range(KILLS):
        process = processes.Process(target=train, args=(folder, *arguments))
        process.start()
        before = checkpoint.latest(folder / "scratch")
        while process.is_alive() and checkpoint.latest(folder / "scratch") == before:
            time.sleep(0.003)
        time.sleep(rng.uniform(0, 0.03))  # a step takes about 0.02 s: anywhere in it, its checkpoint included
        process.kill()
        process.join()
        last = checkpoint.latest(folder / "scratch")
        resumed.add(last and last.name)
    assert len(resumed - {None}) > 1  # else nothing was resumed
    for path in (folder, tmp_path / "whole"):
        process = processes.Process(target=train, args=(path, *arguments))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert model_identity(folder / "policy") == model_identity(tmp_path / "whole" / "policy")
    one, other = ((path / "losses-00000.parquet").read_bytes() for path in (folder, tmp_path / "whole"))
    assert one == other
    measured = ("tokens_per_second", "peak_memory_mib")
    for one, other in zip(lines(folder), lines(tmp_path / "whole"), strict=True):
        assert {k: v for k, v in one.items() if k not in measured} == {
            k: v for k, v in other.items() if k not in measured
        }


@pytest.mark.parametrize("damage", ["weights", "progress", "gone"])
def test_a_torn_checkpoint_is_passed_over_with_a_word(tmp_path, damage, capsys):
    (tmp_path / "checkpoint-000-00000004.tmp").mkdir()
    for number in (2, 3):
        folder = tmp_path / f"checkpoint-000-0000000{number}"
        folder.mkdir()
        save_file({"a": torch.ones(100)}, folder / "tensors.safetensors")
        (folder / "progress.json").write_text('{"chunk": 0}')
    assert checkpoint.latest(tmp_path).name.endswith("3")
    torn = tmp_path / "checkpoint-000-00000003" / ("progress.json" if damage == "progress" else "tensors.safetensors")
    whole = torn.read_bytes()
    torn.unlink() if damage == "gone" else torn.write_bytes(whole[: len(whole) // 2])
    assert checkpoint.latest(tmp_path).name.endswith("2")
    assert "checkpoint-000-00000003 is damaged" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoint-000-00000002")
    assert checkpoint.latest(tmp_path) is None


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path, pairs, monkeypatch):
    kept = []
    save = checkpoint.save

    def watched(folder, learner, progress):
        save(folder, learner, progress)
        kept.extend(path.name for path in checkpoint.latest(folder).iterdir())

    monkeypatch.setattr(checkpoint, "save", watched)
    train(tmp_path, pairs, DPO, {})
    assert set(kept) == {"tensors.safetensors", "progress.json"}
    assert torch.get_num_threads() == 1
