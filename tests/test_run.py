"""The main path with the fake engine: skip, resume after SIGKILL, stale and why, status, what may not enter."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors
import transformers

from selfimprove import plan, recipe_file, records, store
from selfimprove.data import SHIPPED, read_heldout, read_seeds
from selfimprove.stages.io import MEASURED
from tests.conftest import SMALL, processor_seconds, selfimprove

TINY = [
    "--engine", "fake", "--rounds", "1",
    "--set", "data.seeds=seeds.jsonl",
    "--set", "data.heldout=heldout.jsonl",
    "--set", "synthesize.prompts=40",
    "--set", "generate.n=3",
    "--set", "evaluate.n=1",
    "--set", "synthesize.generator.epochs=1",
    "--set", "control.optimizer.epochs=1",
    "--set", "train.optimizer.epochs=1",
]  # fmt: skip


def keys(run: Path) -> dict[str, str]:
    return {
        str(m.parent.relative_to(run)): json.loads(m.read_text())["key"] for m in run.glob("iter-*/*/manifest.json")
    }


def contents(run: Path) -> dict[str, object]:
    """The hash of every output; of metrics the lines themselves, less what is measured of the machine."""
    found: dict[str, object] = {}
    for manifest in run.glob("iter-*/*/manifest.json"):
        for output in json.loads(manifest.read_text())["outputs"]:
            name = f"{manifest.parent.relative_to(run)}/{output['path']}"
            found[name] = output["sha256"]
            if name.endswith("metrics.jsonl"):
                steps = [json.loads(line) for line in (run / name).read_text().splitlines()]
                found[name] = [{k: v for k, v in step.items() if k not in MEASURED} for step in steps]
    return found


def program(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "selfimprove", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_at(stage: str, process: subprocess.Popen[str], run: Path, signal_number: int = signal.SIGKILL) -> bool:
    """Signal the program while it is in a stage; False when it ended before."""
    while process.poll() is None:
        state = store.Run(run).read_state() if run.exists() else None
        if state and f"iter-{state.iteration:03d}/{state.stage}" == stage:
            process.send_signal(signal_number)
            process.communicate()
            return True
        time.sleep(0.002)
    return False


class TestResume:
    def test_sigkill_in_every_stage_and_the_result_is_that_of_an_uninterrupted_run(self, cut_data):
        assert selfimprove("iterate", "--run", "whole", *TINY).code == 0
        whole = Path("runs/whole")
        chosen = recipe_file.load(whole / "recipe.toml")
        stages = [step.directory for step in plan.steps(chosen)]
        assert len(stages) == 8

        broken = Path("runs/broken")
        process = program("iterate", "--run", "broken", *TINY)
        for stage in stages:
            while not kill_at(stage, process, broken):  # it was too quick for us: make the stage again
                assert process.returncode == 0, process.communicate()
                later = [s for s in stages[stages.index(stage) :] if (broken / s).exists()]
                for done in later:
                    shutil.rmtree(broken / done)
                process = program("resume", "broken")
            told = json.loads(selfimprove("status", "broken", "--json").out)
            assert told["state"] == "stopped"
            done = [
                f"iter-{entry['iteration']:03d}/{s['name']}"
                for entry in [told["base"], *told["iterations"]]
                for s in entry["stages"]
                if s["state"] == "done"
            ]
            assert done in (stages[: stages.index(stage)], stages[: stages.index(stage) + 1])
            process = program("resume", "broken")
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert keys(broken) == keys(whole)
        assert contents(broken) == contents(whole)
        assert not list(broken.glob("iter-*/*.partial"))
        assert selfimprove("verify", "broken").code == 0

    @pytest.mark.parametrize("delay", [0, 0.001, 0.1])  # at once: while the stage is only being set up
    def test_ctrl_c_ends_with_130_leaves_nothing_half_written_and_says_how_to_go_on(self, cut_data, delay):
        process = program("iterate", "--run", "stopped", *TINY)
        run = Path("runs/stopped")
        while not (run / "iter-000/2-control.partial").exists():
            assert process.poll() is None, process.communicate()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert process.returncode == 130
        assert "Traceback" not in err
        assert "selfimprove resume" in err
        assert not list(run.glob("iter-*/*.partial"))
        assert store.Run(run).read_state().state == "stopped"

    def test_a_finished_run_does_nothing_and_says_so_at_once(self, fake_run):
        before = {path: path.stat().st_mtime_ns for path in fake_run.rglob("*") if path.is_file()}
        _, of_help = processor_seconds("-m", "selfimprove", "--help")  # .15 to .3 s
        for command in (["resume", "fake"], ["iterate", "--run", "fake", "--rounds", "2", "--engine", "fake", *SMALL]):
            ended, seconds = processor_seconds("-m", "selfimprove", *command)
            assert "run 'fake' is finished: nothing to do" in ended.stderr
            assert seconds < 6 * of_help  # 3 to 4 times; with scipy imported 8
        after = {path: path.stat().st_mtime_ns for path in fake_run.rglob("*") if path.is_file()}
        assert {p.name for p in after if before.get(p) != after[p]} <= {".lock"}

    def test_a_row_too_long_for_a_helper_models_training_is_counted_and_breaks_no_contract(self, cut_data):
        long = ["--set", "synthesize.generator.max_length=50", "--set", "synthesize.generator.max_dropped_share=1.0"]
        result = selfimprove("iterate", "--run", "long", *TINY, *long)
        assert result.code == 0, result.err
        manifest = json.loads(Path("runs/long/iter-001/1-synthesize/manifest.json").read_text())
        dropped = manifest["metrics"]["generator rows dropped"]
        assert 0 < dropped["longer than max_length"] < 40
        assert manifest["metrics"]["generator rows"] + dropped["longer than max_length"] == 40

    def test_asking_for_fewer_rounds_does_not_move_the_links_back(self, fake_run):
        result = selfimprove("iterate", "--run", "fake", "--rounds", "1", "--engine", "fake", *SMALL)
        assert result.code == 0, result.err
        assert (fake_run / "latest").readlink() == Path("iter-002")

    def test_links_lost_to_a_kill_come_back(self, fake_run):
        (fake_run / "latest").unlink()
        assert selfimprove("resume", "fake").code == 0
        assert (fake_run / "latest").readlink() == Path("iter-002")

    def test_fewer_rounds_are_obeyed_and_forget_nothing(self, in_tmp):
        arguments = ["--run", "r", "--engine", "fake", *SMALL, "--set", "synthesize.prompts=30"]
        assert selfimprove("iterate", "--rounds", "1", *arguments).code == 0
        assert selfimprove("iterate", "--rounds", "2", *arguments).code == 0
        shutil.rmtree("runs/r/iter-002")
        assert "nothing to do" in selfimprove("iterate", "--rounds", "1", *arguments).err
        assert json.loads(selfimprove("status", "r", "--json").out)["iterations"][1]["stages"][0]["state"] == "missing"

    def test_more_rounds_go_on_where_the_run_ended(self, fake_run):
        before = keys(fake_run)
        result = selfimprove("iterate", "--run", "fake", "--rounds", "3", "--engine", "fake", *SMALL)
        assert result.code == 0, result.err
        assert set(keys(fake_run)) - set(before) == {
            f"iter-003/{n}" for n in ("1-synthesize", "2-generate", "3-label", "4-train", "5-evaluate")
        }
        assert {name: key for name, key in keys(fake_run).items() if name in before} == before
        assert (fake_run / "latest").readlink() == Path("iter-003")

    @pytest.mark.parametrize("where", ["rows", "weights", "state"])
    def test_a_full_disk_is_one_sentence_and_tears_nothing(self, fake_run, monkeypatch, where):
        shutil.rmtree(fake_run / "iter-002" / "5-evaluate")
        shutil.rmtree(fake_run / "iter-002" / "4-train")
        full = OSError(errno.ENOSPC, "No space left on device")

        def rows(self, name, record, rows):
            self.path("samples-00000.parquet").write_bytes(b"half")
            raise full

        def weights(self, directory, **options):
            Path(directory).mkdir()
            (Path(directory) / "model.safetensors").write_bytes(b"half")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

        def state(self, *arguments, **options):
            raise full

        if where == "rows":
            monkeypatch.setattr(store.Artifact, "write_rows", rows)
        elif where == "weights":
            monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", weights)
        else:
            monkeypatch.setattr(store.Run, "write_state", state)
        result = selfimprove("resume", "fake")
        assert result.code == 1
        assert "Traceback" not in result.err
        assert f"the disk of runs/fake is full: iter-002/{'5-evaluate' if where == 'rows' else '4-train'}" in result.err
        assert "selfimprove resume fake" in result.err
        assert not list(fake_run.glob("iter-*/*.partial"))
        if where != "state":
            assert json.loads(selfimprove("status", "fake", "--json").out)["state"] == "failed"
        monkeypatch.undo()
        os.chdir(fake_run.parent.parent)
        assert selfimprove("resume", "fake").code == 0


class TestStale:
    def test_a_changed_recipe_is_named_in_plan_and_refused_by_resume(self, fake_run):
        file = fake_run / "recipe.toml"
        file.write_text(file.read_text().replace("beta = ", "beta = 1"))
        planned = {
            (p["iteration"], p["stage"]): (p["plan"], p["why"])
            for p in json.loads(selfimprove("plan", "fake", "--json").out)
        }
        assert planned[1, "3-label"] == ("done", "")
        assert planned[1, "4-train"][0] == "stale"
        assert "train.loss.beta 2.0 -> 12.0" in planned[1, "4-train"][1]
        assert planned[1, "5-evaluate"] == ("stale", "iter-001/4-train will be made again")
        result = selfimprove("resume", "fake")
        assert result.code == 1
        assert "iter-001/4-train is not what this recipe makes: train.loss.beta 2.0 -> 12.0" in result.err
        assert "--from 1/train" in result.err

    def test_again_sets_aside_and_makes_anew(self, fake_run):
        before = keys(fake_run)
        result = selfimprove("resume", "fake", "--from", "iter-002/3-label")
        assert result.code == 0, result.err
        assert keys(fake_run) == before
        aside = sorted(p.name for p in fake_run.glob("aside/*/iter-002/*"))
        assert aside == ["3-label", "4-train", "5-evaluate"]
        result = selfimprove("resume", "fake", "--from", "iter-000/2-control")
        assert result.code == 0, result.err
        assert sorted(p.name for p in fake_run.glob("aside/*/iter-000/*")) == ["2-control", "3-control-evaluate"]
        assert not list(fake_run.glob("aside/*/iter-001"))  # what was not made from it stays
        assert selfimprove("resume", "fake", "--from", "iter-002/9-label").code == 1

    def test_a_changed_input_file_is_named(self, cut_data):
        assert selfimprove("iterate", "--run", "r", *TINY).code == 0
        with Path("seeds.jsonl").open("a") as file:
            file.write('{"prompt": "Sort: b a.", "completion": "a b"}\n')
        planned = {p["stage"]: p["why"] for p in json.loads(selfimprove("plan", "r", "--json").out)}
        assert planned["1-synthesize"] == f"data.seeds changed ({Path('seeds.jsonl').resolve()})"

    def test_hints_after_a_changed_input_file_lead_out(self, cut_data):
        before = Path("seeds.jsonl").read_text()
        assert selfimprove("iterate", "--run", "r", *TINY).code == 0
        with Path("seeds.jsonl").open("a") as file:
            file.write('{"prompt": "Sort: b a.", "completion": "a b"}\n')
        broken = selfimprove("verify", "r")
        stale = ["iter-000/2-control", "iter-001/1-synthesize"]  # neither is made from the other
        seeds = f"data.seeds changed ({Path('seeds.jsonl').resolve()})"
        lines = [f"runs/r/{name} is not what recipe.toml makes: {seeds}" for name in stale]
        assert broken.out.splitlines()[:-1] == lines  # no row is held against the file of now
        assert "put the file back as it was" in broken.err
        told = selfimprove("resume", "r").err
        assert (
            "hint: put the file back as it was; or selfimprove resume r --from 0/control makes it and the rest anew"
            in told
        )
        assert "--from 0/control" in selfimprove("resume", "r", "--from", "1/synthesize").err
        Path("seeds.jsonl").write_text(before)
        assert selfimprove("verify", "r").code == 0  # nothing was touched
        Path("seeds.jsonl").write_text(before + '{"prompt": "Sort: b a.", "completion": "a b"}\n')
        result = selfimprove("resume", "r", "--from", "0/control")
        assert result.code == 0, result.err
        assert selfimprove("verify", "r").code == 0
        aside = {str(Path(*found.parts[-2:])) for found in Path("runs/r/aside").glob("*/iter-*/*")}
        assert aside >= set(stale)

    def test_a_changed_function_of_the_users_own_is_named(self, cut_data):
        file = Path("graders_of_a_run.py")
        file.write_text("def grade(prompt, completion, answer):\n    return float(len(completion))\n")
        judge = "label.judge={name='verifier', checker='python', function='graders_of_a_run:grade'}"
        result = selfimprove("iterate", "--run", "r", *TINY, "--set", judge)
        assert result.code == 0, result.err
        assert {p["plan"] for p in json.loads(selfimprove("plan", "r", "--json").out)} == {"done"}
        file.write_text("def grade(prompt, completion, answer):\n    return 0.0\n")
        planned = {p["stage"]: p["why"] for p in json.loads(selfimprove("plan", "r", "--json").out)}
        assert planned["3-label"] == "file of graders_of_a_run:grade changed"
        assert planned["2-generate"] == ""

    def test_a_changed_stage_version_is_named(self, fake_run, monkeypatch):
        from selfimprove.stages import label

        was = label.VERSION
        monkeypatch.setattr(label, "VERSION", 99)
        planned = {
            (p["iteration"], p["stage"]): p["why"] for p in json.loads(selfimprove("plan", "fake", "--json").out)
        }
        assert planned[1, "3-label"] == f"version of stage label {was} -> 99"

    def test_a_changed_template_is_named(self, fake_run, monkeypatch, tmp_path):
        from selfimprove import chat

        changed = tmp_path / "synthesize.jinja"
        changed.write_text(chat.template_path("synthesize").read_text() + " Please.")
        real = chat.template_path
        monkeypatch.setattr(chat, "template_path", lambda name: changed if name == "synthesize" else real(name))
        planned = {
            (p["iteration"], p["stage"]): p["why"] for p in json.loads(selfimprove("plan", "fake", "--json").out)
        }
        assert planned[1, "1-synthesize"] == "template synthesize.jinja changed: line 2"

    def test_a_run_whose_seed_file_is_gone_can_still_be_looked_at(self, cut_data):
        assert selfimprove("iterate", "--run", "r", *TINY).code == 0
        Path("seeds.jsonl").unlink()
        told = json.loads(selfimprove("status", "r", "--json").out)
        assert told["iterations"][0]["scores"]
        assert {s["state"] for s in told["iterations"][0]["stages"]} == {"stale"}

    def test_machine_settings_enter_no_key(self, fake_run):
        file = fake_run / "recipe.toml"
        file.write_text(file.read_text().replace("max_num_seqs = 256", "max_num_seqs = 8"))
        assert all(p["plan"] == "done" for p in json.loads(selfimprove("plan", "fake", "--json").out))

    @pytest.mark.parametrize("name", ["pairs-00000.parquet", "manifest.json"])
    def test_a_published_file_that_is_gone_is_seen_by_plan_resume_and_verify(self, fake_run, name):
        (fake_run / "iter-001/3-label" / name).unlink()
        planned = {(p["iteration"], p["stage"]): p for p in json.loads(selfimprove("plan", "fake", "--json").out)}
        assert planned[1, "3-label"]["plan"] == "stale"
        assert f"{name} is missing" in planned[1, "3-label"]["why"]
        result = selfimprove("resume", "fake")
        assert result.code == 1
        assert "--from 1/label" in result.err
        assert selfimprove("verify", "fake").code == 3
        assert selfimprove("resume", "fake", "--from", "iter-001/3-label").code == 0
        assert selfimprove("verify", "fake").code == 0

    def test_a_refusal_changes_nothing(self, fake_run):
        file = fake_run / "recipe.toml"
        file.write_text(file.read_text().replace("beta = ", "beta = 1"))
        before = file.read_text()
        assert selfimprove("resume", "fake", "--from", "iter-002/2-generate").code == 1
        assert (fake_run / "iter-002/2-generate").is_dir()
        assert not (fake_run / "aside").exists()
        assert file.read_text() == before


class TestStatus:
    def test_the_documented_shape(self, fake_run):
        told = json.loads(selfimprove("status", "fake", "--json").out)
        assert {"run", "path", "recipe", "state", "iterations", "base"} <= told.keys()
        assert (told["run"], told["recipe"], told["state"]) == ("fake", "default", "done")
        assert [entry["iteration"] for entry in told["iterations"]] == [1, 2]
        assert told["base"]["iteration"] == 0
        for entry in [told["base"], *told["iterations"]]:
            for stage in entry["stages"]:
                assert stage.keys() == {"name", "state", "rows_in", "rows_out", "quarantined", "seconds", "collected"}
                assert stage["rows_in"] == stage["rows_out"] + stage["quarantined"]
            for score in entry["scores"].values():
                assert score["ci95"][0] <= score["value"] <= score["ci95"][1]
                assert score["n"] == 650

    def test_human_tables_and_inspect(self, fake_run):
        assert "iteration 2" in selfimprove("status", "fake").out
        looked = json.loads(selfimprove("inspect", "fake", "2/label", "--sample", "2", "--json").out)
        [stage] = looked["stages"]
        assert stage["stage"] == "iter-002/3-label"
        assert {kind: len(rows) for kind, rows in stage["samples"].items()}["pairs"] == 2
        assert len(json.loads(selfimprove("inspect", "fake", "1", "--json").out)["stages"]) == 5
        assert "chosen" in selfimprove("inspect", "fake", "1/label").out
        assert selfimprove("inspect", "fake", "7").code == 1
        assert selfimprove("inspect", "fake", "1/lable").code == 1

    def test_best_is_the_iteration_with_the_highest_sampled_accuracy(self, fake_run):
        told = json.loads(selfimprove("status", "fake", "--json").out)
        best = max(told["iterations"], key=lambda entry: entry["scores"]["sampled"]["value"])
        assert (fake_run / "best").readlink() == Path(f"iter-{best['iteration']:03d}")
        assert (fake_run / "latest").readlink() == Path("iter-002")


class TestWhatMayNotEnter:
    def test_no_evaluation_prompt_no_duplicate_and_no_gold_of_a_new_prompt_is_trained_on(self, fake_run):
        heldout = {row.prompt for row in read_heldout(SHIPPED["demo:heldout"])}
        seeds = {row.prompt for row in read_seeds(SHIPPED["demo:seeds"])}
        prompts = [
            row.text
            for t in (1, 2)
            for row in store.read_rows(fake_run / f"iter-00{t}/1-synthesize", "prompts", records.Prompt)
        ]
        assert len(prompts) == len(set(prompts)) > 50
        assert not set(prompts) & heldout
        assert not set(prompts) & seeds
        for t in (1, 2):
            directory = fake_run / f"iter-00{t}"
            generated = {
                (row.prompt_id, tuple(row.token_ids))
                for row in store.read_rows(directory / "2-generate", "generations", records.Generation)
            }
            pairs = store.read_rows(directory / "3-label", "pairs", records.Pair)
            assert pairs
            for pair in pairs:
                assert (pair.prompt_id, tuple(pair.chosen_token_ids)) in generated
                assert (pair.prompt_id, tuple(pair.rejected_token_ids)) in generated
                assert pair.chosen_source == pair.rejected_source == "current"
                assert pair.chosen_score > pair.rejected_score
                assert pair.prompt[0]["content"] not in heldout


class TestOtherRecipes:
    def test_synpo_pairs_the_improver_with_the_initial_model_and_accumulates(self, in_tmp):
        quick = ["--set", "improve.improver.epochs=1", "--set", "label.quota=20", "--set", "label.pairing.min_gap=0.0"]
        result = selfimprove("iterate", "synpo", "--rounds", "2", "--engine", "fake", *SMALL, *quick)
        assert result.code == 0, result.err
        run = Path("runs/synpo")
        for t in (1, 2):
            pairs = store.read_rows(run / f"iter-00{t}/4-label", "pairs", records.Pair)
            assert 0 < len(pairs) <= 20
            assert {(p.chosen_source, p.rejected_source) for p in pairs} == {("improver", "initial")}
        trained = json.loads((run / "iter-002/5-train/manifest.json").read_text())
        counts = [len(store.read_rows(run / f"iter-00{t}/4-label", "pairs", records.Pair)) for t in (1, 2)]
        assert trained["rows"]["rows_in"] == sum(counts)
        assert (
            trained["ingredients"]["models"]["start"]
            == json.loads((run / "iter-001/5-train/manifest.json").read_text())["ingredients"]["models"]["start"]
        )  # M_0 both times

    def test_spin_trains_on_this_round_and_the_one_before_and_starts_at_log_2(self, in_tmp):
        small = ["--set", "evaluate.n=1", "--set", "train.optimizer.epochs=1", "--set", "control.optimizer.epochs=1"]
        result = selfimprove("iterate", "spin", "--rounds", "3", "--engine", "fake", *small)
        assert result.code == 0, result.err
        run = Path("runs/spin")
        counts = {}
        for t in (1, 2, 3):
            pairs = store.read_rows(run / f"iter-00{t}/2-label", "pairs", records.Pair)
            counts[t] = len(pairs)
            assert {(p.chosen_source, p.rejected_source) for p in pairs} == {("gold", "current")}
            first = json.loads((run / f"iter-00{t}/3-train/metrics.jsonl").read_text().splitlines()[0])
            assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)
        rows = {
            t: json.loads((run / f"iter-00{t}/3-train/manifest.json").read_text())["rows"]["rows_in"] for t in counts
        }
        assert rows == {1: counts[1], 2: counts[1] + counts[2], 3: counts[2] + counts[3]}


def test_the_engine_host_dies_with_the_program(in_tmp):
    process = program("iterate", "--run", "r", "--rounds", "1", *SMALL)
    host = None
    while host is None:
        assert process.poll() is None, process.communicate()
        children = psutil.Process(process.pid).children(recursive=True)
        host = next((c for c in children if "selfimprove.engine.host" in " ".join(c.cmdline())), None)
        time.sleep(0.05)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs([host], timeout=10)
    assert not alive
