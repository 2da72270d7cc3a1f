"""A chat completions server on 127.0.0.1 that misbehaves as told, and remembers everything it was asked."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

PROMPT_TOKENS, COMPLETION_TOKENS = 30, 7  # what it says that a request cost


class Asked(NamedTuple):
    """A request as it arrived."""

    at: float
    text: str
    seed: int | None
    n: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]


def reply(text: str, seed: int | None) -> str:
    """What it says, so that a mixed-up order shows."""
    return f"{text[:40]} with seed {seed}"


def completion(asked: Asked, n: int | None = None, **parts: Any) -> dict[str, Any]:
    """A chat completion as the API has it."""
    choices = [
        {
            "index": k,
            "message": {
                "role": "assistant",
                "content": reply(asked.text, None if asked.seed is None else asked.seed + k),
            },
            "finish_reason": "stop",
            **parts,
        }
        for k in range(asked.n if n is None else n)
    ]
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS * len(choices)}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}


def logprobs(top: Mapping[str, float]) -> dict[str, Any]:
    """The part of a choice that says what its first token could have been."""
    tops = [{"token": token, "logprob": value, "bytes": None} for token, value in top.items()]
    return {"logprobs": {"content": [{**tops[0], "top_logprobs": tops}] if tops else []}}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        asked = Asked(
            time.monotonic(),
            text,
            body.get("seed"),
            body.get("n", 1),
            {k.lower(): v for k, v in self.headers.items()},
            body,
        )
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.tries[text, asked.seed] += 1
            number = self.server.tries[text, asked.seed]
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        try:
            self.server.behave(self, asked, number)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def answer(self, asked: Asked, n: int | None = None, **parts: Any) -> None:
        """Behave well."""
        table = completion(asked, n, **parts)
        with self.server.lock:
            for k in range(len(table["choices"])):
                self.server.answered[asked.text, None if asked.seed is None else asked.seed + k] += 1
            self.server.billed += table["usage"]["prompt_tokens"] + table["usage"]["completion_tokens"]
        self.say(200, table)

    def say(self, status: int, body: Any, headers: Mapping[str, str] | None = None, cut: int = 0) -> None:
        """Send a response; `cut` bytes of what its length promises never come."""
        raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[: len(raw) - cut])
        self.wfile.flush()
        if cut:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the connection."""
        self.close_connection = True
        self.connection.close()

    def log_message(self, *what: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Behaves as the function says, which is called with handler, request and the number of its attempt."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behave: Callable[[Handler, Asked, int], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.lock = threading.Lock()
        self.asked: list[Asked] = []
        self.tries: Counter[tuple[str, int | None]] = Counter()
        self.answered: Counter[tuple[str, int | None]] = Counter()  # by text and seed
        self.billed = 0  # tokens
        self.busy = self.busiest = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *exception: Any) -> None:
        self.shutdown()
        super().__exit__(*exception)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def fault(handler: Handler, asked: Asked, kind: str, slow: float) -> None:
    """Misbehave."""
    whole = completion(asked)
    match kind:
        case "429":
            handler.say(
                429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, {"Retry-After": "0.05"}
            )
        case "500":
            handler.say(500, "Internal Server Error", {"Content-Type": "text/plain"})
        case "503":
            handler.say(503, "<html>upstream</html>", {"Content-Type": "text/html", "Retry-After": "soon"})
        case "slow":
            time.sleep(slow)
            handler.say(200, whole)
        case "truncated JSON":
            handler.say(200, json.dumps(whole)[:-20])
        case "truncated body":
            handler.say(200, whole, cut=20)
        case "closed":
            handler.hang_up()
        case "wrong content type":
            handler.say(200, "<html>please log in</html>", {"Content-Type": "text/html"})
        case "200 with an error":
            handler.say(200, {"error": {"message": "upstream overloaded", "code": 502}})
        case "no choices":
            handler.say(200, {**whole, "choices": []})
        case "missing choices":
            handler.say(200, {k: v for k, v in whole.items() if k != "choices"})
        case "empty body":
            handler.say(200, "")
        case "empty content":
            handler.say(200, completion(asked, message={"role": "assistant", "content": ""}, finish_reason=None))
        case "garbage":
            handler.say(200, "\x00\x01" * 50, {"Content-Encoding": "gzip"})


FAULTS = (
    "429", "500", "503", "slow", "truncated JSON", "truncated body", "closed", "wrong content type",
    "200 with an error", "no choices", "missing choices", "empty body", "empty content", "garbage",
)  # fmt: skip
