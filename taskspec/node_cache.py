"""This node's cache: what artifacts on S3 hold, and what is made of artifacts to be read fast.

Path: store → [here] → artifacts, prepared data.  `files/<sha256>` is the content of a file, `artifacts/<id>` and
`rows/<id>` are entries: folders of one artifact, the first made of links to contents. Everything in here can be made
again, so it grows until a tenth of the disk is left, or to $TASKSPEC_CACHE_BYTES, and then gives way, what was opened
longest ago first.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from taskspec import store
from taskspec.errors import ArtifactError

FREE_SHARE = 0.1
"""Of the disk, that is left to others."""
RECENT_S = 24 * 3600.0
"""What was opened so lately stays: somebody may be about to read it."""
AREAS = ("artifacts", "rows")


def folder() -> Path:
    """$TASKSPEC_CACHE, else ~/.cache/taskspec."""
    return Path(os.environ.get("TASKSPEC_CACHE") or Path.home() / ".cache" / "taskspec")


def entry(area: Literal["artifacts", "rows"], artifact_id: str) -> Path:
    """The folder of one artifact, opened now."""
    path = folder() / area / artifact_id
    path.mkdir(parents=True, exist_ok=True)
    os.utime(path)
    return path


def fetch(uri: str, artifact_id: str, files: Mapping[str, str], verify: bool) -> Path:
    """Puts files of an artifact on S3 into the cache.

    Args: files: name → sha256. verify: compare what is there already too.
    Returns: a folder in which they have their names.    Raises: ArtifactError naming an altered file, StoreError.
    """
    place = entry("artifacts", artifact_id)
    for name, sha256 in files.items():
        content = _content(store.join(uri, name), sha256, verify, f"{uri}: {name}")
        named = place / name
        if not (named.exists() and named.samefile(content)):
            named.parent.mkdir(parents=True, exist_ok=True)
            temporary = named.with_name(f".{named.name}.{uuid.uuid4().hex}")
            os.link(content, temporary)
            try:
                os.replace(temporary, named)
            finally:
                temporary.unlink(missing_ok=True)  # where another process was faster both are one file, and both stay
    return place


def _content(uri: str, sha256: str, verify: bool, what: str) -> Path:
    """The cached content of a file; artifacts that share it, such as two versions of an index, fetch it once.

    A cached file that has been altered is fetched again.
    """
    content = folder() / "files" / sha256
    content.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{content}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of a node want the same file at the same time
        if content.exists() and not (verify and store.file_sha256(content) != sha256):
            os.utime(content)
            return content
        make_room(store.size(uri))
        temporary = content.with_name(f".{sha256}.{uuid.uuid4().hex}")
        try:
            store.download(uri, temporary)
            if store.file_sha256(temporary) != sha256:
                raise ArtifactError(f"{what} is not the file in the manifest (sha256); publish it again")
            os.replace(temporary, content)
        finally:
            temporary.unlink(missing_ok=True)
    return content


def make_room(size: int) -> None:
    """Removes entries until a file of `size` bytes fits, in $TASKSPEC_CACHE_BYTES where that is set, and a share of the
    disk stays free, or none is old enough.

    A pod does not see its own limit: its disk is its node's. A file that a process has mapped stays readable there, and
    takes its room until it is closed.
    """
    disk = shutil.disk_usage(folder())
    wanted = size + FREE_SHARE * disk.total - disk.free
    if most := os.environ.get("TASKSPEC_CACHE_BYTES"):
        wanted = max(wanted, size + _held() - float(most))
    if wanted <= 0:
        return
    entries = [one for area in AREAS if (folder() / area).exists() for one in (folder() / area).iterdir()]
    for place in sorted(entries, key=_opened):
        if wanted <= 0 or not _is_old(place):
            return
        wanted -= _remove(place)


def _held() -> int:
    """Bytes of all files in here, those with several names once."""
    found = {}
    for place, _, names in os.walk(folder()):
        for name in names:
            with suppress(FileNotFoundError):
                file = os.stat(os.path.join(place, name))
                found[file.st_ino] = file.st_size
    return sum(found.values())


def _remove(place: Path) -> int:
    """Takes an entry away, and contents that no other has.    Returns: the bytes that are free by that."""
    freed = 0
    with suppress(FileNotFoundError):  # another process takes it away too
        freed = sum(one.stat().st_size for one in place.rglob("*") if one.is_file() and one.stat().st_nlink == 1)
    shutil.rmtree(place, ignore_errors=True)
    for content in (folder() / "files").glob("*"):  # there is none yet where all artifacts are local
        if content.suffix != ".lock" and _is_old(content):
            freed += _remove_content(content)
    return freed


def _remove_content(content: Path) -> int:
    """Takes a content away that no entry has, or what a killed download left.    Returns: the bytes that are free."""
    with open(f"{content}.lock", "w") as lock, suppress(FileNotFoundError, BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = content.stat()
        if found.st_nlink == 1 and _is_old(content):
            content.unlink()
            return found.st_size
    return 0


def _opened(path: Path) -> float:
    """When, in seconds since the epoch; a path that has gone meanwhile comes first."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _is_old(path: Path) -> bool:
    return _opened(path) < time.time() - RECENT_S
