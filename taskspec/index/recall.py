"""How much of the exact answer an approximate index finds, task by task, and how hard its searches must try for it.

Path: shards, exact answers of the task's own dev queries → [here] → manifest.  B queries of a task, K results, R rows
that are right, N passages of a shard, D the embedding's dimension.

Exact answers are taken shard by shard, while a shard's embeddings are still in memory, and merged as results are. So
recall is measured against all passages, by queries as users ask them and not by passages, and nothing is embedded
twice. Passages may be copies of each other: whichever of equal ones is found, it is right. No Ray and no files in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import faiss
import numpy as np

from taskspec.index.kinds import KINDS
from taskspec.index.shard import SPARE, Results, merge_top_k, row_scores
from taskspec.sections import KindName, Section

Z_95 = 1.959964
"""Of the normal distribution's two-sided 95%."""
MOST_EQUALS = 10_000
"""Rows of a shard beyond the best K that are looked at for scores equal to the last of those."""


class Recall(Section):
    """What one task's dev queries found."""

    effort: int | None
    """How hard the task's searches try, of the kind's `efforts`; None where there is no choice."""
    chosen_at: float
    """Mean share of the exact best `at` passages among those found, by the queries that chose the effort."""
    queries: int
    value: float
    """The same share, by these other queries: choosing flatters those that choose."""
    low: float
    high: float
    """Its 95% interval."""


class MeasuredRecall(Section):
    """Of an index, when it was built."""

    at: int
    wanted: float
    tasks: dict[str, Recall]

    def effort(self, task: str) -> int | None:
        """How hard a search of this task tries: as measured, or as hard as any must where it has no dev queries; None
        is as hard as it can."""
        if task in self.tasks:
            return self.tasks[task].effort
        return max((one.effort for one in self.tasks.values() if one.effort is not None), default=None)

    @property
    def missed(self) -> dict[str, Recall]:
        """The tasks that do not reach what is wanted, however hard they try."""
        return {task: one for task, one in self.tasks.items() if one.chosen_at < self.wanted}


def exact_answers(embeddings_ND: np.ndarray, row_start: int, queries_BD: np.ndarray, top_k: int) -> Results:
    """The best rows of a shard, and every other row that scores as the last of them; scores as a `FlatShard` has them.

    Returns: as many columns as the query with most equals needs; row −1 with score −inf fills up.
    """
    embeddings_ND = np.ascontiguousarray(embeddings_ND, dtype=np.float32)
    queries_BD = np.ascontiguousarray(queries_BD, dtype=np.float32)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    asked_B = np.arange(len(queries_BD))
    for more in (SPARE, MOST_EQUALS):
        width = min(top_k + more, len(embeddings_ND))
        _, rows_BF = faiss.knn(queries_BD[asked_B], embeddings_ND, width, metric=faiss.METRIC_INNER_PRODUCT)
        equal = []
        for number, rows_F in zip(asked_B.tolist(), rows_BF, strict=True):
            scores_F = row_scores(embeddings_ND, queries_BD[number : number + 1], rows_F[None])[0]
            right_F = scores_F >= np.sort(scores_F)[-min(top_k, width)]
            found[number] = scores_F[right_F], rows_F[right_F]
            if right_F.all() and width < len(embeddings_ND):
                equal.append(number)  # there may be more of them than were looked at
        asked_B = np.array(equal, dtype=np.int64)
        if not equal:
            break
    columns = max(len(rows) for _, rows in found.values())
    scores_BR = np.full((len(queries_BD), columns), -np.inf, dtype=np.float32)
    rows_BR = np.full((len(queries_BD), columns), -1, dtype=np.int64)
    for number, (scores, rows) in found.items():
        scores_BR[number, : len(rows)], rows_BR[number, : len(rows)] = scores, rows + row_start
    return Results(scores_BR, rows_BR)


def right_rows(parts: Sequence[Results], top_k: int) -> np.ndarray:
    """(B, R): of all shards' exact answers those that score no less than the last of the best `top_k`; −1 fills up."""
    scores_BR, rows_BR = merge_top_k(parts, sum(part.rows_BK.shape[1] for part in parts))
    last_B1 = scores_BR[:, :top_k][:, -1:]
    return np.where(scores_BR >= last_B1, rows_BR, -1)


def interval(share: float, queries: int) -> tuple[float, float]:
    """95% interval of a mean of shares between 0 and 1, one a query: Wilson's, as if each share were a yes or a no.

    Shares between vary less than that, so it is rather too wide, and stays an interval where all shares are 1.
    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    n, z2 = queries, Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def shares_found(found_BK: np.ndarray, right_BR: np.ndarray) -> np.ndarray:
    """(B,): which share of the K rows found for each query is right; row −1 is not."""
    pairs = zip(found_BK, right_BR, strict=True)
    return np.array([(np.isin(found, right) & (found >= 0)).mean() for found, right in pairs])


Search = Callable[[np.ndarray, int, int | None], Results]
"""(queries (B, D), top_k, effort) → the merged results of all shards."""


def measure(
    kind: KindName,
    search: Search,
    queries: Mapping[str, np.ndarray],
    right: Mapping[str, np.ndarray],
    *,
    at: int,
    wanted: float,
) -> MeasuredRecall:
    """Finds for every task the least effort whose recall is as wanted, or else the best there is.

    Where there is a choice, every other query makes it and the rest measure what it gives; a single query, and a kind
    without a choice, does both.

    Args: queries: task → (B, D), B ≥ 1. right: task → (B, R) `right_rows`.
    """
    efforts: Sequence[int | None] = KINDS[kind].efforts or (None,)

    def share(task: str, part: slice, effort: int | None) -> float:
        found = search(queries[task][part], at, effort)
        return float(shares_found(found.rows_BK, right[task][part]).mean())

    tasks = {}
    for task, queries_BD in queries.items():
        split = len(efforts) > 1 and len(queries_BD) > 1
        choosing, measuring = (slice(0, None, 2), slice(1, None, 2)) if split else (slice(None), slice(None))
        tried: dict[int | None, float] = {}
        for effort in efforts:
            tried[effort] = share(task, choosing, effort)
            if tried[effort] >= wanted:
                break
        chosen = effort if tried[effort] >= wanted else max(tried, key=tried.__getitem__)
        value = share(task, measuring, chosen) if split else tried[chosen]
        count = len(queries_BD[measuring])
        low, high = interval(value, count)
        tasks[task] = Recall(effort=chosen, chosen_at=tried[chosen], queries=count, value=value, low=low, high=high)
    return MeasuredRecall(at=at, wanted=wanted, tasks=tasks)
