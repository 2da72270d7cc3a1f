"""The embedded default: a small world with checkable answers, its data, and a tiny base model trained on it.

Import `world`, `data` or `build` as needed; nothing is imported here, because `build` needs torch and `world` does not.
"""

from pathlib import Path

DATA = Path(__file__).parent / "data"
MODEL = Path(__file__).parent / "model"
