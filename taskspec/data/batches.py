"""Query rows to `TaskBatch`: token ids of one task's queries, their positives and negatives, as one worker needs them.

Path: plan → [here] → stream → worker.  B this worker's queries, N its passages, L tokens, G gold pages of the query
that has most. `BatchMaker` knows no Ray; the stream calls it in its actors, tests call it in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor

from taskspec import artifacts
from taskspec.data.plan import Plan, worker_slice
from taskspec.data.prepared import PreparedData
from taskspec.data.rows import RowStore
from taskspec.errors import ArtifactError, DataError

PADDING_PAGE = -1


class TokenArrays(Protocol):
    """What a tokenizer returns: (B, L) int64 ids and mask."""

    @property
    def ids_BL(self) -> np.ndarray: ...
    @property
    def mask_BL(self) -> np.ndarray: ...


class Tokenize(Protocol):
    """Texts to padded token ids, prompts included (`model.prompts.TextTokenizer`)."""

    def queries(self, task: str, texts: Sequence[str]) -> TokenArrays: ...
    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> TokenArrays: ...


@dataclass(frozen=True, kw_only=True)
class TaskBatch:
    """One worker's part of one task's batch in one step.

    All workers hold the same number of rows: where a task's queries do not divide evenly, rows of weight 0 fill up.
    Passages stand positives first: passage i < B is the positive of query i, the negatives follow query by query.
    """

    query_ids_BL: Tensor
    query_mask_BL: Tensor
    query_weight_B: Tensor
    """float32: 1 / queries of this task over all workers, or 0 for a filling row. They sum to 1 over the workers."""
    gold_page_BG: Tensor
    """int64 page rows of every evidence set, padded with −1."""
    passage_ids_NL: Tensor
    passage_mask_NL: Tensor
    passage_page_N: Tensor
    """int64 page row of each passage; −1 for a filling row, which is nobody's negative."""

    def to(self, device: str | torch.device) -> TaskBatch:
        return TaskBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


StepBatches = dict[str, TaskBatch]
"""Task → batch, in the order of the configuration's tasks."""


def to_bytes(batches: StepBatches) -> bytes:
    """A step's batches as one safetensors blob, to travel through Ray's object store."""
    tensors = {f"{task}/{name}": tensor for task, batch in batches.items() for name, tensor in vars(batch).items()}
    return safetensors.torch.save(tensors)


def from_bytes(blob: bytes, tasks: Sequence[str]) -> StepBatches:
    """The inverse of `to_bytes`; `tasks` gives the order, and may name some that the blob does not hold."""
    tensors = safetensors.torch.load(blob)
    names = TaskBatch.__dataclass_fields__
    held = {name.partition("/")[0] for name in tensors}
    return {task: TaskBatch(**{name: tensors[f"{task}/{name}"] for name in names}) for task in tasks if task in held}


class GivenNegatives:
    """The negatives artifact, memory-resident per task: query row → passage rows, best first.

    Raises: ArtifactError if the negatives were mined from other prepared data.
    """

    def __init__(self, uri: str, prepared: PreparedData, tasks: Sequence[str]) -> None:
        artifact = artifacts.open_artifact(uri, "negatives")
        made_from = artifact.manifest.inputs.get("prepared")
        if made_from != prepared.id:
            raise ArtifactError(
                f"{uri}: was mined from prepared data {str(made_from)[:12]}, this is {prepared.id[:12]}; "
                f"mine again with: python -m jobs.mine"
            )
        self._rows = {task: self._load(artifact.folder, uri, task) for task in tasks}

    @staticmethod
    def _load(folder: Path, uri: str, task: str) -> tuple[np.ndarray, np.ndarray]:
        path = folder / f"{task}.parquet"
        if not path.is_file():
            raise ArtifactError(f"{uri}: has no negatives for task {task!r}; mine again with: python -m jobs.mine")
        lists = pq.read_table(path, columns=["passage_rows"])["passage_rows"].combine_chunks()
        return lists.offsets.to_numpy(), lists.values.to_numpy()

    def of(self, task: str, row: int) -> np.ndarray:
        """Passage rows of one query's negatives; may be empty."""
        offsets, values = self._rows[task]
        result: np.ndarray = values[offsets[row] : offsets[row + 1]]
        return result


