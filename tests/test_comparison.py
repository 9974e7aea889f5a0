"""Rows, differences, curves and recommendations, on scores of a few queries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec.errors import ConfigError
from taskspec.evaluate import statistics
from taskspec.evaluate.comparison import (
    Comparison,
    Row,
    difference_text,
    interval_text,
    percent,
    signed,
)
from taskspec.evaluate.statistics import Difference, Interval
from taskspec.evaluate.trials import Trial

STRENGTH = "specialization.strength"


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 199)


def trial(row="taco", *, seed=0, candidate="", values=None, zero_shot=None, arm=None, **scores):
    return Trial(
        arm=arm or row.split()[0],
        row=row,
        values=values or {},
        candidate=candidate,
        seed=seed,
        scores={task: tuple(map(float, of_task)) for task, of_task in scores.items()},
        zero_shot=zero_shot or {},
    )


def listed(scores):
    return {task: scores_SQ.tolist() for task, scores_SQ in scores.items()}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_rows_figures_worked_by_hand():
    row = Row.of([trial(seed=8, a=[1, 0], b=[1]), trial(seed=1, a=[0, 0], b=[0.5])])
    assert row.seeds == (1, 8)
    assert listed(row.scores) == {"a": [[0, 0], [1, 0]], "b": [[0.5], [1]]}
    assert row.averages_S().tolist() == [0.25, 0.75]  # each task counts once, whatever its queries
    assert row.average == 0.5
    assert row.std == pytest.approx(0.5 / 2**0.5)
    assert row.task_average("a") == 0.25
    assert (row.candidates, row.chosen) == ({"": 0.5}, ("", ""))


def test_one_seed_has_no_standard_deviation():
    assert Row.of([trial(a=[1, 0])]).std is None


def test_what_has_no_seed_is_a_row_without_seeds():
    row = Row.of([trial("bm25", seed=None, a=[1, 0, 1])])
    assert row.seeds == ()
    assert row.std is None
    assert row.scores["a"].shape == (1, 3)


def test_a_candidate_that_is_best_on_even_queries_measures_the_odd_ones():
    even = trial(candidate="even", a=[1, 0, 1, 0])
    odd = trial(candidate="odd", a=[0, 1, 0, 1])
    row = Row.of([even, odd])
    # Choosing on the measured queries would give 1 everywhere.
    assert row.chosen == ("odd", "even")
    assert row.scores["a"].tolist() == [[0, 0, 0, 0]]
    assert row.candidates == {"even": 0.5, "odd": 0.5}


def test_each_half_is_measured_by_the_candidate_chosen_on_the_other():
    # On odd queries `second` has 0.9 against 0.8; on even ones `first` has 0.4 against 0.3.
    row = Row.of([trial(candidate="first", a=[0.4, 0.8, 0.4]), trial(candidate="second", a=[0.3, 0.9, 0.3])])
    assert row.chosen == ("second", "first")
    assert row.scores["a"].tolist() == [[0.3, 0.8, 0.3]]


def test_candidates_are_chosen_by_the_mean_over_tasks_not_over_queries():
    long = trial(candidate="long", a=[1] * 10, b=[0, 0])
    short = trial(candidate="short", a=[0.5] * 10, b=[1, 1])
    assert Row.of([long, short]).chosen == ("short", "short")


def test_equal_candidates_leave_the_first():
    row = Row.of([trial(candidate=name, a=[1, 0, 0, 1]) for name in ("z", "a", "m")])
    assert row.chosen == ("z", "z")
    assert list(row.candidates) == ["z", "a", "m"]


def test_a_task_of_one_query_chooses_nothing_for_the_even_queries():
    row = Row.of([trial(candidate="x", a=[1], b=[0, 0]), trial(candidate="y", a=[0], b=[0, 1])])
    assert row.chosen == ("y", "x")
    assert listed(row.scores) == {"a": [[0]], "b": [[0, 0]]}


def test_only_seeds_that_every_candidate_has_are_used():
    row = Row.of(
        [
            trial(candidate="x", seed=0, a=[0, 0]),
            trial(candidate="x", seed=1, a=[0, 0]),
            trial(candidate="y", seed=1, a=[1, 1]),
            trial(candidate="y", seed=2, a=[0, 0]),
        ]
    )
    assert row.seeds == (1,)
    assert row.candidates == {"x": 0, "y": 1}
    assert len(row.trials) == 4


def test_a_trial_measured_again_counts_once():
    assert Row.of([trial(a=[0, 0]), trial(a=[1, 1])]).scores["a"].tolist() == [[1, 1]]


def test_candidates_without_a_common_seed_are_refused():
    with pytest.raises(ConfigError, match="row 'taco': its candidates 'x', 'y' have no seed in common; run all of"):
        Row.of([trial(candidate="x", seed=0, a=[1]), trial(candidate="y", seed=1, a=[1])])


HALF = st.lists(st.sampled_from([0, 0.5, 1]), min_size=3, max_size=3)


@given(st.lists(st.tuples(HALF, HALF, HALF), min_size=2, max_size=4), st.booleans())
def test_whatever_a_query_scores_does_not_change_who_measures_it(halves, even):
    def chosen(measured, others):
        queries = zip(measured, others, strict=True) if even else zip(others, measured, strict=True)
        return [score for pair in queries for score in pair]

    def row(which):
        return Row.of(
            [trial(candidate=str(number), a=chosen(half[which], half[2])) for number, half in enumerate(halves)]
        )

    place = 0 if even else 1
    assert row(0).chosen[place] == row(1).chosen[place]


# --- differences ------------------------------------------------------------------------------------------------------


def test_rows_stand_in_the_order_of_their_first_trials():
    comparison = Comparison.of([trial("b", a=[1]), trial("a", a=[1]), trial("b", seed=1, a=[0])], baseline="a")
    assert [row.name for row in comparison.rows] == ["b", "a"]
    assert comparison.baseline is comparison.row("a")
    assert comparison.row("b").seeds == (0, 1)


@pytest.mark.parametrize("ask", [lambda rows: Comparison.of(rows, "c"), lambda rows: Comparison.of(rows, "a").row("c")])
def test_an_unknown_row_is_answered_with_the_known_ones(ask):
    with pytest.raises(ConfigError, match="row 'c' is not in the comparison; its rows are: b, a"):
        ask([trial("b", a=[1]), trial("a", a=[1])])


def test_a_difference_is_the_row_minus_the_baseline_or_minus_the_named_row():
    rows = [trial("mean", a=[0, 0], b=[1]), trial("taco", a=[1, 1], b=[1]), trial("cgd", a=[1, 0], b=[0])]
    comparison = Comparison.of(rows, baseline="mean")
    assert comparison.difference("taco").mean == 0.5
    assert comparison.difference("taco", "cgd").mean == 0.75
    assert comparison.difference("mean", "cgd").mean == 0.25
    assert comparison.difference("taco", task="a").mean == 1
    assert comparison.difference("taco", "cgd", "b").mean == 1


def test_rows_are_compared_on_the_seeds_that_both_have():
    rows = [trial("mean", seed=seed, a=[seed / 8]) for seed in (0, 1, 2)]
    rows += [trial("taco", seed=seed, a=[score]) for seed, score in ((5, 1), (2, 0.75), (1, 0.5))]
    found = Comparison.of(rows, baseline="mean").difference("taco")
    assert found.count == 2
    assert found.mean == pytest.approx((0.5 - 1 / 8 + 0.75 - 2 / 8) / 2)
    assert found.seeds is not None


def test_a_row_without_seeds_is_compared_with_every_seed():
    rows = [trial("mean", seed=seed, a=[score, 0]) for seed, score in ((0, 0), (1, 1))]
    comparison = Comparison.of([*rows, trial("bm25", seed=None, a=[1, 1])], baseline="mean")
    assert comparison.difference("bm25").count == 2
    assert comparison.difference("bm25").mean == 0.75
    assert comparison.difference("mean", "bm25").mean == -0.75


def test_a_row_with_tasks_held_out_is_compared_on_the_others():
    rows = [trial("mean", a=[0], b=[0], c=[1]), trial("held out", c=[0], a=[1])]
    comparison = Comparison.of(rows, baseline="mean")
    assert comparison.tasks == ("a", "b", "c")
    assert comparison.compared_tasks("held out") == ("a", "c")
    assert comparison.difference("held out").mean == 0


def test_rows_without_a_common_task_are_refused():
    comparison = Comparison.of([trial("mean", a=[0], c=[0]), trial("taco", b=[0], c=[0])], baseline="mean")
    with pytest.raises(ConfigError, match="on task 'a': the first was measured on b, c, the second on a, c; name"):
        comparison.difference("taco", task="a")
    comparison = Comparison.of([trial("mean", a=[0]), trial("taco", b=[0])], baseline="mean")
    with pytest.raises(ConfigError, match="rows 'taco' and 'mean' cannot be compared on any task"):
        comparison.difference("taco")


def test_rows_without_a_common_seed_are_refused():
    rows = [trial("mean", seed=0, a=[0]), trial("taco", seed=1, a=[0]), trial("taco", seed=2, a=[0])]
    with pytest.raises(ConfigError, match="'taco' and 'mean' cannot be compared: their seeds, 1, 2 and 0, have none"):
        Comparison.of(rows, baseline="mean").difference("taco")


# --- zero shot --------------------------------------------------------------------------------------------------------


def test_a_zero_shot_row_is_measured_by_the_candidate_that_is_best_on_the_trained_tasks():
    def both(candidate, seed, trained, held_out):
        return trial(candidate=candidate, seed=seed, a=trained, zero_shot={"prompt": {"b": held_out}})

    trials = [
        both("worse", 0, [0, 0.5], (1.0, 1.0)),
        both("better", 0, [0.5, 0.5], (0.5, 0.0)),
        both("worse", 1, [0, 0.5], (1.0, 1.0)),
        both("better", 1, [0.5, 0.5], (0.25, 0.0)),
        both("better", 2, [1, 1], (1.0, 1.0)),  # a seed that `worse` lacks
    ]
    row = Comparison.of([trial("mean", a=[0, 0]), *trials], baseline="mean").zero_shot_row("taco", "prompt")
    assert row is not None
    assert listed(row.scores) == {"b": [[0.5, 0.0], [0.25, 0.0]]}
    assert (row.name, row.seeds, row.candidates) == ("taco", (0, 1), {"better": 0.1875})


def test_a_zero_shot_row_can_be_compared_with_a_row_that_trained_on_the_task():
    trials = [
        trial("mean", a=[0, 0], b=[1, 1]),
        trial("taco", a=[0, 0], zero_shot={"prompt": {"b": (0.5, 0.0)}, "no prompt": {"b": (0.0, 0.0)}}),
    ]
    comparison = Comparison.of(trials, baseline="mean")
    for way, mean in (("prompt", -0.75), ("no prompt", -1)):
        row = comparison.zero_shot_row("taco", way)
        assert row is not None
        assert row.minus(comparison.baseline).mean == mean


def test_a_row_without_held_out_tasks_has_no_zero_shot_row():
    assert Comparison.of([trial("mean", a=[0])], baseline="mean").zero_shot_row("mean", "prompt") is None


# --- curves -----------------------------------------------------------------------------------------------------------


def strengths(averages):
    """A comparison of strengths whose queries all have the score of their seed."""
    trials = [
        trial(f"taco strength={value:g}", values={STRENGTH: value}, seed=seed, a=[score] * 4)
        for value, scores in averages.items()
        for seed, score in enumerate(scores)
    ]
    return Comparison.of(trials, baseline=trials[0].row)


def test_a_curve_is_ordered_by_its_value():
    comparison = strengths({2: [0.5], 0.5: [0.25], 16: [0.125]})
    assert [(value, row.average) for value, row in comparison.curve("taco", STRENGTH)] == [
        (0.5, 0.25),
        (2, 0.5),
        (16, 0.125),
    ]


@pytest.mark.parametrize(
    ("arm", "key", "values"),
    [
        pytest.param("mean", STRENGTH, {STRENGTH: 1}, id="another arm"),
        pytest.param("taco", "specialization.decay", {STRENGTH: 1}, id="another key"),
        pytest.param("taco", STRENGTH, {STRENGTH: 1, "specialization.decay": 0.9}, id="two keys"),
        pytest.param("taco", STRENGTH, {STRENGTH: "log"}, id="no numbers"),
    ],
)
def test_an_arm_with_another_grid_has_no_curve(arm, key, values):
    comparison = Comparison.of([trial("taco", values=values, a=[1])], baseline="taco")
    assert comparison.curve(arm, key) == ()
    assert comparison.recommend(arm, key) is None


def test_one_point_recommends_nothing():
    assert strengths({1: [0.5, 0.5]}).recommend("taco", STRENGTH) is None


def test_the_smallest_strength_that_is_not_shown_to_be_lower_is_recommended():
    # Against 2, strength 0 is lower by 0.3 with every seed, 0.5 by 0.1 or not at all, and 1 is lower again.
    found = strengths({0: [0.3, 0.3], 0.5: [0.5, 0.6], 1: [0.3, 0.3], 2: [0.6, 0.6], 4: [0.5, 0.5]}).recommend(
        "taco", STRENGTH
    )
    assert found is not None
    assert (found.value, found.best, found.ends) == (0.5, 2, ())
    # t for 1 degree of freedom is 12.706, the error (0.1/√2)/√2.
    assert found.reason == (
        "strength 2 has the highest average, 60.0; 0.5 is the smallest that is not shown to be lower "
        "(−5.0, over queries −5.0 to −5.0, over seeds −68.5 to +58.5)"
    )


def test_the_best_strength_is_recommended_where_all_smaller_ones_are_lower():
    found = strengths({0: [0.3, 0.3], 1: [0.5, 0.5], 2: [0.6, 0.6], 4: [0.5, 0.5]}).recommend("taco", STRENGTH)
    assert found is not None
    assert found.value == found.best == 2
    assert found.reason == "strength 2 has the highest average, 60.0; all smaller ones are shown to be lower"


def test_the_smallest_of_equally_good_strengths_is_the_best():
    found = strengths({0: [0.5, 0.5], 1: [0.5, 0.5]}).recommend("taco", STRENGTH)
    assert found is not None
    assert (found.value, found.best) == (0, 0)
    assert found.reason == "strength 0 has the highest average, 50.0, and is the smallest tried"


def test_one_seed_recommends_the_smallest_because_it_shows_nothing():
    found = strengths({0: [0.25], 1: [0.75]}).recommend("taco", STRENGTH)
    assert found is not None
    assert (found.value, found.best) == (0, 1)
    assert found.reason.endswith("(−50.0, over queries −50.0 to −50.0, one seed)")


@pytest.mark.parametrize(
    ("averages", "ends"),
    [
        pytest.param({0: [0.1, 0.1], 1: [0.3, 0.3], 2: [0.2, 0.2]}, (), id="inside"),
        pytest.param({0: [0.1, 0.1], 1: [0.2, 0.2], 2: [0.3, 0.3]}, (2,), id="the largest"),
        pytest.param({0.5: [0.3, 0.3], 1: [0.2, 0.2]}, (0.5,), id="the smallest, and smaller ones exist"),
        pytest.param({0: [0.3, 0.3], 1: [0.2, 0.2]}, (), id="0: nothing lies below"),
        pytest.param({0.5: [0.2, 0.3], 1: [0.3, 0.3], 2: [0.2, 0.2]}, (0.5,), id="the smallest is not shown lower"),
        pytest.param({0.5: [0.1, 0.1], 1: [0.2, 0.3], 2: [0.3, 0.3]}, (2,), id="the best, but not the recommended"),
    ],
)
def test_a_strength_at_an_end_of_the_range_is_told(averages, ends):
    found = strengths(averages).recommend("taco", STRENGTH)
    assert found is not None
    assert found.ends == ends


# --- text -------------------------------------------------------------------------------------------------------------


def test_numbers_are_percent_with_one_decimal_and_real_signs():
    assert percent(0.2614) == "26.1"
    assert (signed(0.0041), signed(-0.0041)) == ("+0.4", "−0.4")
    assert (signed(0.0), signed(-0.0004)) == ("+0.0", "+0.0")
    assert interval_text(Interval(-0.009, 0.002)) == "−0.9 to +0.2"
    assert interval_text(None) == "one seed"
    found = Difference(-0.004, Interval(-0.009, 0.002), Interval(-0.01, 0.003), 3)
    assert difference_text(found) == "−0.4, over queries −0.9 to +0.2, over seeds −1.0 to +0.3"


def test_the_table_as_it_is_read():
    trials = [
        trial("bm25", seed=None, a=[0.25] * 2, b=[0.25] * 2),
        *(trial("mean", seed=seed, a=[score] * 2, b=[score] * 2) for seed, score in ((0, 0.5), (1, 0.5))),
        *(trial("taco", seed=seed, a=[score] * 2, b=[score] * 2) for seed, score in ((0, 0.625), (1, 0.625))),
        trial("held out", seed=0, a=[0.5] * 2),
    ]
    assert Comparison.of(trials, baseline="mean").to_text().splitlines() == [
        "row       seeds  R-precision  difference    over queries      over seeds              verdict",
        "bm25          –         25.0       −25.0  −25.0 to −25.0  −25.0 to −25.0                lower",
        "mean          2   50.0 ± 0.0                                                         baseline",
        "taco          2   62.5 ± 0.0       +12.5  +12.5 to +12.5  +12.5 to +12.5               higher",
        "held out      1        50.0*        +0.0    +0.0 to +0.0        one seed  no difference shown",
        "",
        "R-precision % ± standard deviation over seeds. Differences: tasks and seeds that both rows have,",
        "with 95% intervals.",
        "* Has other tasks than the baseline; its R-precision is over its own.",
    ]


def test_the_table_per_task_as_it_is_read():
    trials = [trial("mean", a=[0.5, 0.25], fever=[1]), trial("held out", fever=[0])]
    text = Comparison.of(trials, baseline="mean").task_table_text()
    assert text is not None
    assert text.splitlines() == [
        "R-precision %     a  fever",
        "mean           37.5  100.0",
        "held out          –    0.0",
    ]


def test_both_tables_fit_a_terminal_and_names_keep_their_ends():
    names = [f"taco specialization.strength=2 specialization.decay={decay} specialization.log=1" for decay in range(10)]
    tasks = {f"a long task {number}": [0.5, 0] for number in range(5)}
    trials = [trial(name, seed=seed, **tasks) for name in names for seed in range(2)]
    comparison = Comparison.of(trials, baseline=names[0])
    for text in (comparison.to_text(), comparison.task_table_text()):
        assert text is not None
        assert max(map(len, text.splitlines())) <= 120
        assert all(line.startswith("taco special") for line in text.splitlines()[1:10])
        assert "zation.log=1 " in text


def test_a_table_of_too_many_tasks_is_left_out():
    tasks = {f"a long task {number}": [0.5, 0] for number in range(8)}
    assert Comparison.of([trial("mean", **tasks)], baseline="mean").task_table_text() is None
