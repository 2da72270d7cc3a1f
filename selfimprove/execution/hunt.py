"""Which rows to try again after an engine died, until what it dies on is found: by halves, and then left out."""

from collections.abc import Sequence

from selfimprove.errors import UserError

MOST = 0.01  # share of a shard's rows that may be left out, and always LEAST: beyond it, it is not the rows
LEAST = 3


class Hunt:
    """The rows of a shard that are still to be answered, in portions.

    The first death is taken for an accident. After any other one, what is left of the portion is halved, even where
    some rows were answered before: the row that it dies on may stay among them for long. A row that an engine dies on
    alone is left out.

    Args:
        rows: their numbers.
        size: of the shard.
    """

    def __init__(self, rows: Sequence[int], size: int) -> None:
        self._portions = [list(rows)] if rows else []
        self._size = size
        self._forgiven = False
        self.halved = False
        self.lost: list[int] = []

    @property
    def more(self) -> bool:
        """Whether a portion is left."""
        return bool(self._portions)

    def next(self) -> list[int] | None:
        """The portion to try now; None where nothing is left."""
        return self._portions.pop() if self._portions else None

    def died(self, tried: Sequence[int], left: Sequence[int], error: UserError) -> None:
        """The engine died on these rows, and `left` of them are not answered.

        Raises:
            UserError: it dies on too many rows for them to be the cause.
        """
        if not left:
            return
        if not self._forgiven or (len(left) == 1 and len(tried) > 1):  # the last one was not alone yet
            self._forgiven = True
            self._portions.append(list(left))
        elif len(left) > 1:
            self.halved, middle = True, len(left) // 2
            self._portions += [list(left[middle:]), list(left[:middle])]
        else:
            self.lost += left
            if len(self.lost) > max(LEAST, MOST * self._size):
                raise UserError(
                    f"the engine dies on {len(self.lost)} rows one by one; the last time: {error.message}", error.hint
                )
