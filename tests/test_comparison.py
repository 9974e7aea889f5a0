"""Rows, differences, curves and recommendations, on scores of a few queries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec.errors import ConfigError
from taskspec.evaluate import statistics
from taskspec.evaluate.comparison import Comparison, Row
from taskspec.evaluate.comparison_text import (
    ablation_text,
    comparison_text,
    cost_text,
    rows_text,
    tasks_text,
    zero_shot_text,
)
from taskspec.evaluate.notation import difference_text, interval_text, percent, signed
from taskspec.evaluate.statistics import Difference, Interval
from taskspec.evaluate.trials import WAYS, Cost, Trial
from taskspec.specialize.analysis import Ablation

STRENGTH = "specialization.strength"


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 199)


def trial(row="taco", *, seed=0, candidate="", values=None, zero_shot=None, arm=None, measured=None, **scores):
    return Trial(
        **(measured or {}),
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
        return trial(candidate=candidate, seed=seed, a=trained, zero_shot={way: {"b": held_out} for way in WAYS})

    trials = [
        both("worse", 0, [0, 0.5], (1.0, 1.0)),
        both("better", 0, [0.5, 0.5], (0.5, 0.0)),
        both("worse", 1, [0, 0.5], (1.0, 1.0)),
        both("better", 1, [0.5, 0.5], (0.25, 0.0)),
        both("better", 2, [1, 1], (1.0, 1.0)),  # a seed that `worse` lacks
    ]
    ((of, ways),) = Comparison.of([trial("mean", a=[0, 0]), *trials], baseline="mean").zero_shot_rows().items()
    assert of.name == "taco"
    row = ways["prompt"]
    assert listed(row.scores) == {"b": [[0.5, 0.0], [0.25, 0.0]]}
    assert (row.name, row.seeds, row.candidates) == ("taco", (0, 1), {"better": 0.1875})


def test_a_zero_shot_row_can_be_compared_with_a_row_that_trained_on_the_task():
    trials = [
        trial("mean", a=[0, 0], b=[1, 1]),
        trial("taco", a=[0, 0], zero_shot={"prompt": {"b": (0.5, 0.0)}, "no prompt": {"b": (0.0, 0.0)}}),
    ]
    comparison = Comparison.of(trials, baseline="mean")
    (ways,) = comparison.zero_shot_rows().values()
    assert [ways[way].minus(comparison.baseline).mean for way in WAYS] == [-0.75, -1]


def test_zero_shot_answers_are_compared_with_the_baselines_or_with_those_of_the_lowest_strength():
    def held(row, strength=None):
        values = {} if strength is None else {STRENGTH: strength}
        return trial(row, values=values, a=[0], zero_shot={way: {"b": (0.5,)} for way in WAYS})

    rows = [held("taco", 2), held("mean"), held("other", 1)]
    for trials, baseline, reference in ((rows, "other", "other"), ([*rows, trial("all", a=[0], b=[0])], "all", "mean")):
        comparison = Comparison.of(trials, baseline=baseline)
        found = comparison.zero_shot_rows()
        assert len(found) == 3
        assert {comparison.zero_shot_reference(row, found).name for row in found} == {reference}


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


def against_mean(averages: dict[float, list[float]], mean: float = 0.3) -> Comparison:
    """A curve, and a baseline that has the same score with every seed."""
    curve = [one for row in strengths(averages).rows for one in row.trials]
    seeds = max(map(len, averages.values()))
    return Comparison.of([*(trial("mean", seed=n, a=[mean] * 4) for n in range(seeds)), *curve], baseline="mean")


def test_the_best_of_the_strengths_that_are_shown_to_be_higher_is_recommended():
    # 2 has the highest average of all, but with one of its two seeds it is no better than the baseline.
    found = against_mean({0.5: [0.4, 0.4], 1: [0.5, 0.5], 2: [0.9, 0.3], 4: [0.3, 0.3]}).recommend("taco", STRENGTH)
    assert found is not None
    assert (found.value, found.end) == (1, None)
    assert found.reason == (
        "1 has the highest average, 50.0 on the 2 seeds that all have, of those shown to be higher than mean "
        "(+20.0, over queries +20.0 to +20.0, over seeds +20.0 to +20.0); not told apart from it: 2"
    )


def test_the_baseline_is_recommended_where_no_strength_is_shown_to_be_higher():
    found = against_mean({0.5: [0.2, 0.2], 1: [0.3, 0.5], 2: [0.2, 0.1]}).recommend("taco", STRENGTH)
    assert found is not None
    assert (found.value, found.end) == (None, None)
    # t for 1 degree of freedom is 12.706, the error (0.2/√2)/√2.
    assert found.reason == (
        "on the 2 seeds that all have, none is shown to be higher than mean; 1 has the highest average: "
        "+10.0, over queries +10.0 to +10.0, over seeds −117.1 to +137.1"
    )


def test_a_recommendation_is_by_the_seeds_that_all_have():
    """A third seed of one strength, or of the baseline alone, would give it another chance to be shown."""
    spread = {0.5: [0.45, 0.45], 1: [0.6, 0.4, 0.5, 0.5, 0.5, 0.5]}
    found = against_mean(spread).recommend("taco", STRENGTH)
    assert found is not None
    assert found.value == 0.5
    assert "on the 2 seeds" in found.reason
    curve = [one for row in strengths(spread).rows for one in row.trials]
    few = Comparison.of([trial("mean", a=[0.3] * 4), *curve], "mean")
    assert few.recommend("taco", STRENGTH) is None, "the baseline has one seed"


def test_the_smallest_of_equally_good_strengths_is_recommended():
    found = against_mean({0.5: [0.5, 0.5], 1: [0.5, 0.5]}).recommend("taco", STRENGTH)
    assert found is not None
    assert found.value == 0.5
    assert found.reason.endswith("; not told apart from it: 1")


def test_one_seed_recommends_nothing_because_it_shows_nothing():
    assert against_mean({0.5: [0.25], 1: [0.75]}).recommend("taco", STRENGTH) is None
    two_and_one = against_mean({0.5: [0.25, 0.25], 1: [0.75]})
    assert two_and_one.recommend("taco", STRENGTH) is None


@pytest.mark.parametrize(
    ("averages", "end"),
    [
        pytest.param({0: [0.4, 0.4], 1: [0.6, 0.6], 2: [0.5, 0.5]}, None, id="inside"),
        pytest.param({0: [0.4, 0.4], 1: [0.5, 0.5], 2: [0.6, 0.6]}, 2, id="the largest"),
        pytest.param({0.5: [0.6, 0.6], 1: [0.5, 0.5]}, 0.5, id="the smallest, and smaller ones exist"),
        pytest.param({0: [0.6, 0.6], 1: [0.5, 0.5]}, None, id="0: nothing lies below"),
        pytest.param({0.5: [0.1, 0.1], 1: [0.2, 0.2]}, None, id="below the baseline"),
        pytest.param({0.5: [0.2, 0.2], 1: [0.3, 0.5]}, 1, id="above the baseline, and not shown to be"),
    ],
)
def test_a_strength_at_an_end_of_the_range_is_told(averages, end):
    found = against_mean(averages).recommend("taco", STRENGTH)
    assert found is not None
    assert found.end == end


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
    assert rows_text(Comparison.of(trials, baseline="mean")).splitlines() == [
        "row       seeds  R-precision  difference    over queries      over seeds     verdict",
        "bm25          –         25.0       −25.0  −25.0 to −25.0  −25.0 to −25.0       lower",
        "mean          2   50.0 ± 0.0                                                baseline",
        "taco          2   62.5 ± 0.0       +12.5  +12.5 to +12.5  +12.5 to +12.5      higher",
        "held out      1        50.0*        +0.0    +0.0 to +0.0        one seed  not judged",
        "",
        "R-precision % ± standard deviation over seeds. Differences: tasks and seeds that both rows have,",
        "with 95% intervals.",
        "* Has other tasks than the baseline; its R-precision is over its own.",
    ]


def test_the_table_per_task_as_it_is_read():
    trials = [trial("mean", a=[0.5, 0.25], fever=[1]), trial("held out", fever=[0])]
    text = tasks_text(Comparison.of(trials, baseline="mean"))
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
    for text in (rows_text(comparison), tasks_text(comparison)):
        assert text is not None
        assert max(map(len, text.splitlines())) <= 120
        assert all(line.startswith("taco special") for line in text.splitlines()[1:10])
        assert "zation.log=1 " in text


def test_a_table_of_too_many_tasks_is_left_out():
    tasks = {f"a long task {number}": [0.5, 0] for number in range(8)}
    assert tasks_text(Comparison.of([trial("mean", **tasks)], baseline="mean")) is None


def test_what_else_the_trials_measured_as_it_is_read():
    zero_shot = {"prompt": {"b": (0.5, 0.0)}, "no prompt": {"b": (0.0, 0.0)}}
    worse = {"prompt": {"b": (0.0, 0.0)}, "no prompt": {"b": (0.0, 0.0)}}
    cost = Cost(
        retrievers=8,
        training_queries=6400,
        training_seconds=1.0,
        parameters=1_000_000,
        index_bytes=2_500_000,
        passages_embedded=4456,
    )
    ablation = Ablation(
        share=0.01,
        owned={"a": {"a": 0.3, "b": 0.1}, "b": {"a": 0.2, "b": 0.1}},
        random={"a": {"a": 0.1, "b": 0.0}, "b": {"a": 0.0, "b": 0.1}},
        own={"a": (0.3, 0.3), "b": (0.1, 0.1)},
        own_random={"a": (0.1, 0.1), "b": (0.1, 0.1)},
    )
    trials = [
        trial("mean", zero_shot=zero_shot, measured={"ablations": {"all elements": ablation}}, a=[1]),
        trial("taco", zero_shot=worse, measured={"cost": cost, "code": "1.0+b"}, a=[1]),
    ]
    comparison = Comparison.of(trials, baseline="mean")
    assert zero_shot_text(comparison).splitlines() == [
        "zero-shot R-precision %  prompt  difference     verdict  no prompt  difference     verdict",
        "mean                       25.0               reference        0.0               reference",
        "  b                        25.0                                0.0",
        "taco                        0.0       −25.0  not judged        0.0        +0.0  not judged",
        "  b                         0.0                                0.0",
    ]
    assert ablation_text(comparison).splitlines()[:-2] == [
        "fall, points         own  others  random  own − random    over queries  over seeds  largest  beyond    both",
        "mean, all elements  20.0    15.0    10.0         +10.0  +10.0 to +10.0    one seed   1 of 2  1 of 2  1 of 2",
        "",
    ]
    assert cost_text(comparison).splitlines() == [
        "cost  retrievers  training queries  parameters  index, MB  passages per refresh",
        "taco           8             6,400   1,000,000        2.5                 4,456",
    ]
    tables = (rows_text, tasks_text, zero_shot_text, ablation_text, cost_text)
    assert comparison_text(comparison) == "\n\n".join(table(comparison) for table in tables)


def test_an_ablated_row_is_compared_with_the_baseline():
    def of(row, seed, own):
        falls = {"a": {"a": own}}
        fall = Ablation(share=0.01, owned=falls, random={"a": {"a": 0.1}}, own={"a": (own,)}, own_random={"a": (0.1,)})
        return trial(row, seed=seed, measured={"ablations": {"all elements": fall}}, a=[1])

    trials = [of("mean", 0, 0.2), of("mean", 1, 0.3), of("taco", 0, 0.4), of("taco", 1, 0.5)]
    lines = ablation_text(Comparison.of(trials, baseline="mean")).splitlines()
    assert lines[2].split()[:7] == ["taco,", "all", "elements", "45.0", "0.0", "10.0", "+35.0"]
    assert lines[3].split()[:3] == ["to", "mean", "+20.0"]
    assert lines[3].endswith(" higher")


def test_trials_of_several_states_of_the_code_are_told():
    def of(code):
        return trial("mean" if code == "1.0+a" else "taco", measured={"code": code}, a=[1])

    assert "1.0" not in rows_text(Comparison.of([of("1.0+a")], baseline="mean"))
    text = rows_text(Comparison.of([of("1.0+a"), of("1.0+b")], baseline="mean"))
    assert text.splitlines()[-3:] == [
        "The trials were made by 2 states of the code:",
        "  1.0+a: mean",
        "  1.0+b: taco",
    ]
