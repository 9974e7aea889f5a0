"""Slow and real: workers killed with signal 9 on a real cluster, sweeps, whole pipelines."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from jobs.pipeline import Inputs, changed, run_pipeline
from jobs.sweep import sweep
from taskspec import store
from taskspec.config import parse_config
from taskspec.data.prepared import PreparedData
from taskspec.errors import TrainingError
from taskspec.train.checkpoint import STATE_FILE, read_run
from taskspec.train.launch import train
from taskspec.train.worker import TrainJob, read_metrics

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]


def kill_a_worker_after(job: TrainJob, step: int, killed: list[int]) -> None:
    """Waits for a log line of that step or a later one that is no checkpoint step, then kills one training process."""
    import ray
    from ray.util.state import list_actors

    cluster = ray.get_runtime_context().gcs_address
    every = job.config.train.checkpoint_every
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        lines = read_metrics(job.run)
        if lines and lines[-1]["step"] >= step and lines[-1]["step"] % every not in (0, every - 1):
            workers = [
                actor
                for actor in list_actors(cluster, filters=[("state", "=", "ALIVE")])
                if "RayTrainWorker" in actor.class_name
            ]
            os.kill(workers[-1].pid, signal.SIGKILL)
            killed.append(lines[-1]["step"])
            return
        time.sleep(0.01)


def test_a_run_with_a_killed_worker_recovers_by_itself_and_ends_with_the_same_bits(
    tiny_config, tiny_prepared: PreparedData, tmp_path
):
    """Two workers, dropout on, a checkpoint every 20 steps; one worker dies between two of them."""
    config = changed(
        tiny_config,
        contrastive={"negatives": 0},
        model={"dropout": 0.1},
        specialization={"method": "taco", "min_warmup_steps": 5},
        train={"steps": 60, "checkpoint_every": 20, "log_every": 1, "workers": 2, "max_failures": 1},
    )
    unbroken = TrainJob(config, tiny_prepared.artifact.uri, None, str(tmp_path / "unbroken"))
    train(unbroken)
    broken = replace(unbroken, run=str(tmp_path / "broken"))
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after, args=(broken, 25, killed))
    killer.start()
    done = train(broken)
    killer.join()
    assert killed, "no worker was killed"
    assert done.finished
    starts = [name.rpartition("/")[2] for name in store.list_files(store.join(broken.run, "metrics"))]
    assert len(starts) == 2, f"the workers should have been started twice: {starts}"
    last = read_run(unbroken.run).last_uri
    for name in ("model.safetensors", STATE_FILE):
        ours = safetensors.torch.load_file(store.join(last, name))
        theirs = safetensors.torch.load_file(store.join(done.last_uri, name))
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key


def test_a_worker_that_always_fails_ends_the_run_with_its_own_message(tiny_config, tiny_prepared, tmp_path):
    config = changed(
        tiny_config,
        contrastive={"negatives": 0, "temperature": 1e-30},
        train={"steps": 3, "max_failures": 0, "workers": 1},
    )
    job = TrainJob(config, tiny_prepared.artifact.uri, None, str(tmp_path / "run"))
    with pytest.raises(TrainingError, match=r"step 0: the gradient of .* is not finite; lower train\.learning_rate"):
        train(job)


def test_a_pipeline_makes_every_stage_once_and_a_second_run_nothing(tiny_config, ray_cluster, tmp_path, capfd):
    config = changed(tiny_config, artifacts=str(tmp_path / "artifacts"))
    first = run_pipeline(config, ["untrained", "mean"])
    assert first.table.systems == ("bm25", "untrained", "mean")
    made = {name: os.stat(name).st_mtime_ns for name in store.list_files(config.artifacts) if "index" in name}
    capfd.readouterr()
    again = run_pipeline(config, ["untrained", "mean"])
    said = capfd.readouterr().out
    assert again.table == first.table
    assert said.count("stands already") == 5, said  # prepared data, negatives, two indexes, the evaluation
    assert {name: os.stat(name).st_mtime_ns for name in made} == made


def test_single_is_one_retriever_per_task_in_one_column(tiny_config, ray_cluster, tmp_path):
    tree = tiny_config.model_dump(mode="json")
    tree["tasks"] = [task for task in tree["tasks"] if task["name"] in ("nq", "fever")]
    tree |= {"artifacts": str(tmp_path / "artifacts")}
    config = changed(parse_config(tree, "test"), train={"steps": 2, "workers": 1})
    result = run_pipeline(config, ["single"])
    assert set(result.arms["single"]) == {"nq", "fever"}
    assert result.table.average("single") is not None


def test_a_sweep_makes_one_row_per_strength_and_seed_and_strength_0_is_mean(tiny_config, tiny_prepared, tmp_path):
    config = changed(
        tiny_config,
        artifacts=str(tmp_path / "artifacts"),
        contrastive={"negatives": 0},
        train={"steps": 4, "workers": 1},
        sweep={"strengths": [0.0, 2.0], "seeds": [0]},
    )
    inputs = Inputs(tiny_prepared.artifact.uri, None)
    rows = sweep(config, inputs)
    assert [(row["strength"], row["seed"]) for row in rows] == [(0.0, 0), (2.0, 0)]
    assert all(0 <= row["average"] <= 1 for row in rows)
    mean = TrainJob(changed(config, specialization={"method": "mean"}), inputs.prepared, None, str(tmp_path / "mean"))
    weights = safetensors.torch.load_file(store.join(train(mean).best_uri, "model.safetensors"))
    strength_0 = safetensors.torch.load_file(store.join(rows[0]["checkpoint"], "model.safetensors"))
    assert all(torch.equal(value, strength_0[name]) for name, value in weights.items())


def test_ray_train_runs_with_its_run_folder_on_s3(tiny_config, tiny_prepared, s3_bucket):
    config = changed(tiny_config, contrastive={"negatives": 0}, train={"steps": 4, "workers": 2})
    run = train(TrainJob(config, tiny_prepared.artifact.uri, None, f"{s3_bucket}/ray-train/run"))
    assert run.finished
    assert not store.list_files(store.join(run.uri, "ray"))
