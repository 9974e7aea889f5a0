"""The configuration: defaults, YAML, overrides, what is refused; the contract."""

import subprocess
import sys

import pytest
import yaml
from pydantic import BaseModel
from pydantic import ValidationError as PydanticError

from taskspec.config import Config, canonical_sha256, load_config, parse_config, presets_folder
from taskspec.errors import ConfigError, ContractError
from taskspec.model.contract import Contract, ContractTask
from taskspec.sections import Prompts, Section, Task

TREE = {
    "name": "mine",
    "artifacts": "artifacts",
    "tasks": [{"name": "nq"}, {"name": "fever", "prompt": "fact check", "max_query_tokens": 64}],
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def refused(**changes):
    """The message that a changed tree is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse_config(TREE | changes, "mine.yaml")
    return str(caught.value)


def test_a_file_is_read_and_the_rest_has_defaults(path):
    config = load_config(path)
    assert config == parse_config(TREE, "mine.yaml")
    assert [task.name for task in config.tasks] == ["nq", "fever"]
    assert config.specialization.strength == 1.0
    assert config.task("fever").max_query_tokens == 64


def test_a_configuration_survives_being_saved(path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), "saved") == config


def test_the_prompt_of_a_task_is_its_name_unless_it_has_one():
    prompts = [Task(name="nq", prompt=prompt).prompt_text for prompt in (None, "question", "")]
    assert prompts == ["nq", "question", ""]


def test_values_are_frozen(path):
    with pytest.raises(PydanticError, match="frozen"):
        load_config(path).seed = 1


def sections(section):
    yield section
    for field in section.model_fields.values():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


def test_every_section_refuses_unknown_keys():
    found = set(sections(Config))
    assert len(found) > 10
    assert all(issubclass(section, Section) for section in found)


def test_an_unknown_key_is_answered_with_the_known_ones():
    assert refused(specialization={"strenght": 1}) == (
        "mine.yaml: unknown key specialization.strenght; "
        "known: method, strength, decay, shrinkage, warmup, min_warmup_steps, "
        "cgd_step, gradnorm_step, gradnorm_restoring"
    )
    assert refused(model={"scratch": {"depth": 2}}).endswith(
        "unknown key model.scratch.depth; known: vocabulary, width, layers, heads"
    )
    assert "unknown key tasks.0.file; known: name, prompt, train, dev" in refused(tasks=[{"name": "nq", "file": "x"}])
    assert "unknown key colour; known: name, artifacts, seed, tasks" in refused(colour="red")


def test_every_broken_rule_is_told_with_key_and_value():
    message = refused(seed=-1, train={"workers": 0, "steps": "many"})
    for part in ("seed: ", "but got -1", "train.workers: ", "but got 0", "train.steps: ", "but got 'many'"):
        assert part in message
    assert message.count("mine.yaml: ") == 3


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"^x: missing key name; x: missing key artifacts$"):
        parse_config({"tasks": [{"name": "nq"}]}, "x")


def test_task_names_are_distinct():
    message = refused(tasks=[{"name": "nq"}, {"name": "nq"}])
    assert message == "mine.yaml: tasks: names must be distinct but nq stands twice"


def test_train_tasks_are_tasks():
    assert refused(train={"tasks": ["nq", "wow"]}) == "mine.yaml: train.tasks: unknown task 'wow'; known: nq, fever"
    config = parse_config(TREE | {"train": {"tasks": ["fever"]}}, "x")
    assert [task.name for task in config.trained_tasks] == ["fever"]


def test_single_trains_one_task():
    assert "single trains exactly one task but train.tasks selects 2; name one with --set train.tasks=[nq]" in refused(
        specialization={"method": "single"}
    )


def test_an_unknown_task_is_answered_with_the_known_ones(path):
    with pytest.raises(ConfigError, match=r"unknown task 'wow'; known: nq, fever"):
        load_config(path).task("wow")


def test_evaluation_needs_numbers_of_results():
    for at in ([], [0, 5]):
        assert "evaluate.at: needs numbers ≥ 1 but got" in refused(evaluate={"at": at})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            {"query": "{prompt}"},
            r"prompts.query must contain exactly once {text} and at most once {prompt} but is '{prompt}'",
        ),
        ({"query": "{text} {text}"}, "prompts.query must contain exactly once {text}"),
        ({"query": "{title} {text}"}, "prompts.query must contain exactly once {text}"),
        ({"query": "{prompt"}, "prompts.query is no template (expected '}' before end of string): '{prompt'"),
        ({"query": "{text}?"}, "prompts.query must end with {text} (only the text is cut) but is '{text}?'"),
        ({"passage": "{text}"}, "prompts.passage must contain exactly once {text}, {title} but is '{text}'"),
    ],
)
def test_prompts_have_their_fields(prompts, message):
    assert message in refused(prompts=prompts)


def test_overrides_reach_every_key(path):
    config = load_config(
        path,
        [
            "seed=3",
            "train.tasks=[nq]",
            "model.scratch.width=64",
            "tasks.fever.keep=end",
            "tasks.0.max_query_tokens=48",
            "tasks.1={name: trex}",
        ],
    )
    assert (config.seed, config.train.tasks, config.model.scratch.width) == (3, ("nq",), 64)
    assert config.tasks[0].max_query_tokens == 48
    assert config.tasks[1] == Task(name="trex")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"--set seed: must look like a\.b=value"),
        ("=1", r"--set =1: must look like a\.b=value"),
        ("seed=[", r"--set seed=\[: the value is not YAML"),
        ("name=2025-13-45", "--set name=2025-13-45: the value is not YAML; put text in quotes"),
        ("seed.a=1", "--set seed.a=1: 'seed' is a value|seed: "),
        ("name.a.b=1", "--set name.a.b=1: 'a' lies below a value, not below a section"),
        ("name.a=1", "--set name.a=1: name is a value, it has no key 'a'"),
        ("tasks.wow.keep=end", "--set tasks.wow.keep=end: no item 'wow'; known: nq, fever"),
        ("tasks.7={}", r"--set tasks.7=\{\}: no item '7'; known: nq, fever"),
        ("train.speed=9", "unknown key train.speed; known: tasks, steps"),
    ],
)
def test_a_wrong_override_is_refused(path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", r"mine\.yaml: is not YAML: .*line 1"),
        (b"\xff\xfe", r"mine\.yaml: is not YAML"),
        (b"- a", r"mine\.yaml: must hold keys and values but holds list"),
        (b"", r"mine\.yaml: must hold keys and values but holds NoneType"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_and_an_unknown_preset_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"kitl: neither a file nor a preset; presets: .*kilt.*quickstart"):
        load_config("kitl")


@pytest.mark.parametrize("preset", sorted(path.stem for path in presets_folder().glob("*.yaml")))
def test_every_preset_loads_by_its_name(preset):
    assert load_config(preset) == load_config(presets_folder() / f"{preset}.yaml")


def contract(**changes):
    fields = {
        "name": "mine",
        "weights": "ab",
        "tasks": (
            ContractTask(name="nq", prompt="nq", max_query_tokens=32, keep="beginning"),
            ContractTask(name="wow", prompt="wow", max_query_tokens=256, keep="end"),
        ),
        "prompts": Prompts(),
        "pooling": "mean",
        "similarity": "dot",
        "max_passage_tokens": 160,
        "dimension": 32,
    }
    return Contract(**(fields | changes))


def test_the_fingerprint_follows_every_field():
    changes = [
        {"name": "yours"},
        {"weights": "cd"},
        {"tasks": contract().tasks[:1]},
        {"tasks": contract().tasks[::-1]},
        {"prompts": Prompts(query="{text}")},
        {"pooling": "first"},
        {"similarity": "cosine"},
        {"max_passage_tokens": 128},
        {"dimension": 64},
    ]
    assert {field for change in changes for field in change} == set(Contract.model_fields)
    assert len({contract().fingerprint, *(contract(**change).fingerprint for change in changes)}) == len(changes) + 1
    assert contract().fingerprint == contract().fingerprint
    assert len(contract().fingerprint) == 64


def test_the_first_field_that_differs_is_named():
    contract().require_same(contract(), "the index", "the checkpoint", "rebuild")
    with pytest.raises(
        ContractError,
        match=r"^the index has contract [0-9a-f]{12}, the checkpoint has [0-9a-f]{12}: "
        r"pooling differs \('mean' against 'first'\); rebuild$",
    ):
        contract().require_same(contract(pooling="first"), "the index", "the checkpoint", "rebuild")


def test_a_task_that_differs_is_named():
    nq, wow = contract().tasks
    other = wow.model_copy(update={"prompt": "chat"})
    for tasks in ((nq, other), (nq,), (nq, wow, other.model_copy(update={"name": "wow2"}))):
        with pytest.raises(ContractError, match=r"tasks\.wow2? differs"):
            contract().require_same(contract(tasks=tasks), "a", "b", "c")


def test_the_order_of_tasks_is_told_apart():
    with pytest.raises(ContractError, match=r"order of tasks differs \('nq, wow' against 'wow, nq'\)"):
        contract().require_same(contract(tasks=contract().tasks[::-1]), "a", "b", "c")


def test_the_hash_does_not_depend_on_the_order_of_keys():
    assert canonical_sha256({"a": 1, "b": [1, "é"]}) == canonical_sha256({"b": [1, "é"], "a": 1})
    assert canonical_sha256([1]) != canonical_sha256(["1"])


def test_reading_a_configuration_imports_neither_torch_nor_ray():
    code = "import sys, taskspec.config; print([name for name in ('torch', 'ray', 'pyarrow') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
