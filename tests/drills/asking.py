"""The driver of a drill: `python -m tests.drills.asking RUN MACHINE` asks what a stage asks, and publishes the answers.

A whole `selfimprove iterate` imports for longer than a drill takes; this is the same call of `ask`, with the same
executors, interrupts and resumption.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import msgspec
import tokenizers

from selfimprove import data, recipe, store
from selfimprove.demo import world
from selfimprove.engine.protocol import Request, Sampling
from selfimprove.errors import UserError
from selfimprove.execution import Executors, Lost, Work, ask
from selfimprove.interrupts import Interrupts
from tests.drills.field import ROWS

MODEL = Path(data.SHIPPED["demo:model"])


def prompts() -> list[str]:
    """What is asked, no prompt twice."""
    dice, found = random.Random(0), dict[str, None]()
    while len(found) < ROWS:
        found[world.draw(dice).prompt] = None
    return list(found)


def main(run: Path, machine: recipe.Machine) -> None:
    """Ask, and publish `rows.jsonl`."""
    tokens = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    requests = [Request(tokens.encode(text).ids, 1, store.row_seed(0, 1, "drill", text)) for text in prompts()]
    run.mkdir(parents=True, exist_ok=True)
    work = Work(
        task="complete",
        model=str(MODEL),
        identity=store.model_identity(MODEL),
        engine=recipe.Engine(kind="fake").model_dump(mode="json"),
        policy=str(MODEL),
        logs=str(run / "logs"),
        sampling=Sampling(temperature=1.0, top_p=1.0, max_tokens=48, stop_token_ids=[0]),
    )
    scratch = run / "scratch"
    with Interrupts(lambda: None), Executors() as executors:
        lines = []
        for number, answer in enumerate(ask(executors.get(machine, run / "logs"), scratch / "shards", work, requests)):
            told = {"lost": answer.reason} if isinstance(answer, Lost) else {"answer": msgspec.to_builtins(answer)}
            lines.append(json.dumps({"id": f"{number:05d}", **told}) + "\n")
    store.write_atomically(run / "rows.jsonl", "".join(lines))
    shutil.rmtree(scratch)


if __name__ == "__main__":
    try:
        main(Path("runs", sys.argv[1]), recipe.Machine.model_validate_json(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error.message}\n\nhint: {error.hint}")
