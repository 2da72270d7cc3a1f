"""gc: only what nobody needs goes, it stays explained, and a run goes on as if nothing had happened."""

import json
import os
import shutil
from pathlib import Path

import pytest

from selfimprove import collected, garbage, plan, recipe_file, store
from selfimprove import run as running
from selfimprove.status import standing
from tests.conftest import SMALL, selfimprove
from tests.test_run import contents, keys

FAKE = ["iterate", "--run", "fake", "--engine", "fake", *SMALL]


def tree(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def weights(run: Path) -> set[str]:
    return {p.parent.relative_to(run).as_posix() for p in run.glob("iter-*/*/*/*.safetensors")}


def kept_policies(run: Path) -> set[str]:
    found = standing(store.Run(run), recipe_file.load(run / "recipe.toml"))
    return {f"iter-{n:03d}/4-train/policy" for n in (found.latest, found.best) if n}


def gc(*arguments: str) -> dict:
    result = selfimprove("gc", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_without_yes_sizes_are_shown_and_nothing_changes(fake_run):
    before = tree(fake_run)
    result = selfimprove("gc", "fake")
    assert result.code == 0
    assert "weights of rounds" in result.out
    assert "can go" in result.out
    assert "the latest" in result.out
    assert "selfimprove gc fake --yes" in result.err
    assert tree(fake_run) == before


def test_what_it_says_is_what_it_frees_and_every_text_stays(fake_run):
    (fake_run / "scratch/0123/policy").mkdir(parents=True)
    (fake_run / "scratch/0123/policy/left.safetensors").write_bytes(b"x" * 1000)
    (fake_run / "cache/abc").mkdir(parents=True)
    (fake_run / "cache/abc/0.safetensors").write_bytes(b"x" * 1000)
    (fake_run / "cache/servers.sqlite").write_bytes(b"paid for")
    before, models = tree(fake_run), weights(fake_run)
    [told] = gc("fake")["runs"]
    assert set(told["can go"]) >= {"weights of rounds", "caches", "scratch"}
    done = gc("fake", "--yes")
    after = tree(fake_run)
    gone = before.keys() - after.keys()
    assert done["freed"] == sum(told["can go"].values()) == sum(before[name] for name in gone) > 2**20
    assert {Path(name).suffix for name in gone if name.startswith("iter-")} == {".safetensors"}
    assert set(after.keys() - before.keys()) == {
        f"{name}/collected.json" for name in {"/".join(g.split("/")[:2]) for g in gone if g.startswith("iter-")}
    }
    assert weights(fake_run) >= kept_policies(fake_run) | {"iter-001/1-synthesize/generator"}
    assert weights(fake_run) < models
    assert "iter-000/2-control/policy" not in weights(fake_run)
    assert (fake_run / "cache/servers.sqlite").exists()


def test_what_is_gone_is_explained_and_nothing_is_stale_or_broken(fake_run):
    gc("fake", "--yes")
    assert selfimprove("verify", "fake").code == 0
    steps = json.loads(selfimprove("plan", "fake", "--json").out)
    assert {step["plan"] for step in steps} == {"done"}
    [control] = [s for s in steps if s["stage"] == "2-control"]
    assert control["why"].startswith("weights removed by gc on 20")
    told = json.loads(selfimprove("status", "fake", "--json").out)
    assert told["state"] == "done"
    assert any(stage["collected"] for stage in told["base"]["stages"])
    assert selfimprove("report", "fake").code == 0
    again = selfimprove("resume", "fake")
    assert again.code == 0
    assert "nothing to do" in again.err
    assert gc("fake", "--yes")["freed"] == 0  # and once more changes nothing


def test_a_file_that_is_lost_beside_those_removed_is_still_found(fake_run):
    gc("fake", "--yes")
    [policy] = [fake_run / name for name in kept_policies(fake_run)][:1]
    (policy / "model.safetensors").unlink()
    assert selfimprove("verify", "fake").code == 3
    (fake_run / "iter-000/2-control/policy/model.safetensors").write_bytes(b"put there later")
    assert "2-control/policy/model.safetensors differs" in selfimprove("verify", "fake").out


def test_a_run_goes_on_after_it_as_one_that_was_never_collected(fake_run, tmp_path):
    shutil.copytree(fake_run, tmp_path / "runs/other", symlinks=True)
    gc("fake", "--yes")
    assert selfimprove(*FAKE, "--rounds", "3").code == 0
    uncollected = selfimprove(*["other" if a == "fake" and i == 2 else a for i, a in enumerate(FAKE)], "--rounds", "3")
    assert uncollected.code == 0, uncollected.err
    assert keys(fake_run) == keys(tmp_path / "runs/other")
    assert contents_there(fake_run).items() <= contents(tmp_path / "runs/other").items()
    assert selfimprove("verify", "fake").code == 0


def contents_there(run: Path) -> dict:
    return {name: what for name, what in contents(run).items() if (run / name).exists()}


def test_a_stage_that_needs_what_is_gone_says_which_command_makes_it_again(fake_run):
    gc("fake", "--yes")
    shutil.rmtree(fake_run / "iter-000/3-control-evaluate")
    result = selfimprove("resume", "fake")
    assert result.code == 1
    assert "the weights of iter-000/2-control were removed by gc on 20" in result.err
    assert "selfimprove resume fake --from iter-000/2-control" in result.err
    chosen = recipe_file.load(fake_run / "recipe.toml")
    running.set_aside(store.Run(fake_run), chosen, "iter-000/2-control")
    assert selfimprove("resume", "fake").code == 0
    assert "iter-000/2-control/policy" in weights(fake_run)
    assert collected.read(fake_run / "iter-000/2-control") is None


def test_a_round_whose_weights_are_gone_cannot_be_exported(fake_run):
    gc("fake", "--yes")
    removed = [t for t in (1, 2) if f"iter-00{t}/4-train/policy" not in weights(fake_run)]
    for t in removed:
        result = selfimprove("export", "fake", "--iteration", str(t), "--out", "out")
        assert result.code == 1
        assert f"the weights of iter-00{t}/4-train were removed by gc" in result.err
    assert selfimprove("export", "fake", "--best", "--out", "best").code == 0


def test_one_that_is_interrupted_leaves_nothing_unexplained(fake_run, monkeypatch):
    whole, unlink, left = weights(fake_run), Path.unlink, [1]

    def stop(path, *arguments, **more):
        if path.suffix == ".safetensors":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        unlink(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        assert selfimprove("gc", "fake", "--yes").code == 130
    assert weights(fake_run) == whole - {"iter-000/2-control/policy"}
    assert selfimprove("verify", "fake").code == 0
    assert gc("fake", "--yes")["freed"] > 0
    assert selfimprove("verify", "fake").code == 0


def test_an_unfinished_run_keeps_whatever_its_next_stages_read(fake_run):
    for name in ("iter-002/4-train", "iter-002/5-evaluate"):
        shutil.rmtree(fake_run / name)
    (fake_run / "scratch/0123/shards").mkdir(parents=True)
    (fake_run / "cache/abc").mkdir(parents=True)
    (fake_run / "cache/abc/0.safetensors").write_bytes(b"x" * 1000)
    (fake_run / "scratch/0123/shards/ab.done").write_bytes(b"x")
    caches = sorted(fake_run.glob("cache/*/*"))
    gc("fake", "--yes")
    chosen = recipe_file.load(fake_run / "recipe.toml")
    for step in plan.steps(chosen):
        if step.directory == "iter-002/4-train":
            needed = {source for source in step.models.values() if source != "initial"}
    assert needed == {"iter-001/4-train/policy"} <= weights(fake_run)
    assert caches == sorted(fake_run.glob("cache/*/*"))
    assert (fake_run / "scratch/0123/shards/ab.done").exists()
    (fake_run / "cache/abc/0.safetensors").unlink()
    assert selfimprove("resume", "fake").code == 0


def test_what_a_fork_shares_stays_until_both_are_collected(fake_run):
    fork = fake_run.parent / "fork"
    shutil.copytree(fake_run, fork, symlinks=True, copy_function=os.link)
    for name in ("recipe.toml", ".lock", "state.json"):
        (fork / name).unlink()
        shutil.copy(fake_run / name, fork / name)
    before = weights(fork)
    [told] = gc("fake", "--yes")["runs"]
    assert told["kept"]["shared with another run, so that it frees nothing"] > 2**20
    assert weights(fork) == weights(fake_run) == before
    both = gc("--yes")
    assert both["freed"] > 2**20
    assert weights(fork) == weights(fake_run) < before
    for name in ("fake", "fork"):
        assert selfimprove("verify", name).code == 0


def test_a_policy_that_another_recipe_starts_from_stays(fake_run):
    other = fake_run.parent / "other"
    other.mkdir()
    control = fake_run / "iter-000/2-control/policy"
    text = (fake_run / "recipe.toml").read_text()
    assert 'path = "demo:model"' in text
    (other / "recipe.toml").write_text(text.replace('path = "demo:model"', f'path = "{control.resolve()}"'))
    [told] = gc("fake", "--yes")["runs"]
    assert told["kept"]["another run starts from it"] > 2**20
    assert control.relative_to(fake_run).as_posix() in weights(fake_run)


def test_nothing_is_removed_through_a_symlink(fake_run, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(fake_run / "iter-000/2-control", outside)
    (fake_run / "iter-000/2-control").symlink_to(outside)
    before = tree(outside)
    result = selfimprove("gc", "fake", "--yes")
    assert result.code == 1
    assert "iter-000/2-control is a symlink" in result.err
    assert "outside" not in {item.path.parts[-4] for item in garbage.survey([store.Run(fake_run)])[0].items}
    assert tree(outside) == before


def test_a_run_that_is_written_is_left_alone_and_the_others_are_not(fake_run):
    other = fake_run.parent / "other"
    shutil.copytree(fake_run, other, symlinks=True)
    before = tree(fake_run)
    with store.Run(fake_run).lock():
        alone = selfimprove("gc", "fake", "--yes")
        assert (alone.code, "is being written" in alone.err) == (1, True)
        result = selfimprove("gc", "--yes")
    assert result.code == 0
    assert "run 'fake' is being written" in result.err
    assert tree(fake_run) == before
    assert "iter-000/2-control/policy" not in weights(other)


def test_what_was_set_aside_keeps_its_rows(fake_run):
    chosen = recipe_file.load(fake_run / "recipe.toml")
    running.set_aside(store.Run(fake_run), chosen, "iter-002/4-train")
    assert list(fake_run.glob("aside/*/iter-002/4-train/policy/model.safetensors"))
    assert gc("fake", "--yes")["runs"][0]["can go"]["weights set aside"] > 2**20
    assert not list(fake_run.glob("aside/**/*.safetensors"))
    [aside] = fake_run.glob("aside/*/iter-002/5-evaluate")
    assert list(aside.glob("samples-*.parquet"))
    [noted] = fake_run.glob("aside/*/iter-002/4-train")
    assert not store.missing_outputs(noted, store.read_manifest(noted))


@pytest.mark.parametrize("name", ["..", "../x", "no", "-x"])
def test_a_name_that_is_no_run_is_refused(fake_run, name):
    assert selfimprove("gc", "--yes", "--", name).code == 1
