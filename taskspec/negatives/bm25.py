"""BM25 over passages: the lexical baseline, and lexical negatives for training.

Path: prepared data → [here] → negatives artifact → batches; also a `Searcher` to evaluate beside the dense retriever.
N passages, K results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from taskspec import artifacts
from taskspec.config import Config
from taskspec.data.prepared import PreparedData
from taskspec.data.rows import RowStore
from taskspec.index.lexical import K1, B, Lexical, chunks
from taskspec.retrieve.catalog import Catalog
from taskspec.retrieve.hits import Hit, Level
from taskspec.retrieve.pages import Ranking
from taskspec.retrieve.retriever import check_request

KIND = "negatives"
RULE = "bm25"

SCHEMA = pa.schema(
    [
        ("query_row", pa.int64()),
        ("query_id", pa.string()),
        ("passage_rows", pa.list_(pa.int64())),
        ("passage_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("rule", pa.string()),
    ]
)
"""`<task>.parquet`: one row per train query, in their order; the lists best first, possibly empty."""


class BM25:
    """Ranks passages as `Lexical` does, and pages by their best passage.

    Example:
        hits = BM25.build(prepared).search(["who wrote The Silver Door"], task="nq", top_k=5)[0]
    """

    def __init__(self, passages: RowStore, lexical: Lexical) -> None:
        self._lexical = lexical
        self._catalog = Catalog(passages, RULE, lexical=lexical)

    @classmethod
    def build(cls, prepared: PreparedData) -> BM25:
        """Indexes all passages."""
        return cls(prepared.passages, Lexical.build(prepared.passages))

    def search(
        self,
        texts: Sequence[str],
        task: str,
        top_k: int = 10,
        level: Level = "page",
        with_text: bool = False,
    ) -> list[list[Hit]]:
        """The hits of each query, best first, equal scores by lower passage row. The task makes no difference.

        Raises: RequestError for top_k < 1 or an empty query.
        """
        check_request((task,), task, texts, top_k)
        result: list[list[Hit]] = []
        for rows in chunks(len(texts)):
            rankings = self.rank([texts[row] for row in rows], top_k, level)
            result += self._catalog.hits(rankings, level, with_text)
        return result

    def rank(self, texts: Sequence[str], top_k: int, level: Level) -> list[Ranking]:
        """`search` as scores and passage rows; at page level a page stands as its best passage."""
        return self._catalog.rank_lexical(texts, top_k, level)


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """What mining came to for one task."""

    queries: int
    kept: int
    """Negatives written."""
    dropped: int
    """Passages among the hits that were left out because they are of a gold page."""
    short: int
    """Queries with fewer negatives than `negatives.per_query`."""


def mine_bm25(prepared: PreparedData, config: Config, uri: str) -> dict[str, TaskCounts]:
    """Publishes the negatives of every task's train queries: their best BM25 hits that are of none of their gold pages.

    Negatives of the same prepared data and settings that stand there are left as they are.
    Returns: the counts of each task, which also stand in the manifest's facts. Raises: StoreError.
    """
    inputs, keys = {"prepared": prepared.id}, {"negatives": config.negatives.model_dump(mode="json")}
    if (stands := artifacts.standing(uri, KIND, inputs=inputs, config=keys)) is not None:
        return {task: TaskCounts(**count) for task, count in stands.facts["tasks"].items()}
    searcher = BM25.build(prepared)
    counts: dict[str, TaskCounts] = {}
    facts: dict[str, Any] = {"rule": RULE, "depth": config.negatives.depth, "k1": K1, "b": B}
    with artifacts.publishing(uri, KIND, inputs=inputs, config=config.model_dump(mode="json"), facts=facts) as folder:
        for task in prepared.tasks("train"):
            counts[task] = _mine_task(searcher, prepared, task, config, folder / f"{task}.parquet")
        facts["tasks"] = {task: asdict(count) for task, count in counts.items()}
    return counts


def _mine_task(searcher: BM25, prepared: PreparedData, task: str, config: Config, path: Path) -> TaskCounts:
    queries = prepared.queries(task, "train")
    page_of_row_N = prepared.passages.column("page_row")
    kept = dropped = short = 0
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for rows in chunks(len(queries)):
            taken = queries.take(rows, ["query_id", "text", "gold_page_rows"])
            lists: dict[str, list[list[Any]]] = {"passage_rows": [], "passage_ids": [], "scores": []}
            rankings = searcher.rank(taken["text"], config.negatives.depth, "passage")
            for ranking, gold_page_rows in zip(rankings, taken["gold_page_rows"], strict=True):
                wrong_K = ~np.isin(page_of_row_N[ranking.rows_K], gold_page_rows)
                negatives = ranking.rows_K[wrong_K][: config.negatives.per_query]
                lists["passage_rows"].append(negatives.tolist())
                lists["passage_ids"].append(prepared.passages.take(negatives, ["passage_id"])["passage_id"])
                lists["scores"].append(ranking.scores_K[wrong_K][: len(negatives)].tolist())
                kept += len(negatives)
                dropped += int(np.count_nonzero(~wrong_K))
                short += len(negatives) < config.negatives.per_query
            columns = {"query_row": list(rows), "query_id": taken["query_id"], **lists, "rule": [RULE] * len(rows)}
            writer.write_table(pa.table(columns, schema=SCHEMA))
    return TaskCounts(len(queries), kept, dropped, short)
