"""The facts of a run against the same figures counted row by row, on a run of the fake engine and on written ones."""

import itertools
import json
import shutil
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfimprove import facts, records, store
from selfimprove.evaluation import diversity, health
from selfimprove.judges import audit, audit_scores
from selfimprove.ngrams import repetition
from selfimprove.recipe_file import find, load
from tests import altered, synthetic_run
from tests.conftest import QUICK, cut, selfimprove
from tests.synthetic_run import World, sentence


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished 2-round run of the embedded default with the fake engine and an audit."""
    folder = tmp_path_factory.mktemp("facts")
    settings = ["synthesize.prompts=60", "generate.n=3", "evaluate.n=2", "label.audit={anchors=8}", "label.quota=20"]
    settings += ["train.optimizer.batch_size=4", "train.loss={name='dpo', beta=0.5}"]
    small = ["synthesize.generator.epochs=1", "train.noise={kind='trainable'}", "train.reference='previous'"]
    given = [part for setting in [*settings, *small] for part in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cut(40)
        result = selfimprove("iterate", "--rounds", "2", "--run", "run", *QUICK, *given)
        assert result.code == 0, result.err
    return folder / "runs" / "run"


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of it, free to be damaged."""
    shutil.copytree(made, tmp_path / "runs" / "run", symlinks=True)
    monkeypatch.chdir(made.parent.parent)
    return store.Run(tmp_path / "runs" / "run")


def gathered(run, encode=None):
    return facts.gather(run, load(run.recipe_file), encode)


def rows(run, iteration, stage, name, record):
    return store.read_rows(directory(run, iteration, stage), name, record)


def manifest(run, iteration, stage):
    return store.read_manifest(directory(run, iteration, stage))


def directory(run, iteration, stage):
    [found] = (run.path / f"iter-{iteration:03d}").glob(f"[0-9]-{stage}")
    return found


def mean(values):
    return sum(values) / len(values)


