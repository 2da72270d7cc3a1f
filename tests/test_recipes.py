"""Every shipped recipe: its header, its settings in every round, and two rounds of it in miniature."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from selfimprove import combinations, preflight, recipe, recipe_file, records, store
from selfimprove import run as running
from selfimprove.data import SHIPPED, read_seeds
from selfimprove.execution import Executors
from selfimprove.stages import discriminate, evaluate, label
from tests.paths import ROOT

FILES = recipe_file.shipped_recipes()
PAPERS = [path for path in FILES if path.stem.endswith("_7b")]
SMALL = [path.stem for path in FILES if path not in PAPERS]
LOG_2 = pytest.approx(math.log(2), abs=1e-4)
SEEDS, HELDOUT = 96, 20
REAL_ENGINE = ("synpo", "dnpo")  # the others use transformers, which starts at once


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_header_says_how_to_run_it_what_it_is_and_where_it_deviates(path):
    text = path.read_text(encoding="utf-8")
    header = text.split("\n\n")[0]
    assert header.startswith(f"# {path.stem}: ")
    assert recipe_file.load(path).name == path.stem
    for field in ("Run", "Method", "Cost", "Expect", "Deviates"):
        assert re.search(rf"^# {field}: +\S", header, re.MULTILINE), field
    assert re.search(rf"^# Run: +selfimprove iterate( {path.stem})?( --rounds \d)?$", header, re.MULTILINE)
    if path.stem not in ("default", "composed"):
        assert re.search(r"arXiv \d{4}\.\d{5}", header)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_round_is_a_recipe_whose_settings_fit_together(path):
    chosen = recipe_file.load(path)
    evaluate.check(chosen.evaluate)
    for iteration in range(1, chosen.rounds + 1):
        now = chosen.at(iteration)
        label.check(now.label)
        if now.discriminate:
            discriminate.check(now.discriminate)
        combinations.fits_together(now)
        preflight.trainable(now)


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.stem)
def test_a_recipe_of_a_paper_is_made_for_eight_gpus_and_for_files_of_the_users(path):
    chosen = recipe_file.load(path)
    assert chosen.engine.dtype == chosen.train.optimizer.dtype == "bfloat16"
    assert chosen.machine.num_processes == 8
    assert chosen.machine.gradient_checkpointing
    assert chosen.machine.sharding == ("ddp" if chosen.train.optimizer.adapter else "fsdp")
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    trained_on = chosen.data.pairs or chosen.data.seeds
    assert trained_on in header
    assert not any(value.startswith("demo:") for value in (chosen.model.path, trained_on, chosen.data.heldout))
    if chosen.synthesize:
        assert not chosen.data.corpus.startswith("demo:")


class Made:
    """A finished run in miniature."""

    def __init__(self, path: Path, chosen: recipe.Recipe) -> None:
        self.path, self.chosen = path, chosen

    def stage(self, iteration: int, name: str) -> Path:
        [found] = self.path.glob(f"iter-{iteration:03d}/*-{name}")
        return found

    def rows(self, iteration: int, stage: str, what: str, kind: type[Any]) -> list[Any]:
        return store.read_rows(self.stage(iteration, stage), what, kind)

    def pairs(self, iteration: int) -> list[records.Pair]:
        return self.rows(iteration, "label", "pairs", records.Pair)

    def steps(self, iteration: int) -> list[dict[str, float]]:
        text = (self.stage(iteration, "train") / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def manifest(self, iteration: int, stage: str) -> dict[str, Any]:
        return json.loads((self.stage(iteration, stage) / "manifest.json").read_text(encoding="utf-8"))

    def weights(self, iteration: int) -> dict[str, Any]:
        folder = SHIPPED["demo:model"] if iteration == 0 else self.stage(iteration, "train") / "policy"
        return safetensors.torch.load_file(folder / "model.safetensors")


class Quiet:
    """A display that shows nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


def miniature(name: str, folder: Path, changes: dict[str, Any]) -> recipe.Recipe:
    """The recipe with little data and small batches, so that a round has several steps; `changes` by dotted names."""
    table = recipe_file.load(recipe_file.find(name)).model_dump(exclude_none=True)
    table.pop("control", None)
    table["rounds"] = 2
    for what, rows in (("seeds", SEEDS), ("heldout", HELDOUT)):
        lines = SHIPPED[table["data"][what]].read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{what}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
        table["data"][what] = str(folder / f"{what}.jsonl")
    table["engine"]["kind"] = "vllm" if name in REAL_ENGINE else "transformers"
    table["evaluate"]["n"] = 1
    table["train"]["optimizer"]["batch_size"] = 8
    if "sft" in table:
        table["sft"]["optimizer"] |= {"epochs": 4, "batch_size": 8}  # as many steps as on the whole data
        table["generate"]["sampling"]["temperature"] = 1.0  # at .7 forty prompts may all get four equal answers
    if "synthesize" in table:
        table["synthesize"]["prompts"] = 40
    if "acquire" in table["label"]:
        table["label"]["acquire"]["prompts"] = 24
    if "discriminate" in table:
        table["discriminate"]["labels"] = 24
    if "replay" in table["train"]:
        table["train"]["replay"]["draws"] = 48
    for key, value in changes.items():
        *names, last = key.split(".")
        at = table
        for part in names:
            at = at[part]
        if value is None:
            del at[last]
        else:
            at[last] = value
    return recipe.Recipe.model_validate(table)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Callable[..., Made]]:
    """Makes a recipe's run in miniature, once per recipe and changes."""
    known: dict[str, Made] = {}

    def make(name: str, changes: dict[str, Any] | None = None) -> Made:
        key = f"{name} {changes}"
        if key not in known:
            folder = tmp_path_factory.mktemp(name)
            chosen = miniature(name, folder, changes or {})
            with Executors() as executors:
                running.iterate(store.Run(folder / "run"), chosen, Quiet(), [], executors)
            known[key] = Made(folder / "run", chosen)
        return known[key]

    return make


