"""Intervals against tables, against known distributions, and by the laws that they obey."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from taskspec.evaluate import statistics
from taskspec.evaluate.statistics import (
    Difference,
    Interval,
    bootstrap_interval,
    paired_difference,
    seed_interval,
)

SCORES = st_numpy.arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.sampled_from([0, 0.5, 1]))


@pytest.fixture
def _few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 199)


def width(interval: Interval) -> float:
    return interval.high - interval.low


# --- queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, -1.0])
def test_differences_that_are_all_alike_give_an_interval_of_no_width(value):
    interval = bootstrap_interval([np.full(7, value), np.full(3, value)])
    assert interval.low == interval.high == pytest.approx(value, abs=1e-15)


def test_a_task_of_one_query_stands_still_in_the_resamples():
    interval = bootstrap_interval([np.array([1.0]), np.zeros(5)])
    assert interval == Interval(0.5, 0.5)


def test_a_coin_of_two_queries_gives_all_of_its_outcomes():
    # Of two queries, 0 and 1, a resample is (0, 0) in a quarter of the cases and (1, 1) in another.
    assert bootstrap_interval([np.array([0.0, 1.0])]) == Interval(0.0, 1.0)


@pytest.mark.usefixtures("_few_resamples")
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=6))
def test_the_interval_stays_inside_the_range_of_the_differences(differences):
    interval = bootstrap_interval([np.array(differences)])
    assert min(differences) <= interval.low <= interval.high <= max(differences)


def test_the_interval_is_that_of_the_normal_distribution_where_queries_are_many():
    differences_Q = np.random.default_rng(1).normal(0.1, 0.5, 400)
    interval = bootstrap_interval([differences_Q])
    reach = 1.96 * differences_Q.std() / 20
    assert interval.low == pytest.approx(differences_Q.mean() - reach, abs=0.04 * reach)
    assert interval.high == pytest.approx(differences_Q.mean() + reach, abs=0.04 * reach)


def test_each_task_counts_once_however_many_queries_it_has():
    generator = np.random.default_rng(2)
    few, many = generator.normal(1, 0.1, 20), generator.normal(0, 0.1, 2000)
    interval = bootstrap_interval([few, many])
    assert interval.low < 0.5 * (few.mean() + many.mean()) < interval.high
    # The small task's error rules: half of 1.96 · 0.1 / √20 on either side.
    assert width(interval) == pytest.approx(1.96 * few.std() / 20**0.5, rel=0.1)


def test_queries_are_drawn_inside_their_task():
    # Drawn over tasks, the mean of two constant tasks would vary.
    assert bootstrap_interval([np.zeros(9), np.ones(9)]) == Interval(0.5, 0.5)


def test_the_same_differences_always_give_the_same_interval():
    differences_Q = np.random.default_rng(3).normal(size=50)
    assert bootstrap_interval([differences_Q]) == bootstrap_interval([differences_Q])


@pytest.mark.usefixtures("_few_resamples")
def test_the_bootstrap_interval_holds_the_true_mean_in_about_95_of_100_data_sets():
    generator = np.random.default_rng(4)
    held = 0
    for _ in range(400):
        # Two tasks of scores like R-precision's differences: mostly 0, else ±1; true means 0.1 and 0.3.
        tasks = [
            generator.choice([-1.0, 0.0, 1.0], size=120, p=[0.1, 0.7, 0.2]),
            generator.choice([-1.0, 0.0, 1.0], size=60, p=[0.1, 0.5, 0.4]),
        ]
        interval = bootstrap_interval(tasks)
        held += interval.low <= 0.2 <= interval.high
    assert 0.91 <= held / 400 <= 0.98


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_the_seed_interval_is_students():
    # Mean 2, standard deviation 1, error 1/√3; the table's t for 2 degrees of freedom at 97.5% is 4.303.
    interval = seed_interval(np.array([1.0, 2.0, 3.0]))
    assert interval is not None
    assert interval.low == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3)
    assert interval.high == pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3)


def test_one_seed_has_no_interval():
    assert seed_interval(np.array([0.3])) is None


def test_equal_seeds_give_an_interval_of_no_width():
    assert seed_interval(np.array([0.25, 0.25])) == Interval(0.25, 0.25)


def test_the_seed_interval_holds_the_true_mean_in_about_95_of_100_data_sets():
    generator = np.random.default_rng(5)
    intervals = [seed_interval(generator.normal(0.2, 1, 3)) for _ in range(2000)]
    held = np.mean([interval is not None and interval.low <= 0.2 <= interval.high for interval in intervals])
    assert 0.935 <= held <= 0.965


# --- differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "seeds", "verdict"),
    [
        pytest.param((0.1, 0.3), (0.1, 0.2), "higher", id="both above"),
        pytest.param((-0.3, -0.1), (-0.2, -0.1), "lower", id="both below"),
        pytest.param((-0.1, 0.3), (0.1, 0.2), "no difference shown", id="queries reach below 0"),
        pytest.param((0.1, 0.3), (-0.1, 0.2), "no difference shown", id="seeds reach below 0"),
        pytest.param((-0.3, 0.1), (-0.2, -0.1), "no difference shown", id="queries reach above 0"),
        pytest.param((-0.3, -0.1), (-0.2, 0.1), "no difference shown", id="seeds reach above 0"),
        pytest.param((-0.3, -0.1), (0.1, 0.2), "no difference shown", id="on different sides"),
        pytest.param((0.0, 0.0), (0.0, 0.0), "no difference shown", id="nothing at all"),
        pytest.param((0.1, 0.3), (0.0, 0.2), "no difference shown", id="0 is an end"),
    ],
)
def test_a_verdict_needs_both_intervals(queries, seeds, verdict):
    assert Difference(0.1, Interval(*queries), Interval(*seeds), 3).verdict == verdict


@pytest.mark.parametrize("queries", [Interval(0.1, 0.3), Interval(-0.3, -0.1)])
def test_one_seed_is_not_judged(queries):
    assert Difference(0.2, queries, None, 1).verdict == "not judged"


def test_a_difference_worked_by_hand():
    mine = {"a": np.array([[1.0, 1.0], [1.0, 0.0]]), "b": np.array([[1.0], [0.0]])}
    theirs = {"a": np.array([[0.0, 1.0], [1.0, 0.0]]), "b": np.array([[0.0], [0.0]])}
    found = paired_difference(mine, theirs)
    # Seed 1: (1/2 + 1) / 2, seed 2: 0. t for 1 degree of freedom is 12.706, the error (0.75/√2)/√2.
    assert found.mean == pytest.approx(0.375)
    assert found.count == 2
    assert found.seeds is not None
    assert found.seeds.high == pytest.approx(0.375 + 12.706 * 0.375, abs=1e-3)
    # Averaged over seeds, the queries of a differ by 1/2 and 0, that of b by 1/2.
    assert found.queries == Interval(0.25, 0.5)


@pytest.mark.usefixtures("_few_resamples")
@given(SCORES)
def test_a_row_does_not_differ_from_itself(scores_SQ):
    found = paired_difference({"a": scores_SQ}, {"a": scores_SQ})
    verdict = "not judged" if len(scores_SQ) == 1 else "no difference shown"
    assert (found.mean, found.queries, found.verdict) == (0, Interval(0, 0), verdict)


@pytest.mark.usefixtures("_few_resamples")
@given(SCORES, st.randoms(use_true_random=False))
def test_the_difference_the_other_way_round_is_the_negative(scores_SQ, random):
    theirs_SQ = np.vectorize(lambda _: random.choice([0.0, 0.5, 1.0]))(scores_SQ)
    found = paired_difference({"a": scores_SQ}, {"a": theirs_SQ})
    back = paired_difference({"a": theirs_SQ}, {"a": scores_SQ})
    assert back.mean == pytest.approx(-found.mean)
    assert back.queries.low == pytest.approx(-found.queries.high)
    assert back.queries.high == pytest.approx(-found.queries.low)
    if found.seeds is not None and back.seeds is not None:
        assert back.seeds.low == pytest.approx(-found.seeds.high)


def test_pairing_narrows_the_interval_where_queries_are_hard_for_both():
    generator = np.random.default_rng(6)
    hardness_Q = generator.random(200)
    mine_SQ = (generator.random((2, 200)) * 0.1 + hardness_Q > 0.5).astype(float)
    theirs_SQ = (generator.random((2, 200)) * 0.1 + hardness_Q > 0.52).astype(float)
    paired = paired_difference({"a": mine_SQ}, {"a": theirs_SQ})
    shuffled = paired_difference({"a": mine_SQ}, {"a": generator.permutation(theirs_SQ, axis=1)})
    assert width(paired.queries) < 0.5 * width(shuffled.queries)
    assert paired.mean == pytest.approx(shuffled.mean)


def test_a_row_without_seeds_pairs_with_every_seed_of_the_other():
    mine = {"a": np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])}
    single = {"a": np.array([[0.0, 1.0]])}
    found = paired_difference(mine, single)
    assert found == paired_difference(mine, {"a": single["a"].repeat(3, axis=0)})
    assert found.count == 3
    assert paired_difference(single, mine).count == 3


def test_other_tasks_are_refused():
    with pytest.raises(ValueError, match=r"tasks must be the same, but are \['a'\] and \['b'\]"):
        paired_difference({"a": np.ones((1, 2))}, {"b": np.ones((1, 2))})


def test_another_number_of_queries_is_refused_even_where_it_would_broadcast():
    with pytest.raises(ValueError, match="task 'a': 2 queries cannot be paired with 1"):
        paired_difference({"a": np.ones((3, 2))}, {"a": np.ones((3, 1))})
