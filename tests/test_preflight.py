"""A recipe that cannot work is refused before any model is loaded; one that can is rehearsed."""

import json
import shutil
import sys

import pytest

from selfimprove import preflight, recipe_file
from selfimprove.data import SHIPPED
from selfimprove.errors import UserError
from tests.conftest import selfimprove

RECIPES = [p.stem for p in recipe_file.shipped_recipes() if not p.stem.endswith("_7b")]  # those need a model and data


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_passes(name):
    result = selfimprove("check", name, "--json")
    assert result.code == 0, result.err
    found = {entry["what"]: entry["found"] for entry in json.loads(result.out)}
    assert found["rows"] == "650 of 650 can be trained on, 0 dropped, none truncated"
    assert found["held-out prompts"] == "650, each once"
    assert found["end token"] == "trained in 650 of 650 chosen answers"
    assert "equals plain rows" in found["packed forward"]


def test_held_out_prompts_that_stand_there_twice_are_told(in_tmp):
    rows = '{"prompt": "Sort: f e.", "answer": "e f"}\n{"prompt": "sort f, e", "answer": "e f"}\n'
    (in_tmp / "heldout.jsonl").write_text(rows)
    told = selfimprove("check", "spin", "--json", "--set", "data.heldout=heldout.jsonl")
    found = {entry["what"]: entry["found"] for entry in json.loads(told.out)}
    assert found["held-out prompts"] == "2, 1 of them again; each counts on its own"


def test_the_first_loss_is_log_2_for_spin():
    found = {e["what"]: e["found"] for e in json.loads(selfimprove("check", "spin", "--json").out)}
    assert found["loss at the first step"] == "0.693147, analytically 0.693147"


def test_the_rehearsal_attaches_the_adapter():
    settings = ["--set", 'train.optimizer.adapter.target_modules=["q_proj"]']
    assert selfimprove("check", "spin", *settings).code == 0