class TestOfARun:
    def test_generations_and_pairs_are_as_counted_row_by_row(self, run):
        for t, of in enumerate(gathered(run)[1:], 1):
            own = [r for r in rows(run, t, "generate", "generations", records.Generation) if r.source == "current"]
            by_prompt: dict[str, list[str]] = {}
            for row in own:
                by_prompt.setdefault(row.prompt_id, []).append(row.text)
            differ = [mean([a != b for a, b in itertools.combinations(g, 2)]) for g in by_prompt.values()]
            assert of.answers_differ == pytest.approx(mean(differ))
            assert of.ended_share == mean([r.finish_reason == "stop" for r in own])
            pairs = rows(run, t, "label", "pairs", records.Pair)
            assert of.score_gap == pytest.approx(mean([p.chosen_score - p.rejected_score for p in pairs]))
            chosen, rejected = ([len(getattr(p, f"{s}_token_ids")) for p in pairs] for s in ("chosen", "rejected"))
            assert of.pair_length_ratio == pytest.approx(mean(chosen) / mean(rejected))

    def test_shares_of_prompts_are_those_of_the_manifests(self, run):
        for t, of in enumerate(gathered(run)[1:], 1):
            label, made = manifest(run, t, "label").rows, manifest(run, t, "synthesize").rows
            assert label.quarantined["over quota"]
            assert of.paired_share == label.rows_out / (label.rows_in - label.quarantined["over quota"])
            duplicates = sum(n for reason, n in made.quarantined.items() if "duplicate" in reason)
            assert of.duplicate_share == duplicates / made.rows_in

    def test_held_out_answers_are_as_counted_row_by_row(self, run):
        found = gathered(run)
        assert [of.iteration for of in found] == [0, 1, 2]
        texts = {}
        for t, of in enumerate(found):
            every = rows(run, t, "evaluate", "samples", records.Sample)
            sampled = [s for s in every if s.mode == "sampled"]
            texts[t] = [s.text for s in sampled]
            assert of.truncated_share == mean([s.finish_reason == "length" for s in sampled])
            assert of.repetition == pytest.approx(mean([repetition(s.text) for s in sampled]))
        for of, measured in zip(found, diversity.compare(list(texts.values())), strict=True):
            assert of.answer_self_bleu == pytest.approx(measured.self_bleu)
            assert of.answer_distinct == measured.distinct
        assert found[0].answer_tokens == manifest(run, 0, "evaluate").metrics["sampled mean tokens"]
        assert found[0].score_gap is None

    def test_training_is_the_last_fifth_of_the_steps_after_the_first_move(self, run):
        for t, of in enumerate(gathered(run)[1:], 1):
            [path] = (run.path / f"iter-{t:03d}").glob("?-train/metrics.jsonl")
            steps = [json.loads(line) for line in path.read_text().splitlines()]
            moved = [k for k in range(len(steps)) if any(s["learning_rate"] > 0 for s in steps[:k])]
            steps = [steps[k] for k in moved]
            last = steps[-max(1, len(steps) // 5) :]
            assert of.accuracy_end == pytest.approx(mean([s["rewards/accuracies"] for s in last]))
            assert of.noise_sigma == pytest.approx(mean([s["noise/sigma"] for s in last]))
            assert of.noise_bound == 4.0
            tokens = mean([len(p.chosen_token_ids) for p in rows(run, t, "label", "pairs", records.Pair)])
            assert of.chosen_change == pytest.approx(mean([s["logps/chosen_change"] for s in last]) / tokens)

    def test_the_judge_is_as_its_audit_says(self, run):
        [path] = (run.path / "iter-002").glob("?-label/audit.json")
        told = json.loads(path.read_text())
        of = gathered(run)[2]
        assert of.unreadable_share == told["scores"]["unknown"]["value"] == 0
        assert of.length_correlation == told["scores"]["length_within"]["spearman"]
        assert (of.leniency, of.lenient) == (told["drift"]["effect"], told["drift"]["alarm"])
        assert of.flip_rate is None

    def test_what_is_not_made_or_gone_is_none_and_the_panel_stands(self, run):
        [label] = (run.path / "iter-002").glob("?-label")
        shutil.rmtree(label)
        [shard] = (run.path / "iter-002").glob("?-generate/generations-*.parquet")
        shard.unlink()
        of = gathered(run)[2]
        assert (of.score_gap, of.paired_share, of.flip_rate, of.answers_differ, of.ended_share) == (None,) * 5
        assert of.chosen_change is None  # its pairs are gone, so that a change per token cannot be known
        assert of.accuracy_end is not None
        shutil.rmtree(run.path / "iter-002")
        assert [of.iteration for of in gathered(run)] == [0, 1]
        shutil.rmtree(run.path / "iter-001")
        shutil.rmtree(run.path / "iter-000")
        assert gathered(run) == []
        assert {i.state for i in health.panel([])} == {"unknown"}

    def test_cosines_are_there_when_an_encoder_is(self, run):
        def encode(texts):
            return np.array([[len(text), text.count("e"), 1.0] for text in texts])

        found = gathered(run, encode)
        prompts = [p.text for p in rows(run, 1, "synthesize", "prompts", records.Prompt)]
        assert found[1].prompt_cosine == pytest.approx(diversity.mean_cosine(encode(prompts)))
        assert 0 < found[0].answer_cosine <= 1
        assert gathered(run)[1].prompt_cosine is None

    def test_reading_writes_nothing(self, run):
        before = sorted((p, p.stat().st_mtime_ns) for p in run.path.rglob("*") if not p.is_symlink())
        gathered(run)
        assert sorted((p, p.stat().st_mtime_ns) for p in run.path.rglob("*") if not p.is_symlink()) == before


def with_columns(run, t, **columns):
    """The samples of a round with further columns, as a later evaluate stage writes them."""
    directory = run.path / f"iter-{t:03d}" / ("5-evaluate" if t else "1-evaluate")
    path = directory / "samples-00000.parquet"
    table = pq.read_table(path)
    for name, value in columns.items():
        made = pa.array([value(row) for row in table.to_pylist()])
        known = table.schema.get_field_index(name)
        table = table.append_column(name, made) if known < 0 else table.set_column(known, name, made)
    pq.write_table(table, path)
    altered.change_manifest(directory, lambda told: None)


class TestOptionalColumns:
    def test_kl_is_the_mean_over_prompts_of_what_policy_and_initial_model_say(self, tmp_path):
        chosen = synthetic_run.recipe(1)
        run = synthetic_run.write(tmp_path / "run", chosen, World())
        rng = np.random.default_rng(0)
        under = {t: [] for t in (0, 1)}
        for t in under:

            def initial(row, t=t):
                value = -10.0 - (0 if t == 0 else 4 + rng.normal())
                if row["mode"] == "sampled":
                    under[t].append(value)
                return value

            with_columns(run, t, logps=lambda row: -10.0, initial_logps=initial)
        found = facts.gather(run, chosen)
        assert found[0].kl == pytest.approx(0)
        assert found[0].surprise == pytest.approx(10)
        assert found[1].kl == pytest.approx(mean([-10 - value for value in under[1]]))
        kl = next(i for i in health.panel(found) if i.name == "KL to M_0")
        assert (kl.state, kl.values[1]) == ("good", found[1].kl)
        hot = chosen.model_copy(update={"evaluate": chosen.evaluate.model_copy(update={"temperature": 0.7})})
        assert facts.gather(run, hot)[1].kl is None

    def test_the_selection_split_is_the_gates_and_not_shown(self, tmp_path):
        chosen = synthetic_run.recipe(1)
        run = synthetic_run.write(tmp_path / "run", chosen, World(cut=lambda rng, t: True))
        half = lambda row: "report" if int(row["prompt_id"][1:]) < 50 else "selection"  # noqa: E731
        with_columns(run, 1, split=half, tokens=lambda row: 7 if half(row) == "report" else 700)
        assert facts.gather(run, chosen)[1].answer_tokens == 7


def test_an_audit_of_a_comparing_judge_is_read_as_it_is_written(tmp_path):
    compared = [audit.Row(None, 0.9, 0.1, (10, 5)), audit.Row(None, 0.9, 0.8, (3, 8)), audit.Row(None, None, 0.5)]
    told = {"judge": "j", "pairs": audit.plain(audit.audit(compared))}
    told["drift"] = audit.plain(audit_scores.drift([1.0, 2.0] * 8, [2.0, 3.0] * 8))
    chosen = synthetic_run.recipe(1)
    run = synthetic_run.write(tmp_path / "run", chosen, World(audit=lambda t: told))
    of = facts.gather(run, chosen)[1]
    assert of.flip_rate == pytest.approx(1 / 3)
    assert of.unreadable_share == pytest.approx(1 / 3)
    assert of.prefers_longer == 0  # one decided pair: for the shorter
    assert of.length_correlation is None
    assert of.leniency == pytest.approx(1 / np.std([1.0, 2.0] * 8, ddof=1))
    assert of.lenient is True


def test_without_a_reference_the_chosen_change_is_since_the_trainings_start(tmp_path):
    def metrics(t):
        return [{"learning_rate": 1e-5, "rewards/accuracies": 0.7, "logps/chosen": -40.0 - k} for k in range(10)]

    chosen = load(find("default"), ["rounds=1", "evaluate.n=3"])
    assert not chosen.train.references
    run = synthetic_run.write(tmp_path / "run", chosen, World(metrics=metrics))
    assert facts.gather(run, chosen)[1].chosen_change == pytest.approx((-48.5 + 40.5) / 21)


def test_a_thousand_prompts_and_four_rounds_take_seconds_and_little_memory(tmp_path):
    world = World(answer=lambda rng, t: sentence(rng, 60))
    run = synthetic_run.write(tmp_path / "run", synthetic_run.recipe(1), world, prompts=1000)
    for k in (2, 3, 4):
        shutil.copytree(run.path / "iter-001", run.path / f"iter-{k:03d}")
    began = time.perf_counter()
    found = facts.gather(run, synthetic_run.recipe(4))
    seconds = time.perf_counter() - began
    assert [of.iteration for of in found] == [0, 1, 2, 3, 4]
    assert seconds < 10  # about 2 s on a free core
    many = run.path / "many"
    many.mkdir()
    [shard] = run.path.glob("iter-001/?-generate/generations-*.parquet")
    peaks = []
    for copies in (1, 5):
        for k in range(copies):
            shutil.copyfile(shard, many / f"generations-{k:05d}.parquet")
        tracemalloc.start()
        facts._generated(many)
        assert len(facts._drawn(batch["text"] for batch in facts._columns(many, "generations", ["text"]))) == 1000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]  # five times the rows
