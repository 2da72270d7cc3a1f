"""The page as text: everything is there, everything a model wrote is text, and it is the same page each time."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfimprove.data import SHIPPED
from selfimprove.report import charts, evidence, samples
from selfimprove.report.charts import Mark
from selfimprove.report.evidence import Point
from tests import altered
from tests.conftest import QUICK, selfimprove
from tests.paths import ROOT
from tests.report.conftest import page_of
from tests.report.hostile import HUGE, MARKUP, republish
from tests.report.test_escape import Text

SECTIONS = ("scores", "matrix", "health", "audit", "training", "samples", "pairs", "flow", "cost", "provenance")
VOID = {"meta", "br", "use", "path", "rect"}


class Page(Text):
    """Text, tags, and whether every tag is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.crossed: list[str] = []

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        super().handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    @classmethod
    def of(cls, html: str) -> "Page":
        page = cls()
        page.feed(html)
        page.close()
        return page

    def all(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.tags if attribute in attributes]


@pytest.fixture(scope="module")
def whole(four_rounds):
    return page_of(four_rounds)


@pytest.fixture(scope="module")
def hostile_page(poisoned):
    return page_of(poisoned)


def test_the_page_is_well_formed_and_has_every_section(whole):
    page = Page.of(whole)
    assert page.crossed == []
    assert page.open == []
    ids = page.all("id")
    assert len(ids) == len(set(ids)), "an id stands twice"
    assert set(SECTIONS) <= set(ids)
    assert "gate" not in ids  # this run has none
    assert {target[1:] for target in page.all("href")} <= set(ids)
    assert set(page.all("aria-labelledby")) <= set(ids)


def test_headings_go_down_one_level_at_a_time(whole):
    levels = [int(tag[1]) for tag, _ in Page.of(whole).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_every_table_has_a_caption_and_heads_and_every_chart_says_what_it_shows(whole):
    page = Page.of(whole)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption")
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawn) >= 6
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in drawn)


def test_nothing_points_out_of_the_page(whole, hostile_page):
    for html in (whole, hostile_page):
        page = Page.of(html)
        assert {tag for tag, _ in page.tags} <= ALLOWED
        assert all(target.startswith("#") for target in page.all("href") + page.all("xlink:href"))
        assert page.all("src") == []
        assert [name for _, attributes in page.tags for name in attributes if name.startswith("on")] == []
        assert "url(" not in html[html.index("<style>") : html.index("</style>")]
        assert not [
            value for _, attributes in page.tags for value in attributes.values() if value and "tracker" in value
        ]


ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "h4", "h5", "p",
    "b", "i", "main", "section", "nav", "ol", "li", "a", "figure", "figcaption", "svg", "g", "path",
    "defs", "use", "clippath", "rect", "text", "div", "table", "caption", "thead", "tbody", "tr", "th", "td",
    "span", "small", "details", "summary", "dl", "dt", "dd", "ins", "del", "article", "br", "code", "pre",
    "footer",
}  # fmt: skip


def test_what_a_model_wrote_is_text(hostile_page):
    page = Page.of(hostile_page)
    assert page.crossed == []
    assert page.open == []
    assert MARKUP.strip() in page.text
    assert "{{ 7 * 191 }}" in page.text
    assert "‹ESC›[31mred" in page.text
    assert "‹RLO›evil" in page.text
    assert f"({len(HUGE) - samples.LONGEST:,} more characters)" in page.text
    assert not [c for c in hostile_page if c not in "\n\t" and not c.isprintable() and c != "\xa0"]
    assert len(hostile_page.encode()) < 5_000_000


def test_gates_of_every_kind_are_shown(hostile_page):
    text = Page.of(hostile_page).text
    for decision in ("promote", "keep", "roll back", "A plain reason."):
        assert decision in text


def test_the_page_is_the_same_each_time(four_rounds, whole):
    assert page_of(four_rounds) == whole


def test_what_is_not_shown_is_told(whole):
    text = " ".join(Page.of(whole).text.split())
    shown = re.findall(r"(\d+) of (\d+) shown", text)
    assert sum(int(some) for some, _ in shown) == samples.PROMPTS
    assert sum(int(every) for _, every in shown) == 60
    assert len(re.findall(r"Round \d, \d+ of \d+ pairs", text)) == 4


