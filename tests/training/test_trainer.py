"""The training loop: invariants that hold for any model, checked on the embedded one."""

import json
import math

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import recipe
from selfimprove.engine import canary
from selfimprove.errors import UserError
from selfimprove.store import model_identity
from selfimprove.training import launch, trainer
from selfimprove.training.distributed import World
from selfimprove.training.job import Tree, example
from selfimprove.training.learner import TrainingFailed
from selfimprove.training.logps import Scorer, choose_mode
from selfimprove.training.noise import NoiseDiverged
from selfimprove.training.trainer import _batches, _chunks, contiguous
from tests.training.conftest import MODEL, job, lines, weights

DPO = {"loss": {"name": "dpo", "beta": 0.1}, "reference": "previous"}
SIMPO = {"loss": {"name": "simpo"}}
GAMMA = {"loss": {"name": "gamma_dpo", "beta": 0.5}, "reference": "previous"}


def trained(folder, rows, preference=None, **settings):
    folder.mkdir(exist_ok=True)
    last = launch.train(job(folder, rows, preference, **settings))
    return last, weights(folder)


def assert_same(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Bloom", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),  # attention_dropout is a module there
        ("GPT2", {}),
        ("OPT", {"ffn_dim": 48, "dropout": 0.1, "layerdrop": 0.5}),  # functional dropout
        ("XGLM", {"ffn_dim": 48, "attention_heads": 4, "num_layers": 2, "d_model": 32}),
        ("Mixtral", {"num_key_value_heads": 2, "intermediate_size": 48, "router_jitter_noise": 0.1}),
    ],
)
def test_nothing_is_random_in_training_mode(family, settings):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = config.to_json_string()
    row = torch.randint(3, 61, (1, 30))
    model.train()
    assert not torch.equal(model(row).logits, model(row).logits)
    trainer.without_dropout(model)
    assert model.training
    assert torch.equal(model(row).logits, model(row).logits)
    assert model.config.to_json_string() == before  # which is saved with the policy


def test_a_model_that_stays_random_is_refused_by_what_it_does():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.AutoModelForCausalLM.from_config(transformers.FalconConfig(**sizes, hidden_dropout=0.1))
    trainer.without_dropout(model)  # its forward asks the configuration
    with pytest.raises(UserError, match="gives other log-probs each time") as told:
        choose_mode(Scorer(model), [Tree([1, 2, 3], [[4, 5, 6], [7, 8]])])
    assert "dropout" in told.value.hint


def test_weights_decay_and_norms_do_not_as_in_transformers(tmp_path, pairs):
    """The update of AdamW, less the same run's without decay, is -learning rate * decay * weight at the first step."""
    settings = {"epochs": 1, "batch_size": 24, "learning_rate": 1e-3, "scheduler": "constant_with_warmup"}
    _, plain = trained(tmp_path / "plain", pairs, DPO, warmup_ratio=0.0, **settings)
    _, decayed = trained(tmp_path / "decayed", pairs, DPO, warmup_ratio=0.0, weight_decay=0.5, **settings)
    start = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    wanted = set(transformers.Trainer(start, transformers.TrainingArguments(tmp_path)).get_decay_parameter_names(start))
    for name, weight in start.named_parameters():
        expected = -1e-3 * 0.5 * weight.detach() if name in wanted else torch.zeros_like(weight)
        torch.testing.assert_close(decayed[name] - plain[name], expected, rtol=1e-2, atol=2e-7, msg=name)


def test_dpo_begins_at_log_2_and_learns_the_preference(tmp_path, pairs):
    last, _ = trained(tmp_path, pairs, DPO)
    steps = lines(tmp_path)
    assert len(steps) == 6
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < 0.6
    assert last["rewards/margins"] > 0
    for step in steps:  # at this size of margin the mean loss is close to the loss of the mean margin
        assert step["loss"] == pytest.approx(math.log1p(math.exp(-step["rewards/margins"])), abs=0.05)
        assert step["rewards/chosen"] == pytest.approx(0.1 * step["logps/chosen_change"], rel=1e-6)


