"""report.html in a run: whole, of this state of the run, and with this state's numbers."""

from typing import NamedTuple

from selfimprove import __version__
from selfimprove.recipe import Recipe
from selfimprove.report import html, imprint
from selfimprove.store import Run

FILE = "report.html"


class Told(NamedTuple):
    """What is wrong, and what is no fault."""

    broken: list[str]
    notes: list[str]


def check(run: Run, chosen: Recipe) -> Told:
    """Hold the page against what `selfimprove report` writes of the run as it is."""
    path = run.path / FILE
    if path.is_symlink():
        return Told([f"{path} is a symbolic link"], [])
    if not path.exists():
        return Told([], [])
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return Told([f"{path} is damaged: {error.reason}"], [])
    told = imprint.read(text)
    if told is None:
        if imprint.GENERATOR in text:
            return Told([f"{path} was altered after it was written: its imprint is broken"], [])
        return Told([], [f"{path} does not say of which state of the run it is; selfimprove report writes it anew"])
    if told.altered:
        return Told([f"{path} was altered after it was written"], [])
    if told.fingerprint != imprint.fingerprint(run, chosen):
        return Told(
            [], [f"{path} is out of date: the run has changed since; selfimprove report {run.name} writes it anew"]
        )
    if told.version != __version__ or told.encoder:
        why = "with an encoder" if told.encoder else f"by version {told.version}"
        return Told([], [f"{path} was written {why}: its bytes were checked, its numbers not made again"])
    same = html.render(run, chosen) == text
    return Told([] if same else [f"{path} shows other numbers or texts than the run has"], [])
