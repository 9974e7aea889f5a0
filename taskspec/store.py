"""URIs: files in local folders and on S3 behind the same few calls.

Path: [here] ← artifacts, and whatever reads or writes a file of the user's.  S3's endpoint and credentials come from
the usual AWS_* variables (AWS_ENDPOINT_URL for other S3 servers).
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from taskspec.errors import StoreError


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """A local path from the root on, so that processes with another working folder find it; S3 URIs as they are."""
    return uri if is_s3(uri) else os.path.abspath(uri)


def join(uri: str, *parts: str) -> str:
    """The URI of something below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


@lru_cache(maxsize=1)
def _s3() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"max_attempts": 5, "mode": "standard"}))


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StoreError(f"{uri}: has no bucket; S3 URIs look like s3://bucket/key")
    return bucket, key


def _place(uri: str) -> dict[str, str]:
    bucket, key = _split(uri)
    return {"Bucket": bucket, "Key": key}


@contextmanager
def named(uri: str, verb: str) -> Iterator[None]:
    """Turns what goes wrong with a URI into a StoreError that names it."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"{uri}: does not exist") from error
    except (OSError, BotoCoreError, ClientError) as error:
        raise StoreError(f"{uri}: cannot be {verb}: {error}") from error


def _is_missing(error: Exception) -> bool:
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    return code in ("404", "NoSuchKey", "NotFound")


def _is_conflict(error: Exception) -> bool:
    response = getattr(error, "response", None) or {}
    return response.get("Error", {}).get("Code") in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


def open_input(uri: str) -> IO[bytes]:
    """A readable stream of one file's bytes, never the whole file in memory. Raises: StoreError."""
    with named(uri, "read"):
        if not is_s3(uri):
            return open(uri, "rb")
        bucket, key = _split(uri)
        try:
            found = _s3().get_object(Bucket=bucket, Key=key)
        except Exception as error:
            if _is_missing(error):
                raise FileNotFoundError(uri) from error
            raise
        return io.BufferedReader(_S3Stream(uri, found["Body"], found["ETag"]), buffer_size=1 << 20)


READ_ATTEMPTS = 5
"""How often a read of an S3 stream is tried, each on a new connection after the first."""


class _S3Stream(io.RawIOBase):
    """botocore's body as a raw stream that BufferedReader and gzip can read. Large files are read for hours: one that
    breaks off is asked for again from there."""

    def __init__(self, uri: str, body: Any, etag: str) -> None:
        self._uri, self._body, self._etag = uri, body, etag
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        from botocore.exceptions import BotoCoreError

        with named(self._uri, "read"):
            for left in reversed(range(READ_ATTEMPTS)):
                try:
                    data = self._body.read(len(buffer))
                    break
                except (OSError, BotoCoreError):
                    if not left:
                        raise
                    bucket, key = _split(self._uri)
                    rest = f"bytes={self._read}-"  # of the same content, or the server refuses
                    self._body = _s3().get_object(Bucket=bucket, Key=key, Range=rest, IfMatch=self._etag)["Body"]
        self._read += len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._body.close()
        super().close()


def read_bytes(uri: str) -> bytes:
    """One small file. Raises: StoreError."""
    with named(uri, "read"), open_input(uri) as stream:
        return stream.read()


