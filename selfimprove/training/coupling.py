"""What a loss may look at, and the losses that couple the pairs of a batch, each with its state.

Formulas are in the symbols of `losses`. A state is asked once per optimiser step, with the detached quantities of the
whole step's batch in a fixed order, so it gives the same whatever the micro-batch size and the number of processes.
`dump` and `load` go through JSON and are exact to the bit: a resumed run draws what the uninterrupted one would have.
"""

import functools
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid, relu

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]  # share of pairs whose label is taken to be flipped
Part = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[int, Field(ge=1)]
QUEUE, WINDOW, FIRST_DRAWS = 2048, 256, 8  # of gamma-PO's program
MOMENTUM = 0.9  # of beta-DPO's program


class Quantities(NamedTuple):
    """What a loss may look at; every tensor has shape (pairs,) unless said otherwise.

    Log-probabilities are sums over completion tokens in nats, the end token included, the prompt excluded.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor | None
    reference_rejected_logps: Tensor | None
    chosen_tokens: Tensor  # number of completion tokens
    rejected_tokens: Tensor
    second_chosen_logps: Tensor | None = None  # of a second reference
    second_rejected_logps: Tensor | None = None
    chosen_win_rates: Tensor | None = None  # mean probability to win against the prompt's samples, itself included
    rejected_win_rates: Tensor | None = None
    win_probabilities: Tensor | None = None  # of chosen against rejected
    chosen_concentration: Tensor | None = None  # mean over tokens of log p(token) - log sum_v p(v)^2 under the policy
    rejected_concentration: Tensor | None = None
    mismatched_policy_logps: Tensor | None = None  # (any,): of answers under other prompts
    mismatched_reference_logps: Tensor | None = None
    other_gaps: Tensor | None = None  # (any,): from here on filled by State.before
    running_gap: Tensor | None = None  # ()
    selected: Tensor | None = None  # bool
    running_reward: Tensor | None = None  # ()
    members: "tuple[Quantities, ...]" = ()  # of a mix: what each member looks at

    def rewards(self) -> tuple[Tensor, Tensor]:
        """Log-ratios to the reference of chosen and rejected, in nats."""
        return (
            self.policy_chosen_logps - given(self.reference_chosen_logps, "a reference"),
            self.policy_rejected_logps - given(self.reference_rejected_logps, "a reference"),
        )

    def log_ratio(self) -> Tensor:
        """Chosen reward minus rejected reward, in nats: the argument of DPO's sigmoid over beta."""
        chosen, rejected = self.rewards()
        return chosen - rejected

    def log_ratio_per_token(self) -> Tensor:
        """The same with each reward divided by its answer's length."""
        chosen, rejected = self.rewards()
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens

    def means(self) -> tuple[Tensor, Tensor]:
        """The policy's log-probability per token of chosen and rejected."""
        return self.policy_chosen_logps / self.chosen_tokens, self.policy_rejected_logps / self.rejected_tokens

    def margin_per_token(self) -> Tensor:
        """The difference of the two: SimPO's margin over beta."""
        chosen, rejected = self.means()
        return chosen - rejected


def given(value: Tensor | None, what: str) -> Tensor:
    """The value, where the caller gave one."""
    if value is None:
        raise ValueError(f"this loss needs {what}")
    return value


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """The logistic loss, that share of labels taken to be flipped."""
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


class State(Protocol):
    """What a coupled loss remembers between optimiser steps."""

    def before(self, q: Quantities) -> Quantities:
        """Take a step's whole batch in and fill the fields of `q` that the loss looks at."""

    def shown(self) -> dict[str, float]:
        """What metrics.jsonl says of the last step; looked at by nobody else."""

    def dump(self) -> dict[str, Any]:
        """The state as JSON-able values."""

    def load(self, saved: dict[str, Any]) -> None:
        """Become the state that `dump` gave."""


def gamma_simpo(
    q: Quantities,
    *,
    beta: Positive = 10.0,
    gamma: NonNegative = 4.0,
    tau: Positive = 10.0,
    steps: Steps = 20,
) -> Tensor:
    """gamma-PO on SimPO (arXiv 2506.03690): each pair has its own target margin, see `gamma_margins`."""
    gaps = beta * q.margin_per_token()
    return -logsigmoid(gaps - gamma_margins(gaps, q.other_gaps, gamma=gamma, tau=tau, steps=steps))


