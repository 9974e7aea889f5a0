"""Arms files: what they expand to, and what is refused before any work."""

import pytest

from taskspec.arms import Arms, expand, read_arms
from taskspec.config import Config, load_config
from taskspec.errors import ConfigError


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("quickstart")


def arms(tree: str, tmp_path) -> Arms:
    path = tmp_path / "arms.yaml"
    path.write_text(tree)
    return read_arms(str(path))


def test_a_grid_makes_rows_and_a_choice_makes_candidates(config, tmp_path):
    found = expand(
        arms(
            "{baseline: mean, arms: {mean: {set: {specialization.method: mean}}, taco: {"
            "grid: {specialization.strength: [0.5, 2]}, choose: {train.learning_rate: [1.0e-3, 2.0e-3]}}}}",
            tmp_path,
        ),
        config,
        "arms.yaml",
    )
    assert [(c.row, c.label) for c in found] == [
        ("mean", ""),
        ("taco strength=0.5", "learning_rate=0.001"),
        ("taco strength=0.5", "learning_rate=0.002"),
        ("taco strength=2", "learning_rate=0.001"),
        ("taco strength=2", "learning_rate=0.002"),
    ]
    last = found[-1]
    assert (last.config.specialization.strength, last.config.train.learning_rate) == (2.0, 0.002)
    assert last.values == {"specialization.strength": 2}
    assert list(last.runs(seed=7)) == [""]
    assert last.runs(seed=7)[""].seed == 7
    assert found[0].config.train == config.train


def test_one_retriever_per_task_is_one_run_for_each(config, tmp_path):
    tree = "{baseline: share, arms: {share: {per_task: share}, all: {per_task: all}}}"
    share, whole = expand(arms(tree, tmp_path), config, "arms.yaml")
    runs = share.runs(seed=0)
    assert list(runs) == list(whole.runs(seed=0)) == [task.name for task in config.tasks]
    assert all(one.tasks == config.tasks for one in runs.values())
    assert [one.tasks for one in whole.runs(seed=0).values()] == [(task,) for task in config.tasks]
    assert all(one.trained_tasks == (one.task(name),) for name, one in runs.items())
    assert {one.specialization.method for one in runs.values()} == {"single"}


def test_held_out_tasks_are_not_trained(config, tmp_path):
    (found,) = expand(arms("{baseline: few, arms: {few: {held_out: [nq, wow]}}}", tmp_path), config, "arms.yaml")
    trained = [task.name for task in found.config.trained_tasks]
    assert trained == [task.name for task in config.tasks if task.name not in ("nq", "wow")]


