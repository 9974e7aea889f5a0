"""How the tasks' gradients come together over the workers, and which elements each worker then updates.

Path: batches, gradients → [here] → methods, step.  T tasks, W workers, P elements of the flat vector or of one worker's
share of it.

`replicated`: every worker gets every gradient whole (DDP's all-reduce) and does the whole update.
`sharded`: a gradient is summed to slices, one a worker, while the next task's is computed; a worker weighs and updates
its own slice, then the parameters are gathered. What method and optimizer hold is 1/W.
`task_parallel`: a worker computes whole tasks alone, in rounds of W tasks; an exchange of slices ends each round.

All three give what one worker alone gives for the same batches, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from taskspec.data.batches import TaskBatch
from taskspec.specialize.collectives import Collectives, Exchange, Scatter
from taskspec.specialize.gradients import FlatParameters, TaskLoss, add_gradient
from taskspec.specialize.rows import Rows


class TaskGradient(NamedTuple):
    """The part of one task's gradient that this worker updates with."""

    task: int
    grad_P: Tensor
    """Summed over workers; overwritten when the next one is asked for."""


class Share:
    """The elements of the flat vector that one worker updates.

    Attributes: elements; rows: of these elements.
    """

    def __init__(self, elements: slice, rows: Rows, collectives: Collectives | None = None) -> None:
        """Args: collectives: None where the share is the whole vector."""
        self.elements, self.rows, self._collectives = elements, rows, collectives

    def sum(self, part: Tensor) -> Tensor:
        """What all elements give, from what this share's give; in place."""
        return part if self._collectives is None else self._collectives.sum(part)


Batches = Sequence[TaskBatch | None]
"""A step's batches by task; None where another worker has the task."""


class Distribution(Protocol):
    """Takes a step's batches to task gradients, and an updated share back to whole parameters."""

    share: Share

    def gradients(self, batches: Batches, totals_T2: Tensor) -> Iterator[TaskGradient]:
        """The gradient of each task's mean loss over its whole batch.

        Args: totals_T2: zeros; once the last gradient is taken, loss in nats and in-batch accuracy of whole batches.
        """
        ...

    def summed_gradient(self, batches: Batches, totals_T2: Tensor) -> Tensor:
        """The sum of all tasks' gradients for this worker's share (P,): one exchange instead of T."""
        ...

    def gather(self) -> None:
        """Makes the parameters whole on every worker once each has updated its share."""
        ...

    def settle(self, batches: Batches) -> None:
        """What has to run once before the first step of a start, so that a resumed run rounds as the unbroken one."""
        ...


class Replicated:
    """Every worker holds everything."""

    def __init__(self, task_loss: TaskLoss, flat: FlatParameters, collectives: Collectives) -> None:
        self._task_loss, self._flat, self._collectives = task_loss, flat, collectives
        self._ddp: DistributedDataParallel | None = None
        self._grad_P = torch.zeros_like(flat.theta_P)
        elements = slice(0, len(flat.theta_P))
        self.share = Share(elements, Rows(flat.pieces, elements, flat.theta_P.device))

    def gradients(self, batches: Batches, totals_T2: Tensor) -> Iterator[TaskGradient]:
        for task, batch in enumerate(_all(batches)):
            totals_T2[task] = self._gradient(batch)
            yield TaskGradient(task, self._grad_P)
        self._collectives.sum(totals_T2)

    def _gradient(self, batch: TaskBatch) -> Tensor:
        self._flat.collect_gradients_in(self._grad_P)
        self._collectives.count_all_reduce(self._grad_P.nbytes)
        if self._collectives.workers == 1:
            return add_gradient(self._task_loss, batch)
        if self._ddp is None:
            self._ddp = DistributedDataParallel(self._task_loss, forward_sync_buffers=False)
        # DDP averages over workers; the parts must be summed.
        return add_gradient(self._ddp, batch, scale=self._collectives.workers)

    def summed_gradient(self, batches: Batches, totals_T2: Tensor) -> Tensor:
        _add_all(self._task_loss, self._flat, self._grad_P, batches, totals_T2)
        self._collectives.sum(totals_T2)
        return self._collectives.sum(self._grad_P)

    def gather(self) -> None:
        return

    def settle(self, batches: Batches) -> None:
        """DDP arranges its buckets anew after its first backward pass, and a ring's rounding depends on them."""
        if self._collectives.workers > 1:
            self._gradient(_all(batches)[0])


