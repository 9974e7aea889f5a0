"""Σ_t w_t ⊙ g_t, as the tasks' gradients come one by one: none of them is kept.

Path: gradients, rows → [here] → methods.  T tasks, P elements of one worker, R rows. The weights of a row are a softmax
over tasks; running maximum and running total make it one pass, as in Milakov and Gimelshein, "Online normalizer
calculation for softmax", arXiv 1805.02867. Memory: P + 2 R floats, whatever T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taskspec.specialize.rows import Rows


class Mixture:
    """The weighted mean of the gradients added so far."""

    def __init__(self, rows: Rows, like_P: Tensor) -> None:
        self._rows = rows
        self._total_P = torch.empty_like(like_P)
        self._peak_R = like_P.new_empty(rows.rows)
        self._weight_R = like_P.new_empty(rows.rows)
        self._empty = True

    def add(self, logit_R: Tensor, grad_P: Tensor) -> None:
        """Takes in one task's gradient with the logits of its weights; both may be overwritten afterwards."""
        if self._empty:
            self._total_P.copy_(grad_P)
            self._peak_R.copy_(logit_R)
            self._weight_R.fill_(1)
            self._empty = False
            return
        peak_R = torch.maximum(self._peak_R, logit_R)
        keep_R = self._peak_R.sub_(peak_R).exp_()
        take_R = (logit_R - peak_R).exp_()
        self._weight_R.mul_(keep_R).add_(take_R)
        self._rows.scale_and_add(self._total_P, keep_R, grad_P, take_R)
        self._peak_R = peak_R

    def finish(self) -> Tensor:
        """The weighted mean (P,), valid until the next `add`, with which a new mixture begins.

        With equal logits it is the sum of the gradients over T, bit for bit.
        """
        self._rows.divide(self._total_P, self._weight_R)
        self._empty = True
        return self._total_P
