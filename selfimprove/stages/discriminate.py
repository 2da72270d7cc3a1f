"""D2PO's discriminator (arXiv 2405.01511)."""

from selfimprove import recipe
from selfimprove.stages.io import StageIO

VERSION = 1
TEMPLATES: tuple[str, ...] = ()
DISCRIMINATOR = "discriminator"


def run(io: StageIO, section: recipe.Discriminate) -> None:
    """Write verdicts-*.parquet and the discriminator."""
    raise NotImplementedError
