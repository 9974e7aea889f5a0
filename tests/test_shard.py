"""Exact search: the answer of real arithmetic, whatever the shards, the batch and FAISS's own order of ties."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskspec.errors import ArtifactError
from taskspec.index.shard import SPARE, Results, Shard, load_shard, make_shard, merge_top_k


def shards_of(vectors_ND: np.ndarray, count: int) -> list[Shard]:
    cuts = [number * len(vectors_ND) // count for number in range(count + 1)]
    shards = []
    for start, stop in pairwise(cuts):
        shards.append(make_shard("flat", vectors_ND[start:stop], start))
    return shards


def search(shards: Sequence[Shard], queries_BD: np.ndarray, top_k: int) -> Results:
    return merge_top_k([shard.search(queries_BD, top_k) for shard in shards], top_k)


def expected(vectors_ND: np.ndarray, queries_BD: np.ndarray, top_k: int) -> Results:
    scores_BN = np.stack([(vectors_ND * query_D.astype(np.float64)).sum(axis=1) for query_D in queries_BD])
    scores_BN = scores_BN.astype(np.float32)
    rows_BN = np.broadcast_to(np.arange(len(vectors_ND)), scores_BN.shape)
    rows_BK = np.lexsort((rows_BN, -scores_BN))[:, :top_k]
    return Results(np.take_along_axis(scores_BN, rows_BK, 1), rows_BK)


def same(a: Results, b: Results) -> None:
    np.testing.assert_array_equal(a.rows_BK, b.rows_BK)
    np.testing.assert_array_equal(a.scores_BK, b.scores_BK)


def vectors_with_duplicates() -> tuple[np.ndarray, np.ndarray]:
    """600 vectors of which 90, over all shards, are copies of three, and queries whose cut lies among the copies."""
    rng = np.random.default_rng(7)
    vectors_ND = rng.standard_normal((600, 48)).astype(np.float32)
    places = rng.permutation(600)[:90]
    for number, place in enumerate(places):
        vectors_ND[place] = vectors_ND[places[number % 3]]
    queries_BD = np.concatenate([vectors_ND[places[:3]], rng.standard_normal((20, 48)).astype(np.float32)])
    return vectors_ND, queries_BD


@pytest.mark.parametrize("top_k", [1, 7, 30, 100, 600, 1000])
def test_search_over_3_shards_equals_one_flat_index(top_k: int) -> None:
    vectors_ND, queries_BD = vectors_with_duplicates()
    one = search(shards_of(vectors_ND, 1), queries_BD, top_k)
    same(one, expected(vectors_ND, queries_BD, top_k))
    for count in (2, 3, 11):
        same(search(shards_of(vectors_ND, count), queries_BD, top_k), one)


def test_ties_at_the_cut_go_to_the_lower_row_when_better_rows_come_after_them() -> None:
    vectors_ND = np.zeros((200, 4), dtype=np.float32)
    vectors_ND[50:150] = [1, 2, 3, 4]
    vectors_ND[150:153] = [2, 2, 3, 4]
    result = search(shards_of(vectors_ND, 1), np.ones((1, 4), dtype=np.float32), 5)
    assert result.rows_BK.tolist() == [[150, 151, 152, 50, 51]]


def test_a_query_gets_the_same_answer_alone_and_in_any_batch() -> None:
    rng = np.random.default_rng(8)
    vectors_ND = rng.standard_normal((3000, 96)).astype(np.float32)
    queries_BD = rng.standard_normal((40, 96)).astype(np.float32)
    (shard,) = shards_of(vectors_ND, 1)
    together = shard.search(queries_BD, 20)
    for size in (1, 2, 3, 17):
        parts = [shard.search(queries_BD[start : start + size], 20) for start in range(0, 40, size)]
        same(Results(*map(np.concatenate, zip(*parts, strict=True))), together)


def test_rows_that_rounding_would_hide_are_found() -> None:
    """Scores closer together than float32 sums are exact, in an order that those sums do not give."""
    rng = np.random.default_rng(9)
    vectors_ND = np.full((2000, 64), 1.0, dtype=np.float32)
    vectors_ND += rng.integers(0, 2, (2000, 64)).astype(np.float32) * np.float32(2**-23)
    queries_BD = rng.standard_normal((5, 64)).astype(np.float32)
    wanted = expected(vectors_ND, queries_BD, 10)
    assert not np.array_equal(faiss_rows(vectors_ND, queries_BD, 10), wanted.rows_BK)
    same(search(shards_of(vectors_ND, 3), queries_BD, 10), wanted)


def faiss_rows(vectors_ND: np.ndarray, queries_BD: np.ndarray, top_k: int) -> np.ndarray:
    index = faiss.IndexFlatIP(vectors_ND.shape[1])
    index.add(vectors_ND)
    return index.search(queries_BD, top_k)[1]


@settings(max_examples=60)
@given(
    rows=st.integers(1, 3 * SPARE),
    count=st.integers(1, 5),
    top_k=st.integers(1, 12),
    values=st.sampled_from([(0,), (-1, 0, 1), (-1e3, 1e-3, 1.0)]),
    seed=st.integers(0, 2**16),
)
def test_any_cut_into_shards_gives_the_sorted_answer(
    rows: int, count: int, top_k: int, values: tuple[float, ...], seed: int
) -> None:
    some = np.random.default_rng(seed)
    vectors_ND = some.choice(values, (rows, 3)).astype(np.float32)
    queries_BD = some.choice(values, (4, 3)).astype(np.float32)
    result = search(shards_of(vectors_ND, min(count, rows)), queries_BD, top_k)
    same(result, expected(vectors_ND, queries_BD, top_k))


def test_a_saved_shard_searches_as_before_and_from_disk(tmp_path: Path) -> None:
    vectors_ND, queries_BD = vectors_with_duplicates()
    shard = shards_of(vectors_ND, 3)[1]
    shard.save(tmp_path / "shard.faiss")
    loaded = load_shard(tmp_path / "shard.faiss", "flat", shard.row_start, shard.max_norm)
    assert loaded.rows == 200
    same(loaded.search(queries_BD, 40), shard.search(queries_BD, 40))


def test_rows_are_global() -> None:
    shard = make_shard("flat", np.array([[1, 0], [0, 1]]), row_start=1000)
    result = shard.search(np.array([[0, 2]], dtype=np.float32), 5)
    assert result.rows_BK.tolist() == [[1001, 1000]]
    assert result.scores_BK.tolist() == [[2.0, 0.0]]


def test_an_empty_shard_has_no_results() -> None:
    assert make_shard("flat", np.empty((0, 2)), 0).search(np.ones((3, 2), dtype=np.float32), 5).rows_BK.shape == (3, 0)


def test_merge_takes_the_best_and_prefers_the_lower_row() -> None:
    first = Results(np.array([[3.0, 1.0]], dtype=np.float32), np.array([[4, 0]]))
    second = Results(np.array([[3.0, 2.0, 1.0]], dtype=np.float32), np.array([[9, 7, 8]]))
    for parts in ([first, second], [second, first]):
        assert merge_top_k(parts, 4).rows_BK.tolist() == [[4, 9, 7, 0]]
        assert merge_top_k(parts, 9).rows_BK.tolist() == [[4, 9, 7, 0, 8]]


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match=r"bad: is no FAISS index \(Index type .* build the index again"):
        load_shard(tmp_path / "bad", "flat", 0, 1.0)
    with pytest.raises(ArtifactError, match=r"gone: is no FAISS index \(.*No such file.* build the index again"):
        load_shard(tmp_path / "gone", "flat", 0, 1.0)
    faiss.write_index(faiss.IndexFlatL2(4), str(tmp_path / "other"))
    with pytest.raises(ArtifactError, match="other: holds IndexFlatL2 but needs IndexFlatIP of inner products"):
        load_shard(tmp_path / "other", "flat", 0, 1.0)
