"""One training step: task gradients → one update → clip → AdamW.

Path: batches, distribution, method → [here] → worker.  T tasks, P elements of this worker's share
or of the whole vector.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taskspec.config import Config, canonical_sha256
from taskspec.data.batches import StepBatches
from taskspec.errors import DivergedError, TrainingError
from taskspec.model.encoder import Encoder
from taskspec.specialize.collectives import Collectives
from taskspec.specialize.distribution import Batches, Distribution, Replicated, Sharded, TaskParallel
from taskspec.specialize.gradients import FlatParameters, TaskLoss
from taskspec.specialize.methods import make_method
from taskspec.specialize.sensitivity import Specialized
from taskspec.specialize.stability import Estimate


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did."""

    loss_T: Tensor
    """Nats, over each task's whole batch."""
    accuracy_T: Tensor
    """In-batch accuracy, between 0 and 1."""
    gradient_norm: float
    """‖g‖ of the update before clipping; not finite where the step was skipped."""
    gradient_ratio: float | None
    """‖g‖ over the norm of the tasks' mean gradient; measured when the weights are described."""
    clipped: bool
    learning_rate: float
    specialized: Specialized | None
    stability: Sequence[Mapping[str, Estimate]] | None
    """By task, layer → how well the sensitivities are known; measured when the weights are described."""
    skipped: str | None
    """Why the step was skipped: where a gradient is not finite."""


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear up over the first `warmup` share of the steps, linear down to 0 after the last. Step counts from 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)


NORM_PIECE = 1024
"""Squares that are summed in the vector's own precision: of all elements of a T5-base, float32 loses 3% of the norm."""


def squared_norm(vector_P: Tensor) -> Tensor:
    """A float64 scalar."""
    whole = len(vector_P) // NORM_PIECE * NORM_PIECE
    rest = vector_P[whole:].norm()[None]
    return torch.cat([vector_P[:whole].view(-1, NORM_PIECE).norm(dim=1), rest]).double().square().sum()


