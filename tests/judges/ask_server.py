"""Asks a server 200 questions, to be killed on the way: python ask_server.py URL JOURNAL CONCURRENCY [PRICES]."""

import sys
from pathlib import Path

from selfimprove import recipe
from selfimprove.judges import calls
from selfimprove.judges.journal import Journal
from selfimprove.judges.protocol import Question
from selfimprove.judges.server import Client

QUESTIONS = [Question(f"q{i}", f"question {i}") for i in range(200)]
SEEDS = [1000 + 10 * i for i in range(200)]

if __name__ == "__main__":
    url, path, concurrency, *prices = sys.argv[1:]
    calls.FIRST_WAIT = 0.01
    section = recipe.Server(
        url=url,
        model="m",
        concurrency=int(concurrency),
        attempts=20,
        timeout_seconds=2.0,
        **dict(zip(("input_price", "output_price"), map(float, prices), strict=False)),
    )
    client = Client("s", section, Journal(Path(path)), lambda what, done, total: None, "stage")
    print("\n".join(reply.texts[0] for reply in client.ask(QUESTIONS, SEEDS, 1, 1.0, 8)))
