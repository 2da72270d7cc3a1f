"""One self-contained HTML page about a run: nothing is fetched, nothing runs, whatever a model wrote is text.

Every value that the template prints goes through `shown`; only what this package made itself is let through as markup.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from selfimprove import facts, plan, status
from selfimprove.evaluation.health import panel
from selfimprove.plan import Examined
from selfimprove.recipe import Recipe
from selfimprove.recipe_file import dump
from selfimprove.report import charts, evidence, figures, imprint, samples, tables
from selfimprove.report.answer import answer, matrix
from selfimprove.report.charts import Mark
from selfimprove.report.diff import Piece
from selfimprove.report.escape import LONGEST, left_out, markup
from selfimprove.report.evidence import Evaluation
from selfimprove.store import Run

HERE = Path(__file__).parent
CURVES = {  # figure: its metrics, and what to see in it
    "loss": (("loss",), "What training minimises."),
    "margins": (("rewards/margins",), "Reward of the chosen answer less that of the rejected one."),
    "accuracies": (("rewards/accuracies",), "Share of pairs whose chosen answer has the larger reward."),
    "changes": (
        ("logps/chosen_change", "logps/rejected_change"),
        "Log-probability against the reference, nats. A chosen answer that falls with the rejected one is displaced.",
    ),
    "gradient": (("grad_norm",), "Norm of the gradient before clipping."),
}


def render(run: Run, recipe: Recipe, encode: facts.Encode | None = None) -> str:
    """The page; an encoder of texts measures how alike prompts and answers are in meaning."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=shown
    )
    for name in ("number", "signed", "p_value", "plain", "short", "count", "seconds", "usd"):
        environment.filters[name] = getattr(figures, name)
    environment.filters |= {"cut": cut, "mark": samples.mark, "pieces": pieces}
    template = environment.from_string((HERE / "report.html.jinja").read_text(encoding="utf-8"))
    return imprint.stamp(template.render(content(run, recipe, encode)), run, recipe, encode is not None)


def content(run: Run, recipe: Recipe, encode: facts.Encode | None = None) -> dict[str, Any]:
    """What the template is given."""
    examined = plan.examine(run, recipe)
    found = evidence.evaluations(run.path, examined)
    gates = evidence.in_rounds(run.path, "gate.json")
    audits = evidence.in_rounds(run.path, "audit.json")
    modes = list(found[0].scores) if found else []
    costs = tables.costs(examined, recipe)
    primary = next((told["primary"]["metric"] for told in gates.values()), None)
    promoted = gates[max(gates)]["best"] if gates else None
    return {
        "css": Markup((HERE / "report.css").read_text(encoding="utf-8")),  # ours
        "run": run.name,
        "recipe": recipe,
        "state": state(run, recipe, examined),
        "answer": answer(found, primary, promoted),
        "modes": modes,
        "evaluations": found,
        "best": _best(run),
        "benchmarks": list(dict.fromkeys(name for one in found for name in one.benchmarks)),
        "score_charts": {mode: charts.scores(f"scores-{mode}", _marks(found, mode)) for mode in modes},
        "matrices": {mode: told for mode in modes if (told := matrix(found, mode))},
        "gates": gates,
        "health": panel(facts.gather(run, recipe, encode)),
        "audit_rounds": list(audits),
        "audit": tables.audit(audits),
        "judges": tables.judges(audits),
        "curves": curves(run.path, examined),
        "flow": tables.flow(examined),
        "costs": costs,
        "cost_chart": _cost_chart(costs),
        "groups": samples.answers(found),
        "pairs": samples.pairs(run.path, examined),
        "longest": samples.LONGEST,
        "provenance": tables.provenance(run, recipe, examined),
        "recipe_text": markup(dump(recipe)),
    }


