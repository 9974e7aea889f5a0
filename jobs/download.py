"""Downloads the KILT files that a configuration names, so that `jobs.prepare` finds them.

    python -m jobs.download --config kilt                                    # all of it, about 40 GiB
    python -m jobs.download --config kilt --only nq fever knowledge_source   # two tasks and the pages

Files come from KILT's own server by the names that the configuration gives them, and land where it looks for them. What
is there is left alone and what broke off goes on, so the same command may be run again at any time.

KILT's TriviaQA files hold ids but no questions. Where the configuration names one, the file of ids and TriviaQA's
original archive (2.5 GiB, from the University of Washington) are fetched beside it, and the questions are filled in.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jobs import cli
from taskspec import store
from taskspec.config import Config
from taskspec.data import triviaqa
from taskspec.data.download import RemoteFile, Say, download, require_room, require_sha256, show_bytes
from taskspec.errors import ConfigError, DataError

KILT_URL = "https://dl.fbaipublicfiles.com/KILT"
KNOWLEDGE_SOURCE = "knowledge_source"


class Wanted(NamedTuple):
    """A file that the configuration names, and where it is to be."""

    label: str
    uri: str
    path: Path


class Source(NamedTuple):
    """A file of a server, and where it is to be."""

    label: str
    url: str
    path: Path


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser("Download the KILT files that a configuration names; what is there already is left alone.")
    result.add_argument("--out", type=store.absolute, help="one folder for all; default where the configuration looks")
    result.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"names of tasks, and {KNOWLEDGE_SOURCE}; default everything"
    )
    result.add_argument("--base-url", help="a server with the same files, TriviaQA's archive too; default KILT's own")
    result.add_argument("--checksums", help="file of sha256sum's lines; files that it names must have that content")
    return result


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the folder that holds all files, and the paths `downloaded` now and `present` before."""
    arguments = build_parser().parse_args(argv)
    config = cli.configuration(arguments)
    say = partial(print, flush=True)

    wanted = _wanted(config, arguments.only, arguments.out)
    checksums = _read_checksums(arguments.checksums) if arguments.checksums else {}
    missing = [each for each in wanted if not each.path.exists()]
    present = [each for each in wanted if each not in missing]
    sources = _sources(missing, arguments.base_url)
    for path in {each.path for each in present} | {each.path for each in sources}:
        if path.exists() and path.name in checksums:
            require_sha256(path, checksums[path.name])

    # All are looked up before the first one comes, so that what cannot end well does not begin.
    remotes = {source: RemoteFile.look_up(source.url, say) for source in sources if not source.path.exists()}
    require_room(_needed(missing, remotes))
    for source, remote in remotes.items():
        sha256 = checksums.get(source.path.name)
        download(remote, source.path, label=source.label, say=say, sha256=sha256)
    _fill_in_questions(missing, say)

    say(f"{len(missing)} of {len(wanted)} files downloaded, {len(present)} were there")
    elsewhere = [each for each in wanted if each.uri != str(each.path)]
    if elsewhere:
        uri, path = elsewhere[0].uri, elsewhere[0].path
        say(f"{arguments.config} looks for {uri}, not {path}: change its paths, or move the files")
    return {
        "uri": os.path.commonpath([each.path.parent for each in wanted]),
        "downloaded": [str(each.path) for each in missing],
        "present": [str(each.path) for each in present],
    }


def _wanted(config: Config, only: Sequence[str] | None, out: str | None) -> list[Wanted]:
    """Raises: ConfigError for a name that is not in the configuration, or a file that cannot be downloaded."""
    known = [*(task.name for task in config.tasks), KNOWLEDGE_SOURCE]
    for name in only or ():
        if name not in known:
            raise ConfigError(f"--only {name}: the configuration has no such name; known: {', '.join(known)}")
    if out is not None and store.is_s3(out):
        raise ConfigError(
            f"--out {out}: files are downloaded to a local folder; name one, and copy it to S3 afterwards"
        )
    named = [
        (f"{task.name} {split}", task.name, uri)
        for task in config.tasks
        for split, uris in (("train", task.train), ("dev", task.dev))
        for uri in uris
    ]
    named += [(KNOWLEDGE_SOURCE, KNOWLEDGE_SOURCE, uri) for uri in config.data.knowledge_source]
    found: dict[Path, Wanted] = {}
    for label, name, uri in named:
        if only is not None and name not in only:
            continue
        file_name = uri.rpartition("/")[2]
        if "*" in file_name:
            raise ConfigError(f"{uri}: is a pattern, and a server cannot be asked for it; name the files one by one")
        if out is None and store.is_s3(uri):
            raise ConfigError(f"{uri}: lies on S3; download to a local folder with --out FOLDER and copy it there")
        path = Path(uri) if out is None else Path(out, file_name)
        found.setdefault(path, Wanted(label, uri, path))
    if not found:
        raise ConfigError(f"{config.name}: names no file to download; give the tasks files, or data.knowledge_source")
    return list(found.values())


def _sources(missing: Sequence[Wanted], base_url: str | None) -> list[Source]:
    """What the server must give for the files that are missing."""
    base = (base_url or KILT_URL).rstrip("/")
    found: dict[Path, Source] = {}
    for label, _, path in missing:
        ids = triviaqa.ids_file(path)
        file = ids or path
        found.setdefault(file, Source(label, f"{base}/{quote(file.name)}", file))
        if ids is not None:
            archive = triviaqa.archive_file(path)
            url = triviaqa.ARCHIVE_URL if base_url is None else f"{base}/{archive.name}"
            found.setdefault(archive, Source("triviaqa archive", url, archive))
    return list(found.values())


def _needed(missing: Sequence[Wanted], remotes: dict[Source, RemoteFile]) -> dict[Path, int]:
    """Bytes to be written at each path, those that are made here included."""
    needed = {source.path: remote.missing_bytes(source.path) for source, remote in remotes.items()}
    sizes = {source.path: remote.size for source, remote in remotes.items()}
    for each in missing:
        ids = triviaqa.ids_file(each.path)
        if ids is not None:
            size = sizes[ids] if ids in sizes else ids.stat().st_size
            needed[each.path] = size + size // 4  # a question is shorter than a quarter of its record
    return needed


def _fill_in_questions(missing: Sequence[Wanted], say: Say) -> None:
    """TriviaQA's files, of the files of ids and the archive that lie beside them."""
    by_archive: dict[Path, list[Path]] = {}
    for each in missing:
        if triviaqa.ids_file(each.path) is not None:
            by_archive.setdefault(triviaqa.archive_file(each.path), []).append(each.path)
    for archive, paths in by_archive.items():
        say(f"triviaqa: reading the questions of {archive.name} ({show_bytes(archive.stat().st_size)}), some minutes")
        questions = triviaqa.read_questions(archive)
        for path in paths:
            count = triviaqa.fill_in(path, questions)
            say(f"triviaqa: {count:,} questions filled into {path.name}")
        say(f"triviaqa: {archive} and the files of ids are not needed any more")


def _read_checksums(path: str) -> dict[str, str]:
    """File name → sha256, as sha256sum writes them. Raises: DataError naming the line that is none."""
    result = {}
    for number, line in enumerate(store.read_bytes(path).decode("utf-8", "replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None:
            raise DataError(
                f"{path} line {number}: is no line of sha256sum (<64 hex digits>  <file name>): {line[:80]!r}"
            )
        result[Path(match[2]).name] = match[1]
    return result


if __name__ == "__main__":
    cli.main(run)