class Trainer:
    """Model, method and optimizer of one worker, and the step that moves them.

    The optimizer works on this worker's share of one vector of all parameters. Dropout's randomness is a function of
    (seed, step, worker), so a run resumed at any step draws what the unbroken one drew.
    """

    def __init__(
        self, config: Config, encoder: Encoder, device: torch.device, owners: Mapping[str, int] | None = None
    ) -> None:
        """Args: owners: with `task_parallel`, task → the worker that computes it."""
        self.config = config
        self.device = device
        self.tasks = [task.name for task in config.trained_tasks]
        self.collectives = Collectives()
        self.encoder = encoder.to(device)
        encoder.precision = config.train.precision
        if config.train.gradient_checkpointing:
            transformer: Any = encoder.transformer
            transformer.gradient_checkpointing_enable({"use_reentrant": False})
        self.task_loss = self._task_loss(self.collectives)
        self.flat = FlatParameters(self.task_loss, self.collectives.workers)
        self.distribution = self._distribution(owners)
        self.share = self.distribution.share
        self.parameter = nn.Parameter(self.flat.theta_P[self.share.elements])
        self.method = make_method(
            config.specialization,
            len(self.tasks),
            self.parameter.data,
            self.share,
            steps=config.train.steps,
            seed=config.seed,
        )
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=config.train.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
        )
        self.bad_steps = 0

    def _task_loss(self, collectives: Collectives) -> TaskLoss:
        return TaskLoss(self.encoder, self.config.contrastive.temperature, collectives, self.config.train.chunk_texts)

    def _distribution(self, owners: Mapping[str, int] | None) -> Distribution:
        kind = self.config.train.distribution
        if self.collectives.workers == 1 or kind == "replicated":
            return Replicated(self.task_loss, self.flat, self.collectives)
        if kind == "sharded":
            return Sharded(self.task_loss, self.flat, self.collectives)
        assert owners is not None
        alone = self._task_loss(Collectives.alone())
        return TaskParallel(alone, self.flat, self.collectives, [owners[task] for task in self.tasks])

    def step(self, step: int, batches: StepBatches, *, describe: bool = False) -> StepResult:
        """Moves the parameters once; if a gradient is not finite, all workers leave them as they are.

        Raises: DivergedError naming task and parameter after more than `train.max_bad_steps` of these; TrainingError
            if the workers' parameters, or what the method keeps of all of them, differ.
        """
        learning_rate = self.config.train.learning_rate * learning_rate_factor(
            step, self.config.train.steps, self.config.train.lr_warmup
        )
        ordered = self._ordered(batches)
        totals_T2 = torch.zeros(len(self.tasks), 2, dtype=self.flat.theta_P.dtype, device=self.device)
        plain_P = torch.zeros_like(self.parameter) if describe and self.method.separate else None
        self._begin(step)
        with torch.no_grad():
            if self.method.separate:
                for task, grad_P in self.distribution.gradients(ordered, totals_T2):
                    self.method.add(task, grad_P)
                    if plain_P is not None:
                        plain_P += grad_P
            else:
                self.method.add(0, self.distribution.summed_gradient(ordered, totals_T2))
            update = self.method.update(totals_T2[:, 0], describe=describe)
            norm = self._norm(update.grad_P)
            skipped = None if math.isfinite(norm) else self._skip(step, ordered)
            clip = self.config.train.clip_norm
            if skipped is None:
                if norm > clip:
                    update.grad_P.mul_(clip / norm)
                self.optimizer.param_groups[0]["lr"] = learning_rate
                self.parameter.grad = update.grad_P
                self.optimizer.step()
                self.method.accept()
                self.distribution.gather()
            if (step + 1) % self.config.train.compare_every == 0:
                self._require_alike(step)
            ratio = None
            if describe:
                ratio = 1.0 if plain_P is None else norm / max(self._norm(plain_P) / len(self.tasks), 1e-30)
        return StepResult(
            loss_T=totals_T2[:, 0],
            accuracy_T=totals_T2[:, 1],
            gradient_norm=norm,
            gradient_ratio=ratio,
            clipped=norm > clip,
            learning_rate=learning_rate,
            specialized=update.specialized,
            stability=update.stability,
            skipped=skipped,
        )

    def _ordered(self, batches: StepBatches) -> Batches:
        return [batches[task].to(self.device) if task in batches else None for task in self.tasks]

    def _begin(self, step: int) -> None:
        """Dropout on, drawn as this step's."""
        words = canonical_sha256([self.config.seed, step, self.collectives.rank])
        torch.manual_seed(int(words[:15], 16))
        self.encoder.train()

    def _norm(self, vector_P: Tensor) -> float:
        return math.sqrt(self.share.sum(squared_norm(vector_P)))

    def _skip(self, step: int, ordered: Batches) -> str:
        """Counts a step that no worker takes. Returns: what was not finite, found by computing the gradients again."""
        self.bad_steps += 1
        nowhere = len(self.flat.theta_P)
        first_T = torch.full((len(self.tasks),), nowhere, dtype=torch.int64, device=self.device)
        totals_T2 = torch.zeros(len(self.tasks), 2, dtype=self.flat.theta_P.dtype, device=self.device)
        self._begin(step)
        for task, grad_P in self.distribution.gradients(ordered, totals_T2):
            bad = grad_P.isfinite().logical_not_().nonzero()
            if len(bad):
                first_T[task] = self.share.elements.start + bad[0, 0]
        found = {
            task: next(piece.name for piece in self.flat.pieces if element < piece.elements.stop)
            for task, element in zip(self.tasks, self.collectives.minimum(first_T).tolist(), strict=True)
            if element < nowhere
        }
        where = ", ".join(f"task {task} (first in {name})" for task, name in found.items())
        reason = f"step {step}: the gradient of {where or 'no task by itself, but their update,'} is not finite"
        if self.bad_steps > self.config.train.max_bad_steps:
            raise DivergedError(
                f"{reason}; {self.bad_steps} such steps are more than train.max_bad_steps "
                f"({self.config.train.max_bad_steps}): lower train.learning_rate or raise contrastive.temperature"
            )
        return reason

    def _require_alike(self, step: int) -> None:
        kept = [v.flatten().to(self.device) for v in self.method.state().values() if v.is_floating_point()]
        if not all(self.collectives.alike(one) for one in (self.flat.theta_P, *kept)):
            raise TrainingError(
                f"step {step}: the workers' parameters or sensitivities differ; go on from the last checkpoint, and "
                f"look for a worker whose memory or network fails"
            )

    def settle(self, batches: StepBatches) -> None:
        """What has to run once before the first step of a start, so that a resumed run rounds as the unbroken one."""
        if self.method.separate:
            self.distribution.settle(self._ordered(batches))

    @torch.inference_mode()
    def evaluate(self, batches: StepBatches) -> dict[str, float]:
        """In-batch accuracy per task over all workers, dropout off."""
        self.encoder.eval()
        accuracies = [self.task_loss(batch.to(self.device))[1] for batch in batches.values()]
        if not accuracies:
            return {}
        return dict(zip(batches, self.collectives.sum(torch.stack(accuracies)).tolist(), strict=True))

    def peak_bytes(self) -> int:
        """Memory of the worker that has taken most so far: of the process, or on a GPU of its tensors.

        To be called by all workers.
        """
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
        return int(self.highest(peak))

    def highest(self, value: float) -> float:
        """The largest over workers. To be called by all of them."""
        return -float(self.collectives.minimum(torch.tensor(-value, dtype=torch.float64, device=self.device)))

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """Optimizer and method, by name, whole whatever the distribution; the weights are the encoder's.

        To be called by all workers. Args: keep: whether this one wants the optimizer's part, twice its parameters.
        """
        result = {f"method.{name}": value for name, value in self.method.state().items()}
        result["trainer.bad_steps"] = torch.tensor(self.bad_steps)
        for name, value in self.optimizer.state.get(self.parameter, {}).items():
            whole = self._whole(value) if value.dim() else value
            if keep:
                result[f"optimizer.{name}"] = whole.cpu()
        return result

    def _whole(self, part_P: Tensor) -> Tensor:
        if len(part_P) == len(self.flat.theta_P):
            return part_P[: self.flat.size]
        whole_P = torch.zeros_like(self.flat.theta_P)
        whole_P[self.share.elements] = part_P
        return self.collectives.gather_slices(whole_P)[: self.flat.size]

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises: TrainingError if the state does not fit this model, its tasks or method."""
        groups: dict[str, dict[str, Tensor]] = {"optimizer": {}, "method": {}, "trainer": {}}
        for name, value in state.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        if groups["optimizer"]:
            found = len(groups["optimizer"]["exp_avg"])
            if found != self.flat.size:
                raise TrainingError(f"the checkpoint's optimizer has {found} elements, the model {self.flat.size}")
            self.optimizer.state[self.parameter] = {
                name: self._part(value) if value.dim() else value.to(self.device, copy=True)
                for name, value in groups["optimizer"].items()
            }
        self.method.load(groups["method"])
        self.bad_steps = int(groups["trainer"].get("bad_steps", 0))

    def _part(self, whole_P: Tensor) -> Tensor:
        padded_P = torch.zeros_like(self.flat.theta_P)
        padded_P[: self.flat.size] = whole_P
        return padded_P[self.share.elements].clone()
