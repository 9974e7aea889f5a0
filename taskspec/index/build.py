"""Prepared passages and a checkpoint to an index artifact: embedded on Ray Data, one FAISS shard after another.

Path: prepared data, checkpoint → [here] → retriever.  N passages of a block, D the embedding's dimension. Embedding
runs on the cluster; embeddings come back in row order to this process, which holds one shard at a time: builds it,
looks up dev queries in its embeddings exactly, and checks the file that it wrote.

Resuming: a finished shard is published beside the target as `<out>-shards/shard-00000`, with the contract, the prepared
data and the rows that it was made from; a later run takes it as it is and embeds only what is missing. When all are
there, recall is measured and the index published whole; then the shards beside it are removed.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from taskspec import artifacts, cluster, store
from taskspec.config import Config
from taskspec.data.prepared import PreparedData
from taskspec.data.rows import RowStore
from taskspec.errors import ArtifactError, ConfigError, RecallError
from taskspec.index.checks import require_finite, require_own_rows
from taskspec.index.embed import EmbedPassages
from taskspec.index.golden import GOLDEN_FILE, write_golden
from taskspec.index.kinds import KINDS
from taskspec.index.lexical import Lexical
from taskspec.index.manifest import KIND, LEXICAL_FOLDER, PASSAGE_COLUMNS, PASSAGES_FILE, IndexManifest, ShardFile
from taskspec.index.page_ids import PageIds
from taskspec.index.plan import require_memory
from taskspec.index.recall import MeasuredRecall, exact_answers, measure, right_rows
from taskspec.index.shard import Results, load_shard, make_shard, merge_top_k
from taskspec.machine import own_cpus, own_memory
from taskspec.model.contract import Contract
from taskspec.train import checkpoint as checkpoints
from taskspec.train.checkpoint import open_encoder

SHARD_KIND = "index-shard"
SHARD_FILE = "shard.faiss"
EXACT_FILE = "exact.npz"
"""The exact best rows of the shard for each task's dev queries."""
BATCHES_PER_BLOCK = 4
"""Batches of one Ray Data block: enough to hide a task's overhead, few enough to keep every actor busy."""
PROGRESS_S = 5.0
"""Seconds between two lines of progress."""
COPIED_ROWS = 16_384
"""Passages in memory at a time while the text store is written."""


@dataclass(frozen=True)
class Source:
    """What an index is built from."""

    config: Config
    checkpoint: artifacts.Artifact
    contract: Contract
    prepared: PreparedData

    @property
    def inputs(self) -> dict[str, str]:
        return {"checkpoint": self.checkpoint.id, "prepared": self.prepared.id}

    @cached_property
    def dev_queries(self) -> dict[str, np.ndarray]:
        """Task → embeddings (B, D) of the dev queries that recall is measured with, of tasks that have some."""
        encoder = open_encoder(self.checkpoint.uri)
        have = self.prepared.tasks("dev")
        found = {}
        for task in (task.name for task in self.contract.tasks if task.name in have):
            queries = self.prepared.queries(task, "dev")
            count = min(self.config.index.recall_queries, len(queries))
            rows = np.linspace(0, len(queries) - 1, count).astype(np.int64)  # from all over the file
            found[task], _ = encoder.embed_queries(task, queries.take(rows, ["text"])["text"])
        return found


@dataclass(frozen=True)
class PlannedShard:
    """The rows of one shard, and where it lies when it is finished."""

    uri: str
    row_start: int
    rows: int

    def key(self, source: Source) -> dict[str, str | int]:
        """What decides the shard's content: a finished one with the same key need not be built again."""
        return {
            "fingerprint": source.contract.fingerprint,
            "prepared": source.prepared.id,
            "precision": source.config.index.precision,
            "kind": source.config.index.kind,
            "recall_at": source.config.index.recall_at,
            "recall_queries": source.config.index.recall_queries,
            "row_start": self.row_start,
            "rows": self.rows,
        }

    def finished(self, source: Source) -> artifacts.Artifact | None:
        """The shard, if it has been published whole from the same source."""
        try:
            artifact = artifacts.open_artifact(self.uri, SHARD_KIND, verify=True)
        except ArtifactError:
            return None
        return artifact if self.key(source).items() <= artifact.manifest.facts.items() else None


