"""One gradient per task from one batch per task, over all workers.

Path: batches → [here] → sensitivities and update.  T tasks, P elements of all trainable parameters together, B
queries and N passages of one worker. DDP sums the gradients; every worker ends with the same T×P matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from taskspec.data.batches import TaskBatch
from taskspec.model.contrastive import allowed_passages, contrastive_loss
from taskspec.model.encoder import Encoder
from taskspec.specialize.collectives import Collectives


class TaskLoss(nn.Module):
    """The encoder with its loss: what DDP wraps, so that one forward is one task's batch."""

    def __init__(self, encoder: Encoder, temperature: float, collectives: Collectives) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature
        self.collectives = collectives

    def forward(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """This worker's part of the task's mean loss in nats (the parts sum to it), and of its in-batch accuracy."""
        query_BD = self.encoder(batch.query_ids_BL, batch.query_mask_BL)
        passage_ND = self.collectives.gather(self.encoder(batch.passage_ids_NL, batch.passage_mask_NL))
        page_N = self.collectives.gather(batch.passage_page_N)
        first = self.collectives.rank * len(batch.passage_page_N)
        positive_B = torch.arange(first, first + len(query_BD), device=query_BD.device)
        allowed_BN = allowed_passages(batch.gold_page_BG, positive_B, page_N)
        loss_B, correct_B = contrastive_loss(query_BD, passage_ND, positive_B, allowed_BN, self.temperature)
        # A filling row has weight 0 but a loss all the same: its positive is allowed by rule.
        weight_B = batch.query_weight_B.to(loss_B.dtype)
        return loss_B @ weight_B, correct_B.to(loss_B.dtype) @ weight_B


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
    the module. `pieces` are in the vector's order.
    """

    def __init__(self, module: nn.Module) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        self.theta_P = torch.cat([p.detach().reshape(-1) for p in self._parameters])
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
        return torch.split(vector_P, [parameter.numel() for parameter in self._parameters])


def task_gradients(
    task_loss: TaskLoss | DistributedDataParallel,
    flat: FlatParameters,
    batches: Sequence[TaskBatch],
    grad_TP: Tensor,  # overwritten
    collectives: Collectives,
) -> tuple[Tensor, Tensor]:  # (T,), (T,)
    """Fills `grad_TP` with the gradient of each task's mean loss over its whole batch, all workers' parts summed.

    Returns: losses_T in nats and accuracies_T of the whole batches.
    """
    parts = []
    for row, batch in enumerate(batches):
        flat.collect_gradients_in(grad_TP[row])
        loss, accuracy = task_loss(batch)
        # DDP averages over workers; the parts must be summed.
        (loss * collectives.workers).backward()
        collectives.count_all_reduce(grad_TP[row].nbytes)
        parts.append(torch.stack([loss.detach(), accuracy]))
    totals_T2 = collectives.sum(torch.stack(parts))
    return totals_T2[:, 0], totals_T2[:, 1]
