"""How many answers a second the verifier's checkers judge on one core: python -m tests.bench.verify [--rows 20000]."""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

from msgspec.structs import replace

from selfimprove import data
from selfimprove.judges import Candidate
from selfimprove.judges.verifiers import verifier

REPEATS = 5


def candidates(rows: int) -> list[Candidate]:
    """The seeds of the demo world in turn, four answers each, every second one wrong."""
    seeds = data.read_seeds(data.SHIPPED["demo:seeds"])
    turn = itertools.islice((seed for seed in itertools.cycle(seeds) for _ in range(4)), rows)
    return [
        Candidate(s.prompt_id, s.prompt, "current", i, s.completion + " no" * (i % 2), [1], "stop", s.completion)
        for i, s in enumerate(turn)
    ]


def rate(check: Callable[[], object], rows: int) -> list[float]:
    """Rows a second of processor time, each of `REPEATS` runs."""
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        check()
        found.append(rows / (time.process_time() - start))
    return found


def measure(rows: int) -> dict[str, list[float]]:
    """The rates of the checkers that take no process of their own."""
    given = candidates(rows)
    schema = {"type": "object", "properties": {"answer": {"type": "string", "maxLength": 80}}, "required": ["answer"]}
    wrapped = [replace(candidate, text=json.dumps({"answer": candidate.text})) for candidate in given]
    return {
        "demo_world": rate(lambda: verifier(given, checker="demo_world"), rows),
        "exact": rate(lambda: verifier(given, checker="exact"), rows),
        "regex (pattern)": rate(lambda: verifier(given, checker="regex", pattern=r"\bdone\b|^Answer: "), rows),
        "regex (reference)": rate(lambda: verifier(given, checker="regex"), rows),
        "json_schema": rate(lambda: verifier(wrapped, checker="json_schema", json_schema=schema), rows),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    for name, rates in measure(parser.parse_args().rows).items():
        told = {"min": min(rates), "median": statistics.median(rates), "max": max(rates)}
        print(json.dumps({"checker": name} | {key: round(value) for key, value in told.items()}))
