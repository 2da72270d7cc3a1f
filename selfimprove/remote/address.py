"""Addresses of stores: what they may be, and the file system that they name. A key has no place in one."""

import re
from pathlib import Path
from typing import Any

from selfimprove import masking
from selfimprove.errors import UserError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
LOGIN = "set up the credentials of the store's own tools (AWS_PROFILE, AWS_ACCESS_KEY_ID ...; gcloud auth, ...)"


def folder(address: str) -> Path | None:
    """The folder that a plain path or a file:// address names; None for any other address.

    Raises:
        UserError: it is no address of a store, or holds a secret, of which nothing is said.
    """
    if "://" not in address:
        return Path(address).expanduser().resolve()
    protocol, _, rest = address.partition("://")
    authority, path = re.split("/", rest + "/", maxsplit=1)
    port = authority.partition(":")[2]
    if masking.holds_secret(address) or "@" in authority or (port and not port.isdecimal()):
        raise UserError("the address of the store has a user, a key or a password in it", f"leave it out, and {LOGIN}")
    if protocol in ("file", "local"):
        return Path("/", path).resolve()
    if "::" in address or "?" in rest or "#" in rest or ".." in rest.split("/") or not authority.strip():
        raise UserError(f"{address} is no address of a store", "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or a folder")
    return None


def connect(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it; nothing is asked of it yet."""
    import fsspec  # takes a while, and most runs have no store

    protocol = address.partition("://")[0]
    extra = EXTRAS.get(protocol)
    try:
        found = fsspec.core.url_to_fs(address, use_listings_cache=False)  # what others write must be seen at once
    except ImportError as error:
        install = f"pip install 'selfimprove[{extra}]'" if extra else str(error)
        raise UserError(f"the store {address} needs a library that is not installed", install) from None
    except ValueError as error:
        raise UserError(f"{address} is no address of a store: {error}", "s3://, gs:// or a folder") from None
    return found[0], str(found[1])
