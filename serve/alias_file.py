"""The file that says which version an alias points to: the truth that outlives processes, shared by endpoints.

Path: [here] ← aliases.  `<folder>/<alias>.json`, changed by compare-and-swap, and `<folder>/<alias>/log/…json`, to
which is only added.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NamedTuple

from serve.asks import Version
from serve.errors import Conflict
from serve.versions import Served, Table, reopen_version
from taskspec import store
from taskspec.errors import StoreError


class Found(NamedTuple):
    """What was read."""

    table: Table
    content: bytes


class AliasFile:
    """One alias's file and log."""

    def __init__(self, folder: str, alias: str) -> None:
        self.uri = store.join(folder, f"{alias}.json")
        self._log = store.join(folder, alias, "log")
        self._held: bytes | None = None
        """None expects that there is no file."""

    def read(self) -> Found | None:
        """What it says now; None if there is none, which is held from then on, or if it says what is held.

        Raises: StoreError; ArtifactError, ContractError if a version is not there any more as it was.
        """
        if not store.exists(self.uri):
            self._held = None
            return None
        content = store.read_bytes(self.uri)
        if content == self._held:
            return None
        try:
            tree = json.loads(content)
            table = Table(
                tree["revision"],
                _served(tree["current"]),
                _served(tree["candidate"]) if tree["candidate"] else None,
                tree["shares"],
                tree["shadow"],
                tuple(Version(**version) for version in tree["last"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.uri}: is no alias of this version of taskspec ({type(error).__name__} {error}); remove it, and "
                f"the endpoint writes it anew"
            ) from error
        return Found(table, content)

    def hold(self, found: Found) -> None:
        """From now on that is what the file is expected to say."""
        self._held = found.content

    def write(self, table: Table) -> None:
        """Raises: Conflict if it says something else than what is held; StoreError."""
        tree = {
            "revision": table.revision,
            "current": _fields(table.current.version),
            "candidate": table.candidate and _fields(table.candidate.version),
            "shares": table.shares,
            "shadow": table.shadow,
            "last": [_fields(version) for version in table.opened],
        }
        content = json.dumps(tree, indent=1).encode()
        # A write that was repeated finds itself.
        if not store.swap(self.uri, self._held, content) and store.read_bytes(self.uri) != content:
            raise Conflict(f"{self.uri} was changed by another endpoint, which this one follows; ask for its state")
        self._held = content

    def log(self, **entry: Any) -> None:
        """Adds an entry under the time of now.    Raises: StoreError."""
        now = datetime.datetime.now(datetime.UTC)
        name = store.join(self._log, f"{now.strftime('%Y%m%dT%H%M%S.%fZ')}.json")
        store.write_bytes(name, json.dumps({"time": now.isoformat(), **entry}, indent=1).encode())


def _served(tree: dict[str, str]) -> Served:
    return reopen_version(Version(**tree))


def _fields(version: Version) -> dict[str, str]:
    return {"id": version.id, "checkpoint": version.checkpoint, "index": version.index}
