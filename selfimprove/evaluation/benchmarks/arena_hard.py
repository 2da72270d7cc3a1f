"""Arena-Hard from battles (`question_id`, `model_a`, `model_b`, `winner`) or from its judgments (`model`, `games`).

Battles carry the copies of strong verdicts already, as the published program writes them; with `conv_metadata` the
style-controlled scores are there too. Judgments are those of v0.1 (`question_id`: a game without a verdict is left out)
or of v2 (`uid`: the question is).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from selfimprove import brackets
from selfimprove.errors import UserError
from selfimprove.evaluation import bradley_terry, style
from selfimprove.evaluation.benchmarks import fields
from selfimprove.evaluation.bradley_terry import Battle, Winner
from selfimprove.evaluation.style import Control, Difference, Style

WINNERS: dict[str, Winner] = {"model_a": "first", "model_b": "second", "tie": "tie", "tie (bothbad)": "tie"}
BATTLE = ("question_id", "model_a", "model_b", "winner", "conv_metadata")
JUDGMENT = ("question_id", "uid", "model", "games", "category")


def score(path: Path, baseline: str | None = None, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Every model's win rate against the baseline in percent, with its interval, and its Elo.

    Args:
        path: battles or judgments.
        baseline: the model to compare with; of battles, otherwise, the one that is `model_a` in all, or is in all.
        resamples: of the questions, for the intervals.
        seed: of the resamples.

    Raises:
        UserError: a file that cannot be read, a row that is wrong, or a baseline that is not known.
    """
    rows = fields.read(path)
    ignored: Counter[str] = Counter()
    judged = rows[0].has("games")
    battles = _of_judgments(rows, path, baseline, ignored) if judged else [_battle(row) for row in rows]
    if not battles:
        raise UserError(f"{path} has no battle with a verdict", f"ignored: {dict(ignored)}")
    anchor = _baseline(battles, baseline, path)
    ratings = bradley_terry.rate(battles, anchor, resamples, seed)
    result: dict[str, Any] = {
        "benchmark": "arena_hard",
        "file": str(path),
        "rows": len(rows),
        "ignored": dict(ignored),
        "unused_fields": fields.unused(rows, JUDGMENT if judged else BATTLE),
        "baseline": anchor,
        "battles": len(battles),
        "questions": len({battle.question for battle in battles}),
        "models": {name: rating._asdict() for name, rating in ratings.items()},
        "resamples": resamples,
        "seed": seed,
    }
    if not judged and any(row.has("conv_metadata") for row in rows):
        differences = [_difference(row) for row in rows]
        result["style_controlled"] = {
            control: _controlled(battles, differences, anchor, control, seed) for control in get_args(Control)
        }
    return result


def _controlled(
    battles: Sequence[Battle], differences: Sequence[Difference], baseline: str, control: Control, seed: int
) -> dict[str, Any]:
    found = style.controlled(battles, differences, baseline, control, seed=seed)
    names = ("length", "headers", "lists", "bold")[style.COLUMNS[control]]
    return {
        "models": {name: rating._asdict() for name, rating in found.ratings.items()},
        "coefficients": found.coefficients and dict(zip(names, found.coefficients, strict=True)),
    }


def _battle(row: fields.Row) -> Battle:
    first, second = row.name("model_a"), row.name("model_b")
    if first == second:
        raise row.wrong("model_b", "another model than model_a")
    winner = row.text("winner")
    if winner not in WINNERS:
        raise row.wrong("winner", f"one of {', '.join(WINNERS)}")
    return Battle(row.name("question_id"), first, second, WINNERS[winner])


def _of_judgments(rows: Sequence[fields.Row], path: Path, baseline: str | None, ignored: Counter[str]) -> list[Battle]:
    if baseline is None:
        raise UserError(f"{path} holds judgments, which do not name the baseline", "--baseline MODEL")
    categories = sorted({row.name("category") for row in rows if row.has("category")})
    if len(categories) > 1:
        raise UserError(
            f"{path} mixes the categories {fields.printable(', '.join(categories))}, which have different baselines",
            "one file a category",
        )
    battles: list[Battle] = []
    for row in rows:
        second_version = row.has("uid")
        labels = [_label(row, game) for game in _games(row)]
        missing = sum(label is None for label in labels)
        if missing and second_version:
            ignored["question with a game without a verdict"] += 1
            continue
        if missing:
            ignored["game without a verdict"] += missing
        question = row.name("uid" if second_version else "question_id")
        battles += bradley_terry.battles_of_games(question, baseline, row.name("model"), labels)
    return battles


def _games(row: fields.Row) -> list[Any]:
    games = row.any("games")
    if not isinstance(games, list) or len(games) not in (1, 2):
        raise row.wrong("games", "a list of one or two games")
    return games


def _label(row: fields.Row, game: Any) -> bradley_terry.Label | None:
    """The verdict of a game; where its words are there but not its score, the words are read."""
    if game is None:
        return None
    if not isinstance(game, dict) or not {"score", "judgment"} & set(game):
        raise row.wrong("games", "games with a 'score' or a 'judgment', or null")
    if "score" not in game:
        return brackets.arena_label(str(game["judgment"]), single=True)
    said = game["score"]
    if said is not None and (not isinstance(said, str) or said not in brackets.ARENA):
        raise row.wrong("games", f"games with a score of {', '.join(brackets.ARENA)}, or null")
    return None if said is None else brackets.ARENA[said]


def _baseline(battles: Sequence[Battle], given: str | None, path: Path) -> str:
    names = bradley_terry.models(battles)
    shown = fields.printable(", ".join(names))
    if given is not None:
        if given not in names:
            raise UserError(f"{path}: '{given}' is in no battle", f"models: {shown}")
        return given
    if len({battle.first for battle in battles}) == 1:
        return battles[0].first
    everywhere = [name for name in names if all(name in (battle.first, battle.second) for battle in battles)]
    if len(everywhere) != 1:
        raise UserError(f"{path}: no one model is in every battle", f"--baseline MODEL, one of {shown}")
    return everywhere[0]


def _difference(row: fields.Row) -> Difference:
    """The style difference of `conv_metadata`, the published program's counts of both answers."""
    told = row.any("conv_metadata", "every row has it, or none")
    if not isinstance(told, dict):
        raise row.wrong("conv_metadata", "an object")
    inner = fields.Row(f"{row.where}, conv_metadata", told)
    first, second = (
        Style(
            inner.whole(f"sum_assistant_{side}_tokens"),
            *(_count(inner, f"{what}_count_{side}") for what in ("header", "list", "bold")),
        )
        for side in "ab"
    )
    return style.difference(first, second)


def _count(row: fields.Row, name: str) -> int:
    """A count, or an object of counts by kind."""
    value = row.any(name)
    if isinstance(value, dict):
        kinds = fields.Row(f"{row.where}, {name}", value)
        return sum(kinds.whole(kind) for kind in value)
    return row.whole(name)
