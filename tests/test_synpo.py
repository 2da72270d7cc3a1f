"""SynPO's rounds with the fake engine: what enters the growing set, against what is rejected, and which beta is chosen.

Helper models are copies of the initial one, so that only the policies are trained.
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfimprove import chat, data, recipe, store
from selfimprove.data import SHIPPED, read_heldout, read_seeds
from selfimprove.engine.fake_engine import FakeEngine
from selfimprove.errors import UserError
from selfimprove.records import Generation, Pair, Prompt
from selfimprove.stages import train
from selfimprove.training import launch
from selfimprove.training.job import PairRow
from tests.conftest import cut, selfimprove
from tests.test_dedup import jaccard

QUOTA, SIMILARITY, NGRAM = 8, 0.4, 8
TINY = [
    "--engine", "fake",
    "--set", "data.seeds=seeds.jsonl",
    "--set", "data.heldout=heldout.jsonl",
    "--set", "synthesize.prompts=150",
    "--set", f"synthesize.max_similarity={SIMILARITY}",
    "--set", f"synthesize.decontamination_ngram={NGRAM}",
    "--set", f"label.quota={QUOTA}",
    "--set", "evaluate.n=1",
    "--set", "train.optimizer.epochs=1",
    "--set", "train.optimizer.batch_size=4",
]  # fmt: skip


def copy_helpers(patch: pytest.MonkeyPatch, jobs: list) -> None:
    """Train policies, and copy where a helper model would be trained; all jobs are kept to be looked at."""
    real = launch.train

    def fit(job):
        jobs.append(job)
        if job.preference:
            return real(job)
        shutil.copytree(job.start.path, job.out)
        return {"loss": 0.0}

    patch.setattr(launch, "train", fit)


@pytest.fixture(scope="module")
def synpo(tmp_path_factory):
    """The folder of two rounds with a search for beta."""
    folder = tmp_path_factory.mktemp("synpo")
    search = ['train.loss={name="simpo", gamma=1.0}', "train.search.betas=[4, 2]", "train.search.heldout_share=0.25"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cut(60)
        jobs = []
        copy_helpers(patch, jobs)
        asked = [part for setting in search for part in ("--set", setting)]
        result = selfimprove("iterate", "synpo", "--rounds", "2", *TINY, *asked)
        assert result.code == 0, result.err
    return SimpleNamespace(path=folder / "runs" / "synpo", jobs=jobs, folder=folder)


def manifest(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "manifest.json").read_text())


def pairs(run: Path, t: int) -> list[Pair]:
    return store.read_rows(run / f"iter-00{t}/4-label", "pairs", Pair)


def kept(run: Path, t: int) -> list[Prompt]:
    return store.read_rows(run / f"iter-00{t}/1-synthesize", "prompts", Prompt)


class TestInvariants:
    def test_the_growing_set_holds_t_quotas_after_t_rounds_and_each_round_starts_from_the_initial_model(self, synpo):
        for t in (1, 2):
            assert len(pairs(synpo.path, t)) == QUOTA
            labelled = manifest(synpo.path, f"iter-00{t}/4-label")
            assert labelled["rows"]["rows_out"] == len({pair.prompt_id for pair in pairs(synpo.path, t)})
            assert labelled["rows"]["quarantined"]["over quota"] > 0
            assert labelled["metrics"]["pairs short of quota"] == 0
            trained = manifest(synpo.path, f"iter-00{t}/5-train")
            assert trained["rows"]["rows_in"] == t * QUOTA
            assert trained["ingredients"]["models"]["start"] == store.model_identity(SHIPPED["demo:model"])
        ids = [pair.pair_id for t in (1, 2) for pair in pairs(synpo.path, t)]
        assert [r.pair_id for job in synpo.jobs if job.name == "2-5-train-policy" for r in job.rows] == ids

    def test_the_rejected_answer_is_the_initial_models_in_every_round(self, synpo):
        initial = store.model_identity(SHIPPED["demo:model"])
        for t in (1, 2):
            rows = store.read_rows(synpo.path / f"iter-00{t}/2-generate", "generations", Generation)
            policies = {(r.prompt_id, tuple(r.token_ids), r.source): r.policy for r in rows}
            for pair in pairs(synpo.path, t):
                assert (pair.chosen_source, pair.rejected_source) == ("improver", "initial")
                assert policies[pair.prompt_id, tuple(pair.rejected_token_ids), "initial"] == initial
            current = {row.policy for row in rows if row.source == "current"}
            assert (current == {initial}) == (t == 1)  # the policies differ, so that the test can tell them apart

    def test_no_evaluation_prompt_and_no_duplicate_enters(self, synpo):
        seeds = [data.fold(row.prompt) for row in read_seeds(synpo.folder / "seeds.jsonl")]
        heldout = [f" {data.fold(row.prompt)} " for row in read_heldout(synpo.folder / "heldout.jsonl")]
        prompts = {p.prompt_id: data.fold(p.text) for t in (1, 2) for p in kept(synpo.path, t)}
        pairs_of = {p.prompt_id: data.fold(p.prompt[0]["content"]) for t in (1, 2) for p in pairs(synpo.path, t)}
        assert pairs_of.items() <= prompts.items()
        texts = list(prompts.values())
        for i, text in enumerate(texts):
            words = text.split()
            grams = [" ".join(words[k : k + NGRAM]) for k in range(max(1, len(words) - NGRAM + 1))]
            assert not [
                whole for whole in heldout if any(f" {gram} " in whole for gram in grams if len(words) >= NGRAM)
            ]
            assert not [whole for whole in heldout if whole in f" {text} "]
            assert max(jaccard(text, other) for other in seeds + texts[:i]) < SIMILARITY + 0.13  # 4 of its errors

    def test_each_reason_is_counted_apart(self, synpo):
        reasons: Counter[str] = Counter()
        for t in (1, 2):
            reasons.update(manifest(synpo.path, f"iter-00{t}/1-synthesize")["rows"]["quarantined"])
        assert {
            "near duplicate of a seed",
            "near duplicate of an earlier round",
            "near duplicate within the round",
            "overlaps the evaluation set",
        } <= reasons.keys()
        assert sum(len(kept(synpo.path, t)) for t in (1, 2)) + reasons.total() == 300

    def test_the_search_leaves_its_finding_and_nothing_of_its_trials(self, synpo, monkeypatch):
        chosen = {}
        for t in (1, 2):
            directory = synpo.path / f"iter-00{t}/5-train"
            found = json.loads((directory / "search.json").read_text())
            best = max(found["trials"], key=lambda one: (one["accuracy"], one["margin"], -one["beta"]))
            assert found["chosen"] == best["beta"]
            chosen[t] = best["beta"]
            assert found["held-out prompts"] == round(0.25 * t * QUOTA)
            assert found["trained pairs"] + found["held-out pairs"] == t * QUOTA
            told = manifest(synpo.path, f"iter-00{t}/5-train")
            assert told["metrics"]["chosen beta"] == best["beta"]
            by_beta = {f"{one['beta']:g}": one["accuracy"] for one in found["trials"]}
            assert told["metrics"]["held-out accuracy by beta"] == by_beta
            assert by_beta.keys() == {"4", "2"}
            assert not [output["path"] for output in told["outputs"] if "beta" in output["path"]]
            steps = (directory / "metrics.jsonl").read_text().splitlines()
            assert len(steps) == t * QUOTA // 4
            assert told["metrics"]["loss"] == json.loads(steps[-1])["loss"]
        assert not (synpo.path / "scratch").exists()
        trained = [(job.name, job.preference.loss.model_extra["beta"]) for job in synpo.jobs if job.preference]
        assert trained == [
            (f"{t}-5-train-{n}", b) for t in (1, 2) for n, b in (("beta-4", 4), ("beta-2", 2), ("policy", chosen[t]))
        ]
        assert len({job.seed for job in synpo.jobs if "1-5-train-beta" in job.name}) == 1
        monkeypatch.chdir(synpo.folder)
        assert selfimprove("verify", "synpo").code == 0


class TestGoldDistillation:
    def test_the_golds_are_learned_without_drafts_and_the_prompts_answered_directly(self, in_tmp, monkeypatch):
        cut(60)
        jobs, requests = [], []
        copy_helpers(monkeypatch, jobs)
        real = FakeEngine.generate
        monkeypatch.setattr(
            FakeEngine, "generate", lambda self, asked, *rest: (requests.append(asked), real(self, asked, *rest))[1]
        )
        settings = ["--set", "improve.kind=gold_distillation", "--set", "synthesize.prompts=60"]
        result = selfimprove("iterate", "synpo", "--rounds", "1", *TINY, *settings)
        assert result.code == 0, result.err

        [job] = [job for job in jobs if job.name == "1-3-improve-improver"]
        rendered = chat.Chat(SHIPPED["demo:model"])
        seeds = read_seeds(Path("seeds.jsonl"))
        assert job.start.identity == store.model_identity(SHIPPED["demo:model"])
        assert [(row.prompt_ids, row.chosen_ids) for row in job.rows] == [
            (rendered.prompt_ids(s.prompt), rendered.completion_ids(s.prompt, s.completion)) for s in seeds
        ]

        run = Path("runs/synpo/iter-001")
        answers = store.read_rows(run / "3-improve", "refinements", Generation)
        drafts = store.read_rows(run / "2-generate", "generations", Generation)
        assert {row.source for row in answers} == {"improver"}
        key = [(row.prompt_id, row.sample) for row in answers]
        assert key == [(row.prompt_id, row.sample) for row in drafts if row.source == "current"]
        assert len({row.seed for row in answers}) == len(answers)
        seeds_of = {row.seed for row in answers}
        batch = [r for asked in requests for r in asked if r.seed in seeds_of]
        assert len(batch) == len(answers)  # each asked once
        asked_by_seed = {r.seed: (r.prompt_token_ids, r.n) for r in batch}
        assert [asked_by_seed[row.seed] for row in answers] == [(rendered.prompt_ids(r.prompt), 1) for r in answers]
        texts: dict[str, set[str]] = {}
        for row in answers:
            texts.setdefault(row.prompt_id, set()).add(row.text)
        assert max(map(len, texts.values())) > 1


class FakeIO:
    """What `train.search` uses of StageIO; `gaps` gives a beta's mean log-prob gap of each pair by its number."""

    def __init__(self, folder: Path, gaps) -> None:
        self.scratch, self.gaps = folder, gaps
        self.out = SimpleNamespace(metrics={}, write_json=lambda name, value: setattr(self, "written", value))
        self.trained: dict[str, list[PairRow]] = {}
        self.scored: list[int] = []

    def admit(self, rows, optimizer):
        return [row for row in rows if row.chosen_ids]

    def row_seed(self, row):
        return store.row_seed(0, 1, "5-train", row)

    def train(self, what, rows, start, out, optimizer, section, *, trial):
        assert trial
        assert section.search is None
        assert out == f"beta-{section.loss.model_extra['beta']:g}"
        self.trained[out] = rows
        model = self.scratch / out / out
        model.mkdir(parents=True)
        return model

    def score(self, model, rows):
        """Chosen answers have two tokens and the mean log-prob -1; rejected ones have one."""
        beta = float(model.name.removeprefix("beta-"))
        self.scored += [prompt[0] for prompt, _ in rows]
        return [[-1.0, -1.0] if len(ids) == 2 else [-1.0 - self.gaps(beta, prompt[0])] for prompt, ids in rows]


