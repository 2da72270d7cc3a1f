"""The fallback engine: plain transformers, greedy results equal to vLLM's, every row with a generator of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from selfimprove import interrupts
from selfimprove.engine.batching import by_length
from selfimprove.engine.checkpoints import SAFE
from selfimprove.engine.protocol import Completion, Finished, Options, Request, Sampling

LOGITS_BYTES = 256 << 20  # of a batch that is scored


class TransformersEngine:
    """Batched `generate` of transformers behind protocol.Engine."""

    def __init__(self, model: Path, options: Options) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._served: Path | None = None
        self.swap(model)

    def swap(self, model: Path) -> None:
        """See protocol.Engine."""
        if model != self._served:
            dtype = getattr(torch, self.options.dtype)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **SAFE)
            self.model = loaded.eval().to(self.device)
            # sampling is what the recipe says: a penalty in the model's own file would be merged into ours
            self.model.generation_config = transformers.GenerationConfig()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self._served = model

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished) -> list[list[Completion]]:
        """See protocol.Engine."""
        rows = [(i, r.prompt_token_ids, r.seed + k) for i, r in enumerate(requests) for k in range(r.n)]
        rows.sort(key=lambda row: len(row[1]))  # alike lengths share a batch: less padding
        completions: list[dict[int, Completion]] = [{} for _ in requests]  # by seed
        for start in range(0, len(rows), self.options.max_num_seqs):
            batch = rows[start : start + self.options.max_num_seqs]
            sampled = self._sample([ids for _, ids, _ in batch], [seed for *_, seed in batch], sampling)
            for (i, _, seed), completion in zip(batch, sampled, strict=True):
                completions[i][seed] = completion
                if len(completions[i]) == requests[i].n:
                    finished(i, _in_order(completions[i]))
            if start + len(batch) < len(rows):
                interrupts.check()
        return [_in_order(of) for of in completions]

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See protocol.Engine."""
        scored: list[list[float]] = [[] for _ in sequences]
        cells = LOGITS_BYTES // (4 * self.model.config.get_text_config().vocab_size)  # float32
        for batch in by_length([len(ids) for ids in sequences], cells):
            longest = max(len(sequences[i]) for i in batch)
            padded = [[*sequences[i], *[0] * (longest - len(sequences[i]))] for i in batch]
            ids = torch.tensor(padded, device=self.device)
            mask = torch.tensor([[k < len(sequences[i]) for k in range(longest)] for i in batch], device=self.device)
            with torch.inference_mode():
                logprobs = self.model(ids, attention_mask=mask.long()).logits[:, :-1].float().log_softmax(-1)
                found = logprobs.gather(-1, ids[:, 1:, None])[..., 0].tolist()
            for i, row in zip(batch, found, strict=True):
                scored[i] = row[: len(sequences[i]) - 1]
        return scored

    def sleep(self) -> None:
        """Leave the device."""
        if self.device.type == "cuda":
            self.model, self._served = None, None
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Forget the model."""
        self.model, self._served = None, None

    def _sample(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        chooser = _Chooser(sampling, seeds, self.device)
        config = transformers.GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            eos_token_id=sampling.stop_token_ids,
            pad_token_id=sampling.stop_token_ids[0],
            stop_strings=sampling.stop or None,
        )
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=transformers.LogitsProcessorList([chooser]),
                tokenizer=self.tokenizer if sampling.stop else None,
            )
        return [self._cut(row, chooser, i, sampling) for i, row in enumerate(output[:, longest:].tolist())]

    def _cut(self, row: list[int], chooser: "_Chooser", index: int, sampling: Sampling) -> Completion:
        """The row up to its end token, or to its stop string."""
        length, reason = len(row), "length"
        for position, token in enumerate(row):
            ended = token in sampling.stop_token_ids
            if not ended and sampling.stop:
                text = self.tokenizer.decode(row[: position + 1])
                ended = any(stop in text for stop in sampling.stop)
            if ended:
                length, reason = position + 1, "stop"
                break
        logprobs = [step[index].item() for step in chooser.logprobs[:length]]
        return Completion(row[:length], logprobs, "stop" if reason == "stop" else "length")


def _in_order(by_seed: dict[int, Completion]) -> list[Completion]:
    return [by_seed[seed] for seed in sorted(by_seed)]


class _Chooser(transformers.LogitsProcessor):
    """Draws each row's token with that row's own generator and leaves greedy decoding nothing to choose.

    The largest of (log-prob + Gumbel noise) is a sample of the distribution.
    """

    def __init__(self, sampling: Sampling, seeds: list[int], device: torch.device) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raw = scores.float().log_softmax(-1)  # (rows, vocab)
        noisy = raw
        if self.sampling.temperature > 0:
            noisy = self._top_p((raw / self.sampling.temperature).log_softmax(-1))
            noise = torch.empty_like(noisy)
            for row, generator in zip(noise, self.generators, strict=True):
                row.exponential_(generator=generator)
            noisy = noisy - noise.log()
        chosen = noisy.argmax(-1, keepdim=True)
        self.logprobs.append(raw.gather(-1, chosen)[:, 0].cpu())
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)

    def _top_p(self, logprobs: torch.Tensor) -> torch.Tensor:
        if self.sampling.top_p == 1:
            return logprobs
        ordered, index = logprobs.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= self.sampling.top_p)
        return logprobs.masked_fill(cut, -torch.inf)
