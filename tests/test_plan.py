"""The plan: why a stage is stale, what the rest will take, which part of a run is made, and that it answers at once."""

import json
import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest

from selfimprove import bounds, chat, estimates, plan, reasons, recipe_file, store
from selfimprove.errors import UserError
from selfimprove.judges import Candidate
from selfimprove.judges.pairing import RULES, Dropped, Judged
from selfimprove.recipe import Adapter, Choice, Optimizer
from selfimprove.report import planning
from tests import altered, synthetic_run
from tests.conftest import QUICK, SMALL, processor_seconds, selfimprove


def planned(*arguments: str) -> dict[str, dict]:
    """The plan of a command by `1/label`."""
    result = selfimprove("plan", *arguments, "--json")
    assert result.code == 0, result.err
    return {f"{p['iteration']}/{p['stage'].partition('-')[2]}": p for p in json.loads(result.out)}


def manifest(run: Path, directory: str) -> dict:
    return json.loads((run / directory / "manifest.json").read_text())


class TestReasons:
    def test_a_setting_is_told_by_the_recipes_own_key_and_every_reason_is_told(self, fake_run):
        told = planned("fake", "--set", "train.loss.beta=3.0", "--set", "evaluate.n=3", "--set", "seed=7")
        assert set(told["1/train"]["why"].split("; ")) == {
            "train.loss.beta 2.0 -> 3.0",
            "seed 0 -> 7",
            "iter-001/3-label will be made again",
        }
        assert "evaluate.n 2 -> 3" in told["1/evaluate"]["why"]
        assert "iter-001/4-train will be made again" in told["1/evaluate"]["why"]
        assert "evaluate.n 2 -> 3" in told["0/control-evaluate"]["why"]

    def test_a_plan_with_set_changes_nothing_on_disk(self, fake_run):
        before = {p: p.stat().st_mtime_ns for p in fake_run.rglob("*") if p.is_file()}
        assert {p["plan"] for p in planned("fake").values()} == {"done"}
        assert planned("fake", "--set", "train.loss.beta=3.0")["1/train"]["plan"] == "stale"
        assert {p: p.stat().st_mtime_ns for p in fake_run.rglob("*") if p.is_file()} == before

    def test_a_change_of_the_machine_makes_nothing_stale(self, fake_run):
        assert {p["plan"] for p in planned("fake", "--set", "machine.max_num_seqs=8").values()} == {"done"}

    def test_the_lines_of_a_changed_template_are_told(self, fake_run, tmp_path, monkeypatch):
        real = chat.template_path
        changed = tmp_path / "hundred.jinja"
        lines = real("judge/hundred").read_text().splitlines(keepends=True)
        changed.write_text("".join([*lines[:1], "another line\n", *lines[2:], "one more\n"]))
        monkeypatch.setattr(chat, "template_path", lambda name: changed if name == "judge/hundred" else real(name))
        why = planned("fake")["1/label"]["why"]
        assert f"judge template judge/hundred.jinja changed: line 2, line {len(lines) + 1}" in why
        shutil.rmtree(fake_run / "templates")
        assert planned("fake")["1/label"]["why"] == "judge template judge/hundred.jinja changed"

    def test_the_kept_texts_are_what_their_names_say(self, fake_run):
        used = {d for m in fake_run.glob("iter-*/*/manifest.json") for d in
                json.loads(m.read_text())["ingredients"]["templates"].values()}  # fmt: skip
        assert {p.name for p in (fake_run / "templates").iterdir()} == used != set()
        assert all(store.sha256(p) == p.name for p in (fake_run / "templates").iterdir())

    @pytest.mark.parametrize(
        ("new", "told"),
        [
            ("1\n2\nX\nY\nZ\n6\n", "lines 3-5"),
            ("1\n2\n3\n4\n5\nX\n", "line 6"),
            ("1\n2\n5\n6\n", "2 lines gone after line 2"),
            ("X\n1\n2\n3\n4\n5\n6\nY\n", "line 1, line 8"),
            ("X\n1\n2\nA\nB\n5\n6\n", "line 1, lines 4-5"),
            ("1\n2\n3\n4\n5\n6", "line 6"),  # its end of line is gone
            ("", "6 lines gone after line 0"),
        ],
    )
    def test_changed_lines_are_numbered_as_diff_numbers_them(self, new, told, tmp_path):
        old = "1\n2\n3\n4\n5\n6\n"
        assert reasons.changed_lines(old, new) == told
        (tmp_path / "old").write_text(old)
        (tmp_path / "new").write_text(new)
        hunks = subprocess.run(["diff", tmp_path / "old", tmp_path / "new"], capture_output=True, text=True).stdout
        after = [line.replace("c", "a").split("a")[-1] for line in hunks.splitlines() if line[:1].isdigit()]
        expected = [
            f"{len(range(*_span(hunk.split('d')[0])))} lines gone after line {hunk.split('d')[1]}"
            if "d" in hunk
            else f"line{'s' if ',' in hunk else ''} {hunk.replace(',', '-')}"
            for hunk in after
        ]
        assert told == ", ".join(expected)

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            ({"a": None}, {"a": 3}, ["k.a unset -> 3"]),
            ({"a": {"b": 1}}, {}, ["k.a removed"]),
            ({}, {"a": {"b": 1}}, ["k.a added"]),
            ({"a": True}, {"a": False}, ["k.a true -> false"]),
            (
                {"a": [{"name": "x", "b": 1}, {"name": "y", "b": 2}]},
                {"a": [{"name": "x", "b": 1}, {"name": "y", "b": 3}]},
                ["k.a.y.b 2 -> 3"],
            ),
            ({"a": [1, 2]}, {"a": [1]}, ["k.a [1, 2] -> [1]"]),
            ({"a": "x" * 100}, {"a": "y"}, [f"k.a {'x' * 60}… -> y"]),
            ({"a": 1}, {"a": 1}, []),
        ],
    )  # fmt: skip
    def test_values(self, old, new, told):
        assert reasons.values("k", old, new) == told

    def test_an_artifact_made_again_by_hand_is_named_once(self, fake_run):
        other = manifest(fake_run, "iter-001/4-train")
        other["outputs"] = [o | {"sha256": "0" * 64} if "safetensors" in o["path"] else o for o in other["outputs"]]
        altered.write_manifest(fake_run / "iter-001/4-train", other)
        assert planned("fake")["1/evaluate"]["why"] == "iter-001/4-train was made again"

    def test_a_changed_model_and_a_file_that_is_gone_are_named(self, cut_data):
        assert selfimprove("iterate", "--run", "r", "--rounds", "1", *QUICK).code == 0
        told = planned("r", "--set", "data.heldout=other.jsonl")
        assert told["0/evaluate"]["why"] == "data.heldout is gone (other.jsonl)"
        told = planned("r", "--set", "data.seeds=heldout.jsonl")
        assert told["1/synthesize"]["why"] == f"data.seeds changed ({Path('heldout.jsonl').resolve()})"
        refused = selfimprove("plan", "r", "--set", "train.loss.beta=abc")
        assert refused.code == 1
        assert "parameter 'beta': input should be a valid number" in refused.err


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition(",")
    return int(first), int(last or first) + 1


