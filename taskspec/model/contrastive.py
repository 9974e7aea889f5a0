"""The contrastive loss of one task's batch: in-batch and given negatives, other copies of gold pages masked out.

Path: embeddings → [here] → task gradients.  B this worker's queries, N all workers' passages, D embedding, G gold
pages. Pure: what was gathered comes in as an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor


def allowed_passages(
    gold_page_BG: Tensor,  # int64 page rows, padded with −1
    positive_B: Tensor,  # int64, which passage is the query's positive
    passage_page_N: Tensor,  # int64 page rows, −1 for filling
) -> Tensor:  # (B, N) bool
    """Which passages a query is scored against: its positive, and all that are of none of its gold pages.

    A second passage of a gold page, or the positive of another query about the same page, would be a false negative.
    """
    gold_BN = (passage_page_N[None, :, None] == gold_page_BG[:, None, :]).any(-1)
    allowed_BN = ~gold_BN & (passage_page_N >= 0)
    return allowed_BN.scatter(1, positive_B[:, None], torch.ones_like(positive_B[:, None], dtype=torch.bool))


def contrastive_loss(
    query_BD: Tensor,
    passage_ND: Tensor,
    positive_B: Tensor,  # int64
    allowed_BN: Tensor,  # bool
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's positive among its allowed passages.

    Args: temperature: divides the scores. A dot product is unbounded and does with 1; a cosine lies in [−1, 1], so its
        softmax over N passages is nearly flat at 1 and needs about 0.05.
    Returns: loss_B in nats, and correct_B (bool): the positive scored strictly above all others.
    """
    score_BN = (query_BD @ passage_ND.T / temperature).masked_fill(~allowed_BN, -torch.inf)
    positive_score_B = score_BN.gather(1, positive_B[:, None]).squeeze(1)
    others_BN = score_BN.scatter(1, positive_B[:, None], -torch.inf)
    loss_B = torch.logsumexp(score_BN, dim=1) - positive_score_B
    return loss_B, positive_score_B > others_BN.max(dim=1).values
