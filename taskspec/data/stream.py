"""The plan as a stream on Ray Data: steps → tokenized batches, in order, from any step.

Path: plan, prepared data → [here] → worker.  Nothing is materialized: Ray Data runs a bounded distance ahead of the
worker. Each worker streams its own part of every step, so a resumed worker starts at its step without skipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from taskspec.data.batches import BatchMaker, StepBatches, from_bytes, to_bytes

STEPS_PER_BLOCK = 8
"""Steps that one Ray Data task makes: enough to hide its overhead, few enough for a quick first step."""
ACTOR_CPUS = 0.25
"""Logical share of a CPU that a worker's tokenizing process reserves."""
AHEAD_BYTES = 256 << 20
"""How much of the object store a worker's stream may fill ahead of it."""


class StepBlobs:
    """Ray Data's callable: steps in, one blob of batches for each out."""

    def __init__(self, make_maker: Callable[[], BatchMaker], start: int) -> None:
        self._maker = make_maker()
        self._start = start

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        blobs = [to_bytes(self._maker.step(self._start + int(number))) for number in batch["id"]]
        return {"blob": np.array(blobs, dtype=object)}


def stream(
    make_maker: Callable[[], BatchMaker], tasks: tuple[str, ...], start: int, steps: int
) -> Iterator[StepBatches]:
    """The batches of steps [start, steps), in order.

    Args: make_maker: called once in the process that tokenizes; picklable.
    """
    import ray.data
    from ray.data import ExecutionResources

    from taskspec.cluster import prepare_ray_data

    if start >= steps:
        return
    context = prepare_ray_data()
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=AHEAD_BYTES)
    blocks = -(-(steps - start) // STEPS_PER_BLOCK)
    dataset = ray.data.range(steps - start, override_num_blocks=blocks).map_batches(
        StepBlobs,
        fn_constructor_args=(make_maker, start),
        batch_size=STEPS_PER_BLOCK,
        concurrency=1,
        num_cpus=ACTOR_CPUS,
    )
    for row in dataset.iter_rows():
        yield from_bytes(row["blob"], tasks)
