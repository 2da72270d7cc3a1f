"""The demo's tokeniser: one token for each word of the world, bytes for anything else.

It is a BPE without merges whose vocabulary is taken before merging (`ignore_merges`), so that plain transformers and
vLLM load it like any other, every text can be encoded, and every encoding decodes to its text.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIALS = (PAD, BEGIN, END, "<|user|>", "<|assistant|>", "<|system|>")
TAGS = ("<question>", "</question>", "<solution>", "</solution>")
MAX_LENGTH = 512

# Content is not stripped: an assistant turn is the completion, token for token.
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokeniser that knows every word of `texts`, wherever it stands, as one token."""
    words = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+|[0-9]+", text)})
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"Ġ{word}" for word in words]
    tokens = [*SPECIALS, *vocabulary]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, normalized=False) for tag in TAGS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
