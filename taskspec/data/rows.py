"""Rows by number from a memory-mapped file: passages and queries, millions of them, in any order.

Path: prepared data → [here] → batches, mining, search.  An Arrow IPC file of record batches of one fixed length (the
last may be shorter), so the batch of a row is found by division and only the pages touched are read. Compression and
searching by value are not here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from taskspec.errors import ArtifactError

ROWS_PER_BATCH = 1024


class RowStore:
    """Random access to the rows of one file; safe to use from threads, and pickled as its path.

    Example:
        passages = RowStore(path)
        passages.take([7, 3, 7], ["title"])   # {"title": ["Pluto", "Ceres", "Pluto"]}
    """

    def __init__(self, path: Path) -> None:
        """Raises: ArtifactError if the file is not there or is no row store."""
        self._path = path
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError(
                f"{path}: cannot be read as rows ({error}); remove it, it is made again on opening"
            ) from error
        self._lock = threading.Lock()
        count: int = self._reader.num_record_batches
        self._rows_per_batch = self._batch(0).num_rows if count else 1
        self._length = (count - 1) * self._rows_per_batch + self._batch(count - 1).num_rows if count else 0

    @staticmethod
    def write(path: Path, tables: Iterable[pa.Table], rows_per_batch: int = ROWS_PER_BATCH) -> int:
        """Streams tables of any lengths (at least one, it may be empty) into a new file. Returns: rows written."""
        written = 0
        pending: list[pa.Table] = []
        writer = None
        try:
            for table in tables:
                if writer is None:
                    writer = pa.ipc.new_file(str(path), table.schema)
                pending.append(table)
                waiting = sum(part.num_rows for part in pending)
                whole = waiting - waiting % rows_per_batch
                if whole:
                    joined = pa.concat_tables(pending)
                    _write(writer, joined.slice(0, whole), rows_per_batch)
                    pending = [joined.slice(whole)]
                    written += whole
            assert writer is not None, "the schema comes from the first table"
            rest = pa.concat_tables(pending)
            _write(writer, rest, rows_per_batch)
            return written + int(rest.num_rows)
        finally:
            if writer is not None:
                writer.close()

    def __len__(self) -> int:
        return self._length

    def __reduce__(self) -> tuple[type[RowStore], tuple[Path]]:
        return RowStore, (self._path,)

    @property
    def schema(self) -> pa.Schema:
        return self._reader.schema

    def take(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Column → Python values of these rows, in the order asked; a row may be asked twice.

        Raises: IndexError if a row is not in the file, KeyError if a column is not.
        """
        # One value at a time: for rows far apart that is about ten times as fast as Arrow's take kernel per batch.
        opened: dict[int, list[pa.Array]] = {}
        result: dict[str, list[Any]] = {name: [] for name in columns}
        values = list(result.values())
        for row in rows:
            number, offset = divmod(int(row), self._rows_per_batch)
            if number not in opened:
                if not 0 <= row < self._length:
                    raise IndexError(f"{self._path}: has rows 0 to {self._length - 1} but was asked for {row}")
                batch = self._batch(number)
                opened[number] = [batch.column(name) for name in result]
            for column, value in zip(opened[number], values, strict=True):
                value.append(column[offset].as_py())
        return result

    def column(self, name: str) -> np.ndarray:
        """A whole column of numbers, (rows,). Raises: KeyError if there is none of that name."""
        kind = self.schema.field(name).type.to_pandas_dtype()
        pieces = [self._batch(number).column(name).to_numpy() for number in range(self._reader.num_record_batches)]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=kind)

    def _batch(self, number: int) -> pa.RecordBatch:
        with self._lock:
            return self._reader.get_batch(number)


def _write(writer: pa.RecordBatchWriter, table: pa.Table, rows_per_batch: int) -> None:
    for start in range(0, table.num_rows, rows_per_batch):
        (batch,) = table.slice(start, rows_per_batch).combine_chunks().to_batches()
        writer.write_batch(batch)