def gamma_dpo(
    q: Quantities,
    *,
    beta: Positive = 0.1,
    gamma: NonNegative = 0.5,
    tau: Positive = 1.0,
    label_smoothing: Smoothing = 0.0,
    length_norm: bool = True,
    steps: Steps = 20,
) -> Tensor:
    """gamma-PO on DPO (arXiv 2506.03690): -log s(gap - (gamma_i - gamma)), so that the margins have mean zero.

    `length_norm` takes log-ratios per token.
    """
    gaps = _dpo_gaps(q, beta, length_norm)
    margins = gamma_margins(gaps, q.other_gaps, gamma=gamma, tau=tau, steps=steps)
    return smoothed(gaps - (margins - gamma), label_smoothing)


@torch.no_grad()
def gamma_margins(gaps: Tensor, others: Tensor | None, *, gamma: float, tau: float, steps: int = 20) -> Tensor:
    """gamma-PO's margin of each pair, from the gaps of its batch and of the `others` in the window; constants.

    Over the N gaps of the window the margins are N gamma p_i with p the minimiser, on the simplex, of
    mean_i -log s(gap_i - N gamma p_i) + tau KL(p || uniform), by mirror descent. Their mean is gamma, a pair of larger
    gap gets a larger margin, and a larger `tau` brings all closer to gamma. The margins are those that enter the last
    of `steps` steps, as in the authors' program.
    """
    window = torch.cat([given(others, "the window of gamma-PO"), gaps])
    size = len(window)
    rate = min(0.5 / tau, 1.0)
    shares = torch.full_like(window, 1 / size)
    for _ in range(steps - 1):
        slope = tau * (1 + torch.log(size * (shares + 1e-10))) + gamma * sigmoid(gamma * size * shares - window)
        shares = torch.softmax(torch.log(shares) - rate * slope, dim=0)
    return gamma * size * shares[size - len(gaps) :]


def _dpo_gaps(q: Quantities, beta: float, length_norm: bool) -> Tensor:
    return beta * (q.log_ratio_per_token() if length_norm else q.log_ratio())


