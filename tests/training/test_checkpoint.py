"""A training killed at any moment and resumed ends with the same weights, bit for bit."""

import errno
import random
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from selfimprove.store import model_identity
from selfimprove.training import checkpoint, launch
from tests.training.conftest import job, lines
from tests.training.processes import CONTEXT, fit

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


def train(folder, rows, preference, settings):
    folder.mkdir(exist_ok=True)
    launch.train(job(folder, rows, preference, {"checkpoint_steps": 1}, epochs=8, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_steps_the_weights_are_those_of_an_uninterrupted_run(tmp_path, pairs, kind):
    preference, settings = KINDS[kind]
    rng = random.Random(kind)
    arguments = (pairs, preference, settings)
    folder, resumed = tmp_path / "killed", set()
    for _ in range(KILLS):
        process = CONTEXT.Process(target=train, args=(folder, *arguments))
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
        process = CONTEXT.Process(target=train, args=(path, *arguments))
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


@pytest.fixture(scope="module")
def kept(tmp_path_factory, pairs):
    """The checkpoints of a training, each of which the next one removes."""
    folder = tmp_path_factory.mktemp("kept")
    save = checkpoint.save

    def watched(scratch, learner, progress):
        save(scratch, learner, progress)
        path = checkpoint.latest(scratch)
        shutil.copytree(path, folder / path.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", watched)
        train(tmp_path_factory.mktemp("run"), pairs, DPO, {})
    return folder


def flip(path: Path) -> None:
    """One bit, in the middle of it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip, halve, Path.unlink])
@pytest.mark.parametrize("file", ["shard-00001-model-00001-of-00001.safetensors", "progress.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, kept, file, harm, capsys):
    before, last = sorted(kept.iterdir())[-2:]
    for path in (before, last):
        shutil.copytree(path, tmp_path / path.name)
    shutil.copytree(last, tmp_path / "checkpoint-999-00000001.tmp")
    assert checkpoint.latest(tmp_path) == tmp_path / last.name
    harm(tmp_path / last.name / file)
    assert checkpoint.latest(tmp_path) == tmp_path / before.name
    assert f"{last.name} is damaged" in capsys.readouterr().err
    shutil.rmtree(tmp_path / before.name)
    assert checkpoint.latest(tmp_path) is None


def test_a_checkpoint_is_safetensors_and_json_with_the_digests_that_sha256sum_reads(kept):
    last = max(kept.iterdir())
    names = {"shard-00001-model-00001-of-00001.safetensors", "progress.json", "SHA256SUMS"}
    assert {path.name for path in last.iterdir()} == names
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=last, check=True, capture_output=True)
    assert checkpoint.read_progress(last)["steps_done"] > 0
    assert torch.get_num_threads() == 1


def full_disk(rank: int) -> None:
    """The second checkpoint meets a full disk, on one of the processes."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    create, opened = FileSystem.create_stream, []

    @contextmanager
    def failing(system, path, mode):
        opened.append(path)
        with create(system, path, mode) as stream:
            if len(opened) == 2:
                stream.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            yield stream

    if rank == 1:
        FileSystem.create_stream = failing


def test_a_full_disk_of_one_process_stops_all_and_leaves_the_checkpoint_before(tmp_path, pairs):
    machine = {"num_processes": 2, "sharding": "fsdp", "checkpoint_steps": 1}
    assert fit(tmp_path / "run", pairs, DPO, machine, before=full_disk) == [errno.ENOSPC] * 2
    assert [path.name for path in tmp_path.glob("run/scratch/checkpoint-*")] == ["checkpoint-000-00000001"]
    assert checkpoint.latest(tmp_path / "run" / "scratch") is not None
