"""Builds the index of one checkpoint: prepared passages → embeddings → FAISS shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from jobs import cli
from taskspec import store


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser("Embed all passages by a checkpoint and build their index. Run again to go on.")
    result.add_argument("--checkpoint", type=store.absolute, required=True, help="URI that jobs.train printed")
    result.add_argument("--prepared", type=store.absolute, help="prepared data; default <artifacts>/prepared")
    result.add_argument("--out", type=store.absolute, help="where the index is published; default <artifacts>/index")
    return result


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the index, its `passages`, `shards`, `dimension` and the contract's `fingerprint`."""
    arguments = build_parser().parse_args(argv)
    config = cli.configuration(arguments)

    from taskspec import cluster
    from taskspec.index.build import build_index

    prepared = arguments.prepared or store.join(config.artifacts, "prepared")
    out = arguments.out or store.join(config.artifacts, "index")
    for uri, kind in ((arguments.checkpoint, "checkpoint"), (prepared, "prepared-data")):
        store.read_manifest(uri, kind)  # a wrong URI ends here, before Ray starts
    cluster.connect(config.cluster)
    index = build_index(config, arguments.checkpoint, prepared, out)
    return {
        "uri": out,
        "passages": index.passages,
        "shards": len(index.shards),
        "dimension": index.dimension,
        "fingerprint": index.fingerprint,
    }


if __name__ == "__main__":
    cli.main(run)