class TestFindStep:
    def test_every_name_of_every_step_is_found(self):
        chosen = recipe_file.load(recipe_file.find("synpo"), ["rounds=2"])
        for step in plan.steps(chosen):
            for text in (step.directory, f"{step.iteration}/{step.name}", plan.called(step)):
                assert plan.find_step(chosen, text) == step

    @pytest.mark.parametrize("text", ["label", "3/label", "2/lable", "2/1-label", "", "2", "../2/label", "2/label/x"])
    def test_anything_else_is_refused_with_the_names(self, text):
        chosen = recipe_file.load(recipe_file.find("default"), ["rounds=2"])
        with pytest.raises(UserError) as told:
            plan.find_step(chosen, text)
        assert f"no stage '{text}'" in told.value.message
        assert "0/control-evaluate; 1/ to 2/ synthesize, generate, label, train, evaluate" in told.value.hint


class TestSelection:
    def test_until_only_and_from(self, cut_data):
        run = Path("runs/r")

        def made() -> set[str]:
            return {f"{m.parent.parent.name[-1]}/{m.parent.name}" for m in run.glob("iter-*/*/manifest.json")}

        arguments = ["--run", "r", "--rounds", "2", *QUICK, "--set", "synthesize.prompts=40"]
        result = selfimprove("iterate", *arguments, "--until", "1/generate")
        assert result.code == 0, result.err
        base = {"0/1-evaluate", "0/2-control", "0/3-control-evaluate"}
        assert made() == base | {"1/1-synthesize", "1/2-generate"}
        assert json.loads(selfimprove("status", "r", "--json").out)["state"] == "stopped"
        result = selfimprove("resume", "r", "--only", "1/train")
        assert result.code == 1
        assert "iter-001/4-train is made from iter-001/3-label, which is not made yet" in result.err
        assert "--until 1/train" in result.err
        assert selfimprove("resume", "r", "--only", "1/label").code == 0
        assert made() == base | {"1/1-synthesize", "1/2-generate", "1/3-label"}
        assert "1/label is made already" in selfimprove("resume", "r", "--only", "1/label").err

        before = manifest(run, "iter-001/2-generate")["finished"], (run / "iter-001/2-generate").stat().st_ino
        result = selfimprove("resume", "r", "--from", "1/generate", "--until", "1/generate")
        assert result.code == 0, result.err
        assert "set aside iter-001/2-generate" in result.err
        assert "set aside iter-001/3-label" in result.err
        assert made() == base | {"1/1-synthesize", "1/2-generate"}
        assert before[1] != (run / "iter-001/2-generate").stat().st_ino
        assert selfimprove("iterate", *arguments).code == 0  # and on to the end
        assert len(made()) == 3 + 2 * 5

    @pytest.mark.parametrize(
        ("flags", "code", "says"),
        [
            (["--only", "1/label", "--until", "1/label"], 2, "--only goes with neither --from nor --until"),
            (["--only", "1/label", "--from", "1/label"], 2, "--only goes with neither --from nor --until"),
            (["--from", "2/label", "--until", "1/label"], 2, "--until 1/label comes before --from 2/label"),
            (["--from", "2/lable"], 1, "no stage '2/lable'"),
            (["--until", "3/label"], 1, "no stage '3/label'"),
        ],
    )
    @pytest.mark.parametrize("command", ["resume", "plan"])
    def test_what_does_not_go_together_is_refused_and_changes_nothing(self, fake_run, flags, code, says, command):
        result = selfimprove(command, "fake", *flags)
        assert (result.code, says in result.err) == (code, True), result.err
        assert "hint: " in result.err
        assert not (fake_run / "aside").exists()

    def test_from_of_a_run_that_is_not_there_or_of_another_recipe_sets_nothing_aside(self, fake_run):
        assert "nothing yet" in selfimprove("iterate", "--run", "new", "--from", "1/label", "--engine", "fake").err
        assert not Path("runs/new").exists()
        result = selfimprove("iterate", "--run", "fake", "--from", "1/label", "--engine", "fake", *SMALL, "--seed", "9")
        assert result.code == 1
        assert not (fake_run / "aside").exists()

    def test_a_plan_shows_what_from_would_make_again_and_ends_with_until(self, fake_run):
        told = planned("fake", "--from", "1/train", "--until", "2/generate")
        assert list(told)[-1] == "2/generate"
        assert told["1/label"]["plan"] == "done"
        assert told["1/train"]["why"] == "--from 1/train"
        assert told["2/generate"]["why"] == "iter-001/4-train will be made again"
        assert told["2/synthesize"]["plan"] == "done"
        assert list(planned("fake", "--only", "2/label")) == ["2/label"]


