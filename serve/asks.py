"""What goes from the routes to the encoder and back, inside the cluster.

Path: app → [here] → deployments, and back.  B queries, D the embedding's dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from taskspec.retrieve.hits import Hit, Level


@dataclass(frozen=True, slots=True)
class Version:
    """An index and the checkpoint that it was built from."""

    id: str
    """Of the index, as answers carry it: the first 12 characters of its artifact's id."""
    checkpoint: str
    index: str


@dataclass(frozen=True, slots=True)
class Search:
    """What a request asks of its queries."""

    top_k: int
    level: Level
    with_text: bool
    only_pages: tuple[str, ...] | None = None
    without_pages: tuple[str, ...] = ()
    fused: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """Queries of one task for one batch."""

    version: Version
    task: str
    texts: tuple[str, ...]
    search: Search | None
    """None asks for embeddings."""
    deadline: float
    """By the encoder's monotonic clock."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What the queries of one batch share."""

    began: float
    """By the replica's monotonic clock, in seconds."""
    queries: int
    embed_ms: float
    search_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Embedded:
    """Between the two stages."""

    embeddings_BD: np.ndarray
    truncated_B: np.ndarray
    tokens_B: np.ndarray
    batch: Batch


@dataclass(frozen=True, slots=True)
class Found:
    """What was made of one `Ask`."""

    embedded: Embedded
    hits: list[list[Hit]] | None
    """None if only embeddings were asked for."""
    complete: list[bool]
    """Whether a query has as many hits as it asked for, or all there are."""
    failed: frozenset[int]
    """Shard deployments that did not answer."""
    late: frozenset[int]
    """Of these, for which only the request's time was too short."""


@dataclass(frozen=True, slots=True)
class FoundAll:
    """What was made of one request."""

    hits: list[list[Hit]]
    """Empty if only embeddings were asked for."""
    embeddings_BD: np.ndarray
    """No rows if hits were asked for."""
    truncated: list[bool]
    tokens: int
    complete: list[bool]
    failed: frozenset[int]
    late: frozenset[int]
    last: Batch
    """The batch that the request waited for longest."""
    wait_ms: float
    """Until that batch began."""
