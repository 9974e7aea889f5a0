"""KILT files → prepared data, published as an artifact.

Path: preparation → [here] → prepared.  The driver is the single writer: row ids and files come out the same whatever
the number of tasks that read.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from taskspec import artifacts, cluster
from taskspec.config import Config
from taskspec.data.preparation import Preparation, PrepareSummary
from taskspec.data.prepared import KIND, PAGE_SCHEMA, PASSAGE_SCHEMA, QUERY_SCHEMA
from taskspec.data.reading import InputFiles
from taskspec.errors import DataError

ROWS_PER_FILE = 100_000


def prepare(config: Config, uri: str) -> PrepareSummary:
    """Reads everything that the configuration names and publishes prepared data at `uri`. Ray must be connected.

    Prepared data of the same files, cut the same way, that stands there is left as it is.
    Raises: ConfigError, StoreError, PlacementError, and DataError if a file has too many bad records: these can then be
        read in `<uri>-quarantine`, and nothing is published.
    """
    files = InputFiles.find(config)
    inputs = files.fingerprints()
    keys = {"data.passage_words": config.data.passage_words, "data.other_pages": config.data.other_pages}
    stands = artifacts.standing(uri, KIND, inputs=inputs, config=keys)
    if stands is not None and (known := PrepareSummary.of(stands.facts)) is not None:
        return known
    require_cluster(config)
    facts: dict[str, Any] = {}
    limit, left_behind = config.data.max_bad_fraction, f"{uri.rstrip('/')}-quarantine"
    with (
        tempfile.TemporaryDirectory(prefix="taskspec-prepare-") as scratch,
        artifacts.publishing(uri, KIND, inputs=inputs, config=config.model_dump(mode="json"), facts=facts) as folder,
    ):
        preparation = Preparation(config, files, Path(scratch), folder / "quarantine")
        preparation.read_task_files()
        for quarantine in preparation.task_quarantines:
            quarantine.require_within(limit, left_behind)
        preparation.choose_pages()
        with Parts(folder / "pages", PAGE_SCHEMA) as pages, Parts(folder / "passages", PASSAGE_SCHEMA) as passages:
            for some_pages, some_passages in preparation.pages():
                pages.write(some_pages)
                passages.write(some_passages)
        for quarantine in preparation.source_quarantines:
            quarantine.require_within(limit, left_behind)
        for task, split in files.splits:
            with Parts(folder / "queries" / task / split, QUERY_SCHEMA) as queries:
                for some_queries in preparation.queries(task, split):
                    queries.write(some_queries)
        for quarantine in preparation.task_quarantines:
            quarantine.require_within(limit, left_behind)
        summary = preparation.summary()
        for task, split in files.splits:
            if not summary.queries[task][split]:
                raise DataError(
                    f"tasks.{task}.{split}: none of its records is good and has provenance; lower "
                    f"data.max_bad_fraction to see why, or leave the split out"
                )
        facts |= summary.to_facts()
    return summary


def require_cluster(config: Config) -> None:
    """Raises: PlacementError if the cluster is too small: with one CPU, reading would never let parsing begin."""
    cluster.require("prepare with one reading and one parsing task", cpus=2, wait_s=config.cluster.wait_s)


class Parts:
    """A folder of parquet files, each begun when the one before is full."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder = folder
        self._schema = schema
        self._files = 0
        self._rows = 0
        self._open = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def write(self, table: pa.Table) -> None:
        """Appends rows; a table is never split over two files."""
        if not table.num_rows:
            return
        if self._writer is None or self._rows >= ROWS_PER_FILE:
            self._open.close()
            path = self._folder / f"part-{self._files:05d}.parquet"
            self._writer = self._open.enter_context(pq.ParquetWriter(path, self._schema, compression="zstd"))
            self._files, self._rows = self._files + 1, 0
        self._writer.write_table(table)
        self._rows += table.num_rows
