"""Mixing and order of the plan."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec.data.plan import Plan, queries_per_task, worker_slice
from taskspec.errors import ConfigError

sizes = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 2_000_000), min_size=1)


@given(sizes, st.integers(0, 500), st.floats(0.5, 50))
def test_mixing_gives_every_query_away_and_at_least_two_to_each_task(sizes, extra, temperature):
    total = 2 * len(sizes) + extra
    batch = queries_per_task(sizes, total, temperature)
    assert sum(batch.values()) == total
    assert min(batch.values()) >= 2
    larger = sorted(sizes, key=lambda task: sizes[task])
    assert all(batch[a] <= batch[b] + 1 for a, b in itertools.pairwise(larger))


def test_mixing_by_hand():
    # shares 1 and 16^(1/4) = 2: 4 and 8 of 12
    assert queries_per_task({"small": 1, "large": 16}, 12, 4.0) == {"small": 4, "large": 8}


def test_an_empty_task_and_a_too_small_step_are_refused():
    with pytest.raises(ConfigError, match=r"tasks\.b\.train: holds no query"):
        queries_per_task({"a": 3, "b": 0}, 8, 4.0)
    with pytest.raises(ConfigError, match=r"queries_per_step is 3 but 2 tasks need at least 2 each; raise it to 4"):
        queries_per_task({"a": 3, "b": 3}, 3, 4.0)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_every_query_comes_once_per_epoch(size, batch, seed):
    plan = Plan(seed, {"a": size}, {"a": batch})
    steps = -(-3 * size // batch)
    rows = np.concatenate([plan.rows("a", step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_differ_in_order():
    plan = Plan(0, {"a": 100}, {"a": 100})
    assert plan.rows("a", 0).tolist() != plan.rows("a", 1).tolist()


def test_a_task_s_order_does_not_depend_on_other_tasks():
    alone = Plan(3, {"a": 50}, {"a": 4})
    among = Plan(3, {"b": 9, "a": 50}, {"b": 2, "a": 4})
    assert alone.rows("a", 77).tolist() == among.rows("a", 77).tolist()
    assert alone.random("a", 5).integers(100) == among.random("a", 5).integers(100)


@given(st.integers(0, 50), st.integers(1, 9))
def test_worker_slices_cover_a_batch_without_overlap_and_evenly(count, workers):
    parts = [range(count)[worker_slice(count, rank, workers)] for rank in range(workers)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
