"""`selfimprove compare`: its numbers against scipy and statsmodels, what it refuses, and hostile text."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from scipy import stats
from statsmodels.stats.multitest import multipletests

from selfimprove.records import Sample
from selfimprove.store import read_manifest, read_rows
from tests.altered import change_manifest, change_recipe, copied, decision, gated, resample, stage
from tests.conftest import selfimprove

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[31mred\x1b[0m [bold]markup[/] {{ 7 * 7 }}'


def scored(run: Path, iteration: int, probability: float, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    return resample(
        run, iteration, lambda rows: [replace(row, score=float(rng.random() < probability)) for row in rows]
    )


def means(rows: list[Sample], mode: str) -> dict[str, float]:
    return {
        prompt: float(np.mean([row.score for row in rows if row.mode == mode and row.prompt_id == prompt]))
        for prompt in dict.fromkeys(row.prompt_id for row in rows)
    }


def compared(*names: str) -> dict:
    result = selfimprove("compare", *names, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.fixture
def others(fake_run):
    """Two copies of the run `fake`: `better` by much in its last round, and `same` but for chance."""
    better, same = copied(fake_run, "better"), copied(fake_run, "same")
    for run, probability, seed in ((fake_run, 0.5, 1), (better, 0.9, 2), (same, 0.5, 3)):
        scored(run, 1, 0.3, 0)
        scored(run, 2, probability, seed)
    return fake_run, better, same


def test_the_numbers_are_those_of_scipy_and_statsmodels(others):
    told = compared("fake", "better", "same")
    rows = {run.name: read_rows(stage(run, 2, "evaluate"), "samples", Sample) for run in others}
    assert [(row["run"], row["rounds"], row["mode"]) for row in told["comparisons"]] == [
        (run, "final", mode) for run in ("better", "same") for mode in ("greedy", "sampled")
    ]  # best is final in all of them, and is told once
    for row in told["comparisons"]:
        old, new = means(rows["fake"], row["mode"]), means(rows[row["run"]], row["mode"])
        gaps = np.array([new[prompt] - old[prompt] for prompt in old])
        test = stats.ttest_1samp(gaps, 0.0)
        interval = test.confidence_interval(0.95)
        assert row["difference"] == pytest.approx(gaps.mean())
        assert row["ci95"] == pytest.approx([interval.low, interval.high])
        if row["mode"] == "greedy":
            won, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
            assert row["p"] == pytest.approx(stats.binomtest(won, won + lost).pvalue)
        else:
            assert row["p"] == pytest.approx(test.pvalue)
        assert (row["n"], row["left_out"], row["paired_by"]) == (len(old), 0, "id")
    by_holm = multipletests([row["p"] for row in told["comparisons"]], method="holm")[1]
    assert [row["p_holm"] for row in told["comparisons"]] == pytest.approx(list(by_holm))


def test_a_sentence_says_better_only_where_it_could_be_told(others):
    told = compared("fake", "better", "same")
    for row in told["comparisons"]:
        if row["run"] == "better":
            assert re.fullmatch(r"better by \.\d{3} \[\.\d{3}, \.\d{3}\]", row["sentence"]), row["sentence"]
        else:
            assert row["sentence"].startswith("no difference that could be told (")
            assert row["sentence"].endswith(f"the smallest would be {row['mde']:.3f}".replace("0.", ".", 1))
    turned = compared("better", "fake")
    ours = next(row for row in told["comparisons"] if (row["run"], row["mode"]) == ("better", "greedy"))
    theirs = next(row for row in turned["comparisons"] if row["mode"] == "greedy")
    assert theirs["difference"] == pytest.approx(-ours["difference"])
    assert theirs["sentence"] == ours["sentence"].replace("better", "worse")


def test_answers_of_the_selection_split_count_for_nothing(others):
    before = compared("fake", "better")

    def more(rows: list[Sample]) -> list[Sample]:
        wrong = [replace(row, split="selection", score=0.0) for row in rows]
        return [*rows, *wrong]

    resample(others[1], 2, more)
    assert compared("fake", "better")["comparisons"] == before["comparisons"]


def test_a_run_from_before_there_were_splits_is_read(others):
    import pyarrow.parquet as pq

    before = compared("fake", "better")
    shard = stage(others[1], 2, "evaluate") / "samples-00000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["split", "tokens"]), shard)
    change_manifest(shard.parent, lambda told: None)
    assert compared("fake", "better")["comparisons"] == before["comparisons"]


class TestOtherHeldOutPrompts:
    @staticmethod
    def renamed(run: Path, same: int) -> None:
        """Another held-out file: other ids, and only the first prompts of the same text."""

        def change(rows: list[Sample]) -> list[Sample]:
            number = {prompt: k for k, prompt in enumerate(dict.fromkeys(row.prompt_id for row in rows))}
            return [
                replace(
                    row,
                    prompt_id=f"other-{number[row.prompt_id]}",
                    prompt=row.prompt if number[row.prompt_id] < same else f"{row.prompt} Please.",
                )
                for row in rows
            ]

        for iteration in (1, 2):
            resample(run, iteration, change)
            change_manifest(
                stage(run, iteration, "evaluate"), lambda told: told["ingredients"]["inputs"].update(heldout="0" * 64)
            )

    def test_only_prompts_of_the_same_text_are_compared_and_their_number_is_told(self, others):
        self.renamed(others[1], 30)
        told = compared("fake", "better")
        total = told["runs"][0]["final"]["scores"]["greedy"]["n"]
        assert {(row["n"], row["paired_by"], row["left_out"]) for row in told["comparisons"]} == {
            (30, "text", 2 * (total - 30))
        }
        assert any("held-out file is another one" in note and "30 of them" in note for note in told["notes"])

    def test_none_shared_is_refused(self, others):
        self.renamed(others[1], 0)
        result = selfimprove("compare", "fake", "better")
        assert (result.code, result.out) == (1, "")
        assert "share 0 held-out prompts" in result.err
        assert "hint: data.heldout" in result.err


def test_runs_under_different_judges_are_refused(others):
    def change(told: dict) -> None:
        told["ingredients"]["section"]["judge"]["checker"] = "exact"

    change_manifest(stage(others[1], 2, "evaluate"), change)
    result = selfimprove("compare", "fake", "better")
    assert result.code == 1
    assert "scored by different judges" in result.err


def test_recipes_stand_side_by_side_where_they_differ(others):
    change_recipe(others[1], lambda told: told["train"]["loss"].update(beta=3.0))
    change_recipe(others[2], lambda told: told.update(seed=7))
    assert compared("fake", "better", "same")["recipes"] == {
        "seed": [0, 0, 7],
        "train.loss.beta": [2.0, 3.0, 2.0],
    }


class TestCost:
    def test_it_is_what_the_manifests_say(self, others):
        told = compared("fake", "better")["runs"][0]["cost"]
        manifests = [read_manifest(path.parent) for path in others[0].glob("iter-*/*/manifest.json")]
        assert told["total"]["tokens"] == sum(m.tokens for m in manifests)
        assert told["total"]["seconds"] == pytest.approx(sum(m.seconds for m in manifests))
        labels = [m for m in manifests if m.stage == "3-label"]
        assert told["stages"]["label"]["seconds"] == pytest.approx(sum(m.seconds for m in labels))
        assert told["total"]["usd"] is None

    @pytest.mark.parametrize(("price", "usd"), [(0.15, 0.75), (0.0, None)])
    def test_dollars_are_known_where_the_recipe_has_prices(self, others, price, usd):
        spent = {"usd": 0.75 if price else 0.0, "unmeasured": 2}
        server = {"url": "http://127.0.0.1:1/v1", "model": "m", "input_price": price}
        change_recipe(others[1], lambda told: told.update(servers={"judge": server}))
        change_manifest(stage(others[1], 1, "label"), lambda told: told["metrics"].update(servers={"judge": spent}))
        told = compared("fake", "better")["runs"][1]["cost"]
        assert told["stages"]["label"]["usd"] == told["total"]["usd"] == usd
        shown = selfimprove("compare", "fake", "better").out
        assert ("at most $0.7500" in " ".join(shown.split())) == (usd is not None)


def test_the_best_round_is_the_gates_where_there_is_one(others):
    gated(others[1], {1: decision("promote", 1, 1), 2: decision("keep", 1, 2)})
    told = compared("fake", "better")
    assert told["runs"][1]["best"]["iteration"] == 1
    assert told["runs"][1]["picked_by"] == "gate"
    assert [row["iteration"] for row in told["comparisons"]] == [2, 2, 1, 1]
    flattered = [note for note in told["notes"] if "flatters" in note]
    assert len(flattered) == 1
    assert flattered[0].startswith("fake:")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_inert_and_whole(others):
    change_recipe(others[1], lambda told: told["data"].update(corpus=HOSTILE))
    result = selfimprove("compare", "fake", "better", "--out", "page.html")
    assert result.code == 0, result.err
    page = Path("page.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert not {tag for tag, _ in tags.found} & {"script", "img", "iframe", "link", "object", "a"}
    assert not [a for _, names in tags.found for a in names if a.startswith("on") or a in ("src", "href")]
    assert "<script>alert(1)</script>" in tags.text
    assert "{{ 7 * 7 }}" in tags.text
    assert "://" not in page
    told = compared("fake", "better")
    for row in told["comparisons"]:
        assert row["sentence"] in tags.text
    assert "\x1b" not in page + result.out
    assert "[bold]markup[/]" in "".join(result.out.split())


@pytest.mark.parametrize("names", [["fake"], ["fake", "fake"]])
def test_it_takes_two_different_runs(fake_run, names):
    assert selfimprove("compare", *names).code == 2


def test_a_run_without_a_finished_round_is_refused(others):
    import shutil

    for iteration in (1, 2):
        shutil.rmtree(stage(others[1], iteration, "evaluate"))
    result = selfimprove("compare", "fake", "better")
    assert result.code == 1
    assert "no round of run 'better' is evaluated yet" in result.err
