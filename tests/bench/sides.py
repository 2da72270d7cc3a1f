"""Our trainer's step and TRL's, each behind the same three calls: check, step, close."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import datasets
import tokenizers
import torch
import transformers
import trl

from selfimprove import recipe
from selfimprove.training import losses, references
from selfimprove.training.distributed import World
from selfimprove.training.job import PairRow
from selfimprove.training.learner import Batch, Columns, Learner
from selfimprove.training.logps import Scorer
from selfimprove.training.packing import trees_of
from tests.bench import workload
from tests.bench.workload import EOS, PAD, Setting

BETA, RATE, CLIP = 0.1, 1e-5, 1.0


class Seen(NamedTuple):
    """A batch's loss, each answer's log-prob (all chosen, then all rejected), and the gradient before clipping."""

    loss: float
    logps: torch.Tensor  # (2 N,) float64
    gradient: torch.Tensor  # (parameters,) float64


class _Catching(Learner):
    """Takes the gradient instead of a step while `catch` is set."""

    catch: bool = False
    seen: tuple[float, torch.Tensor] | None = None

    def _update(self, batch: Batch, loss: torch.Tensor, columns: Columns) -> dict[str, float]:
        if not self.catch:
            return super()._update(batch, loss, columns)
        self.seen = loss.item(), columns.policy[torch.tensor(batch.chosen + batch.rejected)].cpu().clone()
        return {}


class Ours:
    """selfimprove's step on packed trees with the reference's log-probs cached, or scored beside as TRL's default does.

    Args:
        setting: the bench.
        rows: every pair that will be trained on.
        online: score the reference at each step.
        checkpointing: gradient checkpointing.
    """

    def __init__(
        self, setting: Setting, rows: Sequence[PairRow], *, online: bool = False, checkpointing: bool = False
    ) -> None:
        self.setting = setting
        policy = workload.model(setting)
        if checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        world = World(0, 1, torch.device(setting.device))
        self.scorer = self._scorer(policy)
        if online:
            frozen = self._scorer(workload.model(setting).requires_grad_(False))
            known: references.Reference = references.Live(frozen, "sync", 0.0, 1 << 30)
        else:
            known = references.cached(self.scorer, self.scorer, trees_of(rows).trees, setting.tokens, world, None)
        settings = recipe.Optimizer(learning_rate=RATE, scheduler="constant_with_warmup", warmup_ratio=0.0)
        machine = recipe.Machine(train_tokens=setting.tokens, gradient_checkpointing=checkpointing)
        bound = losses.Bound(partial(losses.dpo, beta=BETA), BETA, 1, False, frozenset(), None)
        self.learner = _Catching(self.scorer, self.scorer, bound, settings, 1000, machine, world, [known])

    def _scorer(self, model: Any) -> Scorer:
        return Scorer(model, self.setting.logits_mib << 20, getattr(torch, self.setting.dtype))

    @property
    def model(self) -> Any:
        """The policy."""
        return self.scorer.model

    def check(self, rows: Sequence[PairRow]) -> Seen:
        """What a step on these pairs would see; the weights stay."""
        self.learner.catch = True
        self.learner.step(rows)
        self.learner.catch = False
        assert self.learner.seen is not None
        loss, logps = self.learner.seen
        return Seen(loss, logps, _gradient(self.model))

    def step(self, rows: Sequence[PairRow]) -> float:
        """One optimiser step; seconds."""
        began = workload.now(self.setting)
        self.learner.step(rows)
        return workload.now(self.setting) - began


class _Watch(transformers.TrainerCallback):
    """Seconds from the first step's begin to the last one's end, or the gradient instead of a step."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.catch = False
        self.began = self.ended = math.nan
        self.gradient: torch.Tensor | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = math.nan

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if math.isnan(self.began):
            self.began = workload.now(self.setting)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = workload.now(self.setting)

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        if self.catch:
            self.gradient = _gradient(model)


