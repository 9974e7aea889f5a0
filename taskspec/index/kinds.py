"""The kinds of index: what FAISS calls them, what they take, and how hard a search may try.

Path: [here] → plan, shard, build.  No FAISS in here: planning for 36 million passages takes no memory.  N passages of
one shard, D the embedding's dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from taskspec.sections import KindName

IVF_POINTS = 39
"""Vectors per list that FAISS wants to train a coarse quantizer without a warning."""
HNSW_LINKS = 32


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to keep and search the vectors of a shard."""

    about: str
    factory: Callable[[int, int], str]
    """(N, D) → FAISS's name."""
    bytes_a_shard: Callable[[int, int], float]
    """(N, D) → bytes of its file, to a few percent."""
    codes: float
    """Recall@10 that is left when every list is visited and every candidate refined, as seen with embeddings of text
    models; each index measures its own (`recall.py`)."""
    rounding: float
    """How far, relative to an embedding's square, its score with its own row may be off."""
    effort: str | None = None
    """What FAISS calls the number by which a search tries harder; None where there is none."""
    efforts: tuple[int, ...] = ()
    """From little to much; tuning takes the least that reaches the wanted recall."""


def lists(passages: int) -> int:
    """How many lists an IVF shard of so many vectors has: 4√N, fewer where there are too few to train them."""
    return max(1, min(round(4 * math.sqrt(passages)), passages // IVF_POINTS))


def subquantizers(dimension: int) -> int:
    """Four bits for every eight dimensions, or as near to it as the dimension divides."""
    return max(count for count in range(1, dimension + 1) if dimension % count == 0 and count * 8 <= max(8, dimension))


KINDS: dict[KindName, Kind] = {
    "flat": Kind(
        about="exact; every vector in fp32",
        factory=lambda _n, _d: "Flat",
        bytes_a_shard=lambda n, d: 4.0 * n * d,
        codes=1.0,
        rounding=1e-5,
    ),
    "fp16": Kind(
        about="every vector in fp16",
        factory=lambda _n, _d: "SQfp16",
        bytes_a_shard=lambda n, d: 2.0 * n * d,
        codes=0.999,
        rounding=2e-3,
    ),
    "sq8": Kind(
        about="every vector in a byte per dimension",
        factory=lambda _n, _d: "SQ8",
        bytes_a_shard=lambda n, d: 1.0 * n * d,
        codes=0.98,
        rounding=0.1,
    ),
    "ivf": Kind(
        about="lists of near vectors in fp16, of which a search visits some",
        factory=lambda n, _d: f"IVF{lists(n)},SQfp16",
        bytes_a_shard=lambda n, d: 2.0 * n * d + 8.0 * n + 4.0 * lists(n) * d,
        codes=0.999,
        rounding=2e-3,
        effort="nprobe",
        efforts=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    ),
    "hnsw": Kind(
        about="a graph of near vectors in fp16, which a search walks",
        factory=lambda _n, _d: f"HNSW{HNSW_LINKS}_SQfp16",
        bytes_a_shard=lambda n, d: 2.0 * n * d + (8.5 * HNSW_LINKS) * n,
        codes=0.999,
        rounding=2e-3,
        effort="efSearch",
        efforts=(16, 32, 64, 128, 256, 512, 1024, 2048),
    ),
    "pq": Kind(
        about="four bits for eight dimensions to find candidates, a byte per dimension to rank them",
        factory=lambda _n, d: f"PQ{subquantizers(d)}x4fs,Refine(SQ8)",
        bytes_a_shard=lambda n, d: n * (d + subquantizers(d) / 2),
        codes=0.98,
        rounding=0.1,
        effort="k_factor",
        efforts=(1, 2, 4, 8, 16, 32, 64, 128),
    ),
}
