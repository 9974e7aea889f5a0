"""Which queries are in which step: mixing, shuffling, epochs.

Path: prepared data → [here] → stream.  T tasks, B queries of one task in one step over all workers. A plan is a pure
function of (seed, sizes, queries per step): any step is found without walking through those before it, and neither the
number of workers nor that of other tasks changes a task's order.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from taskspec.errors import ConfigError


def queries_per_task(sizes: Mapping[str, int], queries_per_step: int, temperature: float) -> dict[str, int]:
    """Splits a step's queries by n^(1/temperature), rounded by largest remainder, at least 2 each.

    Raises: ConfigError if there are fewer than two queries for each task, or a task is empty.
    Source: arXiv 2307.00342, section 4 (temperature 4).
    """
    for task, size in sizes.items():
        if size < 1:
            raise ConfigError(f"tasks.{task}.train: holds no query; give it files or leave the task out")
    if queries_per_step < 2 * len(sizes):
        raise ConfigError(
            f"mixing.queries_per_step is {queries_per_step} but {len(sizes)} tasks need at least 2 each; "
            f"raise it to {2 * len(sizes)}"
        )
    share = {task: size ** (1 / temperature) for task, size in sizes.items()}
    total = sum(share.values())
    exact = {task: queries_per_step * value / total for task, value in share.items()}
    result = {task: max(2, int(value)) for task, value in exact.items()}
    while (missing := queries_per_step - sum(result.values())) != 0:
        if missing > 0:
            task = max(exact, key=lambda name: exact[name] - result[name])
        else:
            task = max((name for name in exact if result[name] > 2), key=lambda name: result[name] - exact[name])
        result[task] += 1 if missing > 0 else -1
    return result


@dataclass(frozen=True)
class Plan:
    """Step → query rows of every task.

    Example:
        plan.rows("nq", step=812)   # the same eight rows on every machine
    """

    seed: int
    sizes: Mapping[str, int]
    """Train queries of each task that is trained."""
    batch: Mapping[str, int]
    """B of each task: its queries in one step, over all workers."""

    def rows(self, task: str, step: int) -> np.ndarray:
        """(B,) int64 query rows. Every query comes once per epoch, in an order of that epoch's own."""
        size, count = self.sizes[task], self.batch[task]
        position_B = step * count + np.arange(count, dtype=np.int64)
        epoch_B = position_B // size
        row_B = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epoch_B):
            here_B = epoch_B == epoch
            row_B[here_B] = _permutation(self.seed, task, int(epoch), size)[position_B[here_B] % size]
        return row_B

    def random(self, task: str, step: int) -> np.random.Generator:
        """The source of a step's draws (positives, negatives): the same on every worker."""
        return np.random.default_rng([self.seed, zlib.crc32(task.encode()), 1, step])


@lru_cache(maxsize=64)
def _permutation(seed: int, task: str, epoch: int, size: int) -> np.ndarray:
    generator = np.random.default_rng([seed, zlib.crc32(task.encode()), 0, epoch])
    return generator.permutation(size)


def worker_slice(count: int, rank: int, workers: int) -> slice:
    """The part of a batch of `count` that a worker embeds: contiguous, sizes differ by at most one."""
    base, extra = divmod(count, workers)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))
