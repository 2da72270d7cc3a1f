"""A fake engine: the whole product runs without a model's forward pass. Deterministic and instant.

It plays a mediocre model of the embedded world: it writes prompts when asked to, answers them right about half of
the time, judges answers right three times of four, and echoes what it does not understand.
"""

import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfimprove import interrupts
from selfimprove.chat import Codec
from selfimprove.demo import world
from selfimprove.engine.protocol import Comparison, Completion, Finished, Request, Sampling
from selfimprove.store import model_identity

AT_ONCE = 64  # requests whose replies are encoded together


class FakeEngine:
    """See protocol.Engine; `model` gives only the tokenizer."""

    def __init__(self, model: Path) -> None:
        self._dice = random.Random()
        self.swap(model)

    def swap(self, model: Path) -> None:
        """Take the tokenizer of `model`, and its identity for `prompt_logprobs`."""
        import transformers

        self._identity = model_identity(model)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        self._codec = Codec(self.tokenizer)

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished) -> list[list[Completion]]:
        """See protocol.Engine."""
        completions: list[list[Completion]] = []
        for start in range(0, len(requests), AT_ONCE):
            interrupts.check()
            some = requests[start : start + AT_ONCE]
            texts = [text.strip() for text in self._codec.decode_many([r.prompt_token_ids for r in some])]
            replies = []
            for r, text in zip(some, texts, strict=True):
                for k in range(r.n):
                    self._dice.seed(r.seed + k)  # a generator anew would be seeded twice
                    replies.append(_reply(text, self._dice))
            made = (self._completion(ids, sampling) for ids in self._codec.encode_many(replies))
            for r in some:
                completions.append(list(itertools.islice(made, r.n)))
                finished(len(completions) - 1, completions[-1])
        return completions

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Noise of mean -1 nat, the same for the same sequence under the same weights: models differ in opinion."""
        dice = (random.Random(f"{self._identity}/{list(ids)}") for ids in sequences)
        return [[-2 * rng.random() for _ in ids[1:]] for rng, ids in zip(dice, sequences, strict=True)]

    def sleep(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to end."""

    def _completion(self, written: list[int], sampling: Sampling) -> Completion:
        ids = [*written[: sampling.max_tokens - 1], sampling.stop_token_ids[0]]
        return Completion(ids, [-1.0] * len(ids), "stop")


class FakeScorer:
    """See protocol.Scorer: noise that belongs to the model and the sequence."""

    def __init__(self, model: Path) -> None:
        self._identity = model_identity(model)

    def rewards(self, sequences: Sequence[Sequence[int]], finished: Callable[[int, float], None]) -> list[float]:
        """See protocol.Scorer."""
        found = [random.Random(f"{self._identity}/{list(ids)}").gauss(0, 1) for ids in sequences]
        for number, reward in enumerate(found):
            finished(number, reward)
        return found

    def sleep(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to end."""


class FakeRanker:
    """See protocol.Ranker: the difference of two noises, each of which belongs to its answer."""

    def __init__(self, model: Path) -> None:
        self._identity = model_identity(model)

    def compare(
        self, rows: Sequence[tuple[str, str, str]], finished: Callable[[int, Comparison], None]
    ) -> list[Comparison]:
        """See protocol.Ranker."""
        found = [Comparison(self._noise(prompt, a) - self._noise(prompt, b), 0) for prompt, a, b in rows]
        for number, comparison in enumerate(found):
            finished(number, comparison)
        return found

    def sleep(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to end."""

    def _noise(self, prompt: str, answer: str) -> float:
        return random.Random(f"{self._identity}/{prompt}/{answer}").gauss(0, 1)


def _reply(text: str, rng: random.Random) -> str:
    if re.search(r"using some of these keywords", text):
        task = world.draw(rng)
        return f"<question> {task.prompt} </question> <solution> {task.gold} </solution>"
    if shown := re.search(r"<question (?P<mark>\w+)>(.*?)</question (?P=mark)>", text, re.DOTALL):
        return _verdict(text, shown["mark"], shown[2].strip(), rng)
    if asked := re.search(r"Question: (.*) Answer:", text):
        text = asked[1]
    gold = world.answer(text)
    return gold if gold is not None and rng.random() < 0.5 else " ".join(text.split()[:4])


def _verdict(text: str, mark: str, question: str, rng: random.Random) -> str:
    """As prompts/judge ask for it."""
    answers = re.findall(rf"<answer (?:[AB] )?{mark}>(.*?)</answer (?:[AB] )?{mark}>", text, re.DOTALL)
    worth = [bool(world.check(question, answer.strip())) for answer in answers]
    if rng.random() < 0.25:
        worth = [not one for one in worth]
    if len(worth) == 2:
        return f"[[{'C' if worth[0] == worth[1] else 'A' if worth[0] else 'B'}]]"
    lowest, highest = (0, 100) if "to 100" in text else (1, 10) if "1 to 10" in text else (0, 5)
    return f"Score: {highest if worth[0] else lowest}"
