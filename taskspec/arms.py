"""The arms of a comparison: a YAML file of named changes to one configuration → candidates, checked before any work.

Path: configuration, arms file → [here] → sweep job.  An *arm* is a way to train. Its `grid` makes one row of the
tables for each combination of values; its `choose` makes candidates of each row, of which the comparison takes the best
without letting a query choose what measures it. A *candidate* with a seed is one trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from taskspec.config import Config, broken_rules, presets_folder, read_yaml, with_values
from taskspec.errors import ConfigError
from taskspec.sections import Section

SECTIONS = ("prompts", "model", "contrastive", "mixing", "specialization", "train")
"""What arms may change: prepared data and negatives are the same for all."""


class Arm(Section):
    """One way to train."""

    question: str = ""
    """What the arm is to show or should change, said before it runs."""
    set: dict[str, Any] = Field({})
    """Dotted key → value, for all candidates."""
    grid: dict[str, tuple[Any, ...]] = Field({})
    """Dotted key → values: a row for each combination."""
    choose: dict[str, tuple[Any, ...]] = Field({})
    """Dotted key → values that each row chooses between."""
    seeds: int | None = Field(None, ge=1)
    """Only so many of the sweep's seeds, the first ones; None is all."""
    held_out: tuple[str, ...] = ()
    """Tasks left out of training and answered zero-shot."""
    per_task: Literal["share", "all"] | None = None
    """One retriever for each task instead of one for all. `share`: each sees the queries that its task has among the
    others, so that all together see as many as one for all. `all`: each sees as many as one for all."""
    lexical: bool = False
    """BM25 instead of a trained retriever; nothing else can be set."""
    analyze: bool = False
    """Also measure who owns which parameter, and what zeroing the owned ones does."""

    def describe(self) -> str:
        """What it changes, in a line; empty for the configuration as it is."""
        parts = [f"{key}={value}" for key, value in self.set.items()]
        parts += [f"{key} one of {', '.join(map(str, values))}" for key, values in self.grid.items()]
        parts += [f"{key} chosen from {', '.join(map(str, values))}" for key, values in self.choose.items()]
        parts += [f"held out: {', '.join(self.held_out)}"] if self.held_out else []
        if self.per_task:
            parts.append(f"one retriever per task, {'its share of' if self.per_task == 'share' else 'all'} the queries")
        parts += ["BM25"] if self.lexical else []
        return "; ".join(parts)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.lexical and (self.set or self.grid or self.choose or self.held_out or self.per_task or self.analyze):
            raise ValueError("lexical is BM25, which has nothing to set; leave out the other keys")
        if self.per_task and (self.held_out or self.analyze):
            raise ValueError("per_task trains models of one task each; held_out and analyze need one of several tasks")
        empty = [key for key, values in (self.grid | self.choose).items() if not values]
        if empty:
            raise ValueError(f"{empty[0]} has no values; name at least one")
        twice = [key for key in self.grid if key in self.choose or key in self.set] + [
            key for key in self.choose if key in self.set
        ]
        if twice:
            raise ValueError(f"{twice[0]} is in two of set, grid and choose; leave it in one")
        for key in (*self.set, *self.grid, *self.choose):
            section = key.partition(".")[0]
            if section not in Config.model_fields:
                raise ValueError(f"{key} is no key of the configuration; what arms may change: {', '.join(SECTIONS)}")
            if section not in SECTIONS:
                raise ValueError(f"{key} cannot differ between arms; what can: {', '.join(SECTIONS)}")
        return self


class Arms(Section):
    """What is compared with what."""

    baseline: str
    """The row that all others are compared with."""
    arms: dict[str, Arm] = Field(min_length=1)
    """Name → arm, in the order of the tables."""


class Candidate(NamedTuple):
    """One configuration of an arm, seed aside."""

    arm: str
    row: str
    values: Mapping[str, Any]
    """The point of the grid."""
    label: str
    """The chosen values; empty where there is nothing to choose."""
    plan: Arm
    config: Config
    """Of the one run; with `per_task`, what the runs of all tasks have in common."""

    def runs(self, seed: int) -> dict[str, Config]:
        """Task → configuration with `per_task`, "" → configuration otherwise."""
        if self.plan.per_task is None:
            return {"": with_values(self.config, {"seed": seed})}
        runs = {}
        for task in self.config.trained_tasks:
            changes: dict[str, Any] = {"seed": seed, "specialization.method": "single", "train.tasks": [task.name]}
            if self.plan.per_task == "all":  # a step's queries are split between the configuration's tasks
                changes["tasks"] = [task.model_dump(mode="json")]
            runs[task.name] = with_values(self.config, changes)
        return runs


def read_arms(source: str) -> Arms:
    """Reads an arms file, or a preset of `jobs/arms` by its name.

    Raises: ConfigError naming file, key, value and the known keys.
    """
    path, tree = read_yaml(source, presets_folder().parent / "arms")
    try:
        return Arms.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{path}: {line}" for line in broken_rules(error, Arms))) from error


def expand(arms: Arms, config: Config, where: str) -> list[Candidate]:
    """Every candidate of every arm, each with its checked configuration.

    Args: where: the arms' file, in front of an error.
    Raises: ConfigError naming the arm, for a change that the configuration refuses, an unknown held-out task, held-out
        tasks that leave none to train, two rows of one name, or a baseline that is no row.
    """
    result = []
    for name, arm in arms.arms.items():
        for values in _combinations(arm.grid):
            row = " ".join([name, *map(_setting, values.items())])
            for chosen in _combinations(arm.choose):
                label = " ".join(map(_setting, chosen.items()))
                changed = with_values(config, {**arm.set, **values, **chosen}, f"{where}: arm {row}")
                if arm.held_out:
                    try:
                        for task in arm.held_out:
                            config.task(task)
                    except ConfigError as error:
                        raise ConfigError(f"{where}: arm {row}: held_out: {error}") from error
                    trained = [task.name for task in changed.trained_tasks if task.name not in arm.held_out]
                    if not trained:
                        raise ConfigError(
                            f"{where}: arm {row}: held_out names every task, so none is trained; leave one out of it"
                        )
                    changed = with_values(changed, {"train.tasks": trained}, f"{where}: arm {row}")
                if arm.analyze and len(changed.trained_tasks) < 2:
                    raise ConfigError(f"{where}: arm {row}: analyze compares tasks, and this arm trains one of them")
                candidate = Candidate(name, row, values, label, arm, changed)
                try:
                    candidate.runs(seed=0)
                except ConfigError as error:
                    raise ConfigError(f"{where}: arm {row}: {error}") from error
                result.append(candidate)
    # In the tables a row is its name, and of two equal trials the last would count.
    named: dict[tuple[str, str], Candidate] = {}
    for candidate in result:
        other = named.setdefault((candidate.row, candidate.label), candidate)
        if other is not candidate:
            label = f" with {candidate.label}" if candidate.label else ""
            raise ConfigError(
                f"{where}: arm {candidate.arm}: row {candidate.row!r}{label} is there already, by arm {other.arm}; "
                "rename an arm, or leave out one of two values that are equal to six digits"
            )
    rows = dict.fromkeys(candidate.row for candidate in result)
    if arms.baseline not in rows:
        raise ConfigError(f"{where}: baseline {arms.baseline!r} is no row of the comparison; rows: {', '.join(rows)}")
    return result


def _combinations(choices: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _setting(item: tuple[str, Any]) -> str:
    key, value = item
    return f"{key.rpartition('.')[2]}={value:g}" if isinstance(value, float) else f"{key.rpartition('.')[2]}={value}"
