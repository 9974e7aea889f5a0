"""Bad records of one file: kept with line and reason, counted, and too many of them end the job.

Path: reading → prepare ⇄ [here] → quarantine/*.jsonl.  What makes a record bad is decided by those who call.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from taskspec import store
from taskspec.errors import DataError

SHOWN = 3
"""Bad records that an error message quotes."""
LEFT_BEHIND = 1000
"""Bad records that can be read after a job was stopped by them."""


class FileCount(NamedTuple):
    """What became of one file's records."""

    file: str
    """URI."""
    use: str
    """`knowledge_source`, or task and split."""
    records: int
    without_provenance: int
    """Well-formed, but nothing can be learned from them: left out."""
    bad: int
    kinds: dict[str, int]
    """Kind of damage → records, most frequent first."""


class Quarantine:
    """The bad records of one file, written as they are found.

    A reason's kind is what stands before its first parenthesis.
    """

    def __init__(self, uri: str, use: str, path: Path) -> None:
        """Args: uri: the file that the records are from. use: as `FileCount.use`. path: a new file, written from the
        first bad record on."""
        self.uri = uri
        self.use = use
        self.path = path
        self.records = self.without_provenance = 0
        """Records of the file, good and bad, and those that are neither; counted by whoever reads it."""
        self._kinds: Counter[str] = Counter()
        self._first: list[str] = []

    def add(self, line: int, reason: str, record: str) -> None:
        """Takes a bad record in."""
        entry = {"file": self.uri, "line": line, "reason": reason, "record": record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._kinds[reason.partition(" (")[0]] += 1
        if len(self._first) < SHOWN:
            self._first.append(f"line {line}: {reason}")

    @property
    def count(self) -> FileCount:
        return FileCount(
            self.uri,
            self.use,
            self.records,
            self.without_provenance,
            self._kinds.total(),
            dict(self._kinds.most_common()),
        )

    def require_within(self, limit: float, left_behind: str) -> None:
        """Ends the job if the file has no record, or too large a share of bad ones.

        Args: limit: largest share. left_behind: URI of a folder for the bad records, should there be too many.
        Raises: DataError with count, share, limit, the first reasons, and where the bad records are.
        """
        records, bad = self.records, self._kinds.total()
        if not records:
            raise DataError(f"{self.uri}: holds no record; name another file or leave it out")
        if bad <= limit * records:
            return
        uri = store.join(left_behind, self.path.name)
        with self.path.open("rb") as file:
            store.write_bytes(uri, b"".join(islice(file, LEFT_BEHIND)))
        raise DataError(
            f"{self.uri}: {bad:,} of {records:,} records are bad ({bad / records:.1%}), more than "
            f"data.max_bad_fraction = {limit:g} allows: {'; '.join(self._first)}; see {uri}, then mend the file or "
            f"raise the limit"
        )
