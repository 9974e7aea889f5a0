"""Artifacts: folders that are there whole or not at all, each with a manifest of what it is and came from.

Path: store → [here] → every job.  An artifact is a folder whose `manifest.json` is written last. It is prepared in a
local temporary folder and published whole: by rename on a file system, with the manifest as the last object on S3.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import taskspec
from taskspec import node_cache, store
from taskspec.config import canonical_sha256
from taskspec.errors import ArtifactError, StoreError

MANIFEST = "manifest.json"
_MARKER = ".publishing"
"""Object that stands in a prefix on S3 while an artifact is written there."""
FORMAT_VERSION = 1
WORK = ".publishing-"
"""Begins the name of a local folder in which an artifact is prepared."""
ABANDONED_S = 3600.0
"""A folder that nobody has locked may be one that was made this moment; not after so long."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact is, what it came from and what it holds."""

    kind: str
    """prepared-data, negatives, checkpoint, index-shard, index, evaluation."""
    format_version: int
    created: str
    """UTC, ISO 8601."""
    inputs: Mapping[str, str]
    """Name → id of each artifact (or sha256 of each file) that it was made from."""
    config: Mapping[str, Any]
    """The resolved configuration."""
    files: Mapping[str, str]
    """Relative path → sha256."""
    facts: Mapping[str, Any]
    """What the kind adds: counts, contract, measured figures."""
    code: str = ""
    """Which states of the library made it, as `code_id` names them, in their order; "" where that is not known."""

    @property
    def id(self) -> str:
        """sha256 (hex) over kind, inputs, files and facts: equal content has the same id, whenever it was made."""
        return canonical_sha256([self.kind, self.format_version, self.inputs, self.files, self.facts])


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: where it is, its manifest, and a local folder with its files."""

    uri: str
    manifest: Manifest
    folder: Path

    @property
    def id(self) -> str:
        return self.manifest.id


@contextmanager
def publishing(
    uri: str,
    kind: str,
    *,
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    facts: dict[str, Any],
    begun_by: str = "",
) -> Iterator[Path]:
    """Gives a local folder to write into; on leaving without an error the folder becomes the artifact at `uri`.

    `facts` is read on leaving, so the writer may fill it. `begun_by` is the `Manifest.code` of what it goes on from. An
    error inside leaves nothing behind, and what a killed process left goes when the next one publishes there. What
    stood at `uri` before is replaced: on a file system once the new one is complete, on S3 it goes when uploading
    begins.
    Raises: StoreError when the disk is full, when something that is no artifact stands at `uri`, or when another
        process has begun to upload there.
    """
    old = Path(f"{uri.rstrip('/')}.replaced")
    if not store.is_s3(uri) and old.exists() and not Path(uri).exists():
        os.rename(old, uri)  # a process was killed while it replaced the artifact
    _require_replaceable(uri)
    parent = Path(tempfile.gettempdir() if store.is_s3(uri) else Path(uri).absolute().parent)
    with store.named(uri, "written"):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        work = Path(tempfile.mkdtemp(prefix=WORK, dir=parent))
        lock = os.open(work, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks here, on NFS say: then what is left stays
            fcntl.flock(lock, fcntl.LOCK_EX)  # it ends with the process, however that ends
        try:
            yield work
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                places = f"prepared in {parent}, scratch in {tempfile.gettempdir()}"
                raise StoreError(f"{uri}: cannot be written ({places}): {error}") from error
            raise
        _require_replaceable(uri)
        with store.named(uri, "written"):
            names = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
            manifest = Manifest(
                kind=kind,
                format_version=FORMAT_VERSION,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                inputs=dict(inputs),
                config=dict(config),
                files={name: store.file_sha256(work / name) for name in names},
                facts=facts,
                code=joined_code(begun_by, code_id()),
            )
            text = json.dumps(vars(manifest), indent=1, ensure_ascii=False)
            (work / MANIFEST).write_text(text, encoding="utf-8")
            if store.is_s3(uri):
                _upload(work, uri, names)
            else:
                os.chmod(work, 0o755)
                shutil.rmtree(old, ignore_errors=True)
                with suppress(FileNotFoundError):
                    os.rename(uri, old)
                os.rename(work, uri)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


@cache
def code_id() -> str:
    """The library's version and 8 hex characters of its source's sha256."""
    root = Path(taskspec.__file__).parent
    source = {str(path.relative_to(root)): store.file_sha256(path) for path in sorted(root.rglob("*.py"))}
    return f"{taskspec.__version__}+{canonical_sha256(source)[:8]}"


def joined_code(*codes: str) -> str:
    """One `Manifest.code` of several, each state once."""
    return ", ".join(dict.fromkeys(state for code in codes for state in code.split(", ") if state))


def _remove_abandoned(parent: Path) -> None:
    """Takes away what killed processes were preparing here."""
    for work in parent.glob(f"{WORK}*"):
        with suppress(OSError):  # of a process that lives, or gone meanwhile
            lock = os.open(work, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(work).st_mtime < time.time() - ABANDONED_S:
                    shutil.rmtree(work)
            finally:
                os.close(lock)


def _require_replaceable(uri: str) -> None:
    """Guards a folder that is no artifact, a home folder say, from being replaced by one."""
    if not any(store.exists(store.join(uri, name)) for name in (MANIFEST, _MARKER)) and not store.is_empty(uri):
        raise StoreError(f"{uri}: stands already and is no artifact; remove it or name another place")


def _upload(work: Path, uri: str, names: list[str]) -> None:
    """Puts an artifact on S3, its manifest last; the marker lets the next try replace a broken one, and tells who began
    last: of two writers only that one's manifest comes."""
    marker, mine = store.join(uri, _MARKER), uuid.uuid4().hex.encode()
    store.write_bytes(marker, mine)
    stale = store.list_files(uri)
    if store.join(uri, MANIFEST) in stale:
        store.delete(store.join(uri, MANIFEST))
    current = [store.join(uri, name) for name in [*names, MANIFEST]]
    for name, target in zip([*names, MANIFEST], current, strict=True):
        if name == MANIFEST and (not store.exists(marker) or store.read_bytes(marker) != mine):
            raise StoreError(f"{uri}: another process publishes there at the same time; let one of them finish")
        store.upload(work / name, target)
    for old in set(stale).difference(current):
        store.delete(old)


