"""Log-probabilities of responses under a model: packed trees where the model can run them, padded rows where not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selfimprove.errors import UserError
from selfimprove.training import attention, distributed, head
from selfimprove.training.job import Tree
from selfimprove.training.packing import Packed, fill, fill_padded, pack, padded_size, size

Mode = Literal["packed", "padded"]
EMPTY = Tree([0], [[0]])  # what a process runs when the others have one micro-batch more
HEAD_TOKENS = 32  # on which the self-test compares the head
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}  # per token, in nats


class TokenLogps(NamedTuple):
    """Of every scored token of a micro-batch, in the order of Packed: (N,) float32, nats."""

    logps: Tensor
    concentration: Tensor | None  # log sum_v p(v)^2 of its position, detached, where it was asked for (WPO)
    hidden: Tensor  # (N, H) the states they were predicted from


class Scorer(torch.nn.Module):
    """A causal language model that scores the responses of trees; a module, so that DDP and FSDP2 can wrap it.

    Args:
        model: a transformers causal language model.
        logits_bytes: largest (tokens, vocabulary) tensor.
        dtype: of the computation; the weights keep theirs.
        measure: also give each position's concentration.
    """

    def __init__(
        self, model: Any, logits_bytes: int = 256 << 20, dtype: torch.dtype = torch.float32, measure: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.logits_bytes = logits_bytes
        self.dtype = dtype
        self.measure = measure
        self.shape = head.shape_of(model.config)
        self.plain_attention: str = model.config._attn_implementation
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            self.plain_attention = "eager"  # transformers' sdpa drops the cap (Gemma 2) and says nothing
        self.mode: Mode = "padded"
        self.use("packed")

    def use(self, mode: Mode) -> None:
        """Score packed trees, or one padded row per response."""
        self.mode = mode
        self.model.set_attn_implementation(attention.NAME if mode == "packed" else self.plain_attention)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def body(self) -> Any:
        """The model without its head."""
        found = self.model.get_decoder()
        return self.model.model if found is self.model else found  # Llama 4's text model calls itself its decoder

    def forward(self, packed: Packed) -> TokenLogps:
        """Score one micro-batch."""
        with torch.autocast(packed.input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self._states(packed).to(self.dtype)
        out = self.model.get_output_embeddings()
        logps, concentration = head.target_logps(
            hidden, out.weight.to(self.dtype), out.bias, packed.targets, self.shape, self.logits_bytes, self.measure
        )
        return TokenLogps(logps, concentration, hidden)

    def _states(self, packed: Packed) -> Tensor:
        body = self.body
        if self.mode == "padded":
            return _padded(body, packed.trees, packed.input_ids.device)
        tree = attention.structure(packed.spans, packed.input_ids.device)
        states: Tensor = body(
            packed.input_ids, position_ids=packed.position_ids, use_cache=False, tree=tree
        ).last_hidden_state
        return states[0].index_select(0, packed.score_rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head applied to hidden states: (n, H) -> (n, V), float32."""
        out = self.model.get_output_embeddings()
        return head.logits(hidden.to(self.dtype), out.weight.to(self.dtype), out.bias, self.shape)

    def cost(self, tree: Tree) -> int:
        """Tokens a tree takes of the budget of a micro-batch."""
        return size(tree) if self.mode == "packed" else padded_size(tree)

    def micro_batches(self, trees: Sequence[Tree], budget: int) -> list[list[int]]:
        """Indices of trees in micro-batches of at most `budget` tokens; a larger tree stands alone."""
        if self.mode == "padded":
            return fill_padded(trees, budget)
        return fill([size(tree) for tree in trees], budget)

    def pack(self, trees: Sequence[Tree]) -> Packed:
        """Trees as this model takes them."""
        return pack(trees, self.device)


def sums(token_logps: Tensor, packed: Packed) -> Tensor:
    """Sum over the tokens of each response: (N,) -> (R,), float64, since float32 sums of -2,000 lose 1e-3."""
    count = sum(len(tree.responses) for tree in packed.trees)
    zero = torch.zeros(count, dtype=torch.float64, device=token_logps.device)
    return zero.index_add(0, packed.responses, token_logps.double())


def score_tokens(
    scorer: Scorer, module: torch.nn.Module, trees: Sequence[Tree], budget: int, calls: int = 0
) -> list[Tensor]:
    """Per-token log-probs of every response of every tree in order, without gradient; each (tokens,) float32 on CPU.

    Args:
        scorer: the model.
        module: the same as the processes run it.
        trees: what is scored.
        budget: tokens per forward pass.
        calls: run the module at least so often, as processes that share weights must.
    """
    found: dict[int, list[Tensor]] = {}
    groups = scorer.micro_batches(trees, budget)
    with torch.no_grad():
        for group in groups:
            packed = scorer.pack([trees[i] for i in group])
            logps = module(packed).logps.cpu()
            parts = iter(logps.split([len(r) for i in group for r in trees[i].responses]))
            for i in group:
                found[i] = [next(parts) for _ in trees[i].responses]
        for _ in range(calls - len(groups)):
            module(scorer.pack([EMPTY]))
    return [logps for i in range(len(trees)) for logps in found[i]]


