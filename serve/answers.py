"""Answers that an HTTP replica keeps, by what was asked: within a number of bytes, the longest unused go first.

Path: app → [here].  One event loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cachetools import LRUCache

from serve.asks import Search
from taskspec.retrieve.hits import Hit

HIT_BYTES = 400
"""Of Python's objects, about, beside their letters."""


@dataclass(frozen=True, slots=True)
class Known:
    """An answer to one query."""

    hits: Sequence[Hit]
    truncated: bool
    complete: bool


Key = tuple[str, str, bytes, str]
"""(id of the version, task, digest of what was asked, query)"""


def digest(search: Search) -> bytes:
    """Stands for it in keys: as short for the longest lists of pages."""
    return hashlib.sha256(repr(search).encode()).digest()


class Answers:
    """A cache of answers."""

    def __init__(self, most_bytes: int) -> None:
        """Args: most_bytes: about; 0 keeps nothing."""
        self._held: LRUCache[Key, tuple[int, Known]] = LRUCache(most_bytes, getsizeof=lambda held: held[0])

    def get(self, key: Key) -> Known | None:
        held: tuple[int, Known] | None = self._held.get(key)
        return held[1] if held else None

    def keep(self, key: Key, known: Known) -> None:
        """Unless it is larger than all that may be kept."""
        size = _size(key, known)
        if size <= self._held.maxsize:
            self._held[key] = size, known


def _size(key: Key, known: Known) -> int:
    letters = len(key[-1]) + sum(len(hit.title) + len(hit.text or "") for hit in known.hits)
    return HIT_BYTES * (1 + len(known.hits)) + letters
