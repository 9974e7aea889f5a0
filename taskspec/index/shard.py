"""One shard of the index: exact search by inner product with FAISS, and the merge of several shards' results.

Path: embeddings → [here] → index, retriever.  B queries, N passages of a shard, D the embedding's dimension, K results.
Rows are global passage rows (`row_start` + the number inside the shard), so shards are merged by row and never joined.
No texts, no pages, no files but the shard's own.

Results are those of real arithmetic rounded once, equal scores by lower row, for any number of shards. FAISS alone
does not give that: it keeps an arbitrary one of equal scores at the cut, and its float32 sums depend on the shape of
the matrix product. So it proposes candidates, with some to spare; their scores are taken again in float64; and where
its rounding could have hidden a better row, a second pass fetches every row within the error bound.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from taskspec.errors import ArtifactError

SPARE = 32
"""Candidates fetched beyond top_k, so that the error bound seldom reaches the last of them."""
RESCORED_ROWS = 4096
"""Rows whose scores are taken again at a time: bounds memory when very many tie."""
BLAS_FROM_QUERIES = 3
"""Searching this many queries at once goes through BLAS; FAISS by itself waits for 128,000 / D of them, and is about
eight times slower up to there. One or two queries are faster on its scanning path."""


class Results(NamedTuple):
    """The best rows of each query, best first, equal scores by lower row."""

    scores_BK: np.ndarray
    """float32."""
    rows_BK: np.ndarray
    """int64."""


@dataclass
class Shard:
    """A run of passage embeddings, searched as a whole. Searching is safe from several threads.

    Example:
        shard = Shard.empty(dimension=128, row_start=0)
        shard.add(embeddings_ND)
        scores_BK, rows_BK = shard.search(queries_BD, top_k=10)
    """

    index: Any
    """faiss.IndexFlatIP."""
    row_start: int
    max_norm: float
    """Largest length of an embedding: how far FAISS's sums can be off grows with it."""

    def __post_init__(self) -> None:
        faiss.cvar.distance_compute_blas_threshold = BLAS_FROM_QUERIES * self.index.d  # of the whole process

    @classmethod
    def empty(cls, dimension: int, row_start: int) -> Shard:
        return cls(faiss.IndexFlatIP(dimension), row_start, 0.0)

    @classmethod
    def load(cls, path: Path, row_start: int, max_norm: float) -> Shard:
        """Opens a saved shard without reading it: pages come in as searches touch them and are shared by processes.

        Raises: ArtifactError if the file is no FAISS index of this kind.
        """
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            reason = re.split(r"\.cpp:\d+: ", str(error))[-1]  # without the C++ function and its line
            raise ArtifactError(f"{path}: is no FAISS index ({reason}); build the index again") from error
        if not isinstance(index, faiss.IndexFlatIP):
            raise ArtifactError(f"{path}: holds {type(index).__name__} but needs IndexFlatIP; build the index again")
        return cls(index, row_start, max_norm)

    @property
    def rows(self) -> int:
        return int(self.index.ntotal)

    def add(self, embeddings_ND: np.ndarray) -> None:
        """Appends float32 embeddings, row after row."""
        if len(embeddings_ND):
            self.index.add(np.ascontiguousarray(embeddings_ND, dtype=np.float32))
            self.max_norm = max(self.max_norm, float(np.linalg.norm(embeddings_ND, axis=1).max()))

    def save(self, path: Path) -> None:
        faiss.write_index(self.index, str(path))

    def search(self, queries_BD: np.ndarray, top_k: int) -> Results:
        """The exact best rows of each query. Returns: K = min(top_k, rows) columns."""
        queries_BD = np.ascontiguousarray(queries_BD, dtype=np.float32)
        assert np.isfinite(queries_BD).all(), "FAISS answers row −1 where a score is not a number"
        wanted, fetched = min(top_k, self.rows), min(top_k + SPARE, self.rows)
        scores_BK = np.empty((len(queries_BD), wanted), dtype=np.float32)
        rows_BK = np.empty((len(queries_BD), wanted), dtype=np.int64)
        if not scores_BK.size:
            return Results(scores_BK, rows_BK)
        rough_BF, candidates_BF = self.index.search(queries_BD, fetched)
        for number, query_D in enumerate(queries_BD):
            candidates = candidates_BF[number]
            scores = self._scores(query_D, candidates)
            if fetched < self.rows:
                last = float(np.partition(scores, -wanted)[-wanted])
                error = self._error(query_D)
                if rough_BF[number, -1] + error >= last:  # a row that was not fetched may tie or be better
                    candidates = self._all_above(query_D, last - 2 * error)
                    scores = self._scores(query_D, candidates)
            best = np.lexsort((candidates, -scores))[:wanted]
            scores_BK[number] = scores[best]
            rows_BK[number] = candidates[best] + self.row_start
        return Results(scores_BK, rows_BK)

    def _error(self, query_D: np.ndarray) -> float:
        """Bound on |FAISS's score − ours|: D products and D sums in any order, each off by at most 2^-24 of |q|·|x|,
        and our own rounding, which the factor 2 covers."""
        return float(2 * len(query_D) * 2**-24 * np.linalg.norm(query_D) * self.max_norm)

    def _all_above(self, query_D: np.ndarray, score: float) -> np.ndarray:
        """Numbers of all rows whose score by FAISS is above, or equal where rounding leaves no room below."""
        below = np.nextafter(np.float32(score) - np.finfo(np.float32).tiny, np.float32(-np.inf))
        _, _, numbers = self.index.range_search(query_D[None], float(below))
        return np.asarray(numbers, dtype=np.int64)

    def _scores(self, query_D: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """float32 scores. Products of float32 are exact in float64 and each row is summed by itself, so a score does
        not depend on which other rows are asked for."""
        vectors_ND = faiss.rev_swig_ptr(self.index.get_xb(), self.rows * self.index.d).reshape(self.rows, -1)
        query_D = query_D.astype(np.float64)
        pieces = [
            (vectors_ND[numbers[start : start + RESCORED_ROWS]] * query_D).sum(axis=1)
            for start in range(0, len(numbers), RESCORED_ROWS)
        ]
        return np.concatenate(pieces).astype(np.float32)


def merge_top_k(parts: Sequence[Results], top_k: int) -> Results:
    """The best of several shards' results for the same queries; rows of shards are disjoint.

    Returns: min(top_k, all columns) columns, best first, equal scores by lower row.
    """
    scores_BK = np.concatenate([part.scores_BK for part in parts], axis=1)
    rows_BK = np.concatenate([part.rows_BK for part in parts], axis=1)
    best_BK = np.lexsort((rows_BK, -scores_BK), axis=1)[:, :top_k]
    return Results(np.take_along_axis(scores_BK, best_BK, 1), np.take_along_axis(rows_BK, best_BK, 1))