class _Tokenized(trl.DPOTrainer):
    """TRL's trainer given token ids; the step is untouched."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class Trl:
    """TRL's DPOTrainer in its own training loop.

    Args:
        setting: the bench.
        rows: every pair that will be trained on.
        online: score the reference at each step (TRL's default), else once beforehand.
        compact: score response positions only, as TRL does on a GPU.
        device_batch: pairs that are padded together.
        pairs: per optimiser step.
        checkpointing: gradient checkpointing.
    """

    def __init__(
        self,
        setting: Setting,
        rows: Sequence[PairRow],
        *,
        online: bool = False,
        compact: bool = False,
        device_batch: int,
        pairs: int,
        checkpointing: bool = False,
    ) -> None:
        self.setting, self.compact = setting, compact
        self.rows = {row.pair_id: number for number, row in enumerate(rows)}
        self.data = datasets.Dataset.from_list([r._asdict() for r in map(_columns, rows)])
        self.watch = _Watch(setting)
        self.folder = tempfile.TemporaryDirectory()
        arguments = trl.DPOConfig(
            output_dir=self.folder.name,
            beta=BETA,
            precompute_ref_log_probs=not online,
            per_device_train_batch_size=device_batch,
            gradient_accumulation_steps=pairs // device_batch,
            gradient_checkpointing=checkpointing,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            max_length=None,
            bf16=setting.dtype == "bfloat16",
            use_cpu=setting.device == "cpu",
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        with self._head():
            self.trainer = _Tokenized(
                workload.model(setting),
                workload.model(setting) if online else None,
                arguments,
                train_dataset=self.data,
                processing_class=_tokenizer(),
                callbacks=[self.watch],
            )
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.scored = self.trainer.train_dataset

    @property
    def model(self) -> Any:
        """The policy."""
        return self.trainer.model

    @contextmanager
    def _head(self) -> Iterator[None]:
        if not self.compact:
            yield
            return
        with mock.patch("trl.trainer.utils._use_triton", return_value=True):
            yield

    def _train(self, rows: Sequence[PairRow]) -> float:
        self.trainer.train_dataset = self.scored.select([self.rows[row.pair_id] for row in rows])
        with self._head():
            loss: float = self.trainer.train().training_loss
        return loss

    def check(self, rows: Sequence[PairRow]) -> Seen:
        """What a step on these pairs would see; the weights stay. Token log-probs are summed in float64."""
        parts: list[list[torch.Tensor]] = [[], []]

        def catch(module: Any, args: Any, output: Any) -> None:
            sums = output.log_probs.detach().double().sum(1).cpu()
            for part, half in zip(parts, sums.chunk(2), strict=True):
                part.append(half)

        self.watch.catch, self.trainer.args.max_grad_norm = True, 0.0
        hook = self.model.register_forward_hook(catch)
        loss = self._train(rows)
        hook.remove()
        self.watch.catch, self.trainer.args.max_grad_norm = False, CLIP
        assert self.watch.gradient is not None
        return Seen(loss, torch.cat(parts[0] + parts[1]), self.watch.gradient)

    def step(self, rows: Sequence[PairRow]) -> float:
        """Optimiser steps on these pairs in order; seconds, without the loop's set-up and the first batch's padding."""
        self._train(rows)
        return self.watch.ended - self.watch.began


def _gradient(model: Any) -> torch.Tensor:
    """Taken away, so that an optimiser step after it changes nothing."""
    found = []
    for p in model.parameters():
        found.append((torch.zeros_like(p) if p.grad is None else p.grad).double().flatten().cpu())
        p.grad = None
    return torch.cat(found)


class _Row(NamedTuple):
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def _columns(row: PairRow) -> _Row:
    return _Row(row.prompt_ids, row.chosen_ids, row.rejected_ids)


def _tokenizer() -> Any:
    """TRL asks for one; the rows are token ids already."""
    words = tokenizers.models.WordLevel({"<pad>": PAD, "<eos>": EOS}, unk_token="<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )
