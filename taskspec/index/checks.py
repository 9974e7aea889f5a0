"""What is checked while an index is built: that embeddings are numbers, and that a shard finds what it was given.

Path: embed, shard → [here] → build.  B embeddings that are looked at, N passages, D the embedding's dimension.
"""

from __future__ import annotations

import faiss
import numpy as np

from taskspec.errors import ArtifactError
from taskspec.index.kinds import KINDS
from taskspec.index.shard import Shard

CHECKED_ROWS = 64
"""Rows of a shard that are looked up."""


def require_finite(rows_N: np.ndarray, embedding_ND: np.ndarray, checkpoint: str) -> None:
    """Raises: ArtifactError naming the first passage whose embedding holds a NaN or an infinity."""
    finite_N = np.isfinite(embedding_ND).all(axis=1)
    if not finite_N.all():
        raise ArtifactError(
            f"{checkpoint}: embeds passage row {rows_N[~finite_N][0]} as numbers that are not finite; "
            "train the model again, with a lower train.learning_rate"
        )


def require_own_rows(shard: Shard, embeddings_ND: np.ndarray, uri: str) -> None:
    """Checks that the shard has each row once, and that a sample of its embeddings lie in their rows and are found.

    Nothing a search finds for an embedding may score less than the row that holds it: rank 1, where embeddings have
    length 1 and no equals.    Raises: ArtifactError naming a row.
    """
    if shard.rows != len(embeddings_ND):
        raise ArtifactError(
            f"{uri}: a {shard.kind} shard has {shard.rows} rows for {len(embeddings_ND)} passages; build it again"
        )
    lost = np.setdiff1d(np.arange(shard.rows), _numbers(shard))
    if len(lost):
        raise ArtifactError(
            f"{uri}: a {shard.kind} shard has no row {shard.row_start + lost[0]}, and another one twice; build it again"
        )
    sample = np.unique(np.linspace(0, shard.rows - 1, CHECKED_ROWS).astype(np.int64))
    sample_BD = embeddings_ND[sample]
    efforts = KINDS[shard.kind].efforts
    best_B = shard.search(sample_BD, 1, efforts[-1] if efforts else None).scores_BK[:, 0]
    alone = zip(sample_BD[:, None], sample[:, None] + shard.row_start, strict=True)
    own_B = np.array([shard.rank(query_1D, row_1, 1).scores_BK[0, 0] for query_1D, row_1 in alone])
    true_B = (sample_BD.astype(np.float64) ** 2).sum(axis=1)
    tolerance_B = KINDS[shard.kind].rounding * true_B
    wrong_B = (np.abs(own_B - true_B) > tolerance_B) | (best_B < own_B - tolerance_B)
    if wrong_B.any():
        row = shard.row_start + int(sample[wrong_B.argmax()])
        raise ArtifactError(
            f"{uri}: a {shard.kind} shard does not find its own row {row}; build the index again, with another "
            f"index.kind if it stays so"
        )


def _numbers(shard: Shard) -> np.ndarray:
    """The numbers (N,) that the shard's vectors have: kept with them in lists, else their places."""
    if shard.kind != "ivf":
        return np.arange(shard.rows)
    lists = shard.index.invlists
    sizes = [lists.list_size(number) for number in range(shard.index.nlist)]
    return np.concatenate(
        [faiss.rev_swig_ptr(lists.get_ids(number), size) for number, size in enumerate(sizes) if size]
    )
