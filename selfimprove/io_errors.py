"""What the disk says, told from what is our mistake: SQLite and safetensors hide it behind errors of their own."""

import errno
import os
import re
import sqlite3

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FAILED = frozenset({errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESTALE})


def of_the_disk(error: BaseException) -> OSError | None:
    """The operating system's error of a full or failing disk that this one stands for; None for any other."""
    number = _number(error)
    return OSError(number, os.strerror(number)) if number in FULL | FAILED else None


def _number(error: BaseException) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, sqlite3.OperationalError):
        primary = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says where it was
        return {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_IOERR: errno.EIO}.get(primary, 0)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1])
    return 0
