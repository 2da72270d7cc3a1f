"""Build the demo's base model: a tiny Llama trained from scratch on the world's own text.

What it saw, and what it did not.  The first steps teach it to copy.  Up to three quarters of all steps it then
sees every task with right answers; the last quarter shows mixed behaviour (`habits.respond`), which hides much of the
ability without destroying it.  A few per cent of the text is raw prose, questions with their solutions in tags, and
revisions of an answer; these follow the same two phases, so the base knows the forms but is no reliable writer of
either.  No seed prompt and no held-out prompt is among the text, in any form.  The loss is over whole texts, prompts
included, though these count less.
"""

import random
import re
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from selfimprove.demo import data, habits
from selfimprove.demo.data import write_data
from selfimprove.demo.tokenizer import BEGIN, END, MAX_LENGTH, PAD, SPECIALS, build_tokenizer, save_tokenizer
from selfimprove.demo.world import DEMANDS, FAMILIES, KINDS, MAX_NUMBER, POSITIONS, TIMES, WORDS, Task, draw

__all__ = ["build", "write_data"]

STEPS = 2800
BATCH = 32
CLEAN_SHARE = 0.75  # of the steps, before the habits
COPYING_STEPS = 200  # at most, of the clean ones: mostly recitals, until the model can copy; tasks are learned on top
COPYING_RECITAL_SHARE = 0.7
PROSE_SHARE, RECITAL_SHARE, QUESTION_SHARE, REVISION_SHARE = 0.03, 0.03, 0.04, 0.03
PROMPT_WEIGHT = 0.1  # of a prompt token's loss: most of a prompt is chance, and its noise would drown the answers
LEARNING_RATE, WARMUP, FINAL_LEARNING_RATE = 2.5e-3, 100, 0.04
ASSISTANT = SPECIALS.index("<|assistant|>")  # its id
ROW = 256  # tokens in a row of a batch, at most

QUESTION_REQUEST = "Write one question using some of these keywords: {keywords}. Then give its solution."
QUESTION = "<question> {prompt} </question> <solution> {answer} </solution>"
REVISION_REQUEST = "Improve this answer. Question: {prompt} Answer: {response}"
_STOP_WORDS = "a an and are by each from how in is just of only the these this to what which with"


def _chat(user: str, assistant: str) -> str:
    return f"{BEGIN}<|user|>{user}{END}<|assistant|>{assistant}{END}"


def _respond_right(task: Task, _: random.Random) -> str:
    return task.gold


def _keywords(prompt: str, rng: random.Random) -> str:
    words = sorted(set(re.findall(r"\w+", prompt)) - set(_STOP_WORDS.split()))
    return ", ".join([*rng.sample(words, 2), rng.choice(WORDS)])


@dataclass
class Batch:
    """Texts side by side in rows, so that little is padding."""

    ids: torch.Tensor  # [rows, length]
    texts: torch.Tensor  # which text a token belongs to; 0 is padding
    weights: torch.Tensor  # of a token's loss

    @classmethod
    def pack(cls, texts: list[list[int]]) -> "Batch":
        """Fill rows with texts in the order given."""
        rows: list[list[tuple[int, int, float]]] = [[]]
        for number, ids in enumerate(texts, 1):
            if len(rows[-1]) + len(ids) > ROW:
                rows.append([])
            start = ids.index(ASSISTANT) + 1 if ASSISTANT in ids else 1
            weights = [0.0] + [PROMPT_WEIGHT] * (start - 1) + [1.0] * (len(ids) - start)
            rows[-1] += [(id_, number, weight) for id_, weight in zip(ids, weights, strict=True)]
        longest = max(map(len, rows))
        cells = torch.tensor([row + [(0, 0, 0.0)] * (longest - len(row)) for row in rows], dtype=torch.float64)
        return cls(cells[..., 0].long(), cells[..., 1].long(), cells[..., 2].float())

    @property
    def mask(self) -> torch.Tensor:
        """Causal attention within each text, [rows, 1, length, length]."""
        return (self.texts[:, :, None] == self.texts[:, None, :]).tril()[:, None]


