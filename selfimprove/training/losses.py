"""Preference losses: pure functions from per-sequence quantities to one loss per pair (float64-safe).

The mean over a loss's entries is the objective of an optimiser step. Reference values of every function stand in
tests/data/loss_vectors.json, obtained from the upstream programs. In the formulas: c and r are the log-ratios to the
reference of chosen and rejected, D = c - r, s the sigmoid, pc and pr the policy's summed log-probabilities, lc and lr
the answers' lengths in tokens, beta the strength of the pull towards the reference.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid, relu

from selfimprove.errors import UserError
from selfimprove.recipe import Choice, Train
from selfimprove.training import coupling
from selfimprove.training.coupling import NonNegative, Part, Positive, Smoothing, State, given, smoothed
from selfimprove.training.coupling import Quantities as Quantities

Share = Annotated[float, Field(ge=0, le=1)]
Clip = Literal["adaptive", "fixed"]
Nll = Literal["example", "batch"]  # mean per token of each answer, or of all answers of the batch together
Loss = Callable[[Quantities], Tensor]


def dpo(q: Quantities, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7): -log s(beta D), also SPIN's loss; smoothed it is conservative DPO."""
    return smoothed(beta * q.log_ratio(), label_smoothing)


def robust_dpo(q: Quantities, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased when that share of labels is flipped; unbounded below."""
    logits = beta * q.log_ratio()
    flipped = (1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return -flipped / (1 - 2 * label_smoothing)


def dpo_norm(q: Quantities, *, beta: Positive = 5.0) -> Tensor:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): -log s(beta (c/lc - r/lr))."""
    return -logsigmoid(beta * q.log_ratio_per_token())


def ipo(q: Quantities, *, beta: Positive = 0.1) -> Tensor:
    """IPO (arXiv 2310.12036) on log-ratios per token, as in TRL; `beta` is the paper's tau."""
    return (q.log_ratio_per_token() - 1 / (2 * beta)) ** 2


def ipo_sum(q: Quantities, *, beta: Positive = 0.1) -> Tensor:
    """IPO as printed (arXiv 2310.12036, equation 17), on summed log-ratios: (D - 1/(2 beta))^2."""
    return (q.log_ratio() - 1 / (2 * beta)) ** 2


def hinge(q: Quantities, *, beta: Positive = 0.1) -> Tensor:
    """Hinge on the DPO logits (RSO, arXiv 2309.06657): max(0, 1 - beta D)."""
    return relu(1 - beta * q.log_ratio())


def slic_hf(q: Quantities, *, beta: Positive = 1.0, delta: Positive = 1.0, nll_weight: NonNegative = 0.1) -> Tensor:
    """SLiC-HF (arXiv 2305.10425): max(0, delta - beta (pc - pr)) - nll_weight pc, regularised towards chosen.

    No reference; `delta` is the margin asked for, `nll_weight` that of the chosen answer's summed NLL.
    """
    margin = q.policy_chosen_logps - q.policy_rejected_logps
    return relu(delta - beta * margin) - nll_weight * q.policy_chosen_logps


def simpo(
    q: Quantities,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative = 1.0,
    label_smoothing: Smoothing = 0.0,
    nll_weight: NonNegative = 0.0,
    nll: Nll = "example",
) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): -log s(beta (pc/lc - pr/lr) - gamma), no reference.

    `gamma` is the target margin itself, not its ratio to beta; `nll_weight` > 0 makes it CPO-SimPO.
    """
    return smoothed(beta * q.margin_per_token() - gamma, label_smoothing) + nll_weight * _nll(q, nll)


def simpo_hinge(q: Quantities, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> Tensor:
    """SimPO's hinge variant, of its program: max(0, 1 - beta (pc/lc - pr/lr) + gamma)."""
    return relu(1 - beta * q.margin_per_token() + gamma)


