"""Versions of what is served, and the table by which a query finds the one that answers it.

Path: checkpoint + index → [here] → aliases, dispatch, deployments.  A version is an index and the checkpoint that built
it; its name comes from the index's content, so what stands at a URI can be told from what stood there.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from serve.asks import Version
from taskspec import artifacts
from taskspec.errors import ArtifactError
from taskspec.index.manifest import KIND, IndexManifest
from taskspec.model.contract import Contract
from taskspec.retrieve.catalog import index_version
from taskspec.train.checkpoint import KIND as CHECKPOINT
from taskspec.train.checkpoint import read_contract


@dataclass(frozen=True)
class Served:
    """What the routes know of a version."""

    version: Version
    contract: Contract
    index: IndexManifest


def open_version(checkpoint: str, index: str) -> Served:
    """What stands at two URIs.    Raises: ContractError, ArtifactError, StoreError."""
    contract, manifest = read_contract(checkpoint), artifacts.read_manifest(index, KIND)
    facts = IndexManifest.of(index, manifest)
    facts.require_built_by(contract, checkpoint, index)
    return Served(Version(index_version(manifest.id), checkpoint, index), contract, facts)


def reopen_version(version: Version) -> Served:
    """A version that was opened before, here or elsewhere.

    Raises: ArtifactError if another index stands there now; ContractError, StoreError.
    """
    served = open_version(version.checkpoint, version.index)
    require_version(served.version.id, version)
    return served


def require_whole(version: Version) -> None:
    """Raises: ArtifactError naming a file of the index or the checkpoint that is missing or not what it was."""
    artifacts.require_whole(version.index, KIND)
    artifacts.require_whole(version.checkpoint, CHECKPOINT)


def require_version(artifact_id: str, version: Version) -> None:
    """Raises: ArtifactError if that is the id of another index than the version's."""
    if index_version(artifact_id) != version.id:
        raise ArtifactError(
            f"{version.index}: holds version {index_version(artifact_id)} and no longer {version.id}; an index that is "
            f"served must stay as it is: build new ones in new folders"
        )


@dataclass(frozen=True)
class Table:
    """What the replicas go by."""

    revision: int
    current: Served
    candidate: Served | None = None
    shares: dict[str, int] = field(default_factory=dict)
    shadow: bool = False
    opened: tuple[Version, ...] = ()
    """Beside these two: what is being brought in, and the last one."""

    @property
    def versions(self) -> list[Version]:
        """To have open."""
        candidate = [self.candidate.version] if self.candidate else []
        return list(dict.fromkeys([self.current.version, *candidate, *self.opened]))

    def serving(self, task: str, text: str) -> Served:
        """The version that answers a request: the same one for the same first query."""
        if self.candidate and zlib.crc32(text.encode()) % 100 < self.shares.get(task, 0):
            return self.candidate
        return self.current
