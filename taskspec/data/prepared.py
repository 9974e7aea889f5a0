"""Prepared data: the artifact that every later stage reads its passages and queries from.

Path: prepare → [here] → plan, batches, mining, index, evaluation.  The layout of its tables stands here once, for the
writer and for every reader. Parquet is how the artifact travels; for random access each node keeps an Arrow copy.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from taskspec import artifacts, node_cache
from taskspec.data.rows import RowStore
from taskspec.errors import DataError

KIND = "prepared-data"
Split = Literal["train", "dev"]

PAGE_SCHEMA = pa.schema([("page_row", pa.int64()), ("wikipedia_id", pa.string()), ("title", pa.string())])
"""`pages/*.parquet`: page_row is the running number of a page among those kept, in the knowledge source's order."""

PASSAGE_SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        ("passage_id", pa.string()),
        ("page_row", pa.int64()),
        ("wikipedia_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("start_paragraph", pa.int32()),
        ("end_paragraph", pa.int32()),
    ]
)
"""`passages/*.parquet`: row_id counts from 0 over all files; passages of a page stand together. Paragraphs are indices
into the page's `text`, both ends included."""

QUERY_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("text", pa.string()),
        ("gold_pages", pa.list_(pa.list_(pa.string()))),
        ("positives", pa.list_(pa.int64())),
        ("gold_page_rows", pa.list_(pa.int64())),
    ]
)
"""`queries/<task>/<split>/*.parquet`: text is the record's input; gold_pages its evidence sets of wikipedia ids;
positives the rows of its gold passages; gold_page_rows the page rows of every gold page. Rows ascend, none twice."""


class PreparedData:
    """Passages, and the queries of every task, as row stores.

    Example:
        prepared = PreparedData.open("artifacts/prepared")
        prepared.queries("nq", "train").take([0], ["text", "positives"])

    The first use of a table on a node converts it under the node's cache folder. Pickles as its URI.
    """

    def __init__(self, artifact: artifacts.Artifact) -> None:
        self.artifact = artifact

    @classmethod
    def open(cls, uri: str) -> PreparedData:
        """Raises: ArtifactError if there is no complete prepared data at `uri`."""
        return cls(artifacts.open_artifact(uri, KIND))

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedData.open, (self.artifact.uri,)

    @property
    def id(self) -> str:
        return self.artifact.id

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration that it was made with."""
        return self.artifact.manifest.config

    @cached_property
    def passages(self) -> RowStore:
        """Every passage; a passage's row number is its row id. Columns: `PASSAGE_SCHEMA`."""
        return self._rows("passages")

    def tasks(self, split: Split) -> tuple[str, ...]:
        """The tasks that have queries of this split, in the order of the configuration."""
        counts: Mapping[str, Mapping[str, int]] = self.artifact.manifest.facts["queries"]
        return tuple(task for task, splits in counts.items() if split in splits)

    def queries(self, task: str, split: Split) -> RowStore:
        """A task's queries in the order of its files. Columns: `QUERY_SCHEMA`.

        Raises: DataError listing the tasks of the split if this one has none.
        """
        if task not in self.tasks(split):
            known = ", ".join(self.tasks(split)) or "none"
            raise DataError(
                f"{self.artifact.uri}: has no {split} queries of task {task!r} (tasks with some: {known}); "
                f"name its files under tasks.{task}.{split} and prepare again with: python -m jobs.prepare"
            )
        return self._rows(f"queries/{task}/{split}")

    def _rows(self, table: str) -> RowStore:
        path = node_cache.entry("rows", self.id) / f"{table}.arrow"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{path}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():  # another process was faster
                    node_cache.make_room(sum(map(_unpacked_bytes, (self.artifact.folder / table).iterdir())))
                    _convert(self.artifact.folder / table, path)
        return RowStore(path)


def _unpacked_bytes(file: Path) -> int:
    """What a Parquet file's rows take without its compression."""
    metadata = pq.read_metadata(file)
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))


def _convert(folder: Path, path: Path) -> None:
    """Parquet files, in the order of their names, to one row store that appears whole or not at all."""

    def tables() -> Iterator[pa.Table]:
        for file in sorted(folder.glob("*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(batch_size=4096):
                yield pa.Table.from_batches([batch])

    with tempfile.NamedTemporaryFile(prefix=".converting-", dir=path.parent, delete=False) as work:
        pass
    try:
        RowStore.write(Path(work.name), tables())
        os.replace(work.name, path)
    finally:
        Path(work.name).unlink(missing_ok=True)