class BatchMaker:
    """Makes one worker's batches of any step.

    Draws (which positive, which negatives) are those of the whole batch, so a worker's part does not depend on how
    many workers there are.
    """

    def __init__(
        self,
        plan: Plan,
        prepared: PreparedData,
        tokenize: Tokenize,
        *,
        negatives: GivenNegatives | None,
        negatives_per_query: int,
        rank: int = 0,
        workers: int = 1,
        tasks: Sequence[str] | None = None,
    ) -> None:
        """Args: tasks: make batches of these only, in the plan's order; None is all.
        Raises: DataError if negatives are asked for and none are given.
        """
        if negatives_per_query and negatives is None:
            raise DataError(
                f"contrastive.negatives is {negatives_per_query} but no negatives are given; "
                f"mine them with python -m jobs.mine, or set contrastive.negatives=0"
            )
        self.plan = plan
        self.prepared = prepared
        self.tokenize = tokenize
        self.negatives = negatives
        self.negatives_per_query = negatives_per_query
        self.rank, self.workers = rank, workers
        self.tasks = tuple(task for task in plan.batch if tasks is None or task in tasks)
        self._passages = prepared.passages
        self._queries = {task: prepared.queries(task, "train") for task in self.tasks}

    def step(self, step: int) -> StepBatches:
        """The tasks' batches in one step."""
        return {task: self._task(task, step) for task in self.tasks}

    def _task(self, task: str, step: int) -> TaskBatch:
        row_B = self.plan.rows(task, step)
        generator = self.plan.random(task, step)
        queries = self._queries[task].take(row_B, ["text", "positives", "gold_page_rows"])
        positive_B = [options[int(generator.integers(len(options)))] for options in queries["positives"]]
        negative_BN = [self._draw(task, int(row), generator) for row in row_B]
        part = worker_slice(len(row_B), self.rank, self.workers)
        longest = -(-len(row_B) // self.workers)
        return make_batch(
            self.tokenize,
            self._passages,
            task,
            queries["text"][part],
            queries["gold_page_rows"][part],
            positive_B[part],
            negative_BN[part],
            queries_in_all=len(row_B),
            rows=longest,
            negatives_per_query=self.negatives_per_query,
        )

    def _draw(self, task: str, row: int, generator: np.random.Generator) -> list[int]:
        """Negatives of one query without repetition; random passages where too few are given."""
        wanted = self.negatives_per_query
        if not wanted or self.negatives is None:
            return []
        given = self.negatives.of(task, row)
        chosen = given[generator.permutation(len(given))[:wanted]]
        missing = wanted - len(chosen)
        return [*chosen.tolist(), *generator.integers(len(self._passages), size=missing).tolist()]


def make_batch(
    tokenize: Tokenize,
    passages: RowStore,
    task: str,
    texts: Sequence[str],
    gold_pages: Sequence[Sequence[int]],
    positives: Sequence[int],
    negatives: Sequence[Sequence[int]],
    *,
    queries_in_all: int,
    rows: int,
    negatives_per_query: int,
) -> TaskBatch:
    """Tokenizes a worker's part of a task's queries and their passages, filled up to `rows` queries.

    Args: gold_pages, positives, negatives: per query, page rows and passage rows; the same number of negatives for
        each. queries_in_all: the task's queries over all workers.
    """
    filling = rows - len(texts)
    positive_B = [*positives, *[0] * filling]
    negative_BN = [*negatives, *[[0] * negatives_per_query] * filling]
    taken = passages.take(
        [*positive_B, *(row for group in negative_BN for row in group)], ["title", "text", "page_row"]
    )
    page_N = np.array(taken["page_row"], dtype=np.int64)
    page_N[len(texts) : rows] = PADDING_PAGE
    page_N[rows + len(texts) * negatives_per_query :] = PADDING_PAGE
    gold_BG = np.full((rows, max([1, *map(len, gold_pages)])), PADDING_PAGE, dtype=np.int64)
    for number, pages in enumerate(gold_pages):
        gold_BG[number, : len(pages)] = pages
    weight_B = np.zeros(rows, dtype=np.float32)
    weight_B[: len(texts)] = 1 / queries_in_all
    query = tokenize.queries(task, [*texts, *[""] * filling])
    passage = tokenize.passages(taken["title"], taken["text"])
    arrays = {
        "query_ids_BL": query.ids_BL,
        "query_mask_BL": query.mask_BL,
        "query_weight_B": weight_B,
        "gold_page_BG": gold_BG,
        "passage_ids_NL": passage.ids_BL,
        "passage_mask_NL": passage.mask_BL,
        "passage_page_N": page_N,
    }
    return TaskBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def dev_batches(
    prepared: PreparedData,
    tokenize: Tokenize,
    tasks: Sequence[str],
    *,
    queries: int,
    seed: int,
    rank: int = 0,
    workers: int = 1,
) -> StepBatches:
    """One fixed batch of each task's dev queries with their first gold passage, this worker's part; no negatives.

    Args: queries: at most this many per task, chosen by the seed. Tasks without dev queries are left out.
    """
    result = {}
    for task in tasks:
        if task not in prepared.tasks("dev") or not len(rows := prepared.queries(task, "dev")):
            continue
        count = min(queries, len(rows))
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        part = worker_slice(count, rank, workers)
        taken = rows.take(chosen[part], ["text", "positives", "gold_page_rows"])
        result[task] = make_batch(
            tokenize,
            prepared.passages,
            task,
            taken["text"],
            taken["gold_page_rows"],
            [positives[0] for positives in taken["positives"]],
            [[]] * len(taken["text"]),
            queries_in_all=count,
            rows=-(-count // workers),
            negatives_per_query=0,
        )
    return result
