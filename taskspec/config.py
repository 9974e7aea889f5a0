"""The typed configuration: YAML + dotted overrides → one frozen `Config` of the sections in `sections.py`.

Unknown keys are refused and answered with the known ones. A task is configuration; nothing in the library lists tasks.
This module imports neither torch nor ray, so `--help` is instant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from taskspec.errors import ConfigError
from taskspec.sections import (
    Cluster,
    Contrastive,
    Data,
    Evaluate,
    Index,
    Mixing,
    Model,
    Negatives,
    Prompts,
    Section,
    Specialization,
    Sweep,
    Task,
    Train,
)


class Config(Section):
    """Everything a job needs to know; saved in every artifact."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the model: answers, run folders and reports carry it."""
    artifacts: str
    """Root URI under which jobs write when they are given no --out."""
    seed: int = Field(0, ge=0)
    tasks: tuple[Task, ...] = Field(min_length=1)
    data: Data = Data()
    prompts: Prompts = Prompts()
    model: Model = Model()
    contrastive: Contrastive = Contrastive()
    mixing: Mixing = Mixing()
    specialization: Specialization = Specialization()
    train: Train = Train()
    negatives: Negatives = Negatives()
    index: Index = Index()
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()
    sweep: Sweep = Sweep()

    @model_validator(mode="after")
    def _tasks_fit(self) -> Self:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: names must be distinct but {', '.join(twice)} stands twice")
        for name in self.train.tasks or ():
            if name not in names:
                raise ValueError(f"train.tasks: unknown task {name!r}; known: {', '.join(names)}")
        if self.train.distribution == "task_parallel" and len(self.trained_tasks) < self.train.workers:
            raise ValueError(
                f"train.distribution task_parallel gives each worker whole tasks, but there are "
                f"{len(self.trained_tasks)} tasks for {self.train.workers} workers; take train.workers="
                f"{len(self.trained_tasks)} at most, or sharded"
            )
        if self.specialization.method == "single" and len(self.trained_tasks) != 1:
            raise ValueError(
                f"specialization.method single trains exactly one task but train.tasks selects "
                f"{len(self.trained_tasks)}; name one with --set train.tasks=[{names[0]}]"
            )
        return self

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        """The tasks that this run trains, in the order of `tasks`."""
        selected = self.train.tasks
        return self.tasks if selected is None else tuple(task for task in self.tasks if task.name in selected)

    def task(self, name: str) -> Task:
        """The task of that name. Raises: ConfigError listing the known ones."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise ConfigError(f"unknown task {name!r}; known: {', '.join(task.name for task in self.tasks)}")


def with_values(config: Config, values: Mapping[str, Any], where: str = "changes") -> Config:
    """The configuration with other values of dotted keys, checked again.

    Args: where: what stands in front of an error.    Raises: ConfigError.
    """
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        _put(tree, key, value, where)
    return parse_config(tree, where)


def canonical_sha256(value: Any) -> str:
    """sha256 (hex) of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def presets_folder() -> Path:
    """Where `jobs/configs` lies: beside the library, in the project's root."""
    return Path(__file__).resolve().parent.parent / "jobs" / "configs"


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is there twice; leave one", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(source: str | Path, presets: Path) -> tuple[Path, Any]:
    """Reads a YAML file, or one of a folder of presets by its name. Returns: the file's path and what it holds.

    Raises: ConfigError if there is no such file or preset, naming the presets; if it is not YAML or has a key twice.
    """
    path = Path(source)
    if not path.suffix and not path.exists():
        path = presets / f"{source}.yaml"
        if not path.exists():
            known = ", ".join(sorted(preset.stem for preset in presets.glob("*.yaml")))
            raise ConfigError(f"{source}: neither a file nor a preset; presets: {known}")
    try:
        return path, yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file or a preset's name") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, or a preset by its name, and applies `a.b=value` overrides.

    Args: overrides: dotted keys; values are YAML (`--set train.tasks=[nq,fever]`); list items by number or, for
        tasks, by name (`--set tasks.nq.max_query_tokens=48`).
    Raises: ConfigError naming file, key, value and the known keys.
    """
    path, tree = read_yaml(source, presets_folder())
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys and values but holds {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: Mapping[str, Any], where: str) -> Config:
    """A `Config` of a plain tree. Raises: ConfigError, one line per broken rule, `where` in front."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{where}: {line}" for line in broken_rules(error, Config))) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: must look like a.b=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is no YAMLError
        raise ConfigError(f"--set {override}: the value is not YAML; put text in quotes") from error
    _put(tree, dotted, value, f"--set {override}")


def _put(tree: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *parents, last = dotted.split(".")
    node: Any = tree
    for key in parents:
        node = _child(node, key, where)
    if isinstance(node, list):
        node[_position(node, last, where)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"{where}: {'.'.join(parents)} is a value, it has no key {last!r}")


def _child(node: Any, key: str, where: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, key, where)]
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = {}
        return node[key]
    raise ConfigError(f"{where}: {key!r} lies below a value, not below a section")


def _position(items: list[Any], key: str, where: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = ", ".join(str(name) for name in names if name is not None) or f"0 to {len(items) - 1}"
    raise ConfigError(f"{where}: no item {key!r}; known: {known}")


YAML_WORDS = {
    "tuple_type": "must be a list",
    "model_type": "must hold keys and values",
    "dict_type": "must hold keys and values",
}
"""Kind of error → the rule, where pydantic's own words are Python's."""


def broken_rules(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """What is wrong with a tree, a line for each broken rule: key, rule, value, and for an unknown key the known ones.

    Args: root: the section that the tree was read as.
    """
    return [_broken_rule(problem, root) for problem in error.errors()]


def _broken_rule(problem: ErrorDetails, root: type[BaseModel]) -> str:
    key = ".".join(map(str, problem["loc"]))
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"unknown key {key}; known: {', '.join(_known_keys(problem['loc'][:-1], root))}"
    if kind == "missing":
        return f"missing key {key}"
    message = YAML_WORDS.get(kind, problem["msg"].removeprefix("Value error, "))
    value = "" if isinstance(problem["input"], dict) else f" but got {problem['input']!r}"
    return f"{key}: {message}{value}" if key else f"{message}{value}"


def _known_keys(location: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    section = root
    for part in location:
        field = section.model_fields.get(str(part))  # none for a number in a list, or a name that the file gives
        if field is not None:
            inside = [field.annotation, *get_args(field.annotation)]
            section = next((one for one in inside if isinstance(one, type) and issubclass(one, BaseModel)), section)
    return list(section.model_fields)
