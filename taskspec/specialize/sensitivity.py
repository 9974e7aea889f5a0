"""How much each task needs each row of the parameters, and the update that follows.

Path: gradients → [here] → step.  T tasks, P elements; no process group here. Memory: T·P floats; 8 tasks of T5-base
(223 M) in fp32 are 7.1 GB per worker.
Source of the method: arXiv 2307.00342, section 3. Where this departs from the published code, the function says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taskspec.specialize.gradients import Piece

SATURATED = 0.9
"""A weight above this counts as saturated: one task owns the element."""


def sensitivity(param_P: Tensor, grad_TP: Tensor) -> Tensor:
    """First-order change of each task's loss, in nats, if an element were zeroed: |θ·g|.

    Args: grad_TP: each task's gradient, summed over workers; the sum of the workers' |θ·g| would be larger. The
        absolute value comes before any average over time, so batch noise does not average away.
    Returns: (T, P), ≥ 0.    Raises: ValueError if P differs.
    """
    if param_P.shape[-1] != grad_TP.shape[-1]:
        raise ValueError(f"param_P has {param_P.shape[-1]} elements, grad_TP has {grad_TP.shape[-1]}; P must be equal")
    return (param_P * grad_TP).abs_()


def share_rows(sensitivity_TP: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Gives all elements of a row their mean, in place.

    A row is what has one first index: a token of an embedding, an output of a linear layer; each element of a vector
    is one. The paper takes every element by itself, which did worse (benchmarks/README.md).
    Args: pieces: of the P elements.    Returns: (T, P), the same tensor.
    """
    for piece in pieces:
        if len(piece.shape) > 1:
            part_TRC = sensitivity_TP[:, piece.elements].view(len(sensitivity_TP), piece.shape[0], -1)
            part_TRC.copy_(part_TRC.mean(dim=2, keepdim=True).expand_as(part_TRC))
    return sensitivity_TP


def positive_medians(sensitivity_TP: Tensor) -> Tensor:
    """Median of each task over the elements with a sensitivity above 0; the lower one of an even number.

    Embeddings of tokens that a batch does not hold have none, so the median over all elements is often 0.
    Returns: (T,); 0 for a task that is sensitive to nothing.
    """
    medians = [row[row > 0].median() if bool((row > 0).any()) else row.new_zeros(()) for row in sensitivity_TP]
    return torch.stack(medians)


def normalize(sensitivity_TP: Tensor, median_T: Tensor) -> Tensor:
    """Sensitivities in units of their task's median, in place; a task with median 0 becomes 0."""
    divisor_T = median_T.masked_fill(median_T == 0, torch.inf)
    return sensitivity_TP.div_(divisor_T[:, None])


def accumulate(average_TP: Tensor, normalized_TP: Tensor, decay: float) -> Tensor:
    """s ← decay·s + (1 − decay)·Ī, in place."""
    return average_TP.mul_(decay).add_(normalized_TP, alpha=1 - decay)


def bias_correction(updates_T: Tensor, decay: float) -> Tensor:
    """What an average that started at 0 is to be multiplied by, after that many updates: 1 / (1 − decay^n).

    Args: updates_T: int64 updates of each task.    Returns: (T,) float64; 1 where there was none.
    """
    filled_T = 1 - torch.pow(torch.tensor(decay, dtype=torch.float64), updates_T)
    return torch.where(updates_T > 0, 1 / filled_T, torch.ones_like(filled_T))


def task_weights(sensitivity_TP: Tensor, strength: float) -> Tensor:
    """T·softmax over tasks of strength·ŝ: how much of each task's gradient an element takes; 1 is the plain mean.

    The factor T is multiplied in before the division, so at strength 0 every weight is exactly 1 for any T.
    Returns: (T, P), columns sum to T.
    """
    logits_TP = strength * sensitivity_TP
    power_TP = logits_TP.sub_(logits_TP.max(dim=0).values).exp_()
    total_P = power_TP.sum(dim=0)
    return power_TP.mul_(power_TP.shape[0]).div_(total_P)


def combine(weight_TP: Tensor, grad_TP: Tensor) -> Tensor:
    """(1/T)·Σ_t weight_t ⊙ g_t, tasks added in order. Returns: (P,)."""
    total_P = weight_TP[0] * grad_TP[0]
    for weight_P, grad_P in zip(weight_TP[1:], grad_TP[1:], strict=True):
        total_P.addcmul_(weight_P, grad_P)
    return total_P.div_(len(grad_TP))


def mean_gradient(grad_TP: Tensor) -> Tensor:
    """(1/T)·Σ_t g_t, tasks added in order: bitwise what `combine` gives for weights of 1. Returns: (P,)."""
    total_P = grad_TP[0].clone()
    for grad_P in grad_TP[1:]:
        total_P.add_(grad_P)
    return total_P.div_(len(grad_TP))


def scheduled_strength(strength: float, updates: int, warmup_steps: int) -> float:
    """Strength after that many updates: 0 during warm-up, then linearly up to its value over as many steps again."""
    if updates < warmup_steps:
        return 0.0
    return strength * min(1.0, (updates - warmup_steps + 1) / max(1, warmup_steps))


@dataclass(frozen=True)
class Specialized:
    """What the weights of one step look like; each is a share between 0 and 1."""

    entropy: float
    """Mean over elements of the weights' entropy, over log T: 1 is plain multitask training, 0 is one task each."""
    saturation: float
    """Share of touched elements of which one task has a weight above 0.9 (of 1)."""
    saturated_energy: float
    """Share of the update's squared norm that lies in saturated elements."""


def describe(weight_TP: Tensor, update_P: Tensor, touched_P: Tensor) -> Specialized:
    """Args: weight_TP: columns sum to T. touched_P: bool, elements with a gradient of any task."""
    share_TP = weight_TP[:, touched_P] / len(weight_TP)
    if len(weight_TP) == 1 or not share_TP.numel():
        return Specialized(entropy=1.0, saturation=0.0, saturated_energy=0.0)
    entropy = torch.special.entr(share_TP).sum(dim=0).mean() / math.log(len(weight_TP))
    saturated_P = share_TP.max(dim=0).values > SATURATED
    energy_P = update_P[touched_P].square()
    energy = energy_P[saturated_P].sum() / energy_P.sum().clamp_min(torch.finfo(energy_P.dtype).tiny)
    return Specialized(float(entropy), float(saturated_P.float().mean()), float(energy))
