"""How task gradients become one update: `mean`, `taco`, `pcgrad`, `cgd` and `gradnorm` behind one small interface.

Path: distribution → [here] → step.  T tasks, P elements of one worker's share, R rows of the whole model. `single` is
`mean` over one task.

All methods work with every distribution: what they need of other workers' shares are sums, which `Share.sum` gives. So
their states (weights, averages of rows) are the same on all workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from taskspec.errors import TrainingError
from taskspec.sections import Specialization
from taskspec.specialize import sensitivity as s
from taskspec.specialize.distribution import Share
from taskspec.specialize.mixture import Mixture
from taskspec.specialize.sensitivity import Specialized
from taskspec.specialize.stability import Estimate, Stability

EVEN = Specialized(entropy=1.0, saturation=0.0, saturated_energy=0.0)
"""Where every task's gradient is taken alike."""


@dataclass(frozen=True)
class Update:
    """The gradient that the optimizer takes, and what the weights looked like if that was asked for."""

    grad_P: Tensor
    """Valid until the next gradient is added."""
    specialized: Specialized | None
    stability: Sequence[Mapping[str, Estimate]] | None = None
    """By task, layer → how well the sensitivities are known; with methods that have them, if it was asked for."""


class Method(Protocol):
    """Turns one step's task gradients into one update of a worker's share."""

    separate: bool
    """Whether it takes each task's gradient by itself. If not, it takes their sum, which costs one exchange."""

    def add(self, task: int, grad_P: Tensor) -> None:
        """Takes in one task's gradient, or the sum of all; it may be overwritten afterwards."""
        ...

    def update(self, loss_T: Tensor, *, describe: bool) -> Update:
        """Args: loss_T: nats, over each task's whole batch. describe: also measure the weights."""
        ...

    def accept(self) -> None:
        """Keeps what this step's gradients changed in the state. Without it the step leaves no trace."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs; tensors are not copied."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises: TrainingError if the state is of other tasks or another model."""
        ...


class Mean:
    """Plain multitask training: the mean of the task gradients."""

    separate = False

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self._sum_P = torch.empty(0)

    def add(self, task: int, grad_P: Tensor) -> None:
        self._sum_P = grad_P

    def update(self, loss_T: Tensor, *, describe: bool) -> Update:
        return Update(self._sum_P.div_(self.tasks), EVEN if describe else None)

    def accept(self) -> None:
        return

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        return


