"""The whole path by URIs: prepare → BM25 negatives → train → index → evaluate; what exists is not made again.

An arm is one way to train: `untrained`, `mean`, `taco`, or `single`, which is one retriever per task.
A run is found again by what decides its weights, so a changed configuration trains beside the old run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs import cli
from taskspec import store
from taskspec.config import Config, canonical_sha256, parse_config
from taskspec.errors import ConfigError

if TYPE_CHECKING:
    from taskspec.evaluate.run import EvaluationTable
    from taskspec.retrieve.retriever import Searcher

ARMS = ("untrained", "mean", "taco", "single")


class Inputs(NamedTuple):
    """URIs that every arm starts from."""

    prepared: str
    negatives: str | None


class Trained(NamedTuple):
    """One run and the index of its best checkpoint."""

    run: str
    checkpoint: str
    index: str


class Result(NamedTuple):
    """What a pipeline made."""

    prepared: str
    evaluation: str
    table: EvaluationTable
    arms: dict[str, dict[str, Trained]]
    """Arm → task → run for `single`, and arm → "" → run for all others."""
    systems: dict[str, Searcher | dict[str, Searcher]]
    """What was evaluated, opened: BM25 and the arms."""


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser("Run everything from KILT files to an evaluation table; run again to go on.")
    result.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        metavar="ARM",
        help=f"what to train and compare: {', '.join(ARMS)}; default: the configuration's method",
    )
    return result


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the evaluation, and for each arm the URIs of its checkpoint and index."""
    arguments = build_parser().parse_args(argv)
    config = cli.configuration(arguments)
    result = run_pipeline(config, arguments.arms or [config.specialization.method])
    print(f"\n{result.table.to_text()}\n", flush=True)
    arms = {arm: {task: trained._asdict() for task, trained in runs.items()} for arm, runs in result.arms.items()}
    return {"uri": result.evaluation, "arms": arms}


def run_pipeline(config: Config, arms: Sequence[str]) -> Result:
    """Makes what is missing and evaluates all arms beside BM25. Raises: what its stages raise."""
    from taskspec import cluster
    from taskspec.data.prepared import PreparedData
    from taskspec.evaluate.run import EvaluationTable, publish_evaluation
    from taskspec.negatives.bm25 import BM25
    from taskspec.retrieve.retriever import Retriever

    plans = {arm: arm_configs(config, arm) for arm in arms}
    cluster.connect(config.cluster)
    inputs = make_inputs(config)
    trained = {arm: {task: train_and_index(one, inputs) for task, one in runs.items()} for arm, runs in plans.items()}

    prepared = PreparedData.open(inputs.prepared)
    systems: dict[str, Searcher | dict[str, Searcher]] = {"bm25": BM25.build(prepared)}
    ids = {}
    for arm, runs in trained.items():
        opened: dict[str, Searcher] = {}
        for task, one in runs.items():
            opened[task] = Retriever.open(one.checkpoint, one.index)
            ids["/".join(filter(None, ["index", arm, task]))] = store.read_manifest(one.index, "index").id
        systems[arm] = opened.get("", opened)
    evaluation = store.join(config.artifacts, "evaluation")
    if stands(evaluation, "evaluation", config, {"prepared": prepared.id, **ids}, ("evaluate",)):
        table = EvaluationTable.open(evaluation)
    else:
        table = publish_evaluation(evaluation, systems, prepared, config, inputs=ids)
    return Result(inputs.prepared, evaluation, table, trained, systems)


def arm_configs(config: Config, arm: str) -> dict[str, Config]:
    """The runs of an arm: task → configuration for `single`, "" → configuration for all others.

    Raises: ConfigError for an arm that is not known.
    """
    if arm == "single":
        return {
            task.name: changed(config, specialization={"method": "single"}, train={"tasks": [task.name]})
            for task in config.trained_tasks
        }
    if arm == "untrained":
        return {"": changed(config, specialization={"method": "mean"}, train={"steps": 0})}
    if arm not in ARMS:
        raise ConfigError(f"unknown arm {arm!r}; known: {', '.join(ARMS)}")
    return {"": changed(config, specialization={"method": arm})}


def changed(config: Config, **changes: Any) -> Config:
    """The configuration with some values, or some keys of some sections, replaced; checked again."""
    tree = config.model_dump(mode="json")
    for name, value in changes.items():
        tree[name] = tree[name] | value if isinstance(value, dict) else value
    return parse_config(tree, "pipeline")


def make_inputs(config: Config) -> Inputs:
    """Prepared data and, where training wants them, BM25 negatives."""
    from taskspec.data.prepare import prepare, prepare_inputs
    from taskspec.data.prepared import PreparedData
    from taskspec.negatives.bm25 import mine_bm25

    prepared = store.join(config.artifacts, "prepared")
    if not stands(prepared, "prepared-data", config, prepare_inputs(config), ("data", "tasks", "seed")):
        print(prepare(config, prepared).to_text(), flush=True)
    if not config.contrastive.negatives:
        return Inputs(prepared, None)
    data = PreparedData.open(prepared)
    negatives = store.join(config.artifacts, "negatives")
    if not stands(negatives, "negatives", config, {"prepared": data.id}, ("negatives",)):
        counts = mine_bm25(data, config, negatives)
        print(f"{negatives}: BM25 negatives for {len(counts)} tasks", flush=True)
    return Inputs(prepared, negatives)


def stands(uri: str, kind: str, config: Config, inputs: dict[str, str], sections: Sequence[str]) -> bool:
    """Whether an artifact exists for the same inputs and the same values of those sections."""
    if not store.exists(store.join(uri, store.MANIFEST)):
        return False
    manifest = store.read_manifest(uri, kind)
    tree = config.model_dump(mode="json")
    same = manifest.inputs == inputs and all(manifest.config.get(name) == tree[name] for name in sections)
    if same:
        print(f"{uri}: stands already for the same inputs", flush=True)
    return same


def train_and_index(config: Config, inputs: Inputs) -> Trained:
    """Trains one run and builds the index of its best checkpoint."""
    from taskspec.index.build import build_index
    from taskspec.train.checkpoint import training_identity
    from taskspec.train.launch import train
    from taskspec.train.worker import TrainJob

    ids = [store.read_manifest(inputs.prepared, "prepared-data").id]
    if inputs.negatives:
        ids.append(store.read_manifest(inputs.negatives, "negatives").id)
    key = canonical_sha256([training_identity(config), ids])[:8]
    tasks = config.train.tasks or ()
    name = "-".join([config.specialization.method if config.train.steps else "untrained", *tasks, key])
    job = TrainJob(config, inputs.prepared, inputs.negatives, store.join(config.artifacts, "runs", name))
    done = train(job)
    index = store.join(config.artifacts, "indexes", name)
    build_index(config, done.best_uri, inputs.prepared, index)
    return Trained(job.run, done.best_uri, index)


if __name__ == "__main__":
    cli.main(run)