def simpo_two_sided(
    q: Quantities, *, beta: Positive = 2.0, gamma: NonNegative = 1.0, label_smoothing: Smoothing = 0.1
) -> Tensor:
    """SimPO smoothed as in gamma-PO's program: a flipped label asks for the margin `gamma` too."""
    gap = beta * q.margin_per_token()
    return -(1 - label_smoothing) * logsigmoid(gap - gamma) - label_smoothing * logsigmoid(-gap - gamma)


def dpop(q: Quantities, *, beta: Positive = 0.3, penalty: NonNegative = 50.0) -> Tensor:
    """DPOP, Smaug (arXiv 2402.13228): -log s(beta (D - penalty max(0, -c))), against a falling chosen answer."""
    chosen, _ = q.rewards()
    return -logsigmoid(beta * (q.log_ratio() - penalty * relu(-chosen)))


def minor_dpo(q: Quantities, *, beta: Positive = 0.1) -> Tensor:
    """Minor-DPO (arXiv 2408.09834): -log s(beta (c - max(0, r))), rejected is pushed no further below the reference."""
    chosen, rejected = q.rewards()
    return -logsigmoid(beta * (chosen - relu(rejected)))


def r_dpo(q: Quantities, *, beta: Positive = 0.1, alpha: NonNegative = 0.01) -> Tensor:
    """R-DPO, iLR-DPO (arXiv 2403.19159, 2406.11817): -log s(beta D + alpha (lc - lr)); `alpha` is outside beta."""
    longer = (q.chosen_tokens - q.rejected_tokens).to(q.policy_chosen_logps.dtype)  # else alpha rounds to float32
    return -logsigmoid(beta * q.log_ratio() + alpha * longer)


def sppo(q: Quantities, *, beta: Positive = 0.001) -> Tensor:
    """SPPO (arXiv 2405.00675): ((c - (Pc - 1/2)/beta)^2 + (r - (Pr - 1/2)/beta)^2) / 2; `beta` is 1/eta.

    Pc and Pr are the answers' win rates among the prompt's samples, see `preferences`.
    """
    chosen, rejected = q.rewards()
    chosen_target = (given(q.chosen_win_rates, "win rates") - 0.5) / beta
    rejected_target = (given(q.rejected_win_rates, "win rates") - 0.5) / beta
    return ((chosen - chosen_target) ** 2 + (rejected - rejected_target) ** 2) / 2


def sppo_single(q: Quantities, *, beta: Positive = 0.001) -> Tensor:
    """SPPO's variant with the probability P that chosen beats rejected: Pc = P, Pr = 1 - P."""
    chosen, rejected = q.rewards()
    target = (given(q.win_probabilities, "win probabilities") - 0.5) / beta
    return ((chosen - target) ** 2 + (rejected + target) ** 2) / 2


def sppo_hard(q: Quantities, *, beta: Positive = 0.001) -> Tensor:
    """SPPO (arXiv 2405.00675) with win probabilities of one and zero, without the factor 1/2, as in TRL."""
    chosen, rejected = q.rewards()
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def preferences(scores: Tensor) -> Tensor:
    """SPPO's P[i, j], the probability that sample i of a prompt beats sample j; its row means are the win rates."""
    return sigmoid(scores[..., :, None] - scores[..., None, :])


def apo_zero(q: Quantities, *, beta: Positive = 0.1) -> Tensor:
    """APO-zero (arXiv 2408.06266): s(-beta c) + s(beta r), chosen up, rejected down."""
    chosen, rejected = q.rewards()
    return sigmoid(-beta * chosen) + sigmoid(beta * rejected)


def apo_down(q: Quantities, *, beta: Positive = 0.1) -> Tensor:
    """APO-down (arXiv 2408.06266): s(beta c) + s(-beta D), both down, the rejected one more."""
    chosen, _ = q.rewards()
    return sigmoid(beta * chosen) + sigmoid(-beta * q.log_ratio())


