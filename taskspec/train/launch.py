"""A run on Ray Train: check, publish the first checkpoint, start the workers, show progress.

Path: prepared data, negatives → [here] → the run's best checkpoint.
"""

from __future__ import annotations

import math
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from taskspec import artifacts, cluster, store
from taskspec.config import Config, with_values
from taskspec.data.batches import StepBatches
from taskspec.data.prepared import PreparedData
from taskspec.data.stream import stream
from taskspec.errors import DataError, DivergedError, StoreError, TaskspecError, TrainingError
from taskspec.model.encoder import build_encoder, encoder_shapes, load_encoder, require_positions
from taskspec.train.checkpoint import (
    BASE,
    Run,
    add_to_run,
    encoder_id,
    open_start,
    open_training,
    publish_checkpoint,
    read_contract,
    read_run,
)
from taskspec.train.planning import PROBE_STEPS, TrainingPlan, measured, plan_training, summary, write_plan
from taskspec.train.worker import Batches, TrainJob, console_line, make_maker, make_plan, read_metrics, train_worker

FIRST = "step-00000000"
"""The checkpoint of a run folder that nothing has trained yet."""
DIVERGED_FILE = "diverged.txt"
"""In a run folder: why its workers gave up."""
TOKENIZER_TEXTS = 200_000
"""At most so many passages, evenly spaced, train a tokenizer; all train queries do as well, up to as many a task."""


def start_run(job: TrainJob) -> Run:
    """Finds the run to go on with, or publishes the untrained encoder as its first checkpoint.

    Raises: TrainingError if the folder holds a run of another configuration or of other inputs.
    """
    prepared = PreparedData.open(job.prepared)
    plan = make_plan(job.config, prepared)
    run = read_run(job.run)
    inputs = {"prepared": prepared.id, **_encoder_input(job, run)}
    if job.config.contrastive.negatives:
        if job.negatives is None:
            raise DataError(
                f"contrastive.negatives is {job.config.contrastive.negatives} but no negatives are given; "
                f"mine them with python -m jobs.mine, or set contrastive.negatives=0"
            )
        inputs["negatives"] = artifacts.read_manifest(job.negatives, "negatives").id
    tokenizer: Any
    if run is not None:
        theirs = artifacts.read_manifest(run.last_uri, "checkpoint").inputs
        if ("start" in theirs) != (job.start is not None):
            way_out = "give its --from as before" if "start" in theirs else "leave --from out"
            begun = "from a checkpoint" if "start" in theirs else "from no checkpoint"
            raise TrainingError(f"{job.run}: was started {begun}; {way_out}, or start in a new folder with --out")
        for name, value in inputs.items():
            if theirs.get(name) != value:
                raise TrainingError(
                    f"{job.run}: was trained on other {name} ({str(theirs.get(name))[:12]} against {value[:12]}); "
                    f"start in a new folder with --out"
                )
        resumed = open_training(run.last_uri, job.config)
        _try_one_step(job, resumed.tokenizer, resumed.step)
        return run
    model = job.config.model
    state: dict[str, Tensor] = {}
    if job.start is not None:
        started = open_start(job.start, job.config)
        encoder, tokenizer, state = started.encoder, started.tokenizer, started.tensors
        before, now = (
            [task.name for task in tasks] for tasks in (read_contract(job.start).tasks, job.config.trained_tasks)
        )
        parts = {"keeps": set(now) & set(before), "adds": set(now) - set(before), "leaves out": set(before) - set(now)}
        told = "; ".join(f"{name} {', '.join(sorted(tasks))}" for name, tasks in parts.items() if tasks)
        print(f"{_label(job)}: begins from {job.start}: {told}", flush=True)
    elif model.source is not None:
        encoder, tokenizer = load_encoder(model, model.source)
    else:
        encoder, tokenizer = build_encoder(model, _tokenizer_texts(prepared, tuple(plan.batch)), job.config.seed)
    require_positions(encoder, job.config)
    _try_one_step(job, tokenizer, 0)
    for name in (BASE, FIRST) if model.lora else (FIRST,):
        publish_checkpoint(
            store.join(job.run, name),
            job.config,
            encoder,
            tokenizer,
            step=0,
            state=state,
            inputs=inputs,
            dev_accuracy={},
        )
    return add_to_run(None, job.run, FIRST, None, finished=job.config.train.steps == 0)


def _label(job: TrainJob) -> str:
    """What a run's lines begin with."""
    return job.run.rstrip("/").rpartition("/")[2]


