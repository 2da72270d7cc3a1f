"""One optimiser step: its batch laid out as trees, scored in micro-batches, the loss's gradient, the update.

The gradient does not depend on how the batch is split over micro-batches or processes: a loss is a function of the
sums of each response's log-probs, its derivative with respect to these sums is taken in float64, and the model's
backward pass is weighted with it. Losses that couple the pairs of a batch see the whole batch first, without gradient.
"""

import itertools
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selfimprove import recipe
from selfimprove.errors import UserError
from selfimprove.training import distributed, noise
from selfimprove.training.distributed import World
from selfimprove.training.job import PairRow, Tree
from selfimprove.training.logps import EMPTY, Scorer, sums, tolerance
from selfimprove.training.losses import Bound, Quantities, implicit_rewards
from selfimprove.training.packing import share, size, trees_of
from selfimprove.training.pair_losses import ByPair
from selfimprove.training.player import Player
from selfimprove.training.references import Cached, Live, Reference


class TrainingFailed(UserError):
    """The loss or a gradient was not finite; nothing was saved."""


class Batch(NamedTuple):
    """The pairs of one optimiser step; responses are numbered through all trees in order."""

    pairs: list[PairRow]
    trees: list[Tree]
    first: list[int]  # number of each tree's first response
    chosen: list[int]
    rejected: list[int]
    mismatched: list[int]  # responses under another pair's prompt (KTO); scored, never trained on

    @property
    def responses(self) -> int:
        """How many there are."""
        return self.first[-1] + len(self.trees[-1].responses)


def lay_out(pairs: Sequence[PairRow], mismatched: bool = False) -> Batch:
    """Trees of a batch of pairs, every answer once; mismatched are the prompt of i and the next other prompt's answer.

    Pairs of one prompt stand beside each other, and the prompt's own answer would be no mismatch. A batch of one prompt
    has none.
    """
    shared = trees_of(pairs)
    trees = list(shared.trees)
    count = sum(len(tree.responses) for tree in trees)
    foreign: list[int] = []
    if mismatched:
        for i, pair in enumerate(pairs):
            later = (b for b in [*pairs[i + 1 :], *pairs[:i]] if b.prompt_ids != pair.prompt_ids)
            trees += [Tree(pair.prompt_ids, [other.chosen_ids]) for other in itertools.islice(later, 1)]
        foreign = list(range(count, count + len(trees) - len(shared.trees)))
    first, total = [], 0
    for tree in trees:
        first.append(total)
        total += len(tree.responses)
    return Batch(list(pairs), trees, first, shared.chosen, shared.rejected, foreign)


class Columns(NamedTuple):
    """What is known of a batch's R responses and N pairs, float64; zeros where another process knows it."""

    policy: Tensor  # (R,)
    concentration: Tensor  # (R,) mean over tokens of log p(token) - log sum_v p(v)^2
    references: Tensor  # (references, R)
    noise: Tensor  # (3, N): of the rejected answer log p_noise for the model and for the noise, sum of sigma
    losses: Tensor  # (N,) each pair's own, the mean of its entries
    from_cache: list[bool]  # which rows of `references` every process knows already

    def shared(self) -> list[Tensor]:
        """What must be summed over the processes."""
        moving = [row for row, known in zip(self.references, self.from_cache, strict=True) if not known]
        return [self.policy, self.concentration, self.noise, self.losses, *moving]


