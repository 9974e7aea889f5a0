"""How much each task needs each row of the parameters, and for the analysis each element: the formulas.

Path: gradients, rows → [here] → methods, analysis.  T tasks, P elements, R rows; no process group and no state here.
Source of the method: arXiv 2307.00342, section 3. Where this departs from it or from its published code, the function
says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SATURATED = 0.9
"""A weight above this counts as saturated: one task owns the row."""


def sensitivity(param_P: Tensor, grad_TP: Tensor) -> Tensor:
    """First-order change of each task's loss, in nats, if an element were zeroed: |θ·g|.

    Args: grad_TP: each task's gradient, summed over workers; the sum of the workers' |θ·g| would be larger. The
        absolute value comes before any average over time, so batch noise does not average away.
    Returns: (T, P), ≥ 0.    Raises: ValueError if P differs.
    """
    if param_P.shape[-1] != grad_TP.shape[-1]:
        raise ValueError(f"param_P has {param_P.shape[-1]} elements, grad_TP has {grad_TP.shape[-1]}; P must be equal")
    return (param_P * grad_TP).abs_()


def positive_medians(sensitivity_TP: Tensor) -> Tensor:
    """Median of each task over the elements with a sensitivity above 0; the lower one of an even number.

    Embeddings of tokens that a batch does not hold have none, so the median over all elements is often 0.
    Returns: (T,); 0 for a task that is sensitive to nothing.
    """
    return torch.stack([weighted_median(row, torch.ones_like(row, dtype=torch.int64)) for row in sensitivity_TP])


def weighted_median(value_R: Tensor, width_R: Tensor) -> Tensor:
    """Median of the values above 0, each taken as often as its width says; the lower one of an even number.

    Rows share their mean sensitivity, so this is the median over elements.
    Args: width_R: int64, elements of each row.    Returns: a scalar, 0 where no value is above 0.
    """
    sorted_R, order_R = value_R.sort()
    upto_R = torch.where(sorted_R > 0, width_R[order_R], 0).cumsum(0)
    middle = torch.searchsorted(upto_R, (upto_R[-1:] + 1) // 2)  # without elements above 0 the first, which is 0
    return sorted_R[middle].clamp_min(0)[0]


def normalize(sensitivity_TP: Tensor, median_T: Tensor) -> Tensor:
    """Sensitivities in units of their task's median, in place; a task with median 0 becomes 0."""
    divisor_T = median_T.masked_fill(median_T == 0, torch.inf)
    return sensitivity_TP.div_(divisor_T[..., None])


def bias_correction(updates_T: Tensor, decay: float) -> Tensor:
    """What an average that started at 0 is to be multiplied by, after that many updates: 1 / (1 − decay^n).

    Args: updates_T: int64 updates of each task.    Returns: (T,) float64; 1 where there was none.
    """
    filled_T = 1 - decay ** updates_T.double()
    return torch.where(updates_T > 0, 1 / filled_T, torch.ones_like(filled_T))


def scheduled_strength(strength: float, updates: int, warmup_steps: int) -> float:
    """Strength after that many updates: 0 during warm-up, then linearly up to its value over as many steps again."""
    if updates < warmup_steps:
        return 0.0
    return strength * min(1.0, (updates - warmup_steps + 1) / max(1, warmup_steps))


@dataclass(frozen=True)
class Specialized:
    """What the weights of one step look like; each is a share between 0 and 1."""

    entropy: float
    """Mean over touched elements of the weights' entropy, by log T: 1 is the plain mean, 0 is one task each."""
    saturation: float
    """Share of touched elements of which one task has a weight above 0.9 (of 1)."""
    saturated_energy: float
    """Share of the update's squared norm that lies in saturated elements."""


def describe(weight_TR: Tensor, elements_R: Tensor, energy_R: Tensor) -> Specialized:
    """Args: weight_TR: columns sum to 1. elements_R: how many elements of each row count: 0 for one without gradient.
    energy_R: the update's squared norm in each row."""
    elements, energy = elements_R.double(), energy_R.double()
    if len(weight_TR) == 1 or not elements.sum():
        return Specialized(entropy=1.0, saturation=0.0, saturated_energy=0.0)
    entropy_R = torch.special.entr(weight_TR).sum(dim=0) / math.log(len(weight_TR))
    saturated_R = weight_TR.max(dim=0).values > SATURATED
    share_R = elements / elements.sum()
    saturated_energy = energy[saturated_R].sum() / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Specialized(float(entropy_R.double() @ share_R), float(share_R[saturated_R].sum()), float(saturated_energy))
