"""A text encoder: one vector a text, for how alike texts are in meaning."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfimprove.engine.batching import by_length
from selfimprove.engine.checkpoints import SAFE, check_weights
from selfimprove.errors import UserError

if TYPE_CHECKING:
    import numpy as np

CHARACTERS = 1 << 15  # of a batch, padding included
LONGEST = 512  # tokens of a text that are read


class Encoder:
    """Mean of the last hidden states over a text's tokens, as sentence encoders are read (arXiv 1908.10084).

    Args:
        model: a directory that transformers' AutoModel loads; longer texts than 512 tokens are read up to there.

    Raises:
        UserError: no weights as safetensors, no tokenizer, or no model that loads.
    """

    def __init__(self, model: Path) -> None:
        import torch
        import transformers

        check_weights(model)
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            loaded: Any = transformers.AutoModel.from_pretrained(model, dtype=torch.float32, **SAFE)
        except (OSError, ValueError, KeyError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"encoder {model} does not load: {first}", "name a directory of an encoder") from None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = loaded.eval().to(self._device)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def __call__(self, texts: Sequence[str]) -> "np.ndarray[Any, np.dtype[Any]]":
        """(N, D) float32, in the order of the texts."""
        import numpy as np
        import torch

        found: dict[int, Any] = {}
        for some in by_length([max(1, len(text)) for text in texts], CHARACTERS):
            read = self._tokenizer(
                [texts[i] or " " for i in some],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                padding_side="right",
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                states = self._model(input_ids=read.input_ids, attention_mask=read.attention_mask).last_hidden_state
            weight = read.attention_mask[..., None].float()
            means = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
            found |= dict(zip(some, means.float().cpu().numpy(), strict=True))
        return np.stack([found[i] for i in range(len(texts))])
