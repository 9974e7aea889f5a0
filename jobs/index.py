"""Builds the index of one checkpoint: prepared passages → embeddings → FAISS shards; or says which kinds would fit."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jobs import cli
from taskspec import artifacts, store
from taskspec.config import Config
from taskspec.errors import ConfigError
from taskspec.machine import own_cpus, own_memory


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser("Embed all passages by a checkpoint and build their index. Run again to go on.")
    result.add_argument("--checkpoint", type=store.absolute, help="URI that jobs.train printed")
    result.add_argument("--prepared", type=store.absolute, help="prepared data; default <artifacts>/prepared")
    result.add_argument("--out", type=store.absolute, help="where the index is published; default <artifacts>/index")
    plan = result.add_argument_group("planning", "index.recall of the configuration is what is asked of a kind")
    plan.add_argument("--plan", action="store_true", help="say which kinds of index fit, instead of building one")
    plan.add_argument("--passages", type=_count, help="with --plan: how many, where nothing is prepared yet")
    plan.add_argument("--dimension", type=_count, help="with --plan: of an embedding, where there is no checkpoint yet")
    plan.add_argument("--nodes", type=_count, default=1, help="with --plan: nodes that serve the index")
    plan.add_argument("--node-gb", type=_amount, help="with --plan: memory of a node; default that of this machine")
    plan.add_argument("--node-cores", type=_count, help="with --plan: default those of this machine")
    plan.add_argument("--latency-ms", type=_amount, help="with --plan: longest search for one query")
    return result


def _count(text: str) -> int:
    try:
        number = float(text)  # 36e6 is easier to read than its zeros
        if number >= 1 and number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 on but is {text}")


def _amount(text: str) -> float:
    try:
        if 0 < (number := float(text)) < math.inf:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number above 0 but is {text}")


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the index, its `passages`, `shards`, `dimension`, `kind`, `recall` and the contract's
    `fingerprint`; with `--plan`, `uri` and content of the plan."""
    arguments = build_parser().parse_args(argv)
    config = cli.configuration(arguments)
    prepared = arguments.prepared or store.join(config.artifacts, "prepared")
    out = arguments.out or store.join(config.artifacts, "index")
    if arguments.plan:
        return plan(arguments, config, prepared, f"{out}-plan.json")

    from taskspec import cluster
    from taskspec.index.build import build_index

    if arguments.checkpoint is None:
        raise ConfigError("--checkpoint is missing: name the URI that jobs.train printed")
    cli.require("--checkpoint", arguments.checkpoint, "checkpoint")
    cli.require("--prepared", prepared, "prepared-data")
    cluster.connect(config.cluster)
    index = build_index(config, arguments.checkpoint, prepared, out)
    return {
        "uri": out,
        "passages": index.passages,
        "shards": len(index.shards),
        "dimension": index.dimension,
        "kind": index.kind,
        "recall": {task: one.value for task, one in index.recall.tasks.items()},
        "fingerprint": index.fingerprint,
    }


def plan(arguments: argparse.Namespace, config: Config, prepared: str, out: str) -> dict[str, Any]:
    """Prints which kinds fit and keeps the plan at `out`.

    Raises: PlacementError if none does; ConfigError if neither artifacts nor numbers say how large the index is.
    """
    from taskspec.data.prepared import PreparedData
    from taskspec.index.plan import Budget, plan_index
    from taskspec.index.probe import embedding_seconds, measure_speeds
    from taskspec.train.checkpoint import read_contract

    if (arguments.dimension is None) == (arguments.checkpoint is None):
        raise ConfigError("--plan needs either --checkpoint URI or the --dimension of its embeddings")
    passages, embed_s = arguments.passages, None
    dimension = arguments.dimension or read_contract(arguments.checkpoint).dimension
    data = None
    if passages is None or store.exists(store.join(prepared, artifacts.MANIFEST)):
        data = PreparedData.open(prepared)
        passages = passages or len(data.passages)
    if data is not None and arguments.checkpoint is not None and not config.index.gpu:
        # The probe takes all cores of this machine, as the actors of a node do together.
        nodes = min(arguments.nodes, config.index.actors)
        embed_s = embedding_seconds(arguments.checkpoint, data, config.index.precision) * passages / nodes
    budget = Budget(
        nodes=arguments.nodes,
        node_bytes=int(1e9 * arguments.node_gb) if arguments.node_gb else own_memory(),
        node_cores=arguments.node_cores or own_cpus(),
        latency_s=arguments.latency_ms / 1000 if arguments.latency_ms else None,
        recall=config.index.recall,
    )
    planned = plan_index(passages, dimension, budget, measure_speeds(dimension), embed_s)
    print(planned.to_text(), flush=True)
    chosen = planned.chosen
    print(f"the most exact that fits: --set index.kind={chosen.kind} --set index.shards={chosen.shards}", flush=True)
    content = asdict(planned)
    store.write_bytes(out, json.dumps(content, indent=1).encode())
    return {"uri": out, **content, "chosen": chosen.kind}


if __name__ == "__main__":
    cli.main(run)