@pytest.mark.parametrize(
    ("settings", "says", "hint"),
    [
        (["train.loss.name=dppo"], "unknown loss 'dppo'", "dpo_norm"),
        (["train.loss.gamma=1.0"], "parameter 'gamma'", "beta, label_smoothing"),
        (['train.loss.beta="high"'], "parameter 'beta'", "beta, label_smoothing"),
        (["train.loss.beta=-1.0"], "parameter 'beta'", "beta, label_smoothing"),
        (['train.reference=["initial", "previous"]'], "uses a reference", "train.reference"),
        (['train.loss={name="simpo"}'], "uses no reference", "train.reference"),
        (['train.loss={name="sppo"}'], "needs scores of the answers", "label.judge"),
        (['train.loss=[{name="dpo", weight=0.5}, {name="sft", weight=0.6}]'], "sum to 1.1", "sum to 1"),
        (['train.reference="ema"'], "'ema' and ema_decay go together", "known keys"),
        (["train.chunks.number=2", "train.reference_sync.steps=4"], "chunks go with neither", "known keys"),
        (['train.loss={name="kto"}', "train.optimizer.batch_size=1"], "batch_size = 1", "raise train.optimizer.batch"),
        (["train.noise.margin=7.0"], "train.noise.margin means nothing to the kind 'trainable'", "train.noise.kind"),
        (
            ['train.noise={kind="fixed_sigma", sigma=0.9, scale=0.25, alpha=2.0}'],
            "train.noise.alpha, train.noise.scale means nothing to the kind 'fixed_sigma'",
            "remove it",
        ),
        (["train.noise.scale=3.9"], "below 0.75 times train.noise.bound", "smaller scale"),
        (['train.loss={name="mrpo"}', 'train.reference=["initial", "previous"]', "train.noise.alpha=1.0"],
         "noise needs exactly one reference", "known keys"),
        (["train.optimizer.adapter.quantize=nf4", "machine.sharding=fsdp"], "cannot be sharded", "ddp"),
        (['train.optimizer.adapter.target_modules=["q_proj", "nope"]'], "target_modules names nope, which", "q_proj"),
        (['train.optimizer.adapter.target_modules=["lm_head"]'], "target_modules names lm_head, which", "q_proj"),
        (["train.optimizer.adapter.quantize=nf4"], "needs bitsandbytes, which is not", "selfimprove[qlora]"),
        (["train.optimizer.adapter.rank=4", "train.reference_sync.steps=4"], "moves with the whole weights", "adapter"),
        (['machine.trackers=["wandb"]'], "needs a package that is not installed", "selfimprove[wandb]"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_a_model_is_loaded(settings, says, hint, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    for package in ("wandb", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    result = selfimprove("check", "spin", *(part for s in settings for part in ("--set", s)))
    assert result.code == 1, result.err
    assert says in result.err
    assert hint in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("name", "settings", "says", "hint"),
    [
        ("synpo", ["generate.initial_n=0"], "rejects the initial model's answers", "generate.initial_n = 1"),
        ("synpo", ['label.pairing={name="dynamic"}'], "anchor 'gold' needs golds", 'anchor = "improver"'),
        ("default", ['label.pairing={name="dynamic", anchor="improver"}'], "needs the stage improve", "[improve]"),
        ("default", ['label.pairing={name="improver_vs_initial"}'], "needs the stage improve", "[improve]"),
        ("synpo", ["improve.kind=gold_distillation", "improve.min_gap=0.2"], "looks at no improve.min_gap", "0.0"),
        ("synpo", ["train.search.betas=[2.0, 4.0]"], "train.loss names one already", 'train.loss = { name = "simpo" }'),
        ("synpo", ['train.loss={name="orpo"}', "train.search.betas=[2.0, 4.0]"], "loss 'orpo' has none", "with a beta"),
        ("synpo", ['train.loss={name="simpo"}', "train.search.betas=[2.0, -4.0]"], "parameter 'beta'", "gamma"),
        ("synpo", ['train.loss={name="simpo"}', "train.search.betas=[2.0, 2.0]"], "a value twice", "once"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(name, settings, says, hint):
    with pytest.raises(UserError) as raised:
        preflight.check(recipe_file.load(recipe_file.find(name), settings))
    assert says in raised.value.message
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        ["label.pairing.rejected=current", "generate.initial_n=0"],
        ['label.pairing={name="dynamic", anchor="improver"}', "generate.initial_n=0"],
        ["improve.kind=gold_distillation"],
        ['train.loss={name="simpo", gamma=1.0}', "train.search.betas=[2.0, 4.0]"],
    ],
)
def test_the_variants_of_synpo_pass(settings):
    preflight.check(recipe_file.load(recipe_file.find("synpo"), settings))


@pytest.mark.parametrize("judge", ["rubric", "discriminator", "self_consistency"])
def test_held_out_answers_are_scored_from_outside_the_run(judge):
    told = selfimprove("check", "default", "--set", f'evaluate.judge={{name="{judge}"}}')
    assert told.code == 1
    assert f"evaluate.judge '{judge}' cannot score held-out answers" in told.err


def test_a_reference_that_is_nowhere_is_said_at_once():
    told = selfimprove(
        "check", "spin", "--set", 'train.reference="path"', "--set", 'train.reference_path="/no/such/model"'
    )
    assert told.code == 1
    assert "no model directory '/no/such/model'" in told.err


@pytest.fixture
def altered(in_tmp):
    """Makes `model`, the embedded one with a changed config.json."""

    def make(change):
        shutil.copytree(SHIPPED["demo:model"], in_tmp / "model")
        file = in_tmp / "model" / "config.json"
        told = json.loads(file.read_text())
        change(told)
        file.write_text(json.dumps(told))
        return told

    return make


def test_positions_are_known_under_the_name_that_gpt_2_gives_them(altered):
    told = altered(lambda config: config.update(n_positions=config.pop("max_position_embeddings")))
    result = selfimprove("check", "default", "--set", "model.path=model", "--set", "engine.max_model_len=4096")
    assert result.code == 1
    assert f"but the model has {told['n_positions']} positions" in result.err


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"hidden_size": 65},
        {"num_attention_heads": 0},
        {"rope_parameters": 5},
        {"hidden_act": "no_such_function"},
        {"dtype": "float99"},
        {"pad_token_id": 1 << 20},
    ],
    ids=str,
)
def test_a_config_that_describes_no_model_is_refused_at_once(altered, change):
    altered(lambda config: config.update(change))
    result = selfimprove("plan", "spin", "--set", "model.path=model")
    assert result.code == 1
    assert result.err.startswith("error: the config.json of model ")
    assert "describes no model: " in result.err
    assert len(result.err.splitlines()) == 3
    assert "Traceback" not in result.err


@pytest.mark.parametrize("kind", ["no-such-type", "t5", None, ["llama"]])  # T5 is known, and no causal language model
@pytest.mark.parametrize("where", ["model.path", "train.reference_path"])
def test_a_model_that_cannot_be_trained_is_refused_at_once(altered, kind, where):
    altered(lambda config: config.update(model_type=kind))
    reference = ["--set", 'train.reference="path"'] if where == "train.reference_path" else []
    result = selfimprove("plan", "spin", *reference, "--set", f'{where}="model"')
    assert result.code == 1
    assert f"is of type '{kind}', which transformers" in result.err
    assert "Traceback" not in result.err
