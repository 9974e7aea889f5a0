"""How far a task's sensitivities can be trusted, layer by layer, and shrinkage of those that cannot.

Path: sensitivities → [here] → methods.  T tasks, R rows, G layers. A task with few queries a step has noisy
sensitivities, and a softmax over tasks takes noise for need. From step to step a row's normalized sensitivity ŝ varies
by its noise; over tasks its mean varies by what the tasks need. The share of the second in both is the *reliability*
of a task in a layer, and ŝ shrinks toward the tasks' mean by it (the linear shrinkage of Efron and Morris, "Stein's
estimation rule and its competitors", JASA 1973).

All of a row is known on every worker, so all hold the same: 2·T·R floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from taskspec.specialize.rows import Rows
from taskspec.specialize.sensitivity import bias_correction

MEMORY = 0.95
"""Decay of the running moments: about the last twenty steps."""
LEAST_UPDATES = 5
"""Before so many steps of every task nothing is estimated: a variance of two numbers says little."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """How well one task's sensitivities are known in one layer."""

    standard_error: float
    """Of one step's ŝ, which without a memory is what the weights see; root mean square over the layer's elements, in
    units of the task's median."""
    sample_size: float
    """Effective: (mean of ŝ / standard error)², the squared signal-to-noise ratio: how many measurements with an error
    as large as what they measure are worth one step."""
    reliability: float
    """Between 0, all noise, and 1: what ŝ is shrunk by."""


class Stability:
    """Running mean and variance of every task's normalized sensitivity to every row."""

    def __init__(self, tasks: int, rows: Rows, like: Tensor) -> None:
        """Args: like: gives type and device of the moments."""
        self.layers = rows.layers
        self._layer_R = rows.layer_R
        self._rows_of_layer = [(rows.layer_R == layer).nonzero()[:, 0] for layer in range(len(rows.layers))]
        self._width_R = rows.width_R.to(like)
        self._common_R: Tensor | None = None
        self._reliability_TR = like.new_empty(0)
        self.mean_TR = like.new_zeros(tasks, rows.rows)
        self.square_TR = torch.zeros_like(self.mean_TR)
        self.updates_T = torch.zeros(tasks, dtype=torch.int64)
        """On the CPU, where it is asked for task by task."""

    def shrink(self, task: int, normalized_R: Tensor) -> Tensor:
        """One task's ŝ drawn to the running mean of all tasks by its reliability; as it is while little is known, for
        all tasks as long as one of them is new."""
        if int(self.updates_T.min()) < LEAST_UPDATES:
            return normalized_R
        if self._common_R is None:  # the same for all tasks of a step
            self._common_R = self._moments()[0].mean(dim=0)
            self._reliability_TR = self._reliability()[:, self._layer_R]
        return self._common_R + self._reliability_TR[task] * (normalized_R - self._common_R)

    def add(self, normalized_TR: Tensor, measured_T: Tensor) -> None:
        """Takes in one step's ŝ, as they were before any shrinkage.

        Args: measured_T: int64 on the CPU, 1 for each task that had a gradient: one without it says nothing.
        """
        share_T1 = ((1 - MEMORY) * measured_T).to(self.mean_TR)[:, None]
        self.mean_TR.lerp_(normalized_TR, share_T1)
        self.square_TR.lerp_(normalized_TR.square(), share_T1)
        self.updates_T += measured_T
        self._common_R = None

    def estimates(self) -> list[Mapping[str, Estimate]]:
        """By task, layer → how well it is known; layers without any sensitivity are left out, and all of them before
        `LEAST_UPDATES`."""
        if int(self.updates_T.min()) < LEAST_UPDATES:
            return [{} for _ in self.updates_T]
        mean_TR, variance_TR = self._moments()
        error_TG = self._over_layers(variance_TR).sqrt()
        mean_TG = self._over_layers(mean_TR)
        # The variance is a difference of two moments: below the square root of their rounding it is not known.
        least_TG = mean_TG * torch.finfo(mean_TG.dtype).eps ** 0.5
        size_TG = (mean_TG / error_TG.maximum(least_TG).clamp_min(torch.finfo(mean_TG.dtype).tiny)).square()
        found = zip(error_TG.tolist(), size_TG.tolist(), self._reliability().tolist(), strict=True)
        used_G = mean_TG.sum(dim=0).tolist()
        return [
            {
                layer: Estimate(error, size, reliability)
                for layer, used, error, size, reliability in zip(self.layers, used_G, *rows, strict=True)
                if used > 0
            }
            for rows in found
        ]

    def state(self) -> dict[str, Tensor]:
        return {"mean_TR": self.mean_TR, "square_TR": self.square_TR, "stable_T": self.updates_T}

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance over steps, corrected for the start from 0."""
        scale_T1 = bias_correction(self.updates_T, MEMORY).to(self.mean_TR)[:, None]
        mean_TR = self.mean_TR * scale_T1
        return mean_TR, (self.square_TR * scale_T1 - mean_TR.square()).clamp_min_(0)

    def _reliability(self) -> Tensor:
        """(T, G). Means over some twenty steps still hold a little noise, which is taken off what differs between
        tasks."""
        mean_TR, variance_TR = self._moments()
        noise_TG = self._over_layers(variance_TR)
        spread_G = self._over_layers(mean_TR.var(dim=0, keepdim=True, correction=min(1, len(mean_TR) - 1)))[0]
        steps = min(int(self.updates_T.min()), (1 + MEMORY) / (1 - MEMORY))
        signal_G = (spread_G - noise_TG.mean(dim=0) / max(1.0, steps)).clamp_min(0)
        return signal_G / (signal_G + noise_TG).clamp_min(torch.finfo(noise_TG.dtype).tiny)

    def _over_layers(self, value_TR: Tensor) -> Tensor:
        """Mean over each layer's elements (T, G)."""
        # Summed in an order of their own: atomic additions on a GPU would round differently on each worker.
        sums = [
            (value_TR[:, rows] * self._width_R[rows]).sum(dim=1) / self._width_R[rows].sum()
            for rows in self._rows_of_layer
        ]
        return torch.stack(sums, dim=1)
