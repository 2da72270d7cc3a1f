"""`selfimprove score`: the numbers of published benchmarks from files of judged rows. Imports nothing heavy."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from selfimprove.errors import UsageError

score = typer.Typer(
    help="The numbers of a published benchmark from a file of judged rows or responses; see docs/evaluation.md.",
    no_args_is_help=True,
)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with every digit.")]
Resamples = Annotated[int, typer.Option(min=2, help="Bootstrap resamples, for standard errors and intervals.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the resamples.")]


def _file(what: str) -> Any:
    return typer.Argument(metavar="FILE", help=f"{what}; JSONL, JSON or .gz.")


@score.command("alpaca_lc")
def alpaca_lc(
    file: Annotated[Path, _file("Rows with index, preference, len_1, len_2")],
    difficulty: Annotated[
        Optional[Path], typer.Option(metavar="CSV", help="index, instruction_difficulty; none for prompts of your own.")
    ] = None,
    gamed: Annotated[
        Optional[Path], typer.Option(metavar="CSV", help="Rows of the gamed baselines, for regularisation.")
    ] = None,
    c: Annotated[
        Optional[float], typer.Option("--c", help="Inverse strength of the L1 penalty; cross-validated otherwise.")
    ] = None,
    align: Annotated[
        Optional[Literal["positional", "index"]],
        typer.Option(help="Join difficulties by the row's place (as published figures are; the default) or by index."),
    ] = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """AlpacaEval 2: win rate and length-controlled win rate, with their standard errors."""
    usage = "selfimprove score alpaca_lc FILE --difficulty CSV --gamed CSV, or without both for prompts of your own"
    for wrong, sentence in [
        (gamed is not None and difficulty is None, "--gamed goes with --difficulty"),
        (align is not None and difficulty is None, "--align goes with --difficulty"),
        (c is not None and not 0 < c < float("inf"), "--c must be a number above 0"),
    ]:
        if wrong:
            raise UsageError(sentence, usage)
    from selfimprove.evaluation.benchmarks import alpaca_lc as benchmark

    _print(benchmark.score(file, difficulty, gamed, c, align or "positional", resamples, seed), as_json)


@score.command("arena_hard")
def arena_hard(
    file: Annotated[Path, _file("Battles (question_id, model_a, model_b, winner) or judgments (model, games)")],
    baseline: Annotated[
        Optional[str], typer.Option(metavar="MODEL", help="Of battles, otherwise the model that is in all of them.")
    ] = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Arena-Hard: win rate against the baseline and Elo by Bradley-Terry; with conv_metadata style-controlled too."""
    from selfimprove.evaluation.benchmarks import arena_hard as benchmark

    _print(benchmark.score(file, baseline, resamples, seed), as_json)


@score.command("gsm8k")
def gsm8k(
    file: Annotated[Path, _file("Rows with ground_truth and MODEL: {solution}, or with answer and response")],
    as_json: AsJson = False,
) -> None:
    """GSM8K: accuracy by the marked answer, and McNemar's test of every two models."""
    from selfimprove.evaluation.benchmarks import gsm8k as benchmark

    _print(benchmark.score(file), as_json)


@score.command("ifeval")
def ifeval(
    file: Annotated[Path, _file("Rows with key (or prompt) and response")],
    prompts: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="IFEval's prompts; input_data.jsonl beside FILE or one folder up otherwise."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """IFEval: shares of prompts and of instructions that responses follow, strictly and loosely."""
    from selfimprove.evaluation.benchmarks import ifeval as benchmark

    _print(benchmark.score(file, prompts), as_json)


@score.command("mt_bench")
def mt_bench(file: Annotated[Path, _file("Judgments with question_id, model, turn")], as_json: AsJson = False) -> None:
    """MT-Bench: mean of the judge's single ratings, by model and turn, and paired tests."""
    from selfimprove.evaluation.benchmarks import ratings

    _print(ratings.score(file, "mt_bench"), as_json)


@score.command("arena_bench")
def arena_bench(file: Annotated[Path, _file("Judgments with question_id, model")], as_json: AsJson = False) -> None:
    """arena-bench v1: mean of the judge's single ratings by model, and paired tests."""
    from selfimprove.evaluation.benchmarks import ratings

    _print(ratings.score(file, "arena_bench"), as_json)


def _print(result: dict[str, Any], as_json: bool) -> None:
    """Numbers on stdout; what was left out, and notes, on stderr too."""
    for line in _remarks(result):
        print(line, file=sys.stderr)
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    from selfimprove.report import scores

    tables: Callable[[dict[str, Any]], Any] = scores.tables
    for table in tables(result):
        Console().print(table)


def _remarks(result: dict[str, Any]) -> list[str]:
    lines = [f"ignored: {reason}: {number}" for reason, number in result["ignored"].items()]
    if result.get("prompts_file"):
        lines.append(f"prompts: {result['prompts_file']}")
    if result.get("prompts_without_response"):
        lines.append(f"prompts without a response, not scored: {result['prompts_without_response']}")
    if result["unused_fields"]:
        lines.append(f"fields not used: {', '.join(result['unused_fields'])}")
    return lines + [f"note: {note}" for note in result.get("notes", [])]
