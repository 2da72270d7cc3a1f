"""The report in real headless Chromium, from disk: no request, no complaint, charts drawn, hostile text inert.

Needs Debian's chromium and chromium-driver, which .ci/run installs.
"""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from selfimprove import recipe_file, store
from selfimprove.report import html
from tests.report.hostile import MARKUP

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


class Browser:
    """Chromium with what it logs."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, path: Path, width: int = 1100, scheme: str = "light", script: bool = True) -> None:
        """Open a file; forget what was logged before."""
        self.do("Emulation.setScriptExecutionDisabled", value=not script)
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.driver.get("about:blank")
        self.logs()
        self.driver.get(path.as_uri())

    def do(self, command: str, **parameters: object) -> dict:
        return self.driver.execute_cdp_cmd(command, parameters)

    def ask(self, script: str):
        return self.driver.execute_script(script)

    def logs(self) -> tuple[list[str], list[str]]:
        """The addresses asked for, and what the console says."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return asked, [entry["message"] for entry in self.driver.get_log("browser")]

    def picture(self) -> Image.Image:
        """The whole page."""
        size = self.do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.do("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return Image.open(io.BytesIO(base64.b64decode(shot["data"])))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.driver.quit()


def written(run: Path, path: Path) -> Path:
    opened = store.Run(run)
    path.write_text(html.render(opened, recipe_file.load(opened.recipe_file)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(four_rounds, tmp_path_factory) -> Path:
    return written(four_rounds, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def hostile(poisoned, tmp_path_factory) -> Path:
    return written(poisoned, tmp_path_factory.mktemp("page") / "hostile.html")


def test_nothing_is_asked_for_and_nothing_is_complained_of(browser, page, hostile):
    for path in (page, hostile):
        browser.open(path)
        assert browser.logs() == ([path.as_uri()], [])


OWNED = "return [window.owned, document.title, document.scripts.length, location.protocol]"


def test_hostile_text_does_nothing_even_without_the_policy(browser, hostile, tmp_path):
    """By escaping alone: the page's policy, which forbids scripts, is taken away."""
    open_page = tmp_path / "open.html"
    open_page.write_text(CSP.sub("", hostile.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    for path in (hostile, open_page):
        browser.open(path)
        browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
        browser.ask("document.querySelectorAll('*').forEach(e => e.dispatchEvent(new Event('mouseover')))")
        assert browser.ask(OWNED) == [None, "four: did it get better?", 0, "file:"]
        assert browser.logs() == ([path.as_uri()], [])
        assert MARKUP.strip() in browser.ask("return document.body.textContent")


STAYING = re.sub(r"<meta[^>]*>", "", MARKUP)  # the hostile markup without what leaves for another page


def test_the_hostile_text_would_do_something_unescaped(browser, tmp_path):
    """So that the test above can fail."""
    raw = tmp_path / "raw.html"
    raw.write_text(f"<!doctype html><title>raw</title>{STAYING}", encoding="utf-8")
    browser.open(raw)
    assert browser.ask("return [!!window.owned, document.title]") == [True, "owned"]
    asked, said = browser.logs()
    assert any("tracker.invalid" in address for address in asked)
    assert any("Failed to load resource" in text for text in said)


def test_the_policy_stops_what_escaping_would_miss(browser, page, tmp_path):
    """A second wall: markup that got into the page all the same would not run."""
    holed = tmp_path / "holed.html"
    holed.write_text(page.read_text(encoding="utf-8").replace("<main>", f"<main>{STAYING}"), encoding="utf-8")
    browser.open(holed)
    assert browser.ask(OWNED)[:2] == [None, "four: did it get better?"]
    _, said = browser.logs()
    assert any("script" in text and "Content Security Policy" in text for text in said)
    assert any("tracker.invalid" in text and "Content Security Policy" in text for text in said)
    assert not any("Failed to load resource" in text for text in said), "something was asked for"


DRAWN = """
return [...document.querySelectorAll("svg.chart")].map(svg => {
  const box = svg.getBoundingClientRect();
  const inked = [...svg.querySelectorAll("path, use, rect")].filter(e => {
    const style = getComputedStyle(e), at = e.getBoundingClientRect();
    return (/^rgb/.test(style.stroke) || /^rgb/.test(style.fill)) && at.width + at.height > 1;
  });
  const words = [...svg.querySelectorAll("text")].filter(e => e.getBoundingClientRect().width > 0);
  return {width: box.width, height: box.height, inked: inked.length, words: words.length, font: words.length &&
    parseFloat(getComputedStyle(words[0]).fontSize) * box.width / svg.viewBox.baseVal.width};
})"""


@pytest.mark.parametrize("width", [400, 1100])
def test_charts_are_drawn_and_can_be_read(browser, page, width):
    browser.open(page, width)
    charts = browser.ask(DRAWN)
    assert len(charts) >= 6
    for chart in charts:
        assert chart["width"] > 300
        assert chart["height"] > 150
        assert chart["inked"] >= 5
        assert chart["words"] >= 3
        assert chart["font"] >= 9, "CSS pixels"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_have_ink(browser, page, scheme):
    """Pixels of the first chart: paper, and marks that stand out from it."""
    browser.open(page, scheme=scheme)
    box = browser.ask(
        "const b = document.querySelector('svg.chart').getBoundingClientRect();"
        "return [b.x, b.y + scrollY, b.right, b.bottom + scrollY].map(Math.round)"
    )
    pixels = browser.picture().convert("L").crop(box)
    colours = pixels.getcolors()
    paper = max(colours)[1]
    assert (paper > 200) == (scheme == "light")
    assert sum(n for n, value in colours if abs(value - paper) > 60) > 500


WIDE = """
document.querySelectorAll("details").forEach(d => d.open = true);
const room = document.documentElement.clientWidth, scrolls = e => e && (
  e.matches(".scroll, pre") || scrolls(e.parentElement));
return [document.documentElement.scrollWidth, room, [...document.querySelectorAll("body *")].filter(e =>
  !scrolls(e) && !e.closest("svg") && e.getBoundingClientRect().right > room + 1).map(e => e.outerHTML.slice(0, 80))]"""


def test_a_phone_scrolls_no_page_sideways(browser, page, hostile):
    for path in (page, hostile):
        browser.open(path, 400)
        width, room, over = browser.ask(WIDE)
        assert over == []
        assert width <= room == 400


CONTRAST = """
const parse = c => c.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const over = (colours) => { for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
document.querySelectorAll("details").forEach(d => d.open = true);
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
while (walker.nextNode()) {
  const text = walker.currentNode, e = text.parentElement, style = getComputedStyle(e);
  if (!text.data.trim() || !e.getClientRects().length) continue;
  const under = [];
  for (let at = e; at; at = at.parentElement) under.unshift(getComputedStyle(at).backgroundColor);
  const back = over(["#fff", ...under]);
  const front = over([`rgb(${back})`, e.closest("svg") ? style.fill : style.color]);
  const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
  found.push([(a + .05) / (b + .05), e.outerHTML.slice(0, 90)]);
}
return [found.length, found.filter(([ratio]) => ratio < 4.5)]"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(browser, hostile, scheme):
    """WCAG's 4.5 to 1."""
    browser.open(hostile, scheme=scheme)
    texts, faint = browser.ask(CONTRAST)
    assert texts > 500
    assert faint == []


def test_the_page_looks_the_same_without_javascript(browser, page):
    browser.open(page)
    before = browser.picture()
    browser.open(page, script=False)
    after = browser.picture()
    browser.do("Emulation.setScriptExecutionDisabled", value=False)
    assert before.size == after.size
    assert before.tobytes() == after.tobytes()
    assert before.size[1] > 3_000


def test_it_prints_on_pages_of_its_own(browser, page):
    """A4: a handful of pages, none of them cut at the side, and no link list."""
    browser.open(page)
    pdf = base64.b64decode(browser.do("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
    assert pdf.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20
    browser.do("Emulation.setEmulatedMedia", media="print")
    assert browser.ask("return getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.do("Emulation.setEmulatedMedia", media="")
