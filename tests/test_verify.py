"""`selfimprove verify`: every flipped bit is named, and what hashes cannot show is found by making it again."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfimprove import plan, recipe_file, store, verification
from selfimprove.data import SHIPPED
from selfimprove.evaluation.splits import SAMPLED
from selfimprove.plan import dependents
from selfimprove.report import imprint
from selfimprove.verification import files, labels, root
from selfimprove.verification.derive import differing
from tests.altered import change_manifest
from tests.conftest import QUICK, SMALL, selfimprove

LABEL, GENERATE, EVALUATE = "iter-001/3-label", "iter-001/2-generate", "iter-001/5-evaluate"


def sentences(run: Path) -> list[str]:
    return [problem.sentence for problem in verification.verify(store.Run(run)).broken]


def flip(path: Path, rng: random.Random) -> bytes:
    """Turn one bit over; returns what was there."""
    whole = path.read_bytes()
    position = rng.randrange(len(whole))
    path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << rng.randrange(8))]) + whole[position + 1 :])
    return whole


def forge(run: Path, directory: str) -> None:
    """Make everything true again that hashes say: the manifest, its key and seal, and the manifests of what follows.

    This is what somebody does who knows the format, or a stage that writes wrong rows.
    """
    change_manifest(run / directory, lambda told: None)
    known = store.Run(run)
    chosen = recipe_file.load(known.recipe_file)
    by_name = {step.directory: step for step in plan.steps(chosen)}
    for name in dependents(chosen, [directory])[1:]:
        if (run / name).exists():
            ingredients = plan.ingredients_of(by_name[name], chosen, plan.Sources(known, chosen))
            change_manifest(run / name, lambda told, new=ingredients: told.update(ingredients=new))


def point(run: Path, link: str, iteration: int) -> None:
    (run / link).unlink()
    (run / link).symlink_to(f"iter-{iteration:03d}")


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Change the rows of a shard."""
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), path)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file."""
    told = json.loads(path.read_text(encoding="utf-8"))
    change(told)
    path.write_text(json.dumps(told), encoding="utf-8")


class TestFlippedBits:
    def test_one_in_any_file_is_found_and_named_and_nothing_else_is(self, fake_run):
        """One bit in a file of each artifact at a time, until every file has had one."""
        rng = random.Random(0)
        assert sentences(fake_run) == []
        left = {d: sorted(p for p in d.rglob("*") if p.is_file()) for d in fake_run.glob("iter-*/*")}
        number = sum(map(len, left.values()))
        assert number > 60
        found = 0
        while any(left.values()):
            flipped = {of.pop(): b"" for of in left.values() if of}
            for path in flipped:
                flipped[path] = flip(path, rng)
            broken = sentences(fake_run)
            for path in flipped:
                assert [str(path) in sentence for sentence in broken].count(True) == 1, (path, broken)
            assert len(broken) == len(flipped)
            found += len(flipped)
            for path, whole in flipped.items():
                path.write_bytes(whole)
        assert found == number

    def test_any_bit_of_a_manifest(self, fake_run):
        directory = fake_run / "iter-001/4-train"
        file = directory / "manifest.json"
        whole = file.read_bytes()
        assert files._manifest(directory)[1] == ""
        for position in range(0, len(whole), 3):
            for bit in range(8):
                file.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :])
                assert str(file) in files._manifest(directory)[1], (position, bit)

    def test_a_manifest_without_a_seal_is_of_an_earlier_version_and_can_be_read(self, fake_run):
        for file in fake_run.glob("iter-*/*/manifest.json"):
            edit(file, lambda told: told.pop("seal"))
        found = verification.verify(store.Run(fake_run))
        assert found.broken == []
        assert len(found.notes) == 13
        assert "has no seal" in found.notes[0]

    def test_of_the_report(self, fake_run):
        assert selfimprove("report", "fake").code == 0
        page = fake_run / "report.html"
        assert sentences(fake_run) == []
        for seed in range(30):
            whole = flip(page, random.Random(seed))
            assert [str(page) in sentence for sentence in sentences(fake_run)] == [True], seed
            page.write_bytes(whole)
        whole = page.read_bytes()
        for position in range(len(whole) - 260, len(whole)):  # in the imprint itself
            page.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            told = verification.page.check(store.Run(fake_run), recipe_file.load(fake_run / "recipe.toml"))
            assert told.broken, position


class TestForged:
    """Every hash and seal is true: only making it again shows what is wrong."""

    def found(self, run: Path, directory: str, *words: str) -> None:
        forge(run, directory)
        broken = sentences(run)
        assert broken, "not seen"
        assert any(all(word in sentence for word in (directory, *words)) for sentence in broken), broken
        assert all(directory in sentence for sentence in broken)

    def test_nothing_changed_is_nothing_found(self, fake_run):
        for directory in (GENERATE, LABEL, EVALUATE):
            forge(fake_run, directory)
        assert sentences(fake_run) == []

    def test_a_pair_turned_over(self, fake_run):
        def turn(rows):
            row = rows[3]
            for what in ("", "_source", "_score", "_token_ids"):
                a, b = f"chosen{what}", f"rejected{what}"
                row[a], row[b] = row[b], row[a]
            return rows

        rewrite(fake_run / LABEL / "pairs-00000.parquet", turn)
        self.found(fake_run, LABEL, "is not what verdicts and rule give", "chosen_token_ids")

    def test_one_token_of_a_pair(self, fake_run):
        def change(rows):
            rows[0]["chosen_token_ids"][0] += 1
            return rows

        rewrite(fake_run / LABEL / "pairs-00000.parquet", change)
        self.found(fake_run, LABEL, "(chosen_token_ids)")

    @pytest.mark.parametrize(
        ("table", "directory", "said"),
        [
            ("pairs", LABEL, "is missing, verdicts and rule give it"),
            ("verdicts", LABEL, "has no verdict"),
            ("quarantine", LABEL, "as quarantined"),
            ("generations", GENERATE, "completions out"),
            ("samples", EVALUATE, "answers out"),
            ("prompts", "iter-001/1-synthesize", "keyword lists out"),
        ],
    )
    def test_a_row_dropped(self, fake_run, table, directory, said):
        rewrite(fake_run / directory / f"{table}-00000.parquet", lambda rows: rows[1:])
        self.found(fake_run, directory, said)

    @pytest.mark.parametrize(
        ("table", "directory"),
        [("pairs", LABEL), ("verdicts", LABEL), ("generations", GENERATE), ("samples", EVALUATE)],
    )
    def test_a_row_doubled(self, fake_run, table, directory):
        rewrite(fake_run / directory / f"{table}-00000.parquet", lambda rows: [*rows, rows[5]])
        self.found(fake_run, directory, "stands twice")

    def test_a_verdict_that_the_checker_does_not_give(self, fake_run):
        def change(rows):
            rows[2]["score"] = 1.0 - rows[2]["score"]
            return rows

        rewrite(fake_run / LABEL / "verdicts-00000.parquet", change)
        self.found(fake_run, LABEL, "and the judge gives")

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("prompt_id", "i1-p99999", "answers a prompt that is not there"),
            ("prompt", "Another one.", "its prompt is another one"),
            ("policy", "0" * 64, "by other weights"),
            ("logprobs", [0.0], "log-probs"),
            ("sample", 77, "no such sample"),
        ],
    )
    def test_an_answer_that_comes_from_nowhere(self, fake_run, field, value, said):
        def change(rows):
            rows[0][field] = value
            return rows

        rewrite(fake_run / GENERATE / "generations-00000.parquet", change)
        self.found(fake_run, GENERATE, said)

    @pytest.mark.parametrize("mode", ["greedy", "sampled"])
    def test_a_score(self, fake_run, mode):
        def better(told):
            told["scores"][mode]["value"] += 0.001

        edit(fake_run / EVALUATE / "scores.json", better)
        self.found(fake_run, EVALUATE, f"scores.json: scores.{mode}.value")

    def test_a_p_value_and_an_interval(self, fake_run):
        def surer(told):
            told["comparisons"]["base"]["greedy"]["p"] *= 0.99
            told["comparisons"]["base"]["greedy"]["ci95"][0] += 1e-6

        edit(fake_run / EVALUATE / "scores.json", surer)
        forge(fake_run, EVALUATE)
        broken = sentences(fake_run)
        assert [name in sentence for name, sentence in zip(("ci95[0]", "greedy.p"), broken, strict=True)] == [True] * 2

    def test_an_answer_to_a_held_out_prompt_and_its_score(self, fake_run):
        def change(rows):
            row = next(row for row in rows if row["score"] == 0.0)
            row["score"] = 1.0
            return rows

        rewrite(fake_run / EVALUATE / "samples-00000.parquet", change)
        self.found(fake_run, EVALUATE, "scores 1.0, and by the judge 0.0")

    def test_rows_of_another_schema_and_a_file_that_is_no_parquet(self, fake_run):
        path = fake_run / LABEL / "pairs-00000.parquet"
        table = pq.read_table(path)
        pq.write_table(table.drop_columns(["source"]), path)
        self.found(fake_run, LABEL, "pairs-00000.parquet has not the columns of Pair: 'source' is missing")
        path.write_bytes(b"PAR1 not really PAR1")
        self.found(fake_run, LABEL, "pairs-00000.parquet cannot be read")

    def test_a_number_in_the_report(self, fake_run):
        """The page's own hash is true again; its numbers are not the run's."""
        assert selfimprove("report", "fake").code == 0
        path = fake_run / "report.html"
        body = path.read_text(encoding="utf-8").rpartition("<!-- selfimprove")[0]
        chosen, run = recipe_file.load(fake_run / "recipe.toml"), store.Run(fake_run)
        where = body.index("[.") + 2
        changed = body[:where] + str((int(body[where]) + 1) % 10) + body[where + 1 :]
        path.write_text(imprint.stamp(changed, run, chosen, False), encoding="utf-8")
        assert ["shows other numbers" in sentence for sentence in sentences(fake_run)] == [True]
        path.write_text(imprint.stamp(body, run, chosen, False), encoding="utf-8")
        assert sentences(fake_run) == []


class TestAround:
    def test_a_report_of_an_older_state_is_out_of_date_and_no_fault(self, fake_run):
        assert selfimprove("report", "fake").code == 0
        shutil.rmtree(fake_run / "iter-002/5-evaluate")
        point(fake_run, "latest", 1)
        point(fake_run, "best", 1)
        result = selfimprove("verify", "fake")
        assert (result.code, "out of date" in result.err) == (0, True), result.out

    def test_a_report_written_while_an_input_was_missing_is_out_of_date(self, cut_data):
        assert selfimprove("iterate", "--run", "r", "--rounds", "1", *QUICK).code == 0
        Path("seeds.jsonl").rename("away.jsonl")
        assert selfimprove("report", "r").code == 0
        Path("away.jsonl").rename("seeds.jsonl")
        result = selfimprove("verify", "r")
        assert result.code == 0, result.out
        assert "report.html is out of date" in result.err

    @pytest.mark.parametrize("link", ["latest", "best"])
    def test_a_link_that_a_run_has_not_moved_yet_is_no_fault(self, fake_run, link):
        assert (fake_run / link).readlink() == Path("iter-002")
        point(fake_run, link, 1)
        assert selfimprove("verify", "fake").code == 3
        store.Run(fake_run).write_state("stopped", 2, "5-evaluate")
        result = selfimprove("verify", "fake")
        assert result.code == 0, result.out
        moves = f"{link} points to iter-001, and the {link} round is iter-002; selfimprove resume fake moves it"
        assert moves in result.err
        assert selfimprove("resume", "fake").code == 0
        assert (fake_run / link).readlink() == Path("iter-002")

    def test_a_link_to_what_was_never_the_best_is_a_fault_of_a_run_that_goes_on_too(self, fake_run):
        run, chosen = store.Run(fake_run), recipe_file.load(fake_run / "recipe.toml")
        last = fake_run / "iter-002/5-evaluate"
        edit(last / "scores.json", lambda told: told["scores"][SAMPLED].update(value=0.0))
        change_manifest(last, lambda told: None)
        run.write_state("running", 2, "5-evaluate")
        wrong = f"{fake_run / 'best'} points to iter-002, and the best round is iter-001"
        assert list(root.check(run, chosen)) == [(wrong, "best")]

    @pytest.mark.parametrize("published", [1, 2])
    def test_links_that_move_while_they_are_looked_at_are_no_fault(self, fake_run, monkeypatch, published):
        run, chosen = store.Run(fake_run), recipe_file.load(fake_run / "recipe.toml")
        known = root.standings(run, chosen)[:published]
        run.write_state("running", 2, "5-evaluate")
        for link in ("latest", "best"):
            point(fake_run, link, 1)

        def moving(*_):
            for link in ("latest", "best"):
                point(fake_run, link, 2)
            run.write_state("done")
            return known

        monkeypatch.setattr(root, "standings", moving)
        assert list(root.check(run, chosen)) == []

    def test_a_template_that_was_altered_is_named_and_set_aside(self, fake_run):
        text = min((fake_run / plan.TEMPLATES).iterdir())
        text.write_text(text.read_text() + "x")
        assert sentences(fake_run) == [f"{text} is not the template of that hash"]
        assert selfimprove("verify", "fake", "--repair").code == 0
        assert sentences(fake_run) == []

    def test_files_too_many_and_links_out_of_the_run(self, fake_run, tmp_path):
        (fake_run / LABEL / "more.txt").write_text("")
        (fake_run / LABEL / "elsewhere").symlink_to(tmp_path)
        broken = sentences(fake_run)
        assert ["is not in its manifest" in broken[1], "elsewhere is a symbolic link" in broken[0]] == [True, True]
        assert len(broken) == 2

    def test_a_manifest_that_names_files_outside_reads_none(self, fake_run, tmp_path):
        secret = tmp_path / "secret"
        secret.write_text("x")

        told = store.read_manifest(fake_run / LABEL)
        out = store.Output.model_construct(path="../../../../secret", bytes=1, sha256=store.sha256(secret))
        told.outputs.append(out)
        (fake_run / LABEL / "manifest.json").write_text(store.manifest_text(told))
        [sentence] = sentences(fake_run)
        assert "manifest.json is damaged" in sentence
        assert "would lie outside of the artifact" in sentence

    @pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": "\x00"}', "rounds = 'many'"])
    @pytest.mark.parametrize("name", ["recipe.toml", "run.json", "digests.json"])
    def test_the_runs_own_files_damaged_are_named(self, fake_run, name, text):
        (fake_run / name).write_text(text)
        result = selfimprove("verify", "fake")
        assert result.code == 3
        assert f"fake/{name}" in result.out
        assert "Traceback" not in result.err

    def test_a_recipe_that_makes_something_else_is_told(self, fake_run):
        file = fake_run / "recipe.toml"
        file.write_text(file.read_text().replace("beta = 2.0", "beta = 3.0"))
        for number, sentence in enumerate(sentences(fake_run), 1):
            what = f"iter-00{number}/4-train is not what recipe.toml makes: train.loss.beta 2.0 -> 3.0"
            assert what in sentence
        assert number == 2

    def test_a_remembered_hash_of_a_file_outside_that_is_wrong(self, fake_run):
        edit(fake_run / "digests.json", lambda told: next(iter(told.values())).update(digest="0" * 64))
        assert any("has a wrong hash of" in sentence for sentence in sentences(fake_run))

    def test_many_answers_are_read_in_parts_with_the_same_result(self, fake_run, monkeypatch):
        monkeypatch.setattr(labels, "ANSWERS", 10)
        assert sentences(fake_run) == []


class TestBeforeUse:
    def test_no_round_begins_with_damaged_weights(self, fake_run):
        weights = fake_run / "iter-002/4-train/policy/model.safetensors"
        flip(weights, random.Random(3))
        result = selfimprove("iterate", "--rounds", "3", "--run", "fake", "--engine", "fake", *SMALL)
        assert result.code == 1
        assert f"{weights.relative_to(fake_run.parent.parent)} differs from its manifest" in result.err
        assert not (fake_run / "iter-003/2-generate").exists()  # the first stage that asks the policy

    def test_rows_that_were_changed_are_not_asked(self, fake_run):
        shard = fake_run / LABEL / "pairs-00000.parquet"
        shard.write_bytes(shard.read_bytes() + b"x")
        for command in (["fake", "1/label", "--jsonl"], ["fake", "1/label", "--where", "chosen_score > 0"]):
            result = selfimprove("inspect", *command)
            assert (result.code, "differs from its manifest" in result.err, result.out) == (1, True, "")


class TestRepair:
    def test_sets_aside_what_is_broken_and_what_was_made_from_it(self, fake_run):
        before = {p: p.read_bytes() for p in fake_run.glob("iter-*/*/pairs-*.parquet")}
        flip(fake_run / "iter-002/3-label/pairs-00000.parquet", random.Random(1))
        result = selfimprove("verify", "fake", "--repair")
        assert result.code == 0
        again = ["iter-002/3-label", "iter-002/4-train", "iter-002/5-evaluate"]
        assert f"will run again: {', '.join(again)}" in result.out
        assert "selfimprove resume fake" in result.err
        [aside] = (fake_run / "aside").iterdir()
        assert sorted(str(p.relative_to(aside)) for p in aside.glob("*/*")) == again
        assert (fake_run / "latest").readlink() == Path("iter-001")
        assert selfimprove("verify", "fake").code == 0  # what is left is sound
        assert selfimprove("resume", "fake").code == 0
        assert selfimprove("verify", "fake").code == 0
        for path, content in before.items():
            assert path.read_bytes() == content

    def test_of_a_sound_run_says_so_and_changes_nothing(self, fake_run):
        before = sorted(fake_run.rglob("*"))
        result = selfimprove("verify", "fake", "--repair")
        assert (result.code, "nothing to repair" in result.out) == (0, True)
        assert [p for p in sorted(fake_run.rglob("*")) if p.name != ".lock"] == [p for p in before if p.name != ".lock"]

    def test_a_damaged_manifest(self, fake_run):
        (fake_run / LABEL / "manifest.json").write_text("{")
        told = json.loads(selfimprove("verify", "fake", "--repair", "--json").out)
        assert told["repair"]["set_aside"][0] == LABEL
        assert "iter-001/4-train" in told["repair"]["again"]

    def test_a_stage_that_is_a_link_out_of_the_run_is_moved_as_a_link(self, fake_run, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        (fake_run / "iter-002").rename(elsewhere)
        (fake_run / "iter-002").symlink_to(elsewhere)
        there = sorted(elsewhere.rglob("*"))
        result = selfimprove("verify", "fake", "--repair")
        assert "iter-002 is a symbolic link" in result.out
        assert not os.path.lexists(fake_run / "iter-002")
        assert sorted(elsewhere.rglob("*")) == there

        assert (fake_run / "aside").is_dir()
        assert next((fake_run / "aside").glob("*/iter-002.link")).read_text() == f"{elsewhere}\n"

    def test_a_link_that_a_kill_left_behind_does_not_stop_the_run_for_ever(self, fake_run):
        (fake_run / "latest").unlink()
        (fake_run / "latest").symlink_to("iter-001")  # killed after the last stage, before the link was set
        assert selfimprove("verify", "fake", "--repair").code == 0
        assert selfimprove("resume", "fake").code == 0
        assert (fake_run / "latest").readlink() == Path("iter-002")
        assert selfimprove("verify", "fake").code == 0

    def test_while_another_process_writes_the_run_it_refuses(self, fake_run):
        (fake_run / LABEL / "more").write_text("")
        with store.Run(fake_run).lock():
            result = selfimprove("verify", "fake", "--repair")
        assert (result.code, (fake_run / LABEL / "more").exists()) == (1, True)

    def test_what_only_the_user_can_mend_is_left_alone(self, fake_run):
        file = fake_run / "recipe.toml"
        file.write_text(file.read_text().replace("beta = 2.0", "beta = 3.0"))
        result = selfimprove("verify", "fake", "--repair")
        assert (result.code, (fake_run / "aside").exists()) == (3, False)
        file.write_text("{")
        (fake_run / LABEL / "more").write_text("")
        result = selfimprove("verify", "fake", "--repair")
        assert (result.code, (fake_run / "aside").exists()) == (1, False)
        assert "put the recipe back" in result.err


def test_a_gate_that_decided_otherwise(cut_data):
    lines = SHIPPED["demo:selection"].read_text(encoding="utf-8").splitlines(keepends=True)
    Path("selection.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
    settings = "stages=['generate', 'label', 'train', 'evaluate', 'gate']", "data.selection=selection.jsonl", "gate={}"
    given = [word for one in settings for word in ("--set", one)]
    assert selfimprove("iterate", "spin", "--rounds", "2", "--run", "run", *QUICK, *given).code == 0
    run = Path("runs/run")
    assert sentences(run) == []
    rng = random.Random(2)
    for path in sorted(run.glob("iter-*/*-gate/*")):
        whole = flip(path, rng)
        assert [str(path) in sentence for sentence in sentences(run)] == [True]
        path.write_bytes(whole)

    def surer(told):
        told["primary"]["high"] += 0.01

    edit(run / "iter-002/5-gate/gate.json", surer)
    forge(run, "iter-002/5-gate")
    assert ["iter-002/5-gate/gate.json: primary.high" in s for s in sentences(run)] == [True]


def test_what_differs_between_two_values_is_named():
    told = {"a": [1.0, {"b": float("nan")}], "c": True, "d": "x"}
    assert list(differing(told, {"a": [1.0 + 1e-12, {"b": float("nan")}], "c": True, "d": "x"})) == []
    assert list(differing(told, {"a": [1.0, {"b": 2.0}], "c": 1, "e": "x"})) == [
        "a[1].b is nan, and follows as 2.0",
        "c is True, and follows as 1",
        "e is missing",
        "d is not of the run",
    ]
