"""AlpacaEval 2 from judged rows.

Their fields: `index`, `preference` (1 is the baseline, 2 the model), `len_1`, `len_2` (characters of the two answers).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from selfimprove.errors import UserError
from selfimprove.evaluation import length_controlled as lc
from selfimprove.evaluation.benchmarks import fields

Align = Literal["positional", "index"]
USED = ("index", "preference", "len_1", "len_2")
MINIMAL = "a prompt set of your own is scored without --difficulty and --gamed"


class Judged(NamedTuple):
    """The rows of a file, column by column, in the file's order."""

    indices: list[int]
    preference: lc.Array  # NaN cannot be read
    len_1: list[int]
    len_2: list[int]
    ignored: dict[str, int]  # reason -> rows
    unused: list[str]


class GamedTable(NamedTuple):
    """The regularisation rows, and the length of the baseline's answer to each instruction."""

    rows: lc.Gamed
    baseline_lengths: dict[int, int]


def score(
    path: Path,
    difficulty: Path | None = None,
    gamed: Path | None = None,
    c: float | None = None,
    align: Align = "positional",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The raw and the length-controlled win rate of a model, in percent, with their standard errors.

    Args:
        path: the judged rows.
        difficulty: CSV with `index`, `instruction_difficulty`; without it the model has length and a constant only.
        gamed: CSV with the rows of the gamed baselines.
        c: of the fit; by cross-validation otherwise.
        align: how difficulty is joined: by the row's place in the file, as the published figures are, or by its index.
        resamples: of the prompts, for the standard error of the length-controlled win rate.
        seed: of the resamples.

    Raises:
        UserError: a file that cannot be read or a row that is wrong, told with file, line and field.
    """
    judged = read_judged(path)
    notes: list[str] = []
    table = None if gamed is None else read_gamed(gamed)
    gamma = None
    if difficulty is not None:
        gamma = _joined(judged, read_difficulty(difficulty), table, align, path, notes)
    delta = np.array(judged.len_1, dtype=float) - np.array(judged.len_2, dtype=float)
    if not (~np.isnan(judged.preference)).any():
        raise UserError(f"{path} has no preference between 1 and 2", f"ignored: {judged.ignored}")
    rows = lc.Rows(delta, lc.chance(judged.preference), gamma)
    variant = "length_controlled_" + ("minimal" if gamma is None else "noreg" if table is None else "v1")
    result: dict[str, Any] = {
        "benchmark": "alpaca_lc",
        "file": str(path),
        "rows": len(judged.indices),
        "ignored": judged.ignored,
        "unused_fields": judged.unused,
        **lc.raw_win_rate(judged.preference)._asdict(),
        "avg_length": int(np.mean(judged.len_2)),
        "variant": variant,
        "align": align if gamma is not None else None,
        "lc_win_rate": None,
        "lc_bootstrap_se": None,
        "notes": notes,
    }
    try:
        found = lc.length_controlled(rows, table and table.rows, c)
        spread = lc.bootstrap(rows, table and table.rows, found.c, resamples, seed)
    except (ValueError, ArithmeticError) as error:  # too few rows, or separable ones with hardly a penalty
        notes.append(f"no length-controlled win rate: {error}")
        return result
    names = ("length", "difficulty", "model") if gamma is not None else ("length", "model")
    return result | {
        "lc_win_rate": found.win_rate,
        "lc_bootstrap_se": spread.standard_error,
        "lc_interval": [spread.low, spread.high],
        "lc_standard_error_upstream": found.prediction_spread,
        "c": found.c,
        "c_by": "cross-validation" if c is None else "given",
        "coefficients": dict(zip(names, found.coefficients, strict=True)),
        "resamples": resamples,
        "seed": seed,
    }


def read_judged(path: Path) -> Judged:
    """The judged rows of a file.

    Raises:
        UserError: a field that is absent, of another type, or an index that stands twice.
    """
    rows = fields.read(path)
    ignored: Counter[str] = Counter()
    index, preference = [], []
    seen: dict[int, str] = {}
    for row in rows:
        number = row.whole("index", hint="the number of the instruction, from 0")
        if number in seen:
            raise UserError(f"{row.where}: index {number} stands in {seen[number]} too", "one row an instruction")
        seen[number] = row.where.rpartition(", ")[2]
        value = row.number("preference", "1 is the baseline, 2 the model, 1.5 a tie, null not readable")
        if value is None:
            ignored["preference not readable"] += 1
        elif value != 0 and not 1 <= value <= 2:
            ignored["preference outside 1 to 2"] += 1
        index.append(number)
        preference.append(value if value is not None and (value == 0 or 1 <= value <= 2) else np.nan)
    len_1, len_2 = ([row.whole(name, hint="characters of the answer") for row in rows] for name in ("len_1", "len_2"))
    return Judged(index, np.array(preference), len_1, len_2, dict(ignored), fields.unused(rows, USED))


def read_difficulty(path: Path) -> dict[int, float]:
    """The instructions' difficulties by index.

    Raises:
        UserError: the file cannot be read or a row is wrong.
    """
    found: dict[int, float] = {}
    for row in fields.read_csv(path, ("index", "instruction_difficulty")):
        value = row.number("instruction_difficulty")
        if value is None:
            raise row.wrong("instruction_difficulty", "a number")
        if (index := row.whole("index")) in found:
            raise UserError(f"{row.where}: index {index} stands twice", "one row an instruction")
        found[index] = value
    if not found:
        raise UserError(f"{path} holds no rows", "index,instruction_difficulty and a row an instruction")
    return found


def read_gamed(path: Path) -> GamedTable:
    """The rows of the gamed baselines; `preference`, from 0 to 1, or `preference_surrogate`.

    Raises:
        UserError: the file cannot be read or a row is wrong.
    """
    needed = ("model", "index", "len_1", "std_delta_len", "instruction_difficulty")
    columns: list[list[float]] = [[], [], []]
    names, lengths = set(), {}
    for row in fields.read_csv(path, needed):
        target = "preference" if row.has("preference") else "preference_surrogate"
        for column, name in zip(columns, ("std_delta_len", "instruction_difficulty", target), strict=True):
            value = row.number(name)
            if value is None or (name == target and not 0 <= value <= 1):
                raise row.wrong(name, "a number from 0 to 1" if name == target else "a number")
            column.append(value)
        names.add(row.name("model"))
        lengths[row.whole("index")] = row.whole("len_1")
    if not names:
        raise UserError(f"{path} holds no rows", f"the rows of AlpacaEval's gamed baselines; {MINIMAL}")
    scaled, gamma, p = (np.array(column) for column in columns)
    return GamedTable(lc.Gamed(scaled, gamma, p, len(names)), lengths)


def places(lengths: Sequence[int], table: Sequence[int]) -> list[int] | None:
    """The one way to find a sequence of lengths in a longer one, in order; None where there is none, or several."""

    def first_fit(wanted: Sequence[int], there: Sequence[int]) -> list[int] | None:
        found, at = [], 0
        for length in wanted:
            while at < len(there) and there[at] != length:
                at += 1
            if at == len(there):
                return None
            found.append(at)
            at += 1
        return found

    earliest = first_fit(lengths, table)
    latest = first_fit(lengths[::-1], table[::-1])
    if earliest is None or latest is None or earliest != [len(table) - 1 - at for at in latest[::-1]]:
        return None
    return earliest


def _joined(
    judged: Judged, difficulty: dict[int, float], table: GamedTable | None, align: Align, path: Path, notes: list[str]
) -> lc.Array:
    """Each row's difficulty."""
    order = sorted(difficulty)
    if align == "positional":
        if len(judged.indices) > len(order):
            raise UserError(f"{path} has {len(judged.indices)} rows, and there are {len(order)} difficulties", MINIMAL)
        if len(judged.indices) < len(order) or judged.indices != order:
            notes.append(
                f"{len(judged.indices)} rows for {len(order)} instructions are joined by their place, as published "
                "figures are; after a row that is missing they have the difficulty of another instruction "
                "(--align index joins by index)"
            )
        return np.array([difficulty[index] for index in order[: len(judged.indices)]])
    index = _true_index(judged, table, notes)
    if unknown := [one for one in index if one not in difficulty]:
        raise UserError(f"{path}: no difficulty for index {unknown[0]}", f"indices go to {order[-1]}; {MINIMAL}")
    return np.array([difficulty[one] for one in index])


def _true_index(judged: Judged, table: GamedTable | None, notes: list[str]) -> list[int]:
    """The rows' indices; where they are places in a file with holes, the baseline's lengths tell the instructions."""
    if table is None:
        return judged.indices
    known = table.baseline_lengths
    wrong = [i for i, length in zip(judged.indices, judged.len_1, strict=True) if known.get(i) != length]
    if not wrong:
        return judged.indices
    found = places(judged.len_1, [known[index] for index in sorted(known)])
    if found is None or judged.indices != sorted(judged.indices):
        notes.append(
            f"{len(wrong)} rows, the first with index {wrong[0]}, have another len_1 than the baseline's answer to "
            "that instruction: another baseline, or not the instruction's index"
        )
        return judged.indices
    index = [sorted(known)[place] for place in found]
    holes = sorted(set(known).difference(index))
    notes.append(
        f"the index of {len(wrong)} rows is their place in the file, not their instruction's: joined by the lengths of "
        f"the baseline's answers; instructions without a row: {', '.join(map(str, holes))}"
    )
    return index
