"""What every pair cost at every step, against the steps' own figures."""

import json
import math
from collections import defaultdict

import pytest

from selfimprove.training import launch
from selfimprove.training.pair_losses import ByPair, PairLosses, cut
from tests.training.conftest import job, lines, losses

DPO = {"loss": {"name": "dpo", "beta": 0.1}, "reference": "previous"}
KTO = {"loss": {"name": "kto", "beta": 0.1}, "reference": "initial"}
MIX = {"loss": [{"name": "dpo", "weight": 0.5}, {"name": "kto", "weight": 0.5}], "reference": "initial"}


def trained(folder, rows, preference, **machine):
    folder.mkdir(exist_ok=True)
    launch.train(job(folder, rows, preference, machine))
    return losses(folder)


@pytest.mark.parametrize("preference", [DPO, KTO, MIX], ids=["one entry a pair", "two entries a pair", "a mix"])
@pytest.mark.parametrize("tokens", [16_384, 60], ids=["one micro-batch", "several"])
def test_they_are_the_parts_of_each_step(tmp_path, pairs, preference, tokens):
    rows = trained(tmp_path, pairs, preference, train_tokens=tokens)
    steps = defaultdict(list)
    for row in rows:
        steps[row["step"]].append(row)
    told = lines(tmp_path)
    assert list(steps) == [line["step"] for line in told]
    for line in told:
        own = steps[line["step"]]
        assert sum(row["loss"] for row in own) / len(own) == pytest.approx(line["loss"], rel=1e-9)
        assert sum(row["margin"] for row in own) / len(own) == pytest.approx(
            line["rewards/margins"], rel=1e-9, abs=1e-12
        )
        assert {row["epoch"] for row in own} == {line["epoch"]}
    for epoch in (range(1, 4), range(4, 7)):  # each pair once an epoch
        assert sorted(r["pair_id"] for s in epoch for r in steps[s]) == sorted(pair.pair_id for pair in pairs)


def test_a_pairs_loss_is_the_formula_of_its_own_margin(tmp_path, pairs):
    rows = trained(tmp_path, pairs, DPO, train_tokens=60)
    assert len({row["margin"] for row in rows}) > len(rows) / 2
    for row in rows:  # arXiv 2305.18290, equation 7; rewards/margins has the beta in it
        assert row["loss"] == pytest.approx(math.log1p(math.exp(-row["margin"])), rel=1e-9)


def test_a_loss_that_sorts_its_pairs_is_no_pairs_own(tmp_path, pairs):
    rows = trained(tmp_path, pairs, {"loss": {"name": "aot"}, "reference": "initial"})
    assert {row["loss"] for row in rows} == {None}
    assert rows[-1]["margin"] != 0


def test_supervised_fine_tuning_has_none(tmp_path, pairs):
    launch.train(job(tmp_path, pairs))
    assert not list(tmp_path.glob("losses*"))


def test_lines_after_the_checkpoint_go_and_a_torn_one_too(tmp_path):
    path = tmp_path / "lines"
    path.write_text("1\n2\n3\n4")
    assert cut(path, 2) == 2
    assert path.read_text() == "1\n2\n"
    assert cut(path, 0) == 0
    assert path.read_text() == ""
    path.write_text("1\n2")
    assert cut(path, 2) == 1  # the second is torn


def test_without_the_lines_of_the_first_steps_there_is_no_table(tmp_path, pairs):
    kept = PairLosses(tmp_path / "lines", tmp_path / "losses-00000.parquet", steps=1)
    kept.write(2, 0.5, pairs[:1], ByPair([0.1], [0.2]))
    kept.publish()
    assert not (tmp_path / "losses-00000.parquet").exists()


def test_it_is_written_in_groups_of_rows(tmp_path, pairs, monkeypatch):
    monkeypatch.setattr("selfimprove.training.pair_losses.GROUP", 5)
    kept = PairLosses(tmp_path / "lines", tmp_path / "losses-00000.parquet", steps=0)
    for step in range(1, 8):
        kept.write(step, step / 7, pairs[:2], ByPair([0.1 * step, None], [1e-300, -0.0]))
    kept.publish()
    rows = losses(tmp_path)
    assert [(r["step"], r["loss"], r["margin"]) for r in rows] == [
        row for step in range(1, 8) for row in ((step, 0.1 * step, 1e-300), (step, None, -0.0))
    ]
    assert json.loads((tmp_path / "lines").read_text().splitlines()[0])[0] == 1