WITHIN = 1.5  # the factor between what round 1 tells of round 2, and what round 2 then takes


class TestEstimates:
    def test_round_1_tells_what_round_2_will_take(self, fake_run):
        actual = {
            f"iter-002/{m.parent.name}": json.loads(m.read_text()) for m in fake_run.glob("iter-002/*/manifest.json")
        }
        shutil.rmtree(fake_run / "iter-002")
        told = planned("fake")
        assert len(actual) == 5
        for directory, taken in actual.items():
            estimate = told[f"2/{directory.partition('-')[2].partition('-')[2]}"]["estimate"]
            size = sum(output["bytes"] for output in taken["outputs"])
            kept = estimate["disk_bytes"] - estimate["passing_bytes"]
            assert taken["tokens"] / WITHIN <= estimate["tokens"] <= taken["tokens"] * WITHIN, directory
            assert size / WITHIN <= kept <= size * WITHIN, directory
            assert estimate["seconds"] > 0
            assert estimate["usd"] == 0
            assert f"iter-001/{directory.partition('/')[2]}" in estimate["how"]
        assert told["2/train"]["estimate"]["memory_bytes"] > 2**20
        assert told["1/train"]["estimate"] is None

    def test_what_differs_scales(self, fake_run):
        plain = planned("fake", "--from", "2/generate")
        more = planned("fake", "--from", "2/generate", "--set", "generate.n=8", "--set", "train.optimizer.epochs=3")

        def ratio(stage: str) -> float:
            return more[stage]["estimate"]["tokens"] / plain[stage]["estimate"]["tokens"]

        assert ratio("2/generate") == pytest.approx(2, rel=0.02)
        assert ratio("2/train") == pytest.approx(6, rel=0.05)  # twice the pairs, three times each
        assert ratio("2/evaluate") == 1
        more = planned("fake", "--set", "evaluate.n=5")
        assert more["2/evaluate"]["estimate"]["tokens"] == pytest.approx(
            2 * manifest(fake_run, "iter-002/5-evaluate")["tokens"], rel=0.01
        )  # 1 + 5 answers in the place of 1 + 2

    def test_before_the_first_round_it_is_a_bound_that_holds_and_time_is_unknown(self, fake_runs, in_tmp):
        settings = [*SMALL, "--set", "engine.kind='fake'", "--set", "rounds=2"]
        told = planned("default", *settings)
        run = fake_runs / "runs/fake"
        for step in plan.steps(recipe_file.load(run / "recipe.toml")):
            taken, estimate = manifest(run, step.directory), told[plan.called(step)]["estimate"]
            assert estimate["seconds"] is None
            assert taken["tokens"] <= estimate["tokens"], step.directory
            size = sum(output["bytes"] for output in taken["outputs"])
            assert size <= estimate["disk_bytes"] <= max(100 * size, 2**23), step.directory

    def test_the_models_size_is_what_torch_counts(self, in_tmp):
        import transformers

        from selfimprove.data import SHIPPED

        loaded = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED["demo:model"])
        chosen = recipe_file.load(recipe_file.find("default"))
        found = bounds.Model.of(plan.Sources(store.Run(Path("runs/none")), chosen))
        assert found.parameters == sum(p.numel() for p in loaded.parameters())
        whole = Optimizer(learning_rate=1e-4, batch_size=10)
        assert found.checkpoints(whole, 100, 20) == 0  # 10 steps: none is written
        assert found.checkpoints(whole, 200, 20) == 3 * 4 * found.parameters
        assert found.checkpoints(whole, 1000, 20) == 2 * 3 * 4 * found.parameters
        low = whole.model_copy(update={"adapter": Adapter(rank=2)})
        assert found.checkpoints(low, 200, 20) == 3 * 4 * 2 * found.low_rank
        matrices = [p for name, p in loaded.named_parameters() if p.ndim == 2]
        assert found.low_rank >= sum(sum(p.shape) for p in matrices) - sum(loaded.get_input_embeddings().weight.shape)

    def test_api_cost_by_the_ceiling_and_then_by_what_was_spent(self, in_tmp):
        server = (
            "servers.s={url='http://127.0.0.1:1/v1', model='m', input_price=1.0, output_price=1.0, ceiling_usd=2.5}"
        )
        judge = ["label.judge={name='rubric', model='server:s'}", server]
        chosen = synthetic_run.recipe(2, *judge, "generate.n=1")
        run = store.Run(Path("runs/r"))
        taken = estimates.estimate(run, chosen, plan.examine(run, chosen))
        assert taken["iter-001/3-label"].usd == 2.5
        assert taken["iter-001/3-label"].tokens is None
        assert taken["iter-001/2-generate"].usd == 0
        unpriced = synthetic_run.recipe(2, judge[0], server.replace(", ceiling_usd=2.5", ""))
        assert estimates.estimate(run, unpriced, plan.examine(run, unpriced))["iter-001/3-label"].usd is None
        run = synthetic_run.write(Path("runs/r"), chosen, synthetic_run.World(), keyed=True)
        label = run.path / "iter-001/3-label"
        spent = manifest(run.path, "iter-001/3-label")
        spent["metrics"] = {"pairs": 60, "servers": {"s": {"usd": 0.75, "unmeasured": 0}}}
        altered.write_manifest(label, spent)
        shutil.rmtree(run.path / "iter-002")
        taken = estimates.estimate(run, chosen, plan.examine(run, chosen))
        assert taken["iter-002/3-label"].usd == pytest.approx(0.75, rel=0.05)
        assert taken["iter-002/3-label"].how.startswith("as iter-001/3-label")

    @pytest.mark.parametrize("answers", [1, 2, 5])
    @pytest.mark.parametrize(
        ("pairing", "parameters"),
        [*((name, {}) for name in RULES if name != "given"), ("best_vs_worst", {"max_pairs": 3}), ("top_k", {"k": 3})],
    )
    def test_no_rule_makes_more_pairs_of_a_prompt_than_the_bound(self, pairing, parameters, answers):
        def judged(source: str, k: int) -> Judged:
            return Judged(
                Candidate("p", "q", source, k, f"{source} {k}", [k + 10 * len(source)], "stop", None), float(k)
            )

        gold = [judged("gold", 9)] if pairing in ("gold_vs_generated", "dynamic") else []
        rest = [judged("improver", 8), judged("initial", 0)] if pairing == "improver_vs_initial" else []
        made = RULES[pairing]([*gold, *rest, *(judged("current", k) for k in range(answers))], Random(0), **parameters)
        chosen = recipe_file.load(recipe_file.find("default"))
        pairing_of = Choice.model_validate({"name": pairing, **parameters})
        chosen = chosen.model_copy(update={"label": chosen.label.model_copy(update={"pairing": pairing_of})})
        assert (0 if isinstance(made, Dropped) else len(made)) <= bounds._pairs_of_a_prompt(chosen, answers)

    def test_totals_count_checkpoints_once_and_never_take_unknown_for_zero(self):
        parts = [
            estimates.Estimate(10, 1.0, 100, 7, 0.5, "as x", 60),
            estimates.Estimate(None, None, 200, 9, 0.0, "rule", 80),
        ]
        sums = estimates.total(parts)
        assert sums.disk_bytes == 40 + 120 + 80
        assert sums.memory_bytes == 9
        assert sums.unknown == {"tokens": 1, "seconds": 1}
        assert planning._at_least("10", 1, 2) == ">10"
        assert planning._at_least("0", 2, 2) == "?"

    def test_the_table_ends_with_the_sum(self, fake_run):
        shutil.rmtree(fake_run / "iter-002")
        shown = selfimprove("plan", "fake").out
        assert "5 left" in shown
        assert "by earlier rounds of this run" in " ".join(shown.split())
        assert "?" in selfimprove("plan", "default", *SMALL).out
        assert "nothing to do" in selfimprove("plan", "fake", "--until", "1/evaluate").out


def test_a_plan_of_20_finished_rounds_answers_at_once(in_tmp):
    run = synthetic_run.write(Path("runs/long"), synthetic_run.recipe(20), synthetic_run.World(), 20, 2, keyed=True)
    _, of_help = processor_seconds("-m", "selfimprove", "--help")  # .15 to .3 s
    ended, seconds = processor_seconds("-m", "selfimprove", "plan", "long")
    assert ended.stdout.count("done") == 3 + 20 * 5
    assert run.path.is_dir()
    assert seconds < 6 * of_help  # 3 times


def test_what_is_published_while_a_plan_looks_is_not_taken_for_torn(fake_run, monkeypatch):
    hidden = fake_run / "hidden"
    directory = fake_run / "iter-002/5-evaluate"
    directory.rename(hidden)
    read = plan.Sources.manifest

    def publishing(self, name):
        found = read(self, name)
        if name == "iter-002/5-evaluate" and hidden.exists():
            hidden.rename(directory)
        return found

    monkeypatch.setattr(plan.Sources, "manifest", publishing)
    run = store.Run(fake_run)
    assert plan.examine(run, recipe_file.load(run.recipe_file))[-1].status == "to do"
