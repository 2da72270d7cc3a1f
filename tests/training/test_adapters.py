"""Adapters: what trains, what must not, and that the merged model is the adapter and its base."""

import sys
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
import transformers
from safetensors import safe_open

from selfimprove.errors import UserError
from selfimprove.training import adapters
from selfimprove.training.adapters import MergeMismatch, attach, load_quantized, load_state, merge, state, token_logps
from tests.training.conftest import tiny

ROWS = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7], [96, 0]]
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapter(rank=4, alpha=8.0, target_modules=None, quantize=None):
    return SimpleNamespace(rank=rank, alpha=alpha, target_modules=target_modules, quantize=quantize)


def randomize(model, seed=3):
    """A fresh adapter computes nothing: give B values as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state(model).items():
        if "lora_B" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


def difference(one, other):
    return (token_logps(one, ROWS) - token_logps(other, ROWS)).abs().max().item()


def base_weights(model):
    return {n.replace(".base_layer", ""): p.clone() for n, p in model.named_parameters() if not p.requires_grad}


def gpt2(directory):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    tiny(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_a_fresh_adapter_changes_nothing_and_stays_in_place():
    plain, model = tiny(), tiny()
    body, head = model.get_decoder(), model.get_output_embeddings()
    assert attach(model, adapter()) is model
    assert model.get_decoder() is body
    assert model.get_output_embeddings() is head
    assert isinstance(head, torch.nn.Linear)
    assert difference(plain, model) == 0
    ids = torch.tensor(ROWS[:1])
    randomize(model)
    assert not torch.equal(plain.get_decoder()(ids).last_hidden_state, body(ids).last_hidden_state)


def test_all_linear_layers_but_the_head_by_default():
    trained = state(attach(tiny(tied=False), adapter(rank=3)))
    layers = {name.split(".lora_")[0] for name in trained}
    assert len(layers) == 2 * len(LAYERS)
    assert {name.rpartition(".")[2] for name in layers} == LAYERS
    assert {tuple(t.shape) for n, t in trained.items() if "q_proj.lora" in n} == {(3, 32), (32, 3)}
    assert {tuple(t.shape) for n, t in trained.items() if "k_proj.lora_B" in n} == {(16, 3)}  # two of four heads


def test_target_modules_by_last_name_or_longer():
    trained = state(attach(tiny(), adapter(target_modules=["v_proj", "layers.1.mlp.up_proj"])))
    assert {name.split(".lora_")[0] for name in trained} == {
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize("unknown", ["query_key_value", "lm_head", "proj", "norm", ""])
def test_an_unknown_target_names_those_that_exist(unknown):
    model = tiny(tied=False)
    with pytest.raises(UserError, match="LlamaForCausalLM") as raised:
        attach(model, adapter(target_modules=["q_proj", unknown]))
    assert all(name in raised.value.hint for name in LAYERS)
    assert "lm_head" not in raised.value.hint
    assert all(p.requires_grad for p in model.parameters())  # refused before anything was done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_weights_are_float32_and_drawn_from_the_global_generator(dtype):
    drawn = []
    for seed in (7, 7, 8):
        model = tiny().to(dtype)
        torch.manual_seed(seed)
        drawn.append(state(attach(model, adapter())))
    assert {tensor.dtype for tensor in drawn[0].values()} == {torch.float32}
    assert all(torch.equal(tensor, drawn[1][name]) for name, tensor in drawn[0].items())
    assert any(not torch.equal(tensor, drawn[2][name]) for name, tensor in drawn[0].items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_the_adapter_and_leaves_the_base(checkpointing):
    model = attach(tiny(tied=False), adapter())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    frozen, fresh = base_weights(model), {name: tensor.clone() for name, tensor in state(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor(ROWS[:1])
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(not torch.equal(tensor, fresh[name]) for name, tensor in state(model).items())
    for name, tensor in base_weights(model).items():
        assert torch.equal(tensor, frozen[name])
        assert torch.equal(tensor, tiny(tied=False).get_parameter(name))


def test_merged_equals_the_trained_model_and_saves_as_a_plain_one(base, tmp_path):
    model = attach(load(base), adapter())
    randomize(model)
    assert difference(model, load(base)) > 0.1
    merged = merge(state(model), adapter(), base, ROWS)
    assert difference(merged, model) < 1e-4
    assert type(merged) is transformers.LlamaForCausalLM
    assert not hasattr(merged, "peft_config")  # another adapter can be attached to it
    assert all(p.requires_grad for p in merged.parameters())

    merged.save_pretrained(tmp_path / "merged")
    with (
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as saved,
        safe_open(base / "model.safetensors", "pt") as before,
    ):
        assert set(saved.keys()) == set(before.keys())
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert difference(load(tmp_path / "merged"), merged) == 0


def test_merging_is_w_plus_alpha_over_rank_b_a(base):
    model = attach(load(base), adapter(rank=2, alpha=6.0, target_modules=["k_proj"]))
    randomize(model)
    merged, before = merge(state(model), adapter(2, 6.0, ["k_proj"]), base, ROWS), load(base)
    for name, weight in merged.named_parameters():
        expected = before.get_parameter(name).double()
        if "k_proj" in name:
            a, b = (state(model)[name.replace("weight", f"lora_{x}.default.weight")].double() for x in "AB")
            expected = expected + 6 / 2 * b @ a
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_merges_transposed_layers_too(tmp_path):
    gpt2(tmp_path)
    model = attach(load(tmp_path), adapter())
    randomize(model)
    merged = merge(state(model), adapter(), tmp_path, ROWS)
    assert difference(model, load(tmp_path)) > 0.01
    assert difference(merged, model) < 1e-4


def test_a_bfloat16_base_is_merged_in_float32(base):
    model = attach(load(base).bfloat16(), adapter())
    randomize(model)
    merged = merge(state(model), adapter(), base, ROWS)
    assert merged.dtype == torch.float32
    exact = attach(load(base), adapter())
    load_state(exact, state(model))
    assert difference(merged, exact) < 1e-4
    rounded = token_logps(merged.bfloat16(), ROWS)
    assert 0 < adapters.prove(rounded, token_logps(model, ROWS), torch.bfloat16) < 0.25


def test_a_wrong_merge_is_refused(base, monkeypatch):
    model = attach(load(base), adapter())
    randomize(model)
    from peft.tuners.lora import Linear

    honest = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: honest(self, name) * 1.01)
    with pytest.raises(MergeMismatch, match="nats"):
        merge(state(model), adapter(), base, ROWS)


@pytest.mark.parametrize("shift", [2e-4, float("nan"), float("inf")])
def test_prove_refuses_what_is_off_or_not_a_number(shift):
    logps = torch.tensor([-1.0, -2.0, -3.0])
    assert adapters.prove(logps + 5e-5, logps, torch.float32) == pytest.approx(5e-5, abs=1e-6)
    with pytest.raises(MergeMismatch, match="float32"):
        adapters.prove(logps + torch.tensor([0, shift, 0]), logps, torch.float32)


def test_the_state_comes_back(base):
    model = attach(load(base), adapter())
    randomize(model)
    other = attach(load(base), adapter())
    assert difference(model, other) > 0.1
    load_state(other, {name: tensor.clone() for name, tensor in state(model).items()})
    assert difference(model, other) == 0


@pytest.mark.parametrize("other", [adapter(rank=2), adapter(target_modules=["q_proj"])])
def test_the_state_of_another_adapter_is_refused(other):
    with pytest.raises(ValueError, match="not the state"):
        load_state(attach(tiny(), adapter()), state(attach(tiny(), other)))


def quantized(directory, settings=None):
    model = attach(load_quantized(directory), settings or adapter(quantize="nf4"))
    randomize(model)
    return model


def test_quantised_layers_are_nf4_twice_over_and_the_head_is_not(base):
    model = load_quantized(base)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert {name.rpartition(".")[2] for name in layers} == LAYERS
    for layer in layers.values():
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_qlora_is_merged_into_the_weights_that_were_quantised(base):
    model = quantized(base)
    merged = merge(state(model), adapter(quantize="nf4"), base, ROWS)
    exact = attach(load(base), adapter())
    load_state(exact, state(model))
    assert difference(merged, exact) < 1e-4
    assert difference(merged, model) > 0.25  # the 4-bit base is another model: merging into it would be seen
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in merged.modules())
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_qlora_trains_the_adapter_alone(base):
    model = attach(load_quantized(base), adapter(quantize="nf4"))
    frozen, fresh = base_weights(model), {name: tensor.clone() for name, tensor in state(model).items()}
    assert {tensor.dtype for tensor in fresh.values()} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor(ROWS[:1])
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(tensor, fresh[name]) for name, tensor in state(model).items())
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in base_weights(model).items())


def test_a_forward_without_gradient_does_not_cut_off_later_gradients(base, monkeypatch):
    """As on a CPU with AVX512-BF16, where bitsandbytes re-packs weights for inference at such a forward."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = quantized(base)
    ids = torch.tensor(ROWS[:1])

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    token_logps(model, ROWS)
    for name, gradient in gradients().items():
        assert torch.equal(gradient, before[name]), name


def test_without_bitsandbytes_the_extra_is_named(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # import then says that there is none
    with pytest.raises(UserError, match="quantize needs bitsandbytes") as raised:
        load_quantized(base)
    assert raised.value.hint == "pip install 'selfimprove[qlora]'"
