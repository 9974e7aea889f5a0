"""What streaming costs: the training loop fed by Ray Data over the same loop on batches made beforehand.

    python benchmarks/loop.py

Both are runs on Ray Train with the same workers, in turn; the layers of step.py's medium encoder (18.9 M parameters)
with the vocabulary that the texts make, on the generated world of world.py. Steps after the first eight count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.pipeline import make_inputs
from taskspec import cluster, store
from taskspec.config import Config, load_config
from taskspec.data.batches import StepBatches
from taskspec.train.launch import fit, start_run, stream_batches
from taskspec.train.worker import Batches, TrainJob, local_batches, read_metrics

WARM_UP = 8


def preloaded(job: TrainJob, tokenizer: Any, rank: int, workers: int, start: int) -> Iterator[StepBatches]:
    """All batches of the run, made before the first step."""
    return iter(list(local_batches(job, tokenizer, rank, workers, start)))


def seconds_per_step(job: TrainJob, batches: Batches) -> float:
    """Trains and measures; the first steps, checkpoints and evaluation are left out."""
    start_run(job)
    fit(job, batches)
    lines = read_metrics(job.run)
    # Of the whole window: batches come in blocks, so that waiting is uneven over steps.
    return sum(line["seconds"] for line in lines if line["step"] > WARM_UP) / (lines[-1]["step"] - WARM_UP)


def configuration(folder: str, steps: int, workers: int) -> Config:
    values = [
        f"artifacts={folder}",
        "model.scratch={vocabulary: 4000, width: 512, layers: 6, heads: 8}",
        f"train.steps={steps}",
        f"train.workers={workers}",
        "train.distribution=sharded",
        f"train.checkpoint_every={steps}",
        f"train.log_every={WARM_UP}",
        "train.dev_queries=2",
        "mixing.queries_per_step=64",
        "contrastive.negatives=2",
        "negatives.per_query=2",
    ]
    return load_config(Path(__file__).parent / "world.yaml", values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(folder, arguments.steps, arguments.workers)
        cluster.connect(config.cluster)
        inputs = make_inputs(config)
        ratios = []
        for pair in range(arguments.pairs):
            times = []
            for batches in (stream_batches, preloaded):
                run = store.join(folder, "runs", f"{batches.__name__}-{pair}")
                times.append(seconds_per_step(TrainJob(config, inputs.prepared, inputs.negatives, run), batches))
            ratios.append(times[0] / times[1])
            print(f"pair {pair + 1}: {times[0]:.2f} s and {times[1]:.2f} s a step: {ratios[-1]:.3f}", flush=True)
    print(f"Ray Data over preloaded batches: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
