"""wikipedia_id → number of the page, for searches among some pages only.

Path: passages → [here] → retriever.  Two arrays in the index artifact, memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from taskspec.data.rows import RowStore
from taskspec.errors import ArtifactError

PAGE_ID_FILES = ("page_ids.npy", "page_rows.npy")


class PageIds:
    """wikipedia_id → number of the page, for all pages of an index; opened from disk it takes no memory.

    Attributes: ids: sorted, as bytes of one width. page_rows: in the order of `ids`.
    """

    def __init__(self, ids: np.ndarray, page_rows: np.ndarray) -> None:
        self.ids, self.page_rows = ids, page_rows

    @classmethod
    def of(cls, passages: RowStore) -> PageIds:
        """Of passages that lie page after page."""
        page_of_row_N = passages.column("page_row")
        assert (np.diff(page_of_row_N) >= 0).all(), "passages lie page after page"
        pages, first = np.unique(page_of_row_N, return_index=True)
        ids = np.array([text.encode() for text in passages.take(first, ["wikipedia_id"])["wikipedia_id"]] or [b""])
        order = np.argsort(ids[: len(pages)])
        return cls(ids[order], pages[order])

    @classmethod
    def open(cls, folder: Path) -> PageIds:
        """Raises: ArtifactError if the files are not there or no arrays."""
        try:
            ids, page_rows = (np.load(folder / name, mmap_mode="r") for name in PAGE_ID_FILES)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder}: its page ids cannot be read ({error}); build the index again") from error
        return cls(ids, page_rows)

    def save(self, folder: Path) -> None:
        for name, values in zip(PAGE_ID_FILES, (self.ids, self.page_rows), strict=True):
            np.save(folder / name, values)

    def find(self, wikipedia_ids: Iterable[str]) -> np.ndarray:
        """The numbers of the pages that are known, ascending, each once."""
        # numpy's bytes end with their last byte that is not NUL: an id that does would be taken for another. One
        # that is longer than any of the index is none of it, and would make numpy copy all ids at its own width.
        asked = {text.encode() for text in wikipedia_ids if not text.endswith("\0")}
        wanted = np.array(sorted(one for one in asked if len(one) <= self.ids.itemsize), self.ids.dtype)
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        return np.unique(self.page_rows[places[self.ids[places] == wanted]])
