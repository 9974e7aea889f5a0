"""Passages to embeddings, batch by batch: the callable that the index job hands to its processes.

Path: prepared data → [here] → shards.  No Ray in it: `__init__` loads the checkpoint once per process, each call embeds
one batch.  N passages, D the embedding's dimension.
"""

from __future__ import annotations

import numpy as np
import torch

from taskspec.sections import Precision
from taskspec.train.checkpoint import open_encoder


class EmbedPassages:
    """A checkpoint's encoder over batches of passages.

    Example:
        embed = EmbedPassages("artifacts/runs/taco/step-00001000", threads=1, precision="fp32")
        embed({"row": np.array([0]), "title": np.array(["Ceres"]), "text": np.array(["A dwarf planet …"])})
    """

    def __init__(self, checkpoint: str, threads: int, precision: Precision, device: str = "cpu") -> None:
        """Args: threads: of this process; all processes of a node together should not exceed its cores."""
        torch.set_num_threads(threads)
        self._encoder = open_encoder(checkpoint, device, precision)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Args: batch: columns row (N,) int64, title and text (N,) str. Returns: row, and embedding (N, D) float32."""
        embedding_ND = self._encoder.embed_passages(batch["title"].tolist(), batch["text"].tolist())
        return {"row": batch["row"], "embedding": embedding_ND}