def _encoder_input(job: TrainJob, run: Run | None) -> dict[str, str]:
    """What the weights come from, as a manifest's inputs name it. A run that stands goes on without the folder or the
    checkpoint that it was started from, which may have gone since."""
    if job.start is None:
        mine = encoder_id(job.config)
        theirs = "" if run is None else artifacts.read_manifest(run.last_uri, "checkpoint").inputs.get("encoder", "")
        gone = mine == job.config.model.source and re.fullmatch("[0-9a-f]{64}", theirs)
        return {} if gone else {"encoder": mine}
    if run is not None and not store.exists(store.join(job.start, artifacts.MANIFEST)):
        return {}
    return {"start": artifacts.read_manifest(job.start, "checkpoint").id}


def _try_one_step(job: TrainJob, tokenizer: Any, step: int) -> None:
    """Makes one step's batches here: what is wrong with prompts, lengths or negatives shows before workers start."""
    if step < job.config.train.steps:
        make_maker(job, tokenizer, 0, 1).step(step)


def _tokenizer_texts(prepared: PreparedData, tasks: tuple[str, ...]) -> Iterator[str]:
    def spaced(rows: int) -> list[range]:
        every = range(0, rows, -(-rows // TOKENIZER_TEXTS) or 1)
        return [every[i : i + 1024] for i in range(0, len(every), 1024)]

    for rows in spaced(len(prepared.passages)):
        taken = prepared.passages.take(list(rows), ["title", "text"])
        yield from (f"{title} {text}" for title, text in zip(taken["title"], taken["text"], strict=True))
    for task in tasks:
        queries = prepared.queries(task, "train")
        for rows in spaced(len(queries)):
            yield from queries.take(list(rows), ["text"])["text"]


def needed_cpus(config: Config) -> int:
    """Logical CPUs of a run: one a worker, a quarter each for its tokenizing, one for Ray Data's short tasks."""
    return config.train.workers + math.ceil(config.train.workers / 4) + 1


def train(job: TrainJob) -> Run:
    """Trains to the last step on the connected cluster, going on where an interrupted run stopped.

    Raises: PlacementError within `cluster.wait_s` if the cluster is too small; TrainingError with the worker's own
        message if training fails more than `train.max_failures` times.
    """
    require_cpus(job.config)
    run = start_run(job)
    if run.finished:
        print(f"{job.run}: {run.last} is its last checkpoint, nothing is left to train", flush=True)
        return run
    label = _label(job)
    if run.last != FIRST:
        print(f"{label}: goes on from {run.last}, of {job.config.train.steps:,} steps", flush=True)
    stop = threading.Event()
    progress = threading.Thread(target=_show_progress, args=(job, stop), daemon=True)
    progress.start()
    try:
        fit(job)
    finally:
        stop.set()
        progress.join()
    finished = read_run(job.run)
    assert finished is not None
    for line in summary(finished, read_metrics(job.run), job.config).splitlines():
        print(f"{label}: {line}", flush=True)
    return finished


def plan(job: TrainJob) -> TrainingPlan:
    """What a run will need: counted, refused if it cannot fit, and some steps tried on the connected cluster.

    It is kept beside the run, so that the run can be compared with it. Nothing else of the steps that were tried stays.
    Raises: PlacementError if memory or CPUs are too few; what training raises.
    """
    config = job.config
    # The encoder of a checkpoint counts, not the one that the configuration would begin with.
    source = artifacts.open_artifact(job.start, "checkpoint").folder if job.start else config.model.source
    shapes = encoder_shapes(config.model, source)
    of_data = make_plan(config, PreparedData.open(job.prepared))
    planned = plan_training(config, of_data, shapes)
    available = None if config.train.gpu else cluster.worker_memory(config.train.workers)
    planned.require_fits(available)
    require_cpus(config)
    values = {"steps": PROBE_STEPS, "checkpoint_every": PROBE_STEPS, "log_every": PROBE_STEPS // 2}
    tried = replace(
        job,
        run=store.join(job.run, "plan"),
        config=with_values(config, {f"train.{name}": value for name, value in values.items()}),
    )
    artifacts.remove(tried.run)  # what a plan that was killed left
    try:
        begun = start_run(tried)
        if source is None:  # the tokenizer of a small corpus has fewer tokens than it may
            made = store.join(tried.run, BASE) if config.model.lora else begun.last_uri
            folder = artifacts.open_artifact(made, "checkpoint").folder
            planned = plan_training(config, of_data, encoder_shapes(config.model, folder))
        fit(tried)
        planned = measured(planned, read_metrics(tried.run))
    finally:
        artifacts.remove(tried.run)
    planned.require_fits(available)
    write_plan(job.run, planned, config)
    print(planned.to_text(available), flush=True)
    return planned


def require_cpus(config: Config) -> None:
    """Raises: PlacementError within `cluster.wait_s` if the cluster is too small."""
    cluster.require(
        f"training with {config.train.workers} worker(s) and their data",
        cpus=needed_cpus(config),
        gpus=config.train.workers if config.train.gpu else 0,
        wait_s=config.cluster.wait_s,
    )


def stream_batches(job: TrainJob, tokenizer: Any, rank: int, workers: int, start: int) -> Iterator[StepBatches]:
    """A worker's batches from a step on, by Ray Data."""
    tasks = tuple(task.name for task in job.config.trained_tasks)
    return stream(partial(make_maker, job, tokenizer, rank, workers), tasks, start, job.config.train.steps)


def fit(job: TrainJob, batches: Batches = stream_batches) -> None:
    """Runs the workers from the run's last checkpoint to its last step, and says nothing.

    Raises: TrainingError with the worker's own message if they fail more than `train.max_failures` times;
        DivergedError at once, as the same steps would come again.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    config = job.config.train
    # Ray Train wants a place that all nodes see; what a run needs to go on is in our own checkpoints.
    storage, diverged = store.join(job.run, "ray"), store.join(job.run, DIVERGED_FILE)
    store.delete(diverged)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "batches": batches},
        scaling_config=ray.train.ScalingConfig(num_workers=config.workers, use_gpu=config.gpu),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex,  # under the name of an earlier start, Ray would go on from that one's state
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _translate(error) from error
    except SystemExit as error:  # Ray Train's own handler of Ctrl-C
        raise KeyboardInterrupt from error
    finally:
        artifacts.remove(storage)
    if store.exists(diverged):
        raise DivergedError(store.read_bytes(diverged).decode())


def _translate(error: Exception) -> TaskspecError:
    """The error of a worker as the user is to see it: our own as it is, any other by its innermost cause."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    causes = [_innermost(failure) for failure in failures.values()]
    for cause in causes:
        if isinstance(cause, TaskspecError):
            return cause
    text = " ".join(str(causes[0]).split())
    return TrainingError(
        f"training failed more than train.max_failures times, the last time with {type(causes[0]).__name__}: "
        f"{text[-400:]}; the workers' logs are in Ray's session folder, by default /tmp/ray/session_latest/logs"
    )


def _innermost(error: BaseException) -> BaseException:
    """Ray wraps what a worker raised, and what an actor raised to the worker, each in another attribute."""
    while True:
        inner = getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner


def _worker(settings: dict[str, Any]) -> None:
    """Runs in each Ray Train worker."""
    import ray.train
    import ray.train.torch

    job, context = settings["job"], ray.train.get_context()
    try:
        train_worker(
            job,
            batches=settings["batches"],
            barrier=ray.train.report,
            device=str(ray.train.torch.get_device()),
            local_workers=context.get_local_world_size(),
        )
    except DivergedError as error:  # Ray would start workers that fail again; these end well and leave word
        if context.get_world_rank() == 0:
            store.write_bytes(store.join(job.run, DIVERGED_FILE), str(error).encode())


def _show_progress(job: TrainJob, stop: threading.Event) -> None:
    """Prints each new line of the run's metrics; workers' own output stays in Ray's logs."""
    label = job.run.rstrip("/").rpartition("/")[2]
    earlier = {line.get("start") for line in read_metrics(job.run)}
    start, shown = None, 0
    while True:
        ending = stop.wait(2)
        try:
            lines = read_metrics(job.run, after=shown)
        except StoreError:  # workers that start remove files of those before them
            lines = []
        for line in lines:
            of = line.get("start")
            if of in earlier or (of == start and line["step"] <= shown):
                continue
            if start not in (None, of):
                print(f"{label}: workers were restarted from the last checkpoint", flush=True)
                earlier.add(start)
            start, shown = of, line["step"]
            for reason in line["skipped"]:
                print(f"{label}: skipped {reason}", flush=True)
            print(f"{label}: {console_line(line, job.config.train.steps)}", flush=True)
        if ending:
            return