class Learner:
    """A policy, its loss and its optimiser.

    Args:
        scorer: the policy; `module` is the same as the processes run it.
        bound: the loss.
        settings: optimiser and schedule.
        steps: how many optimiser steps there will be, for the schedule.
        machine: token budget.
        world: the processes.
        references: of the loss, in order.
        player: DNPO's noise player, where the recipe has one.
        margin: constant target margin, in nats (the control of the noise).
    """

    def __init__(
        self,
        scorer: Scorer,
        module: nn.Module,
        bound: Bound,
        settings: recipe.Optimizer,
        steps: int,
        machine: recipe.Machine,
        world: World,
        references: Sequence[Reference] = (),
        player: Player | None = None,
        margin: float = 0.0,
    ) -> None:
        import transformers

        self.scorer, self.module, self.bound, self.settings = scorer, module, bound, settings
        self.machine, self.world, self.references = machine, world, references
        self.player, self.margin = player, margin
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},  # norms, biases: as in TRL
        ]
        own = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(own, lr=settings.learning_rate, fused=True)
        warmup = round(settings.warmup_ratio * steps)
        self.schedule: Any = transformers.get_scheduler(settings.scheduler, self.optimizer, warmup, steps)
        self.steps_done = 0
        self.tokens_done = 0
        self.by_pair = ByPair([], [])  # of the last step
        self.begins_at_reference = False  # whether policy and references are the same at the first step
        scorer.measure = "concentration" in bound.needs

    def step(self, pairs: Sequence[PairRow], *, first: bool = False) -> dict[str, float]:
        """One optimiser step on these pairs, the same on every process; returns its metrics under TRL's names.

        At the `first` step policy and reference must agree where they are the same weights: then the loss has its
        analytic value, log 2 for DPO.

        Raises:
            TrainingFailed: loss or gradient not finite; the weights are as they were.
        """
        began = time.perf_counter()
        batch = lay_out(pairs, "mismatched" in self.bound.needs)
        groups = self._groups(batch)
        columns = self._columns(batch)
        foreign = self._foreign_groups(batch)
        gradient: Gradient | None = None
        if self.bound.coupled and (len(groups) > 1 or self.world.size > 1):
            with torch.no_grad():
                for group in [*groups, *foreign]:
                    self._score(batch, group, columns)
            self._exchange(columns)
            gradient = self._gradient(batch, columns, range(len(pairs)))
        else:
            with torch.no_grad():
                for group in foreign:
                    self._score(batch, group, columns)
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            with nullcontext() if last else distributed.gradients_wait(self.module):
                scored = self._score(batch, group, columns)
                here = gradient or self._gradient(batch, columns, scored.pairs)
                scored.backward(here, self.world.size)
                loss += here.loss
        if gradient is None:
            distributed.sum_(loss, self.world)
            self._exchange(columns)
        else:
            loss = gradient.loss
        if first and self.begins_at_reference:
            self._agree(columns)
        metrics = self._update(batch, loss, columns)
        return metrics | self._shown(batch, columns, time.perf_counter() - began)

    def load(self, pairs: Sequence[PairRow]) -> int:
        """Tokens of the largest micro-batch that a step of these pairs has on any process."""
        batch = lay_out(pairs, "mismatched" in self.bound.needs)
        sizes = [self.scorer.cost(tree) for tree in batch.trees]
        return max(sum(sizes[i] for i in group) for groups in self._plans(batch, range(len(sizes))) for group in groups)

    def probe(self, pairs: Sequence[PairRow]) -> None:
        """Run the largest micro-batch of a step of these pairs and forget it, so that memory runs out now."""
        batch = lay_out(pairs, "mismatched" in self.bound.needs)
        largest = max(self._groups(batch), key=lambda group: sum(self.scorer.cost(batch.trees[i]) for i in group))
        columns = self._columns(batch)
        scored = self._score(batch, largest, columns)
        nothing = Gradient(
            torch.zeros_like(columns.policy), torch.zeros_like(columns.noise), columns.policy.new_zeros(())
        )
        scored.backward(nothing, 1)
        self.optimizer.zero_grad()
        for _, optimizer in self.player.optimizers() if self.player else []:
            optimizer.zero_grad()

    # --- the parts of a step -------------------------------------------------------------------------------------

    def _groups(self, batch: Batch) -> list[list[int]]:
        """Micro-batches of trees for this process; every process has as many, some of them empty."""
        own = [i for i in range(len(batch.trees)) if batch.first[i] not in batch.mismatched]
        return self._spread(batch, own)

    def _foreign_groups(self, batch: Batch) -> list[list[int]]:
        foreign = [i for i in range(len(batch.trees)) if batch.first[i] in batch.mismatched]
        return self._spread(batch, foreign) if foreign else []

    def _spread(self, batch: Batch, trees: list[int]) -> list[list[int]]:
        every = self._plans(batch, trees)
        here = every[self.world.rank]
        return here + [[] for _ in range(max(map(len, every)) - len(here))]

    def _plans(self, batch: Batch, trees: Sequence[int]) -> list[list[list[int]]]:
        """Micro-batches of trees for every process."""
        every = []
        for part in share([self.scorer.cost(batch.trees[i]) for i in trees], self.world.size):
            own = [trees[i] for i in part]
            groups = self.scorer.micro_batches([batch.trees[i] for i in own], self.machine.train_tokens)
            every.append([[own[i] for i in group] for group in groups])
        return every

    def _pairs_of(self, batch: Batch, group: list[int]) -> list[int]:
        inside = {batch.first[i] + k for i in group for k in range(len(batch.trees[i].responses))}
        return [n for n, response in enumerate(batch.chosen) if response in inside]

    def _columns(self, batch: Batch) -> Columns:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=self.world.device)

        columns = Columns(
            policy=zeros(batch.responses),
            concentration=zeros(batch.responses),
            references=zeros(len(self.references), batch.responses),
            noise=zeros(3, len(batch.pairs)),
            losses=zeros(len(batch.pairs)),
            from_cache=[isinstance(reference, Cached) for reference in self.references],
        )
        for row, reference in zip(columns.references, self.references, strict=True):
            if isinstance(reference, Cached):
                flat = [reference.sum(tree.prompt_ids, r) for tree in batch.trees for r in tree.responses]
                row.copy_(torch.tensor(flat, dtype=torch.float64))
        return columns

    def _exchange(self, columns: Columns) -> None:
        for column in columns.shared():
            distributed.sum_(column, self.world)

    def _score(self, batch: Batch, group: list[int], columns: Columns) -> "Scored":
        """Score one micro-batch with the policy and whatever must be scored beside it; fill the columns."""
        packed = self.scorer.pack([batch.trees[i] for i in group] or [EMPTY])
        out = self.module(packed)
        policy = sums(out.logps, packed)
        where = [batch.first[i] + k for i in group for k in range(len(batch.trees[i].responses))]
        places = torch.tensor(where, dtype=torch.long, device=self.world.device)
        if not group:
            return Scored(policy, None, places, [])
        columns.policy[places] = policy.detach()
        if out.concentration is not None:
            tokens = torch.bincount(packed.responses, minlength=len(where)).clamp(min=1)
            columns.concentration[places] = sums(out.logps.detach() - out.concentration, packed) / tokens
        for row, reference in zip(columns.references, self.references, strict=True):
            if isinstance(reference, Live):
                with torch.no_grad():
                    row[places] = sums(reference.module(packed).logps, packed)
        pairs = self._pairs_of(batch, group)
        noised = None
        if self.player and pairs:
            numbers = {response: number for number, response in enumerate(where)}
            rejected = [numbers[batch.rejected[n]] for n in pairs]
            names = [batch.pairs[n].pair_id for n in pairs]
            noised = self.player.score(packed, rejected, names, self.steps_done)
            for row, value in zip(columns.noise, noised, strict=True):
                if value is not None:
                    row[pairs] = value.detach()
        return Scored(policy, noised, places, pairs)

    def _quantities(self, batch: Batch, columns: Columns, which: Sequence[int], policy: Tensor) -> Quantities:
        device = self.world.device
        chosen = torch.tensor([batch.chosen[n] for n in which], dtype=torch.long, device=device)
        rejected = torch.tensor([batch.rejected[n] for n in which], dtype=torch.long, device=device)

        def lengths(answers: list[list[int]]) -> Tensor:
            return torch.tensor([len(a) for a in answers], dtype=torch.float64, device=device)

        pairs = [batch.pairs[n] for n in which]
        references = columns.references
        rates = [pair.win_rates for pair in pairs]
        known = torch.tensor([r for r in rates if r is not None], dtype=torch.float64, device=device)
        given = None not in rates and bool(pairs)
        foreign = torch.tensor(batch.mismatched, dtype=torch.long, device=device)
        return Quantities(
            policy_chosen_logps=policy[chosen],
            policy_rejected_logps=policy[rejected],
            reference_chosen_logps=references[0][chosen] if len(references) else None,
            reference_rejected_logps=references[0][rejected] if len(references) else None,
            chosen_tokens=lengths([p.chosen_ids for p in pairs]),
            rejected_tokens=lengths([p.rejected_ids for p in pairs]),
            second_chosen_logps=references[1][chosen] if len(references) > 1 else None,
            second_rejected_logps=references[1][rejected] if len(references) > 1 else None,
            chosen_win_rates=known[:, 0] if given else None,
            rejected_win_rates=known[:, 1] if given else None,
            win_probabilities=known[:, 2] if given else None,
            chosen_concentration=columns.concentration[chosen] if self.scorer.measure else None,
            rejected_concentration=columns.concentration[rejected] if self.scorer.measure else None,
            mismatched_policy_logps=columns.policy[foreign] if "mismatched" in self.bound.needs else None,
            mismatched_reference_logps=references[0][foreign] if len(references) else None,
        )

    def _gradient(self, batch: Batch, columns: Columns, which: Sequence[int]) -> "Gradient":
        """These pairs' share of the batch's loss, and its derivatives."""
        policy = columns.policy.detach().clone().requires_grad_()
        noised = columns.noise.detach().clone().requires_grad_()
        if not which:
            return Gradient(torch.zeros_like(policy), torch.zeros_like(noised), columns.policy.new_zeros(()))
        q = self._quantities(batch, columns, which, policy)
        if self.margin:  # before a state looks at the gaps, which else would be others than the loss's
            q = noise.shifted(q, self.margin)
        if self.bound.state is not None:
            q = self.bound.state.before(_detached(q))._replace(
                policy_chosen_logps=q.policy_chosen_logps, policy_rejected_logps=q.policy_rejected_logps
            )
        if self.player is None:
            model, player = self.bound.function(q), None
        else:
            trained = self.player.net is not None
            beside = noise.Noised(noised[0, which].detach(), noised[1, which] if trained else None, noised[2, which])
            model, player = noise.objectives(
                self.bound.function,
                q,
                beside,
                alpha=self.player.section.alpha,
                tokens_per_pair=sum(len(p.rejected_ids) for p in batch.pairs) / len(batch.pairs),
            )
        columns.losses[list(which)] = model.detach().reshape(-1, len(which)).mean(0).double()
        share = len(which) / len(batch.pairs)  # of the batch; a pair may have more than one entry
        loss = model.mean() * share
        objective = loss if player is None else loss + player.mean() * share
        d_policy, d_noised = torch.autograd.grad(objective, (policy, noised), allow_unused=True)
        return Gradient(d_policy, torch.zeros_like(noised) if d_noised is None else d_noised, loss.detach())

    def _update(self, batch: Batch, loss: Tensor, columns: Columns) -> dict[str, float]:
        norm = distributed.whole(nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)).item()
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            rows = ", ".join(pair.pair_id for pair in batch.pairs)
            raise TrainingFailed(
                f"loss or gradient not finite at step {self.steps_done + 1}, in the batch of {rows}",
                "a smaller learning_rate or beta; selfimprove inspect shows these pairs",
            )
        extra = {}
        if self.player:
            tokens = sum(len(pair.rejected_ids) for pair in batch.pairs)
            sigma = columns.noise[2].sum() / max(1, tokens)
            extra = self.player.update(sigma, self.steps_done + 1, self.settings.max_grad_norm, self.world)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        for reference in self.references:
            if isinstance(reference, Live):
                reference.follow(self.scorer, self.steps_done)
        if self.bound.state is not None:
            extra |= self.bound.state.shown()
        return {"loss": loss.item(), "grad_norm": norm, "learning_rate": rate, **extra}

    def _agree(self, columns: Columns) -> None:
        for row in columns.references:
            tokens = 1e-4 if tolerance(self.scorer) <= 1e-4 else 0.05
            difference = (columns.policy - row).abs().max().item()
            if difference > tokens * max(1.0, columns.policy.abs().max().item()):
                raise TrainingFailed(
                    f"policy and reference are the same weights, but their log-probs differ by {difference:.3g} nats",
                    "reference log-probs of another machine or kernel: remove cache/ in the run and resume",
                )

    def _shown(self, batch: Batch, columns: Columns, seconds: float) -> dict[str, float]:
        every = range(len(batch.pairs))
        q = self._quantities(batch, columns, every, columns.policy)
        fed = sum(size(tree) for tree in batch.trees)
        run = sum(self.scorer.cost(tree) for tree in batch.trees)
        self.tokens_done += fed
        shown = {
            "num_tokens": float(self.tokens_done),
            "tokens_per_second": fed / seconds,
            "padding_share": 1 - fed / run,
        }
        unknown = [None] * len(every)
        self.by_pair = ByPair(columns.losses.tolist() if self.bound.by_pair else unknown, unknown)
        shown["logps/chosen"] = q.policy_chosen_logps.mean().item()
        if not any(pair.rejected_ids for pair in batch.pairs):  # supervised fine-tuning
            return shown
        better, worse = implicit_rewards(self.bound, q)
        self.by_pair = self.by_pair._replace(margins=(better - worse).tolist())
        shown |= {
            "logps/rejected": q.policy_rejected_logps.mean().item(),
            "rewards/chosen": better.mean().item(),
            "rewards/rejected": worse.mean().item(),
            "rewards/margins": (better - worse).mean().item(),
            "rewards/accuracies": (better > worse).double().mean().item(),
        }
        if q.reference_chosen_logps is not None and q.reference_rejected_logps is not None:
            shown["logps/chosen_change"] = (q.policy_chosen_logps - q.reference_chosen_logps).mean().item()
            shown["logps/rejected_change"] = (q.policy_rejected_logps - q.reference_rejected_logps).mean().item()
        return shown