def state(run: Run, recipe: Recipe, examined: Sequence[Examined]) -> dict[str, Any]:
    """How far the run is: its state, what stopped it, what is not up to date."""
    told = status.summary(run, recipe)
    stale = [one.step.directory for one in examined if one.manifest and one.status == "stale"]
    done = sum(one.status == "done" for one in examined)
    return {"state": told["state"], "error": told["error"], "stale": stale, "done": done, "stages": len(examined)}


def _best(run: Run) -> int | None:
    link = run.path / "best"
    return int(link.readlink().name.removeprefix("iter-")) if link.is_symlink() else None


def _marks(found: Sequence[Evaluation], mode: str) -> list[Mark]:
    return [
        Mark(one.short, told["value"], told["ci95"][0], told["ci95"][1], one.kind == "control")
        for one in found
        if (told := one.scores.get(mode))
    ]


def curves(root: Path, examined: Sequence[Examined]) -> dict[str, Any]:
    """The charts of training with their tables, and the metrics that this run's loss does not record."""
    wanted = [metric for metrics, _ in CURVES.values() for metric in metrics]
    found = evidence.curves(root, examined, wanted)
    panels = []
    for name, (metrics, caption) in CURVES.items():
        lines = {metric: found[metric] for metric in metrics if metric in found}
        if lines:
            panels.append({"svg": charts.curve(name, lines), "caption": caption, "metrics": list(lines)} | _rows(lines))
    return {"panels": panels, "missing": [metric for metric in wanted if metric not in found]}


def _rows(lines: Mapping[str, Mapping[int, Sequence[evidence.Point]]]) -> dict[str, Any]:
    """A line of a panel's table for each step: a column for each metric and round."""
    heads = [(metric, k) for metric, of in lines.items() for k in of]
    values = {(metric, k): {p.step: p.value for p in lines[metric][k]} for metric, k in heads}
    steps = sorted({step for of in values.values() for step in of})
    return {"heads": heads, "rows": [(step, [values[head].get(step) for head in heads]) for step in steps]}


def _cost_chart(costs: Sequence[tables.Cost]) -> dict[str, Any] | None:
    """Seconds by iteration and stage."""
    rows = {cost.name: cost.seconds for cost in costs[:-1]}
    if not rows:
        return None
    rounds_first = [*list(rows.values())[1:], *list(rows.values())[:1]]
    stages = list(dict.fromkeys(stage for of in rounds_first for stage in of))
    most = max(cost.total for cost in costs[:-1])
    unit, size = ("seconds", 1.0) if most < 600 else ("minutes", 60.0) if most < 36_000 else ("hours", 3600.0)
    scaled = {name: {stage: value / size for stage, value in of.items()} for name, of in rows.items()}
    return {"svg": charts.bars("cost", scaled, stages, unit), "stages": stages}


# --- text that others wrote --------------------------------------------------------------------------------------


def shown(value: Any) -> Any:
    """A value as the page shows it: text escaped, control characters visible, cut where it is very long."""
    if value is None:
        return "–"
    return cut(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def cut(text: str, longest: int = LONGEST) -> Markup:
    """The first characters of a text, and how many more there are."""
    more = left_out(text, longest)
    end = Markup(' <span class="cut">… {}</span>').format(more) if more else Markup("")
    return markup(text[:longest]) + end


def pieces(those: Sequence[Piece], whole: str) -> Markup:
    """A marked text, its changes as <ins> and <del>; `whole` tells how much of it was left out."""
    parts = [markup(piece.text) if piece.kind == "same" else _marked(piece) for piece in those]
    more = left_out(whole, samples.LONGEST)
    end = Markup(' <span class="cut">… {}</span>').format(more) if more else Markup("")
    return Markup("").join([*parts, end])


def _marked(piece: Piece) -> Markup:
    """The words as <ins> or <del>; spaces at the ends stay outside: struck through they would look like dashes."""
    words = piece.text.strip() or piece.text
    start = piece.text.index(words)
    parts = piece.text[:start], words, piece.text[start + len(words) :]
    return Markup("{0}<{tag}>{1}</{tag}>{2}").format(*map(markup, parts), tag=piece.kind)
