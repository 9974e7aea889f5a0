"""The loop of one worker: batches → steps → log lines, checkpoints.

Path: stream → step → [here] → checkpoint.  Runs inside Ray Train (`launch.py`) or alone in one process: the stream and
the barrier come in as arguments.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from taskspec import artifacts, store
from taskspec.config import Config
from taskspec.data.batches import BatchMaker, GivenNegatives, StepBatches, dev_batches
from taskspec.data.plan import Plan, queries_per_task
from taskspec.data.prepared import PreparedData
from taskspec.errors import ConfigError
from taskspec.machine import own_cpus
from taskspec.model.encoder import text_tokenizer
from taskspec.specialize.collectives import Collectives
from taskspec.specialize.distribution import assign_tasks
from taskspec.train.checkpoint import add_to_run, open_training, publish_checkpoint, read_run
from taskspec.train.step import StepResult, Trainer


@dataclass(frozen=True)
class TrainJob:
    """What a run is made from and where it goes; every worker gets the same."""

    config: Config
    prepared: str
    """URI of the prepared data."""
    negatives: str | None
    """URI of the negatives; None where `contrastive.negatives` is 0."""
    run: str
    """URI of the run folder."""
    start: str | None = None
    """URI of a checkpoint to start from: its weights, and its sensitivities of the tasks that both have."""


Batches = Callable[[TrainJob, Any, int, int, int], Iterator[StepBatches]]
"""(job, tokenizer, rank, workers, first step) → the batches from that step on."""


def make_plan(config: Config, prepared: PreparedData) -> Plan:
    """The plan of a run: mixing over all tasks of the configuration, so that a task trained alone gets the queries per
    step that it gets among the others.

    Raises: ConfigError for a trained task without train queries.
    """
    have = prepared.tasks("train")
    for task in config.trained_tasks:
        if task.name not in have:
            raise ConfigError(f"tasks.{task.name}: the prepared data has no train queries of it; prepare it again")
    sizes = {task.name: len(prepared.queries(task.name, "train")) for task in config.tasks if task.name in have}
    batch = queries_per_task(sizes, config.mixing.queries_per_step, config.mixing.temperature)
    trained = [task.name for task in config.trained_tasks]
    return Plan(config.seed, {name: sizes[name] for name in trained}, {name: batch[name] for name in trained})


def task_owners(config: Config, plan: Plan, workers: int) -> dict[str, int] | None:
    """Task → the worker that computes it, by the most tokens that its batch can have; None unless `task_parallel`."""
    if config.train.distribution != "task_parallel" or workers == 1:
        return None
    passages = (1 + config.contrastive.negatives) * config.model.max_passage_tokens
    tokens = {task: queries * (config.task(task).max_query_tokens + passages) for task, queries in plan.batch.items()}
    return assign_tasks(tokens, workers)


def make_maker(job: TrainJob, tokenizer: Any, rank: int, workers: int) -> BatchMaker:
    """Opens what one worker's batches are made from: its part of every task's, or its own tasks' whole ones."""
    prepared = PreparedData.open(job.prepared)
    plan = make_plan(job.config, prepared)
    negatives = GivenNegatives(job.negatives, prepared, tuple(plan.batch)) if job.negatives else None
    owners = task_owners(job.config, plan, workers)
    return BatchMaker(
        plan,
        prepared,
        text_tokenizer(job.config, tokenizer),
        negatives=negatives,
        negatives_per_query=job.config.contrastive.negatives,
        rank=0 if owners else rank,
        workers=1 if owners else workers,
        tasks=[task for task, owner in owners.items() if owner == rank] if owners else None,
    )


def local_batches(job: TrainJob, tokenizer: Any, rank: int, workers: int, start: int) -> Iterator[StepBatches]:
    """The stream without Ray: batches are made where they are used."""
    maker = make_maker(job, tokenizer, rank, workers)
    return (maker.step(step) for step in range(start, job.config.train.steps))


