"""Slow and real: workers killed with signal 9 on a real cluster, plans, whole pipelines."""

import os
import signal
import sys
import threading
import time
import uuid
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import yaml
from job_process import running, until

from jobs.pipeline import run_pipeline
from taskspec import store
from taskspec.config import with_values
from taskspec.data.prepared import PreparedData
from taskspec.errors import DivergedError
from taskspec.train.checkpoint import STATE_FILE, read_run
from taskspec.train.launch import fit, plan, start_run, train
from taskspec.train.worker import TrainJob, local_batches, read_metrics

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


@pytest.mark.parametrize("distribution", ["replicated", "sharded", "task_parallel"])
def test_a_run_with_a_killed_worker_recovers_by_itself_and_ends_with_the_same_bits(
    distribution, tiny_config, tiny_prepared: PreparedData, tmp_path
):
    """Two workers, dropout on, a checkpoint every 20 steps; one worker dies between two of them."""
    config = with_values(
        tiny_config,
        {
            "contrastive.negatives": 0,
            "model.dropout": 0.1,
            "specialization.method": "taco",
            "specialization.min_warmup_steps": 5,
            "train.steps": 60,
            "train.checkpoint_every": 20,
            "train.log_every": 1,
            "train.workers": 2,
            "train.distribution": distribution,
            "train.max_failures": 1,
        },
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


def test_a_killed_job_goes_on_with_other_workers_and_another_distribution(
    tiny_config, tiny_prepared: PreparedData, tmp_path
):
    """Two workers with slices, the whole job killed after a checkpoint, three workers that hold everything. No dropout:
    each worker draws its own."""
    values = {
        "contrastive.negatives": 0,
        "model.dropout": 0.0,
        "specialization.method": "taco",
        "specialization.min_warmup_steps": 5,
        "train.steps": 40,
        "train.checkpoint_every": 10,
        "train.workers": 2,
        "train.distribution": "sharded",
    }
    config = with_values(tiny_config, values)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    unbroken = TrainJob(config, tiny_prepared.artifact.uri, None, str(tmp_path / "unbroken"))
    train(unbroken)
    broken, log = str(tmp_path / "broken"), tmp_path / "log"
    words = ["--config", str(tmp_path / "config.yaml"), "--prepared", unbroken.prepared, "--out", broken]
    command = [sys.executable, "-m", "jobs.train", *words, "--set", "cluster.local_cpus=6"]

    def last() -> int:
        run = read_run(broken)
        return 0 if run is None else int(run.last_uri.rpartition("-")[2])

    def flat(uri: str) -> torch.Tensor:
        found = read_run(uri)
        assert found is not None
        tensors = safetensors.torch.load_file(store.join(found.last_uri, "model.safetensors"))
        return torch.cat([tensors[key].flatten() for key in sorted(tensors)])

    with running(command, log) as process:
        until(lambda: last() >= 10, process, log)
        os.kill(process.pid, signal.SIGKILL)
    reached, start = last(), flat(broken)
    assert reached < 40
    other = ["--set", "train.workers=3", "--set", "train.distribution=replicated"]
    with running([*command, *other], log) as process:
        assert process.wait(300) == 0, log.read_text()
    assert f"broken: goes on from step-{reached:08d}, of 40 steps" in log.read_text()
    assert last() == 40
    ours, theirs = (flat(run) - start for run in (broken, unbroken.run))
    error = float((ours - theirs).norm() / theirs.norm())
    print(f"killed after {reached} of 40 steps; relative difference {error:.1e}")
    assert error < 1e-2


def test_a_run_that_diverges_ends_at_once_with_the_reason(tiny_config, tiny_prepared, tmp_path):
    config = with_values(
        tiny_config,
        {
            "contrastive.negatives": 0,
            "contrastive.temperature": 1e-30,
            "train.steps": 3,
            "train.max_failures": 3,
            "train.max_bad_steps": 0,
            "train.workers": 2,
        },
    )
    job = TrainJob(config, tiny_prepared.artifact.uri, None, str(tmp_path / "run"))
    start_run(job)
    starts = tmp_path / "starts"
    starts.mkdir()

    def told(job, tokenizer, rank, workers, start):
        (starts / uuid.uuid4().hex).touch()
        return local_batches(job, tokenizer, rank, workers, start)

    with pytest.raises(DivergedError, match=r"step 0: the gradient of .* is not finite; .* lower train\.learning_rate"):
        fit(job, told)
    assert len(list(starts.iterdir())) == 2, "the workers were started again"


def test_a_plan_tries_steps_and_leaves_only_itself_and_the_run_ends_beside_it(
    tiny_config, tiny_prepared, tmp_path, capfd
):
    values = {"contrastive.negatives": 0, "train.steps": 12, "train.workers": 2, "train.distribution": "sharded"}
    values["model.scratch.vocabulary"] = 20_000
    job = TrainJob(with_values(tiny_config, values), tiny_prepared.artifact.uri, None, str(tmp_path / "run"))
    (tmp_path / "run" / "plan" / "metrics").mkdir(parents=True)
    (tmp_path / "run" / "plan" / "metrics" / "step-00000000.jsonl").write_text("what a killed plan left")
    found = plan(job)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["plan.json"]
    assert found.step_seconds is not None
    assert found.peak is not None
    assert found.peak > found.held
    said = capfd.readouterr().out
    assert "M parameters in" in said
    assert "s a step in 10 steps" in said
    done = train(job)
    assert done.finished
    weights = safetensors.torch.load_file(tmp_path / "run" / done.last / "model.safetensors")
    assert found.parameters == sum(weight.numel() for weight in weights.values()), (
        "of the tokenizer that the data made, not of the largest that it may have"
    )
    assert "planned: " in capfd.readouterr().out


def test_a_pipeline_makes_every_stage_once_and_a_second_run_nothing(tiny_config, ray_cluster, tmp_path, capfd):
    config = with_values(tiny_config, {"artifacts": str(tmp_path / "artifacts")})
    systems = {
        "untrained": with_values(config, {"train.steps": 0}),
        "nq-alone": with_values(config, {"specialization.method": "single", "train.tasks": ["nq"]}),
    }
    first = run_pipeline(config, systems)
    assert first.table.systems == ("bm25", "untrained", "nq-alone")
    assert first.table.score("nq", "nq-alone") is not None
    assert first.table.score("wow", "nq-alone") is None
    made = {name: os.stat(name).st_mtime_ns for name in store.list_files(config.artifacts) if "index" in name}
    capfd.readouterr()
    again = run_pipeline(config, systems)
    said = capfd.readouterr().out
    assert again.table == first.table
    assert said.count("stands already") == 5, said  # prepared data, negatives, two indexes, the evaluation
    assert {name: os.stat(name).st_mtime_ns for name in made} == made


def test_ray_train_runs_with_its_run_folder_on_s3(tiny_config, tiny_prepared, s3_bucket):
    config = with_values(tiny_config, {"contrastive.negatives": 0, "train.steps": 4, "train.workers": 2})
    run = train(TrainJob(config, tiny_prepared.artifact.uri, None, f"{s3_bucket}/ray-train/run"))
    assert run.finished
    assert not store.list_files(store.join(run.uri, "ray"))
