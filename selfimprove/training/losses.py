"""Preference losses: pure functions from per-sequence quantities to one loss per pair (float64-safe).

Reference values of every function stand in tests/data/loss_vectors.json, obtained from the upstream programs.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid, relu

from selfimprove.errors import UserError
from selfimprove.recipe import Train


class Quantities(NamedTuple):
    """What a loss may look at, one entry per pair; every tensor has shape (pairs,).

    Log-probabilities are sums over completion tokens in nats, the end token included, the prompt excluded.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor | None
    reference_rejected_logps: Tensor | None
    chosen_tokens: Tensor  # number of completion tokens
    rejected_tokens: Tensor

    def rewards(self) -> tuple[Tensor, Tensor]:
        """Log-ratios to the reference of chosen and rejected, in nats."""
        if self.reference_chosen_logps is None or self.reference_rejected_logps is None:
            raise ValueError("this loss needs a reference")
        return (
            self.policy_chosen_logps - self.reference_chosen_logps,
            self.policy_rejected_logps - self.reference_rejected_logps,
        )

    def log_ratio(self) -> Tensor:
        """Chosen reward minus rejected reward, in nats: the argument of DPO's sigmoid over beta."""
        chosen, rejected = self.rewards()
        return chosen - rejected

    def log_ratio_per_token(self) -> Tensor:
        """The same with each reward divided by its answer's length."""
        chosen, rejected = self.rewards()
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens


Loss = Callable[[Quantities], Tensor]  # to one loss per pair, shape (pairs,)


def dpo(q: Quantities, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7), also SPIN's loss; `label_smoothing` > 0 is conservative DPO."""
    return _smoothed(beta * q.log_ratio(), label_smoothing)


