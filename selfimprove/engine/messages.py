"""What the driver and the vLLM host process say to each other, as msgpack frames over a socket pair."""

import msgspec

from selfimprove.engine.protocol import Completion, Options, Request, Sampling


class Load(msgspec.Struct, tag=True):
    """Build the engine on these weights."""

    model: str
    options: Options


class Swap(msgspec.Struct, tag=True):
    """Load other weights into the engine that runs."""

    model: str


class Generate(msgspec.Struct, tag=True):
    """Sample completions."""

    requests: list[Request]
    sampling: Sampling


class Score(msgspec.Struct, tag=True):
    """Log-probabilities of given tokens."""

    sequences: list[list[int]]


class Sleep(msgspec.Struct, tag=True):
    """Release the device's memory."""


class Done(msgspec.Struct, tag=True):
    """A call without a result is finished."""


class Finished(msgspec.Struct, tag=True):
    """One request of Generate has its completions; Done follows the last."""

    number: int
    completions: list[Completion]


class Logprobs(msgspec.Struct, tag=True):
    """The answer to Score."""

    logprobs: list[list[float]]


class Failure(msgspec.Struct, tag=True):
    """A call raised; the host lives on."""

    error: str
    traceback: str


Call = Load | Swap | Generate | Score | Sleep
Reply = Done | Finished | Logprobs | Failure