class _Texts:
    """The pre-training text, drawn at random."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"pre-training {seed}")
        self.prose = data.paragraphs()
        self.hidden: AbstractSet[str] = {task.prompt for task in data.seeds() + data.heldout()}

    def _draw(self) -> Task:
        while (task := draw(self.rng)).prompt in self.hidden:
            pass
        return task

    def _recital(self) -> str:
        """Words said again and again, as songs and tables do: what teaches a small model to copy."""
        words = " ".join(self.rng.sample(WORDS, self.rng.randint(4, 12)))
        return f"{words}. {words}. {words}."

    def one(self, clean: bool, recital_share: float) -> str:
        rng, kind = self.rng, self.rng.random()
        respond = _respond_right if clean else habits.respond
        if kind < PROSE_SHARE:
            return f"{BEGIN}{rng.choice(self.prose)}{END}"
        kind -= PROSE_SHARE
        if kind < recital_share:
            return f"{BEGIN}{self._recital()}{END}"
        kind -= recital_share
        task = self._draw()
        response = respond(task, rng)
        if kind < QUESTION_SHARE:
            request = QUESTION_REQUEST.format(keywords=_keywords(task.prompt, rng))
            return _chat(request, QUESTION.format(prompt=task.prompt, answer=response))
        if kind < QUESTION_SHARE + REVISION_SHARE:
            request = REVISION_REQUEST.format(prompt=task.prompt, response=habits.respond(task, rng))
            return _chat(request, response)
        return _chat(task.prompt, response)

    def batches(self, steps: int, tokenizer: Tokenizer) -> Iterator[Batch]:
        """The phases in order."""
        copying, clean = min(COPYING_STEPS, steps // 4), round(steps * CLEAN_SHARE)
        for step in range(steps):
            recital_share = COPYING_RECITAL_SHARE if step < copying else RECITAL_SHARE
            texts = [self.one(step < clean, recital_share) for _ in range(BATCH)]
            yield Batch.pack([e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)])


def _vocabulary_texts() -> list[str]:
    """Texts that hold every word that the world, its habits, its prose and the pipeline's requests use."""
    texts = [*WORDS, *KINDS, *POSITIONS, *TIMES, "before after largest smallest start end"]
    texts += [str(number) for number in range(2 * MAX_NUMBER + 1)]
    texts += [re.sub(r"\{\w+\}", "", phrasing) for family in FAMILIES for phrasing in family.phrasings]
    texts += [demand.text for demand in DEMANDS]
    texts += [*habits.CHATTER, *habits.REFUSALS, *data.paragraphs()]
    texts += [re.sub(r"\{\w+\}|</?\w+>", "", text) for text in (QUESTION_REQUEST, QUESTION, REVISION_REQUEST)]
    return texts


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread and a seeded generator inside; the caller's threads and generator as they were afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    begin, end, pad = (tokenizer.token_to_id(token) for token in (BEGIN, END, PAD))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        # texts are short: short wavelengths let a head find the word before, and so copy, sooner
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=64, bos_token_id=begin, eos_token_id=end, pad_token_id=pad
    )
    return model


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_LEARNING_RATE of the peak."""
    warmup = min(WARMUP, steps)
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    fall = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup))).item())
    return LEARNING_RATE * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * fall)


def _loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
    losses: torch.Tensor = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
    )
    weights = batch.weights[:, 1:].flatten()
    return losses.dot(weights) / weights.sum()


class _Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps; matrices of one shape are stepped together.

    torch.optim.Muon does the same in bfloat16, which is slow on many CPUs.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr})
        self.momentum = momentum
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        self.stacks = [[m for m in matrices if tuple(m.shape) == shape] for shape in shapes]
        self.averages = [torch.zeros(len(stack), *stack[0].shape) for stack in self.stacks]

    @torch.no_grad()
    def step(self, _: None = None) -> None:  # type: ignore[override]
        for stack, average in zip(self.stacks, self.averages, strict=True):
            gradient = torch.stack([matrix.grad for matrix in stack if matrix.grad is not None])
            average.lerp_(gradient, 1 - self.momentum)
            direction = _orthogonal(gradient.lerp(average, self.momentum))
            # 0.2 sqrt(longer side): steps as long as those of Adam, so both take the same rate
            rate = self.param_groups[0]["lr"] * 0.2 * max(stack[0].shape) ** 0.5
            for matrix, update in zip(stack, direction, strict=True):
                matrix.sub_(update, alpha=rate)


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices."""
    x: torch.Tensor = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        _Muon(matrices, lr=LEARNING_RATE),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _train(
    model: LlamaForCausalLM, batches: Iterator[Batch], steps: int, progress: Callable[[int, int, float], None]
) -> None:
    optimizers = _optimizers(model)
    model.train()
    for step, batch in enumerate(batches):
        loss = _loss(model, batch)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps)
            optimizer.step()
        progress(step + 1, steps, loss.item())


def build(
    out: Path,
    *,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    steps: int | None = None,
) -> None:
    """Train the base model and write it with its tokeniser to `out`; same seed, same bytes on one machine.

    `progress` is called after every step with (step, steps, loss).
    """
    out.mkdir(parents=True, exist_ok=True)
    steps = STEPS if steps is None else steps
    tokenizer = build_tokenizer(_vocabulary_texts())
    with _reproducible(seed):
        model = _new_model(tokenizer)
        batches = _Texts(seed).batches(steps, tokenizer)
        _train(model, batches, steps, progress or (lambda *_: None))
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
