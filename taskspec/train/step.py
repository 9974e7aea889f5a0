"""One training step: task gradients → one update → clip → AdamW.

Path: batches, gradients, method → [here] → worker.  T tasks, P elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from taskspec.config import Config, canonical_sha256
from taskspec.data.batches import StepBatches
from taskspec.errors import TrainingError
from taskspec.model.encoder import Encoder
from taskspec.specialize.collectives import Collectives
from taskspec.specialize.gradients import FlatParameters, TaskLoss, task_gradients
from taskspec.specialize.methods import TaskGradients, make_method
from taskspec.specialize.sensitivity import Specialized, mean_gradient


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did."""

    loss_T: Tensor
    """Nats, over each task's whole batch."""
    accuracy_T: Tensor
    """In-batch accuracy, between 0 and 1."""
    gradient_norm: float
    """‖g‖ of the update before clipping."""
    gradient_ratio: float | None
    """‖g‖ over the norm of the tasks' mean gradient; measured when the weights are described."""
    clipped: bool
    learning_rate: float
    specialized: Specialized | None


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear up over the first `warmup` share of the steps, linear down to 0 after the last. Step counts from 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)


class Trainer:
    """Model, method and optimizer of one worker, and the step that moves them.

    The optimizer works on one vector of all parameters. Dropout's randomness is a function of (seed, step, worker), so
    a run resumed at any step draws what the unbroken one drew.
    """

    def __init__(self, config: Config, encoder: Encoder, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.collectives = Collectives()
        encoder.precision = config.train.precision
        self.task_loss = TaskLoss(encoder.to(device), config.contrastive.temperature, self.collectives)
        self.flat = FlatParameters(self.task_loss)
        self.forward: TaskLoss | DistributedDataParallel = self.task_loss
        if self.collectives.workers > 1:
            self.forward = DistributedDataParallel(self.task_loss, forward_sync_buffers=False)
        tasks = [task.name for task in config.trained_tasks]
        self.method = make_method(
            config.specialization,
            len(tasks),
            self.flat.theta_P,
            self.flat.pieces,
            steps=config.train.steps,
            seed=config.seed,
        )
        self.parameter = nn.Parameter(self.flat.theta_P)
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=config.train.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
        self.grad_TP = self.flat.theta_P.new_zeros(len(tasks), len(self.flat.theta_P))
        self.tasks = tasks

    def step(self, step: int, batches: StepBatches, *, describe: bool = False) -> StepResult:
        """Moves the parameters once. Raises: TrainingError if a gradient is not finite, naming the tasks."""
        self.seed_dropout(step)
        self.forward.train()
        ordered = [batches[task].to(self.device) for task in self.tasks]
        loss_T, accuracy_T = task_gradients(self.forward, self.flat, ordered, self.grad_TP, self.collectives)
        with torch.no_grad():
            gradients = TaskGradients(self.flat.theta_P, self.grad_TP, loss_T)
            update = self.method.update(gradients, describe=describe)
            norm = float(update.grad_P.norm())
            if not norm < float("inf"):
                self._refuse(step)
            clip = self.config.train.clip_norm
            if norm > clip:
                update.grad_P.mul_(clip / norm)
            factor = learning_rate_factor(step, self.config.train.steps, self.config.train.lr_warmup)
            learning_rate = self.config.train.learning_rate * factor
            self.optimizer.param_groups[0]["lr"] = learning_rate
            self.parameter.grad = update.grad_P
            self.optimizer.step()
            ratio = norm / max(float(mean_gradient(self.grad_TP).norm()), 1e-30) if describe else None
        return StepResult(
            loss_T=loss_T,
            accuracy_T=accuracy_T,
            gradient_norm=norm,
            gradient_ratio=ratio,
            clipped=norm > clip,
            learning_rate=learning_rate,
            specialized=update.specialized,
        )

    def settle(self, batches: StepBatches) -> None:
        """One forward and backward pass without an update, before the first step of a start.

        DDP arranges its buckets anew after its first backward pass, and a ring's rounding depends on them. After this
        pass a resumed run has the buckets that the unbroken one had.
        """
        if self.forward is not self.task_loss:
            self.flat.collect_gradients_in(self.grad_TP[0])
            loss, _ = self.forward(batches[self.tasks[0]].to(self.device))
            loss.backward()

    def seed_dropout(self, step: int) -> None:
        words = canonical_sha256([self.config.seed, step, self.collectives.rank])
        torch.manual_seed(int(words[:15], 16))

    def _refuse(self, step: int) -> None:
        bad = [task for task, grad_P in zip(self.tasks, self.grad_TP, strict=True) if not grad_P.isfinite().all()]
        raise TrainingError(
            f"step {step}: the gradient of {', '.join(bad) or 'the update'} is not finite; "
            f"lower train.learning_rate or raise contrastive.temperature"
        )

    @torch.inference_mode()
    def evaluate(self, batches: StepBatches) -> dict[str, float]:
        """In-batch accuracy per task over all workers, dropout off."""
        self.task_loss.eval()
        accuracies = [self.task_loss(batch.to(self.device))[1] for batch in batches.values()]
        if not accuracies:
            return {}
        return dict(zip(batches, self.collectives.sum(torch.stack(accuracies)).tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Optimizer and method, by name; the weights are the encoder's."""
        optimizer = self.optimizer.state.get(self.parameter, {})
        return {
            **{f"optimizer.{name}": value for name, value in optimizer.items()},
            **{f"method.{name}": value for name, value in self.method.state().items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises: TrainingError if the state does not fit this model, its tasks or method."""
        groups: dict[str, dict[str, Tensor]] = {"optimizer": {}, "method": {}}
        for name, value in state.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        if groups["optimizer"]:
            found = len(groups["optimizer"]["exp_avg"])
            if found != len(self.parameter):
                raise TrainingError(f"the checkpoint's optimizer has {found} elements, the model {len(self.parameter)}")
            self.optimizer.state[self.parameter] = {
                name: value.to(self.device if value.dim() else "cpu") for name, value in groups["optimizer"].items()
            }
        self.method.load(groups["method"])
