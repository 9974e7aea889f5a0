"""What workers exchange: sums and gathered embeddings; the identity with one process. Counts its bytes.

Path: [beside] the gradients and the step.  N rows of one worker, W workers. Knows no tasks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