def plan_shards(out: str, passages: int, shards: int) -> list[PlannedShard]:
    """Cuts the rows into runs whose lengths differ by one at most."""
    cuts = [number * passages // shards for number in range(shards + 1)]
    return [
        PlannedShard(
            store.join(_shards_folder(out), f"shard-{number:05d}"), cuts[number], cuts[number + 1] - cuts[number]
        )
        for number in range(shards)
    ]


def _shards_folder(out: str) -> str:
    return f"{out.rstrip('/')}-shards"


def build_index(config: Config, checkpoint: str, prepared: str, out: str) -> IndexManifest:
    """Embeds prepared passages by a checkpoint and publishes their index at `out`. Ray must be connected.

    An index of the same contract, passages and shards that stands there is left as it is.
    Raises: ArtifactError, ConfigError, PlacementError, RecallError, StoreError.
    """
    opened = artifacts.open_artifact(checkpoint, checkpoints.KIND, verify=True)  # fails here rather than in an actor
    contract = Contract.model_validate(opened.manifest.facts["contract"])
    source = Source(config, opened, contract, PreparedData.open(prepared))
    passages = len(source.prepared.passages)
    if config.index.shards > passages:
        raise ConfigError(f"index.shards is {config.index.shards} but {prepared} has {passages} passages; ask for less")
    plan = plan_shards(out, passages, config.index.shards)
    standing = _standing_index(out, source, plan)
    if standing is not None:
        artifacts.remove(_shards_folder(out))  # what a job that was killed after publishing left
        print(f"index: {out} stands already, of the same model, passages and shards", flush=True)
        return standing
    started = time.monotonic()
    missing = [shard for shard in plan if shard.finished(source) is None]
    if len(missing) < len(plan):
        print(f"index: {len(plan) - len(missing)} of {len(plan)} shards stand already", flush=True)
    if missing:
        rows = max(shard.rows for shard in missing)
        require_memory(config.index.kind, rows, contract.dimension, own_memory())
        _build_shards(source, missing)
    with suppress(ArtifactError):
        if artifacts.read_manifest(out, KIND).facts.get("fingerprint") != contract.fingerprint:
            print(f"index: replaces that of another model at {out}, which no endpoint can open any more", flush=True)
    manifest = _publish(out, source, plan)
    artifacts.remove(_shards_folder(out))
    shards = "1 shard" if len(plan) == 1 else f"{len(plan)} shards"
    print(f"index: {passages:,} passages in {shards}, {time.monotonic() - started:.0f} s, {out}", flush=True)
    return manifest


def _standing_index(out: str, source: Source, plan: Sequence[PlannedShard]) -> IndexManifest | None:
    if not store.exists(store.join(out, artifacts.MANIFEST)):
        return None
    try:
        manifest = IndexManifest.of(out, artifacts.require_whole(out, KIND))
    except ArtifactError as error:
        print(f"index: {error}: that is done now", flush=True)
        return None
    index = source.config.index
    if manifest.lexical != index.lexical or any(one.chosen_at < index.recall for one in manifest.recall.tasks.values()):
        return None
    wanted = [shard.key(source) for shard in plan]
    stands = [
        {
            "fingerprint": manifest.fingerprint,
            "prepared": manifest.prepared,
            "precision": manifest.precision,
            "kind": manifest.kind,
            "recall_at": manifest.recall.at,
            "recall_queries": manifest.recall_queries,
            "row_start": shard.row_start,
            "rows": shard.rows,
        }
        for shard in manifest.shards
    ]
    return manifest if stands == wanted else None


def _build_shards(source: Source, missing: Sequence[PlannedShard]) -> None:
    """Embeds the rows of the missing shards in one pass and publishes each shard as soon as it is full."""
    actors, gpu = source.config.index.actors, source.config.index.gpu
    cluster.require(
        f"index with {actors} embedding actors and one reading task",
        cpus=actors + 1,
        gpus=actors if gpu else 0,
        wait_s=source.config.cluster.wait_s,
    )
    blocks = _embedded(source, missing)
    rest_ND = np.empty((0, source.contract.dimension), dtype=np.float32)
    for planned in missing:
        embeddings_ND = np.empty((planned.rows, source.contract.dimension), dtype=np.float32)
        filled = 0
        while filled < planned.rows:
            block_ND = rest_ND if len(rest_ND) else next(blocks)
            taken = min(len(block_ND), planned.rows - filled)
            embeddings_ND[filled : filled + taken] = block_ND[:taken]
            rest_ND, filled = block_ND[taken:], filled + taken
        publish_shard(source, planned, embeddings_ND)


def publish_shard(source: Source, planned: PlannedShard, embeddings_ND: np.ndarray) -> None:
    """Builds a shard, answers dev queries exactly from its embeddings, and publishes both where the next run looks.

    Raises: ArtifactError if the shard, read from its file, does not find its own rows.
    """
    index = source.config.index
    shard = make_shard(index.kind, embeddings_ND, planned.row_start)
    facts = planned.key(source) | {"max_norm": shard.max_norm}
    tree = source.config.model_dump(mode="json")
    with artifacts.publishing(planned.uri, SHARD_KIND, inputs=source.inputs, config=tree, facts=facts) as folder:
        shard.save(folder / SHARD_FILE)
        written = load_shard(folder / SHARD_FILE, index.kind, planned.row_start, shard.max_norm)
        require_own_rows(written, embeddings_ND, planned.uri)
        exact = {
            task: exact_answers(embeddings_ND, planned.row_start, queries_BD, index.recall_at)
            for task, queries_BD in source.dev_queries.items()
        }
        arrays: dict[str, Any] = {f"{task}.scores": one.scores_BK for task, one in exact.items()}
        arrays |= {f"{task}.rows": one.rows_BK for task, one in exact.items()}
        np.savez(folder / EXACT_FILE, **arrays)


def _embedded(source: Source, missing: Sequence[PlannedShard]) -> Iterator[np.ndarray]:
    """Embeddings (N, D) of the shards' rows, block after block, in order.

    Raises: ArtifactError if one is not finite.
    """
    import ray.data

    cluster.prepare_ray_data()
    index = source.config.index
    total = sum(shard.rows for shard in missing)
    threads = max(1, own_cpus() // index.actors)  # as if all actors shared one node like this one
    dataset = (
        ray.data.range(total, override_num_blocks=-(-total // (BATCHES_PER_BLOCK * index.batch_size)))
        .map_batches(read_passages, batch_size=None, fn_args=(source.prepared, missing))
        .map_batches(
            EmbedPassages,
            batch_size=index.batch_size,
            compute=ray.data.ActorPoolStrategy(size=index.actors),
            num_gpus=1 if index.gpu else None,
            fn_constructor_args=(source.checkpoint.uri, threads, index.precision, "cuda" if index.gpu else "cpu"),
        )
    )
    done, last_done, last_line = 0, 0, time.monotonic()
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        rows_N, embedding_ND = block["row"], block["embedding"]
        assert np.array_equal(rows_N, global_rows(np.arange(done, done + len(rows_N)), missing)), "blocks are in order"
        require_finite(rows_N, embedding_ND, source.checkpoint.uri)
        yield embedding_ND
        done += len(rows_N)
        now = time.monotonic()
        if now - last_line >= PROGRESS_S:
            rate = (done - last_done) / (now - last_line)
            print(f"index: {done:,}/{total:,} passages, {rate:,.0f}/s", flush=True)
            last_done, last_line = done, now


def global_rows(positions: np.ndarray, shards: Sequence[PlannedShard]) -> np.ndarray:
    """Global rows of positions that count through the rows of these shards, one after the other."""
    first = np.cumsum([0, *(shard.rows for shard in shards[:-1])])
    number = np.searchsorted(first, positions, side="right") - 1
    starts = np.array([shard.row_start for shard in shards])
    return np.asarray(starts[number] + positions - first[number], dtype=np.int64)


def read_passages(
    batch: dict[str, np.ndarray], prepared: PreparedData, shards: Sequence[PlannedShard]
) -> dict[str, np.ndarray]:
    """Ray Data's task: positions under `id` → row, title and text of the passages there."""
    rows = global_rows(batch["id"], shards)
    texts = prepared.passages.take(rows, ["title", "text"])
    return {"row": rows} | {name: np.array(values, dtype=object) for name, values in texts.items()}


def measure_recall(source: Source, plan: Sequence[PlannedShard]) -> MeasuredRecall:
    """What the finished shards find of the exact answers to the tasks' dev queries.

    Raises: RecallError where a task's recall is below `index.recall`, whatever the effort.
    """
    index = source.config.index
    shards, parts = [], []
    for planned in plan:
        artifact = artifacts.open_artifact(planned.uri, SHARD_KIND)
        max_norm = artifact.manifest.facts["max_norm"]
        shards.append(load_shard(artifact.folder / SHARD_FILE, index.kind, planned.row_start, max_norm))
        parts.append(np.load(artifact.folder / EXACT_FILE))
    right = {
        task: right_rows([Results(part[f"{task}.scores"], part[f"{task}.rows"]) for part in parts], index.recall_at)
        for task in source.dev_queries
    }

    def search(queries_BD: np.ndarray, top_k: int, effort: int | None) -> Results:
        return merge_top_k([shard.search(queries_BD, top_k, effort) for shard in shards], top_k)

    found = measure(index.kind, search, source.dev_queries, right, at=index.recall_at, wanted=index.recall)
    short = {task: one for task, one in found.tasks.items() if index.kind != "flat" or one.value < 1}
    if found.tasks and not short:
        print(f"index: the dev queries of every task find all of the exact best {index.recall_at}", flush=True)
    for task, one in short.items():
        chosen = f", {100 * one.chosen_at:.1f}% of the others, which chose {KINDS[index.kind].effort} {one.effort}"
        print(
            f"index: {task} finds {100 * one.value:.1f}% ({100 * one.low:.1f} to {100 * one.high:.1f}) of the exact "
            f"best {index.recall_at}, {one.queries} dev queries{chosen if one.effort else ''}",
            flush=True,
        )
    if found.missed:
        task, worst = min(found.missed.items(), key=lambda item: item[1].chosen_at)
        by = " by the queries that choose" if worst.effort else ""
        raise RecallError(
            f"index.kind {index.kind} finds {worst.chosen_at:.3f} of the exact best {index.recall_at} of task {task}"
            f"{by}, index.recall asks for {index.recall}; take another index.kind, or lower index.recall to "
            f"{math.floor(1000 * worst.chosen_at) / 1000} at most: the finished shards are kept"
        )
    return found


def _publish(out: str, source: Source, plan: Sequence[PlannedShard]) -> IndexManifest:
    recall = measure_recall(source, plan)
    facts: dict[str, object] = {}
    tree = source.config.model_dump(mode="json")
    with artifacts.publishing(out, KIND, inputs=source.inputs, config=tree, facts=facts) as folder:
        (folder / "shards").mkdir()
        files = []
        for number, planned in enumerate(plan):
            artifact = artifacts.open_artifact(planned.uri, SHARD_KIND)
            name = f"shards/{number:05d}.faiss"
            _place(artifact.folder / SHARD_FILE, folder / name)
            files.append(
                ShardFile(
                    file=name,
                    row_start=planned.row_start,
                    rows=planned.rows,
                    max_norm=artifact.manifest.facts["max_norm"],
                )
            )
        passages = RowStore.write(folder / PASSAGES_FILE, _text_tables(source.prepared.passages))
        PageIds.of(source.prepared.passages).save(folder)
        if source.config.index.lexical:
            Lexical.build(source.prepared.passages).save(folder / LEXICAL_FOLDER)
        write_golden(folder / GOLDEN_FILE, source.prepared, [task.name for task in source.contract.tasks])
        manifest = IndexManifest(
            contract=source.contract,
            fingerprint=source.contract.fingerprint,
            prepared=source.prepared.id,
            precision=source.config.index.precision,
            kind=source.config.index.kind,
            factory=KINDS[source.config.index.kind].factory(plan[0].rows, source.contract.dimension),
            dimension=source.contract.dimension,
            passages=passages,
            shards=tuple(files),
            recall=recall,
            lexical=source.config.index.lexical,
            recall_queries=source.config.index.recall_queries,
        )
        facts.update(manifest.model_dump(mode="json"))
    return manifest


def _place(source: Path, target: Path) -> None:
    """Gives a finished file a second name; copies it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _text_tables(passages: RowStore) -> Iterator[pa.Table]:
    schema = pa.schema([passages.schema.field(name) for name in PASSAGE_COLUMNS])
    for start in range(0, len(passages), COPIED_ROWS):
        rows = range(start, min(start + COPIED_ROWS, len(passages)))
        yield pa.table(passages.take(rows, PASSAGE_COLUMNS), schema=schema)
