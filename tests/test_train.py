"""Training in one process: resuming, checkpoints, metrics, what is refused."""

import itertools
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from taskspec import artifacts, store
from taskspec.config import Config, with_values
from taskspec.data.prepared import PreparedData
from taskspec.errors import ArtifactError, ConfigError, DataError, TrainingError
from taskspec.model.encoder import encoder_shapes
from taskspec.train import worker
from taskspec.train.checkpoint import (
    STATE_FILE,
    UNMEASURED,
    add_to_run,
    encoder_id,
    open_encoder,
    open_training,
    read_contract,
    read_run,
)
from taskspec.train.launch import _show_progress, needed_cpus, start_run
from taskspec.train.planning import summary
from taskspec.train.step import Trainer, learning_rate_factor, squared_norm
from taskspec.train.worker import (
    TrainJob,
    console_line,
    local_batches,
    make_plan,
    mean_accuracy,
    read_metrics,
    seconds_taken,
    train_worker,
)


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return with_values(
        tiny_config,
        {
            "contrastive.negatives": 0,
            "model.dropout": 0.1,
            "specialization.method": "taco",
            "specialization.min_warmup_steps": 1,
            "specialization.warmup": 0.1,
            "train.steps": 8,
            "train.checkpoint_every": 3,
            "train.log_every": 2,
            "train.dev_queries": 8,
        },
    )


@pytest.fixture
def job(config: Config, tiny_prepared: PreparedData, tmp_path) -> TrainJob:
    return TrainJob(config, tiny_prepared.artifact.uri, None, str(tmp_path / "run"))


def tensors(checkpoint: str) -> dict[str, torch.Tensor]:
    names = (store.join(checkpoint, name) for name in ("model.safetensors", STATE_FILE))
    return {key: value for name in names for key, value in safetensors.torch.load_file(name).items()}


