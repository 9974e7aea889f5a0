"""Tries a small index of every kind, and the embedding of some passages, on this machine.

Path: [here] → plan.  One core for searching and building, so that a plan can count cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import faiss
import numpy as np

from taskspec.data.prepared import PreparedData
from taskspec.index.kinds import KINDS
from taskspec.index.plan import TYPICAL_EFFORT, Speed
from taskspec.index.shard import make_shard
from taskspec.sections import KindName, Precision
from taskspec.train.checkpoint import open_encoder

PROBE_ROWS = 10_000
PROBE_QUERIES = 5
CENTERS = 100
EMBEDDED = 128
"""Passages of the sample whose embedding is timed."""


def measure_speeds(dimension: int) -> dict[KindName, Speed]:
    """Builds and searches an index of every kind over random vectors; the best of some single queries counts."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((CENTERS, dimension))
    vectors_ND = centers[rng.integers(0, CENTERS, PROBE_ROWS)] + rng.standard_normal((PROBE_ROWS, dimension))
    vectors_ND = (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        return {kind: _speed(kind, vectors_ND) for kind in KINDS}
    finally:
        faiss.omp_set_num_threads(threads)


def _speed(kind: KindName, vectors_ND: np.ndarray) -> Speed:
    started = time.perf_counter()
    shard = make_shard(kind, vectors_ND, row_start=0)
    build_s = time.perf_counter() - started
    effort = TYPICAL_EFFORT.get(kind)
    searches = [_seconds(partial(shard.search, vectors_ND[[row]], 10, effort)) for row in range(PROBE_QUERIES)]
    return Speed(rows=len(vectors_ND), search_s=min(searches), build_s=build_s)


def embedding_seconds(checkpoint: str, prepared: PreparedData, precision: Precision) -> float:
    """Time to embed one passage in this process, on all its cores, from a sample of the passages."""
    rows = np.linspace(0, len(prepared.passages) - 1, min(EMBEDDED, len(prepared.passages))).astype(np.int64)
    texts = prepared.passages.take(rows, ["title", "text"])
    encoder = open_encoder(checkpoint, precision=precision)
    encoder.embed_passages(texts["title"][:8], texts["text"][:8])
    return _seconds(partial(encoder.embed_passages, texts["title"], texts["text"])) / len(rows)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
