"""A base model of the shape of a 0.5B Llama that knows the embedded world: trained here, since there is none to load.

python -m tests.gpu.base FOLDER [--steps 600]
"""

import argparse
import time
from pathlib import Path

import torch
import transformers

from selfimprove.demo import build
from selfimprove.demo.tokenizer import BEGIN, END, PAD, build_tokenizer, save_tokenizer

TOGETHER = 4  # of the demo's batches in one step
RATE, WARMUP = 6e-4, 50


def new_model(tokenizer) -> transformers.LlamaForCausalLM:
    """494 M parameters: 24 layers, hidden 896, MLP 4,864, 14 heads of which 2 for keys, vocabulary 151,936, tied."""
    begin, end, pad = (tokenizer.token_to_id(token) for token in (BEGIN, END, PAD))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(bos_token_id=begin, eos_token_id=end, pad_token_id=pad)
    return model


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_tokenizer(build._vocabulary_texts())
    model = new_model(tokenizer).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    texts, began = build._Texts(0), time.monotonic()
    texts_of = iter(texts.batches(given.steps * TOGETHER, tokenizer))
    for step in range(given.steps):
        rate = RATE * min(1, (step + 1) / WARMUP, 2 * (1 - step / given.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        told = []
        for _ in range(TOGETHER):
            batch = next(texts_of)
            with torch.autocast(device, torch.bfloat16):
                hidden = model.model(
                    input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False
                ).last_hidden_state[:, :-1]
                weights = batch.weights[:, 1:].flatten().to(device)
                kept = weights.nonzero()[:, 0]
                logits = model.lm_head(hidden.flatten(0, 1)[kept]).float()
            targets = batch.ids[:, 1:].flatten().to(device)[kept]
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            loss = losses.dot(weights[kept]) / weights.sum()
            (loss / TOGETHER).backward()
            told.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == given.steps - 1:
            print(f"step {step} loss {torch.stack(told).mean():.3f} {time.monotonic() - began:.0f} s", flush=True)
    model.save_pretrained(given.folder)
    save_tokenizer(tokenizer, given.folder)


if __name__ == "__main__":
    main()
