"""Executors and panels around models that a test has made."""

from pathlib import Path
from typing import Any

from selfimprove import data, recipe
from selfimprove.execution.inline import Inline
from selfimprove.execution.shard import Work
from selfimprove.judges.panel import Models
from selfimprove.store import row_seed

MODEL = data.SHIPPED["demo:model"]


class Given:
    """In the place of `engine.Engines`: hands out one model, whatever is wanted, and notes for what."""

    def __init__(self, model: Any) -> None:
        self.model, self.wanted = model, []

    def get(self, section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path) -> Any:
        self.wanted.append(("policy", model))
        return self.model

    def judge(self, section: recipe.Engine, machine: recipe.Machine, model: Path, log: Path, task: str) -> Any:
        self.wanted.append((task, model))
        return self.model

    def sleep(self) -> None:
        self.model.sleep()

    def close(self) -> None:
        self.model.close()


def inline(model: Any) -> Inline:
    """This process as the only worker, with a model that is there already."""
    return Inline(Given(model), recipe.Machine())  # type: ignore[arg-type]


def work(task: str, sampling: Any = None, **more: Any) -> Work:
    """A question to the embedded model."""
    settings: dict[str, Any] = {
        "task": task,
        "model": str(MODEL),
        "identity": "these weights",
        "engine": recipe.Engine(kind="fake").model_dump(mode="json"),
        "policy": str(MODEL),
        "logs": "logs",
        "sampling": sampling,
    }
    return Work(**{**settings, **more})


def models(model: Any, scratch: Path, **more: Any) -> Models:
    """A panel whose every local model is the given one."""
    settings = {
        "seed": lambda row: row_seed(0, 1, "label", row),
        "engine_section": recipe.Engine(kind="fake"),
        "servers": {},
        "paths": {"current": MODEL},
        "identities": {"current": "these weights"},
        "executor": inline(model),
        "policy": MODEL,
        "logs": scratch,
        "scratch": scratch,
        "cache": scratch,
        "account": "test",
        "progress": lambda what, done, total: None,
    }
    return Models(**{**settings, **more})
