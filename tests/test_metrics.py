"""KILT's page-level metrics on cases worked by hand, and the laws that they obey."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec.evaluate.metrics import (
    OTHER,
    Place,
    average,
    grouped_ranking,
    query_metrics,
    r_precision,
)

PAGES = st.sampled_from("ABCDEFGH")
GUESSES = st.lists(PAGES, max_size=12)
SETS = st.lists(st.lists(PAGES, max_size=4), max_size=4)


def partial(evidence_set: int) -> Place:
    return Place(evidence_set, complete=False)


def complete(evidence_set: int) -> Place:
    return Place(evidence_set, complete=True)


def test_the_docstrings_example_comes_out_as_written():
    guesses, sets = list("AXBC"), [{"A", "B"}, {"C"}]
    assert grouped_ranking(guesses[:1], sets) == [partial(0)]
    assert grouped_ranking(guesses[:2], sets) == [partial(0), OTHER]
    assert grouped_ranking(guesses[:3], sets) == [OTHER, complete(0)]
    assert grouped_ranking(guesses, sets) == [OTHER, complete(0), complete(1)]
    metrics = query_metrics(guesses, sets, [2, 3])
    assert metrics == {
        "Rprec": 1 / 2,
        "precision@2": 1 / 2,
        "recall@2": 1 / 2,
        "success_rate@2": 1,
        "precision@3": 2 / 3,
        "recall@3": 1,
        "success_rate@3": 1,
    }


@pytest.mark.parametrize(
    ("guesses", "sets", "expected"),
    [
        pytest.param("A", ["A"], 1, id="the only gold page first"),
        pytest.param("XA", ["A"], 0, id="R is 1, so the second guess does not count"),
        pytest.param("AXB", ["AB"], 1 / 2, id="R is 2: one of the first two"),
        pytest.param("BA", ["AB"], 1, id="the order within the first R does not count"),
        pytest.param("AAB", ["AB"], 1, id="a repeated guess counts once"),
        pytest.param("AB", ["AAB"], 1, id="a repeated gold page counts once"),
        pytest.param("CX", ["AB", "C"], 1, id="the best set counts"),
        pytest.param("AX", ["AB", "C"], 1 / 2, id="a part of the larger set beats none of the smaller"),
        pytest.param("A", ["ABCD"], 1 / 4, id="too few guesses do not shrink R"),
        pytest.param("", ["A"], 0, id="no guess"),
        pytest.param("A", [], 0, id="no evidence set"),
        pytest.param("A", [""], 0, id="an empty evidence set"),
    ],
)
def test_r_precision(guesses, sets, expected):
    assert r_precision(list(guesses), list(map(list, sets))) == expected


@pytest.mark.parametrize(
    ("guesses", "sets", "places"),
    [
        pytest.param("AB", ["AB"], [complete(0)], id="a complete set takes one place"),
        pytest.param("AXB", ["AB"], [OTHER, complete(0)], id="its last page decides where"),
        pytest.param("AXBYC", ["ABC"], [OTHER, OTHER, complete(0)], id="a partial place moves until complete"),
        pytest.param("AX", ["AB"], [partial(0), OTHER], id="a partial place stays where nothing follows"),
        pytest.param("A", ["A", "AB"], [complete(0), partial(1)], id="a page of two sets adds two places"),
        pytest.param("XAB", ["AB", "AC"], [OTHER, partial(1), complete(0)], id="sets that share a page move alone"),
        pytest.param("AA", ["A"], [complete(0)], id="a repeated guess adds no place"),
        pytest.param("BA", ["AB", "BA", "C"], [complete(0)], id="equal sets are one"),
        pytest.param("AXY", [], [OTHER, OTHER, OTHER], id="no evidence set"),
        pytest.param("X", [""], [OTHER], id="an empty set is never complete"),
    ],
)
def test_places_of_the_grouped_ranking(guesses, sets, places):
    assert grouped_ranking(list(guesses), list(map(list, sets))) == places


@pytest.mark.parametrize(
    ("guesses", "sets", "k", "precision", "recall", "success"),
    [
        pytest.param("AB", ["AB"], 1, 1, 1, 1, id="two pages in one place"),
        pytest.param("AXB", ["AB"], 1, 0, 0, 0, id="complete at the second place"),
        pytest.param("AXB", ["AB"], 2, 1 / 2, 1, 1, id="the third page at the second place"),
        pytest.param("AX", ["AB"], 5, 0, 0, 0, id="a partial set is no success"),
        pytest.param("A", ["A", "B"], 5, 1 / 5, 1 / 2, 1, id="short guesses: precision divides by k"),
        pytest.param("AB", ["A", "B", "A"], 2, 1, 1, 1, id="equal sets count once"),
        pytest.param("AB", ["A", "AB"], 3, 2 / 3, 1, 1, id="a shared page completes both"),
        pytest.param("A", ["A", ""], 1, 1, 1 / 2, 1, id="an empty set lowers recall"),
        pytest.param("", ["A"], 1, 0, 0, 0, id="no guess"),
        pytest.param("A", [], 1, 0, 0, 0, id="no evidence set"),
    ],
)
def test_precision_recall_and_success_rate_at_k(guesses, sets, k, precision, recall, success):
    metrics = query_metrics(list(guesses), list(map(list, sets)), [k])
    assert (metrics[f"precision@{k}"], metrics[f"recall@{k}"], metrics[f"success_rate@{k}"]) == (
        precision,
        recall,
        success,
    )


def test_names_come_by_k_and_each_once():
    assert list(query_metrics(["A"], [["A"]], [5, 1, 5])) == [
        "Rprec",
        "precision@1",
        "recall@1",
        "success_rate@1",
        "precision@5",
        "recall@5",
        "success_rate@5",
    ]


def test_the_average_counts_queries_without_gold_or_guesses():
    queries = [query_metrics(list(guesses), sets, [1]) for guesses, sets in (("A", ["A"]), ("", ["A"]), ("A", []))]
    assert average(queries) == {name: pytest.approx(1 / 3) for name in queries[0]}


@given(GUESSES, SETS, st.integers(1, 8))
def test_metrics_lie_between_0_and_1_and_recall_grows_with_k(guesses, sets, k):
    metrics = query_metrics(guesses, sets, [k, k + 1])
    assert all(0 <= value <= 1 for value in metrics.values())
    assert metrics[f"recall@{k}"] <= metrics[f"recall@{k + 1}"]
    assert metrics[f"success_rate@{k}"] == (metrics[f"recall@{k}"] > 0)


@given(GUESSES, SETS, st.randoms(use_true_random=False))
def test_order_and_repetition_of_gold_pages_do_not_matter(guesses, sets, random):
    shuffled = [random.sample(pages, len(pages)) + pages[:1] for pages in sets]
    assert query_metrics(guesses, sets, [1, 3]) == query_metrics(guesses, shuffled, [1, 3])


@given(GUESSES, st.lists(PAGES, min_size=1, max_size=8, unique=True))
def test_sets_of_one_page_give_the_textbook_metrics(guesses, gold):
    metrics = query_metrics(guesses, [[page] for page in gold], [3])
    found = len(set(gold).intersection(list(dict.fromkeys(guesses))[:3]))
    assert metrics["precision@3"] == found / 3
    assert metrics["recall@3"] == found / len(gold)
    assert metrics["Rprec"] == float(bool(guesses) and guesses[0] in gold)


@given(SETS)
def test_guessing_every_set_page_by_page_completes_all_of_them(sets):
    guesses = [page for pages in sets for page in pages]
    reachable = {frozenset(pages) for pages in sets if pages}
    places = grouped_ranking(guesses, sets)
    assert sum(place.complete for place in places) == len(reachable)
    assert OTHER not in places