class Gradient(NamedTuple):
    """A loss and its derivatives by what the models gave; float64."""

    policy: Tensor  # (R,) by each response's sum
    noise: Tensor  # (3, N) by the columns of the same name
    loss: Tensor  # ()


class Scored(NamedTuple):
    """One micro-batch with its graph."""

    policy: Tensor  # (r,) float64
    noised: noise.Noised | None  # of its pairs
    places: Tensor  # (r,) its responses' numbers in the batch
    pairs: list[int]  # its pairs' numbers in the batch

    def backward(self, gradient: Gradient, processes: int) -> None:
        """Backward pass weighted with the loss's derivatives.

        DDP and FSDP2 average over processes where the batch's loss is a sum, so the policy's count `processes` times.
        """
        if not len(self.places):
            (self.policy.sum() * 0).backward()  # type: ignore[no-untyped-call]
            return
        torch.autograd.backward([self.policy], [gradient.policy[self.places] * processes])
        if self.noised is not None and self.noised.for_noise is not None:
            weights = gradient.noise[:, self.pairs]
            torch.autograd.backward([self.noised.for_noise, self.noised.sigma], [weights[1], weights[2]])


def _detached(q: Quantities) -> Quantities:
    constants: dict[str, Any] = {name: v.detach() for name, v in q._asdict().items() if isinstance(v, Tensor)}
    return q._replace(**constants)
