"""What judging while answers are written saves: the stages generate and label together, with it and without, in turn.

The embedded default on real vLLM (CPU), and a judge on a server of this machine that takes a while for each reply, as
one over a network does.

    python -m tests.bench.ahead [--prompts 1200] [--seconds 0.1] [--repeats 3]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from selfimprove import recipe_file, run
from selfimprove.execution import Executors
from selfimprove.store import Run, read_manifest
from tests.judges.misbehaving import Asked, Handler, Server


def measure(prompts: int, server: Server, executors: Executors, name: str) -> tuple[float, float]:
    """Seconds of generate and of label in a run of one round."""
    settings = [
        f"synthesize.prompts={prompts}",
        "label.judge={name='rubric', model='server:s', template='demo', max_tokens=8}",
        f"servers.s={{url='{server.url}', model='m'}}",
    ]
    chosen, at = recipe_file.load(recipe_file.find("default"), settings), Run(Path(name))
    run.iterate(at, chosen, mock.Mock(), [], executors, selection=run.select(chosen, None, "1/label", None))
    manifests = [read_manifest(at.path / "iter-001" / stage) for stage in ("2-generate", "3-label")]
    generate, label = (manifest.seconds for manifest in manifests if manifest)
    return generate, label


def slow(seconds: float) -> Callable[[Handler, Asked, int], None]:
    """A judge that takes so long for a reply."""

    def behave(handler: Handler, asked: Asked, number: int) -> None:
        time.sleep(seconds)
        score = sum(asked.text.encode()) % 6
        handler.answer(asked, message={"role": "assistant", "content": f"Score: {score}"})

    return behave


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder, Server(slow(chosen.seconds)) as server, Executors() as executors:
        os.chdir(folder)
        for repeat in range(chosen.repeats):
            took = {}
            for arm in ("ahead", "after"):
                if arm == "after":
                    with mock.patch.object(run, "can_begin", return_value=False):
                        took[arm] = measure(chosen.prompts, server, executors, f"{arm}{repeat}")
                else:
                    took[arm] = measure(chosen.prompts, server, executors, f"{arm}{repeat}")
                print(f"{arm}: generate {took[arm][0]:.1f} s, label {took[arm][1]:.1f} s", flush=True)
            ratios.append(sum(took["ahead"]) / sum(took["after"]))
    print(f"both stages, ahead to after: {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})")


if __name__ == "__main__":
    main()
