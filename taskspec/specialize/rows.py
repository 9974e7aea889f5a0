"""The rows of the parameters, and what is done row by row to one worker's elements of the flat vector.

Path: gradients → [here] → mixture, methods.  T tasks, P elements of one worker, R rows of the whole model. A *row* is
what has one first index: a token of an embedding, an output of a linear layer; each element of a vector is one. A
worker's elements may begin and end inside a row: sums are of its part, and the workers' sums add up to the row's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from taskspec.specialize.gradients import Piece
from taskspec.specialize.names import layer_of

CHUNK = 1 << 16
"""Elements that a CPU works on at a time: three such fp32 vectors stay in a core's cache of 1 MB. A GPU takes whole
matrices: there a launch costs more than the memory."""


class Block(NamedTuple):
    """Rows of equal width that lie one after the other in a worker's elements."""

    elements: slice
    rows: slice
    """Of the whole model."""
    width: int


class Rows:
    """The rows of some elements of the vector that the pieces describe.

    Attributes: rows: R. width_R: elements of each row of the whole model, int64. layers: of the model, by name.
    layer_R: each row's place in `layers`, int64.
    """

    def __init__(self, pieces: Sequence[Piece], elements: slice, device: torch.device) -> None:
        layers: dict[str, int] = {}
        widths, places, self.blocks = [], [], []
        first_row = 0
        for piece in pieces:
            size = piece.elements.stop - piece.start
            rows = piece.shape[0] if len(piece.shape) > 1 else size
            width = size // rows
            widths.append(torch.full((rows,), width, dtype=torch.int64))
            places.append(torch.full((rows,), layers.setdefault(layer_of(piece.name), len(layers)), dtype=torch.int64))
            self.blocks += _blocks(piece.start, rows, width, first_row, elements)
            first_row += rows
        self.rows = first_row
        self._chunk = CHUNK if device.type == "cpu" else max(piece.elements.stop for piece in pieces)
        self.width_R = torch.cat(widths).to(device)
        self.layers = tuple(layers)
        self.layer_R = torch.cat(places).to(device)

    def sum_abs_products(self, a_P: Tensor, b_P: Tensor) -> Tensor:
        """Σ |a·b| over each row's elements of this worker. Returns: (R,); 0 for rows that lie elsewhere."""
        result_R = a_P.new_zeros(self.rows)
        for elements, rows, width in self._chunks():
            product = a_P[elements] * b_P[elements]
            result_R[rows] = torch.linalg.vector_norm(product.view(-1, width), ord=1, dim=1)
        return result_R

    def sum_squares(self, a_P: Tensor) -> Tensor:
        """Σ a² over each row's elements of this worker. Returns: (R,)."""
        return self.sum_abs_products(a_P, a_P)

    def scale_and_add(self, total_P: Tensor, keep_R: Tensor, other_P: Tensor, take_R: Tensor) -> None:
        """total ← keep·total + take·other, each row by its own two factors, in place."""
        for elements, rows, width in self._chunks():
            total, other = total_P[elements].view(-1, width), other_P[elements].view(-1, width)
            total.mul_(keep_R[rows, None]).addcmul_(other, take_R[rows, None])

    def divide(self, total_P: Tensor, divisor_R: Tensor) -> None:
        """total ← total / divisor of its row, in place."""
        for elements, rows, width in self._chunks():
            total_P[elements].view(-1, width).div_(divisor_R[rows, None])

    def _chunks(self) -> Iterator[Block]:
        for elements, rows, width in self.blocks:
            step = max(1, self._chunk // width)
            for first in range(rows.start, rows.stop, step):
                last = min(first + step, rows.stop)
                begin = elements.start + (first - rows.start) * width
                yield Block(slice(begin, begin + (last - first) * width), slice(first, last), width)


def _blocks(begin: int, rows: int, width: int, first_row: int, owned: slice) -> list[Block]:
    """The owned part of one matrix (or vector: width 1): whole rows, and up to two cut ones."""
    low, high = max(begin, owned.start), min(begin + rows * width, owned.stop)
    if low >= high:
        return []
    cuts = {low, high}
    whole_low, whole_high = begin + -(-(low - begin) // width) * width, begin + (high - begin) // width * width
    if whole_low < whole_high:
        cuts |= {whole_low, whole_high}
    elif low < whole_low < high:  # two parts of rows, none whole
        cuts.add(whole_low)
    result = []
    edges = sorted(cuts)
    for left, right in pairwise(edges):
        row = first_row + (left - begin) // width
        count = max(1, (right - left) // width)
        result.append(
            Block(slice(left - owned.start, right - owned.start), slice(row, row + count), (right - left) // count)
        )
    return result
