"""What differs between two iterations, against the artifacts themselves."""

import json
import os
from pathlib import Path

import pytest

from selfimprove import plan, recipe_file
from selfimprove.data import SHIPPED
from selfimprove.evaluation.paired import mcnemar
from selfimprove.records import Generation, Pair, Sample
from selfimprove.stages import generate, label
from selfimprove.store import Artifact, Run, read_manifest, read_rows
from tests.conftest import QUICK, cut, selfimprove
from tests.synthetic_run import recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `one` of three rounds and `two`, the same with another learning rate, of one."""
    folder = tmp_path_factory.mktemp("diff")
    before = Path.cwd()
    os.chdir(folder)
    try:
        cut(40)
        common = [*QUICK, "--set", "synthesize.prompts=40"]
        faster = ["--set", "train.optimizer.learning_rate=1e-3"]
        for name, rounds, more in (("one", "3", []), ("two", "1", faster)):
            result = selfimprove("iterate", "--rounds", rounds, "--run", name, *common, *more)
            assert result.code == 0, result.err
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder / "runs"


def told(*arguments: str) -> dict:
    result = selfimprove("diff", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def greedy(directory: Path) -> dict[str, Sample]:
    return {s.prompt_id: s for s in read_rows(directory, "samples", Sample) if s.mode == "greedy"}


class TestTwoIterationsOfARun:
    def test_scores_are_those_of_another_program_on_the_same_prompts(self, runs):
        before, after = (greedy(runs / f"one/iter-00{t}/5-evaluate") for t in (1, 3))
        [row] = [r for r in told("one@1", "one@3")["scores"] if r["mode"] == "greedy"]
        known = mcnemar([s.score == 1 for s in before.values()], [after[name].score == 1 for name in before])
        assert row["n"] == known.n == 40
        assert row["difference"] == pytest.approx(known.difference)
        assert row["p"] == pytest.approx(known.p_exact)
        assert row["old"]["value"] == pytest.approx(sum(s.score for s in before.values()) / 40)

    def test_answers(self, runs):
        before, after = (greedy(runs / f"one/iter-00{t}/5-evaluate") for t in (1, 3))
        found = {one["stage"]: one for one in told("one@1", "one@3", "--sample", "100")["answers"]}["evaluate"]
        changed = {b.prompt: (b.text, after[name].text) for name, b in before.items() if b.text != after[name].text}
        assert changed
        assert {e["prompt"]: (e["old"]["text"], e["new"]["text"]) for e in found["examples"]} == changed
        assert found["changed"] == len(changed)
        assert found["better"] == sum(after[n].score > b.score for n, b in before.items())
        assert found["worse"] == sum(after[n].score < b.score for n, b in before.items())

    def test_rows_cost_metrics_and_ingredients_are_the_manifests(self, runs):
        stages = {stage["stage"]: stage for stage in told("one@1", "one@3")["stages"]}
        assert list(stages) == ["synthesize", "generate", "label", "train", "evaluate"]
        for name, stage in stages.items():
            for which, t in (("old", 1), ("new", 3)):
                [path] = (runs / f"one/iter-00{t}").glob(f"?-{name}")
                manifest = read_manifest(path)
                assert stage[which]["rows"] == manifest.rows.model_dump()
                assert stage[which]["cost"]["tokens"] == manifest.tokens
                assert stage[which]["artifact"] == f"iter-00{t}/{path.name}"
        assert stages["train"]["metrics"]["loss"] == [
            read_manifest(runs / f"one/iter-00{t}/4-train").metrics["loss"] for t in (1, 3)
        ]
        assert stages["train"]["changes"] == []  # other pairs and another policy go without saying
        assert not any(change.startswith("iteration") for change in stages["train"]["changes"])

    def test_prompts_of_each_round_are_new(self, runs):
        texts = [
            {g.prompt for g in read_rows(runs / f"one/iter-00{t}/2-generate", "generations", Generation)}
            for t in (1, 3)
        ]
        found = told("one@1", "one@3")["prompts"]
        assert (found["shared"], found["gone"], found["new"]) == (
            len(texts[0] & texts[1]), len(texts[0] - texts[1]), len(texts[1] - texts[0])
        )  # fmt: skip
        assert found["examples"]["new"] == sorted(texts[1] - texts[0])[:3]

    def test_one_with_itself_differs_in_nothing(self, runs):
        found = told("one@2", "one@2")
        assert all(not stage["changes"] and not stage["metrics"] for stage in found["stages"])
        assert all(one["changed"] == 0 for one in found["answers"])
        assert {row["difference"] for row in found["scores"]} == {0}
        assert (found["prompts"]["new"], found["prompts"]["gone"], found["labels"]["flipped"]) == (0, 0, 0)
        assert found["labels"]["shared"] == found["labels"]["pairs"][0] > 0


def test_two_runs(runs):
    found = told("one@1", "two@1")
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert stages["train"]["changes"] == ["train.optimizer.learning_rate 0.0001 -> 0.001"]
    assert found["prompts"]["gone"] == found["prompts"]["new"] == 0
    assert len(found["scores"]) == 2


def test_scores_of_other_held_out_prompts_have_their_own_n(folder, runs):
    lines = SHIPPED["demo:heldout"].read_text(encoding="utf-8").splitlines(keepends=True)
    Path("other.jsonl").write_text("".join(lines[10:45]), encoding="utf-8")
    settings = [*QUICK, "--set", "synthesize.prompts=40", "--set", "data.heldout=other.jsonl"]
    assert selfimprove("iterate", "--rounds", "1", "--run", "three", *settings).code == 0
    shown = " ".join(selfimprove("diff", "one@1", "three@1").out.split())
    rows = {row["mode"]: row for row in told("one@1", "three@1")["scores"]}
    old, new = rows["greedy"]["old"]["value"], rows["greedy"]["new"]["value"]
    assert f"greedy {old:.3f} (n = 40) -> {new:.3f} (n = 35), on the 30 they share: " in shown


def test_a_stage(runs):
    found = told("one@1/label", "one@iter-003/3-label")
    assert [stage["stage"] for stage in found["stages"]] == ["label"]
    assert (found["scores"], found["prompts"], found["answers"], found["notes"]) == ([], None, [], [])
    scored = told("one@1/evaluate", "two@1/evaluate")
    assert len(scored["scores"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["one", "one@2"], 2, "'one' names no iteration"),
        (["one@1", "one@2/label"], 2, "an iteration and a stage"),
        (["one@1/label", "one@2/generate"], 1, "different stages"),
        (["one@1", "one@9"], 1, "no iteration '9'"),
        (["one@1", "none@1"], 1, "no run 'none'"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(runs, arguments, code, sentence):
    result = selfimprove("diff", *arguments)
    assert (result.code, result.out) == (code, "")
    assert sentence in result.err
    assert "hint: " in result.err


def test_labels_turned_over_and_what_a_person_sees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = recipe(2)
    path = tmp_path / "runs" / "turned"
    path.mkdir(parents=True)
    Run(path).recipe_file.write_text(recipe_file.dump(chosen), encoding="utf-8")

    def pair(number: int, better: str, worse: str) -> Pair:
        prompt = [{"role": "user", "content": f"q{number}"}]
        both = [[{"role": "assistant", "content": text}] for text in (better, worse)]
        return Pair(f"x/{number}", prompt, *both, f"p{number}", 1, "current", "current", 2.0, 1.0, [1], [1], [2])

    answers = [(0, "the quick fox"), (1, "same")], [(0, "the slow \x1b[31mfox"), (1, "same")]
    pairs = (
        [pair(0, "a", "b"), pair(1, "a", "b"), pair(2, "a", "c"), pair(3, "d", "e")],
        [pair(0, "b", "a"), pair(1, "a", "b"), pair(2, "c", "b")],
    )
    for step in plan.steps(chosen):
        if step.iteration and step.stage in (generate, label):
            artifact = Artifact(path / step.directory)
            artifact.begin()
            if step.stage is generate:
                made = [
                    Generation(f"p{k}", f"q{k}", "current", 0, text, [1], [1], [-1.0], "stop", "m", 0)
                    for k, text in answers[step.iteration - 1]
                ]
                artifact.write_rows("generations", Generation, made)
            else:
                artifact.write_rows("pairs", Pair, pairs[step.iteration - 1])
            artifact.contract("row", 1, 1)
            artifact.publish(step.iteration, step.name, {}, {})
    found = told("turned@1", "turned@2")["labels"]
    assert (found["pairs"], found["shared"], found["flipped"]) == ([4, 3], 2, 1)
    assert found["examples"] == [{"prompt": "q0", "was_chosen": "a", "is_chosen": "b"}]
    shown = selfimprove("diff", "turned@1", "turned@2").out
    assert "the [-quick fox-]{+slow ‹ESC›[31mfox+}" in shown
    assert "\x1b" not in shown
    assert "1 of 2 to the same prompt changed" in shown
