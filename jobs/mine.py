"""Mines negatives: prepared data → for every train query the best BM25 hits that are of no gold page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jobs import cli
from taskspec import store


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser("Mine lexical negatives of every train query from the prepared passages.")
    result.add_argument("--prepared", type=store.absolute, help="prepared data; default <artifacts>/prepared")
    result.add_argument(
        "--out", type=store.absolute, help="where the negatives are published; default <artifacts>/negatives"
    )
    return result


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the negatives, and under `tasks` the counts of each task."""
    arguments = build_parser().parse_args(argv)
    config = cli.configuration(arguments)

    from taskspec.data.prepared import PreparedData
    from taskspec.negatives.bm25 import mine_bm25

    prepared = arguments.prepared or store.join(config.artifacts, "prepared")
    cli.require("--prepared", prepared, "prepared-data")
    out = arguments.out or store.join(config.artifacts, "negatives")
    counts = mine_bm25(PreparedData.open(prepared), config, out)
    for task, count in counts.items():
        print(
            f"{task}: {count.kept:,} negatives of {count.queries:,} queries kept, {count.dropped:,} hits on gold pages "
            f"dropped, {count.short:,} queries with fewer than {config.negatives.per_query}",
            flush=True,
        )
    return {"uri": out, "tasks": {task: asdict(count) for task, count in counts.items()}}


if __name__ == "__main__":
    cli.main(run)