def test_dropped_rows_have_their_reasons(four_rounds, whole):
    paths = four_rounds.glob("iter-*/*/manifest.json")
    told = [json.loads(path.read_text())["rows"]["quarantined"] for path in paths]
    text = " ".join(Page.of(whole).text.split())
    assert any(told)
    for reason, times in [item for of in told for item in of.items()]:
        assert f"{times} {reason}" in text


def test_money_is_shown_where_a_server_was_asked(run_copy):
    directory = run_copy / "iter-002/3-label"
    told = json.loads((directory / "manifest.json").read_text())
    told["metrics"]["servers"] = {
        name: {"usd": usd, "unmeasured": 0} for name, usd in [("judge", 1.25), ("other", 0.5), ("own", 0.0)]
    }
    altered.write_manifest(directory, told)
    assert Page.of(page_of(run_copy)).text.count("$1.7500") == 2  # its round, and the sum
    told["metrics"]["servers"]["other"]["unmeasured"] = 3
    altered.write_manifest(directory, told)
    assert Page.of(page_of(run_copy)).text.count("at most $1.7500") == 2


@pytest.mark.parametrize("left", ["iter-001/3-label", "iter-001", "iter-000"])
def test_an_unfinished_run_has_a_page_too(run_copy, left):
    """Everything from some stage on is not there yet."""
    for path in sorted(run_copy.glob("iter-*/*")):
        if f"{path.parent.name}/{path.name}" >= left:
            shutil.rmtree(path)
    for link in ("best", "latest"):
        (run_copy / link).unlink()
    page = Page.of(page_of(run_copy))
    assert page.crossed == page.open == []
    assert "Not known yet" in page.text


def test_a_run_of_one_round_has_a_page(run_copy):
    for number in (2, 3, 4):
        shutil.rmtree(run_copy / f"iter-00{number}")
    page = Page.of(page_of(run_copy))
    assert "iteration 1" in page.text
    assert "not up to date" not in page.text.lower()


def test_a_stale_stage_is_named(run_copy):
    altered.change_recipe(run_copy, lambda told: told["train"]["optimizer"].update(learning_rate=0.5))
    assert "Not up to date, and shown all the same: iter-001/4-train" in " ".join(
        Page.of(page_of(run_copy)).text.split()
    )


def test_rows_are_found_in_any_shard_and_batch(tmp_path):
    for shard, first in enumerate((0, 9_000)):
        table = pa.table(
            {"n": list(range(first, first + 9_000)), "text": [str(k) for k in range(first, first + 9_000)]}
        )
        pq.write_table(table, tmp_path / f"rows-{shard:05d}.parquet")
    wanted = [17_999, 0, 8_999, 9_000, 0]
    assert evidence.rows_at(tmp_path, "rows", ("text",), wanted) == {k: {"text": str(k)} for k in wanted}
    assert evidence.rows_at(tmp_path, "rows", ("text",), []) == {}


def test_a_gated_run_says_what_was_decided(cut_data):
    """A gate of the program's own, and the selection split in no answer that is shown."""
    lines = SHIPPED["demo:selection"].read_text(encoding="utf-8").splitlines(keepends=True)[:30]
    Path("selection.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = (
        "stages=['generate', 'label', 'train', 'evaluate', 'gate']",
        "data.selection=selection.jsonl",
        "gate={}",
    )
    chosen = [part for setting in settings for part in ("--set", setting)]
    assert selfimprove("iterate", "spin", "--rounds", "2", "--run", "run", *QUICK, *chosen).code == 0
    page = Page.of(page_of(Path("runs/run")))
    text = " ".join(page.text.split())
    assert "gate" in page.all("id")
    for path in Path("runs/run").glob("iter-*/*-gate/gate.json"):
        told = json.loads(path.read_text())
        assert f"Round {int(path.parts[2][5:])}: {told['decision']}" in text
        assert all(reason in text for reason in told["reasons"])
    assert sum(int(every) for _, every in re.findall(r"(\d+) of (\d+) shown", text)) == 40
    own = text[text.index("The same prompts") : text.index("What training saw")]
    assert not [prompt for line in lines if (prompt := json.loads(line)["prompt"]) in own]
    best = json.loads(path.read_text())["best"]
    assert ("promoted no round" in text) == (best == 0)