def bco_pair(q: Quantities, *, beta: Positive = 0.1) -> Tensor:
    """BCO per pair without the reward shift, as TRL's bco_pair since 0.29: -log s(beta c) - log s(-beta r)."""
    chosen, rejected = q.rewards()
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def nca(q: Quantities, *, beta: Positive = 0.01) -> Tensor:
    """NCA for pairs (arXiv 2402.05369): the chosen answer's absolute likelihood counts, not only the difference."""
    chosen, rejected = (beta * reward for reward in q.rewards())
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def exo(
    q: Quantities, *, beta: Positive = 0.1, label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
) -> Tensor:
    """EXO for pairs (arXiv 2402.00856): reverse KL from s(beta D) to the smoothed label."""
    logits = beta * q.log_ratio()
    won, lost = logsigmoid(logits), logsigmoid(-logits)
    return won.exp() * (won - math.log1p(-label_smoothing)) + lost.exp() * (lost - math.log(label_smoothing))


def discopop(q: Quantities, *, beta: Positive = 0.05, tau: Positive = 0.05) -> Tensor:
    """DiscoPOP (arXiv 2406.08414): logistic and exponential loss of x = beta D, blended by s(x / tau)."""
    x = beta * q.log_ratio()
    exponential = torch.exp(logsigmoid(x / tau) - x)  # the product's factors may be 0 and infinite
    return -sigmoid(-x / tau) * logsigmoid(x) + exponential


def f_dpo_js(q: Quantities, *, beta: Positive = 0.1) -> Tensor:
    """f-DPO with the Jensen-Shannon divergence (arXiv 2309.16240): -log s(beta (log s(c) - log s(r)))."""
    chosen, rejected = q.rewards()
    return -logsigmoid(beta * (logsigmoid(chosen) - logsigmoid(rejected)))


def rpo(q: Quantities, *, beta: Positive = 0.1, nll_weight: NonNegative = 1.0, nll: Nll = "example") -> Tensor:
    """DPO + `nll_weight` times the chosen answer's negative log-likelihood per token (arXiv 2404.19733, 2405.16436)."""
    return -logsigmoid(beta * q.log_ratio()) + nll_weight * _nll(q, nll)


def sft(q: Quantities, *, nll: Nll = "example") -> Tensor:
    """The chosen answer's negative log-likelihood per token; for mixes, as RPO's second part."""
    return _nll(q, nll)


def orpo(q: Quantities, *, odds_weight: NonNegative = 0.1, nll: Nll = "example") -> Tensor:
    """ORPO (arXiv 2403.07691, equation 6): per-token NLL of the chosen answer and a log odds ratio, no reference."""
    return _nll(q, nll) - odds_weight * logsigmoid(log_odds(q))


def log_odds(q: Quantities) -> Tensor:
    """ORPO's log odds ratio of chosen to rejected, odds of the mean probability per token."""
    chosen, rejected = q.means()
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def cpo(q: Quantities, *, beta: Positive = 0.1, nll_weight: NonNegative = 1.0, nll: Nll = "batch") -> Tensor:
    """CPO (arXiv 2401.08417): -log s(beta (pc - pr)) + nll_weight NLL of chosen, no reference."""
    return -logsigmoid(beta * (q.policy_chosen_logps - q.policy_rejected_logps)) + nll_weight * _nll(q, nll)


def arpo(
    q: Quantities,
    *,
    beta: Positive = 0.1,
    floor: Positive = 0.9,
    growth: NonNegative = 0.4,
    nll_weight: NonNegative = 1.0,
    nll: Nll = "batch",
) -> Tensor:
    """ARPO, X-ALMA (arXiv 2410.03115): CPO with pr times min(1, floor exp(growth |pc/lc - pr/lr|) - 1).

    Answers of like probability are told apart less; the factor is part of the gradient and may be negative.
    """
    exponent = (growth * q.margin_per_token().abs()).clamp(max=math.log(2 / floor))  # before exp, which may overflow
    factor = floor * torch.exp(exponent) - 1
    return -logsigmoid(beta * (q.policy_chosen_logps - factor * q.policy_rejected_logps)) + nll_weight * _nll(q, nll)


