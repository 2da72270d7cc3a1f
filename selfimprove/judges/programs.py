"""Answers that are code, judged by unit tests in the sandbox."""

import json
import re
from collections.abc import Callable, Sequence

from selfimprove import sandbox
from selfimprove.judges.protocol import Candidate, Opinion
from selfimprove.sandbox import Job, Limits

SECONDS = 10.0
FENCE = re.compile(r"^[^\S\n]*```([^\n`]*)\n(.*?)(?:^[^\S\n]*```[^\S\n]*$|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "py", "python3")


def checker(seconds: float) -> Callable[[Sequence[Candidate]], list[Opinion]]:
    """Whether the answers' code passes the tests that the reference answers are.

    A reference answer is Python, or JSON as HumanEval has it: `test` defines `check`, which is called with the
    function `entry_point`, whose head is `prompt`.

    Raises:
        UserError: this machine has no sandbox.
    """
    sandbox.check()

    def check(candidates: Sequence[Candidate]) -> list[Opinion]:
        jobs = [job(candidate.text, candidate.answer) for candidate in candidates]
        wanted = list(dict.fromkeys(one for one in jobs if isinstance(one, Job)))  # equal samples run once
        outcomes = dict(zip(wanted, sandbox.run_all(wanted, Limits(seconds=seconds)), strict=True))
        return [_opinion(outcomes[one]) if isinstance(one, Job) else Opinion(None, one) for one in jobs]

    return check


def job(text: str, answer: str | None) -> Job | str:
    """What to run for an answer and its reference, or why there is nothing to run."""
    if answer is None or not answer.strip():
        return "no reference answer"
    if not answer.lstrip().startswith("{"):
        return Job(code(text), answer)
    try:
        table = json.loads(answer)
    except ValueError:
        return Job(code(text), answer)  # Python may begin with a brace too
    test, entry, prompt = (table.get(name) for name in ("test", "entry_point", "prompt"))
    if not (isinstance(test, str) and isinstance(entry, str) and entry.isidentifier()):
        return "the reference answer lacks 'test' or 'entry_point'"
    head = prompt if isinstance(prompt, str) else ""
    written = code(text, entry)
    between = "\n" if _defines(written, entry) else ""  # a whole function comes after the head, a body ends it
    return Job(head + between + written, f"{test}\ncheck({entry})")


def code(text: str, entry: str | None = None) -> str:
    """The code of an answer: its last fenced block that defines `entry`, or anything, or its last; else all of it."""
    blocks: list[str] = [body for language, body in FENCE.findall(text) if language.strip().lower() in PYTHON]
    for wanted in ([entry] if entry else []) + [r"\w+"]:
        if defining := [block for block in blocks if _defines(block, wanted)]:
            return defining[-1]
    return blocks[-1] if blocks else text


def _defines(written: str, name: str) -> bool:
    return re.search(rf"^(?:async[ \t]+def|def|class)[ \t]+{name}\b", written, re.MULTILINE) is not None


def _opinion(outcome: sandbox.Outcome) -> Opinion:
    if outcome.passed is None:
        return Opinion(None, outcome.reason)
    return Opinion(1.0) if outcome.passed else Opinion(0.0, outcome.reason)