def robust_dpo(q: Quantities, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased when that share of labels (below 0.5) is flipped; unbounded below."""
    logits = beta * q.log_ratio()
    flipped = (1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return -flipped / (1 - 2 * label_smoothing)


def dpo_norm(q: Quantities, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): log-ratios per token."""
    return -logsigmoid(beta * q.log_ratio_per_token())


def ipo(q: Quantities, *, beta: float = 0.1) -> Tensor:
    """IPO (arXiv 2310.12036) on log-ratios per token, as in TRL; `beta` is the paper's tau."""
    return (q.log_ratio_per_token() - 1 / (2 * beta)) ** 2


def ipo_sum(q: Quantities, *, beta: float = 0.1) -> Tensor:
    """IPO as printed (arXiv 2310.12036, equation 17), on summed log-ratios."""
    return (q.log_ratio() - 1 / (2 * beta)) ** 2


def hinge(q: Quantities, *, beta: float = 0.1) -> Tensor:
    """Hinge on the DPO logits (RSO, arXiv 2309.06657)."""
    return relu(1 - beta * q.log_ratio())


def slic_hf(q: Quantities, *, delta: float = 1.0, nll_weight: float = 0.1) -> Tensor:
    """SLiC-HF (arXiv 2305.10425): hinge on summed log-probs, no reference, regularised towards the chosen answer."""
    margin = q.policy_chosen_logps - q.policy_rejected_logps
    return relu(delta - margin) - nll_weight * q.policy_chosen_logps


def simpo(
    q: Quantities, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0, nll_weight: float = 0.0
) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): length-normalised, no reference; gamma is the target margin itself.

    `nll_weight` adds that much of the chosen answer's mean negative log-likelihood per token.
    """
    chosen = q.policy_chosen_logps / q.chosen_tokens
    rejected = q.policy_rejected_logps / q.rejected_tokens
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing) - nll_weight * chosen


def dpop(q: Quantities, *, beta: float = 0.3, penalty: float = 50.0) -> Tensor:
    """DPOP, Smaug (arXiv 2402.13228): DPO with a penalty when the chosen answer falls below the reference."""
    chosen, _ = q.rewards()
    return -logsigmoid(beta * (q.log_ratio() - penalty * relu(-chosen)))


def minor_dpo(q: Quantities, *, beta: float = 0.1) -> Tensor:
    """Minor-DPO (arXiv 2408.09834): the rejected answer is pushed no further once it is below the reference."""
    chosen, rejected = q.rewards()
    return -logsigmoid(beta * (chosen - relu(rejected)))


def r_dpo(q: Quantities, *, beta: float = 0.1, alpha: float = 0.01) -> Tensor:
    """R-DPO, iLR-DPO (arXiv 2403.19159, 2406.11817): length-regularised; `alpha` per token, outside beta."""
    longer = (q.chosen_tokens - q.rejected_tokens).to(q.policy_chosen_logps.dtype)  # else alpha rounds to float32
    return -logsigmoid(beta * q.log_ratio() + alpha * longer)


def sppo_hard(q: Quantities, *, beta: float = 0.001) -> Tensor:
    """SPPO (arXiv 2405.00675) with win probabilities of one and zero, without the factor 1/2, as in TRL."""
    chosen, rejected = q.rewards()
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(q: Quantities, *, beta: float = 0.1) -> Tensor:
    """APO-zero (arXiv 2408.06266): chosen up, rejected down."""
    chosen, rejected = q.rewards()
    return sigmoid(-beta * chosen) + sigmoid(beta * rejected)


def apo_down(q: Quantities, *, beta: float = 0.1) -> Tensor:
    """APO-down (arXiv 2408.06266): both down, the rejected one more."""
    chosen, _ = q.rewards()
    return sigmoid(beta * chosen) + sigmoid(-beta * q.log_ratio())


def nca(q: Quantities, *, beta: float = 0.01) -> Tensor:
    """NCA for pairs (arXiv 2402.05369): the chosen answer's absolute likelihood counts, not only the difference."""
    chosen, rejected = (beta * reward for reward in q.rewards())
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def exo(q: Quantities, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO for pairs (arXiv 2402.00856): reverse KL to the smoothed label."""
    logits = beta * q.log_ratio()
    won, lost = logsigmoid(logits), logsigmoid(-logits)
    return won.exp() * (won - math.log1p(-label_smoothing)) + lost.exp() * (lost - math.log(label_smoothing))


def rpo(q: Quantities, *, beta: float = 0.1, nll_weight: float = 1.0) -> Tensor:
    """DPO + the chosen answer's negative log-likelihood per token, one weight per pair (arXiv 2404.19733)."""
    return -logsigmoid(beta * q.log_ratio()) - nll_weight * q.policy_chosen_logps / q.chosen_tokens


def orpo(q: Quantities, *, odds_weight: float = 0.1) -> Tensor:
    """ORPO (arXiv 2403.07691, equation 6): per-token NLL of the chosen answer and an odds ratio, no reference."""
    chosen = q.policy_chosen_logps / q.chosen_tokens
    rejected = q.policy_rejected_logps / q.rejected_tokens
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - odds_weight * logsigmoid(log_odds)


LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "robust_dpo": robust_dpo,
    "dpo_norm": dpo_norm,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "hinge": hinge,
    "slic_hf": slic_hf,
    "simpo": simpo,
    "dpop": dpop,
    "minor_dpo": minor_dpo,
    "r_dpo": r_dpo,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "nca": nca,
    "exo": exo,
    "rpo": rpo,
    "orpo": orpo,
}
REFERENCE_FREE = frozenset({"slic_hf", "simpo", "orpo"})


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, stable on both sides of -log 2 (Maechler 2012)."""
    near = x > -math.log(2)
    safe = torch.where(near, x, -1.0), torch.where(near, -1.0, x)  # keeps the branch not taken out of the gradient
    return torch.where(near, torch.log(-torch.expm1(safe[0])), torch.log1p(-torch.exp(safe[1])))


def of(section: Train) -> tuple[Loss, float]:
    """The loss that a recipe names, its parameters bound, and its beta (1 where it has none).

    Raises:
        UserError: unknown loss or parameter, or a reference that is missing or not used.
    """
    loss = section.loss.bind("loss", LOSSES)
    name = section.loss.name
    if name not in REFERENCE_FREE and section.reference is None:
        raise UserError(f"loss '{name}' needs a reference", 'set train.reference to "current" or "initial"')
    if name in REFERENCE_FREE and section.reference is not None:
        raise UserError(f"loss '{name}' uses no reference", "remove train.reference")
    beta = inspect.signature(loss).parameters.get("beta")
    return loss, 1.0 if beta is None else beta.default


def reward_margins(q: Quantities) -> tuple[Tensor, Tensor]:
    """Implicit rewards over beta of chosen and rejected: log-ratios, or mean log-probs without a reference."""
    with torch.no_grad():
        if q.reference_chosen_logps is None:
            return q.policy_chosen_logps / q.chosen_tokens, q.policy_rejected_logps / q.rejected_tokens
        return q.rewards()
