"""A checkpoint and an index of six pages for tests of serving, made in a second."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.serve

from serve.app import build
from serve.arguments import ServeArgs
from taskspec import artifacts
from taskspec.config import Config, parse_config
from taskspec.data.rows import RowStore
from taskspec.index.golden import GOLDEN_FILE, GoldenQuery
from taskspec.index.lexical import Lexical
from taskspec.index.manifest import KIND, LEXICAL_FOLDER, PASSAGES_FILE, IndexManifest, ShardFile
from taskspec.index.page_ids import PageIds
from taskspec.index.recall import MeasuredRecall
from taskspec.index.shard import make_shard
from taskspec.model.contract import Contract
from taskspec.model.encoder import build_encoder
from taskspec.train.checkpoint import open_encoder, publish_checkpoint

TITLES = ("Ceres", "Europa", "Io", "Phobos", "Titan", "Triton")
TEXTS = [f"{title} is a small body number {part} far from the sun" for title in TITLES for part in range(2)]
GOLDEN = "a small body far from the sun"


def configuration(folder: Path) -> Config:
    tree = {
        "name": "tiny",
        "artifacts": str(folder),
        "tasks": [{"name": "nq", "max_query_tokens": 24}, {"name": "fever", "max_query_tokens": 24}],
        "model": {"scratch": {"vocabulary": 200, "width": 16, "layers": 1, "heads": 2}},
    }
    return parse_config(tree, "test")


def publish_model(uri: str, config: Config, seed: int) -> Contract:
    encoder, tokenizer = build_encoder(config.model, TEXTS, seed)
    return publish_checkpoint(uri, config, encoder, tokenizer, step=0, state={}, inputs={}, dev_accuracy={})


def publish_index(uri: str, contract: Contract, checkpoint: str, *, golden_page: str = "0") -> None:
    """Two passages per title, in two shards.    Args: golden_page: what the one golden query should find."""
    titles = [title for title in TITLES for _ in range(2)]
    embeddings_ND = open_encoder(checkpoint).embed_passages(titles, TEXTS)
    facts: dict[str, Any] = {}
    with artifacts.publishing(uri, KIND, inputs={}, config={}, facts=facts) as folder:
        files = []
        for row_start, rows in ((0, 5), (5, 7)):
            shard = make_shard("flat", embeddings_ND[row_start : row_start + rows], row_start)
            shard.save(folder / f"{row_start}.faiss")
            file = ShardFile(file=f"{row_start}.faiss", row_start=row_start, rows=rows, max_norm=shard.max_norm)
            files.append(file)
        table = pa.table(
            {
                "passage_id": [f"{row // 2}:{row % 2}" for row in range(len(TEXTS))],
                "page_row": [row // 2 for row in range(len(TEXTS))],
                "wikipedia_id": [str(row // 2) for row in range(len(TEXTS))],
                "title": titles,
                "text": TEXTS,
            }
        )
        RowStore.write(folder / PASSAGES_FILE, [table])
        PageIds.of(RowStore(folder / PASSAGES_FILE)).save(folder)
        Lexical.build(RowStore(folder / PASSAGES_FILE)).save(folder / LEXICAL_FOLDER)
        golden = GoldenQuery(task="nq", query=GOLDEN, gold_pages=((golden_page,),))
        (folder / GOLDEN_FILE).write_text(golden.model_dump_json() + "\n", encoding="utf-8")
        manifest = IndexManifest(
            contract=contract,
            fingerprint=contract.fingerprint,
            prepared="",
            precision="fp32",
            kind="flat",
            factory="Flat",
            dimension=contract.dimension,
            passages=len(TEXTS),
            shards=tuple(files),
            recall=MeasuredRecall(at=10, wanted=0.95, tasks={}),
            recall_queries=200,
            lexical=True,
        )
        facts.update(manifest.model_dump(mode="json"))


def best_page(checkpoint: str) -> str:
    """What the golden query finds first."""
    encoder = open_encoder(checkpoint)
    passages_ND = encoder.embed_passages([title for title in TITLES for _ in range(2)], TEXTS)
    query_BD, _ = encoder.embed_queries("nq", [GOLDEN])
    return str(int(np.argmax(query_BD @ passages_ND.T)) // 2)


@contextmanager
def serving(args: ServeArgs, port: int, name: str) -> Iterator[str]:
    """One more application of the Serve that runs.    Gives: its URL."""
    ray.serve.run(build(args.model_dump()), name=name, route_prefix=f"/{name}")
    try:
        yield f"http://127.0.0.1:{port}/{name}"
    finally:
        ray.serve.delete(name)
