"""The files that a configuration names → tables of parsed records, in bounded memory on Ray Data.

Path: files → [here] → preparation.  One task per file reads lines, tasks of a few megabytes of lines parse (and cut)
them in parallel, and the caller gets the tables in the order of files and lines, whatever the number of tasks. What
records mean for each other (ids, gold pages) is not decided here.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import pyarrow as pa

from taskspec import store
from taskspec.config import Config
from taskspec.data.kilt import parse_page_line, parse_query_line
from taskspec.data.passages import cut_page
from taskspec.data.prepared import Split
from taskspec.errors import ConfigError, DataError, StoreError, TaskspecError

CHUNK_BYTES = 4 << 20
"""Lines that one parsing task gets; several chunks at a time are in memory, never a file."""


class TaskFile(NamedTuple):
    task: str
    split: Split
    uri: str


@dataclass(frozen=True)
class InputFiles:
    """The files that a configuration names, `*` expanded."""

    knowledge_source: tuple[str, ...]
    task_files: tuple[TaskFile, ...]

    @classmethod
    def find(cls, config: Config) -> Self:
        """Raises: ConfigError if the configuration names none, StoreError with all that are not there."""
        if not config.data.knowledge_source:
            raise ConfigError("data.knowledge_source: names no file; give the pages that are to be retrieved")
        missing: list[str] = []

        def expand(uris: Sequence[str]) -> list[str]:
            found = []
            for uri in uris:
                try:
                    found += store.expand(uri)
                except StoreError as error:
                    missing.append(str(error))
            return found

        sources = expand(config.data.knowledge_source)
        task_files: list[TaskFile] = []
        for task in config.tasks:
            if not task.train and not task.dev:
                raise ConfigError(f"tasks.{task.name}: has neither train nor dev files; give some or leave it out")
            task_files += (TaskFile(task.name, "train", uri) for uri in expand(task.train))
            task_files += (TaskFile(task.name, "dev", uri) for uri in expand(task.dev))
        if missing:
            raise StoreError(
                f"input files cannot be found: {'; '.join(missing)}; mend their paths in the configuration"
            )
        return cls(tuple(sources), tuple(task_files))

    @property
    def splits(self) -> list[tuple[str, Split]]:
        """Each task's splits, in the order of the configuration."""
        return list(dict.fromkeys((file.task, file.split) for file in self.task_files))

    def fingerprints(self) -> dict[str, str]:
        """What each file is for → fingerprint of its content: the same files in another folder have the same."""
        uris = {"knowledge_source": list(self.knowledge_source)}
        for task, split in self.splits:
            uris[f"{task}/{split}"] = [file.uri for file in self.task_files if (file.task, file.split) == (task, split)]
        return {
            f"{name}/{number}": store.fingerprint(uri) for name, some in uris.items() for number, uri in enumerate(some)
        }


_LINE = [("file", pa.int32()), ("line", pa.int64()), ("reason", pa.string()), ("record", pa.string())]
_PROVENANCE = pa.struct([("wikipedia_id", pa.string()), ("start_paragraph", pa.int32()), ("end_paragraph", pa.int32())])

QUERY_RECORDS = pa.schema(
    [
        *_LINE,
        ("query_id", pa.string()),
        ("text", pa.string()),
        ("evidence", pa.list_(pa.list_(_PROVENANCE))),
    ]
)
"""Lines of task files. file: position among the files asked for, one per table; reason: why the record is bad, null for
a good one; record: the line as it stands."""

PAGE_RECORDS = pa.schema(
    [
        *_LINE,
        ("wikipedia_id", pa.string()),
        ("title", pa.string()),
        ("texts", pa.list_(pa.string())),
        ("start_paragraphs", pa.list_(pa.int32())),
        ("end_paragraphs", pa.list_(pa.int32())),
    ]
)
"""Lines of a knowledge source, cut into passages; record is null for a good one."""


def read_queries(files: Sequence[str]) -> Iterator[pa.Table]:
    """Records of task files, `QUERY_RECORDS`. Ray must be connected.

    Raises: DataError naming file and line where a file cannot be read on.
    """
    return _read(files, _query_row, QUERY_RECORDS)


