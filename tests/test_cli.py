"""The command line: bad input is one sentence with a hint, exit codes mean what they say, help is instant."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from selfimprove import __version__
from tests.conftest import SMALL, processor_seconds, selfimprove

MODEL_FILES = ("tokenizer.json", "tokenizer_config.json")


def refused(result, code, *says):
    """One sentence and a hint on stderr, nothing on stdout, no traceback, nothing half-written."""
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert "hint: " in result.err or "Usage:" in result.err
    for text in says:
        assert text in " ".join(result.err.split()), result.err
    assert not list(Path().glob("runs/**/iter-*"))


@pytest.fixture
def model(in_tmp):
    import shutil

    from selfimprove.data import SHIPPED

    shutil.copytree(SHIPPED["demo:model"], in_tmp / "model")
    return in_tmp / "model"


@pytest.mark.usefixtures("in_tmp")
class TestBadInput:
    def test_no_seed_file(self):
        refused(selfimprove("iterate", "--set", "data.seeds=none.jsonl"), 1, "data.seeds: no file none.jsonl")

    def test_an_empty_seed_file(self):
        Path("seeds.jsonl").write_text("")
        refused(selfimprove("iterate", "--set", "data.seeds=seeds.jsonl"), 1, "seeds.jsonl holds no rows")

    def test_a_recipe_with_an_unknown_key(self):
        Path("my.toml").write_text(
            (Path(__file__).parent.parent / "pipelines" / "default.toml").read_text() + "\n[trian]\nbeta = 1\n"
        )
        refused(selfimprove("iterate", "my.toml"), 1, "recipe my.toml: trian: unknown key")

    def test_an_unknown_recipe(self):
        refused(selfimprove("iterate", "sympo"), 1, "no recipe called 'sympo'", "synpo")

    def test_a_model_without_a_tokenizer(self, model):
        for name in MODEL_FILES:
            (model / name).unlink()
        refused(selfimprove("iterate", "--model", "model"), 1, "has no tokenizer")

    def test_a_model_without_a_chat_template(self, model):
        config = json.loads((model / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        (model / "chat_template.jinja").unlink(missing_ok=True)
        refused(selfimprove("iterate", "--model", "model"), 1, "has no chat template")

    def test_a_model_without_safetensors(self, model):
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        refused(selfimprove("iterate", "--model", "model"), 1, "no .safetensors weights")

    def test_no_model_there(self):
        refused(selfimprove("iterate", "--model", "./none"), 1, "no model directory './none'")

    def test_a_loss_that_is_not_known(self):
        refused(selfimprove("iterate", "--set", "train.loss.name=sympo"), 1, "unknown loss 'sympo'", "simpo")

    def test_a_judge_that_is_not_known(self):
        refused(selfimprove("iterate", "--set", "label.judge.name=oracle"), 1, "unknown judge 'oracle'", "verifier")

    def test_a_checker_that_is_not_known(self):
        result = selfimprove("iterate", "--set", "label.judge.checker=oracle")
        refused(result, 1, "parameter 'checker'", "'demo_world', 'exact', 'numeric'")

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            (["engine.max_model_len=48"], "leaves no room for a prompt"),
            (["label.pairing={name='gold_vs_generated'}"], "looks at no score"),
            (["label.pairing={name='improver_vs_initial'}"], "needs the stage improve"),
            (["label.judge.checker=exact"], "needs reference answers"),
            (["label.judge.checker=regex"], "needs reference answers"),
            (["label.judge.pattern=done"], "takes no 'pattern'"),
            (["evaluate.judge={name='self_consistency'}"], "cannot score held-out answers"),
            (["generate.n=1"], "at least two answers"),
            (["engine.max_model_len=99999"], "but the model has"),
            (["generate.sampling.temperature=0.0"], "the same answer again and again"),
        ],
    )
    def test_settings_that_do_not_fit_together(self, settings, says):
        refused(selfimprove("iterate", *(a for s in settings for a in ("--set", s))), 1, says)

    def test_a_seed_that_is_held_out(self):
        Path("seeds.jsonl").write_text(
            '{"prompt": "Sort: b a.", "completion": "a b"}\n{"prompt": "Sort: d c.", "completion": "c d"}\n'
        )
        Path("heldout.jsonl").write_text('{"prompt": "sort d, c"}\n{"prompt": "Sort: f e."}\n')
        told = selfimprove("iterate", "--set", "data.seeds=seeds.jsonl", "--set", "data.heldout=heldout.jsonl")
        refused(told, 1, "1 prompts of data.seeds stand in data.heldout too, the first is 'seed-00001'")

    def test_a_table_that_is_no_json(self):
        Path("seeds.csv").write_text("prompt,completion\nSort: b a.,a b\n")
        told = selfimprove("iterate", "--set", "data.seeds=seeds.csv")
        refused(told, 1, ".csv files are not read", "JSON lines or Parquet")

    def test_seeds_longer_than_the_context(self):
        rows = [{"id": f"long-{k}", "prompt": "Sort: b a.", "completion": "a b " * 1000 * k} for k in range(1, 8)]
        rows.append({"prompt": "Sort: d c.", "completion": "c d"})
        Path("seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        told = selfimprove("iterate", "--set", "data.seeds=seeds.jsonl")
        refused(told, 1, "7 of 8 seeds have more tokens than engine.max_model_len = 256: 'long-1' has ", "and 2 more")

    def test_held_out_prompts_without_the_answers_that_the_judge_needs(self):
        Path("heldout.jsonl").write_text('{"prompt": "Sort: f e.", "answer": "e f"}\n{"prompt": "Sort: g f."}\n')
        given = ("--set", "data.heldout=heldout.jsonl", "--set", "evaluate.judge.checker=exact")
        lacking = "1 of 2 prompts of data.heldout have none, the first is 'heldout-00001'"
        refused(selfimprove("check", "default", *given), 1, "evaluate.judge needs reference answers", lacking)

    def test_a_chat_template_that_is_no_template(self, model):
        config = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": "{% for"}
        (model / "chat_template.jinja").unlink(missing_ok=True)
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        refused(selfimprove("iterate", "--model", "model", "--rounds", "1"), 1, "chat template fails")

    def test_a_report_that_cannot_be_written(self):
        assert selfimprove("report", "none", "--out", "missing/x.html").code == 1

    @pytest.mark.parametrize("rounds", ["0", "-1", "two"])
    def test_rounds_below_one(self, rounds):
        refused(selfimprove("iterate", "--rounds", rounds), 2, "--rounds")

    @pytest.mark.parametrize("name", ["a/b", "../x", ".hidden", "a b"])
    def test_a_run_name_that_could_leave_the_folder(self, name):
        refused(selfimprove("iterate", "--run", name), 2, "cannot be a run's name")

    def test_an_unknown_option_and_an_unknown_command(self):
        assert selfimprove("iterate", "--round", "2").code == 2
        assert selfimprove("itterate").code == 2

    @pytest.mark.parametrize("command", ["resume", "status", "inspect", "verify", "report"])
    def test_no_such_run(self, command):
        refused(selfimprove(command, "nothing"), 1, "no run 'nothing'", "runs here: none")


def test_the_same_run_under_another_recipe_is_refused(fake_run):
    result = selfimprove("iterate", "--run", "fake", "--rounds", "2", "--engine", "fake", *SMALL, "--seed", "9")
    assert result.code == 1
    assert "run 'fake' exists with another recipe: seed 0 -> 9" in result.err
    assert "--run ANOTHER_NAME" in result.err


def test_help_answers_at_once_and_without_torch():
    ended, seconds = processor_seconds("-X", "importtime", "-m", "selfimprove", "--help")
    assert "iterate" in ended.stdout
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "pyarrow", "vllm", "pydantic", "scipy"}
    assert seconds < 0.5


def test_plan_of_a_recipe_that_was_not_run_yet(in_tmp):
    planned = json.loads(selfimprove("plan", "synpo", "--json").out)
    assert len(planned) == 3 + 4 * 6
    assert {entry["plan"] for entry in planned} == {"to do"}
    assert not Path("runs").exists()


def test_version_and_recipes():
    assert selfimprove("--version").out.startswith("selfimprove 0.")
    listed = json.loads(selfimprove("recipes", "--json").out)
    assert {"default", "synpo", "spin"} <= {entry["name"] for entry in listed}
    assert all(entry["about"] for entry in listed)
    shown = selfimprove("recipes").out
    assert max(len(line) for line in shown.splitlines()) <= 100
    small, big = shown.split("With the papers' settings")
    assert all((f"  {e['name']} " in big) == e["name"].endswith("_7b") for e in listed)
    assert all((f"  {e['name']} " in small) != e["name"].endswith("_7b") for e in listed)


def test_every_command_has_help():
    for command in ("iterate", "resume", "plan", "status", "inspect", "verify", "report", "recipes", "doctor", "demo"):
        assert selfimprove(command, "--help").code == 0


def test_help_lists_every_command_under_a_purpose():
    shown = selfimprove("--help").out
    assert "─ Make a run ─" in shown
    assert "─ Commands ─" not in shown  # where one without a purpose would be


def test_the_package_itself_is_the_command():
    done = subprocess.run([sys.executable, "-m", "selfimprove", "--version"], capture_output=True, text=True)
    assert done.stdout == f"selfimprove {__version__}\n"
