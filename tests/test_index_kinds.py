"""Approximate shards: their size, what they find of the exact answer, and how hard they have to try."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec.errors import ArtifactError
from taskspec.index.checks import require_own_rows
from taskspec.index.kinds import KINDS, lists, subquantizers
from taskspec.index.recall import MeasuredRecall, Recall, exact_answers, interval, measure, right_rows, shares_found
from taskspec.index.shard import Results, load_shard, make_shard, merge_top_k
from taskspec.sections import KindName

NAMES: tuple[KindName, ...] = get_args(KindName)
APPROXIMATE = [name for name in NAMES if name != "flat"]
ROWS, DIMENSION = 3000, 64


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Of length 1, about 40 centers."""
    rng = np.random.default_rng(3)
    centers = rng.standard_normal((40, DIMENSION))
    return normalized(centers[rng.integers(0, 40, ROWS)] + 0.7 * rng.standard_normal((ROWS, DIMENSION)))


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(4)
    return normalized(vectors[rng.integers(0, ROWS, 50)] + 0.1 * rng.standard_normal((50, DIMENSION)))


def normalized(vectors_ND: np.ndarray) -> np.ndarray:
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


def test_every_kind_of_the_configuration_is_described() -> None:
    assert set(KINDS) == set(NAMES)
    assert all((kind.effort is None) == (kind.efforts == ()) for kind in KINDS.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_shard_takes_what_was_foreseen_and_searches_as_before(
    name: KindName, vectors: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    shard = make_shard(name, vectors, row_start=500)
    shard.save(tmp_path / "shard")
    foreseen = KINDS[name].bytes_a_shard(ROWS, DIMENSION)
    constants = 40_000  # codebooks
    assert foreseen * 0.95 < (tmp_path / "shard").stat().st_size < foreseen * 1.05 + constants
    loaded = load_shard(tmp_path / "shard", name, 500, shard.max_norm)
    for effort in (None, *KINDS[name].efforts[-1:]):
        for before, after in zip(shard.search(queries, 10, effort), loaded.search(queries, 10, effort), strict=True):
            np.testing.assert_array_equal(before, after)
    require_own_rows(loaded, vectors, "here")


@pytest.mark.parametrize("name", APPROXIMATE)
def test_with_full_effort_little_is_missed_and_rows_are_global(
    name: KindName, vectors: np.ndarray, queries: np.ndarray
) -> None:
    parts = [make_shard(name, vectors[start : start + 1000], start) for start in range(0, ROWS, 1000)]
    efforts = KINDS[name].efforts
    found = merge_top_k([part.search(queries, 10, efforts[-1] if efforts else None) for part in parts], 10)
    exact = exact_answers(vectors, 0, queries, 10)
    assert shares_found(found.rows_BK, exact.rows_BK).mean() >= KINDS[name].codes - 0.03
    assert (np.diff(found.scores_BK, axis=1) <= 0).all()
    # Where nothing was measured, a search tries as hard as it can.
    unmeasured = merge_top_k([part.search(queries, 10, None) for part in parts], 10)
    np.testing.assert_array_equal(unmeasured.rows_BK, found.rows_BK)


@pytest.mark.parametrize("name", NAMES)
def test_of_given_rows_the_best_are_found_wherever_they_lie(
    name: KindName, vectors: np.ndarray, queries: np.ndarray
) -> None:
    shard = make_shard(name, vectors, row_start=500)
    rows = np.array([3, 500, 777, 778, 1502, 3499, 3500])  # the first and the last are another shard's
    own = rows[1:-1]
    all_BK = shard.rank(queries, rows, 9)
    np.testing.assert_array_equal(np.sort(all_BK.rows_BK), np.broadcast_to(own, (len(queries), 5)))
    exact_BK = (queries[:, None] * vectors[all_BK.rows_BK - 500]).sum(axis=2)
    np.testing.assert_allclose(all_BK.scores_BK, exact_BK, atol=0.03)
    assert (np.diff(all_BK.scores_BK, axis=1) <= 0).all()
    for all_of, two in zip(all_BK, shard.rank(queries, rows, 2), strict=True):
        np.testing.assert_allclose(two, all_of[:, :2], rtol=1e-6)
    assert shard.rank(queries, rows[:1], 9).rows_BK.shape == (len(queries), 0)


def test_rows_that_a_search_does_not_reach_are_filled_up_and_come_last(
    vectors: np.ndarray, queries: np.ndarray
) -> None:
    shard = make_shard("ivf", vectors, row_start=500)
    scores_BK, rows_BK = shard.search(queries, ROWS, effort=1)
    unreached_BK = rows_BK < 0
    assert unreached_BK.any(axis=1).all()
    assert (scores_BK[unreached_BK] == -np.inf).all()
    assert (np.diff(unreached_BK.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda vectors_ND: np.roll(vectors_ND, 1, axis=0), id="shifted by a row"),
        pytest.param(lambda vectors_ND: vectors_ND[:-1], id="a row too few"),
        pytest.param(lambda vectors_ND: vectors_ND * 2, id="of another scale"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_shard_of_other_vectors_than_it_should_hold_is_refused(
    name: KindName, spoil: Callable[[np.ndarray], np.ndarray], vectors: np.ndarray
) -> None:
    shard = make_shard(name, vectors, row_start=500)
    with pytest.raises(
        ArtifactError, match=rf"somewhere: a {name} shard (has 3000 rows for 2999|.* its own row \d+; build)"
    ):
        require_own_rows(shard, spoil(vectors), "somewhere")


@pytest.mark.parametrize("name", ["flat", "fp16", "ivf", "hnsw"])
def test_a_shard_of_near_neighbours_of_its_rows_is_refused(name: KindName, vectors: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    near = normalized(vectors + 0.03 * rng.standard_normal(vectors.shape))
    assert 0.9 < (near * vectors).sum(axis=1).mean() < 0.98, "as near as passages of one page"
    with pytest.raises(ArtifactError, match=rf"a {name} shard does not find its own row \d+; build"):
        require_own_rows(make_shard(name, near, row_start=500), vectors, "somewhere")


def test_a_shard_that_has_a_row_twice_and_another_not_is_refused(vectors: np.ndarray) -> None:
    shard = make_shard("ivf", vectors, row_start=500)
    numbers = np.arange(ROWS)
    numbers[7] = 8
    shard.index.reset()
    shard.index.add_with_ids(vectors, numbers)
    with pytest.raises(ArtifactError, match="somewhere: a ivf shard has no row 507, and another one twice"):
        require_own_rows(shard, vectors, "somewhere")


def test_a_shard_of_another_kind_is_refused(vectors: np.ndarray, tmp_path: Path) -> None:
    make_shard("hnsw", vectors[:100], 0).save(tmp_path / "shard")
    with pytest.raises(ArtifactError, match="holds IndexHNSWSQ but needs IndexScalarQuantizer of inner products"):
        load_shard(tmp_path / "shard", "sq8", 0, 1.0)


def test_numbers_of_lists_and_codes_fit_the_data() -> None:
    assert [lists(n) for n in (1, 38, 78, 4000, 36_000_000)] == [1, 1, 2, 102, 24_000]
    assert [subquantizers(d) for d in (768, 384, 96, 100, 7, 4)] == [96, 48, 12, 10, 1, 1]


def test_an_interval_worked_out_by_hand() -> None:
    low, high = interval(1.0, 100)
    assert (low, high) == (pytest.approx(1 / (1 + 1.959964**2 / 100)), 1.0)
    low, high = interval(0.5, 4)  # z²/n = 0.96
    assert (low, high) == (pytest.approx(0.5 - 1.959964 / 1.960365 * (1 / 16 + 0.060022) ** 0.5, abs=1e-4), 1 - low)


@given(share=st.floats(0, 1), queries=st.integers(1, 10_000))
def test_an_interval_holds_its_share_and_narrows_with_queries(share: float, queries: int) -> None:
    low, high = interval(share, queries)
    assert 0 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1
    wider = interval(share, max(1, queries // 2))
    assert high - low <= wider[1] - wider[0] + 1e-9


@pytest.mark.parametrize("copies", [20, 60, 200])
@pytest.mark.parametrize("name", ["flat", "fp16", "sq8"])
def test_of_passages_that_are_copies_any_may_be_found(name: KindName, copies: int, vectors: np.ndarray) -> None:
    """All of them stand among the best 10 of queries near them, so some do not come in."""
    copied = np.random.default_rng(5).permutation(ROWS)[:copies]
    vectors_ND = vectors.copy()
    vectors_ND[copied] = vectors_ND[copied[0]]
    queries_BD = normalized(vectors_ND[copied[:1]] + 0.01 * np.random.default_rng(6).standard_normal((20, DIMENSION)))
    starts = range(0, ROWS, 1000)
    parts = [make_shard(name, vectors_ND[start : start + 1000], start) for start in starts]
    right = right_rows([exact_answers(vectors_ND[start : start + 1000], start, queries_BD, 10) for start in starts], 10)
    assert np.isin(copied, right[0]).all()

    def search(queries_BD: np.ndarray, top_k: int, effort: int | None) -> Results:
        return merge_top_k([part.search(queries_BD, top_k, effort) for part in parts], top_k)

    assert measure(name, search, {"nq": queries_BD}, {"nq": right}, at=10, wanted=0.95).tasks["nq"].value == 1.0


@given(rows=st.integers(1, 90), count=st.integers(1, 3), top_k=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_the_rows_that_are_right_are_all_that_reach_the_last_of_the_best(
    rows: int, count: int, top_k: int, seed: int
) -> None:
    some = np.random.default_rng(seed)
    vectors_ND, queries_BD = (some.choice((-1, 0, 1), (n, 3)).astype(np.float32) for n in (rows, 4))
    cuts = sorted({number * rows // count for number in range(count + 1)})
    parts = [exact_answers(vectors_ND[a:b], a, queries_BD, top_k) for a, b in pairwise(cuts)]
    for scores_N, right_R in zip(queries_BD @ vectors_ND.T, right_rows(parts, top_k), strict=True):
        reach = np.flatnonzero(scores_N >= np.sort(scores_N)[-min(top_k, rows)])
        assert sorted(right_R[right_R >= 0].tolist()) == reach.tolist()


def test_each_task_gets_the_least_effort_that_reaches_the_wanted_recall() -> None:
    """Task easy finds all at once, hard from nprobe 4 on, lost half of it at most."""
    exact = np.array([[1, 2]])
    asked: list[tuple[float, int | None]] = []

    def search(queries_BD: np.ndarray, top_k: int, effort: int | None) -> Results:
        asked.append((float(queries_BD[0, 0]), effort))
        assert effort is not None
        reached = {0: [2, 1], 1: [2, 1] if effort >= 4 else [-1, -1], 2: [1, 9] if effort >= 2 else [-1, -1]}
        return Results(np.zeros((1, 2), np.float32), np.array([reached[int(queries_BD[0, 0])]]))

    queries = {name: np.full((1, 1), number) for number, name in enumerate(("easy", "hard", "lost"))}
    found = measure("ivf", search, queries, dict.fromkeys(queries, exact), at=2, wanted=0.9)
    assert {task: (one.value, one.effort) for task, one in found.tasks.items()} == {
        "easy": (1.0, 1),
        "hard": (1.0, 4),
        "lost": (0.5, 2),
    }
    assert list(found.missed) == ["lost"]
    assert [effort for task, effort in asked if task == 1] == [1, 2, 4]


def test_recall_is_told_by_other_queries_than_those_that_chose_the_effort() -> None:
    """Queries 0, 2 and 4 find all from nprobe 2 on; 1 and 3 half of it, and nothing less."""

    def search(queries_BD: np.ndarray, top_k: int, effort: int | None) -> Results:
        assert effort is not None
        missing = np.array([[-1, -1], [-1, -1]])
        found = [np.array([[1, 2], [1, 9]]), missing][effort < 2][queries_BD[:, 0].astype(int) % 2]
        return Results(np.zeros(found.shape, np.float32), found)

    queries = {"nq": np.arange(5, dtype=np.float32)[:, None]}
    exact = {"nq": np.tile([1, 2], (5, 1))}
    found = measure("ivf", search, queries, exact, at=2, wanted=0.9)
    one = found.tasks["nq"]
    assert (one.effort, one.chosen_at, one.value, one.queries) == (2, 1.0, 0.5, 2)
    assert (one.low, one.high) == interval(0.5, 2)
    assert not found.missed
    # without a choice every query tells
    whole = measure("sq8", lambda queries_BD, top_k, _: search(queries_BD, top_k, 2), queries, exact, at=2, wanted=0.9)
    assert (whole.tasks["nq"].value, whole.tasks["nq"].queries) == (pytest.approx(0.8), 5)
    assert list(whole.missed) == ["nq"]


def test_a_task_without_dev_queries_tries_as_hard_as_the_hardest() -> None:
    def recall(effort: int | None) -> Recall:
        return Recall(effort=effort, chosen_at=1.0, queries=5, value=1.0, low=0.8, high=1.0)

    found = MeasuredRecall(at=10, wanted=0.9, tasks={"nq": recall(4), "fever": recall(16)})
    assert [found.effort(task) for task in ("nq", "fever", "wow")] == [4, 16, 16]
    assert MeasuredRecall(at=10, wanted=0.9, tasks={"nq": recall(None)}).effort("wow") is None
