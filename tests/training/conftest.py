import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers

from selfimprove import recipe
from selfimprove.chat import Chat
from selfimprove.data import SHIPPED
from selfimprove.store import model_identity
from selfimprove.training.job import Job, PairRow, Weights

MODEL = SHIPPED["demo:model"]


def tiny(tied: bool = True, seed: int = 0) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def seeds():
    lines = Path(SHIPPED["demo:seeds"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def pairs(seeds) -> list[PairRow]:
    """24 pairs of the embedded default, two of each prompt: the gold against two other answers."""
    chat = Chat(MODEL)
    rows = seeds[:12]
    return [
        PairRow(
            f"{row['id']}/{k}",
            chat.prompt_ids(row["prompt"]),
            chat.completion_ids(row["prompt"], row["completion"]),
            chat.completion_ids(row["prompt"], rows[i - 1 - k]["completion"] + " and more"),
        )
        for i, row in enumerate(rows)
        for k in range(2)
    ]


def job(folder: Path, rows: list[PairRow], preference: dict | None = None, machine: dict | None = None, **optimizer):
    """A training of the embedded model; `preference` as in a recipe's [train]."""
    settings = recipe.Optimizer(**{"learning_rate": 1e-3, "epochs": 2, "batch_size": 8, **optimizer})
    start = Weights(MODEL, model_identity(MODEL))
    section = preference and recipe.Train.model_validate({"optimizer": settings, **preference})
    return Job(
        rows=rows,
        start=start,
        out=folder / "policy",
        metrics=folder / "metrics.jsonl",
        scratch=folder / "scratch",
        cache=folder / "cache",
        optimizer=settings,
        machine=recipe.Machine(**{"threads": 1, **(machine or {})}),
        seed=1,
        progress=lambda done, total: None,
        preference=section,
        references={"initial": start, "previous": start, "path": start},
        losses=folder / "losses-00000.parquet" if preference else None,
    )


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "policy").state_dict()


def losses(folder: Path) -> list[dict]:
    return pq.read_table(folder / "losses-00000.parquet").to_pylist()
