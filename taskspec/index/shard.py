"""One shard of the index: search by inner product with FAISS, and the merge of several shards' results.

Path: embeddings → [here] → index, retriever.  B queries, N passages of a shard, D the embedding's dimension, K results.
Rows are global passage rows (`row_start` + the number inside the shard), so shards are merged by row and never joined.
No texts, no pages, no files but the shard's own.

A `FlatShard`'s results are those of real arithmetic rounded once, equal scores by lower row, for any number of shards.
FAISS alone does not give that: it keeps an arbitrary one of equal scores at the cut, and its float32 sums depend on the
shape of the matrix product. So it proposes candidates, with some to spare; their scores are taken again in float64; and
where its rounding could have hidden a better row, a second pass fetches every row within the error bound.

An `ApproximateShard` answers as FAISS does for its kind (`kinds.py`), and tries as hard as it is told.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from taskspec.errors import ArtifactError
from taskspec.index.kinds import KINDS
from taskspec.sections import KindName

SPARE = 8
"""Candidates fetched beyond top_k, so that the error bound seldom reaches the last of them."""
RESCORED_ROWS = 4096
"""Rows whose scores are taken again at a time: bounds memory when very many tie."""
BLAS_FROM_QUERIES = 3
"""Searching this many queries at once goes through BLAS; FAISS by itself waits for 128,000 / D of them, and is about
eight times slower up to there. One or two queries are faster on its scanning path."""


TRAINED_ON = 262_144
"""Vectors of a shard that its codes and lists are learned from, at most."""
FAISS_CLASSES: dict[KindName, Any] = {
    "flat": faiss.IndexFlatIP,
    "fp16": faiss.IndexScalarQuantizer,
    "sq8": faiss.IndexScalarQuantizer,
    "ivf": faiss.IndexIVFScalarQuantizer,
    "hnsw": faiss.IndexHNSWSQ,
    "pq": faiss.IndexRefine,
}


class Results(NamedTuple):
    """The best rows of each query, best first, equal scores by lower row."""

    scores_BK: np.ndarray
    """float32."""
    rows_BK: np.ndarray
    """int64."""

    @staticmethod
    def none(queries: int) -> Results:
        """No columns."""
        return Results(np.empty((queries, 0), dtype=np.float32), np.empty((queries, 0), dtype=np.int64))


class Shard(ABC):
    """A run of passage embeddings, searched as a whole. Searching is safe from several threads.

    Example:
        shard = make_shard("flat", embeddings_ND, row_start=0)
        scores_BK, rows_BK = shard.search(queries_BD, top_k=10)

    Attributes: index: of FAISS. kind; row_start; max_norm: largest length of an embedding.
    """

    def __init__(self, index: Any, kind: KindName, row_start: int, max_norm: float) -> None:
        self.index, self.kind, self.row_start, self.max_norm = index, kind, row_start, max_norm
        faiss.cvar.distance_compute_blas_threshold = BLAS_FROM_QUERIES * index.d  # of the whole process

    @property
    def rows(self) -> int:
        return int(self.index.ntotal)

    def save(self, path: Path) -> None:
        faiss.write_index(self.index, str(path))

    def search(self, queries_BD: np.ndarray, top_k: int, effort: int | None = None) -> Results:
        """The best rows of each query.

        Args: effort: how hard to try, of the kind's `efforts`; None is as hard as it can, where nothing was measured.
        Returns: K = min(top_k, rows) columns; where fewer rows were reached, row −1 with score −inf fills up.
        """
        queries_BD = np.ascontiguousarray(queries_BD, dtype=np.float32)
        assert np.isfinite(queries_BD).all(), "FAISS answers row −1 where a score is not a number"
        wanted = min(top_k, self.rows)
        if not wanted * len(queries_BD):
            return Results.none(len(queries_BD))
        return self._search(queries_BD, wanted, effort)

    @abstractmethod
    def _search(self, queries_BD: np.ndarray, wanted: int, effort: int | None) -> Results: ...

    def rank(self, queries_BD: np.ndarray, rows: np.ndarray, top_k: int) -> Results:
        """The best of some global rows, those that lie in this shard: each is scored, whatever a search would reach.

        Args: rows: ascending.
        Returns: K = min(top_k, those rows) columns.
        """
        queries_BD = np.ascontiguousarray(queries_BD, dtype=np.float32)
        numbers = rows[(rows >= self.row_start) & (rows < self.row_start + self.rows)] - self.row_start
        wanted = min(top_k, len(numbers))
        if not wanted * len(queries_BD):
            return Results.none(len(queries_BD))
        return self._rank(queries_BD, numbers, wanted)

    @abstractmethod
    def _rank(self, queries_BD: np.ndarray, numbers: np.ndarray, wanted: int) -> Results: ...


def make_shard(kind: KindName, embeddings_ND: np.ndarray, row_start: int) -> Shard:
    """Learns its codes and lists, where the kind has some, and fills a shard."""
    embeddings_ND = np.ascontiguousarray(embeddings_ND, dtype=np.float32)
    passages, dimension = embeddings_ND.shape
    max_norm = float(np.linalg.norm(embeddings_ND, axis=1).max()) if passages else 0.0
    if kind == "flat":
        flat = faiss.IndexFlatIP(dimension)
        if passages:
            flat.add(embeddings_ND)
        return FlatShard(flat, kind, row_start, max_norm)
    index = faiss.index_factory(dimension, KINDS[kind].factory(passages, dimension), faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(row_start).permutation(passages)[:TRAINED_ON]
    index.train(embeddings_ND[np.sort(sample)])
    index.add(embeddings_ND)
    return ApproximateShard(index, kind, row_start, max_norm)


def load_shard(path: Path, kind: KindName, row_start: int, max_norm: float) -> Shard:
    """Opens a saved shard without reading it: pages come in as searches touch them and are shared by processes.

    Raises: ArtifactError if the file is no FAISS index of this kind.
    """
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        reason = re.split(r"\.cpp:\d+: ", str(error))[-1]  # without the C++ function and its line
        raise ArtifactError(f"{path}: is no FAISS index ({reason}); build the index again") from error
    needed = FAISS_CLASSES[kind]
    if not isinstance(index, needed) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ArtifactError(
            f"{path}: holds {type(index).__name__} but needs {needed.__name__} of inner products; build the index again"
        )
    return (FlatShard if kind == "flat" else ApproximateShard)(index, kind, row_start, max_norm)


class FlatShard(Shard):
    """Exact search."""

    def _search(self, queries_BD: np.ndarray, wanted: int, effort: int | None) -> Results:
        fetched = min(wanted + SPARE, self.rows)
        rough_BF, candidates_BF = self.index.search(queries_BD, fetched)
        # The best by FAISS score at least as the last of them less the error; what by FAISS has another error less than
        # that is behind all of them.
        least_B = rough_BF[:, wanted - 1] - 2 * self._error(queries_BD)
        near_B = (rough_BF >= least_B[:, None]).sum(axis=1)
        near_BC = candidates_BF[:, : near_B.max()]
        best_BK = self._best(queries_BD, near_BC, wanted)
        for number in np.flatnonzero(near_B == fetched) if fetched < self.rows else ():  # others may be as near
            near_C = self._all_above(queries_BD[number], least_B[number])
            one = self._best(queries_BD[number : number + 1], near_C[None], wanted)
            best_BK.scores_BK[number], best_BK.rows_BK[number] = one.scores_BK[0], one.rows_BK[0]
        return Results(best_BK.scores_BK, best_BK.rows_BK + self.row_start)

    def _best(self, queries_BD: np.ndarray, numbers_BC: np.ndarray, wanted: int) -> Results:
        """Of some rows for each query, by their numbers here."""
        return merge_top_k([Results(row_scores(self._vectors_ND, queries_BD, numbers_BC), numbers_BC)], wanted)

    def _rank(self, queries_BD: np.ndarray, numbers: np.ndarray, wanted: int) -> Results:
        chosen = make_shard("flat", self._vectors_ND[numbers], 0).search(queries_BD, wanted)
        return Results(chosen.scores_BK, numbers[chosen.rows_BK] + self.row_start)

    def _error(self, queries_BD: np.ndarray) -> np.ndarray:
        """(B,) bounds on |FAISS's score − ours|: D products and D sums in any order, each off by at most 2^-24 of
        |q|·|x|, and our own rounding, which the factor 2 covers."""
        lengths_B: np.ndarray = np.linalg.norm(queries_BD.astype(np.float64), axis=1)
        bounds_B: np.ndarray = 2 * queries_BD.shape[1] * 2**-24 * self.max_norm * lengths_B
        return bounds_B

    def _all_above(self, query_D: np.ndarray, score: float) -> np.ndarray:
        """Numbers of all rows whose score by FAISS is above, or equal where rounding leaves no room below."""
        below = np.nextafter(np.float32(score) - np.finfo(np.float32).tiny, np.float32(-np.inf))
        _, _, numbers = self.index.range_search(query_D[None], float(below))
        return np.asarray(numbers, dtype=np.int64)

    @property
    def _vectors_ND(self) -> np.ndarray:
        """What the index holds, not a copy."""
        return np.asarray(faiss.rev_swig_ptr(self.index.get_xb(), self.rows * self.index.d)).reshape(self.rows, -1)


def row_scores(vectors_ND: np.ndarray, queries_BD: np.ndarray, numbers_BC: np.ndarray) -> np.ndarray:
    """(B, C) float32 scores of some rows for each query.

    Products of float32 are exact in float64 and each row is summed by itself, so a score does not depend on which other
    rows are asked for.
    """
    queries_B1D = queries_BD[:, None].astype(np.float64)
    columns = max(1, RESCORED_ROWS // len(queries_BD))
    pieces = [
        np.vecdot(vectors_ND[numbers_BC[:, start : start + columns]].astype(np.float64), queries_B1D)
        for start in range(0, numbers_BC.shape[1], columns)
    ]
    return np.concatenate(pieces, axis=1).astype(np.float32)


class ApproximateShard(Shard):
    """Search as FAISS does it for the kind."""

    def _search(self, queries_BD: np.ndarray, wanted: int, effort: int | None) -> Results:
        return self._results(*self.index.search(queries_BD, wanted, params=self._parameters(effort)))

    def _results(self, scores_BK: np.ndarray, numbers_BK: np.ndarray) -> Results:
        """Of what FAISS answered."""
        reached_BK = numbers_BK >= 0
        rows_BK = np.where(reached_BK, numbers_BK + self.row_start, -1)
        return merge_top_k([Results(np.where(reached_BK, scores_BK, -np.inf), rows_BK)], rows_BK.shape[1])

    def _parameters(self, effort: int | None, selected: Any = None) -> Any:
        kind = KINDS[self.kind]
        if not kind.efforts:
            return None
        effort = effort or kind.efforts[-1]
        parameters: Any = faiss  # its stubs know neither the classes nor their arguments
        if self.kind == "ivf":
            return parameters.SearchParametersIVF(nprobe=min(effort, self.index.nlist), sel=selected)
        if self.kind == "hnsw":
            return parameters.SearchParametersHNSW(efSearch=effort)
        return parameters.IndexRefineSearchParameters(k_factor=effort)

    def _rank(self, queries_BD: np.ndarray, numbers: np.ndarray, wanted: int) -> Results:
        if self.kind == "ivf":  # its vectors lie in lists, by none of their numbers
            every = self._parameters(self.index.nlist, faiss.IDSelectorBatch(numbers))
            return self._results(*self.index.search(queries_BD, wanted, params=every))
        codes = {"pq": "refine_index", "hnsw": "storage"}.get(self.kind)
        holder = faiss.downcast_index(getattr(self.index, codes) if codes else self.index)
        scores_BK, places_BK = faiss.knn(
            queries_BD, holder.reconstruct_batch(numbers), wanted, metric=faiss.METRIC_INNER_PRODUCT
        )
        return self._results(scores_BK, numbers[places_BK])


def merge_top_k(parts: Sequence[Results], top_k: int) -> Results:
    """The best of several shards' results for the same queries; rows of shards are disjoint.

    Returns: min(top_k, all columns) columns, best first, equal scores by lower row.
    """
    scores_BK = np.concatenate([part.scores_BK for part in parts], axis=1)
    rows_BK = np.concatenate([part.rows_BK for part in parts], axis=1)
    best_BK = np.lexsort((rows_BK, -scores_BK), axis=1)[:, :top_k]
    return Results(np.take_along_axis(scores_BK, best_BK, 1), np.take_along_axis(rows_BK, best_BK, 1))