@pytest.mark.parametrize(
    "preference",
    [SIMPO, GAMMA, {"loss": {"name": "kto"}, "reference": "initial"}, {"loss": {"name": "cpo", "nll": "batch"}}],
    ids=lambda p: p["loss"]["name"],
)
def test_the_token_budget_changes_nothing(tmp_path, pairs, preference):
    _, whole = trained(tmp_path / "whole", pairs, preference)
    _, split = trained(tmp_path / "split", pairs, preference, machine={"train_tokens": 60})
    assert_same(whole, split, 2e-5)
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "split"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one.get("gamma/sd") == pytest.approx(other.get("gamma/sd"), abs=1e-5)
    assert ("gamma/sd" in one) == (preference is GAMMA)


def test_gradient_checkpointing_changes_nothing(tmp_path, pairs):
    _, plain = trained(tmp_path / "plain", pairs, DPO)
    _, saving = trained(tmp_path / "saving", pairs, DPO, machine={"gradient_checkpointing": True})
    assert_same(plain, saving, 2e-5)


def test_same_seed_same_bytes(tmp_path, pairs):
    for name in ("a", "b"):
        trained(tmp_path / name, pairs, SIMPO)
    assert model_identity(tmp_path / "a" / "policy") == model_identity(tmp_path / "b" / "policy")