def test_the_presets_expand_for_the_quickstart(config):
    rows = [candidate.row for candidate in expand(read_arms("strength"), config, "strength")]
    assert rows[:3] == ["bm25", "mean", "taco strength=0.25"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("{baseline: b, arms: {a: {}}}", "^arms.yaml: baseline 'b' is no row of the comparison; rows: a"),
        ("{baseline: a, arms: {a: {lexical: true, analyze: true}}}", "lexical is BM25, which has nothing to set"),
        ("{baseline: a, arms: {a: {per_task: share, analyze: true}}}", "per_task trains models of one task each"),
        ("{baseline: a, arms: {a: {grid: {train.steps: []}}}}", "train.steps has no values; name at least one"),
        (
            "{baseline: a, arms: {a: {set: {train.steps: 1}, choose: {train.steps: [1]}}}}",
            "train.steps is in two of set, grid and choose",
        ),
        (
            "{baseline: a, arms: {a: {set: {data.passage_words: 50}}}}",
            "data.passage_words cannot differ between arms; what can: prompts, model",
        ),
        (
            "{baseline: a, arms: {a: {set: {trian.steps: 50}}}}",
            "trian.steps is no key of the configuration; what arms may change: prompts, model",
        ),
        ("{baseline: a, arms: {a: {sett: {}}}}", "arms.yaml: unknown key arms.a.sett; known: question, set, grid"),
        ("{baseline: a, arms: {a: {}}, arm: {}}", "arms.yaml: unknown key arm; known: baseline, arms"),
        ("{baseline: a, arms: {set: {sett: {}}}}", "unknown key arms.set.sett; known: question, set, grid"),
        ("{baseline: a, arms: {a: {grid: {train.steps: 5}}}}", "arms.a.grid.train.steps: must be a list but got 5"),
        ("{baseline: a, arms: {a: nq}}", "arms.a: must hold keys and values but got 'nq'"),
        ("{baseline: a, arms: {a: {per_task: each}}}", "arms.a.per_task: .*'share' or 'all' but got 'each'"),
        ("[a, b]", "arms.yaml: must hold keys and values but got"),
        ("{arms: {a: {}}}", "arms.yaml: missing key baseline"),
        (
            "{baseline: a, arms: {a: {set: {train.stepps: 3}}}}",
            r"arms.yaml: arm a: unknown key train.stepps; known: tasks, steps",
        ),
        ("{baseline: a, arms: {a: {held_out: [nqq]}}}", "arms.yaml: arm a: held_out: unknown task 'nqq'; known: fever"),
        (
            "{baseline: a, arms: {a: {set: {train.tasks: [nq]}, held_out: [nq]}}}",
            "arm a: held_out names every task, so none is trained; leave one out of it",
        ),
        (
            "{baseline: a, arms: {a: {set: {train.tasks: [nq]}, analyze: true}}}",
            "arms.yaml: arm a: analyze compares tasks, and this arm trains one of them",
        ),
        (
            "{baseline: a, arms: {a: {set: {train.distribution: task_parallel, train.workers: 2}, per_task: share}}}",
            r"arms.yaml: arm a: .*1 tasks for 2 workers",
        ),
        ("[", "is not YAML"),
        ("{baseline: a, arms: {a: {}, a: {lexical: true}}}", "key 'a' is there twice; leave one"),
        (
            "{baseline: a, arms: {a: {grid: {specialization.strength: [1.0, 1.0]}}}}",
            "arm a: row 'a strength=1' is there already, by arm a; rename an arm",
        ),
        (
            "{baseline: a, arms: {a: {grid: {specialization.strength: [1.0]}}, a strength=1: {}}}",
            "arm a strength=1: row 'a strength=1' is there already, by arm a; rename",
        ),
        (
            "{baseline: a, arms: {a: {choose: {train.learning_rate: [0.1, 0.1]}}}}",
            "arm a: row 'a' with learning_rate=0.1 is there already",
        ),
    ],
)
def test_what_is_wrong_with_an_arms_file_is_said(tree, message, config, tmp_path):
    with pytest.raises(ConfigError, match=message):
        expand(arms(tree, tmp_path), config, "arms.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read \(No such file or directory\)"):
        read_arms(str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match=r"strenght: neither a file nor a preset; presets: strength"):
        read_arms("strenght")


def test_an_arm_that_trains_few_tasks_holds_out_of_those(config, tmp_path):
    tree = "{baseline: few, arms: {few: {set: {train.tasks: [fever, nq, wow]}, held_out: [wow]}}}"
    (found,) = expand(arms(tree, tmp_path), config, "arms.yaml")
    assert {task.name for task in found.config.trained_tasks} == {"fever", "nq"}


def test_an_arm_says_what_it_changes_in_a_line(tmp_path):
    found = arms(
        "{baseline: mean, arms: {bm25: {lexical: true}, mean: {}, taco: {set: {specialization.decay: 0.9}, "
        "grid: {specialization.strength: [1, 2]}, choose: {train.learning_rate: [0.1, 0.2]}, held_out: [nq]}, "
        "single: {per_task: share}, whole: {per_task: all}}}",
        tmp_path,
    )
    assert [arm.describe() for arm in found.arms.values()] == [
        "BM25",
        "",
        "specialization.decay=0.9; specialization.strength one of 1, 2; train.learning_rate chosen from 0.1, 0.2; "
        "held out: nq",
        "one retriever per task, its share of the queries",
        "one retriever per task, all the queries",
    ]
