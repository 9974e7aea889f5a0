"""The proof of ownership: zero the elements that a task owns most, and see which tasks find fewer of their pages.

Path: checkpoint, probe, prepared data → [here] → comparison.  T tasks, Q dev queries of a task, P elements, N
passages, D the embedding's dimension. One process, exact search, nothing written: an index on disk for each mask would
be thrown away at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from taskspec.data.prepared import PreparedData
from taskspec.evaluate.run import evaluate
from taskspec.evaluate.statistics import Floats
from taskspec.index.shard import make_shard
from taskspec.model.encoder import TextEncoder
from taskspec.retrieve.catalog import Catalog, LocalShards
from taskspec.retrieve.retriever import Retriever
from taskspec.sections import Evaluate
from taskspec.specialize.analysis import Ablation, Probe, owned_most, random_mask
from taskspec.specialize.gradients import FlatParameters

PASSAGES_PER_CALL = 1024
"""Passages that are read and tokenized at a time."""


def ablate(
    text_encoder: TextEncoder,
    prepared: PreparedData,
    found: Probe,
    settings: Evaluate,
    *,
    share: float = 0.01,
    seed: int,
) -> dict[str, Ablation]:
    """For each task, the fall of every task's dev R-precision with its owned elements zeroed, and with random ones.

    Cost: 4·T + 1 times all passages and all dev queries through the encoder and an exact search; N·D floats.
    Args: text_encoder: the one that was probed; the same again afterwards, bit by bit. found: its tasks are zeroed and
        evaluated. share: of the touched elements. seed: of the random elements.
    Returns: `all elements`, and `without embeddings`, where those of the token embedding are left alone.
    Raises: what `evaluate` raises.
    """
    flat = FlatParameters(text_encoder.encoder)
    generator = torch.Generator().manual_seed(seed)
    whole = _scores(text_encoder, prepared, found.tasks, settings)

    def falls(masks: Mapping[str, Tensor]) -> dict[str, dict[str, Floats]]:
        """Task whose mask is zeroed → evaluated task → (Q,) falls."""
        result = {}
        for zeroed_task, mask_P in masks.items():
            with zeroed(flat.theta_P, mask_P):
                left = _scores(text_encoder, prepared, found.tasks, settings)
            result[zeroed_task] = {task: whole[task] - left[task] for task in found.tasks}
        return result

    def of(embeddings: bool) -> Ablation:
        masks = {task: owned_most(found, task, share, embeddings=embeddings) for task in found.tasks}
        owned = falls(masks)
        random = falls({task: random_mask(found, mask_P, generator) for task, mask_P in masks.items()})
        return Ablation(
            share=share,
            owned=_means(owned),
            random=_means(random),
            own={task: tuple(owned[task][task].tolist()) for task in found.tasks},
            own_random={task: tuple(random[task][task].tolist()) for task in found.tasks},
        )

    return {"all elements": of(embeddings=True), "without embeddings": of(embeddings=False)}


@contextmanager
def zeroed(theta_P: Tensor, mask_P: Tensor) -> Iterator[None]:
    """The masked elements are 0 inside, and bit by bit what they were afterwards."""
    kept = theta_P[mask_P]
    theta_P[mask_P] = 0
    try:
        yield
    finally:
        theta_P[mask_P] = kept


def _means(falls: Mapping[str, Mapping[str, Floats]]) -> dict[str, dict[str, float]]:
    return {zeroed: {task: float(fall_Q.mean()) for task, fall_Q in row.items()} for zeroed, row in falls.items()}


def _scores(
    text_encoder: TextEncoder, prepared: PreparedData, tasks: Sequence[str], settings: Evaluate
) -> dict[str, Floats]:
    """R-precision of each task's dev queries, (Q,), over passages embedded now."""
    parts = []
    for start in range(0, len(prepared.passages), PASSAGES_PER_CALL):
        rows = range(start, min(start + PASSAGES_PER_CALL, len(prepared.passages)))
        passages = prepared.passages.take(rows, ["title", "text"])
        parts.append(text_encoder.embed_passages(passages["title"], passages["text"]))
    shard = make_shard("flat", np.concatenate(parts), row_start=0)
    retriever = Retriever(text_encoder, LocalShards([shard]), Catalog(prepared.passages, "ablation"))
    rows_of = evaluate(retriever, prepared, tasks, settings, system="ablation")
    return {row.task: np.array(row.per_query_rprec) for row in rows_of}
