"""How task gradients become one update: `mean`, `taco`, `pcgrad` and `cgd` behind one small interface.

Path: gradients → [here] → step.  T tasks, P elements. `single` is `mean` over one task. Every worker holds the same
gradients and the same state, so all compute the same update without a word to each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from taskspec.config import Specialization
from taskspec.errors import TrainingError
from taskspec.specialize import sensitivity as s
from taskspec.specialize.gradients import Piece
from taskspec.specialize.sensitivity import Specialized


@dataclass(frozen=True)
class TaskGradients:
    """What one step knows when it asks for an update."""

    theta_P: Tensor
    grad_TP: Tensor
    """Each task's gradient over all workers."""
    loss_T: Tensor
    """Nats, over each task's whole batch."""


@dataclass(frozen=True)
class Update:
    """The gradient that the optimizer takes, and what the weights looked like if that was asked for."""

    grad_P: Tensor
    specialized: Specialized | None


class Method(Protocol):
    """Turns one step's task gradients into one update."""

    def update(self, step: TaskGradients, *, describe: bool) -> Update:
        """Args: describe: also measure the weights."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs; tensors are not copied."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises: TrainingError if the state is of other tasks or another model."""
        ...


class Mean:
    """Plain multitask training: the mean of the task gradients."""

    def update(self, step: TaskGradients, *, describe: bool) -> Update:
        update_P = s.mean_gradient(step.grad_TP)
        specialized = Specialized(entropy=1.0, saturation=0.0, saturated_energy=0.0) if describe else None
        return Update(update_P, specialized)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        return


