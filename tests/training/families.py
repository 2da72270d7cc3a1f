"""Tiny random models of many families, and the oracle: transformers' own forward, row by row, eager attention."""

import copy
import random
from typing import Any

import torch
import transformers as tf

from selfimprove.training.job import Tree

torch.set_num_threads(1)  # more of them wait for each other on tensors this small

VOCAB = 61
WINDOW = 4  # narrower than the trees
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_WIDE = {**_GQA, "head_dim": 8}
_HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_STATES = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

PACKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama tied": (tf.LlamaConfig, {**_GQA, "tie_word_embeddings": True}),
    "llama untied": (tf.LlamaConfig, {**_GQA, "tie_word_embeddings": False, "attention_bias": True}),
    "llama 4": (tf.Llama4TextConfig, {**_WIDE, "num_local_experts": 2, "intermediate_size_mlp": 48}),
    "mistral": (tf.MistralConfig, {**_WIDE, "sliding_window": WINDOW}),
    "gemma 2": (
        tf.Gemma2Config,
        {
            **_WIDE,
            **_HYBRID,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma 3": (tf.Gemma3TextConfig, {**_WIDE, **_HYBRID, "query_pre_attn_scalar": 8}),
    "qwen 3": (tf.Qwen3Config, _WIDE),
    "gpt 2": (tf.GPT2Config, {**_GPT, **_NO_DROPOUT}),
    "opt": (
        tf.OPTConfig,
        {**_BASE, "ffn_dim": 48, "init_std": 0.3, "dropout": 0.0, "word_embed_proj_dim": 16},
    ),
    "phi 1": (tf.PhiConfig, _GQA),  # its head has a bias
    "phi 3": (tf.Phi3Config, {**_GQA, "sliding_window": WINDOW}),
    "olmo 2": (tf.Olmo2Config, _GQA),
    "olmo 3": (tf.Olmo3Config, {**_GQA, **_HYBRID}),
    "cohere": (tf.CohereConfig, {**_GQA, "logit_scale": 0.25}),
    "granite": (
        tf.GraniteConfig,
        {**_GQA, "logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    ),
    "hyperclovax": (tf.HyperCLOVAXConfig, {**_GQA, "logits_scaling": 0.25}),
    "gpt-oss": (tf.GptOssConfig, {**_WIDE, **_HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen 3 moe": (tf.Qwen3MoeConfig, {**_WIDE, **_MOE}),
    "mixtral": (tf.MixtralConfig, {**_GQA, "num_local_experts": 4}),
}
PADDED: dict[str, tuple[Any, dict[str, Any]]] = {  # what packing gets wrong, or refuses
    "mamba": (tf.MambaConfig, _STATES),
    "mamba 2": (
        tf.Mamba2Config,
        {**_STATES, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "jamba": (
        tf.JambaConfig,
        {**_GQA, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    ),
    "falcon h1": (
        tf.FalconH1Config,
        {**_GQA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 4, "lm_head_multiplier": 0.25},
    ),
    "qwen 3 next": (
        tf.Qwen3NextConfig,
        {
            **_WIDE,
            **_MOE,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "lfm 2": (tf.Lfm2Config, {**_GQA, "layer_types": ["conv", "full_attention"]}),
    "llama 4 in chunks": (tf.Llama4TextConfig, {**PACKED["llama 4"][1], "attention_chunk_size": WINDOW}),
    "bloom": (tf.BloomConfig, {**_GPT, "hidden_size": 32}),  # asks no interface for its attention
    "gpt-j": (tf.GPTJConfig, {**_GPT, **_NO_DROPOUT, "rotary_dim": 4}),
    "stablelm": (tf.StableLmConfig, _GQA),  # does not pass the structure on
}


def build(name: str) -> Any:
    config, settings = {**PACKED, **PADDED}[name]
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config(**settings)).eval()


def forest(shape: list[tuple[int, list[int]]], seed: int = 0) -> list[Tree]:
    """Random trees of given lengths: of the prompt, of each response."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(length)]

    return [Tree(ids(prompt), [ids(n) for n in responses]) for prompt, responses in shape]


TREES = forest([(7, [6, 9, 1]), (1, [5]), (3, [2, 0, 8])])


def oracle(model: Any) -> Any:
    """A copy that computes with transformers' eager attention: the plain formulas under a mask."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain.eval()


def by_rows(model: Any, trees: list[Tree]) -> torch.Tensor:
    """Log-prob of every token of every response in order, float64."""
    parts = []
    for tree in trees:
        for response in filter(None, tree.responses):
            ids = tree.prompt_ids + response
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, len(tree.prompt_ids) - 1 : -1]
            parts.append(logits.double().log_softmax(-1)[range(len(response)), response])
    return torch.cat(parts)


def weights_of(count: int) -> torch.Tensor:
    """What tokens are weighted with, so that each one's gradient counts; none is 0."""
    return torch.linspace(-1.0, 1.3, count, dtype=torch.float64) + 0.01


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 2e-5) -> None:
    """Of each parameter, relative to its norm; below 1e-6 of the whole is rounding (biases of keys have none)."""
    whole = torch.stack([g.norm() for g in expected.values()]).norm().item()
    assert found.keys() == expected.keys()
    assert whole > 0.1
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm().item()
        assert difference <= tolerance * gradient.norm().item() + 1e-6 * whole, name
