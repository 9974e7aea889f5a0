"""What a run will need, said before it starts, and what it took: memory, bytes on the wire, epochs, time.

Path: configuration, prepared data → [here] → train job.  P elements of all trainable parameters together, R rows, T
tasks, W workers. Arithmetic only: the steps that are tried come in as metrics, and no process group is here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from taskspec import store
from taskspec.config import Config, canonical_sha256
from taskspec.data.plan import Plan
from taskspec.errors import PlacementError, TrainingError
from taskspec.model.encoder import Shapes
from taskspec.specialize.methods import kept_floats
from taskspec.train.checkpoint import Run
from taskspec.train.worker import seconds_taken

FLOAT = 4
"""Bytes of a parameter, a gradient and every state; `train.precision` changes activations only."""
PROBE_STEPS = 10
SUMMED = ("mean", "single")
"""Methods that take the sum of all gradients."""
PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run will need. Bytes are those of one worker."""

    parameters: int
    """That are trained."""
    rows: int
    tasks: int
    workers: int
    distribution: str
    memory: Mapping[str, int]
    """What it is for → bytes that are held all the time; activations come on top."""
    sent: int
    """Bytes that a worker sends in a step."""
    steps: int
    queries: int
    """Of a step."""
    epochs: Mapping[str, float]
    """Task → how often the run sees its train queries."""
    checkpoints: int = 0
    step_seconds: float | None = None
    """Of the steps that were tried."""
    checkpoint_seconds: float = 0.0
    """Of the checkpoint that was tried."""
    peak: int | None = None
    """Bytes of the process at its peak in the steps that were tried, activations and libraries included."""

    @property
    def held(self) -> int:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Of the whole run, as the steps that were tried have it."""
        return (self.step_seconds or 0.0) * self.steps + self.checkpoint_seconds * self.checkpoints

    def require_fits(self, available: int | None) -> None:
        """Args: available: bytes that a worker may take; None if nobody knows.

        Raises: PlacementError with both numbers, and what would take less.
        """
        if available is None:
            return
        if self.held > available:
            raise PlacementError(
                f"training needs {_size(self.held)} a worker before any activation ({self.memory_text()}), there "
                f"are {_size(available)}; {self._way_out()}"
            )
        if self.peak is not None and self.peak > available:
            raise PlacementError(
                f"a worker took {_size(self.peak)} at its peak in {PROBE_STEPS} steps, {_size(self.held)} of it all "
                f"the time, there are {_size(available)}; set train.chunk_texts, or {self._way_out()}"
            )

    def memory_text(self) -> str:
        return ", ".join(f"{name} {_size(size)}" for name, size in self.memory.items() if size)

    def _way_out(self) -> str:
        if self.distribution == "replicated":
            return (
                "set train.distribution=sharded with more workers, or take larger nodes, a smaller model, or model.lora"
            )
        return "take more workers, each holds less, or larger nodes, a smaller model, or model.lora"

    def to_text(self, available: int | None) -> str:
        """For the console."""
        memory = f"{_size(self.held)}: {self.memory_text()}"
        epochs = ", ".join(f"{task} {count:.2g}" for task, count in self.epochs.items())
        lines = [
            f"{self.parameters / 1e6:.1f} M parameters in {self.rows:,} rows, {self.tasks} tasks, {self.workers} "
            f"worker(s), {self.distribution}",
            f"  memory a worker  {memory}",
            f"  on the wire      {self.sent / 1e6:,.1f} MB sent by a worker in a step",
            f"  steps            {self.steps:,} of {self.queries} queries; epochs: {epochs}",
        ]
        if self.peak is not None and self.step_seconds is not None:
            have = "; nobody has looked whether that is there" if available is None else f", of {_size(available)}"
            lines.insert(2, f"                   {_size(self.peak)} at its peak in {PROBE_STEPS} steps{have}")
            lines.append(
                f"  time             {self.step_seconds:.2g} s a step in {PROBE_STEPS} steps, "
                f"{self.checkpoint_seconds:.2g} s a checkpoint: {_duration(self.seconds)}"
            )
        return "\n".join(lines)


def plan_training(config: Config, plan: Plan, shapes: Shapes) -> TrainingPlan:
    """Counts what a run will hold and send.

    Args: plan: of its data. shapes: of the encoder.
    """
    parameters = sum(math.prod(shape) for shape in shapes.trained)
    rows = sum(shape[0] if len(shape) > 1 else math.prod(shape) for shape in shapes.trained)
    tasks, workers = len(plan.batch), config.train.workers
    distribution = config.train.distribution if workers > 1 else "replicated"
    whole, share = FLOAT * parameters, FLOAT * parameters // (1 if distribution == "replicated" else workers)
    of_elements, of_rows = kept_floats(config.specialization, tasks)
    return TrainingPlan(
        parameters=parameters,
        rows=rows,
        tasks=tasks,
        workers=workers,
        distribution=distribution,
        memory={
            "parameters": whole,
            "frozen parameters": FLOAT * shapes.frozen,
            "gradients": whole * (1 if distribution == "replicated" or config.specialization.method in SUMMED else 2),
            "exchange": whole if workers > 1 else 0,
            "optimizer": 2 * share,
            "method": of_elements * share + of_rows * FLOAT * rows,
            "measuring": share if of_elements else 0,
        },
        sent=_sent(config, distribution, whole, FLOAT * rows, tasks),
        steps=config.train.steps,
        checkpoints=math.ceil(config.train.steps / config.train.checkpoint_every),
        queries=sum(plan.batch.values()),
        epochs={task: config.train.steps * plan.batch[task] / plan.sizes[task] for task in plan.batch},
    )


def _sent(config: Config, distribution: str, whole: int, rows: int, tasks: int) -> int:
    """By the volume of a ring. The gathered embeddings, a few kilobytes a query, are not counted."""
    workers, method = config.train.workers, config.specialization.method
    part = (workers - 1) / workers
    gradients = 1 if method in SUMMED else tasks
    if distribution == "replicated":
        return int(2 * part * whole * gradients)
    if distribution == "task_parallel" and gradients > 1:
        gradients = math.ceil(tasks / workers)
    sums = 2 * part * rows * tasks if method == "taco" else 0
    return int(part * whole * (gradients + 1) + sums)


def measured(plan: TrainingPlan, lines: Sequence[Mapping[str, Any]]) -> TrainingPlan:
    """The plan with what the steps that were tried took.

    Args: lines: of their metrics; the last one counts, as the first steps warm up.
    Raises: TrainingError if too many of the steps were skipped.
    """
    if len(lines) < 2 or not lines[-1]["queries"]:
        raise TrainingError(
            f"of the {PROBE_STEPS} steps that were tried too few had a finite gradient to measure; "
            f"lower train.learning_rate or raise contrastive.temperature"
        )
    last = lines[-1]
    steps = last["step"] - lines[-2]["step"]
    found = {
        "step_seconds": last["seconds"] / steps,
        "checkpoint_seconds": last["checkpoint_seconds"],
        "peak": last["peak_bytes"],
    }
    return TrainingPlan(**asdict(plan) | found)


def write_plan(run: str, plan: TrainingPlan, config: Config) -> None:
    """Beside the run, to be compared with it when it ends."""
    content = {"configuration": canonical_sha256(config.model_dump(mode="json")), **asdict(plan)}
    store.write_bytes(store.join(run, PLAN_FILE), json.dumps(content, indent=1).encode())


def _planned(run: str, config: Config) -> TrainingPlan | None:
    """The run's plan; None if there is none, or one of another configuration."""
    path = store.join(run, PLAN_FILE)
    if not store.exists(path):
        return None
    content = json.loads(store.read_bytes(path))
    same = content.pop("configuration", None) == canonical_sha256(config.model_dump(mode="json"))
    return TrainingPlan(**content) if same else None