class _Slices:
    """Every worker holds a slice. Of gradients that are kept apart one is on its way while the next is computed."""

    def __init__(self, task_loss: TaskLoss, flat: FlatParameters, collectives: Collectives, received: int) -> None:
        """Args: received: slices that can arrive at the same time."""
        self._task_loss, self._flat, self._collectives = task_loss, flat, collectives
        self._grads: list[Tensor] = []
        size = len(flat.theta_P) // collectives.workers
        self._received_WS = flat.theta_P.new_zeros(received, size)
        elements = slice(collectives.rank * size, (collectives.rank + 1) * size)
        self.share = Share(elements, Rows(flat.pieces, elements, flat.theta_P.device), collectives)

    def _grad(self, number: int) -> Tensor:
        """Room for a gradient, by turns: a sum of all needs it once, gradients by themselves twice."""
        if number % 2 == len(self._grads):
            self._grads.append(torch.zeros_like(self._flat.theta_P))
        return self._grads[number % 2]

    def summed_gradient(self, batches: Batches, totals_T2: Tensor) -> Tensor:
        grad_P = self._grad(0)
        _add_all(self._task_loss, self._flat, grad_P, batches, totals_T2)
        self._collectives.sum(totals_T2)
        return self._collectives.start_scatter(grad_P, self._received_WS).wait()

    def gather(self) -> None:
        self._collectives.gather_slices(self._flat.theta_P)

    def settle(self, batches: Batches) -> None:
        return


class Sharded(_Slices):
    """Every worker has its part of every task's batch."""

    def __init__(self, task_loss: TaskLoss, flat: FlatParameters, collectives: Collectives) -> None:
        super().__init__(task_loss, flat, collectives, collectives.scatter_rows)

    def gradients(self, batches: Batches, totals_T2: Tensor) -> Iterator[TaskGradient]:
        under_way: Scatter | None = None
        for task, batch in enumerate(_all(batches)):
            grad_P = self._grad(task)
            self._flat.collect_gradients_in(grad_P)
            totals_T2[task] = add_gradient(self._task_loss, batch)
            if under_way:
                yield TaskGradient(task - 1, under_way.wait())
            under_way = self._collectives.start_scatter(grad_P, self._received_WS)
        assert under_way is not None
        yield TaskGradient(len(batches) - 1, under_way.wait())
        self._collectives.sum(totals_T2)


class TaskParallel(_Slices):
    """Every worker has the whole batch of its own tasks."""

    def __init__(
        self, task_loss: TaskLoss, flat: FlatParameters, collectives: Collectives, owners: Sequence[int]
    ) -> None:
        """Args: task_loss: of one worker alone. owners: rank that computes each task."""
        super().__init__(task_loss, flat, collectives, collectives.workers)
        by_worker = [[t for t, owner in enumerate(owners) if owner == rank] for rank in range(collectives.workers)]
        self._rounds = [
            [tasks[number] if number < len(tasks) else None for tasks in by_worker]
            for number in range(max(map(len, by_worker)))
        ]

    def gradients(self, batches: Batches, totals_T2: Tensor) -> Iterator[TaskGradient]:
        under_way: tuple[list[int], Exchange] | None = None
        for number, tasks in enumerate(self._rounds):
            own = tasks[self._collectives.rank]
            grad_P = None if own is None else self._grad(number)
            if own is not None and grad_P is not None:
                batch = batches[own]
                assert batch is not None
                self._flat.collect_gradients_in(grad_P)
                totals_T2[own] = add_gradient(self._task_loss, batch)
            if under_way:
                yield from map(TaskGradient, under_way[0], under_way[1].wait())
            senders = [task is not None for task in tasks]
            exchange = self._collectives.start_exchange(grad_P, senders, self._received_WS)
            under_way = [task for task in tasks if task is not None], exchange
        assert under_way is not None
        yield from map(TaskGradient, under_way[0], under_way[1].wait())
        self._collectives.sum(totals_T2)


def assign_tasks(tokens: Mapping[str, int], workers: int) -> dict[str, int]:
    """Task → the worker that computes it: the longest first, each to the worker with the fewest tokens so far.

    Args: tokens: of each task's batch, queries and passages.
    """
    load = [0] * workers
    owners = {}
    for task in sorted(tokens, key=lambda task: -tokens[task]):
        owners[task] = load.index(min(load))
        load[owners[task]] += tokens[task]
    return {task: owners[task] for task in tokens}


def _all(batches: Batches) -> list[TaskBatch]:
    return [batch for batch in batches if batch is not None]


def _add_all(task_loss: TaskLoss, flat: FlatParameters, grad_P: Tensor, batches: Batches, totals_T2: Tensor) -> None:
    """Collects the sum of the gradients of this worker's batches in `grad_P`."""
    flat.collect_gradients_in(grad_P)
    for task, batch in enumerate(batches):
        if batch is not None:
            totals_T2[task] = add_gradient(task_loss, batch)