@pytest.mark.parametrize("name", SMALL)
def test_two_rounds_run_and_both_train_on_pairs(name, made):
    run = made(name)
    for iteration in (1, 2):
        pairs = run.pairs(iteration)
        assert pairs
        assert all(p.iteration == iteration for p in pairs)
        assert all(p.chosen_token_ids != p.rejected_token_ids for p in pairs)
        steps = run.steps(iteration)
        assert steps
        assert all(math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) for step in steps)
        before, after = run.weights(iteration - 1), run.weights(iteration)
        assert any((before[key] != after[key]).any() for key in before)
        scores = json.loads((run.stage(iteration, "evaluate") / "scores.json").read_text(encoding="utf-8"))
        assert scores["scores"]["greedy"]["n"] == HELDOUT


LOG_2_AT_THE_START = ["spin", "dpop", "minor_dpo", "mrpo", "tr_dpo", "expo", "sdpo", "self_rewarding", "dnpo"]


@pytest.mark.parametrize("name", LOG_2_AT_THE_START)
def test_where_policy_and_reference_are_the_same_the_loss_begins_at_log_2(name, made):
    """At policy = reference DPO, DPOP, Minor-DPO and MRPO with two equal references are -log s(0)."""
    run = made(name)
    assert run.steps(1)[0]["loss"] == LOG_2
    if len(run.steps(1)) > 2:  # in fewer the learning rate has hardly left zero
        assert run.steps(1)[-1]["loss"] != LOG_2
    if run.chosen.train.references == ("previous",) and name != "dnpo":  # its noise moves the reference
        assert run.steps(2)[0]["loss"] == LOG_2


BEST_VS_WORST = ["iterative_dpo", "gamma_po", "gamma_dpo", "sampling_ranking", "self_rewarding"]


@pytest.mark.parametrize("name", BEST_VS_WORST)
def test_chosen_is_a_best_and_rejected_a_worst_of_the_policys_own_answers(name, made):
    run = made(name)
    for iteration in (1, 2):
        scores: dict[str, list[float]] = {}
        for verdict in run.rows(iteration, "label", "verdicts", records.Verdict):
            if verdict.source == "current" and verdict.score is not None:
                scores.setdefault(verdict.prompt_id, []).append(verdict.score)
        for pair in run.pairs(iteration):
            assert pair.chosen_source == pair.rejected_source == "current"
            assert pair.chosen_score > pair.rejected_score
            assert pair.rejected_score == min(scores[pair.prompt_id])


def test_iterative_dpo_begins_at_the_length_term_alone(made):
    """R-DPO at policy = reference is -log s(alpha (lc - lr)): alpha x lengths, whatever beta."""
    run = made("iterative_dpo", {"rounds": 1, "train.loss.alpha": 0.5, "train.optimizer.batch_size": 1000})
    shift = [0.5 * (len(p.chosen_token_ids) - len(p.rejected_token_ids)) for p in run.pairs(1)]
    [step] = run.steps(1)
    assert step["loss"] == pytest.approx(statistics.fmean(math.log1p(math.exp(-x)) for x in shift), rel=1e-4)