def test_sft_learns_its_examples_and_saves_a_whole_model(tmp_path, pairs):
    examples = [example(p.pair_id, p.prompt_ids, p.chosen_ids) for p in pairs[::2]]
    trained(tmp_path, examples, epochs=6, batch_size=4)
    steps = lines(tmp_path)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert "rewards/margins" not in steps[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template
    saved = canary.of(tmp_path / "policy")
    assert canary.difference(saved, canary.compute(model).logprobs).largest < 1e-5
    assert canary.difference(saved, canary.of(MODEL).logprobs).largest > 0.01  # the canary tells the two apart


def test_a_loss_that_is_not_finite_stops_before_the_weights_and_names_the_pairs(tmp_path, pairs):
    with pytest.raises(TrainingFailed, match="step 1") as raised:
        trained(tmp_path, pairs, {"loss": {"name": "ipo_sum", "beta": 1e-300}, "reference": "initial"})
    assert any(pair.pair_id in str(raised.value) for pair in pairs)
    assert not (tmp_path / "policy").exists()


def test_rows_of_one_prompt_share_a_step_and_every_row_comes_once_an_epoch(pairs):
    settings = recipe.Optimizer(learning_rate=1e-3, epochs=2, batch_size=8)
    batches = list(_batches(pairs, settings, "seed"))
    for epoch in (batches[:3], batches[3:]):
        assert sorted(p.pair_id for b in epoch for p in b) == sorted(p.pair_id for p in pairs)
    assert [p.pair_id for b in batches[:3] for p in b] != [p.pair_id for b in batches[3:] for p in b]
    for batch in batches:
        prompts = [tuple(p.prompt_ids) for p in batch]
        assert len(set(prompts)) == len(prompts) // 2


class TestReferences:
    def test_a_reference_that_is_not_what_it_says_stops_at_the_first_step(self, tmp_path, pairs, monkeypatch):
        trained(tmp_path, pairs, DPO)
        [cache] = (tmp_path / "cache").rglob("*.safetensors")
        tensors = safetensors.torch.load_file(cache)
        tensors["logps"] -= 0.1
        safetensors.torch.save_file(tensors, cache)
        with pytest.raises(TrainingFailed, match="policy and reference are the same weights"):
            trained(tmp_path, pairs, DPO)

    def test_the_average_follows_the_policy_and_loosens_the_pull(self, tmp_path, pairs):
        last, _ = trained(tmp_path / "ema", pairs, {**DPO, "reference": "ema", "ema_decay": 0.5})
        fixed, _ = trained(tmp_path / "fixed", pairs, DPO)
        assert lines(tmp_path / "ema")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(last["rewards/margins"]) < abs(fixed["rewards/margins"])

    def test_a_hard_sync_every_step_keeps_the_loss_at_log_2(self, tmp_path, pairs):
        trained(tmp_path, pairs, {**DPO, "reference_sync": {"alpha": 1.0, "steps": 1}})
        assert [step["loss"] for step in lines(tmp_path)] == pytest.approx([math.log(2)] * 6, abs=1e-5)

    def test_two_references(self, tmp_path, pairs):
        mrpo = {"loss": {"name": "mrpo"}, "reference": ["initial", "path"], "reference_path": "unused"}
        last, _ = trained(tmp_path, pairs, mrpo)
        assert math.isfinite(last["loss"])

    def test_concentration_is_measured_for_wpo(self, tmp_path, pairs):
        last, _ = trained(tmp_path, pairs, {"loss": {"name": "wpo", "beta": 0.1}, "reference": "previous"})
        assert lines(tmp_path)[0]["loss"] < math.log(2)  # weights below one
        assert last["loss"] > 0


SDPO = {**DPO, "chunks": {"number": 3}}
NOISE = {**DPO, "noise": {"kind": "trainable", "scale": 0.5}}


class TestChunks:
    def test_each_chunk_begins_at_log_2(self, tmp_path, pairs):
        trained(tmp_path, pairs, SDPO, epochs=1)
        assert [s["loss"] for s in lines(tmp_path)] == pytest.approx([math.log(2)] * 3, abs=1e-5)

    def test_the_order_is_from_easy_to_hard_under_the_initial_model(self, tmp_path, pairs):
        given, easy = tmp_path / "given", tmp_path / "easy"
        trained(given, pairs, {**DPO, "chunks": {"number": 3, "order": "given"}}, epochs=1)
        trained(easy, pairs, SDPO, epochs=1)
        lengths = [len(p.chosen_ids) for p in pairs]
        assert len(set(lengths)) > 1
        assert lines(given)[0]["logps/chosen"] != lines(easy)[0]["logps/chosen"]

    def test_tokens_are_counted_over_all_chunks(self, tmp_path, pairs):
        trained(tmp_path, pairs, SDPO, epochs=1)
        counted = [step["num_tokens"] for step in lines(tmp_path)]
        assert counted == sorted(counted)
        trained(tmp_path / "one", pairs, DPO, epochs=1, batch_size=24)
        assert counted[-1] >= lines(tmp_path / "one")[-1]["num_tokens"]  # prompts cut in two count twice

    def test_a_reference_that_is_lost_while_its_policy_moved_on_is_not_made_again(self, tmp_path, pairs, monkeypatch):
        step = trainer._step
        done = []

        def stops(learner, batch, *, first):
            shown = step(learner, batch, first=first)
            done.append(batch)
            if len(done) == 3:  # the second of the second chunk's three steps
                raise KeyboardInterrupt
            return shown

        given = {**DPO, "chunks": {"number": 2}}
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "_step", stops)
            with pytest.raises(KeyboardInterrupt):
                trained(tmp_path, pairs, given, epochs=1, machine={"checkpoint_steps": 1})
        for shard in (tmp_path / "scratch" / "reference-1").glob("*.safetensors"):
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        with pytest.raises(UserError, match="reference-1 are damaged or gone"):
            trained(tmp_path, pairs, given, epochs=1, machine={"checkpoint_steps": 1})
        assert not (tmp_path / "policy").exists()

    def test_more_chunks_than_pairs_is_refused(self, tmp_path, pairs):
        with pytest.raises(UserError, match="cannot make 3 chunks"):
            trained(tmp_path, pairs[:2], SDPO)

    @pytest.mark.parametrize(("number", "sizes"), [(2, [12, 12]), (3, [12, 4, 8]), (9, [12, 4, 8])])
    def test_sources_stay_whole_and_each_chunk_begins_at_log_2(self, tmp_path, pairs, number, sizes):
        named = [pair._replace(source="b" if i < 4 else "c" if i < 12 else "a") for i, pair in enumerate(pairs)]
        given = {**DPO, "chunks": {"by": "source", "number": number, "order": "given"}}
        last, _ = trained(tmp_path, named, given, epochs=1, batch_size=50)
        steps = lines(tmp_path)
        assert [s["loss"] for s in steps] == pytest.approx([math.log(2)] * len(sizes), abs=1e-5)
        assert last["chunks"] == len(sizes)
        world = World(0, 1, torch.device("cpu"))
        chunks = _chunks(job(tmp_path, named, given), "packed", world)
        assert sorted(map(len, chunks)) == sorted(sizes)
        names = [list(dict.fromkeys(row.source for row in chunk)) for chunk in chunks]
        assert [name for own in names for name in own] == ["b", "c", "a"]  # in order of appearance

    def test_sources_go_by_the_reward_accuracy_of_the_initial_model(self, tmp_path, pairs):
        """Pairs turned over are those where the initial model is mostly wrong: their source comes last."""
        named = [
            pair._replace(source="right")
            if i % 2
            else pair._replace(source="turned", chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
            for i, pair in enumerate(pairs)
        ]
        by_source = {**DPO, "chunks": {"by": "source", "number": 2}}
        world = World(0, 1, torch.device("cpu"))
        for rows in (named, named[::-1]):
            chunks = _chunks(job(tmp_path, rows, by_source), "packed", world)
            assert [{row.source for row in chunk} for chunk in chunks] == [{"right"}, {"turned"}]

    def test_one_source_is_refused(self, tmp_path, pairs):
        with pytest.raises(UserError, match="two data sources"):
            trained(tmp_path, pairs, {**DPO, "chunks": {"by": "source"}})

    def test_several_processes_are_told_the_sources(self, tmp_path, pairs):
        told = job(tmp_path, [pairs[0]._replace(source="a", win_rates=(0.5, 0.4, 0.6)), pairs[1]])
        assert launch._job(json.loads(json.dumps(launch._plain(told)))).rows == told.rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 14))
