"""SAPO, D2PO and active preference learning: their parts, and whole runs with the fake engine."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import recipe_file, records, store
from selfimprove.chat import Chat
from selfimprove.data import SHIPPED, read_seeds
from selfimprove.engine import canary
from selfimprove.engine.protocol import Options
from selfimprove.engine.transformers_engine import TransformersEngine
from selfimprove.stages.generate import cut, spliced
from selfimprove.training import export, weights
from tests.conftest import QUICK, selfimprove
from tests.training.conftest import MODEL, tiny


def ran(name, *settings, rounds=2):
    result = selfimprove("iterate", name, "--rounds", str(rounds), *QUICK, *(p for s in settings for p in ("--set", s)))
    assert result.code == 0, result.err
    return Path("runs") / name


def manifest(directory):
    return json.loads((directory / "manifest.json").read_text())


def refused(name, *settings):
    result = selfimprove("check", name, *(part for s in settings for part in ("--set", s)))
    assert result.code == 1, result.err
    return result.err


class TestSplice:
    @given(st.integers(1, 60), st.integers(1, 60), st.integers(-5, 60), st.integers(0, 9))
    def test_a_cut_is_inside_the_gold_and_leaves_room(self, length, longest, room, seed):
        segment = min(longest, length)
        at = cut(length, segment, room, random.Random(seed))
        assert 0 <= at < length
        assert at <= max(0, room)
        if length - 3 - segment >= 0:
            assert at + segment <= length - 3

    def test_cuts_are_uniform_as_sapo_draws_them(self):
        drawn = Counter(cut(20, 8, 99, random.Random(seed)) for seed in range(5000))
        assert set(drawn) == set(range(10))
        assert max(drawn.values()) / min(drawn.values()) < 1.4
        assert {cut(20, 8, 4, random.Random(seed)) for seed in range(200)} == set(range(5))
        assert {cut(6, 6, 99, random.Random(seed)) for seed in range(200)} == set(range(6))

    def test_the_gold_stands_before_and_after_the_segment(self):
        gold = [1, 2, 3, 4, 5, 6, 0]
        assert spliced(gold, 2, [7, 8], 2, False) == ([1, 2, 7, 8, 5, 6, 0], True)
        assert spliced(gold, 2, [7, 8, 9], 2, False) == ([1, 2, 7, 8, 5, 6, 0], True)  # more was written than is used
        assert spliced(gold, 2, [7, 0], 2, True) == ([1, 2, 7, 0], True)  # nothing follows the end
        assert spliced(gold, 2, [7, 8, 0], 2, True) == ([1, 2, 7, 8, 5, 6, 0], True)  # that end was not used
        assert spliced(gold, 5, [7, 8, 9], 3, False) == ([1, 2, 3, 4, 5, 7, 8, 9], False)

    def test_every_token_has_the_log_prob_of_the_model_that_wrote_the_segment(self, cut_data):
        settings = ['generate.policy="current"', "evaluate.max_tokens=4", "generate.n=2"]
        result = selfimprove(
            "iterate", "sapo", "--rounds", "1", *QUICK, *(p for s in settings for p in ("--set", s)),
            "--engine", "transformers",
        )  # fmt: skip
        assert result.code == 0, result.err
        rows = store.read_rows(Path("runs/sapo/iter-001/1-generate"), "generations", records.Generation)
        assert len(rows) == 80
        engine = TransformersEngine(MODEL, Options("float32", 256, 8, 1, 0.5, 1))
        chat = Chat(MODEL)
        golds = {s.prompt_id: chat.completion_ids(s.prompt, s.completion) for s in read_seeds(Path("seeds.jsonl"))}
        unlike = 0
        for row in rows:
            assert row.prompt_token_ids == chat.prompt_ids(row.prompt)
            [scored] = engine.prompt_logprobs([row.prompt_token_ids + row.token_ids])
            assert row.logprobs == pytest.approx(scored[len(row.prompt_token_ids) - 1 :], abs=1e-4)
            gold = golds[row.prompt_id]
            same = next((i for i, (a, b) in enumerate(zip(row.token_ids, gold, strict=False)) if a != b), None)
            if same is not None:
                unlike += 1
                behind = len(gold) - same - 3  # a segment is 3 tokens
                whole = row.token_ids[-1] == chat.stop_token_ids[0]
                assert whole == (row.finish_reason == "stop")
                if len(row.token_ids) == len(gold) and behind > 0:
                    assert row.token_ids[-behind:] == gold[-behind:]
        assert unlike > 10


class TestAverage:
    def test_it_lies_between_the_two_and_is_a_plain_model_with_its_canary(self, tmp_path):
        before, policy = tmp_path / "before", tmp_path / "policy"
        for seed, folder in ((1, before), (2, policy)):
            tiny(seed=seed).save_pretrained(folder)
        (policy / "tokenizer.json").write_text("{}")
        distance = export.average(before, policy, 0.75, tmp_path / "average")
        old, new, found = (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
            for name in ("before", "policy", "average")
        )
        square = 0.0
        for name, tensor in weights.parameters(found).items():
            expected = 0.75 * weights.parameters(old)[name] + 0.25 * weights.parameters(new)[name]
            torch.testing.assert_close(tensor, expected, msg=name)
            square += (expected - weights.parameters(new)[name]).double().square().sum().item()
        assert distance == pytest.approx(square**0.5, rel=1e-5)
        assert (tmp_path / "average/tokenizer.json").is_file()
        saved = canary.of(tmp_path / "average")
        assert canary.difference(saved, canary.compute(found.eval()).logprobs).largest < 1e-5
        assert canary.difference(saved, canary.compute(new.eval()).logprobs).largest > 1e-3


class TestSapo:
    def test_averages_follow_one_another_and_write_and_judge_the_next_round(self, cut_data):
        run = ran("sapo", "train.replay.draws=30", rounds=3)

        def parameters(place):
            model = transformers.AutoModelForCausalLM.from_pretrained(place)
            return weights.parameters(model)

        held = weights.copied(parameters(MODEL))
        for t in (1, 2, 3):
            stage = run / f"iter-00{t}/3-train"
            weights.ema_(held, parameters(stage / "policy"), 0.5)
            found = parameters(stage / "average")
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, held[name], rtol=1e-5, atol=1e-6, msg=name)
            models = manifest(stage)["ingredients"]["models"]
            before = MODEL if t == 1 else run / f"iter-00{t - 1}/3-train/average"
            assert models["average"] == store.model_identity(before)
            written = store.read_rows(run / f"iter-00{t}/1-generate", "generations", records.Generation)
            assert {row.policy for row in written} == {models["average"]}
            assert manifest(stage)["rows"] | {"unit": "draw", "rows_in": 30, "rows_out": 30} == manifest(stage)["rows"]
            first = json.loads((stage / "metrics.jsonl").read_text().splitlines()[0])
            at_reference = t == 1  # later the policy is ahead of its average
            assert (first["loss"] == pytest.approx(0.693147, abs=1e-5)) == at_reference
        pairs = [store.read_rows(run / f"iter-00{t}/2-label", "pairs", records.Pair) for t in (1, 2, 3)]
        metrics = manifest(run / "iter-003/3-train")["metrics"]
        assert metrics["replay pairs"] == metrics["replay buffer"] == sum(map(len, pairs))
        assert metrics["replay distinct"] < 30  # a row came twice, and trained twice
        assert metrics["average distance"] > 0


class TestD2po:
    def test_gold_labels_add_up_and_every_answer_is_scored_by_the_discriminator(self, cut_data):
        run = ran("d2po", "discriminate.labels=10", "discriminate.optimizer.epochs=1")
        seen = []
        for t in (1, 2):
            stage = run / f"iter-00{t}/2-discriminate"
            answers = store.read_rows(run / f"iter-00{t}/1-generate", "generations", records.Generation)
            gold = store.read_rows(stage, "labels", records.Verdict)
            verdicts = store.read_rows(stage, "verdicts", records.Verdict)
            pairs = store.read_rows(stage, "pairs", records.Pair)
            assert len({v.prompt_id for v in gold}) == 10
            assert len(gold) == 40
            seen += pairs
            metrics = manifest(stage)["metrics"]
            assert metrics["gold pairs so far"] == metrics["discriminator rows"] == len(seen)
            assert len(pairs) + sum(metrics["labelled prompts without a pair"].values()) == 10
            scores = {(v.prompt_id, v.sample): v.score for v in gold}
            texts = {(r.prompt_id, r.text): scores.get((r.prompt_id, r.sample)) for r in answers}
            for pair in pairs:
                chosen, rejected = (texts[pair.prompt_id, side[0]["content"]] for side in (pair.chosen, pair.rejected))
                assert chosen > rejected
            assert {(v.prompt_id, v.sample) for v in verdicts} == {(r.prompt_id, r.sample) for r in answers}
            silver = {(v.prompt_id, v.sample): v.score for v in verdicts}
            for pair in store.read_rows(run / f"iter-00{t}/3-label", "pairs", records.Pair):
                of_prompt = [score for (prompt_id, _), score in silver.items() if prompt_id == pair.prompt_id]
                assert (pair.chosen_score, pair.rejected_score) == (max(of_prompt), min(of_prompt))
        assert manifest(run / "iter-001/2-discriminate")["metrics"]["agreement with gold before"] is None
        models = manifest(run / "iter-002/2-discriminate")["ingredients"]["models"]
        assert models["discriminator"] == store.model_identity(run / "iter-001/2-discriminate/discriminator")
        first = json.loads((run / "iter-002/2-discriminate/discriminator-metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)  # from the initial model, against it

    def test_scores_are_implicit_rewards_and_labels_go_to_the_smallest_gaps(self, cut_data):
        run = ran("d2po", "discriminate.labels=10", "discriminate.optimizer.epochs=1")
        from selfimprove.engine.fake_engine import FakeEngine

        def rewards(t, discriminator):
            rows = store.read_rows(run / f"iter-00{t}/1-generate", "generations", records.Generation)
            sums = []
            for model in (discriminator, MODEL):
                scored = FakeEngine(model).prompt_logprobs([r.prompt_token_ids + r.token_ids for r in rows])
                sums.append([sum(s[len(r.prompt_token_ids) - 1 :]) for s, r in zip(scored, rows, strict=True)])
            return {(r.prompt_id, r.sample): 0.05 * (d - i) for r, d, i in zip(rows, *sums, strict=True)}

        expected = rewards(2, run / "iter-002/2-discriminate/discriminator")
        verdicts = store.read_rows(run / "iter-002/2-discriminate", "verdicts", records.Verdict)
        assert {(v.prompt_id, v.sample): v.score for v in verdicts} == pytest.approx(expected)
        last = rewards(2, run / "iter-001/2-discriminate/discriminator")
        gaps = {name: abs(last[name, 0] - last[name, 1]) for name, _ in last}
        labelled = {v.prompt_id for v in store.read_rows(run / "iter-002/2-discriminate", "labels", records.Verdict)}
        others = [gap for name, gap in gaps.items() if name not in labelled]
        assert max(gaps[name] for name in labelled) <= min(others)


class TestAcquire:
    @pytest.mark.parametrize("by", ["entropy", "certainty", "random"])
    def test_only_what_was_acquired_is_judged_and_nothing_twice(self, cut_data, by):
        run = ran("active_dpo", "generate.n=4", f'label.acquire.by="{by}"', "label.acquire.prompts=15", rounds=3)
        known = set()
        for t, size in ((1, 15), (2, 15), (3, 10)):
            stage = run / f"iter-00{t}/2-label"
            judged = {v.prompt_id for v in store.read_rows(stage, "verdicts", records.Verdict)}
            assert len(judged) == size
            assert not judged & known
            rows = manifest(stage)["rows"]
            assert rows["rows_in"] == 40
            assert rows["quarantined"].get("acquired in an earlier round", 0) == len(known)
            assert rows["quarantined"].get("not acquired", 0) == 40 - len(known) - size
            assert {p.prompt_id for p in store.read_rows(stage, "pairs", records.Pair)} <= judged
            if by == "entropy":
                answers = store.read_rows(run / f"iter-00{t}/1-generate", "generations", records.Generation)
                entropy = Counter()
                for row in answers:
                    entropy[row.prompt_id] -= sum(row.logprobs) / 4
                left = [value for name, value in entropy.items() if name not in judged | known]
                assert min(entropy[name] for name in judged) >= max(left, default=0) - 1e-9
            known |= judged
        result = selfimprove("iterate", "active_dpo", "--rounds", "4", *QUICK, "--set", "generate.n=4",
                             "--set", f'label.acquire.by="{by}"', "--set", "label.acquire.prompts=15")  # fmt: skip
        assert result.code == 1
        assert "every prompt has been labelled in an earlier round" in result.err

    def test_before_any_training_certainty_is_a_draw(self, cut_data):
        """All implicit rewards are zero then; what the engines' rounding makes of them must not choose."""
        run = ran("active_dpo", "generate.n=2", 'label.acquire.by="certainty"', "label.acquire.prompts=15")
        values = [manifest(run / f"iter-00{t}/2-label")["metrics"]["uncertainty of the pool"] for t in (1, 2)]
        assert values[0] == 1.0
        assert values[1] < 0.99


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("sapo", ["generate.splice.segment=64"], "more than generate.sampling.max_tokens"),
        ("default", ["generate.splice.segment=4"], "generate.splice needs golds"),
        ("spin", ['generate.policy="average"'], "needs train.average"),
        ("spin", ['train.reference="average"'], "'average' needs train.average"),
        ("sapo", ['schedule=[{first=2, last=2, drop=["train.average"]}]', 'generate.policy="current"',
                  'train.reference="previous"'], "round 3 uses the average"),
        ("sapo", ['schedule=[{first=2, set={"train.replay.draws"=9}}]'], "train.replay is not in round 2"),
        ("active_dpo", ["generate.sampling.temperature=0.7"], "temperature 1, top_p 1"),
        ("spin", ['label.acquire={by="certainty", prompts=5}'], "generate.n = 1"),
        ("d2po", ['label.judge={name="verifier", checker="demo_world"}'], "go together"),
        ("default", ['label.judge={name="discriminator"}'], "go together"),
        ("d2po", ['discriminate.judge={name="discriminator"}'], "gold labels come from outside"),
        ("d2po", ['discriminate.judge={name="rubric"}'], "gold labels come from outside"),
        ("default", ['train={loss={name="dpo"}, reference="previous", chunks={by="source"},'
                     " optimizer={learning_rate=1e-4}}"], "synthesised prompts have none"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(name, settings, says):
    assert says in refused(name, *settings)


def test_chunks_by_source_need_sources(in_tmp):
    seeds = [json.loads(line) for line in SHIPPED["demo:seeds"].read_text(encoding="utf-8").splitlines()[:40]]
    rows = [json.dumps({k: v for k, v in seed.items() if k != "source"}) for seed in seeds]
    Path("bare.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert "seeds of two data sources" in refused("spin", "data.seeds=bare.jsonl", 'train.chunks.by="source"')


def test_a_recipe_is_what_it_says(in_tmp):
    for name in ("sapo", "d2po", "active_dpo"):
        assert recipe_file.load(recipe_file.find(name)).name == name
