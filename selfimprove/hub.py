"""Pushing to the Hugging Face hub: only when asked, private unless said otherwise; tokens are never shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove.errors import UsageError, UserError

WEIGHTS, ROWS = ["*.safetensors", "*.safetensors.index.json"], ["data/*.parquet"]  # earlier ones must not stay


class Repo(NamedTuple):
    """The model repository and the dataset repository of this name."""

    name: str  # with its owner
    public: bool


def open_repo(name: str, public: bool) -> Repo:
    """Make both repositories, or find them, before anything is written.

    Raises:
        UsageError: no name of a repository.
        UserError: the hub is out of reach, refuses, or has one that is not as private as asked.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UsageError(f"--push {name}: no name of a repository", "--push OWNER/NAME") from None
    with _refusals(name):
        api = huggingface_hub.HfApi()
        api.whoami()  # raises where nobody is logged in
        for kind in ("model", "dataset"):
            name = api.create_repo(name, repo_type=kind, private=not public, exist_ok=True).repo_id
            private = bool(api.repo_info(name, repo_type=kind).private)
            if private == public:
                is_now, asked = ("private", "public") if private else ("public", "private")
                raise UserError(
                    f"the {kind} repository {name} is there already and is {is_now}, not {asked}",
                    "--push ANOTHER_NAME, or change it on the hub" + ("" if public else "; --public pushes to it"),
                )
    return Repo(name, public)


def push(repo: Repo, model: Path, card: Path, dataset: Path, message: str) -> list[str]:
    """Upload a model directory with its card, and a dataset; returns where they are.

    Raises:
        UserError: the hub is out of reach or refuses; what is on the disk stays.
    """
    import huggingface_hub
    from huggingface_hub import constants

    with _refusals(repo.name):
        api = huggingface_hub.HfApi()
        common: dict[str, Any] = {"repo_id": repo.name, "commit_message": message}
        api.upload_folder(**common, repo_type="model", folder_path=model, delete_patterns=WEIGHTS)
        api.upload_file(**common, repo_type="model", path_or_fileobj=card, path_in_repo="README.md")
        api.upload_folder(**common, repo_type="dataset", folder_path=dataset, delete_patterns=ROWS)
    where = constants.ENDPOINT
    return [f"{where}/{repo.name}", f"{where}/datasets/{repo.name}"]


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Whatever the hub's client raises as one sentence; its own words could quote a request."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise UserError("nobody is logged in to the hub", "hf auth login, or set HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = {401: "hf auth login, or set HF_TOKEN", 403: "a token that may write there: hf auth login"}
        raise UserError(
            f"the hub refused {name} (HTTP {status})", hint.get(status or 0, "try again, or --push ANOTHER_NAME")
        ) from None
    except (ConnectionError, TimeoutError, errors.HTTPError):  # type: ignore[attr-defined]
        raise UserError(
            "the hub is out of reach, so nothing can be pushed", "without --push the directory is written all the same"
        ) from None
