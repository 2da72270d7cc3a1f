"""DNPO's trainable noise (arXiv 2502.05400) and its two controls, for any loss that has a reference.

Noise is added to the reference's logits z on the tokens y of the rejected answer, and nowhere else:

    sigma[j, :] = c exp(Linear(GELU(LayerNorm(h[j]))))                   h: the reference's last hidden state
    log p_noise(y) = sum_j log softmax(z[j, :] + eps[j, :] sigma[j, :])[y_j],    eps ~ N(0, 1)

E[log p_noise] is about log p - 1/2 sum sigma^2 p (1 - p): the policy is asked for a larger margin, which the net sets.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu
from torch.utils.checkpoint import checkpoint

from selfimprove.errors import UserError
from selfimprove.training.coupling import Quantities, given

LIMIT = 0.75  # share of the bound; nets that ran away settled at 0.85 to 0.91 in the tests' world, some entries at 0


class NoiseDiverged(UserError):
    """The noise net's sigma is not finite, or at its bound nearly everywhere."""


class NoiseNet(torch.nn.Module):
    """sigma of every position and vocabulary entry, in logits: (n, H) -> (n, V), in the dtype of the weights.

    Where sigma <= scale it is exactly scale exp(x). A positive exponent x becomes m tanh(x / m) with
    m = log(bound / scale), so sigma stays below `bound`, which the noise player would otherwise run away from; a hard
    clamp has no gradient there, and the penalty on sigma could not bring it back. The default bound is near
    sqrt(2 log V), 3.7 at V = 1,000 and 4.6 at 32,000: beyond it the few largest of V draws outweigh all others
    together, and the noised distribution tells of the noise, not of the reference.

    Args:
        hidden: H, width of the reference's hidden states.
        vocabulary: V, width of the reference's logits, padding entries included.
        seed: of the weights; the global generator is not used.
        scale: c, about what sigma starts with; the authors ran 1.0, 0.75 and 0.5.
        bound: above every sigma.

    Raises:
        UserError: `scale` is not above 0, or so near `bound` that `check` would stop the first step.
    """

    def __init__(self, hidden: int, vocabulary: int, *, seed: int, scale: float = 0.5, bound: float = 4.0) -> None:
        super().__init__()
        if not 0 < scale < LIMIT * bound:
            hint = f"set train.noise.scale above 0 and below {LIMIT:g} times train.noise.bound"
            raise UserError(f"the noise cannot start at scale {scale:g} when its bound is {bound:g}", hint)
        self.scale, self.bound = scale, bound
        self.norm = torch.nn.LayerNorm(hidden)
        self.linear = torch.nn.Linear(hidden, vocabulary, device="meta").to_empty(device="cpu")  # draws nothing
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(self.linear.weight, std=0.02 / math.sqrt(hidden), generator=generator)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Sigma of each row of the reference's hidden states."""
        x = self.linear(gelu(self.norm(hidden.to(self.linear.weight.dtype))))
        room = math.log(self.bound / self.scale)
        exponent = torch.minimum(x, room * torch.tanh(x / room))  # for x < 0 the first is less, for x > 0 the second
        return self.scale * exponent.exp()


def check(mean_sigma: float, bound: float, step: int) -> None:
    """Stop before the optimiser step when the noise ran away.

    Args:
        mean_sigma: over the vocabulary and all rejected tokens of the step.
        bound: the net's.
        step: shown.

    Raises:
        NoiseDiverged: at `LIMIT` of the bound or above, or not a number.
    """
    if not mean_sigma < LIMIT * bound:
        raise NoiseDiverged(
            f"the noise diverged at step {step}: mean sigma is {mean_sigma:.3g}, its bound {bound:g}",
            "a larger train.noise.alpha or a smaller train.noise.learning_rate",
        )


class Noised(NamedTuple):
    """The rejected answer of each pair under the noised reference; every tensor (pairs,), float64, sums over tokens."""

    for_model: Tensor  # log p_noise with eps', in nats, a constant
    for_noise: Tensor | None  # log p_noise with eps, gradient to the net alone; None where sigma is not trained
    sigma: Tensor  # mean over the vocabulary of each token's sigma, gradient to the net alone


