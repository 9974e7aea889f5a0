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
"""(queries (B, D), top_k) → the best passages of each query: top_k of them, or all there are."""


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
    """The first `top_k` that are kept, for each query; fewer only where all rows hold fewer.

    Searches wider, for the queries that need it, until enough have come or all rows have.
    """
    found: dict[int, Ranking] = {}
    waiting = np.arange(len(queries_BD))
    passages = top_k
    while len(waiting):
        passages *= PASSAGES_PER_PAGE
        rankings = [keep(ranking) for ranking in search(queries_BD[waiting], passages)]
        full = passages >= rows
        for number, ranking in zip(waiting.tolist(), rankings, strict=True):
            if full or len(ranking.rows_K) >= top_k:
                found[number] = Ranking(ranking.scores_K[:top_k], ranking.rows_K[:top_k])
        waiting = np.array([number for number in waiting.tolist() if number not in found], dtype=np.int64)
    return [found[number] for number in range(len(queries_BD))]


def search_pages(
    search: SearchPassages, page_of_row_N: np.ndarray, queries_BD: np.ndarray, top_k: int
) -> list[Ranking]:
    """The best passage of each of the `top_k` best pages; fewer only where there are fewer pages."""

    def keep(ranking: Ranking) -> Ranking:
        return best_per_page(ranking, page_of_row_N)

    return search_until_full(search, keep, queries_BD, top_k, len(page_of_row_N))
