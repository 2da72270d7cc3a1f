"""Where a training's metrics may be shown besides metrics.jsonl: tensorboard, wandb, trackio, behind one `log`."""

import contextlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from selfimprove.errors import UserError

PROJECT = "selfimprove"  # under which wandb and trackio list the runs
OFFLINE = "wandb login; or WANDB_MODE=offline, and wandb sync later"


class Tracker(Protocol):
    """Takes a training's metrics, one call per optimiser step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step; steps rise from call to call."""

    def close(self) -> None:
        """Write what is pending."""


class TensorBoard:
    """Event files in `directory`/tensorboard."""

    def __init__(self, module: Any, directory: Path, run_name: str, config: Mapping[str, Any]) -> None:
        self.writer = module.SummaryWriter(str(directory / "tensorboard" / run_name))
        # four spaces make it a code block in the Markdown that the dashboard shows
        self.writer.add_text("config", "\n".join("    " + line for line in _json(config).splitlines()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar a metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


class Wandb:
    """A wandb run; online, offline or disabled as the user's WANDB_MODE says, its files in `directory`."""

    def __init__(self, module: Any, directory: Path, run_name: str, config: Mapping[str, Any]) -> None:
        try:
            self.run = module.init(project=PROJECT, name=run_name, dir=str(directory), config=dict(config))
        except module.Error as error:
            raise UserError(f"wandb begins no run: {error}", OFFLINE) from None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One call a step."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is pending."""
        self.run.finish()


class Trackio:
    """A trackio run, in trackio's own store: it takes no directory."""

    def __init__(self, module: Any, directory: Path, run_name: str, config: Mapping[str, Any]) -> None:
        with _talk_on_stderr():
            self.run = module.init(project=PROJECT, name=run_name, config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One call a step."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Write what is pending."""
        with _talk_on_stderr():
            self.run.finish()


# name, which is also the pip extra's: the module it needs, what opens it
TRACKERS: dict[str, tuple[str, type[TensorBoard] | type[Wandb] | type[Trackio]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
}


def open_trackers(names: Sequence[str], directory: Path, run_name: str, config: Mapping[str, Any]) -> list[Tracker]:
    """Open trackers by name; nothing is opened unless all can be.

    Args:
        names: keys of TRACKERS.
        directory: for what they write.
        run_name: as it is to be listed.
        config: JSON-able settings to show beside the metrics.

    Raises:
        UserError: a name that is not known, or a package that is not installed.
    """
    modules = [module_of(name) for name in names]
    return [TRACKERS[name][1](module, directory, run_name, config) for name, module in zip(names, modules, strict=True)]


def check(name: str) -> None:
    """Whether a tracker could be opened, as far as it can be known without the network.

    Raises:
        UserError: no such tracker, its package is not installed, or wandb is to be online and has no API key.
    """
    module = module_of(name)
    if name == "wandb":
        mode = module.setup().settings.mode
        if mode not in ("offline", "disabled") and not module.login(prompt=False, verify=False):
            raise UserError("the tracker wandb has no API key", OFFLINE)


def module_of(name: str) -> Any:
    """The module that a tracker needs.

    Raises:
        UserError: no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise UserError(f"no tracker is called {name}", f"known: {', '.join(TRACKERS)}")
    try:
        return importlib.import_module(TRACKERS[name][0])
    except ModuleNotFoundError:
        raise UserError(
            f"the tracker {name} needs a package that is not installed", f"pip install 'selfimprove[{name}]'"
        ) from None


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, default=str)


def _talk_on_stderr() -> contextlib.AbstractContextManager[Any]:
    """Trackio greets on stdout, which is for data."""
    return contextlib.redirect_stdout(sys.stderr)
