"""Where things are, for tests."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # real data with known right answers; users do not have it