def test_runs_of_about_equal_sums(sizes, number):
    parts = contiguous(sizes, number)
    assert [i for part in parts for i in part] == list(range(len(sizes)))
    assert len(parts) == min(number, len(sizes))
    assert all(parts)
    most = max(sum(sizes[i] for i in part) for part in parts)
    assert most <= sum(sizes) / len(parts) + max(sizes) + 1e-9


class TestRowsDrawnTwice:
    def test_they_count_twice(self, tmp_path, pairs):
        """SAPO draws with replacement: twice a pair is its gradient at twice the weight, beside another pair's."""
        _, once = trained(tmp_path / "once", [pairs[0], pairs[2]], DPO, epochs=1, batch_size=4, max_grad_norm=1e9)
        _, twice = trained(tmp_path / "twice", [pairs[0], pairs[0], pairs[2]], DPO, epochs=1, batch_size=4)
        doubled, single = lines(tmp_path / "twice")[0], lines(tmp_path / "once")[0]
        alone = tmp_path / "alone"
        trained(alone, [pairs[0]], DPO, epochs=1)
        mean = (single["logps/chosen"] * 2 + lines(alone)[0]["logps/chosen"]) / 3
        assert doubled["logps/chosen"] == pytest.approx(mean, rel=1e-6)
        assert any(not torch.equal(once[name], twice[name]) for name in once)


class TestNoise:
    def test_the_budget_changes_nothing(self, tmp_path, pairs):
        _, whole = trained(tmp_path / "whole", pairs, NOISE)
        _, split = trained(tmp_path / "split", pairs, NOISE, machine={"train_tokens": 60})
        assert_same(whole, split, 2e-5)
        sigmas = [step["noise/sigma"] for step in lines(tmp_path / "whole")]
        assert sigmas == pytest.approx([s["noise/sigma"] for s in lines(tmp_path / "split")], abs=1e-5)
        assert sigmas[0] == pytest.approx(0.5, rel=0.05)
        assert sigmas[-1] < sigmas[0]  # alpha = 1 pays more than the margin does

    def test_no_noise_is_spin(self, tmp_path, pairs):
        _, silent = trained(tmp_path / "silent", pairs, {**DPO, "noise": {"kind": "fixed_sigma", "sigma": 0.0}})
        _, spin = trained(tmp_path / "spin", pairs, DPO)
        assert_same(silent, spin, 2e-5)

    def test_a_state_sees_the_gaps_that_the_loss_sees(self, tmp_path, pairs):
        """Beta-DPO's beta looks at gaps beside their running mean: a margin that all have must not count."""
        given = {"loss": {"name": "beta_dpo", "beta": 0.1}, "reference": "previous"}
        trained(tmp_path / "plain", pairs, given, epochs=6)
        trained(tmp_path / "margin", pairs, {**given, "noise": {"kind": "constant_margin", "margin": 5.0}}, epochs=6)
        plain, margin = ([s["grad_norm"] for s in lines(tmp_path / name)] for name in ("plain", "margin"))
        assert min(margin) > 0.1 * min(plain)  # beta at its floor of .001 is a hundredth

    def test_a_constant_margin_begins_where_it_says(self, tmp_path, pairs):
        trained(tmp_path, pairs, {**DPO, "noise": {"kind": "constant_margin", "margin": 2.0}})
        assert lines(tmp_path)[0]["loss"] == pytest.approx(math.log1p(math.exp(0.1 * 2.0)), abs=1e-5)

    def test_noise_that_runs_away_stops_the_training(self, tmp_path, pairs):
        runaway = {**DPO, "noise": {"alpha": 0.0, "learning_rate": 3.0, "scale": 1.0}}
        with pytest.raises(NoiseDiverged, match=r"train\.noise|diverged"):
            trained(tmp_path, pairs, runaway, epochs=10)
        assert not (tmp_path / "policy").exists()

    def test_the_noise_with_margins_that_couple_the_batch(self, tmp_path, pairs):
        both = {**GAMMA, "noise": {"kind": "trainable"}}
        _, whole = trained(tmp_path / "whole", pairs, both)
        _, split = trained(tmp_path / "split", pairs, both, machine={"train_tokens": 60})
        assert_same(whole, split, 2e-5)


