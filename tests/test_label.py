"""The stage label in whole runs with the fake engine: both orders, relabelling, filters, refusals."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from selfimprove import records, store
from selfimprove.data import SHIPPED, read_seeds
from selfimprove.engine import fake_engine
from selfimprove.evaluation import statistics
from selfimprove.store import read_rows
from tests.conftest import QUICK, selfimprove
from tests.engine import test_rewards as rewards
from tests.judges import test_ranker as ranker

PAIRWISE = "label.judge={name='pairwise', max_tokens=32}"


def ran(*settings, rounds=1, recipe="iterative_dpo"):
    pairs = (part for setting in settings for part in ("--set", setting))
    result = selfimprove("iterate", recipe, "--rounds", str(rounds), "--run", "run", *QUICK, *pairs)
    assert result.code == 0, result.err
    return Path("runs/run")


def stage(run, iteration, name="label"):
    [found] = (run / f"iter-{iteration:03d}").glob(f"?-{name}")
    return found


def rows(run, iteration, name, record):
    return store.read_rows(stage(run, iteration), name, record)


def manifest(run, iteration):
    return json.loads((stage(run, iteration) / "manifest.json").read_text())


def test_only_pairs_that_both_orders_prefer_are_trained_on(cut_data):
    run = ran(PAIRWISE, "label.pairing={name='all_pairs'}", "generate.n=3", "engine.max_model_len=1024")
    compared = rows(run, 1, "comparisons", records.Comparison)
    answers = store.read_rows(stage(run, 1, "generate"), "generations", records.Generation)
    texts = {(a.prompt_id, a.source, a.sample): a.text for a in answers}
    texts |= {(s.prompt_id, "gold", 0): s.completion for s in read_seeds(Path("seeds.jsonl"))}
    known = {}
    for one in compared:
        assert one.forward_reply.startswith("[[")
        a = texts[one.prompt_id, one.first_source, one.first_sample]
        b = texts[one.prompt_id, one.second_source, one.second_sample]
        assert a != b
        known[one.prompt_id, a, b] = one.forward, one.swapped
        known[one.prompt_id, b, a] = 1 - one.forward, 1 - one.swapped
    pairs = rows(run, 1, "pairs", records.Pair)
    assert pairs
    for pair in pairs:
        forward, swapped = known[pair.prompt_id, pair.chosen[0]["content"], pair.rejected[0]["content"]]
        assert min(forward, swapped) > 0.5
    # the fake judge errs one time in four, in each order on its own: some orders disagree, and none of those is kept
    flipped = [one for one in compared if (one.forward > 0.5) != (one.swapped > 0.5)]
    assert flipped
    told = manifest(run, 1)
    reasons = Counter(told["rows"]["quarantined"])
    assert sum(reasons.values()) + len({pair.prompt_id for pair in pairs}) == told["rows"]["rows_in"]
    assert "the judge's two orders disagree" in {**reasons, **told["metrics"].get("pairs refused", {})}


@pytest.mark.parametrize("template", ["hundred", "additive"])
def test_a_rubric_keeps_the_judges_words(template, cut_data):
    run = ran(f"label.judge={{name='rubric', template='{template}', max_tokens=32}}", "engine.max_model_len=1024")
    verdicts = rows(run, 1, "verdicts", records.Verdict)
    highest = {"hundred": 100, "additive": 5}[template]
    assert {v.score for v in verdicts} == {0, highest}
    assert {v.reply for v in verdicts} == {"Score: 0", f"Score: {highest}"}


def test_margin_and_length_are_refused_with_their_reasons(cut_data):
    result = selfimprove(
        "iterate", "iterative_dpo", "--rounds", "1", "--run", "none", *QUICK, "--set", "label.max_length_ratio=0.01"
    )
    assert result.code == 1
    assert "no prompt gave a pair" in result.err
    assert "chosen answer too long" in result.err


def test_what_a_function_of_the_users_raises_is_in_the_error(cut_data):
    Path("raising_judge.py").write_text("def judge(prompt, completion, answer):\n    return 1 / 0\n")
    judge = "label.judge={name='verifier', checker='python', function='raising_judge:judge'}"
    result = selfimprove("iterate", "iterative_dpo", "--rounds", "1", "--run", "none", *QUICK, "--set", judge)
    assert result.code == 1
    assert "no prompt gave a pair" in result.err
    assert "ZeroDivisionError: division by zero" in result.err


@pytest.mark.parametrize(
    ("body", "top", "interval"),
    [
        ("len(completion) / (1 + len(completion))", 1, statistics.clustered_mean),
        ("len(completion)", 1e4, statistics.mean),
    ],
)
def test_scores_that_are_not_right_or_wrong_are_means_with_a_t_test(cut_data, body, top, interval):
    name = f"judge_of_{interval.__name__}"  # a module is imported once in a process
    Path(f"{name}.py").write_text(f"def judge(prompt, completion, answer):\n    return {body}\n")
    run = ran(f"evaluate.judge={{name='verifier', checker='python', function='{name}:judge'}}", "evaluate.n=2")
    [step] = (run / "iter-001").glob("?-evaluate")
    found = json.loads((step / "scores.json").read_text())
    samples = read_rows(step, "samples", records.Sample)
    greedy = [sample.score for sample in samples if sample.mode == "greedy"]
    assert 0 < max(greedy) < top
    expected = interval(greedy)
    assert found["scores"]["greedy"] == {
        "value": pytest.approx(expected.value, abs=1e-12),
        "ci95": [expected.low, expected.high],
        "n": len(greedy),
    }
    told = found["comparisons"]["base"]
    assert (told["greedy"]["test"], told["sampled"]["test"]) == ("paired t", "paired t")
    assert selfimprove("verify", "run").code == 0
    assert selfimprove("report", "run").code == 0


class TestRelabel:
    def test_earlier_pairs_are_scored_anew_and_turn_where_the_scores_say_so(self, cut_data):
        run = ran(
            "label.judge={name='rubric', template='hundred', max_tokens=32}", "label.relabel=true",
            "engine.max_model_len=1024", "generate.n=4", rounds=3,
        )  # fmt: skip
        first, second, third = (rows(run, t, "pairs", records.Pair) for t in (1, 2, 3))
        ids = [[p.pair_id for p in pairs] for pairs in (first, second, third)]
        assert ids[1][: len(ids[0])] == ids[0]  # all earlier pairs come along, none twice
        assert ids[2][: len(ids[1])] == ids[1]
        assert len(set(ids[2])) == len(ids[2])
        flips = rows(run, 2, "flips", records.Flip)
        turned = {flip.pair_id for flip in flips}
        assert turned  # the fake judge errs
        assert {flip.why for flip in flips} == {"relabelled"}
        before, after = {p.pair_id: p for p in first}, {p.pair_id: p for p in second}
        for pair_id, old in before.items():
            new = after[pair_id]
            if pair_id in turned:
                assert (new.chosen, new.rejected) == (old.rejected, old.chosen)
                assert new.chosen_token_ids == old.rejected_token_ids
                assert new.chosen_score > new.rejected_score
            else:
                assert (new.chosen, new.rejected) == (old.chosen, old.rejected)
                assert new.chosen_score >= new.rejected_score
        for flip in flips:
            assert flip.was_rejected_score > flip.was_chosen_score
        assert manifest(run, 2)["metrics"]["relabelled flips"] == len(flips)
        trained = [json.loads(line) for line in (stage(run, 3, "train") / "metrics.jsonl").read_text().splitlines()]
        assert trained

    def test_a_judge_that_compares_relabels_too(self, cut_data):
        run = ran(PAIRWISE, "label.relabel=true", "engine.max_model_len=1024", "generate.n=3", rounds=2)
        old = {p.pair_id for p in rows(run, 1, "pairs", records.Pair)}
        assert old < {p.pair_id for p in rows(run, 2, "pairs", records.Pair)}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["label.judge={name='rubric', model='server:x'}"], "no [servers.x]"),
        (["servers.x={url='http://localhost/v1', model='m'}"], "no judge asks servers.x"),
        (["servers.x={url='ftp://localhost', model='m'}"], "servers.x.url"),
        (
            [
                "servers.x={url='http://localhost/v1', model='m', api_key_env='NO_SUCH_KEY'}",
                "label.judge={name='rubric', model='server:x'}",
            ],
            "NO_SUCH_KEY is not set",
        ),
        (["label.relabel=true", "train.pairs='all'"], "train on them twice"),
        (["label.judge={name='pairwise'}", "label.audit={}"], "compares two"),
        (["label.judge={name='rubric', model='/nowhere'}"], "/nowhere"),
        (["label.judge={name='ensemble', judges=[{name='length', prefer='wider'}]}"], "prefer"),
        (["label.judge={name='ensemble'}"], "judges"),
        (["label.judge={name='pairwise', read='mind'}"], "read"),
        (["generate.n=1", "label.pairing={name='top_k'}"], "at least two answers"),
        (["label.pairing={name='gold_vs_generated'}"], "looks at no score"),
    ],
)
def test_what_cannot_work_is_refused(settings, says, in_tmp):
    result = selfimprove("check", "iterative_dpo", *(part for s in settings for part in ("--set", s)))
    assert result.code in (1, 2)
    assert says in result.err
    assert "hint:" in result.err


class TestAudit:
    RUBRIC = ("label.judge={name='rubric', max_tokens=32}", "engine.max_model_len=1024", "generate.n=3")

    def audited(self, run, iteration):
        return json.loads((stage(run, iteration) / "audit.json").read_text())

    def test_the_same_anchors_are_judged_in_every_round_and_a_second_judge_on_a_sample(self, cut_data):
        second = "second={name='verifier', checker='demo_world'}"
        run = ran(*self.RUBRIC, f"label.audit={{anchors=20, {second}, sample=10}}", rounds=2)
        first, later = self.audited(run, 1), self.audited(run, 2)
        anchors = rows(run, 1, "anchors", records.Anchor)
        assert len(anchors) == 20
        assert not rows(run, 2, "anchors", records.Anchor)
        assert first["drift"]["rise"] == 0
        known = [a.score for a in anchors if a.score is not None]
        assert later["drift"]["before"] == pytest.approx(sum(known) / len(known))
        assert later["drift"]["n"] == len(known)
        assert later["drift"]["alarm"] is False
        assert 0.1 < later["again"]["differ"]["value"] < 0.7  # it errs one time in four: 2 * .25 * .75 differ
        assert first["second"]["judge"] == "verifier(checker=demo_world)"
        assert first["second"]["n"] == 40  # ten prompts, three samples and the gold
        assert 0 < first["second"]["spearman"] < 1
        scores = [v.score for v in rows(run, 1, "verdicts", records.Verdict) if v.score is not None]
        assert first["scores"]["mean"] == pytest.approx(sum(scores) / len(scores))
        assert "judge alarm" not in manifest(run, 2)["metrics"]

    def test_a_judge_that_grows_lenient_raises_the_alarm(self, cut_data, monkeypatch):
        judged = fake_engine._verdict
        trained = Path("runs/run/iter-001/3-train")
        monkeypatch.setattr(
            fake_engine,
            "_verdict",
            lambda *given: "Score: 100" if trained.exists() and given[-1].random() < 0.8 else judged(*given),
        )
        run = ran(*self.RUBRIC, "label.audit={anchors=40}", rounds=2)
        assert trained.exists()
        drift = self.audited(run, 2)["drift"]
        assert drift["alarm"]
        assert drift["after"] > drift["before"]
        assert "grown lenient" in manifest(run, 2)["metrics"]["judge alarm"]

    def test_a_judge_that_compares_is_audited_by_its_orders(self, cut_data):
        run = ran(PAIRWISE, "engine.max_model_len=1024", "generate.n=3")
        told = self.audited(run, 1)["pairs"]
        compared = rows(run, 1, "comparisons", records.Comparison)
        assert told["n"] == len(compared)
        flipped = sum(abs(one.forward - one.swapped) == 1 for one in compared)
        ties = [(one.forward == 0.5) + (one.swapped == 0.5) for one in compared]
        assert told["flipped"]["value"] * len(compared) == pytest.approx(
            flipped + sum(count == 1 for count in ties), abs=1e-6
        )
        assert told["ties"]["value"] == pytest.approx(sum(ties) / (2 * len(compared)))

    def test_without_a_judge_there_is_nothing_to_audit(self, cut_data):
        run = ran(recipe="spin")
        assert not (stage(run, 1) / "audit.json").exists()


class TestOtherModels:
    """Judges with weights of their own, beside the policy's engine."""

    def test_a_reward_model_labels_and_another_judge_is_a_second_opinion(self, cut_data, tmp_path):
        directory = rewards.make("llama", tmp_path / "reward")
        run = ran(
            f"label.judge={{name='reward_model', model='{directory}'}}",
            "label.audit={anchors=10, second={name='verifier', checker='demo_world'}}", rounds=2,
        )  # fmt: skip
        verdicts = rows(run, 1, "verdicts", records.Verdict)
        assert all(isinstance(v.score, float) for v in verdicts)
        assert f"model={directory}" in verdicts[0].judge
        told = json.loads((stage(run, 2) / "audit.json").read_text())
        assert told["drift"]["rise"] == 0  # the weights stay the same
        assert told["again"]["differ"]["value"] == 0
        ingredients = manifest(run, 1)["ingredients"]
        assert set(ingredients["models"]) == {"initial", str(directory)}

    def test_a_ranker_compares(self, cut_data, tmp_path):
        directory = ranker.make(tmp_path / "ranker")
        run = ran(f"label.judge={{name='pairwise_ranker', model='{directory}'}}", "generate.n=3")
        compared = rows(run, 1, "comparisons", records.Comparison)
        assert compared
        assert all(0 < one.forward < 1 and 0 < one.swapped < 1 for one in compared)

    def test_another_local_model_judges(self, cut_data, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(SHIPPED["demo:model"], other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
        run = ran(f"label.judge={{name='rubric', model='{other}', max_tokens=32}}", "engine.max_model_len=1024")
        assert {v.score for v in rows(run, 1, "verdicts", records.Verdict)} >= {0, 100}

    @pytest.mark.parametrize("judge", ["reward_model", "pairwise_ranker"])
    def test_what_is_no_such_model_is_refused_before_anything_runs(self, judge, in_tmp):
        for model, says in ((SHIPPED["demo:model"], "is no"), ("current", "needs a model of its kind")):
            setting = f"label.judge={{name='{judge}', model='{model}'}}"
            result = selfimprove("check", "iterative_dpo", "--set", setting)
            assert result.code == 1
            assert says in result.err