def remove(uri: str) -> None:
    """Removes a folder with all that is in it, its manifest first: a half-removed artifact is none."""
    if store.is_s3(uri):
        for name in sorted(store.list_files(uri), key=lambda name: not name.endswith("/" + MANIFEST)):
            store.delete(name)
        return
    with store.named(uri, "removed"):
        if Path(uri).exists():
            (Path(uri) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(uri)


def read_manifest(uri: str, kind: str) -> Manifest:
    """The manifest of an artifact of that kind. Raises: ArtifactError naming what is wrong and the way out."""
    name = store.join(uri, MANIFEST)
    if not store.exists(name):
        if not store.list_files(uri):
            raise ArtifactError(f"{uri}: does not exist, or is empty; needed here: {kind}")
        raise ArtifactError(f"{uri}: holds no {MANIFEST}, so it is no complete {kind}; make it again")
    try:
        manifest = Manifest(**json.loads(store.read_bytes(name)))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{name}: is damaged ({error}); make the {kind} again") from error
    if manifest.kind != kind:
        raise ArtifactError(f"{uri}: holds {manifest.kind}; needed here: {kind}")
    if manifest.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{uri}: has format version {manifest.format_version}, this taskspec reads {FORMAT_VERSION}; make it again"
        )
    return manifest


def standing(uri: str, kind: str, *, inputs: Mapping[str, str], config: Mapping[str, Any]) -> Manifest | None:
    """The manifest of an artifact that stands there, made of the same inputs with the same values; says that it does.

    Args: config: the dotted keys of the configuration that decide its content → their values.
    """
    if not store.exists(store.join(uri, MANIFEST)):
        return None
    manifest = read_manifest(uri, kind)
    if manifest.inputs != inputs or any(_value(manifest.config, key) != value for key, value in config.items()):
        return None
    print(f"{uri}: stands already for the same inputs", flush=True)
    return manifest


def _value(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def open_artifact(uri: str, kind: str, *, verify: bool = False, files: Iterable[str] | None = None) -> Artifact:
    """Opens an artifact of that kind; files on S3 are fetched once into the cache of this node.

    Args: verify: compare the sha256 of every file, whole or in the cache (a file just fetched always is compared).
        files: only these are needed here; None is all.
    Raises: ArtifactError naming the missing, truncated or altered file.
    """
    manifest = read_manifest(uri, kind)
    try:
        needed = manifest.files if files is None else {name: manifest.files[name] for name in files}
    except KeyError as error:
        raise ArtifactError(f"{uri}: {error.args[0]} is not in the manifest; make the {kind} again") from error
    if store.is_s3(uri):
        return Artifact(uri, manifest, node_cache.fetch(uri, manifest.id, needed, verify))
    for name, sha256 in needed.items():
        path = Path(uri) / name
        if not path.is_file():
            raise ArtifactError(f"{uri}: {name} is missing; make the {kind} again")
        if verify and store.file_sha256(path) != sha256:
            raise ArtifactError(f"{uri}: {name} is not the file in the manifest (sha256); make the {kind} again")
    return Artifact(uri, manifest, Path(uri))


def require_whole(uri: str, kind: str) -> Manifest:
    """Reads all of an artifact on this machine; one on S3 is not fetched, only its files must be there.

    Returns: its manifest.    Raises: ArtifactError naming the missing or altered file.
    """
    if not store.is_s3(uri):
        return open_artifact(uri, kind, verify=True).manifest
    manifest = read_manifest(uri, kind)
    there = set(store.list_files(uri))
    for name in sorted(manifest.files):
        if store.join(uri, name) not in there:
            raise ArtifactError(f"{uri}: {name} is missing; make the {kind} again")
    return manifest
