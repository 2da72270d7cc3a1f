"""How fast judges label: a checker in rows a second of one core, the rubric beside the raw engine.

    python -m tests.bench.judging [--rows 20000] [--repeats 5]

The rubric is timed as the stage label uses it, panel, templates and shards included, on the embedded model with real
vLLM; the raw engine generates the same requests (ids, seeds, sampling) in one call. Both in turn, in one process, on
other seeds in each repetition so that neither finds the other's answers.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from selfimprove import data, recipe
from selfimprove.chat import render
from selfimprove.engine import open_engine
from selfimprove.engine.protocol import Request, Sampling
from selfimprove.judges import Candidate
from selfimprove.judges.panel import Models
from selfimprove.judges.rubric import rubric
from selfimprove.judges.verifiers import verifier
from selfimprove.store import row_seed
from tests.executing import MODEL, inline


def candidates(number: int) -> list[Candidate]:
    """Golds and wrong answers in turn, each text its own."""
    seeds = data.read_seeds(data.SHIPPED["demo:seeds"])
    found = []
    for k in range(number):
        seed = seeds[k % len(seeds)]
        text = seed.completion if k % 2 else f"{seed.completion} {k}"
        found.append(Candidate(f"{seed.prompt_id}/{k}", seed.prompt, "current", 0, text, [], "stop", seed.completion))
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.3f} ({min(values):,.3f} .. {max(values):,.3f})"


def checkers(rows: list[Candidate], repeats: int) -> None:
    for checker in ("demo_world", "exact"):
        rates = []
        for _ in range(repeats):
            began = time.process_time()
            verifier(rows, checker=checker)
            rates.append(len(rows) / (time.process_time() - began))
        print(f"verifier {checker}: {spread(rates)} rows/s of one core")


def judge_and_engine(rows: list[Candidate], repeats: int) -> None:
    section = recipe.Engine()
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(section, recipe.Machine(), MODEL, Path(folder) / "engine.log")
        engine.swap(MODEL)
        ratios = []
        for repeat in range(-1, repeats):  # the first one warms up
            panel = Models(
                seed=lambda row, repeat=repeat: row_seed(repeat + 1, 1, "label", row),
                engine_section=section,
                servers={},
                paths={"current": MODEL},
                identities={"current": "demo"},
                executor=inline(engine),
                policy=MODEL,
                logs=Path(folder),
                scratch=Path(folder) / str(repeat),
                cache=Path(folder),
                account="bench",
                progress=lambda what, done, total: None,
            )
            chat, _ = panel._chat("current")

            asked = [
                Request(
                    chat.prompt_ids(render("judge/demo", {"question": c.prompt, "answer": c.text})),
                    3,
                    row_seed(1000 + repeat, 1, "label", c.name),
                )
                for c in rows
            ]
            sampling = Sampling(1.0, 1.0, 16, chat.stop_token_ids)
            took: dict[str, float] = {}
            for side in ("rubric", "engine") if repeat % 2 else ("engine", "rubric"):
                began = time.perf_counter()
                if side == "engine":
                    engine.generate(asked, sampling, lambda number, completions: None)
                else:
                    rubric(rows, panel, template="demo", n=3, temperature=1.0, max_tokens=16)
                took[side] = time.perf_counter() - began
            if repeat >= 0:
                ratios.append(took["engine"] / took["rubric"])
                print(
                    f"  rubric {took['rubric']:.2f} s, engine {took['engine']:.2f} s for {len(rows)} rows of 3 replies"
                )
        engine.close()
    print(f"throughput, rubric / raw engine: {spread(ratios)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--asked", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    checkers(candidates(given.rows), given.repeats)
    judge_and_engine(candidates(given.asked), given.repeats)
