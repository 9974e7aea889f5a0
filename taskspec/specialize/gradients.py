"""The loss of one task's batch, over all workers; parameters and gradients as flat vectors.

Path: batches → [here] → distribution.  P elements of all trainable parameters together, B queries and N passages of one
worker, L tokens, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taskspec.data.batches import TaskBatch
from taskspec.model.contrastive import allowed_passages, contrastive_loss
from taskspec.model.encoder import Encoder
from taskspec.specialize.collectives import Collectives


class TaskLoss(nn.Module):
    """The encoder with its loss: what DDP wraps, so that one forward is one task's batch."""

    def __init__(
        self, encoder: Encoder, temperature: float, collectives: Collectives, chunk_texts: int | None = None
    ) -> None:
        """Args: chunk_texts: embed at most so many texts at a time and keep no activations of them: the backward pass
        embeds each chunk again, with the same dropout, so memory does not grow with the batch. None embeds all at
        once. Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache),
        arXiv 2101.06983, which torch's checkpointing of each chunk amounts to.
        """
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature
        self.collectives = collectives
        self.chunk_texts = chunk_texts

    def forward(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """This worker's part of the task's mean loss in nats (the parts sum to it), and of its in-batch accuracy."""
        query_BD = self._embed(batch.query_ids_BL, batch.query_mask_BL)
        passage_ND = self.collectives.gather(self._embed(batch.passage_ids_NL, batch.passage_mask_NL))
        page_N = self.collectives.gather(batch.passage_page_N)
        first = self.collectives.rank * len(batch.passage_page_N)
        positive_B = torch.arange(first, first + len(query_BD), device=query_BD.device)
        allowed_BN = allowed_passages(batch.gold_page_BG, positive_B, page_N)
        loss_B, correct_B = contrastive_loss(query_BD, passage_ND, positive_B, allowed_BN, self.temperature)
        # A filling row has weight 0 but a loss all the same: its positive is allowed by rule.
        weight_B = batch.query_weight_B.to(loss_B.dtype)
        return loss_B @ weight_B, correct_B.to(loss_B.dtype) @ weight_B

    def _embed(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        if self.chunk_texts is None or len(ids_NL) <= self.chunk_texts:
            embedding_ND: Tensor = self.encoder(ids_NL, mask_NL)
            return embedding_ND
        length_N, order_N = mask_NL.sum(dim=1).sort(stable=True)  # a chunk is as long as its longest text
        lengths = length_N.tolist()  # all at once: for each of them a GPU would be waited for
        parts = []
        for start in range(0, len(lengths), self.chunk_texts):
            rows = order_N[start : start + self.chunk_texts]
            longest = lengths[start + len(rows) - 1]
            parts.append(checkpoint(self.encoder, ids_NL[rows, :longest], mask_NL[rows, :longest], use_reentrant=False))
        return torch.cat(parts)[order_N.argsort()]


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one parameter lies in the vector of all of them."""

    name: str
    """As the transformer names it: `encoder.block.0.layer.0.SelfAttention.q.weight`."""
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> slice:
        return slice(self.start, self.start + math.prod(self.shape))


class FlatParameters:
    """All trainable parameters of a module as views of one vector, and their gradients as views of another.

    After construction the module's parameters share memory with `theta_P`: an update of the vector is an update of
    the module. `pieces` are in the vector's order; behind the last one, zeros fill up to a multiple of the workers.
    """

    def __init__(self, module: nn.Module, workers: int = 1) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        size = sum(parameter.numel() for parameter in self._parameters)
        filling = self._parameters[0].detach().new_zeros(-size % workers)
        self.theta_P = torch.cat([*(p.detach().reshape(-1) for p in self._parameters), filling])
        self.size = size
        pieces, start = [], 0
        for name, parameter in named:
            pieces.append(Piece(name.rpartition("transformer.")[2], tuple(parameter.shape), start))
            start += parameter.numel()
        self.pieces = tuple(pieces)
        for parameter, theta in zip(self._parameters, self._split(self.theta_P), strict=True):
            parameter.data = theta.view_as(parameter)

    def collect_gradients_in(self, grad_P: Tensor) -> None:
        """Zeroes `grad_P` and lets the next backward passes add into it."""
        grad_P.zero_()
        for parameter, grad in zip(self._parameters, self._split(grad_P), strict=True):
            parameter.grad = grad.view_as(parameter)

    def _split(self, vector_P: Tensor) -> Sequence[Tensor]:
        """One view for each parameter."""
        return torch.split(vector_P[: self.size], [parameter.numel() for parameter in self._parameters])


def add_gradient(task_loss: nn.Module, batch: TaskBatch, *, scale: float = 1.0) -> Tensor:  # (2,)
    """Adds the gradient of this worker's part of a task's mean loss, times `scale`, to where gradients are collected.

    Args: task_loss: a TaskLoss, or DDP around one.
    Returns: the part of the loss in nats, not scaled, and of the in-batch accuracy.
    """
    with torch.enable_grad():
        loss, accuracy = task_loss(batch)
        (loss * scale).backward()
    return torch.stack([loss.detach(), accuracy])
