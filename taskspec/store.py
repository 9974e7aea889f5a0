"""URIs and artifacts: local folders and S3 behind the same few calls.

An artifact is a folder whose `manifest.json` is written last. It is prepared in a local temporary folder and published
whole: by rename on a file system, with the manifest as the last object on S3. S3's endpoint and credentials come from
the usual AWS_* variables (AWS_ENDPOINT_URL for other S3 servers).
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import fnmatch
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from taskspec.config import canonical_sha256
from taskspec.errors import ArtifactError, StoreError

MANIFEST = "manifest.json"
_MARKER = ".publishing"
"""Object that stands in a prefix on S3 while an artifact is written there."""
FORMAT_VERSION = 1


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
def _named(uri: str, verb: str) -> Iterator[None]:
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
    with _named(uri, "read"):
        if not is_s3(uri):
            return open(uri, "rb")
        bucket, key = _split(uri)
        try:
            body = _s3().get_object(Bucket=bucket, Key=key)["Body"]
        except Exception as error:
            if _is_missing(error):
                raise FileNotFoundError(uri) from error
            raise
        return io.BufferedReader(_S3Stream(uri, body), buffer_size=1 << 20)


class _S3Stream(io.RawIOBase):
    """botocore's body as a raw stream that BufferedReader and gzip can read."""

    def __init__(self, uri: str, body: Any) -> None:
        self._uri = uri
        self._body = body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _named(self._uri, "read"):
            data = self._body.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._body.close()
        super().close()


def read_bytes(uri: str) -> bytes:
    """One small file. Raises: StoreError."""
    with _named(uri, "read"), open_input(uri) as stream:
        return stream.read()


def write_bytes(uri: str, content: bytes) -> None:
    """Writes one small file whole: readers see the old content or the new. Raises: StoreError."""
    with _named(uri, "written"):
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
    with _named(uri, "written"):
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
    with _named(uri, "read"):
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
    with _named(uri, "listed"):
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
    with _named(uri, "read"):
        if not is_s3(uri):
            return f"sha256:{file_sha256(uri)}"
        head = _s3().head_object(**_place(uri))
        etag = head["ETag"].strip('"')
        return f"etag:{etag}:{head['ContentLength']}"


def remove(uri: str) -> None:
    """Removes a folder with all that is in it, its manifest first: a half-removed artifact is none."""
    with _named(uri, "removed"):
        if is_s3(uri):
            for name in sorted(list_files(uri), key=lambda name: not name.endswith("/" + MANIFEST)):
                _s3().delete_object(**_place(name))
        elif Path(uri).exists():
            (Path(uri) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(uri)


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a local file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
) -> Iterator[Path]:
    """Gives a local folder to write into; on leaving without an error the folder becomes the artifact at `uri`.

    `facts` is read on leaving, so the writer may fill it. An error inside leaves nothing behind. An artifact that stood
    at `uri` before is replaced: on a file system once the new one is complete, on S3 it goes when uploading begins.
    Raises: StoreError when the disk is full, or when something that is no artifact stands at `uri`.
    """
    _require_replaceable(uri)
    parent = None if is_s3(uri) else Path(uri).absolute().parent
    with _named(uri, "written"):
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".publishing-", dir=parent))
    try:
        try:
            yield work
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(f"{uri}: cannot be written: {error}") from error
            raise
        _require_replaceable(uri)
        with _named(uri, "written"):
            names = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
            manifest = Manifest(
                kind=kind,
                format_version=FORMAT_VERSION,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                inputs=dict(inputs),
                config=dict(config),
                files={name: file_sha256(work / name) for name in names},
                facts=facts,
            )
            text = json.dumps(vars(manifest), indent=1, ensure_ascii=False)
            (work / MANIFEST).write_text(text, encoding="utf-8")
            if is_s3(uri):
                _upload(work, uri, names)
            else:
                os.chmod(work, 0o755)
                old = work.with_name(f"{work.name}-old")
                with suppress(FileNotFoundError):
                    os.rename(uri, old)
                os.rename(work, uri)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _require_replaceable(uri: str) -> None:
    """Guards a folder that is no artifact, a home folder say, from being replaced by one."""
    if is_s3(uri):
        bucket, key = _split(join(uri, ""))
        with _named(uri, "listed"):
            count = _s3().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)["KeyCount"]
        free = not count or exists(join(uri, MANIFEST)) or exists(join(uri, _MARKER))
    else:
        path = Path(uri)
        free = not path.exists() or (path / MANIFEST).exists() or (path.is_dir() and not any(path.iterdir()))
    if not free:
        raise StoreError(f"{uri}: stands already and is no artifact; remove it or name another place")