def write_bytes(uri: str, content: bytes) -> None:
    """Writes one small file whole: readers see the old content or the new. Raises: StoreError."""
    with named(uri, "written"):
        if is_s3(uri):
            bucket, key = _split(uri)
            _s3().put_object(Bucket=bucket, Key=key, Body=content)
            return
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def swap(uri: str, expected: bytes | None, content: bytes) -> bool:
    """Replaces a small file if it still holds what is expected, so that of two writers only one wins.

    Args: expected: what it held when it was read; None is no file.    Returns: whether it was replaced.
    Raises: StoreError.
    """
    with named(uri, "written"):
        if not is_s3(uri):
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            with open(f"{uri}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                held = Path(uri).read_bytes() if Path(uri).exists() else None
                if held == expected:
                    write_bytes(uri, content)
                return held == expected
        bucket, key = _split(uri)
        condition = {"IfNoneMatch": "*"}
        try:
            if expected is not None:
                held_object = _s3().get_object(Bucket=bucket, Key=key)
                if held_object["Body"].read() != expected:
                    return False
                condition = {"IfMatch": held_object["ETag"]}
            _s3().put_object(Bucket=bucket, Key=key, Body=content, **condition)
        except Exception as error:
            if _is_missing(error) or _is_conflict(error):
                return False
            raise
    return True


def exists(uri: str) -> bool:
    """Whether a file is there; for a folder, ask for its manifest."""
    if not is_s3(uri):
        return Path(uri).exists()
    bucket, key = _split(uri)
    with named(uri, "read"):
        try:
            _s3().head_object(Bucket=bucket, Key=key)
        except Exception as error:
            if _is_missing(error):
                return False
            raise
    return True


def list_files(uri: str) -> list[str]:
    """The URIs of all files below a folder, sorted; empty where there is none."""
    if not is_s3(uri):
        return sorted(str(path) for path in Path(uri).rglob("*") if path.is_file())
    bucket, key = _split(uri)
    prefix = key.rstrip("/") + "/" if key else ""
    with named(uri, "listed"):
        pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ()))


def expand(uri: str) -> list[str]:
    """The files that a URI with `*` in its last part names, sorted. Raises: StoreError if none or missing."""
    folder, _, pattern = uri.rpartition("/")
    if "*" not in pattern:
        if not exists(uri):
            raise StoreError(f"{uri}: does not exist")
        if not is_s3(uri) and Path(uri).is_dir():
            raise StoreError(f"{uri}: is a folder; name its files, such as {join(uri, '*.jsonl')}")
        return [uri]
    if is_s3(uri):
        names = (name.rpartition("/") for name in list_files(folder))
        found = [join(parent, name) for parent, _, name in names if parent == folder and fnmatch.fnmatch(name, pattern)]
    else:
        root = Path(folder or ("/" if uri.startswith("/") else "."))
        found = sorted(str(path) for path in root.glob(pattern) if path.is_file())
    if not found:
        raise StoreError(f"{uri}: names no file")
    return found


def fingerprint(uri: str) -> str:
    """What tells one content of a file from another: its sha256, on S3 its ETag and size. Raises: StoreError."""
    with named(uri, "read"):
        if not is_s3(uri):
            return f"sha256:{file_sha256(uri)}"
        head = _s3().head_object(**_place(uri))
        etag = head["ETag"].strip('"')
        return f"etag:{etag}:{head['ContentLength']}"


def size(uri: str) -> int:
    """Bytes of a file on S3. Raises: StoreError."""
    with named(uri, "read"):
        return int(_s3().head_object(**_place(uri))["ContentLength"])


def upload(path: Path, uri: str) -> None:
    """Puts a local file on S3. Raises: StoreError."""
    with named(uri, "written"):
        _s3().upload_file(str(path), *_split(uri))


def download(uri: str, path: Path) -> None:
    """Fetches a file from S3. Raises: StoreError."""
    with named(uri, "read"):
        _s3().download_file(*_split(uri), str(path))


def delete(uri: str) -> None:
    """Removes one file; one that is not there is no error. Raises: StoreError."""
    with named(uri, "removed"):
        if is_s3(uri):
            _s3().delete_object(**_place(uri))
        else:
            Path(uri).unlink(missing_ok=True)


def is_empty(uri: str) -> bool:
    """Whether nothing is below a folder, or it does not stand. Raises: StoreError, for a local file too."""
    with named(uri, "listed"):
        if is_s3(uri):
            bucket, key = _split(join(uri, ""))
            return not _s3().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)["KeyCount"]
        return not Path(uri).exists() or not any(Path(uri).iterdir())


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a local file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