def test_curves_bear_what_training_may_record():
    lines = {"loss": {1: [Point(1, 2.0), Point(2, None), Point(3, 1e9)], 2: [Point(1, -1e-7)], 3: [Point(1, None)]}}
    svg = charts.curve("x", lines)
    assert "round 1 from 2 to 1,000,000,000" in svg
    assert "nan" not in svg.lower()
    assert evidence.finite(float("nan")) is None
    assert evidence.finite(float("inf")) is None
    assert evidence.finite(True) == 1.0


def test_a_long_curve_is_averaged_not_cut():
    points = [Point(k, float(k)) for k in range(1, 1_001)]
    thin = evidence.thinned(points)
    assert len(thin) == evidence.MOST_POINTS
    assert (thin[0].value, thin[-1].step) == (5.5, 1_000)
    assert sum(p.value for p in thin) / len(thin) == sum(p.value for p in points) / len(points)


def test_charts_have_no_colour_of_their_own():
    """So that light and dark are the page's: every colour is a variable of it."""
    drawn = [
        charts.scores(
            "a", [Mark("base", 0.3, 0.2, 0.4, False), Mark("1", 0.5, 0.4, 0.6, False), Mark("c", 0.4, 0.3, 0.5, True)]
        ),
        charts.curve("b", {"x": {1: [Point(1, 1.0), Point(2, 2.0)]}, "y": {1: [Point(1, 1.0), Point(2, 2.0)]}}),
        charts.bars("c", {"1": {"train": 2.0}, "2": {"train": 1.0, "label": 1.0}}, ["train", "label"], "seconds"),
    ]
    css = (ROOT / "selfimprove/report/report.css").read_text()
    for svg in drawn:
        assert re.findall(r"#[0-9a-fA-F]{3,8}\b(?![\w-])", re.sub(r'(href="|url\()#[\w-]+', "", svg)) == []
        used = set(re.findall(r"var\((--[\w-]+)\)", svg))
        assert used
        assert all(css.count(f"{name}:") == 2 for name in used), "one for light and one for dark"


# --- size --------------------------------------------------------------------------------------------------------


def grown(run: Path, prompts: int) -> None:
    """Let every evaluation have this many prompts, with answers of 1,000 characters, and every round as many pairs."""
    for shard in sorted(run.glob("iter-*/*/*.parquet")):
        table = pq.read_table(shard)
        if shard.name.startswith(("samples", "pairs")):
            each = max(1, table.num_rows // 60)  # rows of a prompt
            table = table.slice(0, each * 60) if shard.name.startswith("samples") else table
            parts = []
            for copy in range(-(-prompts // (60 if shard.name.startswith("samples") else table.num_rows))):
                part = table
                for name in ("prompt_id", "text"):
                    if name in table.column_names:
                        place = table.column_names.index(name)
                        values = [
                            f"{v}-{copy}" if name == "prompt_id" else f"{v} {'word ' * 200}"
                            for v in table[name].to_pylist()
                        ]
                        part = part.set_column(place, name, pa.array(values))
                parts.append(part)
            pq.write_table(pa.concat_tables(parts), shard, compression="zstd", row_group_size=10_000)
            republish(shard.parent)


MEASURED = """
import resource, sys
from selfimprove.cli import main
sys.argv = ["selfimprove", "report", "four"]
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


def measured(run: Path) -> tuple[float, int]:
    """Seconds and peak MiB of the program."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED],
        cwd=run.parent.parent, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert Path(run / "report.html").stat().st_size < 5_000_000
    return time.perf_counter() - began, int(done.stderr.split()[-1])


def test_a_thousand_prompts_take_seconds_and_eight_thousand_no_more_memory(four_rounds, tmp_path):
    found = {}
    for prompts in (1_000, 8_000):
        run = tmp_path / str(prompts) / "runs" / "four"
        shutil.copytree(four_rounds, run, symlinks=True)
        grown(run, prompts)
        found[prompts] = measured(run)
    assert found[1_000][0] < 30
    assert found[8_000][1] - found[1_000][1] < 150, found  # MiB; the longer answers alone are 200 MiB


def test_the_command_writes_where_it_is_told_and_says_where(run_copy):
    assert selfimprove("report", "four").out.strip() == "runs/four/report.html"
    done = selfimprove("report", "four", "--out", "elsewhere.html")
    assert done.out.strip() == "elsewhere.html"
    assert Path("elsewhere.html").read_bytes() == (run_copy / "report.html").read_bytes()
