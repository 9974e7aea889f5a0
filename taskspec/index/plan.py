"""Which kinds of index fit a budget: bytes, time a query, time to build and number of shards, before work starts.

Path: passage count, dimension, budget → [here] → index job.  N passages, D the embedding's dimension. Bytes are
arithmetic; times are those of a small index of each kind that `probe.py` tries, taken to size by how the kind works.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from taskspec.errors import PlacementError
from taskspec.index.kinds import KINDS, lists
from taskspec.sections import KindName

FREE_FOR_INDEX = 0.8
"""Share of a node's memory that shards may fill; the rest is for the model, the texts' hot pages and the system."""
FREE_FOR_BUILD = 0.5
"""Share of a node's memory that one shard may take while it is built: its embeddings and itself."""
MOST_SHARDS_A_NODE = 64
TYPICAL_EFFORT: dict[KindName, int] = {"ivf": 32, "hnsw": 128, "pq": 8}
"""What searches are taken to need; how hard they must try for their recall is measured when the index is built."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be used, and what is asked of it."""

    nodes: int
    node_bytes: int
    """Memory of a node."""
    node_cores: int
    latency_s: float | None
    """Longest time that the search for one query may take; None is any."""
    recall: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a small index of one kind took on one core."""

    rows: int
    search_s: float
    """One query, with the typical effort."""
    build_s: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One kind for the whole index."""

    kind: KindName
    factory: str
    shards: int
    bytes: float
    node_bytes: float
    search_s: float
    build_s: float
    """Without embedding the passages."""
    refused: str | None
    """Why it does not fit."""


EXTRAPOLATED = (
    "times are of searching alone, without embedding the query and what an endpoint adds, by a small index on this "
    "machine as it was just now; a graph that the processor's caches do not hold may take several times longer"
)


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """All kinds, from the most exact on."""

    passages: int
    dimension: int
    budget: Budget
    embed_s: float | None
    """Time to embed all passages on the cluster, from a sample; None without a checkpoint."""
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The most exact one that fits.    Raises: PlacementError saying what each would need."""
        for candidate in self.candidates:
            if candidate.refused is None:
                return candidate
        reasons = "; ".join(f"{one.kind} {one.refused}" for one in self.candidates)
        raise PlacementError(
            f"no kind of index of {self.passages:,} passages of {self.dimension} numbers fits: {reasons}; "
            f"take more or larger nodes, or ask for less"
        )

    def to_text(self) -> str:
        """For the console."""
        budget = self.budget
        latency = f", {1000 * budget.latency_s:g} ms a query" if budget.latency_s else ""
        rows = [("kind", "FAISS", "shards", "bytes", "a node", "a query", "build", "")]
        for one in self.candidates:
            sizes = str(one.shards), _size(one.bytes), _size(one.node_bytes)
            times = _milliseconds(one.search_s), _duration(one.build_s)
            rows.append((one.kind, one.factory, *sizes, *times, one.refused or "fits"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        embedding = "" if self.embed_s is None else f"; embedding the passages takes about {_duration(self.embed_s)}"
        title = (
            f"{self.passages:,} passages of {self.dimension} numbers on {budget.nodes} node(s) of "
            f"{_size(budget.node_bytes)} and {budget.node_cores} cores, recall {budget.recall:g}{latency}{embedding}"
        )
        return "\n".join([title, *table, EXTRAPOLATED])


def plan_index(
    passages: int, dimension: int, budget: Budget, speeds: Mapping[KindName, Speed], embed_s: float | None = None
) -> IndexPlan:
    """Sizes every kind for the budget.

    Args: speeds: of every kind. embed_s: time to embed all passages, if it is known.
    """
    return IndexPlan(
        passages=passages,
        dimension=dimension,
        budget=budget,
        embed_s=embed_s,
        candidates=tuple(_candidate(kind, passages, dimension, budget, speeds[kind]) for kind in KINDS),
    )


def _candidate(kind: KindName, passages: int, dimension: int, budget: Budget, speed: Speed) -> Candidate:
    """The fewest shards, as many on each node, that can be built and are fast enough."""
    most = min(MOST_SHARDS_A_NODE * budget.nodes, max(budget.nodes, passages // budget.nodes * budget.nodes))
    tried = []
    for shards in range(budget.nodes, most + 1, budget.nodes):
        tried.append(_sized(kind, passages, dimension, budget, speed, shards))
        if tried[-1].refused is None:
            return tried[-1]
    return min(tried, key=lambda one: one.search_s)


def _sized(kind: KindName, passages: int, dimension: int, budget: Budget, speed: Speed, shards: int) -> Candidate:
    rows = -(-passages // shards)
    described = KINDS[kind]
    shard_bytes = described.bytes_a_shard(rows, dimension)
    node_bytes = shard_bytes * shards / budget.nodes
    build_bytes = _build_bytes(kind, rows, dimension)
    rounds = -(-shards // (budget.nodes * budget.node_cores))
    search_s = rounds * speed.search_s * _work(kind, rows) / _work(kind, speed.rows)
    build_s = speed.build_s * passages / speed.rows * _build_work(kind, rows) / _build_work(kind, speed.rows)
    refused = []
    if described.codes < budget.recall:
        refused.append(f"finds about {described.codes:g} of the exact best at most")
    if node_bytes > _free(budget):
        refused.append(f"needs {_size(node_bytes)} a node, there are {_share(FREE_FOR_INDEX, budget.node_bytes)}")
    elif build_bytes > FREE_FOR_BUILD * budget.node_bytes:
        there = _share(FREE_FOR_BUILD, budget.node_bytes)
        refused.append(f"takes {_size(build_bytes)} while a shard is built, there are {there}")
    if budget.latency_s is not None and search_s > budget.latency_s:
        refused.append(f"takes {_milliseconds(search_s)} a query")
    return Candidate(
        kind=kind,
        factory=described.factory(rows, dimension),
        shards=shards,
        bytes=shard_bytes * shards,
        node_bytes=node_bytes,
        search_s=search_s,
        build_s=build_s,
        refused=", ".join(refused) or None,
    )


def _build_bytes(kind: KindName, rows: int, dimension: int) -> float:
    """A shard's embeddings and itself."""
    return 4.0 * rows * dimension + KINDS[kind].bytes_a_shard(rows, dimension)


def require_memory(kind: KindName, rows: int, dimension: int, node_bytes: int) -> None:
    """Raises: PlacementError if a shard cannot be built in that memory."""
    needed = _build_bytes(kind, rows, dimension)
    if needed > FREE_FOR_BUILD * node_bytes:
        raise PlacementError(
            f"a shard of {rows:,} passages takes {_size(needed)} while it is built, there are "
            f"{_share(FREE_FOR_BUILD, node_bytes)}; set index.shards to more"
        )


def _build_work(kind: KindName, rows: int) -> float:
    """How the time to add one row grows with the rows of a shard: layers of a graph, centers of lists."""
    if kind == "hnsw":
        return _levels(rows)
    return rows**0.5 if kind == "ivf" else 1.0


def _free(budget: Budget) -> float:
    return FREE_FOR_INDEX * budget.node_bytes


def _work(kind: KindName, rows: int) -> float:
    """How the time of a search grows with the rows of a shard."""
    if kind == "hnsw":
        return _levels(rows)
    if kind == "ivf":
        count = lists(rows)
        return count + min(TYPICAL_EFFORT["ivf"], count) * rows / count
    return rows


def _levels(rows: int) -> float:
    return math.log2(rows + 1)


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def _share(share: float, size: float) -> str:
    return f"{_size(share * size)} ({share:.0%} of {_size(size)})"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
