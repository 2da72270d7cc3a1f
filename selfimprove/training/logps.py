"""Log-probabilities of completions under a model: the plain forward, one padded row per sequence."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selfimprove.training.job import Row


def sequence_logps(model: Any, rows: Sequence[Row]) -> Tensor:
    """Sum of the log-probabilities of each row's completion tokens, in nats; shape (rows,).

    Rows are padded on the right; padding is masked and attends to nothing, so that the amount does not matter.
    """
    ids = [row.prompt_ids + row.completion_ids for row in rows]
    longest = max(map(len, ids))
    batch = torch.tensor([i + [0] * (longest - len(i)) for i in ids], device=model.device)  # (rows, longest)
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids], device=model.device)
    first = min(len(row.prompt_ids) for row in rows) - 1  # no position before this one predicts a completion token
    logits = model(batch, attention_mask=mask, logits_to_keep=longest - first, use_cache=False).logits
    targets = batch[:, first + 1 :]  # (rows, kept - 1)
    logps = -torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
    ).view_as(targets)
    position = torch.arange(first + 1, longest, device=model.device)
    begin = torch.tensor([len(row.prompt_ids) for row in rows], device=model.device)[:, None]
    end = torch.tensor([len(i) for i in ids], device=model.device)[:, None]
    return (logps * ((position >= begin) & (position < end))).sum(-1)
