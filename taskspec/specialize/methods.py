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
from taskspec.specialize.analysis import kind_of
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
    second_moment_P: Tensor | None
    """The optimizer's estimate of the squared update, bias-corrected; None before its first step, and where
    `specialization.measure` does not ask for it."""


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
    """Weights per element by running sensitivity. Source: arXiv 2307.00342, section 3, as corrected in sensitivity.py.

    Holds T·P floats of running averages.
    """

    def __init__(
        self, config: Specialization, tasks: int, theta_P: Tensor, pieces: Sequence[Piece], steps: int, seed: int
    ) -> None:
        """Args: theta_P: gives number, type and device of the averages. steps: of the whole run, for the warm-up.
        seed: of the order that `permute` shuffles by.
        """
        self.config = config
        self.pieces = pieces
        self.groups = median_groups(pieces, config.median)
        self.order_P = None
        if config.permute:
            self.order_P = piecewise_permutation(pieces, config.granularity, seed).to(theta_P.device)
        self.warmup_steps = max(round(config.warmup * steps), config.min_warmup_steps)
        self.average_TP = theta_P.new_zeros(tasks, len(theta_P))
        self.updates_T = torch.zeros(tasks, dtype=torch.int64)
        self.steps_done = torch.zeros((), dtype=torch.int64)

    def update(self, step: TaskGradients, *, describe: bool) -> Update:
        if self.config.compat == "reference":
            weight_TP, update_P = self._reference(step)
        else:
            weight_TP = self._weights(step)
            update_P = s.combine(weight_TP, step.grad_TP)
        self.steps_done += 1
        specialized = s.describe(weight_TP, update_P, step.grad_TP.ne(0).any(0)) if describe else None
        return Update(update_P, specialized)

    def _weights(self, step: TaskGradients) -> Tensor:
        current_TP = self._measure(step)
        share_first = self.config.median == "shared"
        if share_first:
            s.share_sensitivity(current_TP, self.pieces, self.config.granularity)
        found_T = s.normalize_groups(current_TP, self.groups)
        s.accumulate(self.average_TP, current_TP, self.config.decay)
        self.updates_T += found_T.cpu()
        correction_T = s.bias_correction(self.updates_T, self.config.decay).to(step.theta_P)
        average_TP = torch.mul(self.average_TP, correction_T[:, None], out=current_TP)
        if self.config.average == "signed":
            s.normalize_groups(average_TP.abs_(), self.groups)
        if not share_first:
            s.share_sensitivity(average_TP, self.pieces, self.config.granularity)
        s.compress(average_TP, self.config.compress)
        strength = s.scheduled_strength(self.config.strength, int(self.steps_done), self.warmup_steps)
        weight_TP = s.task_weights(average_TP, strength)
        if self.order_P is not None:
            weight_TP = weight_TP[:, self.order_P]
        if self.config.conflict == "drop" and strength:
            s.drop_opposed(weight_TP, step.grad_TP)
        return weight_TP

    def _measure(self, step: TaskGradients) -> Tensor:
        signed_TP = step.grad_TP.clone() if self.config.measure == "gradient" else step.theta_P * step.grad_TP
        if self.config.measure == "adam" and step.second_moment_P is not None:
            signed_TP.div_(step.second_moment_P.sqrt().add_(1e-8))
        return signed_TP.abs_() if self.config.average == "absolute" else signed_TP

    def _reference(self, step: TaskGradients) -> tuple[Tensor, Tensor]:
        """The published arithmetic: after warm-up the update is Σ w_t g_t / T, T times smaller than before."""
        tasks = len(step.grad_TP)
        current_TP = s.sensitivity(step.theta_P, step.grad_TP)
        s.accumulate(self.average_TP, s.normalize(current_TP, s.reference_medians(current_TP)), self.config.decay)
        if int(self.steps_done) < self.warmup_steps:
            return torch.ones_like(step.grad_TP), s.mean_gradient(step.grad_TP)
        weight_TP = s.task_weights(self.average_TP, self.config.strength)
        return weight_TP, s.combine(weight_TP, step.grad_TP).div_(tasks)

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


def median_groups(pieces: Sequence[Piece], over: str) -> list[list[slice]]:
    """The elements that a median is taken over together: `global`, each `tensor`, or each `kind` of parameter."""
    groups: dict[str, list[slice]] = {}
    for piece in pieces:
        name = {"global": "", "shared": "", "tensor": piece.name, "kind": kind_of(piece.name)}[over]
        groups.setdefault(name, []).append(piece.elements)
    return list(groups.values())


def piecewise_permutation(pieces: Sequence[Piece], granularity: str, seed: int) -> Tensor:
    """(P,) element numbers, shuffled inside each piece; with `row`, the rows of a matrix move as wholes."""
    generator = torch.Generator().manual_seed(seed)
    orders = []
    for piece in pieces:
        element_P = torch.arange(piece.start, piece.elements.stop)
        width = len(element_P) // piece.shape[0] if granularity == "row" and len(piece.shape) > 1 else 1
        unit_UW = element_P.view(-1, width)
        orders.append(unit_UW[torch.randperm(len(unit_UW), generator=generator)].flatten())
    return torch.cat(orders)


def make_method(
    config: Specialization, tasks: int, theta_P: Tensor, pieces: Sequence[Piece], *, steps: int, seed: int
) -> Method:
    """The method of a configuration for those parameters."""
    if config.method == "taco":
        return Taco(config, tasks, theta_P, pieces, steps, seed)
    if config.method == "pcgrad":
        return PCGrad(seed)
    if config.method == "cgd":
        return CGD(tasks, config.cgd_step)
    return Mean()
