"""A pairwise ranker of the form of llm-blender/PairRM-hf: DeBERTa-v2 reads a prompt and two answers at once.

Architecture and names of the weights: `DebertaV2PairRM` in llm_blender/pair_ranker/pairrm.py of yuchenlin/LLM-Blender
(arXiv 2306.02561). The hidden states at the three prefix tokens are read off; a head of two layers scores (source;
candidate 1) and (source; candidate 2); the logit is the mean over tasks of the difference. Tokenisation and limits:
`tokenize_pair` of the model card of PairRM-hf, the same in rewardbench/models/pairrm.py of allenai/reward-bench.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from selfimprove import interrupts
from selfimprove.engine.batching import by_length
from selfimprove.engine.checkpoints import PREFIXES
from selfimprove.engine.protocol import Comparison
from selfimprove.errors import UserError

SOURCE, TOTAL = 1224, 2048  # tokens, [CLS], prefix and [SEP] included; what the source leaves is halved
CELLS = 1 << 22  # rows x length^2 of a batch; attention holds some matrices of this size per head
TOKENS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")


class Encoder(torch.nn.Module):
    """The network, under the names of its published weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.pretrained_model = transformers.DebertaV2Model(config)
        self.head_layer = torch.nn.Sequential(
            torch.nn.Dropout(config.drop_out),
            torch.nn.Linear(2 * size, size),
            torch.nn.Tanh(),
            torch.nn.Dropout(config.drop_out),
            torch.nn.Linear(size, config.n_tasks),
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The logits (rows,) that the first answer is better; `places` (rows, 3) says where the prefixes stand."""
        hidden = self.pretrained_model(ids, attention_mask=mask).last_hidden_state
        source, first, second = (hidden[torch.arange(len(ids)), places[:, k]].float() for k in range(3))
        scores = [self.head_layer(torch.cat([source, answer], -1)) for answer in (first, second)]
        logits: torch.Tensor = (scores[0] - scores[1]).mean(-1)
        return logits


class PairRanker:
    """See protocol.Ranker.

    Args:
        model: a directory that checkpoints.check_ranker lets pass.
        dtype: "float32" or "bfloat16"; the head is float32 always.

    Raises:
        UserError: weights of other names or shapes, or a tokenizer that does not know the prefixes.
    """

    def __init__(self, model: Path, dtype: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # AutoTokenizer of transformers 5 builds DeBERTa's anew, without the normalizer that its tokenizer.json names
        self.tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(model)
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        self.prefixes = [getattr(config, name) for name in PREFIXES]
        known = [self.tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
        if known != self.prefixes:
            raise UserError(
                f"ranker {model}: {' '.join(TOKENS)} are {known} to the tokenizer, {self.prefixes} to the config",
                "keep the tokenizer files that belong to the weights",
            )
        self._reserved = set(self.tokenizer.added_tokens_decoder) | set(self.tokenizer.all_special_ids)
        self._reserved -= {self.tokenizer.unk_token_id}
        self.model: Any = _load(Encoder(config), model).eval()
        self.model.pretrained_model.to(getattr(torch, dtype))

    def compare(
        self, rows: Sequence[tuple[str, str, str]], finished: Callable[[int, Comparison], None]
    ) -> list[Comparison]:
        """See protocol.Ranker."""
        self.model.to(self.device)
        encoded = [self._encode(*row) for row in rows]
        found = [Comparison(0.0, 0)] * len(rows)
        for batch in by_length([sum(map(len, parts)) for parts, _ in encoded], CELLS, lambda longest: longest**2):
            for i, logit in zip(batch, self._logits([encoded[i][0] for i in batch]), strict=True):
                found[i] = Comparison(logit, encoded[i][1])
                finished(i, found[i])
            interrupts.check()
        return found

    def sleep(self) -> None:
        """Leave the device; the weights wait in this process's memory."""
        if self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Forget the model."""
        self.model = None

    def _logits(self, batch: list[list[list[int]]]) -> list[float]:
        longest = max(sum(map(len, parts)) for parts in batch)
        ids = torch.full((len(batch), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, (source, first, second) in enumerate(batch):
            whole = [*source, *first, *second]
            ids[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = 1
        # each part is [CLS] prefix text [SEP]
        places = torch.tensor([[1, len(s) + 1, len(s) + len(f) + 1] for s, f, _ in batch])
        with torch.inference_mode():
            logits: list[float] = self.model(*(t.to(self.device) for t in (ids, mask, places))).tolist()
        return logits

    def _encode(self, source: str, first: str, second: str) -> tuple[list[list[int]], int]:
        """The three parts of a row, and how many tokens were cut off."""
        part, cut = self._part(0, source, SOURCE)
        room = (TOTAL - len(part)) // 2
        parts, cuts = [part], cut
        for k, answer in enumerate((first, second), 1):
            part, cut = self._part(k, answer, room)
            parts.append(part)
            cuts += cut
        return parts, cuts

    def _part(self, k: int, text: str, limit: int) -> tuple[list[int], int]:
        ids = [self.prefixes[k], *self._plain(k, text)]
        kept = ids[: limit - 2]
        return [self.tokenizer.cls_token_id, *kept, self.tokenizer.sep_token_id], len(ids) - len(kept)

    def _plain(self, k: int, text: str) -> list[int]:
        """Token ids of a text behind its prefix; what looks like a control token in it is spelled out."""
        given, encoded = self._tokens(TOKENS[k] + text)
        if encoded[0][0] == self.prefixes[k]:
            del encoded[0]
        else:  # a combining character has joined the prefix's last letter
            given, encoded = self._tokens(text)
        ids: list[int] = []
        for token, (start, end) in encoded:
            if token in self._reserved:
                for letter in given[start:end]:
                    ids += self.tokenizer.encode(letter, add_special_tokens=False)
            else:
                ids.append(token)
        return ids

    def _tokens(self, text: str) -> tuple[str, list[tuple[int, tuple[int, int]]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return text, list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _load(encoder: Encoder, model: Path) -> Encoder:
    from safetensors.torch import load_file

    index = model / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.is_file()
        else ["model.safetensors"]
    )
    weights = {name: tensor for file in names for name, tensor in load_file(model / file).items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".position_ids")}  # a constant
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"the weights of ranker {model} do not fit its config: {str(error).splitlines()[-1].strip()}",
            "keep config.json and the weights that belong together",
        ) from None
    return encoder
