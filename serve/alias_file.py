"""The file that says which version an alias points to: the truth that outlives processes, shared by endpoints.

Path: [here] ← aliases.  `<folder>/<alias>.json`, changed by compare-and-swap, and `<folder>/<alias>/log/…json`, to
which is only added.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

from serve.asks import Version
from serve.errors import Conflict
from serve.versions import Served, Table, reopen_version
from taskspec import store


class AliasFile:
    """One alias's file and log."""

    def __init__(self, folder: str, alias: str) -> None:
        self.uri = store.join(folder, f"{alias}.json")
        self._log = store.join(folder, alias, "log")
        self._held: bytes | None = None

    def read(self) -> Table | None:
        """What it says now; None if there is none yet, or if it is as it was read or written last.

        Raises: StoreError; ArtifactError, ContractError if a version is not there any more as it was.
        """
        if not store.exists(self.uri):
            return None
        content = store.read_bytes(self.uri)
        if content == self._held:
            return None
        tree = json.loads(content)
        table = Table(
            tree["revision"],
            _served(tree["current"]),
            _served(tree["candidate"]) if tree["candidate"] else None,
            tree["shares"],
            tree["shadow"],
            tuple(Version(**version) for version in tree["last"]),
        )
        self._held = content
        return table

    def write(self, table: Table) -> None:
        """Raises: Conflict if somebody else has changed it since it was read or written; StoreError."""
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
    return reopen_version(Version(**tree))[0]


def _fields(version: Version) -> dict[str, str]:
    return {"id": version.id, "checkpoint": version.checkpoint, "index": version.index}
