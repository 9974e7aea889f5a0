"""How task gradients become one update: `mean` and `taco` behind one small interface.

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
from taskspec.specialize.sensitivity import Specialized


@dataclass(frozen=True)
class Update:
    """The gradient that the optimizer takes, and what the weights looked like if that was asked for."""

    grad_P: Tensor
    specialized: Specialized | None


class Method(Protocol):
    """Turns one step's task gradients into one update."""

    def update(self, theta_P: Tensor, grad_TP: Tensor, *, describe: bool) -> Update:
        """Args: grad_TP: each task's gradient over all workers. describe: also measure the weights."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs; tensors are not copied."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises: TrainingError if the state is of other tasks or another model."""
        ...


class Mean:
    """Plain multitask training: the mean of the task gradients."""

    def update(self, theta_P: Tensor, grad_TP: Tensor, *, describe: bool) -> Update:
        update_P = s.mean_gradient(grad_TP)
        specialized = Specialized(entropy=1.0, saturation=0.0, saturated_energy=0.0) if describe else None
        return Update(update_P, specialized)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        return


class Taco:
    """Weights per element by running sensitivity. Source: arXiv 2307.00342, section 3, as corrected in sensitivity.py.

    Holds T·P floats of running averages.
    """

    def __init__(self, config: Specialization, tasks: int, theta_P: Tensor, steps: int) -> None:
        """Args: theta_P: gives number, type and device of the averages. steps: of the whole run, for the warm-up."""
        self.config = config
        self.warmup_steps = max(round(config.warmup * steps), config.min_warmup_steps)
        self.average_TP = theta_P.new_zeros(tasks, len(theta_P))
        self.updates_T = torch.zeros(tasks, dtype=torch.int64)
        self.steps_done = torch.zeros((), dtype=torch.int64)

    def update(self, theta_P: Tensor, grad_TP: Tensor, *, describe: bool) -> Update:
        if self.config.compat == "reference":
            weight_TP, update_P = self._reference(theta_P, grad_TP)
        else:
            weight_TP, update_P = self._settled(theta_P, grad_TP)
        self.steps_done += 1
        specialized = s.describe(weight_TP, update_P, grad_TP.ne(0).any(0)) if describe else None
        return Update(update_P, specialized)

    def _settled(self, theta_P: Tensor, grad_TP: Tensor) -> tuple[Tensor, Tensor]:
        current_TP = s.sensitivity(theta_P, grad_TP)
        median_T = s.positive_medians(current_TP)
        s.accumulate(self.average_TP, s.normalize(current_TP, median_T), self.config.decay)
        self.updates_T += median_T.cpu() > 0
        corrected_TP = torch.mul(
            self.average_TP,
            s.bias_correction(self.updates_T, self.config.decay).to(theta_P)[:, None],
            out=current_TP,
        )
        strength = s.scheduled_strength(self.config.strength, int(self.steps_done), self.warmup_steps)
        weight_TP = s.task_weights(corrected_TP, strength)
        return weight_TP, s.combine(weight_TP, grad_TP)

    def _reference(self, theta_P: Tensor, grad_TP: Tensor) -> tuple[Tensor, Tensor]:
        """The published arithmetic: after warm-up the update is Σ w_t g_t / T, T times smaller than before."""
        tasks = len(grad_TP)
        current_TP = s.sensitivity(theta_P, grad_TP)
        s.accumulate(self.average_TP, s.normalize(current_TP, s.reference_medians(current_TP)), self.config.decay)
        if int(self.steps_done) < self.warmup_steps:
            return torch.ones_like(grad_TP), s.mean_gradient(grad_TP)
        weight_TP = s.task_weights(self.average_TP, self.config.strength)
        return weight_TP, s.combine(weight_TP, grad_TP).div_(tasks)

    def state(self) -> dict[str, Tensor]:
        return {"average_TP": self.average_TP, "updates_T": self.updates_T, "steps_done": self.steps_done}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, mine in self.state().items():
            theirs = state.get(name)
            if theirs is None or theirs.shape != mine.shape:
                found = "none" if theirs is None else str(tuple(theirs.shape))
                raise TrainingError(
                    f"the checkpoint's {name} is {found}, this run needs {tuple(mine.shape)}; "
                    f"resume with the tasks, model and method it was made with, or start in a new --out"
                )
            mine.copy_(theirs)


def make_method(config: Specialization, tasks: Sequence[str], theta_P: Tensor, steps: int) -> Method:
    """The method of a configuration for those parameters."""
    if config.method == "taco":
        return Taco(config, len(tasks), theta_P, steps)
    return Mean()
