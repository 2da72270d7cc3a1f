"""The rows that stages exchange; their fields are the on-disk schema (see docs/artifacts.md).

Log-probabilities are natural logarithms (nats), one per completion token. Identifiers are structured:
`prompt_id` names the prompt, `(prompt_id, source, sample)` a completion, `pair_id` a pair.
"""

from typing import TypedDict

import msgspec


class Message(TypedDict):
    """One chat turn, in the conversational format of TRL and of chat templates."""

    role: str
    content: str


class Prompt(msgspec.Struct, frozen=True):
    """An instruction to answer. Example: Prompt("i1-p17", "Reverse: fox, pen.", "synthetic", 1, ["fox", "pen"])."""

    prompt_id: str
    text: str
    origin: str  # "seed" or "synthetic"
    iteration: int
    keywords: list[str]


class Generation(msgspec.Struct, frozen=True):
    """One completion, with its token ids exactly as sampled (the end token included when it was sampled)."""

    prompt_id: str
    prompt: str
    source: str  # "current" or "initial" policy, or "improver"
    sample: int
    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]  # of each token of `token_ids` under the model that sampled it
    finish_reason: str  # "stop" or "length"
    policy: str  # identity of the weights that sampled it
    seed: int


class Verdict(msgspec.Struct, frozen=True):
    """A judge's opinion of one completion; `score` None means unknown, never zero, and `reason` says why."""

    prompt_id: str
    source: str
    sample: int
    judge: str
    score: float | None
    reason: str
    reply: str = ""  # the judge's own words, where it has any


class Comparison(msgspec.Struct, frozen=True):
    """A judge's preference between two completions of a prompt, P(first is better), shown in both orders."""

    prompt_id: str
    first_source: str
    first_sample: int
    second_source: str
    second_sample: int
    judge: str
    forward: float | None
    swapped: float | None  # turned back: P(first is better) where the first was shown second
    reason: str
    forward_reply: str
    swapped_reply: str


class Pair(msgspec.Struct, frozen=True):
    """A preference; prompt, chosen, rejected are TRL's conversational columns, the token ids are what we train on."""

    pair_id: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    prompt_id: str
    iteration: int
    chosen_source: str  # "current", "initial", "improver", "gold" or "given"
    rejected_source: str
    chosen_score: float | None
    rejected_score: float | None
    prompt_token_ids: list[int]
    chosen_token_ids: list[int]
    rejected_token_ids: list[int]
    source: str = ""  # of the data, where the seeds name one


class Flip(msgspec.Struct, frozen=True):
    """A label that scores have turned over: what was chosen is now rejected."""

    pair_id: str
    prompt_id: str
    iteration: int  # in which it was turned over
    why: str  # "dynamic": the generated answer beats the anchor; "relabelled": an earlier pair, scored anew
    was_chosen: str  # source
    was_rejected: str
    was_chosen_score: float | None  # that turned it over
    was_rejected_score: float | None


class PairLoss(msgspec.Struct, frozen=True):
    """What a pair cost at one optimiser step; `margin` is its rewards/margins, scaled as in metrics.jsonl."""

    pair_id: str
    step: int  # as in metrics.jsonl
    epoch: float  # as there
    loss: float | None  # None where the loss sorts its pairs (AOT): its entries are no pair's own
    margin: float | None  # None where no pair of the step has a rejected answer


class Anchor(msgspec.Struct, frozen=True):
    """An answer of the first round that every round judges again, with its score of then."""

    prompt_id: str
    prompt: str
    source: str
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: str
    answer: str | None
    score: float | None


class Sample(msgspec.Struct, frozen=True):
    """One scored answer to a held-out prompt; `mode` is "greedy" or "sampled", `split` "report" or "selection"."""

    prompt_id: str
    prompt: str
    mode: str
    sample: int
    text: str
    finish_reason: str
    score: float | None
    reason: str
    split: str = "report"
    tokens: int = 0
    logps: float | None = None  # of the first sampled answer to each prompt, summed, in nats, under the policy ...
    initial_logps: float | None = None  # ... and under M_0


class Quarantined(msgspec.Struct, frozen=True):
    """A row that went in and did not come out, with the reason."""

    row_id: str
    reason: str  # a short fixed phrase, countable
    detail: str


class Seed(msgspec.Struct, frozen=True):
    """A seed prompt, as read from the seed file; `completion` is its gold answer, None where the file has none."""

    prompt_id: str
    prompt: str
    completion: str | None
    source: str = ""


class Given(msgspec.Struct, frozen=True):
    """A preference that was there before the run, as read from the file of pairs."""

    prompt_id: str  # of the pair: two pairs of one prompt have two
    prompt: str
    chosen: str
    rejected: str
    source: str = ""


class Gold(Seed, frozen=True):
    """A seed prompt that has its gold answer."""

    completion: str


class HeldOut(msgspec.Struct, frozen=True):
    """An evaluation prompt; `answer` is None where the checker derives it from the prompt."""

    prompt_id: str
    prompt: str
    answer: str | None
