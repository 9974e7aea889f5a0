"""The retriever as a Serve deployment: the queries of concurrent requests become batches.

Path: app → [here] → taskspec.retrieve.  A batch is embedded and searched in a thread, so that the event loop goes on
collecting the next one. Requests come checked; nothing here knows HTTP.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import faiss
import numpy as np
import torch
from ray import serve

from serve.schema import ServeArgs
from taskspec.retrieve.hits import Hit, Level
from taskspec.retrieve.retriever import Retriever

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a request."""

    text: str
    task: str
    top_k: int
    level: Level
    with_text: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """What the queries of one batch share."""

    began: float
    """By the replica's monotonic clock, in seconds."""
    embed_ms: float
    search_ms: float
    queries: int


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for one query."""

    hits: list[Hit]
    truncated: bool
    batch: Batch


@dataclass(frozen=True, slots=True)
class FoundAll:
    """What was found for one request."""

    queries: list[Found]
    last: Batch
    """The batch that the request waited for longest."""
    wait_ms: float
    """Until that batch began."""
    version: str
    """Of the index."""
    shards: int
    """How many the search went through."""


@serve.deployment(name="Retriever", logging_config={"enable_access_log": False})  # the HTTP replica has one
class RetrieverDeployment:
    """One retriever per replica."""

    def __init__(self, args: ServeArgs) -> None:
        threads = args.threads or os.cpu_count() or 1
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        self._retriever = Retriever.open(args.checkpoint, args.index)
        self._found.set_max_batch_size(args.max_batch)
        self._found.set_batch_wait_timeout_s(args.batch_wait_ms / 1000)

    async def search(self, queries: Sequence[Query]) -> FoundAll:
        """Each query joins a batch by itself, in turn, so a long request is spread over as many as it needs."""
        came = time.monotonic()
        found: list[Found] = await asyncio.gather(*(self._found(query) for query in queries))
        last = max((one.batch for one in found), key=lambda batch: batch.began)
        wait_ms = (last.began - came) * 1000
        return FoundAll(found, last, wait_ms, self._retriever.version, self._retriever.shards)

    async def ready(self) -> bool:
        """Answers once the index and the model are open."""
        return True

    @serve.batch
    async def _found(self, queries: list[Query]) -> list[Found]:
        return await asyncio.to_thread(self._run, queries)

    def _run(self, queries: Sequence[Query]) -> list[Found]:
        began = time.monotonic()
        embeddings_BD = np.empty((len(queries), self._retriever.contract.dimension), dtype=np.float32)
        truncated_B = np.empty(len(queries), dtype=bool)
        for task, rows in _numbers_by(query.task for query in queries):
            texts = [queries[row].text for row in rows]
            embeddings_BD[rows], truncated_B[rows] = self._retriever.embed(task, texts)
        embedded = time.monotonic()
        hits: dict[int, list[Hit]] = {}
        for (effort, top_k, level, with_text), rows in _numbers_by(
            (self._retriever.effort(q.task), q.top_k, q.level, q.with_text) for q in queries
        ):
            results = self._retriever.search_embeddings(embeddings_BD[rows], top_k, level, with_text, effort)
            hits.update(zip(rows, results, strict=True))
        searched = time.monotonic()
        batch = Batch(began, (embedded - began) * 1000, (searched - embedded) * 1000, len(queries))
        return [Found(hits[row], bool(truncated_B[row]), batch) for row in range(len(queries))]


def _numbers_by(keys: Iterable[Key]) -> Iterable[tuple[Key, list[int]]]:
    """Each distinct key with the numbers of the places where it stands."""
    groups: dict[Key, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups.items()
