"""A checkpoint and the index built from it, as one object that answers queries.

Path: checkpoint + index → [here] → evaluation, mining, HTTP.  B queries, D the embedding's dimension, N passages. No
network and no batching of concurrent requests here: serving puts those around `embed` and `search_embeddings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from taskspec import store
from taskspec.data.rows import RowStore
from taskspec.errors import RequestError
from taskspec.index.manifest import KIND, PASSAGES_FILE, IndexManifest
from taskspec.index.shard import Shard, merge_top_k
from taskspec.model.contract import Contract, ContractTask
from taskspec.retrieve.hits import Hit, Level
from taskspec.retrieve.pages import Ranking, search_pages


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


class Retriever:
    """Answers queries from an index by the model that embedded it. Searching is safe from several threads.

    Example:
        retriever = Retriever.open("artifacts/runs/taco/step-00001000", "artifacts/index")
        hits = retriever.search(["who wrote Faust"], task="nq", top_k=5)[0]
    """

    def __init__(self, encoder: QueryEncoder, shards: Sequence[Shard], passages: RowStore, version: str) -> None:
        """Args: shards: of the rows of `passages`, disjoint and together all of them. version: the index's."""
        self._encoder = encoder
        self._shards = shards
        self._passages = passages
        self._page_of_row_N = passages.column("page_row")
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
        shards = [Shard.load(artifact.folder / s.file, s.row_start, s.max_norm) for s in manifest.shards]
        passages = RowStore(artifact.folder / PASSAGES_FILE)
        return cls(open_encoder(checkpoint), shards, passages, index_version(artifact.id))

    def with_tasks(self, tasks: Sequence[ContractTask]) -> Retriever:
        """The same weights and index answering these tasks instead; passages are embedded without a task."""
        return Retriever(self._encoder.with_tasks(tasks), self._shards, self._passages, self.version)

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
    ) -> list[list[Hit]]:
        """The hits of each query, best first, equal scores by lower passage row.

        Args: level: `page` gives each page once, by its best passage. with_text: fill `Hit.text`.
        Returns: `top_k` hits per query, fewer only where the index has fewer pages or passages.
        Raises: RequestError for an unknown task (listing the known ones), top_k < 1 or an empty query.
        """
        check_request((t.name for t in self.contract.tasks), task, texts, top_k)
        if not texts:
            return []
        embeddings_BD, _ = self.embed(task, texts)
        return self.search_embeddings(embeddings_BD, top_k, level, with_text)

    def embed(self, task: str, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns: (B, D) float32, and (B,) bool: which queries were cut to the task's length."""
        return self._encoder.embed_queries(task, texts)

    def search_embeddings(self, queries_BD: np.ndarray, top_k: int, level: Level, with_text: bool) -> list[list[Hit]]:
        """`search` from embeddings on, for queries of any tasks."""
        if level == "page":
            rankings = search_pages(self._search_passages, self._page_of_row_N, queries_BD, top_k)
        else:
            rankings = self._search_passages(queries_BD, top_k)
        return self._hits(rankings, level, with_text)

    def _search_passages(self, queries_BD: np.ndarray, top_k: int) -> list[Ranking]:
        results = merge_top_k([shard.search(queries_BD, top_k) for shard in self._shards], top_k)
        return [Ranking(scores_K, rows_K) for scores_K, rows_K in zip(*results, strict=True)]

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
