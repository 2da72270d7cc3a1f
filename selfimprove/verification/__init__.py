"""Whether a finished run is what it says: every file, every row, and every number that follows from others.

`verify` tells what is wrong, a sentence each; `repair` sets aside what is broken and what was made from it.
"""

from selfimprove.verification.checking import Found, Problem, verify
from selfimprove.verification.repairing import Repaired, repair

__all__ = ["Found", "Problem", "Repaired", "repair", "verify"]
