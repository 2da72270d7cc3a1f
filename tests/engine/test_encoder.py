"""A text encoder: its vectors are the model's own, whatever the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from selfimprove import data
from selfimprove.engine import encoder
from selfimprove.errors import UserError
from selfimprove.evaluation.diversity import mean_cosine
from tests.conftest import selfimprove

MODEL = data.SHIPPED["demo:model"]
TEXTS = ["melon shirt rope", "a", "", "reverse order: rope shirt melon. Use commas.", "melon shirt rope"] * 3


def test_a_vector_is_the_mean_of_the_last_hidden_states(monkeypatch):
    monkeypatch.setattr(encoder, "CHARACTERS", 60)
    found = encoder.Encoder(MODEL)(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text or " ", return_tensors="pt").input_ids
        with torch.inference_mode():
            expected = model(ids).last_hidden_state[0].mean(0).numpy()
        assert vector == pytest.approx(expected, abs=1e-4)
    assert mean_cosine(found[[0, 4]]) == pytest.approx(1, abs=1e-5)
    assert mean_cosine(found[:4]) < 0.999


def test_what_is_no_encoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="safetensors"):
        encoder.Encoder(tmp_path)
    np.save(tmp_path / "x.npy", np.zeros(1))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="does not load"):
        encoder.Encoder(tmp_path)


def test_the_report_tells_the_cosines(fake_run):
    without = Path(selfimprove("report", "fake").out.strip()).read_text()
    result = selfimprove("report", "fake", "--encoder", "demo:model")
    assert result.code == 0, result.err
    page = Path(result.out.strip()).read_text()

    unknown = "<dt>answers: mean cosine</dt>"  # stands among what could not be known
    assert unknown in without
    assert unknown not in page
    assert "answers: mean cosine" in page