def train_worker(
    job: TrainJob,
    *,
    batches: Batches = local_batches,
    barrier: Callable[[dict[str, Any]], None] = lambda metrics: None,
    device: str = "cpu",
    local_workers: int = 1,
) -> None:
    """Trains from the run's last checkpoint to its last step.

    Args: barrier: called by every worker after each checkpoint with its step and dev accuracies.
        local_workers: workers on this node, for the threads of each.
    """
    config = job.config
    torch.set_num_threads(config.train.threads or max(1, own_cpus() // local_workers))
    run = read_run(job.run)
    assert run is not None  # launch publishes the first checkpoint before any worker starts
    resumed = open_training(run.last_uri, config)
    begun = artifacts.read_manifest(run.last_uri, "checkpoint")
    prepared = PreparedData.open(job.prepared)
    plan = make_plan(config, prepared)
    rank, workers = Collectives().rank, Collectives().workers
    trainer = Trainer(config, resumed.encoder, torch.device(device), task_owners(config, plan, workers))
    if resumed.tensors:
        trainer.load(resumed.tensors)
        resumed.tensors.clear()  # as large as the optimizer
    dev = dev_batches(
        prepared,
        text_tokenizer(config, resumed.tokenizer),
        trainer.tasks,
        queries=config.train.dev_queries,
        seed=config.seed,
        rank=rank,
        workers=workers,
    )
    dev_counts = {task: min(config.train.dev_queries, len(prepared.queries(task, "dev"))) for task in dev}
    at_start = trainer.evaluate(dev) if resumed.step == 0 else {}
    log = Log(job, trainer, resumed.step, sum(plan.batch.values()), at_start) if rank == 0 else None
    described, waited, published, started = False, 0.0, 0.0, time.perf_counter()
    stream = batches(job, resumed.tokenizer, rank, workers, resumed.step)
    for step in range(resumed.step, config.train.steps):
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        done = step + 1
        last = done == config.train.steps
        checkpoint = last or done % config.train.checkpoint_every == 0
        described = described or checkpoint or done % config.train.log_every == 0
        if step == resumed.step:
            trainer.settle(batch)
        result = trainer.step(step, batch, describe=described)
        if log:
            log.add(result)

        # once in a while: measure dev accuracy and publish a checkpoint
        accuracy: dict[str, float] = {}
        if checkpoint:
            paused = time.perf_counter()
            accuracy = trainer.evaluate(dev)
            state = trainer.state(keep=log is not None)
            folder = f"step-{done:08d}"
            if log:
                publish_checkpoint(
                    store.join(job.run, folder),
                    config,
                    resumed.encoder,
                    resumed.tokenizer,
                    step=done,
                    state=state,
                    inputs=begun.inputs,
                    dev_accuracy=accuracy,
                    begun_by=begun.code,
                )
            del state  # twice as large as the parameters
            published += time.perf_counter() - paused

        # with each checkpoint and once in a while: one line for the console, JSONL and TensorBoard
        if described and (result.skipped is None or checkpoint):  # else the next step is described instead
            described = False
            peak, waited = trainer.peak_bytes(), trainer.highest(waited)
            if log:
                now = time.perf_counter()
                pace = Pace(seconds=now - started - published, waited=waited, checkpoint_seconds=published)
                log.write(done, result, pace, peak=peak, dev_accuracy=accuracy, whole=checkpoint)
                started = now
            waited, published = 0.0, 0.0

        # only now does the run go on from there: its lines are written
        if checkpoint:
            paused = time.perf_counter()
            if log:
                run = add_to_run(run, job.run, folder, *mean_accuracy(accuracy, dev_counts), finished=last)
            barrier({"step": done, **accuracy})
            published += time.perf_counter() - paused
    if log:
        log.close()


def mean_accuracy(accuracy: Mapping[str, float], queries: Mapping[str, int]) -> tuple[float | None, float]:
    """The mean over tasks of an accuracy, and its standard error over queries; None for no tasks.

    Args: queries: task → how many its accuracy is of.
    """
    if not accuracy:
        return None, 0.0
    variance = sum(share * (1 - share) / queries[task] for task, share in accuracy.items())
    return sum(accuracy.values()) / len(accuracy), math.sqrt(max(0.0, variance)) / len(accuracy)


@dataclass(frozen=True)
class Pace:
    """Seconds since the last line of the log."""

    seconds: float
    """Of the steps, waiting included."""
    waited: float
    """For batches, of the worker that waited longest: the others wait for it."""
    checkpoint_seconds: float
    """Of measuring dev accuracy and publishing checkpoints."""


LINES_A_FILE = 100
"""A file is written anew with each of its lines, as S3 cannot append: this bounds what is written for one."""


class Log:
    """The metrics of a run since its last line: `metrics/step-….jsonl` and TensorBoard, in the run folder.

    A file is named by the number of steps before its first line. From where this start goes on, those of earlier starts
    are removed, and their last one may have lines that no longer count (`read_metrics`).
    """

    def __init__(
        self, job: TrainJob, trainer: Trainer, start: int, queries_per_step: int, dev_at_start: Mapping[str, float]
    ) -> None:
        """Args: dev_at_start: dev accuracies of the untrained encoder; empty if this start goes on with a run."""
        from torch.utils.tensorboard import SummaryWriter

        self._trainer = trainer
        self._folder = store.join(job.run, "metrics")
        for name, first in _metrics_files(self._folder):
            if first >= start:
                store.delete(name)
        self._started = datetime.datetime.now(datetime.UTC).isoformat()
        self._first = self._written = start
        self._lines: list[str] = []
        self._results: list[StepResult] = []
        self._skipped: list[str] = []
        self._queries_per_step = queries_per_step
        # Events of that step and later ones are dropped; a line's step counts the steps that are done.
        self._board = SummaryWriter(store.join(job.run, "tensorboard"), purge_step=start + 1)
        self._dev_at_start = dict(dev_at_start)

    def add(self, result: StepResult) -> None:
        if result.skipped is None:
            self._results.append(result)
        else:
            self._skipped.append(result.skipped)

    def write(
        self,
        step: int,
        result: StepResult,
        pace: Pace,
        *,
        peak: int,
        dev_accuracy: Mapping[str, float],
        whole: bool,
    ) -> None:
        """Writes a line of the steps since the last one, with the weights of this one if it was taken.

        Args: step: how many are done. peak: bytes, of the worker that took most so far. dev_accuracy: if this step was
            measured. whole: also each task's and layer's estimates, some ten times as long as the rest.
        """
        taken = self._results
        tasks: dict[str, dict[str, float]] = {task: {} for task in self._trainer.tasks}
        if taken:
            loss_T = torch.stack([one.loss_T for one in taken]).mean(0).tolist()
            accuracy_T = torch.stack([one.accuracy_T for one in taken]).mean(0).tolist()
            for task, loss, accuracy in zip(self._trainer.tasks, loss_T, accuracy_T, strict=True):
                tasks[task] = {"loss": loss, "train_accuracy": accuracy}
        for task, accuracy in dev_accuracy.items():
            tasks[task]["dev_accuracy"] = accuracy
        said = None if result.skipped else result.specialized
        queries = self._queries_per_step * len(taken)
        line = {
            "step": step,
            "start": self._started,
            "tasks": tasks,
            "entropy": said and said.entropy,
            "saturation": said and said.saturation,
            "saturated_energy": said and said.saturated_energy,
            "gradient_norm": None if result.skipped else result.gradient_norm,
            "gradient_ratio": None if result.skipped else result.gradient_ratio,
            "clip_rate": sum(one.clipped for one in taken) / len(taken) if taken else None,
            "learning_rate": result.learning_rate,
            "queries": queries,
            "seconds": pace.seconds,
            "checkpoint_seconds": pace.checkpoint_seconds,
            "queries_per_second": queries / pace.seconds,
            "wait_share": pace.waited / pace.seconds,
            "bytes_sent": self._trainer.collectives.bytes_sent,
            "stability": {
                task: {layer: asdict(estimate) for layer, estimate in layers.items()}
                for task, layers in zip(self._trainer.tasks, (whole and said and result.stability) or (), strict=False)
            },
            "peak_bytes": peak,
            "dev_at_start": self._dev_at_start,
            "skipped": self._skipped.copy(),
            "bad_steps": self._trainer.bad_steps,
        }
        self._results.clear()
        self._skipped.clear()
        if len(self._lines) == LINES_A_FILE:
            self._first, self._lines = self._written, []
        self._written = step
        self._lines.append(json.dumps(line))
        name = store.join(self._folder, f"step-{self._first:08d}.jsonl")
        store.write_bytes(name, ("\n".join(self._lines) + "\n").encode())
        for name, value in line.items():
            if isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(name, value, step)
        for task, values in tasks.items():
            for name, value in values.items():
                self._board.add_scalar(f"{task}/{name}", value, step)
        if whole:  # what a later start goes on from
            self._board.flush()

    def close(self) -> None:
        self._board.close()


def read_metrics(run: str, after: int = 0) -> list[dict[str, Any]]:
    """The lines of a run, by step; where workers were restarted, the later start's line counts.

    Args: after: files in which every line is of this many steps or fewer are not read.
    """
    files = _metrics_files(store.join(run, "metrics"))
    skipped = sum(first <= after for _, first in files[1:])
    lines: dict[int, dict[str, Any]] = {}
    for name, first in files[skipped:]:
        lines = {step: line for step, line in lines.items() if step <= first}
        for text in store.read_bytes(name).decode().splitlines():
            line = json.loads(text)
            lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def _metrics_files(folder: str) -> list[tuple[str, int]]:
    """(URI, steps before its first line) of each file that is not just being written, ascending."""
    names = [name for name in store.list_files(folder) if name.endswith(".jsonl")]
    return sorted(
        ((name, int(name.rpartition("step-")[2].removesuffix(".jsonl"))) for name in names), key=lambda f: f[1]
    )


def seconds_taken(lines: Sequence[Mapping[str, Any]]) -> float:
    """Of a run by its lines, checkpoints included; not what came before its first step, nor what restarts lost."""
    # Lines of before checkpoints were counted apart have them in their seconds.
    return float(sum(line["seconds"] + line.get("checkpoint_seconds", 0.0) for line in lines))


def console_line(line: dict[str, Any], steps: int) -> str:
    """One short line of a step for a person: means over tasks, the task with the highest loss by name."""
    tasks = line["tasks"]
    if not line["queries"]:
        return f"step {line['step']}/{steps}  no step was taken since the last line"
    loss = sum(t["loss"] for t in tasks.values()) / len(tasks)
    hardest = max(tasks, key=lambda task: tasks[task]["loss"])
    dev = [t["dev_accuracy"] for t in tasks.values() if "dev_accuracy" in t]
    parts = [
        f"step {line['step']}/{steps}",
        f"loss {loss:.2f} (most {hardest} {tasks[hardest]['loss']:.2f})",
        f"dev {100 * sum(dev) / len(dev):.0f}%" if dev else "",
        "" if line["entropy"] is None else f"entropy {line['entropy']:.2f}",
        "" if line["entropy"] is None else f"saturated {100 * line['saturation']:.0f}%",
        "" if line["gradient_ratio"] is None else f"‖g‖ ×{line['gradient_ratio']:.1f}",
        f"clipped {100 * line['clip_rate']:.0f}%",
        f"lr {line['learning_rate']:.1e}",
        f"{line['queries_per_second']:.0f} q/s",
        f"waits {100 * line['wait_share']:.0f}%",
    ]
    return "  ".join(part for part in parts if part)