def section(betas: list[float], share: float = 0.2) -> recipe.Train:
    loss = {"name": "simpo", "gamma": 1.0}
    return recipe.Train.model_validate(
        {"loss": loss, "search": {"betas": betas, "heldout_share": share}, "optimizer": {"learning_rate": 1e-4}}
    )


def rows(prompts: int, each: int = 2) -> list[train.Row]:
    return [train.Row(f"p{p}", PairRow(f"i{k}/p{p}/0", [p], [1, 2], [3])) for p in range(prompts) for k in range(each)]


class TestSearch:
    @pytest.mark.parametrize(
        ("gaps", "best"),
        [
            (lambda beta, pair: 1.0 if beta == 4 or pair % 2 else -1.0, 4.0),  # ranks more pairs right
            (lambda beta, pair: {2: 0.1, 4: 0.2, 8: 0.3}[beta], 8.0),  # all right: the larger margin
            (lambda beta, pair: 0.1, 2.0),  # alike: the smaller beta
            (lambda beta, pair: 9.0 if beta == 8 and pair % 2 else -1.0 if beta == 8 else 0.1, 2.0),  # not the margin
        ],
    )
    def test_the_beta_is_chosen_by_held_out_accuracy_then_margin_then_size(self, tmp_path, gaps, best):
        io = FakeIO(tmp_path, gaps)
        chosen = train.search(io, section([8, 4, 2], share=0.5), rows(20))
        assert chosen.loss.model_extra == {"gamma": 1.0, "beta": best}
        assert chosen.search is None
        assert io.written["chosen"] == io.out.metrics["chosen beta"] == best
        assert len(io.written["trials"]) == 3
        assert not list(tmp_path.glob("*/"))  # no weights are left

    def test_the_log_probs_are_per_token(self, tmp_path):
        io = FakeIO(tmp_path, lambda beta, pair: 0.5)  # rejected: -1.5 in sum, chosen: -2 in sum, -1 per token
        train.search(io, section([2, 4]), rows(10))
        assert io.out.metrics["held-out accuracy by beta"] == {"2": 1.0, "4": 1.0}
        assert [trial["margin"] for trial in io.written["trials"]] == pytest.approx([0.5, 0.5])

    def test_no_prompt_stands_on_both_sides_and_all_trials_see_the_same(self, tmp_path):
        io = FakeIO(tmp_path, lambda beta, pair: 0.1)
        train.search(io, section([2, 4], share=0.3), rows(20))
        first, second = io.trained.values()
        assert first == second
        seen, looked_at = {row.prompt_ids[0] for row in first}, set(io.scored)
        assert not seen & looked_at
        assert len(looked_at) == 6
        assert seen | looked_at == set(range(20))
        assert len(first) == 28

    def test_rows_that_cannot_be_trained_on_are_not_looked_at_either(self, tmp_path):
        io = FakeIO(tmp_path, lambda beta, pair: 0.1)
        bad = [train.Row(f"bad{k}", PairRow(f"i1/bad{k}/0", [99], [], [3])) for k in range(30)]
        train.search(io, section([2, 4], share=0.5), bad + rows(4))
        assert 99 not in io.scored
        assert len(set(io.scored)) == 2

    def test_a_killed_search_goes_on_where_it_was(self, tmp_path):
        def killed(beta, pair):
            if beta == 4:
                raise KeyboardInterrupt
            return 0.1

        io = FakeIO(tmp_path, killed)
        with pytest.raises(KeyboardInterrupt):
            train.search(io, section([2, 4]), rows(10))
        assert list(io.trained) == ["beta-2", "beta-4"]
        shutil.rmtree(tmp_path / "beta-4")
        again, whole = FakeIO(tmp_path, lambda beta, pair: 0.1), FakeIO(tmp_path / "whole", lambda beta, pair: 0.1)
        whole.scratch.mkdir()
        assert train.search(again, section([2, 4]), rows(10)) == train.search(whole, section([2, 4]), rows(10))
        assert list(again.trained) == ["beta-4"]
        assert again.written == whole.written

    def test_one_prompt_is_too_few(self, tmp_path):
        with pytest.raises(UserError, match="at least two prompts"):
            train.search(FakeIO(tmp_path, None), section([2, 4]), rows(1))