def noised_logps(
    sigma_of: Callable[[Tensor], Tensor] | float,
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    pair_ids: Sequence[str],
    lengths: Sequence[int],
    seed: int,
    step: int,
    chunk_rows: int,
) -> Noised:
    """Score rejected answers under the noised reference, never more than `chunk_rows` positions at once.

    The backward pass computes each chunk again instead of keeping (N, V) tensors; it calls `sigma_of` and `logits_of`.

    Args:
        sigma_of: a `NoiseNet`, (n, H) -> (n, V); or one fixed sigma, which is the control without a noise player.
        logits_of: the reference's frozen head, (n, H) -> (n, V).
        hidden: (N, H) the reference's states that predict the targets, all tokens of the first pair first.
        targets: (N,) token ids of the rejected answers, end tokens included.
        pair_ids: of each pair; with `seed` and `step` they settle the noise, whatever shares the micro-batch.
        lengths: tokens of each pair's rejected answer, N in sum.
        seed: of the run.
        step: of the optimiser.
        chunk_rows: positions at once; up to fourteen (chunk_rows, V) float32 tensors are alive.
    """
    keys = [f"{seed}/{step}/{pair}/{row}" for pair, n in zip(pair_ids, lengths, strict=True) for row in range(n)]
    hidden = hidden.detach()

    def chunk(begin: int) -> Any:
        part = slice(begin, begin + chunk_rows)
        inputs = sigma_of, logits_of, hidden[part], targets[part], keys[part]
        return checkpoint(_score, *inputs, use_reentrant=False, preserve_rng_state=False)

    for_model, for_noise, sigma = zip(*(chunk(begin) for begin in range(0, max(1, len(keys)), chunk_rows)), strict=True)
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(hidden.device)

    def sums(rows: Sequence[Tensor]) -> Tensor:
        zero = torch.zeros(len(lengths), dtype=torch.float64, device=hidden.device)
        return zero.index_add(0, owners, torch.cat(tuple(rows)).double())

    return Noised(sums(for_model), sums(for_noise) if callable(sigma_of) else None, sums(sigma))


def _score(
    sigma_of: Callable[[Tensor], Tensor] | float,
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    keys: Sequence[str],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log p_noise with eps' and with eps, and mean sigma, of each of n positions."""
    with torch.no_grad():  # a head that is tied to the policy's must not learn from the noise
        z = logits_of(hidden)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
    sigma = sigma_of(hidden) if callable(sigma_of) else z.new_tensor(sigma_of).expand_as(z)

    def logps(draw: int, sigma: Tensor) -> Tensor:
        return -cross_entropy(z + epsilon(keys, draw, z) * sigma, targets, reduction="none")

    mean, for_noise = sigma.mean(-1), logps(0, sigma) if callable(sigma_of) else None
    return logps(1, sigma.detach()), for_noise, mean  # last, since the backward pass stops where its needs end


def epsilon(keys: Sequence[str], draw: int, like: Tensor) -> Tensor:
    """Standard normal noise, (n, V) float32, one row of `like` per key.

    Each row has its own seed, so that neither chunks nor neighbours nor processes change it, and the backward pass can
    repeat it. Another kind of device draws other numbers.
    """
    generator = torch.Generator(like.device)
    noise = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    for row, key in zip(noise, keys, strict=True):
        digest = hashlib.sha256(f"{key}/{draw}".encode()).digest()
        row.normal_(generator=generator.manual_seed(int.from_bytes(digest[:8], "big")))
    return noise


def objectives(
    loss: Callable[[Quantities], Tensor], q: Quantities, noised: Noised, *, alpha: float, tokens_per_pair: float
) -> tuple[Tensor, Tensor | None]:
    """Entries of the two players' objectives, whose means over the step sum to L_model + L_noise + alpha mean(sigma).

    For DPO, with d = pc - pr of the policy and rc of the reference, these are the paper's two losses:
    L_model = -log s(beta (d - (rc - log p_noise(eps', sg sigma)))), no gradient to the net, and
    L_noise = +log s(beta (sg d - (rc - log p_noise(eps, sigma)))), no gradient to the policy.

    Args:
        loss: one with a reference, from quantities to entries; a whole number of entries per pair.
        q: quantities without noise.
        noised: of the same pairs.
        alpha: weight of mean sigma, the paper's 1.
        tokens_per_pair: mean length of the rejected answers of the whole step, all processes together. Sigma's mean is
            over tokens and an entry's share is over pairs, which no micro-batch could tell from its own pairs.

    Returns:
        The two objectives' entries, the second None where sigma is not trained. It holds alpha's term.
    """
    model = loss(_against(q, noised.for_model))
    if noised.for_noise is None:
        return model, None
    constants: dict[str, Any] = {name: v.detach() for name, v in q._asdict().items() if isinstance(v, Tensor)}
    noise = -loss(_against(q._replace(**constants), noised.for_noise))
    penalty = alpha * noised.sigma / tokens_per_pair
    return model, (noise.reshape(-1, len(penalty)) + penalty).flatten()


def shifted(q: Quantities, margin: float) -> Quantities:
    """The control without noise: the reference's log p of every rejected answer lowered by `margin` nats.

    The noise lowers it in expectation too. DPO becomes -log s(beta (D - margin)): a constant target margin.
    """
    return _against(q, given(q.reference_rejected_logps, "a reference") - margin)


def _against(q: Quantities, rejected: Tensor) -> Quantities:
    """The quantities, and those of a mix's members, with other reference log-probs of the rejected answers."""
    given(q.reference_rejected_logps, "a reference, to which the noise is added")
    members = tuple(_against(member, rejected) for member in q.members)
    return q._replace(reference_rejected_logps=rejected, members=members)