class PCGrad:
    """Each task's gradient loses its component against every other task's, in random order; then the mean.

    The order is a function of (seed, step), so workers and resumed runs agree.
    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.steps_done = torch.zeros((), dtype=torch.int64)

    def update(self, step: TaskGradients, *, describe: bool) -> Update:
        # Projections stay in the span of the task gradients, so T×T products and coefficients are all it takes.
        product_TT = (step.grad_TP @ step.grad_TP.T).double().cpu()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.steps_done))
        share_TT = projected_shares(product_TT, generator)
        self.steps_done += 1
        update_P = share_TT.mean(dim=0).to(step.grad_TP) @ step.grad_TP
        specialized = Specialized(entropy=1.0, saturation=0.0, saturated_energy=0.0) if describe else None
        return Update(update_P, specialized)

    def state(self) -> dict[str, Tensor]:
        return {"steps_done": self.steps_done}

    def load(self, state: Mapping[str, Tensor]) -> None:
        _copy_state(self.state(), state)


def projected_shares(product_TT: Tensor, generator: torch.Generator) -> Tensor:
    """PCGrad in the coordinates of the task gradients.

    Args: product_TT: their inner products, float64.
    Returns: (T, T); row i holds how much of each task's gradient makes up task i's projected one.
    """
    tasks = len(product_TT)
    share_TT = torch.eye(tasks, dtype=product_TT.dtype)
    for task in range(tasks):
        for other in torch.randperm(tasks, generator=generator).tolist():
            against = share_TT[task] @ product_TT[:, other]
            if other != task and against < 0:
                share_TT[task, other] -= against / product_TT[other, other]
    return share_TT


class CGD:
    """One weight per task, raised for tasks whose gradient helps the others.

    α_i ← α_i·exp(η·Σ_j √(L_i L_j)·cos(g_i, g_j)), normalized to sum 1.
    Source: Piratla et al., "Focus on the Common Good: Group Distributional Robustness Follows", ICLR 2022.
    """

    def __init__(self, tasks: int, step_size: float) -> None:
        self.step_size = step_size
        self.weight_T = torch.full((tasks,), 1 / tasks, dtype=torch.float64)

    def update(self, step: TaskGradients, *, describe: bool) -> Update:
        norm_T = step.grad_TP.norm(dim=1).clamp_min(torch.finfo(step.grad_TP.dtype).tiny)
        cosine_TT = ((step.grad_TP @ step.grad_TP.T) / norm_T / norm_T[:, None]).double().cpu()
        loss_T = step.loss_T.double().cpu()
        gain_T = (loss_T * loss_T[:, None]).sqrt().mul(cosine_TT).sum(dim=1)
        self.weight_T.copy_(torch.softmax(self.weight_T.log() + self.step_size * gain_T, dim=0))
        update_P = self.weight_T.to(step.grad_TP) @ step.grad_TP
        specialized = None
        if describe:
            weight_TP = len(step.grad_TP) * self.weight_T[:, None].to(step.grad_TP).expand_as(step.grad_TP)
            specialized = s.describe(weight_TP, update_P, step.grad_TP.ne(0).any(0))
        return Update(update_P, specialized)

    def state(self) -> dict[str, Tensor]:
        return {"weight_T": self.weight_T}

    def load(self, state: Mapping[str, Tensor]) -> None:
        _copy_state(self.state(), state)


class Taco:
    """Weights per row by sensitivity. Source: arXiv 2307.00342, section 3; where this departs, sensitivity.py says so.

    Holds T·P floats of running averages.
    """

    def __init__(
        self, config: Specialization, tasks: int, theta_P: Tensor, pieces: Sequence[Piece], steps: int
    ) -> None:
        """Args: theta_P: gives number, type and device of the averages. steps: of the whole run, for the warm-up."""
        self.config = config
        self.pieces = pieces
        self.warmup_steps = max(round(config.warmup * steps), config.min_warmup_steps)
        self.average_TP = theta_P.new_zeros(tasks, len(theta_P))
        self.updates_T = torch.zeros(tasks, dtype=torch.int64)
        self.steps_done = torch.zeros((), dtype=torch.int64)

    def update(self, step: TaskGradients, *, describe: bool) -> Update:
        weight_TP = self._weights(step)
        update_P = s.combine(weight_TP, step.grad_TP)
        self.steps_done += 1
        specialized = s.describe(weight_TP, update_P, step.grad_TP.ne(0).any(0)) if describe else None
        return Update(update_P, specialized)

    def _weights(self, step: TaskGradients) -> Tensor:
        current_TP = s.share_rows(s.sensitivity(step.theta_P, step.grad_TP), self.pieces)
        median_T = s.positive_medians(current_TP)
        s.accumulate(self.average_TP, s.normalize(current_TP, median_T), self.config.decay)
        self.updates_T += (median_T > 0).cpu()
        correction_T = s.bias_correction(self.updates_T, self.config.decay).to(step.theta_P)
        average_TP = torch.mul(self.average_TP, correction_T[:, None], out=current_TP)
        strength = s.scheduled_strength(self.config.strength, int(self.steps_done), self.warmup_steps)
        return s.task_weights(average_TP, strength)

    def state(self) -> dict[str, Tensor]:
        return {"average_TP": self.average_TP, "updates_T": self.updates_T, "steps_done": self.steps_done}

    def load(self, state: Mapping[str, Tensor]) -> None:
        _copy_state(self.state(), state)


def _copy_state(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint's tensors into a method's. Raises: TrainingError if one is missing or of another shape."""
    for name, tensor in mine.items():
        found = theirs.get(name)
        if found is None or found.shape != tensor.shape:
            shape = "none" if found is None else str(tuple(found.shape))
            raise TrainingError(
                f"the checkpoint's {name} is {shape}, this run needs {tuple(tensor.shape)}; "
                f"resume with the tasks, model and method it was made with, or start in a new --out"
            )
        tensor.copy_(found)


def make_method(
    config: Specialization, tasks: int, theta_P: Tensor, pieces: Sequence[Piece], *, steps: int, seed: int
) -> Method:
    """The method of a configuration for those parameters."""
    if config.method == "taco":
        return Taco(config, tasks, theta_P, pieces, steps)
    if config.method == "pcgrad":
        return PCGrad(seed)
    if config.method == "cgd":
        return CGD(tasks, config.cgd_step)
    return Mean()
