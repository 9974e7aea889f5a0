"""BM25 over passages: the lexical baseline, and lexical negatives for training.

Path: prepared data → [here] → negatives artifact → batches; also a `Searcher` to evaluate beside the dense retriever.
N passages, K results. The index of all passages is held in memory: right for up to a few million of them, and not the
place for a whole Wikipedia.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import Stemmer
from bm25s.tokenization import Tokenizer

from taskspec import store
from taskspec.config import Config
from taskspec.data.prepared import PreparedData
from taskspec.data.rows import RowStore
from taskspec.retrieve.hits import Hit, Level
from taskspec.retrieve.pages import Ranking, search_pages
from taskspec.retrieve.retriever import check_request

KIND = "negatives"
RULE = "bm25"
K1, B = 0.9, 0.4
"""Pyserini's values, with which KILT's BM25 figures are computed."""
CHUNK = 1024
"""Rows whose texts are in memory at once, passages as well as queries."""

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
    """Ranks passages by the stemmed English words they share with a query; their title counts as part of them.

    A passage that shares no word is no hit, so there may be fewer than were asked for.

    Example:
        hits = BM25.build(prepared).search(["who wrote The Silver Door"], task="nq", top_k=5)[0]
    """

    def __init__(self, passages: RowStore, tokenizer: Tokenizer, index: bm25s.BM25) -> None:
        self._passages = passages
        self._tokenizer = tokenizer
        self._index = index
        self._page_of_row_N = passages.column("page_row")

    @classmethod
    def build(cls, prepared: PreparedData) -> BM25:
        """Indexes all passages."""
        passages = prepared.passages
        tokenizer = Tokenizer(stopwords="english", stemmer=Stemmer.Stemmer("english"))
        ids: list[list[int]] = []
        for rows in _chunks(len(passages)):
            taken = passages.take(rows, ["title", "text"])
            texts = [f"{title} {text}" for title, text in zip(taken["title"], taken["text"], strict=True)]
            ids += tokenizer.tokenize(texts, update_vocab=True, show_progress=False, allow_empty=False)
        index = bm25s.BM25(k1=K1, b=B)
        index.index((ids, tokenizer.get_vocab_dict()), show_progress=False)
        return cls(passages, tokenizer, index)

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
        columns = ["passage_id", "wikipedia_id", "title", *(["text"] if with_text else [])]
        for rows in _chunks(len(texts)):
            for ranking in self.rank([texts[row] for row in rows], top_k, level):
                taken = self._passages.take(ranking.rows_K, columns)
                ids = taken["wikipedia_id" if level == "page" else "passage_id"]
                found = taken["text"] if with_text else [None] * len(ids)
                fields = zip(ids, ranking.scores_K.tolist(), taken["wikipedia_id"], taken["title"], found, strict=True)
                result.append([Hit(rank, *field) for rank, field in enumerate(fields, start=1)])
        return result

    def rank(self, texts: Sequence[str], top_k: int, level: Level) -> list[Ranking]:
        """`search` as scores and passage rows; at page level a page stands as its best passage."""
        tokens = self._tokenizer.tokenize(list(texts), update_vocab=False, show_progress=False, allow_empty=False)
        if level == "passage":
            return [self._best_passages(words, top_k) for words in tokens]

        def search(numbers_B: np.ndarray, passages: int) -> list[Ranking]:
            return [self._best_passages(tokens[number], passages) for number in numbers_B.tolist()]

        return search_pages(search, self._page_of_row_N, np.arange(len(texts)), top_k)

    def _best_passages(self, words: list[int], top_k: int) -> Ranking:
        if not words:
            return Ranking(np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64))
        scores_N = self._index.get_scores_from_ids(words)
        least = 0.0
        if top_k < len(scores_N):
            least = np.partition(scores_N, -top_k)[-top_k]
        # All that tie with the last one are sorted too, so that the lower row wins.
        rows = np.flatnonzero((scores_N >= least) & (scores_N > 0))
        rows_K = rows[np.argsort(-scores_N[rows], kind="stable")][:top_k]
        return Ranking(scores_N[rows_K], rows_K)


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

    Returns: the counts of each task, which also stand in the manifest's facts. Raises: StoreError.
    """
    searcher = BM25.build(prepared)
    counts: dict[str, TaskCounts] = {}
    facts: dict[str, Any] = {"rule": RULE, "depth": config.negatives.depth, "k1": K1, "b": B}
    inputs = {"prepared": prepared.id}
    with store.publishing(uri, KIND, inputs=inputs, config=config.model_dump(mode="json"), facts=facts) as folder:
        for task in prepared.tasks("train"):
            counts[task] = _mine_task(searcher, prepared, task, config, folder / f"{task}.parquet")
        facts["tasks"] = {task: asdict(count) for task, count in counts.items()}
    return counts


def _mine_task(searcher: BM25, prepared: PreparedData, task: str, config: Config, path: Path) -> TaskCounts:
    queries = prepared.queries(task, "train")
    page_of_row_N = prepared.passages.column("page_row")
    kept = dropped = short = 0
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for rows in _chunks(len(queries)):
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


def _chunks(count: int) -> Iterator[range]:
    for start in range(0, count, CHUNK):
        yield range(start, min(start + CHUNK, count))
