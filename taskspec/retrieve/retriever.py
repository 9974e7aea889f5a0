"""A checkpoint and the index built from it, as one object that answers queries.

Path: checkpoint + index → [here] → evaluation, mining, HTTP.  B queries, D the embedding's dimension, N passages. No
network and no batching of concurrent requests here: serving puts those around `embed` and `search_embeddings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from taskspec import store
from taskspec.data.rows import RowStore
from taskspec.errors import RequestError
from taskspec.index.manifest import KIND, PASSAGES_FILE, IndexManifest
from taskspec.index.page_ids import PageIds
from taskspec.index.recall import MeasuredRecall
from taskspec.index.shard import Results, Shard, load_shard, merge_top_k
from taskspec.model.contract import Contract, ContractTask
from taskspec.retrieve.hits import Hit, Level
from taskspec.retrieve.pages import Ranking, best_per_page, search_until_full


class Searcher(Protocol):
    """Whatever answers queries with ranked hits: the dense retriever, BM25."""

    def search(
        self,
        texts: Sequence[str],
        task: str,
        top_k: int = 10,
        level: Level = "page",
        with_text: bool = False,
    ) -> list[list[Hit]]:
        """Returns: the hits of each query, best first, at most `top_k`. Raises: RequestError."""
        ...


class QueryEncoder(Protocol):
    """The side of a `TextEncoder` that a retriever needs."""

    contract: Contract

    def embed_queries(self, task: str, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...

    def with_tasks(self, tasks: Sequence[ContractTask]) -> QueryEncoder: ...


def check_request(tasks: Iterable[str], task: str, texts: Sequence[str], top_k: int) -> None:
    """The rules of every search. Raises: RequestError naming the parameter, the value and, of tasks, the known ones."""
    known = list(tasks)
    if task not in known:
        raise RequestError(f"unknown task {task!r}; known: {', '.join(known)}", param="task")
    if top_k < 1:
        raise RequestError(f"top_k must be at least 1 but is {top_k}", param="top_k")
    for number, text in enumerate(texts):
        if not text.strip():
            raise RequestError(f"query {number} of {len(texts)} (from 0) is empty", param="query")


class PageChoice(NamedTuple):
    """Which pages may be found, by number."""

    only: np.ndarray | None
    """None is all but those `without`, which are left out here already."""
    without: np.ndarray


EVERY_PAGE = PageChoice(None, np.empty(0, np.int64))


class Retriever:
    """Answers queries from an index by the model that embedded it. Searching is safe from several threads.

    Example:
        retriever = Retriever.open("artifacts/runs/taco/step-00001000", "artifacts/index")
        hits = retriever.search(["who wrote Faust"], task="nq", top_k=5)[0]
    """

    def __init__(
        self,
        encoder: QueryEncoder,
        shards: Sequence[Shard],
        passages: RowStore,
        version: str,
        recall: MeasuredRecall | None = None,
        page_ids: PageIds | None = None,
    ) -> None:
        """Args: shards: of the rows of `passages`, disjoint and together all of them. version: the index's. recall: as
        measured when it was built, for how hard each task's searches try. page_ids: of `passages`; made if None.
        """
        self._encoder = encoder
        self._shards = shards
        self._passages = passages
        self._page_of_row_N = passages.column("page_row")
        self._page_ids = page_ids
        self._recall = recall
        self.version = version

    @classmethod
    def open(cls, checkpoint: str, index: str) -> Retriever:
        """Opens both after comparing their contracts; the index stays on disk and is read as searches touch it.

        Raises: ContractError naming the first field that differs, ArtifactError, StoreError.
        """
        from taskspec.train.checkpoint import open_encoder, read_contract

        artifact = store.open_artifact(index, KIND)
        manifest = IndexManifest.of(index, artifact.manifest)
        manifest.require_built_by(read_contract(checkpoint), checkpoint, index)
        shards = [load_shard(artifact.folder / s.file, manifest.kind, s.row_start, s.max_norm) for s in manifest.shards]
        return cls(
            open_encoder(checkpoint),
            shards,
            RowStore(artifact.folder / PASSAGES_FILE),
            index_version(artifact.id),
            manifest.recall,
            PageIds.open(artifact.folder),
        )

    def with_tasks(self, tasks: Sequence[ContractTask]) -> Retriever:
        """The same weights and index answering these tasks instead; passages are embedded without a task."""
        encoder = self._encoder.with_tasks(tasks)
        return Retriever(encoder, self._shards, self._passages, self.version, self._recall, self._page_ids)

    @property
    def contract(self) -> Contract:
        return self._encoder.contract

    @property
    def shards(self) -> int:
        """How many shards a search goes through."""
        return len(self._shards)

    def search(
        self,
        texts: Sequence[str],
        task: str,
        top_k: int = 10,
        level: Level = "page",
        with_text: bool = False,
        only_pages: Sequence[str] | None = None,
        without_pages: Sequence[str] = (),
    ) -> list[list[Hit]]:
        """The hits of each query, best first, equal scores by lower passage row.

        Args: level: `page` gives each page once, by its best passage. with_text: fill `Hit.text`. only_pages,
            without_pages: wikipedia ids of the pages that may, or may not, be found; unknown ones match nothing.
        Returns: `top_k` hits per query; fewer only where fewer pages or passages may be found, or where an approximate
            index reaches no more.
        Raises: RequestError for an unknown task (listing the known ones), top_k < 1 or an empty query.
        """
        check_request((t.name for t in self.contract.tasks), task, texts, top_k)
        if not texts:
            return []
        embeddings_BD, _ = self.embed(task, texts)
        pages = self.choose_pages(only_pages, without_pages)
        return self.search_embeddings(embeddings_BD, top_k, level, with_text, self.effort(task), pages)

    def embed(self, task: str, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns: (B, D) float32, and (B,) bool: which queries were cut to the task's length."""
        return self._encoder.embed_queries(task, texts)

    def effort(self, task: str) -> int | None:
        """How hard a search for this task tries, as its recall was measured; None where there is no choice."""
        return self._recall.effort(task) if self._recall else None

    def choose_pages(self, only: Sequence[str] | None, without: Sequence[str]) -> PageChoice:
        """Which pages may be found, for `search_embeddings`.

        Args: only: wikipedia ids; None is all. without: wikipedia ids.
        """
        if only is None and not without:
            return EVERY_PAGE
        if self._page_ids is None:
            self._page_ids = PageIds.of(self._passages)
        excluded = self._page_ids.find(without)
        return PageChoice(None if only is None else np.setdiff1d(self._page_ids.find(only), excluded), excluded)

    def search_embeddings(
        self,
        queries_BD: np.ndarray,
        top_k: int,
        level: Level,
        with_text: bool,
        effort: int | None = None,
        pages: PageChoice = EVERY_PAGE,
    ) -> list[list[Hit]]:
        """`search` from embeddings on, for queries of any tasks."""

        def keep(ranking: Ranking) -> Ranking:
            if len(pages.without):
                kept_K = ~np.isin(self._page_of_row_N[ranking.rows_K], pages.without)
                ranking = Ranking(ranking.scores_K[kept_K], ranking.rows_K[kept_K])
            return best_per_page(ranking, self._page_of_row_N) if level == "page" else ranking

        def search(queries_BD: np.ndarray, passages: int) -> list[Ranking]:
            results = merge_top_k([shard.search(queries_BD, passages, effort) for shard in self._shards], passages)
            return [
                Ranking(scores_K[rows_K >= 0], rows_K[rows_K >= 0]) for scores_K, rows_K in zip(*results, strict=True)
            ]

        if pages.only is not None:
            rankings = [keep(ranking) for ranking in self._rank_pages(queries_BD, pages.only)]
            rankings = [Ranking(ranking.scores_K[:top_k], ranking.rows_K[:top_k]) for ranking in rankings]
        elif level == "page" or len(pages.without):
            rankings = search_until_full(search, keep, queries_BD, top_k, len(self._page_of_row_N))
        else:
            rankings = search(queries_BD, top_k)
        return self._hits(rankings, level, with_text)

    def _rank_pages(self, queries_BD: np.ndarray, pages: np.ndarray) -> list[Ranking]:
        """All passages of some pages, best first: each is scored, so none is missed."""
        starts, stops = (np.searchsorted(self._page_of_row_N, pages, side) for side in ("left", "right"))
        rows = np.concatenate([np.empty(0, np.int64), *map(np.arange, starts, stops)])
        parts = []
        for shard in self._shards:
            own = rows[(rows >= shard.row_start) & (rows < shard.row_start + shard.rows)]
            if len(own):
                parts.append(
                    Results(shard.score_rows(queries_BD, own), np.broadcast_to(own, (len(queries_BD), len(own))))
                )
        if not parts:
            return [Ranking(np.empty(0, np.float32), rows) for _ in queries_BD]
        return [Ranking(*one) for one in zip(*merge_top_k(parts, len(rows)), strict=True)]

    def _hits(self, rankings: Sequence[Ranking], level: Level, with_text: bool) -> list[list[Hit]]:
        columns = ["passage_id", "wikipedia_id", "title", *(["text"] if with_text else [])]
        passages = self._passages.take(np.concatenate([ranking.rows_K for ranking in rankings]), columns)
        ids = passages["wikipedia_id" if level == "page" else "passage_id"]
        texts: Sequence[str | None] = passages["text"] if with_text else [None] * len(ids)
        result, start = [], 0
        for ranking in rankings:
            result.append(
                [
                    Hit(rank, ids[i], score, passages["wikipedia_id"][i], passages["title"][i], texts[i])
                    for rank, (i, score) in enumerate(enumerate(ranking.scores_K.tolist(), start), start=1)
                ]
            )
            start += len(ranking.rows_K)
        return result


def index_version(artifact_id: str) -> str:
    """The name of an index's content in answers: the first 12 characters of its artifact's id."""
    return artifact_id[:12]
