"""Compares numbers and formulas with math-verify, in a process of its own: `numeric` starts it as a script.

Reads one JSON list [reference answer, answer] a line and writes one JSON list [true, false or null, reason] a line.
math-verify stops itself by signals, which only a main thread gets, and one huge power stops the signals too: this
process can be ended from outside.
"""

import json
import resource
import sys

MEMORY = 4 * 2**30  # bytes of address space


def verdict(answer: str, text: str) -> tuple[bool | None, str]:
    """Whether a text's last number or formula equals the reference's; after ####, where GSM8K's mark stands."""
    from math_verify import parse, verify

    gold = parse(_marked(answer))
    if not gold:
        return None, "the reference answer holds no number or formula"
    found = parse(_marked(text))
    return (bool(verify(gold, found)), "") if found else (False, "the answer holds no number or formula")


def _marked(text: str) -> str:
    return text.rpartition("####")[2].strip()


def main() -> None:
    """Answer line by line until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        try:
            result: tuple[bool | None, str] = verdict(*json.loads(line))
        except Exception as error:  # the libraries parse what strangers wrote
            result = None, f"math-verify failed: {type(error).__name__}"
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
