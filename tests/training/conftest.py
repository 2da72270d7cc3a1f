import json
from pathlib import Path

import pytest
import torch
import transformers

from selfimprove.data import SHIPPED


def tiny(tied: bool = True, seed: int = 0) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def seeds():
    lines = Path(SHIPPED["demo:seeds"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
