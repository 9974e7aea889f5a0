"""The configurations that ship: each loads, and the published setting holds the published numbers."""

from pathlib import Path

import pytest

from jobs import cli
from taskspec.arms import expand, read_arms
from taskspec.config import Config, load_config, presets_folder

PRESETS = sorted(path.stem for path in presets_folder().glob("*.yaml"))
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def kilt() -> Config:
    return load_config("kilt")


def test_the_presets_are_these() -> None:
    assert PRESETS == ["kilt", "own-tasks", "quickstart"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_and_its_tasks_have_files(name: str) -> None:
    config = load_config(name)
    assert config.data.knowledge_source
    assert all(task.train and task.dev for task in config.tasks)
    # At least two queries of every task are in a step.
    assert config.mixing.queries_per_step >= 2 * len(config.tasks)


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "arms").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_arms_of_the_evidence_expand_and_each_says_what_it_is_to_show(path: Path) -> None:
    config = load_config(BENCHMARKS / ("minikilt.yaml" if path.stem.startswith("minikilt") else "world.yaml"))
    arms = read_arms(str(path))
    assert len(expand(arms, config, path.name)) >= 2
    assert all(arm.question for arm in arms.arms.values())


def test_kilt_has_the_eight_tasks_in_kilts_own_files(kilt: Config) -> None:
    assert {task.name for task in kilt.tasks} == {
        "aidayago2",
        "fever",
        "hotpotqa",
        "nq",
        "structured_zeroshot",
        "trex",
        "triviaqa",
        "wow",
    }
    for task in kilt.tasks:
        assert task.train == (f"{task.name}-train-kilt.jsonl",)
        assert task.dev == (f"{task.name}-dev-kilt.jsonl",)
    assert kilt.data.knowledge_source == ("kilt_knowledgesource.json",)
    assert kilt.data.folder == "data/kilt"


def test_relative_files_begin_in_the_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def files(*words: str) -> tuple[str, str]:
        parsed = cli.parser("").parse_args(["--config", "kilt", *words])
        config = cli.configuration(parsed)
        return config.data.knowledge_source[0], config.task("nq").dev[0]

    assert files() == (f"{tmp_path}/data/kilt/kilt_knowledgesource.json", f"{tmp_path}/data/kilt/nq-dev-kilt.jsonl")
    far = ("--set", "data.folder=s3://bucket/kilt")
    assert files(*far) == ("s3://bucket/kilt/kilt_knowledgesource.json", "s3://bucket/kilt/nq-dev-kilt.jsonl")
    assert files(*far, "--set", "tasks.nq.dev=[/there/nq.jsonl]")[1] == "/there/nq.jsonl"


def test_kilt_has_the_published_lengths(kilt: Config) -> None:
    longer = {"wow": 256, "aidayago2": 128, "fever": 64}
    assert {task.name: task.max_query_tokens for task in kilt.tasks if task.max_query_tokens != 32} == longer
    assert {task.name: task.keep for task in kilt.tasks if task.keep != "beginning"} == {
        "wow": "end",
        "aidayago2": "mention",
    }
    assert kilt.model.max_passage_tokens == 160
    assert kilt.data.passage_words == 100


def test_kilt_has_the_published_prompts(kilt: Config) -> None:
    assert kilt.prompts.query == "{prompt} <extra_id_1> {text}"
    assert kilt.prompts.passage == "Title: {title} Text: {text}"
    assert {task.name: task.prompt for task in kilt.tasks} == {
        "aidayago2": "AIDA",
        "fever": "FEVER",
        "hotpotqa": "HOPO",
        "nq": "NQ",
        "structured_zeroshot": "ZSRE",
        "trex": "TREX",
        "triviaqa": "TQA",
        "wow": "WOW",
    }


def test_kilt_has_the_published_encoder_and_training(kilt: Config) -> None:
    assert (kilt.model.source, kilt.model.pooling, kilt.model.similarity) == ("google-t5/t5-base", "first", "dot")
    assert kilt.contrastive.negatives == 2
    assert kilt.contrastive.temperature == 1
    assert kilt.mixing.temperature == 4
    assert kilt.train.learning_rate == 1e-5
    assert (kilt.train.lr_warmup, kilt.train.clip_norm) == (0.1, 1.0)