def wpo(q: Quantities, *, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0, clamp: bool = True) -> Tensor:
    """WPO (arXiv 2406.11827): DPO of each pair times `wpo_weights`."""
    return wpo_weights(q, clamp=clamp) * smoothed(beta * q.log_ratio(), label_smoothing)


def wpo_weights(q: Quantities, *, clamp: bool = True) -> Tensor:
    """WPO's weight of each pair, how likely the policy is to sample it, a constant; at most 1 unless not `clamp`."""
    chosen = given(q.chosen_concentration, "the concentration").detach()
    total = chosen + given(q.rejected_concentration, "the concentration").detach()
    return torch.exp(total.clamp(max=0) if clamp else total)


def mrpo(
    q: Quantities,
    *,
    beta: Positive = 0.1,
    eta: Part = 0.1,
    clip: Clip = "adaptive",
    alpha: Share | None = None,
) -> Tensor:
    """MRPO (arXiv 2405.16388): DPO against -log(alpha / first + (1 - alpha) / second), a mix of two references.

    The second reference is clipped to within `eta` of the first, in relative log-probability: `fixed` on both sides,
    or `adaptive`, shared between chosen and rejected by their size. `alpha` unset is set per pair, by how far each
    reference tells chosen from rejected. Which reference it weighs follows the authors' program, not the paper.
    """
    share = _mrpo_alpha(q, alpha)
    chosen, rejected = (
        first + second - torch.logaddexp(share.log() + second, torch.log1p(-share) + first)
        for (first, _), second in zip(_both_references(q), _mrpo_clipped(q, eta, clip), strict=True)
    )
    return dpo(q._replace(reference_chosen_logps=chosen, reference_rejected_logps=rejected), beta=beta)


def multi_dpo(
    q: Quantities,
    *,
    beta: Positive = 0.1,
    eta: Part = 0.1,
    clip: Clip = "adaptive",
    alpha: Share | None = None,
) -> Tensor:
    """Multi-DPO, MRPO's baseline (arXiv 2405.16388): alpha DPO(second, clipped) + (1 - alpha) DPO(first)."""
    chosen, rejected = _mrpo_clipped(q, eta, clip)
    second = q._replace(reference_chosen_logps=chosen, reference_rejected_logps=rejected)
    share = _mrpo_alpha(q, alpha)
    return share * dpo(second, beta=beta) + (1 - share) * dpo(q, beta=beta)


class Spec(NamedTuple):
    """A loss and what it asks of the trainer."""

    function: Callable[..., Tensor]
    references: int = 1  # reference policies
    coupled: bool = False  # the value of a pair depends on the others of its batch; so it does with nll = "batch"
    needs: frozenset[str] = frozenset()  # further inputs
    state: Callable[[int, Mapping[str, Any]], State] | None = None  # from seed and parameters
    by_pair: bool = True  # see Bound
    summed: bool = False  # see Bound


