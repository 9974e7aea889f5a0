"""Passages to pages, on rankings written by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec.retrieve.pages import PASSAGES_PER_PAGE, Ranking, SearchPassages, best_per_page, search_until_full


class Scan:
    """Ranks rows by scores given per query; remembers how many queries were searched how wide."""

    def __init__(self, scores_BN: np.ndarray) -> None:
        self.scores_BN = scores_BN
        self.searched: list[tuple[int, int]] = []

    def __call__(self, queries_B1: np.ndarray, top_k: int) -> list[Ranking]:
        self.searched.append((len(queries_B1), top_k))
        result = []
        for number in queries_B1[:, 0].astype(int):
            scores_N = self.scores_BN[number]
            rows_K = np.lexsort((np.arange(len(scores_N)), -scores_N))[:top_k]
            result.append(Ranking(scores_N[rows_K], rows_K))
        return result


def search_pages(
    search: SearchPassages, page_of_row_N: np.ndarray, queries_B1: np.ndarray, top_k: int
) -> list[Ranking]:
    """As a catalog asks for pages."""
    return search_until_full(
        search, lambda ranking: best_per_page(ranking, page_of_row_N), queries_B1, top_k, len(page_of_row_N)
    )


def numbered(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float32)[:, None]


def test_a_page_is_ranked_by_its_best_passage() -> None:
    page_of_row_N = np.array([7, 7, 3, 3, 5])
    ranking = Ranking(np.array([9.0, 8.0, 7.0, 6.0, 5.0]), np.array([3, 1, 2, 4, 0]))
    best = best_per_page(ranking, page_of_row_N)
    assert best.rows_K.tolist() == [3, 1, 4]
    assert best.scores_K.tolist() == [9.0, 8.0, 6.0]


def test_only_queries_whose_pages_are_too_few_are_searched_wider() -> None:
    page_of_row_N = np.repeat([0, 1, 2], [40, 1, 1])
    scores_BN = np.zeros((2, 42))
    scores_BN[0] = -np.arange(42)  # 40 passages of page 0 stand before the others
    scores_BN[1] = np.arange(42)
    scan = Scan(scores_BN)
    rankings = search_pages(scan, page_of_row_N, numbered(2), top_k=2)
    assert [ranking.rows_K.tolist() for ranking in rankings] == [[0, 40], [41, 40]]
    assert scan.searched == [(2, 2 * PASSAGES_PER_PAGE), (1, 2 * PASSAGES_PER_PAGE**2), (1, 42)], (
        "no more rows than there are"
    )


def test_a_search_that_reaches_no_more_is_not_widened() -> None:
    """An approximate index reaches five rows of the first query, all of page 0, however many are asked for."""
    page_of_row_N = np.repeat(np.arange(100), 10)
    scan = Scan(np.tile(-np.arange(1000.0), (2, 1)))

    def reaching(queries_B1: np.ndarray, top_k: int) -> list[Ranking]:
        found = scan(queries_B1, top_k)
        return [
            Ranking(one.scores_K[:5], one.rows_K[:5]) if number == 0 else one
            for number, one in zip(queries_B1[:, 0].tolist(), found, strict=True)
        ]

    rankings = search_pages(reaching, page_of_row_N, numbered(2), top_k=4)
    assert [ranking.rows_K.tolist() for ranking in rankings] == [[0], [0, 10, 20, 30]]
    assert scan.searched == [(2, 12), (1, 36)]


def test_fewer_pages_than_top_k_are_all_given() -> None:
    rankings = search_pages(Scan(np.array([[1.0, 2.0, 3.0]])), np.array([0, 0, 1]), numbered(1), top_k=10)
    assert rankings[0].rows_K.tolist() == [2, 1]


@given(
    pages=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    top_k=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_widening_gives_what_a_search_of_everything_gives(pages: list[int], top_k: int, seed: int) -> None:
    page_of_row_N = np.array(pages)
    scores_BN = np.random.default_rng(seed).integers(0, 5, (3, len(pages))).astype(float)
    scan = Scan(scores_BN)
    everything = [best_per_page(ranking, page_of_row_N) for ranking in scan(numbered(3), len(pages))]
    rankings = search_pages(scan, page_of_row_N, numbered(3), top_k)
    for ranking, whole in zip(rankings, everything, strict=True):
        assert ranking.rows_K.tolist() == whole.rows_K[:top_k].tolist()
        assert ranking.scores_K == pytest.approx(whole.scores_K[:top_k])
