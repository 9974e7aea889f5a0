"""Passages to pages: a page is as good as its best passage.

Path: shards → [here] → retriever.  B queries, K results, N passages. Pure: knows page numbers, no texts and no FAISS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

PASSAGES_PER_PAGE = 3
"""How many passages are asked for per page wanted, and by how much more where that was too few."""


class Ranking(NamedTuple):
    """Passages of one query, best first."""

    scores_K: np.ndarray
    rows_K: np.ndarray


SearchPassages = Callable[[np.ndarray, int], list[Ranking]]
"""(queries (B, D), top_k) → the best passages of each query: top_k of them, or all that can be found."""


def best_per_page(ranking: Ranking, page_of_row_N: np.ndarray) -> Ranking:
    """Keeps the first, which is the best, passage of each page, in order."""
    _, first = np.unique(page_of_row_N[ranking.rows_K], return_index=True)
    first.sort()
    return Ranking(ranking.scores_K[first], ranking.rows_K[first])


Keep = Callable[[Ranking], Ranking]
"""What of a ranking counts: the best passage of each page, passages of allowed pages."""


def search_until_full(
    search: SearchPassages, keep: Keep, queries_BD: np.ndarray, top_k: int, rows: int
) -> list[Ranking]:
    """The first `top_k` that are kept, for each query; fewer only where no more can be found.

    Searches wider, for the queries that need it, until enough have come or the last search found all that it can: all
    rows, or all that an approximate index reaches.
    """
    found: dict[int, Ranking] = {}
    waiting = np.arange(len(queries_BD))
    passages = top_k
    while len(waiting):
        passages = min(passages * PASSAGES_PER_PAGE, max(rows, top_k))
        for number, ranking in zip(waiting.tolist(), search(queries_BD[waiting], passages), strict=True):
            kept = keep(ranking)
            if len(kept.rows_K) >= top_k or len(ranking.rows_K) < passages or passages >= rows:
                found[number] = Ranking(kept.scores_K[:top_k], kept.rows_K[:top_k])
        waiting = np.array([number for number in waiting.tolist() if number not in found], dtype=np.int64)
    return [found[number] for number in range(len(queries_BD))]
