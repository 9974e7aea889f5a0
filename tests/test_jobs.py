"""The command lines: instant help, errors as one line, what cannot be placed; trials of several retrievers."""

import subprocess
import sys
import time
from importlib import import_module

import pytest
import yaml

from jobs import cli, quickstart, sweep, train, trial
from jobs.pipeline import Inputs
from jobs.sweep import Planned, comparable, require_dev_queries, waves
from jobs.trial import combined
from taskspec import cluster
from taskspec.arms import expand, read_arms
from taskspec.config import load_config
from taskspec.data.prepared import PreparedData
from taskspec.errors import ArtifactError, ConfigError, PlacementError
from taskspec.evaluate.trials import Cost, Trial
from taskspec.specialize.analysis import Falls

JOBS = ["download", "evaluate", "index", "mine", "pipeline", "prepare", "quickstart", "sweep", "train"]


@pytest.mark.parametrize("job", JOBS)
def test_help_imports_neither_torch_nor_ray(job):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{job}', '--help']\n"
        f"try:\n    runpy.run_module('jobs.{job}', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "loaded = {'torch', 'ray', 'transformers', 'faiss'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_an_error_is_one_line_and_status_2():
    command = [sys.executable, "-m", "jobs.train", "--config", "quickstart", "--set", "train.stepps=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "unknown key train.stepps; known: tasks, steps, learning_rate" in done.stderr


@pytest.mark.parametrize(
    ("job", "words", "option", "kind", "maker"),
    [
        ("train", [], "--prepared", "prepared-data", "jobs.prepare"),
        ("train", ["--prepared", "{prepared}"], "--negatives", "negatives", "jobs.mine"),
        (
            "train",
            ["--prepared", "{prepared}", "--set", "contrastive.negatives=0", "--from", "x"],
            "--from",
            "checkpoint",
            "jobs.train",
        ),
        ("index", ["--checkpoint", "x"], "--checkpoint", "checkpoint", "jobs.train"),
        ("mine", [], "--prepared", "prepared-data", "jobs.prepare"),
        ("evaluate", [], "--prepared", "prepared-data", "jobs.prepare"),
    ],
)
def test_what_a_job_needs_and_is_not_there_is_named_before_ray_starts(
    tmp_path, tiny_prepared, monkeypatch, job, words, option, kind, maker
):
    monkeypatch.setattr(cluster, "connect", None)
    words = [word.format(prepared=tiny_prepared.artifact.uri) for word in words]
    of = import_module(f"jobs.{job}")
    with pytest.raises(
        ArtifactError, match=rf"{option} /.*: does not exist, or is empty; needed here: {kind}; {maker} m"
    ):
        of.run(["--config", "quickstart", "--set", f"artifacts={tmp_path}", *words])


def test_json_prints_one_object_and_without_it_the_uri(capsys):
    cli.main(lambda argv: {"uri": "s3://b/x", "more": 1}, ["--json"])
    cli.main(lambda argv: {"uri": "s3://b/x", "more": 1}, [])
    assert capsys.readouterr().out == '{"uri": "s3://b/x", "more": 1}\ns3://b/x\n'


def test_an_interrupted_job_says_how_to_go_on(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.main(interrupted, [])
    assert end.value.code == 130
    assert "run the same command again to go on" in capsys.readouterr().err


def test_local_paths_are_made_absolute_and_s3_uris_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {
        "name": "own",
        "artifacts": "artifacts",
        "data": {"knowledge_source": ["s3://bucket/pages.jsonl"]},
        "tasks": [{"name": "nq", "train": ["nq.jsonl"]}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    config = cli.configuration(train.build_parser().parse_args(["--config", "own.yaml"]))
    assert config.artifacts == str(tmp_path / "artifacts")
    assert config.tasks[0].train == (str(tmp_path / "nq.jsonl"),)
    assert config.data.knowledge_source == ("s3://bucket/pages.jsonl",)


def test_what_the_cluster_cannot_hold_is_refused_with_both_numbers(ray_cluster):
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"needs 99 CPUs and 1 GPUs, the cluster has 4 and 0; add nodes"):
        cluster.require("training", cpus=99, gpus=1, wait_s=0.5)
    assert time.monotonic() - started < 30
    cluster.require("training", cpus=4, wait_s=0)


def test_a_trial_of_one_retriever_per_task_has_all_scores_and_the_sum_of_the_costs():
    def of(task: str, queries: int) -> Trial:
        cost = Cost(
            retrievers=1,
            training_queries=queries,
            training_seconds=0.5,
            parameters=10,
            index_bytes=20,
            passages_embedded=5,
        )
        return Trial(
            arm="single",
            row="single",
            values={},
            candidate="",
            seed=0,
            scores={task: (1.0,)},
            cost=cost,
            course={"entropy": ((1, 1.0),)},
            checkpoint=task,
        )

    both = combined([of("nq", 100), of("fever", 50)])
    assert both.scores == {"nq": (1.0,), "fever": (1.0,)}
    assert both.cost == Cost(
        retrievers=2, training_queries=150, training_seconds=1.0, parameters=20, index_bytes=40, passages_embedded=10
    )
    assert both.checkpoint is None
    assert both.course == {}


def test_the_quickstart_writes_its_world_over_nobody_s_data(tmp_path):
    for name in ("knowledge_source.jsonl", "nq-train-kilt.jsonl"):
        (tmp_path / name).write_text("mine")
    config = tmp_path / "mine.yaml"
    files = f"data: {{folder: {tmp_path}, knowledge_source: [knowledge_source.jsonl]}}"
    task = "tasks: [{name: nq, train: [nq-train-kilt.jsonl]}]"
    config.write_text(f"name: mine\nartifacts: {tmp_path}/artifacts\n{files}\n{task}\n")
    with pytest.raises(ConfigError, match=rf"mine\.yaml: a generated world .* {tmp_path} is not below artifacts"):
        quickstart.run(["--config", str(config)])
    assert (tmp_path / "nq-train-kilt.jsonl").read_text() == "mine"


def test_trials_that_need_the_same_run_are_not_made_at_the_same_time(tmp_path):
    """Those of `owned` differ from those of `mean` in what is measured only."""
    config = load_config("quickstart")
    tree = (
        "{baseline: mean, arms: {bm25: {lexical: true}, mean: {set: {specialization.method: mean}}, taco: {}, "
        "owned: {set: {specialization.method: mean}, analyze: true}, "
        "again: {set: {specialization.method: mean}, grid: {specialization.strength: [2.0]}, analyze: true}}}"
    )
    (tmp_path / "arms.yaml").write_text(tree)
    candidates = expand(read_arms(str(tmp_path / "arms.yaml")), config, "arms.yaml")
    trials = [Planned(str(n), one, None if one.plan.lexical else 0) for n, one in enumerate(candidates)]
    assert waves(trials) == [[0, 1, 2, 4], [3]]
    assert waves([*trials, trials[1]]) == [[0, 1, 2, 4], [3], [5]]


def test_a_candidate_that_failed_with_a_seed_is_not_chosen_from(tmp_path):
    tree = "{baseline: a, arms: {a: {choose: {train.steps: [1, 2]}}, b: {}, c: {set: {train.steps: 3}}}}"
    (tmp_path / "arms.yaml").write_text(tree)
    candidates = expand(read_arms(str(tmp_path / "arms.yaml")), load_config("quickstart"), "arms.yaml")
    plan = [Planned(f"{one.row}{one.label}-{seed}", one, seed) for one in candidates for seed in (0, 1)]

    def left(*failed):
        standing, alone = comparable(plan, failed, "a")
        return [trial.key for trial in standing], alone

    assert left("asteps=2-1", "b-0", "c-0", "c-1") == (["asteps=1-0", "asteps=1-1", "b-1"], [])
    assert left("asteps=1-0", "asteps=2-0")[0][:2] == ["asteps=1-1", "asteps=2-1"]
    # What is left of a row, or of it and the baseline, may have no seed in common.
    assert left("asteps=1-0", "asteps=2-0", "b-1")[1] == ["b"]
    assert left("asteps=1-0", "asteps=2-1")[0] == []
    assert left("asteps=1-0", "asteps=1-1", "asteps=2-0", "asteps=2-1")[0] == []


@pytest.mark.parametrize(
    ("arm", "dev", "missing"),
    [
        ("{}", (), "aidayago2, fever, hotpotqa, nq, trex, triviaqa, wow, zsre"),
        ("{set: {train.tasks: [nq]}}", ("wow", "fever"), "nq"),
        ("{held_out: [nq, wow]}", ("wow", "fever"), "nq"),
        ("{set: {train.tasks: [nq, wow]}, analyze: true}", ("wow", "fever"), "nq"),
    ],
)
def test_an_arm_that_nothing_could_measure_is_refused(tmp_path, arm, dev, missing):
    (tmp_path / "arms.yaml").write_text(f"{{baseline: a, arms: {{a: {arm}}}}}")
    candidates = expand(read_arms(str(tmp_path / "arms.yaml")), load_config("quickstart"), "arms.yaml")
    with pytest.raises(ConfigError, match=f"arm a: no dev queries of {missing} to measure it with; name files under"):
        require_dev_queries(candidates, "a", dev)
    require_dev_queries(candidates, "a", ("nq", "wow", "fever"))


def test_a_sweep_without_dev_files_is_refused_before_ray_starts(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(cluster, "connect", lambda config: pytest.fail("Ray was started"))
    tree = tiny_config.model_dump(mode="json")
    for task in tree["tasks"]:
        task["dev"] = []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"arm bm25: no dev queries of .*; name files under tasks\.<name>\.dev"):
        sweep.run(["--config", str(tmp_path / "config.yaml")])


def test_an_arm_without_a_task_of_the_baseline_is_refused(tmp_path):
    tree = "{baseline: a, arms: {a: {set: {train.tasks: [nq]}}, bm25: {lexical: true}, b: {set: {train.tasks: [wow]}}}}"
    (tmp_path / "arms.yaml").write_text(tree)
    candidates = expand(read_arms(str(tmp_path / "arms.yaml")), load_config("quickstart"), "arms.yaml")
    with pytest.raises(ConfigError, match="arm b: is measured on wow, the baseline a on nq; compare rows with a task"):
        require_dev_queries(candidates, "a", ("nq", "wow"))


def test_a_trial_is_another_one_if_what_decides_its_numbers_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(Inputs, "ids", lambda self: [])
    (tmp_path / "arms.yaml").write_text("{baseline: mean, arms: {mean: {}}}")

    def key(**values):
        config = load_config("quickstart", [f"{name.replace('__', '.')}={value}" for name, value in values.items()])
        (candidate,) = expand(read_arms(str(tmp_path / "arms.yaml")), config, "arms.yaml")
        return trial.trial_key(candidate, 0, Inputs("prepared", None))

    assert key() == key(index__actors=2) == key(index__shards=5) == key(index__recall=0.5) == key(train__log_every=3)
    assert key(train__workers=1) == key(), "without dropout"
    dropout = {"model__dropout": 0.1}
    assert key(**dropout, train__workers=1) != key(**dropout), "whose masks are a worker's own"
    ivf = {"index__kind": "ivf"}
    assert key(**ivf) == key(**ivf, index__actors=2)
    different = [
        {}, ivf, {"index__kind": "pq"}, {"index__precision": "bf16"}, {**ivf, "index__recall": 0.5},
        {**ivf, "index__recall_queries": 20}, {**ivf, "index__shards": 5}, {"train__checkpoint_every": 30},
        {"train__learning_rate": 0.5},
    ]  # fmt: skip
    assert len({key(**values) for values in different}) == len(different)


def test_an_analyzed_trial_is_another_one_if_what_is_kept_of_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(Inputs, "ids", lambda self: [])
    (tmp_path / "arms.yaml").write_text("{baseline: mean, arms: {mean: {}, owned: {analyze: true}}}")

    def keys():
        candidates = expand(read_arms(str(tmp_path / "arms.yaml")), load_config("quickstart"), "arms.yaml")
        return [trial.trial_key(candidate, 0, Inputs("prepared", None)) for candidate in candidates]

    plain, analyzed = keys()
    monkeypatch.setattr(trial, "Ablation", Falls)
    assert keys()[0] == plain
    assert len({plain, analyzed, keys()[1]}) == 3


def test_what_was_measured_of_several_retrievers_outlives_the_job(tmp_path, monkeypatch):
    """A trial of one retriever per task takes as many trainings and indexes."""
    (tmp_path / "arms.yaml").write_text("{baseline: single, arms: {single: {per_task: share}}}")
    (candidate,) = expand(read_arms(str(tmp_path / "arms.yaml")), load_config("quickstart"), "arms.yaml")
    made, fails = [], {"trex"}

    def one(candidate, seed, config, inputs, prepared):
        (task,) = config.train.tasks
        made.append(task)
        if task in fails:
            raise KeyboardInterrupt
        scores = {task: (1.0,)}
        cost = Cost(
            retrievers=1, training_queries=1, training_seconds=1, parameters=1, index_bytes=1, passages_embedded=1
        )
        fields = {"arm": "single", "row": "single", "values": {}, "candidate": "", "seed": seed}
        return Trial(**fields, scores=scores, cost=cost)

    monkeypatch.setattr(trial, "_dense_trial", one)
    monkeypatch.setattr(PreparedData, "open", lambda uri: None)
    parts = str(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        trial.measure(candidate, 0, Inputs("prepared", None), parts)
    before, fails = list(made), set()
    found = trial.measure(candidate, 0, Inputs("prepared", None), parts)
    assert made[len(before) :] == ["trex", *(task for task in found.scores if task not in before)]
    assert list(found.scores) == [task.name for task in candidate.config.tasks]
    assert found.cost.retrievers == len(candidate.config.tasks)
    assert len(list((tmp_path / "parts").iterdir())) == len(candidate.config.tasks), "until the trial is kept"
