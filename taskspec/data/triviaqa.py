"""KILT's TriviaQA files hold ids in place of questions; the questions come from the original archive.

Path: download → [here] → the files that reading names.  As KILT's own `scripts/get_triviaqa_input.py` does it: the
record's id is the QuestionId of the reading-comprehension set over Wikipedia, and its Question becomes `input`,
unchanged. The archive's evidence texts, nearly all of it, are passed over. Memory: the questions, tens of megabytes.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from taskspec.errors import DataError, StoreError

ARCHIVE_URL = "https://nlp.cs.washington.edu/triviaqa/data/triviaqa-rc.tar.gz"
_ID_FILES = {
    "triviaqa-train-kilt.jsonl": "triviaqa-train_id-kilt.jsonl",
    "triviaqa-dev-kilt.jsonl": "triviaqa-dev_id-kilt.jsonl",
}
_MEMBERS = {"qa/wikipedia-train.json", "qa/wikipedia-dev.json", "qa/wikipedia-test-without-answers.json"}
_CHUNK_BYTES = 1 << 20
_BETWEEN = tuple(" \t\r\n,")
"""What may stand between two items of a list."""


def ids_file(path: Path) -> Path | None:
    """The file of ids, as KILT's server has it, that a file with questions is made of; None for any other file."""
    name = _ID_FILES.get(path.name)
    return None if name is None else path.with_name(name)


def archive_file(path: Path) -> Path:
    """Where the archive lies for a file with questions: beside it."""
    return path.with_name(ARCHIVE_URL.rpartition("/")[2])


def read_questions(archive: Path) -> dict[str, str]:
    """QuestionId → Question of all splits, from `triviaqa-rc.tar.gz`; reading it through takes minutes.

    Raises: DataError if the archive is damaged or holds something else.
    """
    questions: dict[str, str] = {}
    left = set(_MEMBERS)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            while left and (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps a record of every evidence text
                name = member.name.removeprefix("./")
                if name in left and (content := tar.extractfile(member)) is not None:
                    questions |= {item["QuestionId"]: item["Question"] for item in _items(content)}
                    left.remove(name)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{archive}: cannot be read ({error}); remove it and run the same command again") from error
    if left:
        raise DataError(
            f"{archive}: holds no {', '.join(sorted(left))}, so it is cut short or not {ARCHIVE_URL}; "
            f"remove it and run the same command again"
        )
    return questions


def fill_in(path: Path, questions: Mapping[str, str]) -> int:
    """Makes a file with questions of the file of ids beside it; it is there once it is whole.

    Returns: records written.
    Raises: DataError naming the line that no question belongs to, StoreError if the file cannot be written.
    """
    source = ids_file(path)
    assert source is not None, "callers have asked"
    part = path.with_name(f"{path.name}.part")
    number = 0
    try:
        with open(source, "rb") as lines, open(part, "w", encoding="utf-8") as file:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    record["input"] = questions[record["id"]]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{source} line {number}: no question belongs to it ({type(error).__name__}: {error}); "
                        f"remove the file and run the same command again"
                    ) from error
                file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be made of {source.name} ({error}); run the same command again") from error
    finally:
        part.unlink(missing_ok=True)
    return number


def _items(content: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of the list under "Data", one at a time: the whole file as Python values would take gigabytes."""
    decoder = json.JSONDecoder()
    chunks = codecs.iterdecode(iter(partial(content.read, _CHUNK_BYTES), b""), "utf-8")
    buffer = next(chunks, "")
    start = re.search(r'"Data"\s*:\s*\[', buffer)
    if start is None:
        raise ValueError('no list "Data"')
    place = start.end()
    while True:
        while buffer[place : place + 1] in _BETWEEN:
            place += 1
        if buffer[place : place + 1] == "]":
            return
        try:
            item, place = decoder.raw_decode(buffer, place)
        except json.JSONDecodeError:
            more = next(chunks, "")
            if not more:
                raise
            buffer, place = buffer[place:] + more, 0
            continue
        yield item