def test_gamma_dpo_asks_a_margin_only_relative_to_the_windows_mean(made):
    """At policy = reference every gap is zero, so with no draw in the window but N(0, 1) the loss is near log 2."""
    assert made("gamma_dpo").steps(1)[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert made("gamma_dpo").steps(1)[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_gamma_po_is_simpo_where_tau_is_large(made):
    """tau -> infinity brings every margin to gamma."""
    huge = [{"name": "gamma_simpo", "beta": 2.0, "gamma": 1.0, "tau": 1e6, "weight": 1.0}]
    one = {"rounds": 1, "train.optimizer.batch_size": 1000}
    ours = made("gamma_po", one | {"train.loss": huge}).steps(1)[0]["loss"]
    plain = made("gamma_po", one | {"train.loss": {"name": "simpo", "beta": 2.0, "gamma": 1.0}}).steps(1)[0]["loss"]
    assert ours == pytest.approx(plain, rel=1e-4)
    adaptive = [huge[0] | {"tau": 2.5}]
    assert made("gamma_po", one | {"train.loss": adaptive}).steps(1)[0]["loss"] != pytest.approx(plain, rel=1e-4)


def test_mrpo_mixes_the_initial_policy_and_the_one_before(made):
    run = made("mrpo")
    first, second = (run.manifest(t, "train")["ingredients"]["models"] for t in (1, 2))
    assert first["initial"] == first["previous"] == store.model_identity(SHIPPED["demo:model"])
    assert second["initial"] == first["initial"]
    assert second["previous"] == second["start"] != second["initial"]
    assert run.steps(2)[0]["loss"] != LOG_2


def test_tr_dpo_moves_the_reference_to_the_policy(made):
    """With alpha = 1 the reference is the policy after each sync: the loss is log 2 again."""
    run = made("tr_dpo", {"rounds": 1, "train.reference_sync": {"alpha": 1.0, "steps": 2}})
    steps = run.steps(1)
    assert len(steps) >= 3
    assert all(step["loss"] == LOG_2 for step in steps[::2])
    assert all(step["loss"] != LOG_2 for step in steps[3::2])  # the first step's learning rate is zero


def test_expo_goes_further_on_the_way_from_the_start(made):
    run, plain = made("expo"), made("expo", {"rounds": 1, "train.extrapolate": None})
    start, dpo, further = run.weights(0), plain.weights(1), run.weights(1)
    for name in start:
        expected = start[name] + (1 + run.chosen.train.extrapolate) * (dpo[name] - start[name])
        assert further[name].allclose(expected, atol=1e-6), name


def test_sdpo_trains_each_chunk_from_and_against_the_chunk_before(made):
    run = made("sdpo")
    for iteration in (1, 2):
        steps = run.steps(iteration)
        starts = [k for k, step in enumerate(steps) if step["loss"] == LOG_2]
        assert len(starts) == run.chosen.train.chunks.number
        assert starts[0] == 0
        assert abs(starts[1] - len(steps) / 2) <= 1


def test_spin_sets_the_gold_against_the_policys_own_of_two_rounds(made):
    run = made("spin")
    assert {(p.chosen_source, p.rejected_source) for p in run.pairs(2)} == {("gold", "current")}
    assert set(run.manifest(2, "train")["ingredients"]["inputs"]) == {"pairs-1", "pairs-2"}


def test_dnpo_begins_as_spin_then_turns_labels_over_and_makes_noise(made):
    run = made("dnpo")
    assert {p.chosen_source for p in run.pairs(1)} == {"gold"}
    assert "sigma" not in str(run.steps(1)[0])
    flips = run.rows(2, "label", "flips", records.Flip)
    assert flips
    assert {f.pair_id for f in flips} == {p.pair_id for p in run.pairs(2) if p.chosen_source == "current"}
    assert {f.why for f in flips} == {"dynamic"}
    assert all(f.was_rejected_score >= f.was_chosen_score for f in flips)
    golds = {seed.prompt_id: seed.completion for seed in read_seeds(Path(run.chosen.data.seeds))}
    own = run.rows(2, "generate", "generations", records.Generation)
    assert len(run.pairs(2)) == sum(row.text != golds[row.prompt_id] for row in own)  # none is dropped that differs
    assert any("sigma" in key for key in run.steps(2)[0])


def test_synpo_sets_the_improvers_rewrite_against_the_initial_models_answer(made):
    run = made("synpo")
    assert {(p.chosen_source, p.rejected_source) for p in run.pairs(2)} == {("improver", "initial")}
    _from_the_initial_model_on_all_pairs(run)


def test_sampling_ranking_ranks_five_samples_by_agreement_and_restarts_from_the_initial_model(made):
    run = made("sampling_ranking")
    verdicts = run.rows(1, "label", "verdicts", records.Verdict)
    assert {v.judge for v in verdicts} == {"self_consistency(voters=current)"}
    assert {round(v.score * 5, 6) for v in verdicts} <= {1, 2, 3, 4, 5}
    _from_the_initial_model_on_all_pairs(run)


def _from_the_initial_model_on_all_pairs(run: Made) -> None:
    ingredients = run.manifest(2, "train")["ingredients"]
    assert ingredients["models"]["start"] == store.model_identity(SHIPPED["demo:model"])
    assert set(ingredients["inputs"]) == {"pairs-1", "pairs-2"}


def test_self_rewarding_learns_to_rate_and_rates_its_own_answers(made):
    run = made("self_rewarding")
    assert run.manifest(0, "sft")["rows"]["rows_in"] == 3 * SEEDS  # golds; ratings of golds and of own answers
    verdicts = run.rows(1, "label", "verdicts", records.Verdict)
    readable = [v.score for v in verdicts if v.score is not None]
    assert len(readable) > len(verdicts) / 2
    assert all(0 <= score <= 5 for score in readable)
    assert run.manifest(2, "label")["ingredients"]["models"]["current"] != store.model_identity(SHIPPED["demo:model"])


def test_the_page_of_methods_names_every_recipe_and_tests_that_exist():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for path in FILES:
        assert f"`{path.stem}`" in page, path.stem
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page):
        assert re.search(rf"(def|class) {test}\b", (ROOT / file).read_text(encoding="utf-8")), f"{file}::{test}"
