"""What a row costs between a stage and its engine: `python -m tests.bench.overhead [--rows 20000] [--repeats 3]`.

The engine is a stub that has its answers before it is asked, so that all time is the seam's: shards cut and named,
answers kept row by row, shards published, read and checked. Printed as JSON: CPU and wall microseconds a row, the least
of the repeats, of the seam alone (`ask`), of `StageIO.complete`, and of the tokenizer's part in the latter.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from selfimprove import data, recipe
from selfimprove.chat import Chat
from selfimprove.columns import batched
from selfimprove.engine.protocol import Completion, Request, Sampling
from selfimprove.execution import ask
from selfimprove.stages.io import TOKENIZED, Ask, StageIO
from tests.executing import MODEL, inline, work

WRITTEN = 24  # tokens of a completion


class Instant:
    """An engine that gives everybody the same answer."""

    def __init__(self) -> None:
        self.answer = [Completion(list(range(100, 100 + WRITTEN)), [-0.123456789 * k for k in range(WRITTEN)], "stop")]

    def swap(self, model: Path) -> None:
        """Nothing to load."""

    def generate(self, requests: Any, sampling: Sampling, finished: Callable[[int, list[Completion]], None]) -> Any:
        """See engine.protocol."""
        for number in range(len(requests)):
            finished(number, self.answer)


def stage(folder: Path, engine: Instant) -> StageIO:
    """A stage with just what `complete` uses."""
    return StageIO(
        iteration=1,
        stage="generate",
        seed=0,
        engine_section=recipe.Engine(kind="fake"),
        machine=recipe.Machine(),
        inputs={},
        models={"current": MODEL},
        identities={"current": "these weights"},
        out=SimpleNamespace(tokens=0),  # type: ignore[arg-type]
        scratch=folder,
        cache=folder,
        executor=inline(engine),
        policy=MODEL,
        logs=folder,
        servers={},
        progress=lambda what, done, total: None,
    )


def measure(rows: int) -> dict[str, tuple[float, float]]:
    """CPU and wall seconds of each part."""
    seeds = data.read_seeds(data.SHIPPED["demo:seeds"])
    asks = [Ask(f"p{k}", seeds[k % len(seeds)].prompt) for k in range(rows)]
    chat, engine = Chat(MODEL), Instant()
    ids = [chat.prompt_ids(one.text) for one in asks]
    requests = [Request(prompt, 1, k) for k, prompt in enumerate(ids)]
    sampling = Sampling(1.0, 1.0, WRITTEN, chat.stop_token_ids)
    found = {}

    def timed(name: str, do: Callable[[], Any]) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        do()
        found[name] = time.process_time() - cpu, time.perf_counter() - wall

    def drain(answers: Any) -> None:
        count = sum(1 for _ in answers)
        assert count == rows

    with tempfile.TemporaryDirectory() as folder:
        question = work("complete", sampling)
        timed("seam", lambda: drain(ask(inline(engine), Path(folder) / "ask", question, requests)))
        timed("seam, all had before", lambda: drain(ask(inline(engine), Path(folder) / "ask", question, requests)))
        io = stage(Path(folder) / "stage", engine)
        assert io.chat.prompt_ids("warm")
        timed(
            "complete",
            lambda: drain(io.complete("", MODEL, asks, 1, recipe.Sampling(max_tokens=WRITTEN), "current")),
        )
        written = engine.answer[0].token_ids
        timed(
            "tokenizer",
            lambda: [
                (chat.prompt_ids_of((one.text, ()) for one in some), chat.texts([written] * len(some)))
                for some in batched(asks, TOKENIZED)
            ],
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    repeats = [measure(given.rows) for _ in range(given.repeats)]
    least = {
        name: {
            "cpu_us_per_row": round(min(one[name][0] for one in repeats) / given.rows * 1e6, 1),
            "wall_us_per_row": round(min(one[name][1] for one in repeats) / given.rows * 1e6, 1),
        }
        for name in repeats[0]
    }
    print(json.dumps({"rows": given.rows, "repeats": given.repeats, **least}, indent=1))


if __name__ == "__main__":
    main()
