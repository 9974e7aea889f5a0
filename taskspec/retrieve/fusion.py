"""One ranking of two: reciprocal rank fusion.

Path: dense and lexical rankings of one query → [here] → catalog.  K results. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taskspec.retrieve.pages import Ranking

RANK_OFFSET = 60
"""How little the first places stand out. Source: Cormack, Clarke, Büttcher, "Reciprocal Rank Fusion outperforms
Condorcet and individual rank learning methods", SIGIR 2009."""
FUSED_DEPTH = 100
"""Results of each ranking that are fused, at least."""


def fuse(rankings: Sequence[Ranking], unit_of_row_N: np.ndarray | None, top_k: int) -> Ranking:
    """Ranks units by Σ 1 / (60 + rank) over the rankings that hold them, ranks from 1; equal scores by lower row.

    Args: rankings: of the same query; a unit stands once in each. unit_of_row_N: the page of a row; None where each
        row is a unit.
    Returns: the fused scores; a unit stands as its row in the first ranking that holds it.
    """
    scores: dict[int, float] = {}
    rows: dict[int, int] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking.rows_K.tolist(), start=1):
            unit = row if unit_of_row_N is None else int(unit_of_row_N[row])
            scores[unit] = scores.get(unit, 0.0) + 1 / (RANK_OFFSET + rank)
            rows.setdefault(unit, row)
    best = sorted(scores, key=lambda unit: (-scores[unit], rows[unit]))[:top_k]
    return Ranking(
        np.array([scores[unit] for unit in best], dtype=np.float32), np.array([rows[unit] for unit in best], np.int64)
    )
