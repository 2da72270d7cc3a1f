"""What the driver and the vLLM host process say to each other, as msgpack frames over a socket pair."""

from typing import Literal

import msgspec

from selfimprove.engine.protocol import Completion, Options, Request, Sampling


class Load(msgspec.Struct, tag=True):
    """Build the engine on these weights: one that writes, or one that reads off a reward."""

    model: str
    options: Options
    task: Literal["generate", "reward"] = "generate"


class Swap(msgspec.Struct, tag=True):
    """Load other weights into the engine that runs."""

    model: str


class Generate(msgspec.Struct, tag=True):
    """Sample completions."""

    requests: list[Request]
    sampling: Sampling


class Stop(msgspec.Struct, tag=True):
    """Begin no further request of the Generate that runs, and answer when those begun are finished; has no reply."""


class Score(msgspec.Struct, tag=True):
    """Log-probabilities of given tokens."""

    sequences: list[list[int]]


class Reward(msgspec.Struct, tag=True):
    """Rewards of given sequences."""

    sequences: list[list[int]]


class Sleep(msgspec.Struct, tag=True):
    """Release the device's memory."""


class Wake(msgspec.Struct, tag=True):
    """Take it again, with the weights that were there; an engine whose weights change wakes by Swap."""


class Done(msgspec.Struct, tag=True):
    """A call without a result is finished."""


class Finished(msgspec.Struct, tag=True):
    """One request of Generate has its completions; Done follows the last, or the last that was begun before Stop."""

    number: int
    completions: list[Completion]


class Beat(msgspec.Struct, tag=True):
    """The engine made a step; said about once a second, so that one that hangs can be told from one that works."""


class Logprobs(msgspec.Struct, tag=True):
    """The answer to Score."""

    logprobs: list[list[float]]


class Rewards(msgspec.Struct, tag=True):
    """The answer to Reward."""

    rewards: list[float]


class Failure(msgspec.Struct, tag=True):
    """A call raised; the host lives on."""

    error: str
    traceback: str


Call = Load | Swap | Generate | Stop | Score | Reward | Sleep | Wake
Reply = Done | Finished | Beat | Logprobs | Rewards | Failure
