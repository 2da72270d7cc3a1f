"""Where a model is: shipped, in a local directory, or on the hub."""

import contextlib
import json
import re
from pathlib import Path

from selfimprove import data, textfile
from selfimprove.errors import UserError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def is_hub_id(name: str) -> bool:
    """Whether a model's name is neither shipped nor local and looks like `org/name`."""
    local = name in data.SHIPPED or bool(textfile.there(name))
    return not local and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def locate_model(name: str, revision: str | None = None) -> Path:
    """The directory of a model: shipped (`demo:model`), local, or downloaded from the hub.

    A `revision` (a commit) is taken from the cache where it is there, so that a run keeps the weights it began with.

    Raises:
        UserError: no such directory, no weights in it, or the hub does not have it.
    """
    if name in data.SHIPPED:
        directory = data.SHIPPED[name]
    elif textfile.there(name) == "directory":
        directory = Path(name).resolve()
    elif is_hub_id(name):
        directory = _download(name, revision)
    else:
        raise UserError(f"no model directory '{name}'", "--model takes a local directory or a hub id (org/name)")
    check_files(directory)
    return directory


def check_files(directory: Path) -> None:
    """Refuse what could run code when it is opened: pickled weights, and models with code of their own.

    Raises:
        UserError: no safetensors, or an architecture that transformers does not know itself.
    """
    if not list(directory.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
        raise UserError(
            f"model {directory} has no .safetensors weights"
            + (f", only {pickled[0]}, and whoever opens a pickle runs what is written in it" if pickled else ""),
            "save it with save_pretrained, which writes safetensors",
        )
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever loads it says what is wrong
    if isinstance(config, dict) and config.get("auto_map"):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if config.get("model_type") not in CONFIG_MAPPING_NAMES:
            raise UserError(
                f"model {directory} needs code of its own (trust_remote_code), which is not run",
                "take a model of an architecture that transformers has",
            )


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    import huggingface_hub.errors as hub

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    twice = ["consolidated*", "original/*"]  # the same weights in another layout
    if revision:
        with contextlib.suppress(hub.LocalEntryNotFoundError):
            return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=twice)
        )
    except (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, hub.HFValidationError, OSError) as error:
        raise UserError(
            f"'{name}' is no local directory and the hub did not give it: {type(error).__name__}",
            "check the name and the network, or give --model a local directory",
        ) from None