class SelfTest(NamedTuple):
    """How the packed forward compares with the plain one."""

    mode: Mode  # that will be used
    difference: float  # largest of a token's log-prob, in nats; inf where packing raised
    why: str  # it was refused; empty when packed


def choose_mode(scorer: Scorer, trees: Sequence[Tree]) -> SelfTest:
    """Compare packed trees with plain rows on perturbed weights, and use packing only where it is right.

    State-space and linear-attention layers let state leak between responses and raise nothing: no list of
    architectures is as safe as looking. Weights are perturbed because fresh adapters are zero and hide what they do.

    Raises:
        UserError: the model does more to its logits than the head knows, so that either form would be wrong.
    """
    allowed = tolerance(scorer)
    scorer.use("padded")
    with _perturbed(scorer.model), torch.no_grad():
        _check_repeats(scorer, trees)
        _check_head(scorer, trees)
        plain = torch.cat(
            [scorer(scorer.pack([Tree(t.prompt_ids, [r])])).logps for t in trees for r in t.responses if r]
        )
        scorer.use("packed")
        try:
            together = scorer(scorer.pack(trees)).logps
            difference, why = (together - plain).abs().max().item(), ""
        except torch.OutOfMemoryError:  # padding would need more
            raise
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            difference, why = float("inf"), (str(error).splitlines() or [type(error).__name__])[0]
    if difference <= allowed:
        return SelfTest("packed", difference, "")
    scorer.use("padded")
    return SelfTest("padded", difference, why or f"log-probs differ by {difference:.3g} nats")


def tolerance(scorer: Scorer) -> float:
    """Of the narrowest dtype at work: a quantised base computes in bfloat16 whatever the log-probs are asked in."""
    return max(TOLERANCE[scorer.dtype], TOLERANCE[scorer.model.get_output_embeddings().weight.dtype])


def _check_repeats(scorer: Scorer, trees: Sequence[Tree]) -> None:
    """The same tokens twice: what is drawn anew each time, training can compare with nothing."""
    tree = next(t for t in trees if any(t.responses))
    packed = scorer.pack([Tree(tree.prompt_ids, [next(r for r in tree.responses if r)])])
    difference = (scorer(packed).logps - scorer(packed).logps).abs().max().item()
    if not difference <= tolerance(scorer):
        raise UserError(
            f"{type(scorer.model).__name__} gives other log-probs each time, {difference:.3g} nats apart: it draws"
            " something at random while it trains, as dropout does",
            "set what is random to 0 in the model's config.json: dropout, layerdrop, router jitter",
        )


def _check_head(scorer: Scorer, trees: Sequence[Tree]) -> None:
    """Our log-probs of a few tokens, in padded mode, against those of the model's own logits."""
    prompt, response = next((t.prompt_ids, r) for t in trees for r in t.responses if r)
    ids = [*prompt, *response][:HEAD_TOKENS]
    packed = scorer.pack([Tree(ids[:1], [ids[1:]])])
    row = torch.tensor([ids], device=scorer.device)
    ours = scorer(packed).logps  # first: FSDP2 wants to be begun from outside, and leaves embeddings and head gathered
    with torch.autocast(row.device.type, scorer.dtype, enabled=scorer.dtype != torch.float32):
        logits = scorer.model(row, use_cache=False).logits[0, :-1]
    own = logits.float().log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
    difference = (ours - own).abs().max().item()
    if not difference <= tolerance(scorer):
        raise UserError(
            f"{type(scorer.model).__name__} does something to its logits that training does not know: its log-probs "
            f"differ by {difference:.3g} nats from those of its hidden states and output embeddings",
            "train a model whose head is linear, scaled or soft-capped",
        )


@contextmanager
def _perturbed(model: Any) -> Iterator[None]:
    """Small parameters (norms, biases, adapters) moved a little, and put back to the bit."""
    generator = torch.Generator().manual_seed(0)
    small = [p for name, p in model.named_parameters() if p.dim() == 1 or "lora_" in name]
    kept = [p.detach().clone() for p in small]
    with torch.no_grad():
        for p in small:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device, p.dtype)
            p.add_(distributed.like(noise, p), alpha=0.05)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(small, kept, strict=True):
                p.copy_(old)


def _padded(body: Any, trees: Sequence[Tree], device: torch.device) -> Tensor:
    """Hidden states that predict each target, from one right-padded row per response."""
    rows = [(tree.prompt_ids, response) for tree in trees for response in tree.responses if response]
    rows = rows or [(trees[0].prompt_ids, [])]  # the model runs even where nothing is scored
    longest = max(len(prompt) + max(0, len(response) - 1) for prompt, response in rows)
    ids: list[list[int]] = []
    mask: list[list[int]] = []
    places: list[int] = []
    for number, (prompt, response) in enumerate(rows):
        fed = prompt + response[:-1]
        ids.append(fed + [0] * (longest - len(fed)))
        mask.append([1] * len(fed) + [0] * (longest - len(fed)))
        last = number * longest + len(prompt) - 1
        places += range(last, last + len(response))
    states: Tensor = body(
        torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device), use_cache=False
    ).last_hidden_state
    return states.flatten(0, 1).index_select(0, torch.tensor(places, dtype=torch.long, device=device))