def summary(run: Run, lines: Sequence[Mapping[str, Any]], config: Config) -> str:
    """How a finished run went, beside its plan where it was planned: two or three lines for the console."""
    skipped = lines[-1]["bad_steps"]
    if skipped >= lines[-1]["step"]:
        return (
            "trained no step: no gradient was finite; lower train.learning_rate or raise contrastive.temperature, "
            "and start in a new folder"
        )
    peak = max(line["peak_bytes"] for line in lines)
    best = f", dev accuracy {100 * run.best_accuracy:.0f}%" if run.best_accuracy >= 0 else ""
    sent = _sent_a_step(lines) if config.train.workers > 1 else None
    text = [
        f"trained {lines[-1]['step']:,} steps in {_duration(seconds_taken(lines))}, {_size(peak)} a worker at its peak"
        + ("" if sent is None else f", which sent {_size(sent)} a step")
        + (f", {skipped} step(s) skipped" if skipped else "")
        + f"; best checkpoint {run.best}{best}"
    ]
    plan = _planned(run.uri, config)
    if plan is not None and plan.step_seconds is not None and plan.peak is not None:
        planned = f"planned: {_duration(plan.seconds)}, {_size(plan.peak)} at its peak"
        text.append(planned + ("" if sent is None else f", {_size(plan.sent)} a step"))
    elif plan is None and store.exists(store.join(run.uri, PLAN_FILE)):
        text.append(f"{PLAN_FILE} is of another configuration, so nothing is compared with it")
    started = lines[0]["dev_at_start"]
    ended = {task: one["dev_accuracy"] for task, one in lines[-1]["tasks"].items() if "dev_accuracy" in one}
    both = [f"{task} {100 * started[task]:.0f} → {100 * ended[task]:.0f}%" for task in ended if task in started]
    if both:
        text.append("dev accuracy from start to end: " + ", ".join(both))
    return "\n".join(text)


def _sent_a_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Bytes by the first worker, between the first and the last line of the last start; None if that is one line."""
    last = lines[-1]
    first = next(line for line in lines if line["start"] == last["start"])
    steps = last["step"] - first["step"]
    return (last["bytes_sent"] - first["bytes_sent"]) / steps if steps else None


def _size(size: float) -> str:
    if size < 1e8:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
