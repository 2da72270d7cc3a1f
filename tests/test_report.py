"""Whatever a model wrote is shown as text, on the page and in the terminal."""

import dataclasses
from html.parser import HTMLParser

from selfimprove import recipe_file, records, store
from selfimprove.report import html
from tests.conftest import selfimprove

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> \x1b[31mred\x1b[0m [bold]markup[/] {{ 7 * 7 }}'


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def poison(run, iteration: str, name: str, record: type) -> None:
    directory = run / iteration
    rows = store.read_rows(directory, name, record)
    poisoned = [dataclasses.replace(row, text=HOSTILE) for row in rows]
    artifact = store.Artifact(directory.with_name("poison"))
    artifact.begin()
    artifact.write_rows(name, record, poisoned)
    artifact.path(f"{name}-00000.parquet").replace(directory / f"{name}-00000.parquet")
    artifact.discard()


def test_the_page_is_inert(fake_run):
    poison(fake_run, "iter-001/5-evaluate", "samples", records.Sample)
    run = store.Run(fake_run)
    page = html.render(run, recipe_file.load(run.recipe_file))
    tags = Tags()
    tags.feed(page)
    assert not {tag for tag, _ in tags.found} & {"script", "img", "iframe", "link", "object"}
    assert not [a for _, attributes in tags.found for a in attributes if a.startswith("on") or a in ("src", "href")]
    assert "&lt;script&gt;alert(1)" in page
    assert "49" not in page[page.index("&lt;script&gt;") :][:300]


def test_the_terminal_gets_no_escape_code_and_no_markup(fake_run):
    poison(fake_run, "iter-001/2-generate", "generations", records.Generation)
    shown = selfimprove("inspect", "fake", "1/generate", "--sample", "1").out
    assert "\x1b" not in shown
    assert "\\x1b[31mred" in shown
    assert "[bold]markup[/]" in shown