def read_pages(files: Sequence[str], passage_words: int) -> Iterator[pa.Table]:
    """Records of a knowledge source, `PAGE_RECORDS`. Ray must be connected.

    Raises: DataError naming file and line where a file cannot be read on.
    """
    return _read(files, partial(_page_row, passage_words=passage_words), PAGE_RECORDS)


def _read(files: Sequence[str], parse: Callable[[bytes], dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    import ray.data

    from taskspec.cluster import prepare_ray_data

    prepare_ray_data()
    rows = [{"file": number, "uri": uri} for number, uri in enumerate(files)]
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(_read_chunks, batch_size=1, batch_format="pyarrow")
        .repartition(target_num_rows_per_block=1)  # a chunk per block, else one task would read and parse a whole file
        .map_batches(_parse_chunk, batch_size=1, batch_format="pyarrow", fn_args=(parse, schema))
    )
    last = (0, 0)
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        first = table.select(["file", "line", "reason", "record"]).slice(0, 1).to_pylist()[0]
        if first["reason"] is not None and first["record"] is None:
            raise DataError(
                f"{files[first['file']]} line {first['line']}: cannot be read on ({first['reason']}); "
                f"if the file is damaged, fetch or write it again"
            )
        assert (first["file"], first["line"]) > last, "Ray Data preserves the order"
        last = (first["file"], first["line"])
        yield table


def _read_chunks(batch: pa.Table) -> Iterator[pa.Table]:
    """Runs on the cluster: one file as chunks of whole lines.

    What goes wrong travels as a chunk, for an exception would come back wrapped by Ray, and printed.
    """
    file, uri = batch["file"][0].as_py(), batch["uri"][0].as_py()
    line = 1
    try:
        with store.open_input(uri) as content:
            packed = uri.endswith(".gz")
            stream = io.BufferedReader(gzip.GzipFile(fileobj=content), buffer_size=1 << 20) if packed else content
            while lines := stream.readlines(CHUNK_BYTES):
                yield _chunk(file, line, b"".join(lines), None)
                line += len(lines)
    except (OSError, EOFError, zlib.error, TaskspecError) as error:
        yield _chunk(file, line, b"", str(error))


def _chunk(file: int, line: int, content: bytes, error: str | None) -> pa.Table:
    return pa.table(
        {
            "file": pa.array([file], pa.int32()),
            "line": pa.array([line], pa.int64()),
            "content": pa.array([content], pa.large_binary()),
            "error": pa.array([error], pa.string()),
        }
    )


def _parse_chunk(chunk: pa.Table, parse: Callable[[bytes], dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Runs on the cluster: a chunk's lines as rows of `schema`, or one row that says why there is no chunk."""
    file, first_line, error = (chunk[name][0].as_py() for name in ("file", "line", "error"))
    if error is not None:
        return pa.Table.from_pylist([{"file": file, "line": first_line, "reason": error}], schema)
    lines = chunk["content"][0].as_py().split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line's end
    rows = []
    for number, line in enumerate(lines, start=first_line):
        try:
            row = parse(line)
        except DataError as reason:
            row = {"reason": str(reason), "record": line.decode("utf-8", "replace")}
        rows.append(row | {"file": file, "line": number})
    return pa.Table.from_pylist(rows, schema)


def _query_row(line: bytes) -> dict[str, Any]:
    query = parse_query_line(line)
    return {
        "record": line.decode(),
        "query_id": query.query_id,
        "text": query.text,
        "evidence": [[place._asdict() for place in places] for places in query.evidence],
    }


def _page_row(line: bytes, passage_words: int) -> dict[str, Any]:
    page = parse_page_line(line)
    texts, start_paragraphs, end_paragraphs = zip(*cut_page(page.paragraphs, passage_words), strict=True)
    return {
        "wikipedia_id": page.wikipedia_id,
        "title": page.title,
        "texts": texts,
        "start_paragraphs": start_paragraphs,
        "end_paragraphs": end_paragraphs,
    }