LOSSES: Mapping[str, Spec] = {
    "dpo": Spec(dpo),
    "spin": Spec(dpo),
    "robust_dpo": Spec(robust_dpo),
    "dpo_norm": Spec(dpo_norm),
    "ipo": Spec(ipo),
    "ipo_sum": Spec(ipo_sum),
    "hinge": Spec(hinge),
    "slic_hf": Spec(slic_hf, references=0, summed=True),
    "simpo": Spec(simpo, references=0),
    "simpo_hinge": Spec(simpo_hinge, references=0),
    "simpo_two_sided": Spec(simpo_two_sided, references=0),
    "gamma_simpo": Spec(coupling.gamma_simpo, references=0, coupled=True, state=coupling.gamma_simpo_window),
    "gamma_dpo": Spec(coupling.gamma_dpo, coupled=True, state=coupling.gamma_dpo_window),
    "dpop": Spec(dpop),
    "minor_dpo": Spec(minor_dpo),
    "r_dpo": Spec(r_dpo),
    "sppo": Spec(sppo, needs=frozenset({"win_rates"})),
    "sppo_single": Spec(sppo_single, needs=frozenset({"win_probabilities"})),
    "sppo_hard": Spec(sppo_hard),
    "apo_zero": Spec(apo_zero),
    "apo_down": Spec(apo_down),
    "kto": Spec(coupling.kto, coupled=True, needs=frozenset({"mismatched"})),
    "kto_pair": Spec(coupling.kto_pair, coupled=True),
    "bco": Spec(coupling.bco, coupled=True, state=coupling.running_reward),
    "bco_pair": Spec(bco_pair),
    "nca": Spec(nca),
    "exo": Spec(exo),
    "aot": Spec(coupling.aot, coupled=True, by_pair=False),
    "aot_unpaired": Spec(coupling.aot_unpaired, coupled=True, by_pair=False),
    "discopop": Spec(discopop),
    "f_dpo_js": Spec(f_dpo_js),
    "rpo": Spec(rpo),
    "sft": Spec(sft, references=0),
    "orpo": Spec(orpo, references=0),
    "cpo": Spec(cpo, references=0, summed=True),
    "arpo": Spec(arpo, references=0, summed=True),
    "beta_dpo": Spec(coupling.beta_dpo, coupled=True, state=coupling.beta_selection),
    "wpo": Spec(wpo, needs=frozenset({"concentration"})),
    "mrpo": Spec(mrpo, references=2),
    "multi_dpo": Spec(multi_dpo, references=2),
}


def _nll(q: Quantities, nll: Nll) -> Tensor:
    """The chosen answers' negative log-likelihood per token: of each, or of the batch, then the same for each."""
    if nll == "batch":
        return (-q.policy_chosen_logps.sum() / q.chosen_tokens.sum()).expand_as(q.policy_chosen_logps)
    return -q.policy_chosen_logps / q.chosen_tokens


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, stable on both sides of -log 2 (Maechler 2012), and finite at 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    safe = torch.where(near, x, -1.0), torch.where(near, -1.0, x)  # keeps the branch not taken out of the gradient
    return torch.where(near, torch.log(-torch.expm1(safe[0])), torch.log1p(-torch.exp(safe[1])))


def _both_references(q: Quantities) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """First and second reference of the chosen answers, then of the rejected ones."""
    chosen = given(q.reference_chosen_logps, "a reference"), given(q.second_chosen_logps, "a second reference")
    rejected = given(q.reference_rejected_logps, "a reference"), given(q.second_rejected_logps, "a second reference")
    return chosen, rejected


def _mrpo_alpha(q: Quantities, alpha: float | None) -> Tensor:
    chosen, rejected = _both_references(q)
    if alpha is not None:
        return torch.full_like(chosen[0], alpha)
    first, second = ((c - r).abs() for c, r in zip(chosen, rejected, strict=True))
    return second / (second + first + 1e-6)


def _mrpo_clipped(q: Quantities, eta: float, clip: Clip) -> tuple[Tensor, Tensor]:
    """The second reference's log-probabilities of chosen and rejected, brought close to the first's."""
    chosen, rejected = _both_references(q)
    if clip == "fixed":
        return _near(*chosen, eta), _near(*rejected, eta)
    sizes = (chosen[0] + chosen[1]).abs(), (rejected[0] + rejected[1]).abs()
    width = eta * sizes[0] / (sizes[0] + sizes[1])
    return _near(*chosen, width), _near(*rejected, eta - width)


def _near(first: Tensor, second: Tensor, width: Tensor | float) -> Tensor:
    return second.clamp(min=(1 + width) * first, max=(1 - width) * first)  # log-probabilities are negative


class Bound(NamedTuple):
    """A recipe's loss, its parameters bound. With a state, `function` takes what `state.before` filled."""

    function: Loss
    beta: float  # scale of the shown rewards, 1 where the loss has none
    references: int
    coupled: bool
    needs: frozenset[str]
    state: State | None
    by_pair: bool = True  # whether an entry is a pair's own, which it is not where the batch is sorted
    summed: bool = False  # whether it compares answers by summed log-probs without a reference, not by their means


