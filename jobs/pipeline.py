"""The whole path by URIs: prepare → BM25 negatives → train → index → evaluate; what exists is not made again.

A run is found again by what decides its weights, so a changed configuration trains beside the old run. Several ways to
train are compared by `jobs.sweep`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs import cli
from taskspec import artifacts, store
from taskspec.config import Config, canonical_sha256

if TYPE_CHECKING:
    from taskspec.data.prepared import PreparedData
    from taskspec.evaluate.run import EvaluationTable
    from taskspec.retrieve.retriever import Searcher
    from taskspec.train.checkpoint import Run


class Inputs(NamedTuple):
    """URIs that every run starts from."""

    prepared: str
    negatives: str | None

    def ids(self) -> list[str]:
        """Of the artifacts, in the order of the fields."""
        ids = [artifacts.read_manifest(self.prepared, "prepared-data").id]
        return [*ids, artifacts.read_manifest(self.negatives, "negatives").id] if self.negatives else ids


@dataclass(frozen=True)
class Trained:
    """One run and the index of its best checkpoint."""

    run: str
    checkpoint: str
    index: str


class Result(NamedTuple):
    """What a pipeline made."""

    prepared: str
    evaluation: str
    table: EvaluationTable
    trained: dict[str, Trained]
    """By system."""


def build_parser() -> argparse.ArgumentParser:
    return cli.parser("Run everything from KILT files to an evaluation table; run again to go on.")


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the evaluation, and the URIs of run, checkpoint and index."""
    config = cli.configuration(build_parser().parse_args(argv))
    system = config.specialization.method if config.train.steps else "untrained"
    result = run_pipeline(config, {system: config})
    print(f"\n{result.table.to_text()}\n", flush=True)
    return {"uri": result.evaluation, **asdict(result.trained[system])}


def run_pipeline(config: Config, systems: Mapping[str, Config]) -> Result:
    """Makes what is missing and evaluates every system beside BM25.

    Args: config: of the inputs and the evaluation. systems: name → configuration to train.
    Raises: what its stages raise.
    """
    from taskspec import cluster
    from taskspec.data.prepared import PreparedData
    from taskspec.evaluate.run import EvaluationTable, publish_evaluation

    cluster.connect(config.cluster)
    inputs = make_inputs(config)
    trained = {system: train_and_index(one, inputs) for system, one in systems.items()}

    prepared = PreparedData.open(inputs.prepared)
    ids = {f"index/{system}": artifacts.read_manifest(one.index, "index").id for system, one in trained.items()}
    evaluation = store.join(config.artifacts, "evaluation")
    keys = {"evaluate": config.evaluate.model_dump(mode="json")}
    if artifacts.standing(evaluation, "evaluation", inputs={"prepared": prepared.id, **ids}, config=keys):
        table = EvaluationTable.open(evaluation)
    else:
        table = publish_evaluation(evaluation, open_systems(systems, trained, prepared), prepared, config, inputs=ids)
    return Result(inputs.prepared, evaluation, table, trained)


def open_systems(
    systems: Mapping[str, Config], trained: Mapping[str, Trained], prepared: PreparedData
) -> dict[str, Searcher | dict[str, Searcher]]:
    """What a pipeline evaluates: BM25, and the trained systems on the tasks that they were trained on."""
    from taskspec.negatives.bm25 import BM25
    from taskspec.retrieve.retriever import Retriever

    opened: dict[str, Searcher | dict[str, Searcher]] = {"bm25": BM25.build(prepared)}
    for system, one in trained.items():
        retriever = Retriever.open(one.checkpoint, one.index)
        opened[system] = dict.fromkeys((task.name for task in systems[system].trained_tasks), retriever)
    return opened


def make_inputs(config: Config) -> Inputs:
    """Prepared data and, where training wants them, BM25 negatives."""
    from taskspec.data.prepare import prepare
    from taskspec.data.prepared import PreparedData
    from taskspec.negatives.bm25 import mine_bm25

    prepared = store.join(config.artifacts, "prepared")
    print(prepare(config, prepared).to_text(), flush=True)
    if not config.contrastive.negatives:
        return Inputs(prepared, None)
    negatives = store.join(config.artifacts, "negatives")
    counts = mine_bm25(PreparedData.open(prepared), config, negatives)
    print(f"{negatives}: BM25 negatives for {len(counts)} tasks", flush=True)
    return Inputs(prepared, negatives)


def train_and_index(config: Config, inputs: Inputs) -> Trained:
    """Trains one run and builds the index of its best checkpoint."""
    from taskspec.index.build import build_index

    done = train_run(config, inputs)
    index = store.join(config.artifacts, "indexes", done.uri.rpartition("/")[2])
    build_index(config, done.best_uri, inputs.prepared, index)
    return Trained(done.uri, done.best_uri, index)


def train_run(config: Config, inputs: Inputs) -> Run:
    """Trains, or finds trained, the run of a configuration in `<artifacts>/runs`."""
    from taskspec.train.checkpoint import encoder_id, run_identity
    from taskspec.train.launch import train
    from taskspec.train.worker import TrainJob

    key = canonical_sha256([run_identity(config), encoder_id(config), inputs.ids()])[:8]
    method = config.specialization.method if config.train.steps else "untrained"
    name = "-".join([method, *(config.train.tasks or ()), key])
    return train(TrainJob(config, inputs.prepared, inputs.negatives, store.join(config.artifacts, "runs", name)))


if __name__ == "__main__":
    cli.main(run)
