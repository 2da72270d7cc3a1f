"""The training loop: preference losses and SFT, one optimiser, one way to save.

The gradient of an optimiser step does not depend on how its batch is split into forward passes: every part is
divided by the size of the whole batch.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
import transformers

from selfimprove.engine import canary
from selfimprove.errors import UserError
from selfimprove.recipe import Machine, Optimizer
from selfimprove.store import model_files
from selfimprove.training.job import Job, PairRow, Row
from selfimprove.training.logps import sequence_logps
from selfimprove.training.losses import Loss, Quantities, reward_margins

T = TypeVar("T")


class TrainingFailed(UserError):
    """The loss or a gradient was not finite; nothing was saved."""


def train_preference(
    job: Job, pairs: Sequence[PairRow], loss: Loss, beta: float, reference: Path | None
) -> dict[str, float]:
    """Optimise a preference loss from `job.start`; returns the last step's metrics. `beta` scales the shown rewards.

    Raises:
        TrainingFailed: non-finite loss or gradient; names the pairs of the step.
    """
    _prepare(job)
    reference_logps = _reference_logps(reference, pairs, job.machine) if reference else None
    model = _load(job.start)

    def forward(indices: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen, rejected = zip(*(pairs[i].rows() for i in indices), strict=True)
        logps = sequence_logps(model, [*chosen, *rejected])
        policy_chosen, policy_rejected = logps.chunk(2)
        known = reference_logps[:, indices].to(model.device) if reference_logps is not None else (None, None)
        q = Quantities(
            policy_chosen_logps=policy_chosen,
            policy_rejected_logps=policy_rejected,
            reference_chosen_logps=known[0],
            reference_rejected_logps=known[1],
            chosen_tokens=torch.tensor([len(r.completion_ids) for r in chosen], device=model.device),
            rejected_tokens=torch.tensor([len(r.completion_ids) for r in rejected], device=model.device),
        )
        better, worse = (beta * reward for reward in reward_margins(q))
        return loss(q), {
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "rewards/margins": better - worse,
            "rewards/accuracies": (better > worse).float(),
            "logps/chosen": q.policy_chosen_logps.detach(),
            "logps/rejected": q.policy_rejected_logps.detach(),
        }

    return _fit(job, model, forward, [pair.pair_id for pair in pairs], max(1, job.machine.train_rows // 2))


def train_sft(job: Job, examples: Sequence[Row]) -> dict[str, float]:
    """Supervised fine-tuning on completions: mean negative log-likelihood per token, one weight per example.

    Raises:
        TrainingFailed: non-finite loss or gradient.
    """
    _prepare(job)
    model = _load(job.start)

    def forward(indices: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = [examples[i] for i in indices]
        logps = sequence_logps(model, rows)
        return -logps / torch.tensor([len(r.completion_ids) for r in rows], device=model.device), {}

    return _fit(job, model, forward, [str(i) for i in range(len(examples))], job.machine.train_rows)


def _fit(
    job: Job,
    model: Any,
    forward: Callable[[list[int]], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    names: Sequence[str],
    rows_per_forward: int,
) -> dict[str, float]:
    settings = job.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    batches = list(_batches(len(names), settings, job.seed))
    warmup = round(settings.warmup_ratio * len(batches))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
    model.eval()  # dropout off: the policy must equal its reference at the first step
    shown: dict[str, float] = {}
    with job.metrics.open("w", encoding="utf-8") as log:
        for step, batch in enumerate(batches, 1):
            sums: dict[str, float] = {}
            for part in _chunks(batch, rows_per_forward):
                losses, extra = forward(part)
                (losses.sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
                for name, value in {"loss": losses.detach(), **extra}.items():
                    sums[name] = sums.get(name, 0.0) + value.double().sum().item()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
            shown = {name: value / len(batch) for name, value in sums.items()}
            if not (torch.tensor([shown["loss"], norm]).isfinite().all()):
                rows = ", ".join(names[i] for i in batch)
                raise TrainingFailed(
                    f"loss or gradient not finite at step {step}, in the batch of {rows}",
                    "a smaller learning_rate or beta; selfimprove inspect shows these pairs",
                )
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            log.write(json.dumps({"step": step, **shown, "grad_norm": norm, "learning_rate": rate}) + "\n")
            job.progress(step, len(batches))
    _save(model, job)
    return shown


def _batches(count: int, settings: Optimizer, seed: int) -> Iterator[list[int]]:
    for epoch in range(settings.epochs):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from _chunks(order, settings.batch_size)


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _reference_logps(reference: Path, pairs: Sequence[PairRow], machine: Machine) -> torch.Tensor:
    """Log-probs under the reference, shape (2, pairs): chosen, rejected."""
    model = _load(reference).eval()
    with torch.inference_mode():
        parts = []
        for chunk in _chunks(pairs, max(1, machine.train_rows // 2)):
            chosen, rejected = zip(*(pair.rows() for pair in chunk), strict=True)
            parts.append(torch.stack(sequence_logps(model, [*chosen, *rejected]).chunk(2)).cpu())
    return torch.cat(parts, dim=1).clone()


def _prepare(job: Job) -> None:
    torch.manual_seed(job.seed)
    if job.machine.threads is not None:
        torch.set_num_threads(job.machine.threads)


def _load(directory: Path) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _save(model: Any, job: Job) -> None:
    """A plain model directory: our weights, everything else as it was where we started, and the canary."""
    try:
        model.save_pretrained(job.out)
    except safetensors.SafetensorError as error:  # it hides the number of an operating system's error in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(job.out)) from None
    for path in model_files(job.start):
        if path.name != "config.json" and ".safetensors" not in path.name:
            shutil.copyfile(path, job.out / path.name)
    canary.save(job.out, canary.compute(model))
