"""What a driver and its worker processes say to each other, as msgpack frames over a socket pair."""

import msgspec


class Carry(msgspec.Struct, tag=True):
    """Carry out a shard whose question lies in the folder."""

    folder: str
    shard: str
    only: list[int] | None = None  # rows


class Sleep(msgspec.Struct, tag=True):
    """Let the engines give the device's memory back."""

    work: bytes  # shard.Work


class Stop(msgspec.Struct, tag=True):
    """The user asked to stop: begin nothing new, finish what was begun."""


class Answered(msgspec.Struct, tag=True):
    """So many rows of the shard have an answer."""

    count: int


class Done(msgspec.Struct, tag=True):
    """The call is carried out."""


class Stopped(msgspec.Struct, tag=True):
    """It was not, since the user asked to stop."""


class Failed(msgspec.Struct, tag=True):
    """It cannot be; `hint` is None for what is no mistake of the user's, and then the traceback is in the log."""

    message: str
    hint: str | None


Call = Carry | Sleep | Stop
Reply = Answered | Done | Stopped | Failed
