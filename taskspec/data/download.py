"""One file of an HTTP server → one file on disk, whole or not there, however often the connection breaks.

Path: server → [here] → the files that reading names.  Bytes land in `<name>.<digest>.part` beside the file, which is
renamed once its length is right. The digest is of what tells one version of the file from another (length, and ETag or
Last-Modified), so a part goes on only where the server still has the same version, in this run or a later one.
Nothing of KILT is known here, and nothing is written to S3. Memory: one block.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Self
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from taskspec import __version__, store
from taskspec.config import canonical_sha256
from taskspec.errors import StoreError

BLOCK_BYTES = 1 << 20
TIMEOUT_S = 60.0
"""Longest silence of a server before the connection counts as broken."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Pauses after faults in a row; one more fault ends the download."""
LONGEST_PAUSE_S = 60.0
"""A server that asks for more patience (Retry-After) gets this much."""
PROGRESS_S = 5.0
"""Seconds between two progress lines."""

Say = Callable[[str], None]
"""Takes one line for the person who waits."""


class _PassingError(StoreError):
    """A fault that another try may mend; callers of this module see a plain StoreError after the last try."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class RemoteFile:
    """One version of a file on a server."""

    url: str
    size: int
    """Bytes."""
    validator: str | None
    """What If-Range takes: a strong ETag, else Last-Modified; without either a broken download starts anew."""

    @classmethod
    def look_up(cls, url: str, say: Say) -> Self:
        """Asks the server for the file's length and version, with retries.

        Raises: StoreError with the server's answer when it has no such file, cannot be reached or gives no length.
        """
        if not url.startswith(("http://", "https://")):
            raise StoreError(f"{url}: is no address to download from; one starts with http:// or https://")
        patience = _Patience(say)
        while True:
            try:
                with _open(url, "HEAD") as response:
                    return cls._of(response, url)
            except _PassingError as fault:
                patience.wait(fault)

    @classmethod
    def _of(cls, response: HTTPResponse, url: str) -> Self:
        headers = response.headers
        length = _range(response).rpartition("/")[2] if _is_partial(response) else headers["Content-Length"]
        if length is None or not length.isdecimal():
            raise StoreError(
                f"{url}: the server gives no length, so a broken download would look like a whole one; "
                f"name a server of plain files"
            )
        etag = headers["ETag"]
        strong = etag is not None and not etag.startswith("W/")
        return cls(url, int(length), etag if strong else headers["Last-Modified"])

    def part_of(self, path: Path) -> Path:
        """Where this version's bytes wait until they are all there."""
        digest = canonical_sha256([self.size, self.validator])[:12]
        return path.with_name(f"{path.name}.{digest}.part")

    def missing_bytes(self, path: Path) -> int:
        """What is still to be written for `path`, less what an earlier run left of this version."""
        part = self.part_of(path)
        return self.size - (part.stat().st_size if self.validator is not None and part.exists() else 0)


def download(remote: RemoteFile, path: Path, *, label: str, say: Say, sha256: str | None = None) -> None:
    """Fetches a file, going on with what an earlier run left of it. What stands at `path` is replaced at the end.

    An interruption (Ctrl-C too) keeps the part. If the server replaces the file meanwhile, the new one is fetched.
    Args: label: what progress lines call the file. sha256: what its content must have.
    Raises: StoreError when the server refuses or fails once more after all pauses, the disk is full, another process
        downloads the same file, or the sha256 differs.
    """
    patience = _Patience(say)
    progress = _Progress(label, say)
    most = 0
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            part = remote.part_of(path)
            with open(part, "ab") as file:
                _lock(file, path)
                _remove_other_parts(path, part)
                try:
                    _receive(remote, file, progress)
                except _PassingError as fault:
                    file.flush()
                    received = os.fstat(file.fileno()).st_size
                    if received > most:
                        patience.renew()
                    most = max(most, received)
                    patience.wait(fault)
                else:
                    file.flush()
                    os.fsync(file.fileno())
                    if sha256 is not None:
                        _require_part_sha256(part, remote.url, sha256)
                    os.replace(part, path)
                    break
            remote = RemoteFile.look_up(remote.url, say)
    progress.end(remote.size)


def require_room(needed: Mapping[Path, int]) -> None:
    """Compares what is to be written with what is free, for every file system.

    Args: needed: bytes to be written at each path.
    Raises: StoreError with both numbers.
    """
    folders: dict[int, Path] = {}
    totals: dict[int, int] = {}
    for path, size in needed.items():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        device = folder.stat().st_dev
        folders.setdefault(device, folder)
        totals[device] = totals.get(device, 0) + size
    for device, total in totals.items():
        free = shutil.disk_usage(folders[device]).free
        if free < total:
            raise StoreError(
                f"{folders[device]}: the download needs {show_bytes(total)} but {show_bytes(free)} are free; "
                f"make room, or name a folder on another disk with --out"
            )


def require_sha256(path: Path, sha256: str) -> None:
    """Raises: StoreError if a file that is there has another content."""
    found = store.file_sha256(path)
    if found != sha256:
        raise StoreError(f"{path}: its sha256 is {found}, not {sha256}; remove it and run the same command again")


def show_bytes(size: float) -> str:
    """A number of bytes with its unit, such as 34.8 GiB."""
    unit, name = _unit(size)
    return f"{_amount(size, unit)} {name}"


def _amount(size: float, unit: int) -> str:
    return f"{size / unit:.1f}" if unit > 1 else f"{size:.0f}"


