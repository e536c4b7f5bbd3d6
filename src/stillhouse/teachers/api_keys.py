"""The key of an API: read from the environment, in one place."""

from __future__ import annotations

import os

from stillhouse.errors import EndpointError


def api_key(key_env: str | None, *, where: str, setting: str) -> str | None:
    """The key in the environment variable `key_env`; None if the server needs none.

    where: the endpoint. setting: the recipe key that names the variable. Raises EndpointError:
    the variable is not set, or its value cannot be a key.
    """
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise EndpointError(
            f"the environment variable {key_env} is not set, and holds the endpoint's key",
            where=where,
            fix=f"export {key_env}=..., or remove {setting} if the server needs no key",
        )
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(
            f"the environment variable {key_env} holds characters that no key has",
            where=where,
            fix="copy the key again: quotes, dots or line breaks may have come along",
        )
    return key
