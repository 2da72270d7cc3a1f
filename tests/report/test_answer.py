"""The sentence and the matrix: never better than the numbers allow, and the numbers are scipy's and statsmodels'."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from selfimprove import plan, recipe_file, store
from selfimprove.report import evidence
from selfimprove.report.answer import answer, as_comparison, compare, matrix
from selfimprove.report.evidence import Evaluation
from tests import altered


def evaluation(kind: str, number: int, scores: dict[str, float], base: dict[str, float] | None = None) -> Evaluation:
    """An evaluation as scores.json would have it."""
    label = {"base": "base", "control": "SFT control"}.get(kind, f"iteration {number}")
    values = list(scores.values())
    told = {"sampled": {"value": float(np.mean(values)), "ci95": [0.0, 1.0], "n": len(values)}}
    compared = {}
    if base is not None:
        c = compare(base, scores)
        compared = {
            "base": {
                "sampled": {"difference": c.difference, "ci95": [c.low, c.high], "p": c.p, "test": c.test, "n": c.n}
            }
        }
    return Evaluation(label, str(number), kind, number, Path(), told, compared, {"sampled": scores})


def drawn(rng: random.Random, n: int, share: float) -> dict[str, float]:
    return {f"p{k}": sum(rng.random() < share for _ in range(4)) / 4 for k in range(n)}


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(20, 200), st.floats(0.1, 0.9), st.floats(-0.1, 0.3))
def test_better_is_said_only_of_an_interval_above_zero(seed, n, share, gain):
    rng = random.Random(seed)
    before, after = drawn(rng, n, share), drawn(rng, n, min(0.99, max(0.01, share + gain)))
    told = answer([evaluation("base", 0, before), evaluation("round", 1, after, before)], None, None)
    differences = np.array([after[p] - before[p] for p in before])
    error = differences.std(ddof=1) / n**0.5
    low, high = stats.t.interval(0.95, n - 1, differences.mean(), error)
    if told.verdict == "better":
        assert low > 0
        assert told.sentence.startswith("Better:")
        assert differences.mean() >= 2.7 * error  # the minimum detectable effect
    elif told.verdict == "worse":
        assert high < 0
    elif told.verdict == "no difference shown":
        assert low <= 0
    assert ("Better:" in told.sentence) == (told.verdict == "better")


def test_the_sentence_says_by_how_much_and_how_sure():
    rng = random.Random(1)
    before, after = drawn(rng, 400, 0.3), drawn(rng, 400, 0.6)
    control = drawn(rng, 400, 0.8)
    found = [evaluation("base", 0, before), evaluation("round", 1, after, before), evaluation("control", 0, control)]
    told = answer(found, None, None)
    c = compare(before, after)
    for said in (f"{c.difference:.3f}"[1:], f"{c.low:.3f}"[1:], f"{c.high:.3f}"[1:], "400 prompts", "iteration 1"):
        assert f"{said}" in told.sentence
    assert any("The control" in text and "+." in text for text in told.beside)
    assert any(f"{c.mde:.3f}"[1:] in text for text in told.beside)


def test_what_a_gate_promoted_is_what_the_sentence_is_about():
    rng = random.Random(2)
    base = drawn(rng, 300, 0.3)
    found = [evaluation("base", 0, base)] + [
        evaluation("round", k, drawn(rng, 300, 0.3 + 0.1 * k), base) for k in (1, 2, 3)
    ]
    second = answer(found, "sampled", 2)
    assert "iteration 2" in second.sentence
    assert "The gate has promoted no round after iteration 2." in second.beside
    assert "iteration 3" in answer(found, None, None).sentence
    none = answer(found, "sampled", 0)
    assert (none.verdict, "promoted no round" in none.sentence) == ("no difference shown", True)
    assert answer(found[:1], None, None).verdict == "unknown"
    assert answer([], None, None).verdict == "unknown"


def test_the_detectable_effect_of_an_interval_is_that_of_the_rows():
    rng = random.Random(3)
    before, after = drawn(rng, 150, 0.4), drawn(rng, 150, 0.5)
    c = compare(before, after)
    told = {"difference": c.difference, "ci95": [c.low, c.high], "p": c.p, "test": c.test, "n": c.n}
    assert as_comparison(told).mde == pytest.approx(c.mde, rel=1e-9)


def test_the_matrix_is_that_of_statsmodels():
    rng = random.Random(4)
    those = [
        evaluation("round", k, {f"p{i}": float(rng.random() < 0.4 + 0.1 * k) for i in range(120)}) for k in range(4)
    ]
    found = matrix(those, "sampled")
    assert found.columns == ["0", "1", "2"]
    p = []
    for i, (_, cells) in enumerate(found.rows, 1):
        for j, cell in enumerate(cells):
            if j >= i:
                assert cell is None
                continue
            a, b = (np.array(list(those[k].by_prompt["sampled"].values())) for k in (j, i))
            table = [[((a == x) & (b == y)).sum() for y in (1, 0)] for x in (1, 0)]
            assert cell.comparison.p == pytest.approx(mcnemar(table, exact=True).pvalue)
            assert cell.comparison.difference == pytest.approx((b - a).mean())
            p.append((cell.comparison.p, cell.p_holm))
    corrected = multipletests([one for one, _ in p], method="holm")[1]
    assert [holm for _, holm in p] == pytest.approx(list(corrected))


def test_prompts_are_matched_by_name_not_by_place():
    before = {f"p{k}": float(k % 2) for k in range(50)}
    after = dict(reversed(before.items()))
    assert compare(before, after).difference == 0
    assert compare({"a": 1.0}, {"b": 1.0}) is None


def test_the_rows_give_the_scores_of_scores_json(four_rounds):
    run = store.Run(four_rounds)
    found = evidence.evaluations(run.path, plan.examine(run, recipe_file.load(run.recipe_file)))
    assert [one.short for one in found] == ["base", "1", "2", "3", "4", "control"]
    for one in found:
        told = json.loads((one.directory / "scores.json").read_text())
        for mode, values in one.by_prompt.items():
            assert np.mean(list(values.values())) == pytest.approx(told["scores"][mode]["value"])
        for mode, compared in told["comparisons"].get("base", {}).items():
            c = compare(found[0].by_prompt[mode], one.by_prompt[mode])
            assert [c.difference, c.low, c.high] == pytest.approx([compared["difference"], *compared["ci95"]])


def test_the_selection_split_is_in_no_number(run_copy):
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard = run_copy / "iter-001/5-evaluate/samples-00000.parquet"
    table = pq.read_table(shard)
    half = [k % 2 for k in range(table.num_rows)]
    split = pa.array(["selection" if k else "report" for k in half])
    wrong = pa.array([99.0 if k else s for k, s in zip(half, table["score"].to_pylist(), strict=True)])
    table = table.set_column(table.column_names.index("score"), "score", wrong)
    table = table.drop_columns(["split"]) if "split" in table.column_names else table
    pq.write_table(table.append_column("split", split), shard)
    altered.change_manifest(shard.parent, lambda told: None)
    values = evidence.per_prompt(shard.parent, "greedy").values()
    assert values
    assert max(values) <= 1