def _unit(size: float) -> tuple[int, str]:
    units = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
    return next(((unit, name) for unit, name in units if size >= unit), (1, "B"))


def _receive(remote: RemoteFile, file: IO[bytes], progress: _Progress) -> None:
    """Appends what is missing. Raises: _PassingError when it ends too early, StoreError when it cannot end well."""
    received = file.seek(0, os.SEEK_END)
    if remote.validator is None or received > remote.size:
        received = _start_anew(file)
    progress.begin(received)
    if received == remote.size:
        return
    condition = {"Range": f"bytes={received}-", "If-Range": remote.validator or ""} if received else {}
    with _open(remote.url, "GET", condition) as response:
        # Compared here too: there are servers that know Range and pass over If-Range.
        same = RemoteFile._of(response, remote.url) == remote
        if not same or (_is_partial(response) and not _range(response).startswith(f"bytes {received}-")):
            raise _PassingError(f"{remote.url}: the file on the server changed meanwhile")
        if received and not _is_partial(response):  # the server knows no Range
            received = _start_anew(file)
            progress.begin(received)
        while received < remote.size:
            try:
                # What has come, at once: neither a slow line nor Ctrl-C loses more than a packet.
                block = response.read1(min(BLOCK_BYTES, remote.size - received))
            except (OSError, HTTPException) as error:
                raise _PassingError(_broken(remote, received, str(error))) from error
            if not block:
                raise _PassingError(_broken(remote, received, "closed by the server"))
            file.write(block)
            received += len(block)
            progress.show(received, remote.size)


def _is_partial(response: HTTPResponse) -> bool:
    return response.status == 206 and re.fullmatch(r"bytes \d+-\d+/\d+", _range(response)) is not None


def _range(response: HTTPResponse) -> str:
    return response.headers["Content-Range"] or ""


def _broken(remote: RemoteFile, received: int, reason: str) -> str:
    return f"{remote.url}: the connection broke after {received:,} of {remote.size:,} bytes ({reason})"


def _start_anew(file: IO[bytes]) -> int:
    file.truncate(0)
    return file.seek(0)


def _open(url: str, method: str, condition: Mapping[str, str] | None = None) -> HTTPResponse:
    headers = {"User-Agent": f"taskspec/{__version__}", **(condition or {})}
    try:
        response: HTTPResponse = urlopen(Request(url, method=method, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        with error:
            answer = f"{url}: the server answers {error.code} {error.reason}"
            # 416: the part is longer than what the server has now.
            if error.code in (408, 416, 429) or error.code >= 500:
                wish = error.headers["Retry-After"] or ""
                raise _PassingError(answer, float(wish) if wish.isdecimal() else 0.0) from error
            raise StoreError(
                f"{answer}: it has no such file, or does not give it; check the file names in the configuration, "
                f"or name another server with --base-url"
            ) from error
    except URLError as error:
        raise _PassingError(f"{url}: the server cannot be reached ({error.reason})") from error
    except (OSError, HTTPException) as error:
        raise _PassingError(f"{url}: the server does not answer ({error})") from error
    return response


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error.strerror}); mend it and run the same command again to go on"
        ) from error


def _lock(file: IO[bytes], path: Path) -> None:
    """Two writers would mix their bytes. The lock goes with the process that holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(f"{path}: another process downloads it; wait until it ends, or end it") from error


def _remove_other_parts(path: Path, part: Path) -> None:
    """Parts of versions that the server no longer has."""
    for other in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 12}.part"):
        if other != part:
            other.unlink(missing_ok=True)


def _require_part_sha256(part: Path, url: str, sha256: str) -> None:
    found = store.file_sha256(part)
    if found != sha256:
        part.unlink()
        raise StoreError(
            f"{url}: its sha256 is {found}, not {sha256}, so it was thrown away; "
            f"run the same command again, or correct the checksum"
        )


class _Patience:
    """Longer pauses after every fault in a row, until there have been too many."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._faults = 0

    def renew(self) -> None:
        self._faults = 0

    def wait(self, fault: _PassingError) -> None:
        if self._faults == len(PAUSES_S):
            raise StoreError(
                f"{fault}; that was try {self._faults + 1} of as many; run the same command again to go on, "
                f"or name another server with --base-url"
            ) from fault
        pause_s = min(max(PAUSES_S[self._faults], fault.retry_after_s), LONGEST_PAUSE_S)
        self._faults += 1
        self._say(f"{fault}; next try in {pause_s:.0f} s")
        time.sleep(pause_s)


class _Progress:
    """At most one line every `PROGRESS_S`, and one at the end."""

    def __init__(self, label: str, say: Say) -> None:
        self._label = label
        self._say = say
        self.begin(0)

    def begin(self, received: int) -> None:
        """A connection starts here: what was there before it is not its speed."""
        self._shown, self._shown_at = received, time.monotonic()

    def show(self, received: int, size: int) -> None:
        now = time.monotonic()
        if now - self._shown_at < PROGRESS_S:
            return
        speed = (received - self._shown) / max(now - self._shown_at, 1e-9)
        speed_unit, speed_name = _unit(speed)
        done = f"{_amount(received, _unit(size)[0])} of {show_bytes(size)}"
        self._say(f"{self._label}: {done}, {speed / speed_unit:.0f} {speed_name}/s")
        self._shown, self._shown_at = received, now

    def end(self, size: int) -> None:
        self._say(f"{self._label}: {show_bytes(size)} complete")
