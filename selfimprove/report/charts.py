"""Charts as inline SVG, drawn by matplotlib: text stays text, colours are CSS variables of the page, no byte varies.

Every chart is small enough to be read unscaled on a phone; the page sets them side by side where there is room.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup, escape

from selfimprove.report.evidence import Point
from selfimprove.report.figures import number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, DIM, RULE, BAND = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#110001", "#110002", "#110003", "#110004", "#110005", "#110006", "#110007", "#110008")
VARIABLES = {INK: "--ink", DIM: "--dim", RULE: "--rule", BAND: "--band"} | {
    colour: f"--series-{k}" for k, colour in enumerate(SERIES, 1)
}
WIDTH, HEIGHT = 360, 220  # points of the SVG, which the page shows as CSS pixels or a little larger
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "selfimprove", "text.parse_math": False, "font.size": 10.5,
    "axes.formatter.useoffset": False,
    "axes.edgecolor": RULE, "axes.labelcolor": DIM, "axes.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.unicode_minus": True, "text.color": INK, "xtick.color": RULE, "ytick.color": RULE,
    "xtick.labelcolor": DIM, "ytick.labelcolor": DIM, "figure.facecolor": "none", "axes.facecolor": "none",
    "lines.linewidth": 1.5, "savefig.facecolor": "none",
}  # fmt: skip


class Mark(NamedTuple):
    """A score with its interval; `alone` stands apart from the sequence of rounds."""

    label: str
    value: float
    low: float
    high: float
    alone: bool


def scores(name: str, marks: Sequence[Mark]) -> Markup:
    """Scores in order with their 95 % intervals; the first one's height goes on as a line to compare with."""

    def draw(axes: "Axes") -> None:
        row = [k for k, mark in enumerate(marks) if not mark.alone]
        axes.axhline(marks[0].value, color=DIM, linewidth=0.9, dashes=(4, 3))
        axes.plot(row, [marks[k].value for k in row], color=SERIES[0], linewidth=1.2, alpha=0.55)
        for k, mark in enumerate(marks):
            at = k + 0.5 * mark.alone
            style = {"color": SERIES[1 if mark.alone else 0], "marker": "D" if mark.alone else "o"}
            spread = [[mark.value - mark.low], [mark.high - mark.value]]
            axes.errorbar([at], [mark.value], yerr=spread, markersize=5.5, capsize=3.5, elinewidth=1.3, **style)  # type: ignore[arg-type]
        places = [k + 0.5 * mark.alone for k, mark in enumerate(marks)]
        shown = _some(list(range(len(marks))), 8)
        axes.set_xticks([places[k] for k in shown], [marks[k].label for k in shown])
        axes.set_xlim(-0.4, places[-1] + 0.4)
        axes.yaxis.set_major_formatter(lambda value, _: number(value, 2))

    told = "; ".join(f"{m.label} {number(m.value)}, 95 % interval {number(m.low)} to {number(m.high)}" for m in marks)
    return _svg(name, draw, f"Scores with intervals. {told}.")


def curve(name: str, lines: Mapping[str, Mapping[int, Sequence[Point]]]) -> Markup:
    """Metrics of training over the steps of all rounds, one round after another."""
    rounds = sorted({k for line in lines.values() for k in line})

    def draw(axes: "Axes") -> None:
        start, middles = 0.0, []
        for position, k in enumerate(rounds):
            length = max(line[k][-1].step for line in lines.values() if line.get(k))
            if position % 2:
                axes.axvspan(start, start + length, color=BAND, linewidth=0)
            middles.append(start + length / 2)
            for colour, line in zip(SERIES, lines.values(), strict=False):
                known = [p for p in line.get(k, []) if p.value is not None]
                steps, values = [start + p.step for p in known], [p.value for p in known]
                axes.plot(steps, values, color=colour, marker="o" if len(known) == 1 else "")  # type: ignore[arg-type]
            start += length
        shown = _some(list(range(len(rounds))), 10)
        axes.set_xticks([middles[k] for k in shown], [str(rounds[k]) for k in shown])
        axes.set_xlim(0, start)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("round", labelpad=1)

    return _svg(name, draw, "Lines over the steps of training. " + " ".join(map(_in_words, lines, lines.values())))


def _in_words(metric: str, line: Mapping[int, Sequence[Point]]) -> str:
    known = {k: [p.value for p in points if p.value is not None] for k, points in line.items()}
    told = "; ".join(f"round {k} from {plain(v[0])} to {plain(v[-1])}" for k, v in known.items() if v)
    return f"{metric}: {told}."


def bars(name: str, rows: Mapping[str, Mapping[str, float]], parts: Sequence[str], unit: str) -> Markup:
    """A stacked bar for each row; its parts in the order of `parts`."""

    def draw(axes: "Axes") -> None:
        left = dict.fromkeys(rows, 0.0)
        for k, part in enumerate(parts):
            values = [rows[row].get(part, 0.0) for row in rows]
            colour = SERIES[k % len(SERIES)]
            axes.barh(range(len(rows)), values, left=list(left.values()), height=0.62, color=colour, linewidth=0)
            left = {row: left[row] + value for row, value in zip(rows, values, strict=True)}
        shown = _some(list(range(len(rows))), 12)
        axes.set_yticks(shown, [list(rows)[k] for k in shown])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(unit, labelpad=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")

    told = "; ".join(f"{row} {plain(sum(of.values()))}" for row, of in rows.items())
    return _svg(name, draw, f"Stacked bars, {unit}. {told}.", grid="x")


def _some(of: list[int], most: int) -> list[int]:
    """At most that many of them, the first and the last among them."""
    if len(of) <= most:
        return of
    return sorted({of[round(k * (len(of) - 1) / (most - 1))] for k in range(most)})


def _svg(name: str, draw: "Callable[[Axes], None]", told: str, grid: str = "y") -> Markup:
    """Draw on new axes; what it is in words goes where screen readers look."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis=grid, color=RULE, linewidth=0.6)  # type: ignore[arg-type]
        axes.set_axisbelow(True)
        draw(axes)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return Markup(_inlined(file.getvalue(), name, told))


def _inlined(text: str, name: str, told: str) -> str:
    """A file of SVG as a piece of HTML: no header, no metadata, no style of its own, ids that no other chart has."""
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:)?href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r" font-family: [^;]*;", "", text)  # the page's own
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    opening = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(told)}">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