class TestAfterwards:
    def test_lora_is_merged_into_a_plain_model(self, tmp_path, pairs):
        last, found = trained(tmp_path, pairs, DPO, adapter={"rank": 4, "alpha": 8.0}, learning_rate=1e-2)
        start = transformers.AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
        assert found.keys() == start.keys()
        changed = {name for name in found if not torch.equal(found[name], start[name])}
        assert changed
        assert all("proj" in name for name in changed)
        assert last["loss"] < math.log(2)

    def test_extrapolation_goes_on_in_the_same_direction(self, tmp_path, pairs):
        _, plain = trained(tmp_path / "plain", pairs, DPO)
        _, further = trained(tmp_path / "further", pairs, {**DPO, "extrapolate": 0.5})
        start = transformers.AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
        for name, tensor in further.items():
            torch.testing.assert_close(tensor, plain[name] + 0.5 * (plain[name] - start[name]), msg=name)

    def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(self, tmp_path, pairs):
        _, found = trained(tmp_path / "low", pairs, DPO, dtype="bfloat16")
        _, exact = trained(tmp_path / "high", pairs, DPO)
        assert {t.dtype for t in found.values()} == {torch.float32}
        moved = max((found[n] - exact[n]).abs().max().item() for n in found)
        assert 0 < moved < 0.02

    def test_tensorboard_gets_every_step(self, tmp_path, pairs):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        trained(tmp_path, pairs, DPO, machine={"trackers": ["tensorboard"]})
        [events] = (tmp_path / "trackers").rglob("events.*")
        read = EventAccumulator(str(events.parent))
        read.Reload()
        assert [e.value for e in read.Scalars("loss")] == pytest.approx(
            [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        )

    def test_qlora_is_merged_into_full_precision(self, tmp_path, pairs):
        adapter = {"rank": 4, "alpha": 8.0, "quantize": "nf4"}
        last, found = trained(tmp_path, pairs, SIMPO, adapter=adapter, learning_rate=1e-2)
        start = transformers.AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
        same = [name for name in found if torch.equal(found[name], start[name])]
        assert "model.embed_tokens.weight" in same  # not the bfloat16 copy that was trained beside
        assert len(same) < len(found)
        assert {t.dtype for t in found.values()} == {torch.float32}
        assert last["rewards/margins"] > lines(tmp_path)[0]["rewards/margins"]

    def test_qlora_begins_where_its_quantised_reference_is(self, tmp_path, pairs):
        adapter = {"rank": 4, "alpha": 8.0, "quantize": "nf4"}
        trained(tmp_path, pairs, DPO, adapter=adapter)
        assert lines(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_mismatched_answers_have_a_reference_beside_the_noise_too(tmp_path, pairs):
    last, _ = trained(tmp_path, pairs, {**NOISE, "loss": {"name": "kto"}})
    assert math.isfinite(last["loss"])


def test_a_loss_that_needs_scores_says_so_where_they_are_unknown(tmp_path, pairs):
    scored = [pair._replace(win_rates=(0.6, 0.4, 0.7)) for pair in pairs]
    sppo = {"loss": {"name": "sppo"}, "reference": "previous"}
    trained(tmp_path / "known", scored, sppo)
    with pytest.raises(UserError, match="24 of 24 pairs have no scores"):
        trained(tmp_path / "unknown", pairs, sppo)


def test_the_largest_micro_batch_runs_first(tmp_path, pairs, monkeypatch):
    seen = []
    score = Scorer.forward

    def watched(scorer, packed):
        if torch.is_grad_enabled():
            seen.append(packed.input_ids.shape[1])
        return score(scorer, packed)

    monkeypatch.setattr(Scorer, "forward", watched)
    trained(tmp_path, pairs, SIMPO, machine={"train_tokens": 100})
    assert len(seen) > 7
    assert seen[0] == max(seen)
