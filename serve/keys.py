"""API keys: who may read, who may administer. The configuration holds their hashes, never the keys.

    python -m serve.keys team-a [--admin]      # prints a new key, and the line for the configuration

A key is 256 random bits, so a plain sha256 of it cannot be guessed backwards.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from taskspec.sections import Section

Scope = Literal["read", "admin"]


class Key(Section):
    """One key, as the configuration has it."""

    name: str
    """Who has it; logs and the log of flips carry it."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = ("read",)
    """`read`: ask. `admin`: ask, and change what an alias points to."""


def find_key(keys: Sequence[Key], secret: str) -> Key | None:
    """The key that this is; every key is compared, in constant time."""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def presented(authorization: str | None, api_key: str | None) -> str | None:
    """The secret in `Authorization: Bearer …` or `X-API-Key: …`."""
    if authorization is not None and authorization[:7].lower() == "bearer ":
        return authorization[7:].strip()
    return api_key


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make an API key. It is shown once; the configuration keeps its hash.")
    parser.add_argument("name", help="who will have it")
    parser.add_argument("--admin", action="store_true", help="may also change what an alias points to")
    arguments = parser.parse_args(argv)
    secret = secrets.token_urlsafe(32)
    scopes: tuple[Scope, ...] = ("read", "admin") if arguments.admin else ("read",)
    key = Key(name=arguments.name, sha256=hashlib.sha256(secret.encode()).hexdigest(), scopes=scopes)
    print(f"key: {secret}\nkeys: [{json.dumps(key.model_dump(mode='json'))}]")


if __name__ == "__main__":
    main()
