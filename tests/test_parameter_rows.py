"""Rows of the parameters and mixtures of gradients: any cut of the vector gives what the whole one gives."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskspec.specialize import rows as module
from taskspec.specialize.gradients import Piece
from taskspec.specialize.mixture import Mixture
from taskspec.specialize.rows import Rows

SHAPES = [(4, 3), (5,), (2, 2, 2), (), (1, 7), (3, 1)]
"""R = 4 + 5 + 2 + 1 + 1 + 3 rows of 12 + 5 + 8 + 1 + 7 + 3 elements."""
ROWS, ELEMENTS = 16, 36


def pieces() -> list[Piece]:
    result, start = [], 0
    for number, shape in enumerate(SHAPES):
        result.append(Piece(f"piece {number}", shape, start))
        start = result[-1].elements.stop
    return result


def rows_of(start: int, stop: int) -> Rows:
    return Rows(pieces(), slice(start, stop), torch.device("cpu"))


def row_of_each_element() -> list[int]:
    widths = [3] * 4 + [1] * 5 + [4] * 2 + [1] + [7] + [1] * 3
    return [row for row, width in enumerate(widths) for _ in range(width)]


@pytest.fixture(params=[1, 4, 1 << 16])
def chunk(request, monkeypatch) -> int:
    monkeypatch.setattr(module, "CHUNK", request.param)
    return request.param


def random(*shape: int, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_element_is_in_the_row_of_its_first_index(chunk):
    a, b = random(2, ELEMENTS)
    expected = torch.zeros(ROWS, dtype=torch.float64).index_add_(0, torch.tensor(row_of_each_element()), (a * b).abs())
    rows = rows_of(0, ELEMENTS)
    assert rows.rows == ROWS
    assert rows.width_R.tolist() == [row_of_each_element().count(row) for row in range(ROWS)]
    torch.testing.assert_close(rows.sum_abs_products(a, b), expected)
    torch.testing.assert_close(
        rows.sum_squares(a), torch.zeros_like(expected).index_add_(0, torch.tensor(row_of_each_element()), a.square())
    )


@given(cuts=st.lists(st.integers(0, ELEMENTS), max_size=6))
def test_the_sums_of_any_parts_add_up_to_those_of_the_whole(cuts):
    a, b = random(2, ELEMENTS)
    edges = sorted({0, *cuts, ELEMENTS})
    parts = [rows_of(x, y).sum_abs_products(a[x:y], b[x:y]) for x, y in pairwise(edges)]
    torch.testing.assert_close(torch.stack(parts).sum(0), rows_of(0, ELEMENTS).sum_abs_products(a, b))


def test_filling_behind_the_last_piece_belongs_to_no_row():
    a = torch.ones(4)
    assert rows_of(ELEMENTS - 2, ELEMENTS + 2).sum_squares(a).tolist() == [0.0] * 14 + [1.0, 1.0]


@given(cuts=st.lists(st.integers(0, ELEMENTS), max_size=4), tasks=st.integers(1, 5), scale=st.floats(0, 300))
def test_a_mixture_is_the_softmax_weighted_mean_for_any_cut(cuts, tasks, scale):
    grads, logits = random(tasks, ELEMENTS), scale * random(tasks, ROWS, seed=1)
    weights = torch.softmax(logits, 0)[:, row_of_each_element()]
    edges = sorted({0, *cuts, ELEMENTS})
    found = []
    for x, y in pairwise(edges):
        mixture = Mixture(rows_of(x, y), grads[0, x:y])
        for _ in range(2):  # the second mixture finds nothing of the first
            for logit, grad in zip(logits, grads[:, x:y], strict=True):
                mixture.add(logit, grad)
            total = mixture.finish().clone()
        found.append(total)
    torch.testing.assert_close(torch.cat(found), (weights * grads).sum(0))


@given(tasks=st.integers(1, 9), logit=st.floats(-50, 50))
def test_equal_logits_give_the_mean_bit_for_bit(tasks, logit):
    grads = random(tasks, ELEMENTS).float()
    mixture = Mixture(rows_of(0, ELEMENTS), grads[0])
    total = torch.zeros(ELEMENTS)
    for grad in grads:
        mixture.add(torch.full((ROWS,), logit), grad)
        total += grad
    assert torch.equal(mixture.finish(), total / tasks)