def shown_by_tensorboard(run: str, name: str) -> list[int]:
    """The steps of a curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(store.join(run, "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


class Interrupted(Exception):
    pass


def breaking_at(step: int):
    """The stream of a run that dies before that step."""

    def batches(job, tokenizer, rank, workers, start) -> Iterator:
        yield from itertools.islice(local_batches(job, tokenizer, rank, workers, start), step - start)
        raise Interrupted

    return batches


@pytest.mark.parametrize(("broken_at", "lora"), [(1, None), (5, None), (6, None), (1, 2), (5, 2)])
def test_a_run_broken_at_any_step_resumes_to_the_same_bits(job, broken_at, lora, tmp_path):
    """Dropout is on, checkpoints are at 3 and 6: a break at 5 goes back to 3."""
    job = replace(job, config=with_values(job.config, {"model.lora": lora}))
    start_run(job)
    train_worker(job)
    broken = replace(job, run=str(tmp_path / "broken"))
    start_run(broken)
    with pytest.raises(Interrupted):
        train_worker(broken, batches=breaking_at(broken_at))
    assert start_run(broken).last == f"step-{broken_at // 3 * 3:08d}"
    train_worker(broken)
    ours, theirs = tensors(read_run(job.run).last_uri), tensors(read_run(broken.run).last_uri)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("method.average") for name in ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    unbroken, resumed = read_metrics(job.run), read_metrics(broken.run)
    assert [line["step"] for line in resumed] == [2, 3, 4, 6, 8]
    assert shown_by_tensorboard(broken.run, "nq/dev_accuracy") == [3, 6, 8]
    assert [line["tasks"] for line in resumed][-1] == unbroken[-1]["tasks"]


def test_a_run_keeps_its_last_and_its_best_checkpoint_only(job):
    start_run(job)
    train_worker(job)
    run = read_run(job.run)
    assert run.finished
    assert run.last == "step-00000008"
    kept = {name.split("/")[-2] for name in store.list_files(job.run) if name.endswith(artifacts.MANIFEST)}
    assert kept == {run.last, run.best}
    accuracy = artifacts.read_manifest(run.best_uri, "checkpoint").facts["dev_accuracy"]
    assert run.best_accuracy == pytest.approx(sum(accuracy.values()) / len(accuracy))


def test_the_best_checkpoint_is_the_newest_that_dev_queries_do_not_tell_from_the_highest(tmp_path):
    uri = str(tmp_path)
    for accuracies, best in (
        ((None, None, None, None), "step-3"),
        ((None, 0.0, 0.0, 0.0), "step-3"),
        ((None, 0.25, 0.5, 0.75), "step-3"),
        ((None, 0.5, 0.45, 0.25), "step-2"),
        ((None, 0.5, 0.45, 0.39), "step-2"),  # 0.06 below the one before, 0.11 below the highest
        ((None, 0.75, 0.25, 0.5), "step-1"),
    ):
        run = None
        for step, accuracy in enumerate(accuracies):
            run = add_to_run(run, uri, f"step-{step}", accuracy, 0.1, finished=step == 3)
        assert run == read_run(uri)
        assert (run.last, run.best) == ("step-3", best)
        number = int(best.removeprefix("step-"))
        assert run.best_accuracy == (UNMEASURED if accuracies[number] is None else accuracies[number])
        assert run.highest_accuracy == max(UNMEASURED if one is None else one for one in accuracies)


def test_the_error_of_dev_accuracy_is_that_of_a_mean_of_shares():
    mean, error = mean_accuracy({"a": 0.5, "b": 0.8}, {"a": 100, "b": 16})
    assert (mean, error) == (pytest.approx(0.65), pytest.approx((0.25 / 100 + 0.16 / 16) ** 0.5 / 2))
    assert mean_accuracy({"a": 1.0000001}, {"a": 4})[1] == 0.0
    assert mean_accuracy({}, {}) == (None, 0.0)


def test_a_run_without_dev_queries_ends_with_its_newest_checkpoint_as_the_best(job, monkeypatch):
    splits = PreparedData.tasks
    monkeypatch.setattr(PreparedData, "tasks", lambda self, split: () if split == "dev" else splits(self, split))
    assert start_run(job).best_accuracy == UNMEASURED  # so that a trained one is better, whatever it reaches
    train_worker(job)
    run = read_run(job.run)
    assert run.best == run.last == "step-00000008"


def test_a_line_has_every_task_and_fits_a_terminal(job, config):
    start_run(job)
    train_worker(job)
    lines = read_metrics(job.run)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8], "also at checkpoints, of 3, 6 and 8"
    measured = [line["step"] for line in lines if all("dev_accuracy" in task for task in line["tasks"].values())]
    assert measured == [3, 6, 8]
    last = lines[-1]
    assert list(last["tasks"]) == [task.name for task in config.tasks]
    assert all({"loss", "train_accuracy", "dev_accuracy"} <= set(values) for values in last["tasks"].values())
    assert last["gradient_ratio"] > 0
    assert 0 <= last["wait_share"] <= 1
    assert len(console_line(last, 8)) < 160
    assert shown_by_tensorboard(job.run, "nq/dev_accuracy") == [3, 6, 8]


def test_training_lowers_the_loss(job):
    job = replace(
        job, config=with_values(job.config, {"model.dropout": 0.0, "train.steps": 30, "train.learning_rate": 3e-3})
    )
    start_run(job)
    train_worker(job)
    lines = read_metrics(job.run)
    first, last = (sum(task["loss"] for task in line["tasks"].values()) for line in (lines[0], lines[-1]))
    assert last < 0.8 * first


def test_zero_steps_publish_the_untrained_encoder(job):
    run = start_run(replace(job, config=with_values(job.config, {"train.steps": 0})))
    assert run.finished
    assert open_encoder(run.best_uri).embed_queries("nq", ["who"])[0].shape == (1, job.config.model.scratch.width)


def test_two_runs_of_one_seed_start_from_the_same_bits_and_another_seed_from_others(job, tmp_path):
    first = start_run(job)
    again = start_run(replace(job, run=str(tmp_path / "again")))
    other = start_run(
        replace(job, run=str(tmp_path / "other"), config=with_values(job.config, {"seed": job.config.seed + 1}))
    )
    assert read_contract(first.last_uri).weights == read_contract(again.last_uri).weights
    assert read_contract(first.last_uri).weights != read_contract(other.last_uri).weights


def test_a_run_of_another_configuration_is_refused_by_key(job):
    start_run(job)
    stronger = replace(job, config=with_values(job.config, {"specialization.strength": 3.0}))
    with pytest.raises(TrainingError, match=r"other values of specialization\.strength; take them back, or"):
        start_run(stronger)
    start_run(replace(job, config=with_values(job.config, {"train.log_every": 1, "train.workers": 2})))  # may change


def test_a_run_on_other_prepared_data_is_refused(job, tmp_path):
    run = start_run(job)
    manifest = store.join(run.last_uri, artifacts.MANIFEST)
    ours = PreparedData.open(job.prepared).id
    store.write_bytes(manifest, store.read_bytes(manifest).replace(ours.encode(), b"0" * len(ours)))
    with pytest.raises(TrainingError, match="was trained on other prepared"):
        start_run(job)


def test_a_run_is_found_again_from_an_encoder_that_was_moved_and_not_from_another(job, tmp_path):
    start = start_run(job).last_uri
    folders = [shutil.copytree(start, tmp_path / name) for name in ("here", "there", "other")]
    with open(folders[2] / "config.json", "a") as file:
        file.write(" ")
    here, there, other = (
        replace(job, run=str(tmp_path / "from"), config=with_values(job.config, {"model.source": str(folder)}))
        for folder in folders
    )
    assert start_run(here) == start_run(there)
    assert encoder_id(here.config) == encoder_id(there.config) != encoder_id(other.config)
    with pytest.raises(TrainingError, match="was trained on other encoder"):
        start_run(other)
    shutil.rmtree(folders[0])
    assert start_run(here).last == "step-00000000", "a run that stands needs its encoder's folder no more"


def test_a_new_task_starts_from_a_checkpoint_whose_other_tasks_keep_their_sensitivities(job, tmp_path, capsys):
    config = with_values(job.config, {"specialization.decay": 0.9, "train.tasks": ["nq", "fever"]})
    first = replace(job, config=config)
    start_run(first)
    train_worker(first)
    start = read_run(first.run)
    assert start is not None
    more = with_values(config, {"train.tasks": ["fever", "nq", "trex"]})
    second = replace(job, run=str(tmp_path / "more"), config=more, start=start.last_uri)
    begun = start_run(second)
    assert f"more: begins from {start.last_uri}: keeps fever, nq; adds trex\n" in capsys.readouterr().out
    old, new = tensors(start.last_uri), tensors(begun.last_uri)
    assert torch.equal(new["shared.weight"], old["shared.weight"])
    assert [task.name for task in more.trained_tasks] == ["fever", "trex", "nq"]
    rows = [task.name for task in config.trained_tasks]
    for name in ("method.average_TR", "method.mean_TR", "method.updates_T"):
        assert torch.equal(new[name][0], old[name][rows.index("fever")])
        assert torch.equal(new[name][2], old[name][rows.index("nq")])
        assert not new[name][1].any()
    assert new["method.steps_done"] == 0
    assert "optimizer.exp_avg" not in new
    train_worker(second)
    lines = read_metrics(second.run)
    assert lines[0]["dev_at_start"].keys() == lines[-1]["tasks"].keys() == {"fever", "nq", "trex"}
    assert tensors(read_run(second.run).last_uri)["method.updates_T"].tolist() == [16, 8, 16]
    pooling = "mean" if config.model.pooling == "first" else "first"
    other = replace(second, run=str(tmp_path / "x"), config=with_values(more, {"model.pooling": pooling}))
    with pytest.raises(TrainingError, match=r"was trained with model\.pooling"):
        start_run(other)
    with pytest.raises(TrainingError, match="was trained on other start"):
        start_run(replace(second, start=read_run(second.run).last_uri))
    with pytest.raises(TrainingError, match="was started from a checkpoint; give its --from as before"):
        start_run(replace(second, start=None))
    with pytest.raises(TrainingError, match="was started from no checkpoint; leave --from out"):
        start_run(replace(first, start=begun.last_uri))
    artifacts.remove(start.last_uri)
    assert start_run(second).finished, "a run that stands needs its start no more"


def test_lora_trains_a_small_part_and_its_checkpoint_is_a_plain_encoder(job):
    config = with_values(job.config, {"model.lora": 2, "train.learning_rate": 0.01, "model.dropout": 0.0})
    start_run(one := replace(job, config=config))
    base = tensors(store.join(job.run, "base"))
    train_worker(one)
    run = read_run(job.run)
    assert run is not None
    resumed = open_training(run.last_uri, config)
    trainer = Trainer(config, resumed.encoder, torch.device("cpu"))
    whole = sum(value.numel() for name, value in base.items())
    assert trainer.flat.size < 0.2 * whole  # a tiny encoder: most of a real one is larger matrices
    shapes = encoder_shapes(config.model, None)
    assert sum(math.prod(shape) for shape in shapes.trained) == trainer.flat.size
    largest = (
        config.model.scratch.vocabulary - base["shared.weight"].shape[0]
    )  # the plan counts the vocabulary asked for
    assert shapes.frozen == whole + largest * config.model.scratch.width
    ended = tensors(run.last_uri)
    assert torch.equal(ended["shared.weight"], base["shared.weight"])
    changed = {name.split(".")[-2] for name, value in base.items() if not torch.equal(value, ended[name])}
    assert changed == {"q", "k", "v", "o", "wi", "wo"}
    tokens = {"ids_BL": torch.arange(1, 9)[None], "mask_BL": torch.ones(1, 8, dtype=torch.int64)}
    served = open_encoder(run.last_uri).encoder
    assert not [name for name, _ in served.named_parameters() if "lora" in name]
    torch.testing.assert_close(served(**tokens), resumed.encoder.eval()(**tokens), rtol=1e-4, atol=1e-5)


def test_bf16_trains_fp32_weights_to_nearly_the_same_losses(job):
    losses = []
    for precision in ("fp32", "bf16"):
        config = with_values(job.config, {"train.precision": precision, "model.dropout": 0.0})
        one = replace(job, run=f"{job.run}-{precision}", config=config)
        start_run(one)
        train_worker(one)
        run = read_run(one.run)
        assert run is not None
        assert torch.bfloat16 not in {value.dtype for value in tensors(run.last_uri).values()}
        losses.append([task["loss"] for line in read_metrics(run.uri) for task in line["tasks"].values()])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_an_altered_checkpoint_is_refused_by_file(job):
    run = start_run(job)
    path = store.join(run.last_uri, "model.safetensors")
    content = bytearray(store.read_bytes(path))
    content[-1] ^= 1
    store.write_bytes(path, bytes(content))
    with pytest.raises(ArtifactError, match=r"model\.safetensors is not the file in the manifest"):
        open_encoder(run.last_uri)


def test_negatives_that_are_asked_for_but_not_given_are_refused(job):
    wanting = replace(job, config=with_values(job.config, {"contrastive.negatives": 2}))
    with pytest.raises(DataError, match=r"contrastive\.negatives is 2 but no negatives are given; mine them"):
        start_run(wanting)


def test_a_task_without_train_queries_is_refused(job):
    extra = [*job.config.model_dump(mode="json")["tasks"], {"name": "unheard"}]
    with pytest.raises(ConfigError, match=r"tasks\.unheard: the prepared data has no train queries of it"):
        start_run(replace(job, config=with_values(job.config, {"tasks": extra})))


def test_single_trains_one_task_with_the_queries_it_gets_among_all(job, tiny_prepared):
    together = make_plan(job.config, tiny_prepared)
    alone = make_plan(
        with_values(job.config, {"specialization.method": "single", "train.tasks": ["nq"]}), tiny_prepared
    )
    assert alone.batch == {"nq": together.batch["nq"]}
    assert alone.rows("nq", 5).tolist() == together.rows("nq", 5).tolist()


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_task(job):
    start_run(job)

    def spoiled(job, tokenizer, rank, workers, start):
        for batches in local_batches(job, tokenizer, rank, workers, start):
            weight = batches["nq"].query_weight_B
            yield batches | {"nq": replace(batches["nq"], query_weight_B=weight * float("nan"))}

    job = replace(job, config=with_values(job.config, {"train.max_bad_steps": 2}))
    message = (
        r"step 2: the gradient of task nq \(first in .*\) is not finite; 3 such steps are more than .* \(2\): lower"
    )
    with pytest.raises(TrainingError, match=message):
        train_worker(job, batches=spoiled)


def test_steps_that_were_skipped_at_the_very_end_are_told(job):
    """With a line a step, the last line has no step that was taken."""
    start_run(job)
    job = replace(job, config=with_values(job.config, {"train.log_every": 1}))

    def spoiled(job, tokenizer, rank, workers, start):
        for step, batches in enumerate(local_batches(job, tokenizer, rank, workers, start), start):
            weight = batches["nq"].query_weight_B
            yield batches | {"nq": replace(batches["nq"], query_weight_B=weight * (float("nan") if step >= 6 else 1.0))}

    train_worker(job, batches=spoiled)
    *_, before, last = read_metrics(job.run)
    assert (before["step"], last["step"]) == (6, 8)
    assert last["skipped"] == [
        f"step {n}: the gradient of task nq (first in shared.weight) is not finite" for n in (6, 7)
    ]
    assert (last["queries"], last["bad_steps"]) == (0, 2)
    assert all(task.keys() == {"dev_accuracy"} for task in last["tasks"].values())
    assert console_line(last, 8) == "step 8/8  no step was taken since the last line"


@pytest.mark.parametrize("method", ["cgd", "gradnorm", "pcgrad", "mean"])
def test_other_methods_start_new_tasks_from_even_weights(method, job, tmp_path):
    config = with_values(job.config, {"specialization.method": method, "train.tasks": ["nq", "fever"]})
    first = replace(job, config=config)
    start_run(first)
    train_worker(first)
    more = replace(job, config=with_values(config, {"train.tasks": None}), start=read_run(first.run).last_uri)
    begun = start_run(replace(more, run=str(tmp_path / "more")))
    assert not [name for name in tensors(begun.last_uri) if name.startswith("method.")]


@pytest.mark.parametrize(("before", "after"), [(None, 2), (2, None), (2, 3)])
def test_sensitivities_of_other_matrices_are_not_carried_over(before, after, job, tmp_path):
    first = replace(job, config=with_values(job.config, {"model.lora": before}))
    start_run(first)
    train_worker(first)
    more = replace(job, config=with_values(job.config, {"model.lora": after}), start=read_run(first.run).last_uri)
    more = replace(more, run=str(tmp_path / "more"))
    begun = start_run(more)
    assert not [name for name in tensors(begun.last_uri) if name.startswith("method.")]
    train_worker(more)
    assert read_run(more.run).finished


def test_seconds_of_a_checkpoint_are_not_seconds_of_steps(job, monkeypatch):
    publish = worker.publish_checkpoint

    def slow(*args, **kwargs):
        time.sleep(2)
        return publish(*args, **kwargs)

    monkeypatch.setattr(worker, "publish_checkpoint", slow)
    start_run(job)
    began = time.perf_counter()
    train_worker(job)
    whole = time.perf_counter() - began
    lines = read_metrics(job.run)
    assert [(line["step"], line["checkpoint_seconds"] > 2) for line in lines] == [
        (2, False), (3, True), (4, False), (6, True), (8, True),
    ]  # fmt: skip
    assert sum(line["seconds"] for line in lines) < whole - 3 * 2
    assert whole - 3 * 2 < seconds_taken(lines) < whole


@pytest.mark.parametrize("fails_at", [3, 8])
def test_a_run_that_ends_between_its_checkpoint_and_what_follows_keeps_its_lines(job, monkeypatch, fails_at):
    """Nothing is counted twice, and a run that is finished has the line of its last step."""
    start_run(job)

    def barrier(metrics):
        if metrics["step"] == fails_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_worker(job, barrier=barrier)
    run = read_run(job.run)
    assert run.finished == (fails_at == 8)
    if not run.finished:
        train_worker(job)
    lines = read_metrics(job.run)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8]
    queries = sum(make_plan(job.config, PreparedData.open(job.prepared)).batch.values())
    assert sum(line["queries"] for line in lines) == 8 * queries
    assert "trained 8 steps" in summary(run, lines, job.config)


def test_a_run_whose_checkpoint_is_not_named_yet_makes_its_steps_again(job, monkeypatch):
    start_run(job)
    named = worker.add_to_run

    def broken(*args, **kwargs):
        raise Interrupted

    monkeypatch.setattr(worker, "add_to_run", broken)
    with pytest.raises(Interrupted):
        train_worker(job)
    assert [line["step"] for line in read_metrics(job.run)] == [2, 3]
    monkeypatch.setattr(worker, "add_to_run", named)
    assert start_run(job).last == "step-00000000"
    train_worker(job)
    lines = read_metrics(job.run)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8]
    assert len({line["start"] for line in lines}) == 1


def test_lines_are_kept_in_files_of_some_and_those_of_an_earlier_start_go(job, monkeypatch):
    monkeypatch.setattr(worker, "LINES_A_FILE", 2)
    start_run(job)
    train_worker(job)
    folder = store.join(job.run, "metrics")
    names = ["step-00000000.jsonl", "step-00000003.jsonl", "step-00000006.jsonl"]
    assert [name.rpartition("/")[2] for name in store.list_files(folder)] == names
    assert [line["step"] for line in read_metrics(job.run)] == [2, 3, 4, 6, 8]
    assert [line["step"] for line in read_metrics(job.run, after=4)] == [4, 6, 8]
    assert [line["step"] for line in read_metrics(job.run, after=6)] == [8]
    run = read_run(job.run)
    shutil.rmtree(folder)
    for first, steps in ((0, (1, 2)), (2, (3, 4)), (4, (5, 6)), (6, (7, 8))):
        text = "".join(json.dumps({"step": step, "start": "before"}) + "\n" for step in steps)
        store.write_bytes(store.join(folder, f"step-{first:08d}.jsonl"), text.encode())
    resumed = Trainer(job.config, open_training(run.last_uri, job.config).encoder, torch.device("cpu"))
    worker.Log(job, resumed, 3, 1, {}).close()
    assert [line["step"] for line in read_metrics(job.run)] == [1, 2, 3, 4], "until the new start has lines"
    store.write_bytes(store.join(folder, "step-00000003.jsonl"), b'{"step": 5, "start": "after"}\n')
    assert [line["step"] for line in read_metrics(job.run)] == [1, 2, 3, 5]


def test_progress_shows_every_line_of_every_start_once(job, capsys):
    """Workers that were restarted have got further, before anybody looked, than those before them."""
    start_run(job)
    train_worker(job)
    lines = read_metrics(job.run)

    def written(start, first, steps):
        content = "".join(json.dumps({**lines[0], "start": start, "step": step}) + "\n" for step in steps)
        store.write_bytes(store.join(job.run, "metrics", f"step-{first:08d}.jsonl"), content.encode())

    class Looks(threading.Event):
        """Stands for two seconds of waiting, in which the workers do something."""

        looks = 0

        def wait(self, timeout=None):
            self.looks += 1
            if self.looks == 1:
                written("second", 8, [10, 12, 14])
            else:
                written("third", 13, [14, 16])
            return self.looks == 2

    _show_progress(job, Looks())
    said = [line.partition(": ")[2].partition("  ")[0] for line in capsys.readouterr().out.splitlines()]
    again = "workers were restarted from the last checkpoint"
    assert said == ["step 10/8", "step 12/8", "step 14/8", again, "step 14/8", "step 16/8"]


@pytest.mark.parametrize("bad", [3, 7])
def test_a_step_that_is_skipped_is_told_and_counted_over_restarts(job, bad):
    """Step 3 ends a line of the log, which then waits for the next step; step 7 is the last."""
    start_run(job)

    def spoiled(job, tokenizer, rank, workers, start):
        for step, batches in enumerate(local_batches(job, tokenizer, rank, workers, start), start):
            weight = batches["nq"].query_weight_B
            spoil = float("nan") if step == bad else 1.0
            yield batches | {"nq": replace(batches["nq"], query_weight_B=weight * spoil)}

    train_worker(job, batches=spoiled)
    lines = read_metrics(job.run)
    assert [line["step"] for line in lines] == ([2, 3, 5, 6, 8] if bad == 3 else [2, 3, 4, 6, 8])
    assert [reason for line in lines for reason in line["skipped"]] == [
        f"step {bad}: the gradient of task nq (first in shared.weight) is not finite"
    ]
    assert lines[-1]["bad_steps"] == 1
    assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    assert sum(line["queries"] for line in lines) == 7 * sum(
        make_plan(job.config, PreparedData.open(job.prepared)).batch.values()
    )
    trainer = Trainer(job.config, open_training(read_run(job.run).last_uri, job.config).encoder, torch.device("cpu"))
    trainer.load(open_training(read_run(job.run).last_uri, job.config).tensors)
    assert trainer.bad_steps == 1


def test_the_norm_of_very_many_elements_is_that_of_real_numbers():
    """Summed in float32, the squares of as many elements as a large encoder has stop to count."""
    many_P = torch.full((50_000_001,), 1e-3)
    assert squared_norm(many_P).item() ** 0.5 == pytest.approx(many_P[0].item() * 50_000_001**0.5, rel=1e-6)
    few_P = torch.tensor([3.0, 4.0])
    assert squared_norm(few_P).item() == pytest.approx(25)
    assert math.isnan(squared_norm(torch.tensor([1.0, math.nan])))


def test_learning_rate_rises_then_falls_to_zero():
    factors = [learning_rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1 / 8)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert learning_rate_factor(0, 10, 0.0) == 1.0


def test_a_run_needs_a_cpu_per_worker_and_some_for_its_data(config):
    assert [needed_cpus(with_values(config, {"train.workers": n})) for n in (1, 2, 8)] == [3, 4, 11]


def test_a_run_lives_on_s3_as_on_disk(config, tiny_prepared, s3_bucket):
    job = TrainJob(config, tiny_prepared.artifact.uri, None, f"{s3_bucket}/train/run")
    start_run(job)
    with pytest.raises(Interrupted):
        train_worker(job, batches=breaking_at(5))
    train_worker(job)
    run = read_run(job.run)
    assert run.finished
    assert [line["step"] for line in read_metrics(job.run)] == [2, 3, 4, 6, 8]
    assert open_encoder(run.best_uri).embed_queries("nq", ["who"])[0].shape == (1, config.model.scratch.width)
    assert shown_by_tensorboard(job.run, "nq/dev_accuracy") == [3, 6, 8]