def of(section: Train, seed: int = 0) -> Bound:
    """The loss that a recipe names, or its convex mix of losses; `seed` is that of the coupled losses' draws.

    Raises:
        UserError: unknown loss or parameter, weights that are no mix, or references that are missing or not used.
    """
    given: Choice | Sequence[Choice] = section.loss
    bound = _bound(given, seed) if isinstance(given, Choice) else _mixed(given, seed)
    what = f"loss '{given.name}'" if isinstance(given, Choice) else f"the mix {' + '.join(c.name for c in given)}"
    references = section.references
    wanted, named = ("no reference", "a reference", "two references")[bound.references], len(references) or "none"
    if len(references) < bound.references:
        hint = 'set train.reference, for example to "initial"'
        raise UserError(f"{what} needs {wanted}, train.reference names {named}", hint)
    if len(references) > bound.references:
        hint = "remove from train.reference what the loss does not use"
        raise UserError(f"{what} uses {wanted}, train.reference names {named}", hint)
    return bound


def _bound(choice: Choice, seed: int) -> Bound:
    function = choice.bind("loss", {name: spec.function for name, spec in LOSSES.items()})
    spec = LOSSES[choice.name]
    p = {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "q"}
    state = spec.state(seed, p) if spec.state else None
    coupled = spec.coupled or p.get("nll") == "batch"
    beta = p.get("beta", 1.0)
    return Bound(function, beta, spec.references, coupled, spec.needs, state, spec.by_pair, spec.summed)


def _mixed(choices: Sequence[Choice], seed: int) -> Bound:
    weights = [_weight(choice) for choice in choices]
    if abs(math.fsum(weights) - 1) > 1e-9:
        raise UserError(f"the weights of the mix of losses sum to {math.fsum(weights):g}", "they must sum to 1")
    members = [
        _bound(Choice(**{k: v for k, v in choice.model_dump().items() if k != "weight"}), seed + i)
        for i, choice in enumerate(choices)
    ]
    states = [member.state for member in members]
    scaled = [m for m in members if "beta" in inspect.signature(m.function).parameters]
    return Bound(
        function=partial(_weighted_sum, members=members, weights=weights),
        beta=scaled[0].beta if scaled else 1.0,
        references=max(member.references for member in members),
        coupled=any(member.coupled for member in members),
        needs=frozenset().union(*(member.needs for member in members)),
        state=coupling.Mixed(states) if any(state is not None for state in states) else None,
        by_pair=all(member.by_pair for member in members),
        summed=bool(scaled) and scaled[0].summed,
    )


def _weight(choice: Choice) -> float:
    weight = (choice.model_extra or {}).get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        problem = "has no weight" if weight is None else f"has weight {weight!r}, which is no number above 0"
        raise UserError(f"loss '{choice.name}' of the mix {problem}", "each entry needs a weight; they sum to 1")
    return weight


def _weighted_sum(q: Quantities, *, members: Sequence[Bound], weights: Sequence[float]) -> Tensor:
    """One entry per pair; a member with two entries per pair enters with their mean, which keeps its objective."""
    policy = q.policy_chosen_logps, q.policy_rejected_logps  # what `before` saw was detached
    total = torch.zeros_like(policy[0])
    for member, weight, seen in zip(members, weights, q.members or [q] * len(members), strict=True):
        own = seen._replace(policy_chosen_logps=policy[0], policy_rejected_logps=policy[1])
        total = total + weight * member.function(own).reshape(-1, len(total)).mean(0)
    return total


def implicit_rewards(bound: Bound, q: Quantities) -> tuple[Tensor, Tensor]:
    """What the policy holds chosen and rejected for, as its loss measures it, times beta.

    Log-ratios, or without a reference the log-probs themselves: sums for CPO and its like, means per token for SimPO's.
    """
    with torch.no_grad():
        if q.reference_chosen_logps is not None:
            chosen, rejected = q.rewards()
        elif bound.summed:
            chosen, rejected = q.policy_chosen_logps, q.policy_rejected_logps
        else:
            chosen, rejected = q.means()
        return bound.beta * chosen, bound.beta * rejected
