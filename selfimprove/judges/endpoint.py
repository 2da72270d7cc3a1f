"""A server as the recipe names it: the client that speaks to it, its key, and what to check when it says no."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selfimprove import recipe
from selfimprove.errors import UserError
from selfimprove.judges.calls import Rejected


def api_key(name: str, server: recipe.Server) -> str | None:
    """The key of a server; None where it wants none.

    Raises:
        UserError: the environment variable that the recipe names is not set.
    """
    variable = server.api_key_env
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise UserError(
            f"server '{name}': the environment variable {variable} holds no API key",
            f"export {variable}=..., or drop servers.{name}.api_key_env where the server wants none",
        )
    if not (key.isascii() and key.isprintable()):  # an HTTP header could not carry it
        raise UserError(f"server '{name}': what {variable} holds is no API key", f"export {variable}=...")
    return key


def connect(name: str, server: recipe.Server, key: str | None) -> Any:
    """The openai client of a server, with what the recipe says and nothing from the environment.

    Raises:
        UserError: it is not installed.
    """
    try:
        import openai
    except ModuleNotFoundError:
        raise UserError(
            f"server '{name}' is asked through the openai client", "pip install 'selfimprove[openai]'"
        ) from None
    with _without("OPENAI_"):
        return openai.AsyncOpenAI(
            base_url=server.url,
            api_key=key or "none",
            max_retries=0,  # ours: they hold to the pace, the ceiling and the number of attempts
            timeout=None,  # ours too: of a whole attempt, not of each read
        )


@contextmanager
def _without(prefix: str) -> Iterator[None]:
    """Hide environment variables."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(prefix)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def no_logprobs(name: str, said: str = "") -> UserError:
    """What to say of a server whose replies are words alone."""
    return UserError(
        f"server '{name}' gives no log-probs of its tokens{said}",
        "use read = 'reply' for this judge, or another server",
    )


def rejection(name: str, server: recipe.Server, error: Rejected) -> UserError:
    """What to say of a server that rejects requests, and what to check."""
    if "logprob" in error.said:
        return no_logprobs(name, f": {error.said}")
    key = f"the key in ${server.api_key_env}" if server.api_key_env else f"servers.{name}.api_key_env, which is unset"
    hints = {
        400: f"check what the judge sets (max_tokens, temperature, structured_output) against '{server.model}'",
        401: f"check {key}",
        402: "check the account's balance; everything answered is kept, `selfimprove resume RUN` asks for the rest",
        403: f"check {key}, and that it may use '{server.model}'",
        404: f"check servers.{name}.url (up to and with /v1) and model; the models are listed at {server.url}/models",
    }
    hint = hints.get(error.status or 0, f"check servers.{name}.url and model")
    return UserError(f"server '{name}' rejects the judge's requests: {error.said}", hint)