def _upload(work: Path, uri: str, names: list[str]) -> None:
    """Puts an artifact on S3, its manifest last; the marker lets the next try replace a broken one."""
    write_bytes(join(uri, _MARKER), b"")
    stale = list_files(uri)
    if join(uri, MANIFEST) in stale:
        _s3().delete_object(**_place(join(uri, MANIFEST)))
    current = [join(uri, name) for name in [*names, MANIFEST]]
    for name, target in zip([*names, MANIFEST], current, strict=True):
        _s3().upload_file(str(work / name), *_split(target))
    for old in set(stale).difference(current):
        _s3().delete_object(**_place(old))


def read_manifest(uri: str, kind: str) -> Manifest:
    """The manifest of an artifact of that kind. Raises: ArtifactError naming what is wrong and the way out."""
    name = join(uri, MANIFEST)
    if not exists(name):
        if not list_files(uri):
            raise ArtifactError(f"{uri}: does not exist, or is empty; needed here: {kind}")
        raise ArtifactError(f"{uri}: holds no {MANIFEST}, so it is no complete {kind}; make it again")
    try:
        manifest = Manifest(**json.loads(read_bytes(name)))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{name}: is damaged ({error}); make the {kind} again") from error
    if manifest.kind != kind:
        raise ArtifactError(f"{uri}: is a {manifest.kind}, but a {kind} is needed here")
    if manifest.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{uri}: has format version {manifest.format_version}, this taskspec reads {FORMAT_VERSION}; make it again"
        )
    return manifest


def open_artifact(uri: str, kind: str, *, verify: bool = False, files: Iterable[str] | None = None) -> Artifact:
    """Opens an artifact of that kind; files on S3 are fetched once into a cache of this node, keyed by their sha256.

    Args: verify: compare the sha256 of every file, whole or in the cache (a file just fetched always is compared).
        files: only these are needed here; None is all.
    Raises: ArtifactError naming the missing, truncated or altered file.
    """
    manifest = read_manifest(uri, kind)
    try:
        needed = manifest.files if files is None else {name: manifest.files[name] for name in files}
    except KeyError as error:
        raise ArtifactError(f"{uri}: {error.args[0]} is not in the manifest; make the {kind} again") from error
    if is_s3(uri):
        return Artifact(uri, manifest, _fetch(uri, manifest, needed, verify))
    for name, sha256 in needed.items():
        path = Path(uri) / name
        if not path.is_file():
            raise ArtifactError(f"{uri}: {name} is missing; make the {kind} again")
        if verify and file_sha256(path) != sha256:
            raise ArtifactError(f"{uri}: {name} is not the file in the manifest (sha256); make the {kind} again")
    return Artifact(uri, manifest, Path(uri))


def cache_folder() -> Path:
    """This node's cache: $TASKSPEC_CACHE, else ~/.cache/taskspec."""
    return Path(os.environ.get("TASKSPEC_CACHE") or Path.home() / ".cache" / "taskspec")


def _fetch(uri: str, manifest: Manifest, files: Mapping[str, str], verify: bool) -> Path:
    """Puts files of an artifact on S3 into the cache. Returns: a folder in which they have their names."""
    folder = cache_folder() / "artifacts" / manifest.id
    for name, sha256 in files.items():
        content = _cached(join(uri, name), sha256, verify, f"{uri}: {name}")
        named = folder / name
        if not (named.exists() and named.samefile(content)):
            named.parent.mkdir(parents=True, exist_ok=True)
            temporary = named.with_name(f".{named.name}.{uuid.uuid4().hex}")
            os.link(content, temporary)
            os.replace(temporary, named)
    return folder


def _cached(uri: str, sha256: str, verify: bool, what: str) -> Path:
    """The cached content of a file; artifacts that share it, such as two versions of an index, fetch it once.

    A cached file that has been altered is fetched again.
    """
    content = cache_folder() / "files" / sha256
    content.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{content}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of a node want the same file at the same time
        if content.exists() and not (verify and file_sha256(content) != sha256):
            return content
        temporary = content.with_name(f".{sha256}.{uuid.uuid4().hex}")
        try:
            with _named(uri, "read"):
                _s3().download_file(*_split(uri), str(temporary))
                if file_sha256(temporary) != sha256:
                    raise ArtifactError(f"{what} is not the file in the manifest (sha256); publish it again")
                os.replace(temporary, content)
        finally:
            temporary.unlink(missing_ok=True)
    return content
