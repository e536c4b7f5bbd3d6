"""API keys, which are read from the environment."""

from __future__ import annotations

import os

from stillhouse.errors import EndpointError


def api_key(key_env: str | None, *, where: str, setting: str) -> str | None:
    """Read an API key from the environment variable `key_env`; None if the server needs none.

    where: the endpoint. setting: the recipe key that names the variable. Raises EndpointError:
    the variable is not set, or its value cannot be a key.
    """
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise EndpointError(
            f"the environment variable {key_env} is not set; it should contain the endpoint's key",
            where=where,
            fix=f"export {key_env}=..., or remove {setting} if the server needs no key",
        )
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(
            f"the environment variable {key_env} contains characters that an API key cannot have",
            where=where,
            fix="copy the key again, without typographic quotes, ellipses, or line breaks",
        )
    return key
