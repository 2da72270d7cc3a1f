"""Carrying out a shard with the engines of this process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfimprove import interrupts, recipe
from selfimprove.engine import Engines
from selfimprove.engine.protocol import EngineDied
from selfimprove.execution.hunt import Hunt
from selfimprove.execution.shard import POISONED, Answering, Lost, Shard, Work

SCORED = 256  # rows of one call that scores: what else is in a batch may move the last bits of a number


def carry_out(
    engines: Engines,
    machine: recipe.Machine,
    folder: Path,
    work: Work,
    shard: Shard,
    heard: Callable[[int], None] = lambda answered: None,
    only: Sequence[int] | None = None,
) -> None:
    """Answer a shard's rows and publish it; rows that were answered before a kill are not asked again.

    Args:
        engines: of this process.
        machine: how they are built.
        folder: of the shards.
        work: what is asked.
        shard: the rows.
        heard: told how many rows have an answer by now.
        only: rows that may be asked; the shard is published when none is missing.

    Raises:
        KeyboardInterrupt: the user asked to stop; what was answered is kept.
        UserError: the engine cannot serve, or dies on one row after another.
    """
    answering = Answering(folder, shard)
    try:
        missing = answering.missing()
        heard(len(answering.known))
        wanted = missing if only is None else sorted(set(missing).intersection(only))
        hunt = Hunt(wanted, len(shard.rows))

        def put(number: int, answer: Any) -> None:
            answering.put(number, answer)
            heard(len(answering.known))

        while (rows := hunt.next()) is not None:
            try:
                _answer(engines, machine, work, shard, rows, put, hunt.halved or only is not None)
            except EngineDied as error:
                interrupts.check()
                hunt.died(rows, [i for i in rows if i not in answering.known], error)
                for number in hunt.lost:
                    if number not in answering.known:
                        put(number, Lost(POISONED))
        if not answering.missing():
            answering.finish()
    finally:
        answering.close()


def _answer(
    engines: Engines,
    machine: recipe.Machine,
    work: Work,
    shard: Shard,
    rows: Sequence[int],
    put: Callable[[int, Any], None],
    alone: bool,
) -> None:
    """Ask the engine; `alone` = with no other rows beside, since one of them may be what it dies on."""
    model, logs = Path(work.model), Path(work.logs)
    section = recipe.Engine.model_validate(work.engine)
    match work.task:
        case "complete":
            assert work.sampling is not None
            order = sorted(rows, key=lambda i: -len(shard.rows[i].prompt_token_ids))  # the longest may not come last
            engine = _writer(engines, machine, section, work, model, logs)
            engine.generate([shard.rows[i] for i in order], work.sampling, lambda k, found: put(order[k], found))
        case "score":
            left = set(rows)
            for start in range(0, len(shard.rows), SCORED):  # the same parts after a kill
                part = range(start, min(start + SCORED, len(shard.rows)))
                if left.intersection(part):
                    interrupts.check()
                    asked = [i for i in part if i in left] if alone else list(part)
                    engine = _writer(engines, machine, section, work, model, logs)
                    for i, found in zip(asked, engine.prompt_logprobs([shard.rows[i] for i in asked]), strict=True):
                        if i in left:
                            put(i, found)
        case "reward":
            scorer = engines.judge(section, machine, model, logs / "judge.log", "reward")
            scorer.rewards([shard.rows[i] for i in rows], lambda k, found: put(rows[k], found))
        case "compare":
            ranker = engines.judge(section, machine, model, logs / "judge.log", "compare")
            ranker.compare([shard.rows[i] for i in rows], lambda k, found: put(rows[k], found))


def _writer(
    engines: Engines, machine: recipe.Machine, section: recipe.Engine, work: Work, model: Path, logs: Path
) -> Any:
    if work.policy is None:
        engine = engines.judge(section, machine, model, logs / "judge.log", "generate")
    else:
        engine = engines.get(section, machine, Path(work.policy), logs / "engine.log")
    engine.swap(model)
    return engine
