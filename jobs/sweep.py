"""Sweeps specialization strength over seeds on Ray Tune: each trial trains, indexes and evaluates; one table.

Runs are found again by what decides their weights, so a sweep that was interrupted, or is given more strengths or
seeds, makes only what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from jobs import cli
from jobs.pipeline import Inputs, changed, make_inputs, train_and_index
from taskspec import store
from taskspec.config import Config
from taskspec.errors import TrainingError

TRIAL_CPUS = 0.01
"""A trial only waits for the workers and actors that it starts; those reserve their own CPUs."""


def build_parser() -> argparse.ArgumentParser:
    return cli.parser("Train, index and evaluate every strength of sweep.strengths with every seed of sweep.seeds.")


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the table as JSON, and its `rows`: strength, seed, R-precision per task and on average."""
    config = cli.configuration(build_parser().parse_args(argv))

    from taskspec import cluster
    from taskspec.train.launch import needed_cpus

    cluster.connect(config.cluster)
    at_once = config.sweep.concurrent
    cluster.require(f"{at_once} trial(s) at a time", cpus=at_once * needed_cpus(config), wait_s=config.cluster.wait_s)
    rows = sweep(config, make_inputs(config))
    print(f"\n{table_text(rows)}\n", flush=True)
    uri = store.join(config.artifacts, "sweep.json")
    store.write_bytes(uri, json.dumps({"config": config.model_dump(mode="json"), "rows": rows}, indent=1).encode())
    return {"uri": uri, "rows": rows}


def sweep(config: Config, inputs: Inputs) -> list[dict[str, Any]]:
    """One row per trial, by strength and seed. Raises: TrainingError naming the first trial that failed."""
    import tempfile

    from ray import tune

    grid = {
        "strength": tune.grid_search(list(config.sweep.strengths)),
        "seed": tune.grid_search(list(config.sweep.seeds)),
    }
    trials = len(config.sweep.strengths) * len(config.sweep.seeds)
    print(f"sweep: {trials} trials in {config.artifacts}/runs, {config.sweep.concurrent} at a time", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(partial(_trial, config=config, inputs=inputs), {"CPU": TRIAL_CPUS}),
            param_space=grid,
            tune_config=tune.TuneConfig(max_concurrent_trials=config.sweep.concurrent),
            run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0, callbacks=[_progress()]),
        )
        results = tuner.fit()
    for result in results:
        if result.error:
            raise TrainingError(f"trial {result.config}: {str(result.error).strip().splitlines()[-1]}")
    rows = [result.metrics["row"] for result in results]
    return sorted(rows, key=lambda row: (row["strength"], row["seed"]))


def _trial(point: dict[str, Any], config: Config, inputs: Inputs) -> None:
    """Runs in a process of its own, on any node."""
    from ray import tune

    from taskspec import cluster

    cluster.connect(config.cluster)
    one = changed(config, specialization={"method": "taco", "strength": point["strength"]}, seed=point["seed"])
    tune.report({"row": {**point, **measure(one, inputs)}})


def measure(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Trains, indexes and evaluates one configuration. Returns: R-precision per task, average, URIs."""
    from taskspec.data.prepared import PreparedData
    from taskspec.evaluate.run import EvaluationTable, evaluate
    from taskspec.retrieve.retriever import Retriever

    trained = train_and_index(config, inputs)
    prepared = PreparedData.open(inputs.prepared)
    retriever = Retriever.open(trained.checkpoint, trained.index)
    method = config.specialization.method
    table = EvaluationTable(tuple(evaluate(retriever, prepared, prepared.tasks("dev"), config.evaluate, system=method)))
    return {
        "rprec": {task: table.score(task, method) for task in table.tasks},
        "average": table.average(method),
        "checkpoint": trained.checkpoint,
        "index": trained.index,
    }


def _progress() -> Any:
    from ray import tune

    class Progress(tune.Callback):
        """One line per finished trial."""

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            row = result["row"]
            done = sum(one.status == "TERMINATED" for one in trials) + 1
            print(
                f"sweep: strength {row['strength']:g}, seed {row['seed']}: R-precision {100 * row['average']:.1f} "
                f"({done} of {len(trials)} so far)",
                flush=True,
            )

    return Progress()


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """Strength → mean over seeds of the average R-precision, its spread, and the mean per task; in percent."""
    tasks = list(rows[0]["rprec"])
    lines = [["strength", "seeds", "R-precision", "± std", *tasks]]
    for strength in sorted({row["strength"] for row in rows}):
        here = [row for row in rows if row["strength"] == strength]
        averages = [100 * row["average"] for row in here]
        spread = f"{statistics.stdev(averages):.1f}" if len(averages) > 1 else "–"
        means = [f"{100 * statistics.mean(row['rprec'][task] for row in here):.1f}" for task in tasks]
        lines.append([f"{strength:g}", str(len(here)), f"{statistics.mean(averages):.1f}", spread, *means])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    cli.main(run)
