"""What may be written down of a command line or an address: everything but what would let another person in."""

import os
import re
from collections.abc import Iterable, Mapping

MASK = "***"
SECRET_NAME = re.compile(
    r"(api[_-]?key|access[_-]?key|secret|passw(or)?d|passphrase|token|credentials?|authorization|private[_-]?key)$",
    re.IGNORECASE,
)
KNOWN_FORMS = re.compile(  # of the hub, OpenAI and its like, GitHub, AWS, Slack, Google
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|AKIA[A-Z0-9]{12,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,})"
)
USER_IN_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
ASSIGNED = re.compile(r"([A-Za-z_][\w.-]*)([\"']?\s*(?:=|:(?!/))\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&}\]]+)")
SHORTEST = 8  # characters; a shorter value of a variable would mask words at random


def masked(text: str, environment: Mapping[str, str] | None = None) -> str:
    """A text without keys, passwords and tokens, as far as they can be told by name, by form or by the environment."""
    found = os.environ if environment is None else environment
    for value in sorted(
        (v for n, v in found.items() if is_secret_name(n) and len(v) >= SHORTEST), key=len, reverse=True
    ):
        text = text.replace(value, MASK)
    text = USER_IN_ADDRESS.sub(rf"\1{MASK}@", text)
    text = ASSIGNED.sub(lambda m: f"{m[1]}{m[2]}{MASK}" if SECRET_NAME.search(m[1]) else m[0], text)
    return KNOWN_FORMS.sub(MASK, text)


def masked_all(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command line, each masked; what follows an option such as --token too."""
    found: list[str] = []
    for argument in arguments:
        follows = bool(found) and found[-1].startswith("--") and SECRET_NAME.search(found[-1]) is not None
        found.append(MASK if follows else masked(argument))
    return found


def is_secret_name(name: str) -> bool:
    """Whether a variable or a setting of this name holds a secret; `api_key_env` only names one."""
    return SECRET_NAME.search(name) is not None or name.upper().endswith(("_KEY", "_PAT", "_AUTH"))


def holds_secret(text: str) -> bool:
    """Whether a text has the form of a secret, or an address with a user or a key in it."""
    assigned = any(SECRET_NAME.search(found[1]) for found in ASSIGNED.finditer(text))
    return assigned or KNOWN_FORMS.search(text) is not None or USER_IN_ADDRESS.search(text) is not None