class GammaWindow:
    """gamma-PO's queue of past reward gaps: fills `other_gaps`, a draw that brings the window to at most 256.

    Args:
        seed: of the draws.
        gaps: the scaled reward gap of each pair, as the loss takes it.
        margins: `gamma_margins` with the loss's parameters, to show them.
    """

    def __init__(
        self, seed: int, gaps: Callable[[Quantities], Tensor], margins: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.gaps, self.margins = gaps, margins
        self._shown: dict[str, float] = {}
        self.rng = random.Random(seed)
        self.queue = deque((self.rng.gauss(0.0, 1.0) for _ in range(FIRST_DRAWS)), maxlen=QUEUE)

    def before(self, q: Quantities) -> Quantities:
        """Draw the window, then push the batch."""
        gaps = self.gaps(q).detach()
        room = max(0, WINDOW - len(gaps))
        drawn = self.rng.sample(list(self.queue), min(len(self.queue), room))
        self.queue.extend(gaps.tolist())
        others = torch.tensor(drawn, dtype=gaps.dtype, device=gaps.device)
        margins = self.margins(gaps, others)
        self._shown = {"gamma/mean": margins.mean().item(), "gamma/sd": margins.std(correction=0).item()}
        return q._replace(other_gaps=others)

    def shown(self) -> dict[str, float]:
        """Mean and spread of the batch's target margins."""
        return self._shown

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {"queue": list(self.queue), "rng": _rng_state(self.rng)}

    def load(self, saved: dict[str, Any]) -> None:
        """The inverse of `dump`."""
        self.queue = deque(saved["queue"], maxlen=QUEUE)
        _restore(self.rng, saved["rng"])


def gamma_simpo_window(seed: int, p: Mapping[str, Any]) -> State:
    """The state of `gamma_simpo` with parameters `p`."""
    return GammaWindow(seed, lambda q: p["beta"] * q.margin_per_token(), _margins(p))


def gamma_dpo_window(seed: int, p: Mapping[str, Any]) -> State:
    """The state of `gamma_dpo` with parameters `p`."""
    return GammaWindow(seed, lambda q: _dpo_gaps(q, p["beta"], p["length_norm"]), _margins(p))


def _margins(p: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    return functools.partial(gamma_margins, gamma=p["gamma"], tau=p["tau"], steps=p["steps"])


def beta_dpo(
    q: Quantities,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.6,
    filtered: Part = 0.2,
) -> Tensor:
    """beta-DPO (arXiv 2407.08639): DPO on selected pairs, with a beta that grows with their mean gap.

    The batch's beta is beta (1 + alpha (mean D of the selected - running mean)), at least 0.001, a constant;
    `filtered` is the share of pairs left out, through `BetaSelection`. The mean over entries is that over
    the selected pairs.
    """
    gaps = q.log_ratio()
    selected = given(q.selected, "the selection of beta-DPO").to(gaps.dtype)
    weights = selected / selected.mean()
    above = (weights * gaps.detach()).mean() - given(q.running_gap, "the running gap of beta-DPO")
    return -weights * logsigmoid((beta * (1 + alpha * above)).clamp(min=1e-3) * gaps)


class BetaSelection:
    """beta-DPO's running mean and deviation of the gaps: fills `running_gap` and `selected`.

    Both statistics start at zero and take the batch in before they are used, as in the authors' program. Pairs are
    kept by sequential draws without replacement with weights exp(-z^2 / 2), z the gap's distance in deviations.

    Args:
        seed: of the draws.
        filtered: share of the pairs that is left out.
    """

    def __init__(self, seed: int, filtered: float) -> None:
        self.filtered = filtered
        self.rng = random.Random(seed)
        self.mean = self.deviation = 0.0

    def before(self, q: Quantities) -> Quantities:
        """Update the statistics, then draw."""
        gaps = q.log_ratio().detach().double()
        spread = gaps.std().item() if len(gaps) > 1 else 0.0
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gaps.mean().item()
        self.deviation = MOMENTUM * self.deviation + (1 - MOMENTUM) * spread
        kept = max(1, int(len(gaps) * (1 - self.filtered)))
        selected = torch.zeros(len(gaps), dtype=torch.bool, device=gaps.device)
        selected[self._draw(gaps.tolist(), kept)] = True
        return q._replace(running_gap=gaps.new_tensor(self.mean).to(q.policy_chosen_logps.dtype), selected=selected)

    def _draw(self, gaps: Sequence[float], kept: int) -> list[int]:
        """Indices kept. The largest of log weight + Gumbel noise are such draws, and no weight underflows to zero."""
        width = max(self.deviation, 1e-12)
        keys = [-(((gap - self.mean) / width) ** 2) / 2 + _gumbel(self.rng) for gap in gaps]
        return sorted(range(len(gaps)), key=keys.__getitem__, reverse=True)[:kept]

    def shown(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {"mean": self.mean, "deviation": self.deviation, "rng": _rng_state(self.rng)}

    def load(self, saved: dict[str, Any]) -> None:
        """The inverse of `dump`."""
        self.mean, self.deviation = saved["mean"], saved["deviation"]
        _restore(self.rng, saved["rng"])


def beta_selection(seed: int, p: Mapping[str, Any]) -> State:
    """The state of `beta_dpo` with parameters `p`."""
    return BetaSelection(seed, p["filtered"])


def bco(q: Quantities, *, beta: Positive = 0.01) -> Tensor:
    """BCO (arXiv 2404.04656): -log s(beta c - d) of every chosen answer, then -log s(d - beta r) of every rejected.

    d is the running mean of all rewards beta c and beta r, a constant.
    """
    chosen, rejected = (beta * reward for reward in q.rewards())
    shift = given(q.running_reward, "the running reward of BCO")
    return -torch.cat([logsigmoid(chosen - shift), logsigmoid(shift - rejected)])


class RunningReward:
    """BCO's reward shift: fills `running_reward`, the mean of every scaled reward seen, this batch's included.

    Args:
        beta: scale of the rewards.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.mean, self.count = 0.0, 0

    def before(self, q: Quantities) -> Quantities:
        """Take the batch into the mean."""
        rewards = self.beta * torch.cat(q.rewards()).detach().double()
        self.count += len(rewards)
        self.mean += (rewards.mean().item() - self.mean) * len(rewards) / self.count
        return q._replace(running_reward=rewards.new_tensor(self.mean).to(q.policy_chosen_logps.dtype))

    def shown(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {"mean": self.mean, "count": self.count}

    def load(self, saved: dict[str, Any]) -> None:
        """The inverse of `dump`."""
        self.mean, self.count = saved["mean"], saved["count"]


def running_reward(_: int, p: Mapping[str, Any]) -> State:
    """The state of `bco` with parameters `p`; nothing is drawn."""
    return RunningReward(p["beta"])


def kto(
    q: Quantities, *, beta: Positive = 0.1, desirable_weight: Positive = 1.0, undesirable_weight: Positive = 1.0
) -> Tensor:
    """KTO (arXiv 2402.01306): s(beta (z - c)) of every chosen answer, then s(beta (r - z)) of every rejected one.

    z is the mean log-ratio of answers under other prompts, at least zero and a constant: an estimate of the KL
    divergence from the reference; zero in a batch of one prompt, which has no other. The weights are those of the
    two kinds.
    """
    chosen, rejected = q.rewards()
    policy = given(q.mismatched_policy_logps, "mismatched log-probabilities")
    ratios = policy - given(q.mismatched_reference_logps, "mismatched log-probabilities")
    shift = relu(ratios.mean()).detach() if len(ratios) else ratios.sum()
    good, bad = sigmoid(beta * (shift - chosen)), sigmoid(beta * (rejected - shift))
    return torch.cat([desirable_weight * good, undesirable_weight * bad])


def kto_pair(q: Quantities, *, beta: Positive = 0.1) -> Tensor:
    """KTO as TRL up to 0.8 had it for pairs: each side's shift is the other side's mean log-ratio, not a constant."""
    chosen, rejected = q.rewards()
    good = sigmoid(beta * (relu(rejected.mean()) - chosen))
    return torch.cat([good, sigmoid(beta * (rejected - relu(chosen.mean())))])


def aot(q: Quantities, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """AOT (arXiv 2406.05882): DPO on the sorted margins of the batch, policy's and reference's; entries sorted."""
    reference = given(q.reference_chosen_logps, "a reference") - given(q.reference_rejected_logps, "a reference")
    policy = q.policy_chosen_logps - q.policy_rejected_logps
    return smoothed(beta * (policy.sort().values - reference.sort().values), label_smoothing)


def aot_unpaired(q: Quantities, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """AOT for answers that are no pairs (arXiv 2406.05882): DPO on the sorted log-ratios of each kind."""
    chosen, rejected = q.rewards()
    return smoothed(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


class Mixed:
    """The states of a mix: fills `members`, what each member of the mix is to look at."""

    def __init__(self, states: Sequence[State | None]) -> None:
        self.states = states

    def before(self, q: Quantities) -> Quantities:
        """Show the batch to each member's state."""
        return q._replace(members=tuple(q if state is None else state.before(q) for state in self.states))

    def shown(self) -> dict[str, float]:
        """What the members show."""
        return {name: value for state in self.states if state for name, value in state.shown().items()}

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {"members": [None if state is None else state.dump() for state in self.states]}

    def load(self, saved: dict[str, Any]) -> None:
        """The inverse of `dump`."""
        for state, part in zip(self.states, saved["members"], strict=True):
            if state is not None:
                state.load(part)


def _gumbel(rng: random.Random) -> float:
    return -math.log(rng.expovariate(1.0) or math.ulp(0.0))  # expovariate may return 0


def _rng_state(rng: random.Random) -> list[Any]:
    version, words, gauss = rng.getstate()
    return [version, list(words), gauss]


def _restore(rng: random.Random, saved: Sequence[Any]) -> None:
    version, words, gauss = saved
    rng.setstate((version, tuple(words), gauss))
