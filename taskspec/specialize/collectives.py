"""What workers exchange: sums, gathered embeddings, slices of vectors; the identity with one process. Counts its bytes.

Path: [beside] the gradients and the step.  N rows of one worker, W workers, P elements of a vector that W divides, S of
one worker's slice of it: P / W. Knows no tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COMPARED_TOGETHER = 1 << 20
"""Elements."""


class Collectives:
    """The default process group, or no group at all.

    Attributes: rank, workers: this process and how many there are. bytes_sent: payload that this worker handed over
        to other workers, by the volume of a ring (DDP's own all-reduces are counted where they are started).
    """

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if joined else 0
        self.workers: int = dist.get_world_size() if joined else 1
        self.bytes_sent = 0

    @classmethod
    def alone(cls) -> Collectives:
        """Of one worker by itself, whatever process group there is."""
        result = cls()
        result.rank, result.workers = 0, 1
        return result

    def minimum(self, tensor: Tensor) -> Tensor:
        """The smallest value over workers, in place."""
        if self.workers > 1:
            self.count_all_reduce(tensor.nbytes)
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    def count_all_reduce(self, size: int) -> None:
        """Adds a ring all-reduce of `size` bytes: each worker sends 2 (W − 1) / W of them."""
        self.bytes_sent += 2 * size * (self.workers - 1) // self.workers

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, in place; no gradient."""
        if self.workers > 1:
            self.count_all_reduce(tensor.nbytes)
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(N, …) of each worker → (W·N, …), by rank. Gradient flows back to the worker each row came from.

        All workers must hold the same N.
        """
        if self.workers == 1:
            return tensor
        self.bytes_sent += tensor.nbytes * (self.workers - 1)
        if tensor.requires_grad:
            gathered: Tensor = _Gather.apply(tensor, self)  # type: ignore[no-untyped-call]
            return gathered
        return _all_gather(tensor)

    @property
    def scatter_rows(self) -> int:
        """How many slices of scratch a scatter takes."""
        return 1 if dist.get_backend() == "nccl" else self.workers

    def start_scatter(self, vector_P: Tensor, received_WS: Tensor) -> Scatter:
        """Starts to sum a vector over workers, of which each gets only its own slice.

        NCCL has it as one operation. For gloo all-to-all and a local sum are faster (3 times with 35 M elements), and
        the sum's order is that of the ranks.
        Args: vector_P: not to be touched until the result is taken. received_WS: scratch, of `scatter_rows` at least.
        """
        self.bytes_sent += vector_P.nbytes * (self.workers - 1) // self.workers
        if dist.get_backend() == "nccl":
            return Scatter(received_WS[:1], dist.reduce_scatter_single(received_WS[0], vector_P, async_op=True))
        return Scatter(received_WS, dist.all_to_all_single(received_WS, vector_P, async_op=True))

    def start_exchange(self, vector_P: Tensor | None, senders: Sequence[bool], received_WS: Tensor) -> Exchange:
        """Starts to hand every worker its slice of each sender's vector; nothing is summed.

        Args: vector_P: of this worker, None if it sends none. senders: by rank, who does.
        """
        size = received_WS.shape[1]
        sent = received_WS.new_empty(0) if vector_P is None else vector_P
        self.bytes_sent += size * received_WS.element_size() * (self.workers - 1) if vector_P is not None else 0
        work = dist.all_to_all_single(
            received_WS[: sum(senders)].view(-1),
            sent,
            output_split_sizes=[size * sends for sends in senders],
            input_split_sizes=[0 if vector_P is None else size] * self.workers,
            async_op=True,
        )
        return Exchange(received_WS[: sum(senders)], work)

    def gather_slices(self, vector_P: Tensor) -> Tensor:
        """Fills a vector of which each worker has only its own slice, in place."""
        if self.workers > 1:
            own_S = vector_P.view(self.workers, -1)[self.rank]
            self.bytes_sent += own_S.nbytes * (self.workers - 1)
            dist.all_gather_single(vector_P, own_S.clone())
        return vector_P

    def alike(self, vector_P: Tensor) -> bool:
        """Whether all workers hold the same bits, by a sum of them as integers; the same answer everywhere."""
        if self.workers == 1:
            return True
        bits_P = vector_P.view(torch.int32 if vector_P.element_size() == 4 else torch.int64)
        # In pieces: torch would hold all of them as int64.
        sums = [piece.sum(dtype=torch.int64) for piece in torch.split(bits_P, COMPARED_TOGETHER)]
        found_W = _all_gather(torch.stack(sums).sum()[None])
        return bool((found_W == found_W[0]).all())


class Scatter:
    """A reduce-scatter under way."""

    def __init__(self, received_WS: Tensor, work: Any) -> None:
        self._received_WS, self._work = received_WS, work

    def wait(self) -> Tensor:
        """The sum over workers of this worker's slice (S,), valid until the scratch is used again."""
        self._work.wait()
        total_S = self._received_WS[0]
        for part_S in self._received_WS[1:]:
            total_S += part_S
        return total_S


class Exchange:
    """An exchange of slices under way."""

    def __init__(self, received_WS: Tensor, work: Any) -> None:
        self._received_WS, self._work = received_WS, work

    def wait(self) -> Tensor:
        """A slice from each sender, by rank; valid until the scratch is used again."""
        self._work.wait()
        return self._received_WS


def _all_gather(tensor: Tensor) -> Tensor:
    result = tensor.new_empty((dist.get_world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_single(result, tensor.contiguous())
    return result


class _Gather(torch.autograd.Function):
    """All-gather whose gradient is the sum over workers of their gradients for this worker's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, collectives: Collectives) -> Tensor:
        ctx.collectives, ctx.rows = collectives, tensor.shape[0]
        return _all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = ctx.collectives.sum(gradients[0].contiguous())
        start = ctx.collectives.rank * ctx.rows
        return total[start : start + ctx.rows], None
