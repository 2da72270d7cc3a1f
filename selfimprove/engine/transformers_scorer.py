"""A reward model in this process, by plain transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from selfimprove import interrupts
from selfimprove.engine.batching import by_length
from selfimprove.engine.checkpoints import SAFE
from selfimprove.engine.protocol import Options
from selfimprove.errors import UserError

TOKENS = 16_384  # of a batch, padding included


class TransformersScorer:
    """See protocol.Scorer.

    Args:
        model: a directory that checkpoints.check_reward_model lets pass.
        options: of these, only the dtype matters here.

    Raises:
        UserError: the checkpoint lacks weights, such as those of the reward's head.
    """

    def __init__(self, model: Path, options: Options) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any
        loaded, found = transformers.AutoModelForSequenceClassification.from_pretrained(
            model, dtype=getattr(torch, options.dtype), **SAFE, output_loading_info=True
        )
        if found["missing_keys"]:  # they would be random
            raise UserError(
                f"reward model {model} has no weights for {min(found['missing_keys'])}",
                "save it with save_pretrained after it was trained",
            )
        self.model = loaded.eval()
        head = getattr(self.model, "score", None)
        if isinstance(head, torch.nn.Linear):  # in bfloat16 rewards near 20 would be rounded to eighths
            head.float().register_forward_pre_hook(lambda module, given: (given[0].float(),))

    def rewards(self, sequences: Sequence[Sequence[int]], finished: Callable[[int, float], None]) -> list[float]:
        """See protocol.Scorer."""
        self.model.to(self.device)
        found = [0.0] * len(sequences)
        for batch in by_length([len(ids) for ids in sequences], TOKENS):
            for i, reward in zip(batch, self._score([sequences[i] for i in batch]), strict=True):
                found[i] = reward
                finished(i, reward)
            interrupts.check()
        return found

    def sleep(self) -> None:
        """Leave the device; the weights wait in this process's memory."""
        if self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Forget the model."""
        self.model = None

    def _score(self, batch: list[Sequence[int]]) -> list[float]:
        longest = max(map(len, batch))
        pad = self._pad_token_id({ids[-1] for ids in batch})
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in batch], device=self.device)
        mask = torch.tensor([[k < len(row) for k in range(longest)] for row in batch], device=self.device)
        with torch.inference_mode():
            rewards: list[float] = self.model(ids, attention_mask=mask.long()).logits[:, 0].float().tolist()
        return rewards

    def _pad_token_id(self, last: set[int]) -> int:
        """An id to pad with; the model reads its reward at the last token that is another one.

        The model's own pad token may be the end token too, which is the very token to read at.
        """
        config = self.model.config.get_text_config()
        own = config.pad_token_id
        if own is None or own in last:
            own = next(token for token in range(len(last) + 1) if token not in last)
            config.pad_token_id = own
        return int(own)