class Taco:
    """Weights per row by sensitivity: (1/T)·Σ_t (T·w_t) ⊙ g_t with w a softmax over tasks of strength·ŝ.

    The sensitivity of a row is the mean of its elements' |θ·g|; the paper takes every element by itself, which did
    worse (benchmarks/README.md). Medians are exact, over the R rows. Holds the mixture's P floats and a few times T·R.
    Source: arXiv 2307.00342, section 3; where this departs, sensitivity.py says so.
    """

    separate = True

    def __init__(self, config: Specialization, tasks: int, theta_P: Tensor, share: Share, steps: int) -> None:
        """Args: theta_P: the share's parameters, which the optimizer moves in place. steps: of the whole run, for the
        warm-up."""
        self.config, self.share, self.theta_P = config, share, theta_P
        self.warmup_steps = max(round(config.warmup * steps), min(config.min_warmup_steps, steps // 4))
        rows = share.rows
        self.average_TR = theta_P.new_zeros(tasks, rows.rows)
        self.updates_T = torch.zeros(tasks, dtype=torch.int64, device=theta_P.device)
        self.steps_done = torch.zeros((), dtype=torch.int64)
        self._mixture = Mixture(rows, theta_P)
        self.stability = Stability(tasks, rows, theta_P)
        self._normalized_TR = torch.zeros_like(self.average_TR)
        self._next_TR = torch.zeros_like(self.average_TR)
        self._next_T = torch.zeros_like(self.updates_T)
        self._touched_R = torch.zeros(rows.rows, dtype=torch.bool, device=theta_P.device)

    def add(self, task: int, grad_P: Tensor) -> None:
        rows, decay = self.share.rows, self.config.decay
        current_R = self.share.sum(rows.sum_abs_products(self.theta_P, grad_P)).div_(rows.width_R)
        median = s.weighted_median(current_R, rows.width_R)
        self._touched_R |= current_R > 0
        self._next_T[task] = self.updates_T[task] + (median > 0)
        normalized_R = s.normalize(current_R, median)
        self._normalized_TR[task] = normalized_R
        if self.config.shrinkage:
            normalized_R = self.stability.shrink(task, normalized_R)
        # A task without a gradient says nothing about itself: its average stays as its count of updates does.
        share = (1 - decay) * (median > 0).to(normalized_R)
        torch.lerp(self.average_TR[task], normalized_R, share, out=self._next_TR[task])
        self._mixture.add(self._logits(slice(task, task + 1))[0], grad_P)

    def _logits(self, tasks: slice) -> Tensor:
        strength = s.scheduled_strength(self.config.strength, int(self.steps_done), self.warmup_steps)
        scale_T = strength * s.bias_correction(self._next_T[tasks], self.config.decay)
        return self._next_TR[tasks] * scale_T.to(self._next_TR)[:, None]

    def update(self, loss_T: Tensor, *, describe: bool) -> Update:
        grad_P = self._mixture.finish()
        specialized = None
        if describe:
            rows = self.share.rows
            energy_R = self.share.sum(rows.sum_squares(grad_P))
            weight_TR = torch.softmax(self._logits(slice(None)), dim=0)
            specialized = s.describe(weight_TR, rows.width_R * self._touched_R, energy_R)
        self._touched_R.zero_()
        return Update(grad_P, specialized, self.stability.estimates() if describe else None)

    def accept(self) -> None:
        self.stability.add(self._normalized_TR, (self._next_T - self.updates_T).cpu())
        self.average_TR.copy_(self._next_TR)
        self.updates_T.copy_(self._next_T)
        self.steps_done += 1

    def state(self) -> dict[str, Tensor]:
        mine = {"average_TR": self.average_TR, "updates_T": self.updates_T, "steps_done": self.steps_done}
        return mine | self.stability.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        _copy_state(self.state(), state)


class _Combined(ABC):
    """Methods with one factor per task, found from the gradients' inner products once all are there.

    Holds T·P floats: the gradients.
    """

    separate = True

    def __init__(self, tasks: int, theta_P: Tensor, share: Share) -> None:
        self.share = share
        self._grad_TP = theta_P.new_zeros(tasks, len(theta_P))

    def add(self, task: int, grad_P: Tensor) -> None:
        self._grad_TP[task] = grad_P

    def update(self, loss_T: Tensor, *, describe: bool) -> Update:
        product_TT = self.share.sum((self._grad_TP @ self._grad_TP.T).double()).cpu()
        factor_T = torch.full((len(loss_T),), torch.nan, dtype=torch.float64)
        if product_TT.isfinite().all():
            factor_T = self._factors(product_TT, loss_T.double().cpu())
        grad_P = factor_T.to(self._grad_TP) @ self._grad_TP
        return Update(grad_P, self._describe(factor_T) if describe else None)

    @abstractmethod
    def _factors(self, product_TT: Tensor, loss_T: Tensor) -> Tensor:
        """What each task's gradient is multiplied by, from finite inner products; both float64 on the CPU."""

    def _describe(self, factor_T: Tensor) -> Specialized | None:
        one = torch.ones(1)
        return s.describe((factor_T / factor_T.sum())[:, None], one, one)


class PCGrad(_Combined):
    """Each task's gradient loses its component against every other task's, in random order; then the mean.

    The order is a function of (seed, step), so workers and resumed runs agree.
    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1.
    """

    def __init__(self, tasks: int, theta_P: Tensor, share: Share, seed: int) -> None:
        super().__init__(tasks, theta_P, share)
        self.seed = seed
        self.steps_done = torch.zeros((), dtype=torch.int64)

    def _factors(self, product_TT: Tensor, loss_T: Tensor) -> Tensor:
        # Projections stay in the span of the task gradients, so T×T products and coefficients are all it takes.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.steps_done))
        return projected_shares(product_TT, generator).mean(dim=0)

    def _describe(self, factor_T: Tensor) -> Specialized | None:
        return None  # factors may be negative: they are no shares

    def accept(self) -> None:
        self.steps_done += 1

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


class CGD(_Combined):
    """One weight per task, raised for tasks whose gradient helps the others.

    α_i ← α_i·exp(η·Σ_j √(L_i L_j)·cos(g_i, g_j)), normalized to sum 1.
    Source: Piratla et al., "Focus on the Common Good: Group Distributional Robustness Follows", ICLR 2022.
    """

    def __init__(self, tasks: int, theta_P: Tensor, share: Share, step_size: float) -> None:
        super().__init__(tasks, theta_P, share)
        self.step_size = step_size
        self.weight_T = torch.full((tasks,), 1 / tasks, dtype=torch.float64)
        self._next_T = self.weight_T

    def _factors(self, product_TT: Tensor, loss_T: Tensor) -> Tensor:
        norm_T = product_TT.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        cosine_TT = product_TT / norm_T / norm_T[:, None]
        gain_T = (loss_T * loss_T[:, None]).sqrt().mul(cosine_TT).sum(dim=1)
        self._next_T = torch.softmax(self.weight_T.log() + self.step_size * gain_T, dim=0)
        return self._next_T

    def accept(self) -> None:
        self.weight_T.copy_(self._next_T)

    def state(self) -> dict[str, Tensor]:
        return {"weight_T": self.weight_T}

    def load(self, state: Mapping[str, Tensor]) -> None:
        _copy_state(self.state(), state)


class GradNorm(_Combined):
    """One weight per task, moved so that tasks that have learned less have the larger gradients.

    A task's gradient norm w_t·‖g_t‖ is drawn to mean norm · r_t^α, where r_t is the share of its first loss that is
    left, over the tasks' mean of it: one step of gradient descent on the sum of the distances. Weights are positive and
    sum to T; norms are those of all parameters.
    Source: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing", ICML 2018, algorithm 1.
    """

    def __init__(self, tasks: int, theta_P: Tensor, share: Share, step_size: float, restoring: float) -> None:
        super().__init__(tasks, theta_P, share)
        self.step_size, self.restoring = step_size, restoring
        self.weight_T = torch.ones(tasks, dtype=torch.float64)
        self.first_loss_T = torch.zeros(tasks, dtype=torch.float64)
        self._next_T, self._next_first_T = self.weight_T, self.first_loss_T

    def _factors(self, product_TT: Tensor, loss_T: Tensor) -> Tensor:
        tiny = torch.finfo(torch.float64).tiny
        norm_T = product_TT.diagonal().sqrt()
        first_T = torch.where(self.first_loss_T > 0, self.first_loss_T, loss_T)
        left_T = loss_T / first_T.clamp_min(tiny)
        weighted_T = self.weight_T * norm_T
        target_T = weighted_T.mean() * (left_T / left_T.mean().clamp_min(tiny)).pow(self.restoring)
        # In units of the mean norm, so that the step does not depend on the scale of the losses.
        slope_T = torch.sign(weighted_T - target_T) * norm_T / norm_T.mean().clamp_min(tiny)
        moved_T = (self.weight_T - self.step_size * slope_T).clamp_min(1e-3)
        self._next_T, self._next_first_T = moved_T * len(moved_T) / moved_T.sum(), first_T
        return self.weight_T / len(self.weight_T)

    def accept(self) -> None:
        self.weight_T.copy_(self._next_T)
        self.first_loss_T.copy_(self._next_first_T)

    def state(self) -> dict[str, Tensor]:
        return {"weight_T": self.weight_T, "first_loss_T": self.first_loss_T}

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


def carried(state: Mapping[str, Tensor], before: Sequence[str], after: Sequence[str]) -> dict[str, Tensor]:
    """A method's state for other tasks: what is kept by task stays with its task, a new task starts from nothing, and
    the warm-up begins again.

    Args: before, after: the tasks in the order of the rows.
    """
    result = {}
    for name, tensor in state.items():
        moved = tensor.new_zeros(len(after), *tensor.shape[1:]) if tensor.dim() else torch.zeros_like(tensor)
        if tensor.dim():
            for row, task in enumerate(after):
                if task in before:
                    moved[row] = tensor[list(before).index(task)]
        result[name] = moved
    return result


def kept_floats(config: Specialization, tasks: int) -> tuple[int, int]:
    """Floats that a method holds all the time: of each element of a worker's share, and of each row of the model."""
    if config.method == "taco":
        return 1, 5 * tasks
    return (tasks, 0) if config.method in ("pcgrad", "cgd", "gradnorm") else (0, 0)


def make_method(config: Specialization, tasks: int, theta_P: Tensor, share: Share, *, steps: int, seed: int) -> Method:
    """The method of a configuration for a worker's share of the parameters."""
    if config.method == "taco":
        return Taco(config, tasks, theta_P, share, steps)
    if config.method == "pcgrad":
        return PCGrad(tasks, theta_P, share, seed)
    if config.method == "cgd":
        return CGD(tasks, theta_P, share, config.cgd_step)
    if config.method == "gradnorm":
        return GradNorm(tasks, theta_P, share, config.gradnorm_step, config.gradnorm_restoring)
    return Mean(tasks)
