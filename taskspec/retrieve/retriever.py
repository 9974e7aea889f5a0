"""A checkpoint and the index built from it, as one object that answers queries.

Path: checkpoint + index → [here] → evaluation, mining.  B queries, D the embedding's dimension. Everything is in this
process; serving puts the same encoder and catalog behind a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from taskspec import artifacts
from taskspec.errors import RequestError
from taskspec.index.manifest import KIND, IndexManifest
from taskspec.model.contract import Contract, ContractTask
from taskspec.retrieve.catalog import Catalog, LocalShards, Shards, index_version
from taskspec.retrieve.hits import Hit, Level
from taskspec.sections import Precision


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


def require_lexical(lexical: bool) -> None:
    """Raises: RequestError where an index without a lexical part is asked for a fused ranking."""
    if not lexical:
        raise RequestError("fused needs an index with a lexical part: build it with index.lexical=true", param="fused")


class Retriever:
    """Answers queries from an index by the model that embedded it. Searching is safe from several threads.

    Example:
        retriever = Retriever.open("artifacts/runs/taco/step-00001000", "artifacts/index")
        hits = retriever.search(["who wrote Faust"], task="nq", top_k=5)[0]
    """

    def __init__(self, encoder: QueryEncoder, shards: Shards, catalog: Catalog) -> None:
        """Args: shards: of the rows of the catalog."""
        self._encoder = encoder
        self._shards = shards
        self._catalog = catalog

    @classmethod
    def open(cls, checkpoint: str, index: str, precision: Precision = "fp32") -> Retriever:
        """Opens both after comparing their contracts and every file's sha256; the index stays on disk and is read as
        searches touch it.

        Args: precision: of the queries' embedding.

        Raises: ContractError naming the first field that differs, ArtifactError, StoreError.
        """
        from taskspec.train.checkpoint import open_encoder, read_contract

        artifact = artifacts.open_artifact(index, KIND, verify=True)
        manifest = IndexManifest.of(index, artifact.manifest)
        manifest.require_built_by(read_contract(checkpoint), checkpoint, index)
        catalog = Catalog.open(artifact.folder, manifest, index_version(artifact.id))
        return cls(open_encoder(checkpoint, precision=precision), LocalShards.open(artifact.folder, manifest), catalog)

    def with_tasks(self, tasks: Sequence[ContractTask]) -> Retriever:
        """The same weights and index answering these tasks instead; passages are embedded without a task."""
        return Retriever(self._encoder.with_tasks(tasks), self._shards, self._catalog)

    @property
    def contract(self) -> Contract:
        return self._encoder.contract

    @property
    def version(self) -> str:
        """Of the index."""
        return self._catalog.version

    def search(
        self,
        texts: Sequence[str],
        task: str,
        top_k: int = 10,
        level: Level = "page",
        with_text: bool = False,
        only_pages: Sequence[str] | None = None,
        without_pages: Sequence[str] = (),
        fused: bool = False,
    ) -> list[list[Hit]]:
        """The hits of each query, best first, equal scores by lower passage row.

        Args: level: `page` gives each page once, by its best passage. with_text: fill `Hit.text`. only_pages,
            without_pages: wikipedia ids of the pages that may, or may not, be found; unknown ones match nothing. fused:
            fuse the ranking with BM25's; scores are then the fusion's.
        Returns: `top_k` hits per query; fewer only where fewer pages or passages may be found, or where an approximate
            index reaches no more.
        Raises: RequestError for an unknown task (listing the known ones), top_k < 1, an empty query, or `fused` where
            the index has no lexical part.
        """
        check_request((t.name for t in self.contract.tasks), task, texts, top_k)
        if fused:
            require_lexical(self._catalog.fuses)
        if not texts:
            return []
        embeddings_BD, _ = self.embed(task, texts)
        pages, effort = self._catalog.choose_pages(only_pages, without_pages), self._catalog.effort(task)
        of = texts if fused else None
        return self._catalog.search(self._shards, embeddings_BD, top_k, level, with_text, effort, pages, of)

    def embed(self, task: str, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns: (B, D) float32, and (B,) bool: which queries were cut to the task's length."""
        return self._encoder.embed_queries(task, texts)
