"""Trains one retriever: prepared data and negatives → a run folder whose best checkpoint is printed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jobs import cli
from taskspec import store


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser("Train one retriever on a Ray cluster. Run again with the same --out to go on.")
    result.add_argument("--prepared", type=store.absolute, help="prepared data; default <artifacts>/prepared")
    result.add_argument("--negatives", type=store.absolute, help="mined negatives; default <artifacts>/negatives")
    result.add_argument("--out", type=store.absolute, help="run folder; default <artifacts>/runs/<method>")
    result.add_argument(
        "--from",
        dest="start",
        type=store.absolute,
        metavar="URI",
        help="start from a checkpoint's weights and sensitivities, for instance to add a task",
    )
    result.add_argument(
        "--plan", action="store_true", help="say what the run will need, and try ten steps, instead of training"
    )
    return result


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the best checkpoint, `last`, and `dev_accuracy` of the best (mean over tasks); with `--plan`,
    `uri` and content of the plan."""
    arguments = build_parser().parse_args(argv)
    config = cli.configuration(arguments)

    prepared = arguments.prepared or store.join(config.artifacts, "prepared")
    negatives = arguments.negatives or store.join(config.artifacts, "negatives")
    cli.require("--prepared", prepared, "prepared-data")
    if config.contrastive.negatives:
        cli.require("--negatives", negatives, "negatives")

    from taskspec import cluster
    from taskspec.train.checkpoint import read_run
    from taskspec.train.launch import plan, train
    from taskspec.train.planning import PLAN_FILE
    from taskspec.train.worker import TrainJob

    run_folder = arguments.out or store.join(config.artifacts, "runs", config.specialization.method)
    if arguments.start and (arguments.plan or read_run(run_folder) is None):  # a run that stands goes on without it
        cli.require("--from", arguments.start, "checkpoint")
    job = TrainJob(
        config=config,
        prepared=prepared,
        negatives=negatives if config.contrastive.negatives else None,
        run=run_folder,
        start=arguments.start,
    )
    cluster.connect(config.cluster)
    if arguments.plan:
        planned = plan(job)
        return {"uri": store.join(job.run, PLAN_FILE), **asdict(planned)}
    done = train(job)
    return {"uri": done.best_uri, "last": done.last_uri, "dev_accuracy": done.best_accuracy}


if __name__ == "__main__":
    cli.main(run)
