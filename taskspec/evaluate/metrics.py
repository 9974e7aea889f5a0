"""Page-level retrieval metrics of one query, as KILT defines them.

Path: guessed pages + evidence sets → [here] → tables.  Pure: pages are ids, compared as they are; reading files and
cleaning ids is not here. Source: kilt/eval_retrieval.py of the KILT repository (2021).

An *evidence set* is the gold pages of one output of a record: all of them together support one answer. A query has
several where several answers, or several proofs of one answer, are known.

R-precision counts pages. Precision, recall and success rate at k count the *places* of a grouped ranking, in which the
pages of an evidence set share one place: the last one found decides where it stands. Walking down the guesses,

    a page of no set                         adds the place OTHER;
    a page of a set                          removes that set's earlier place and adds one at the end:
                                             partial, or complete once all pages of the set have come;
    a page of two sets                       does so for each of them, so adds two places.

Worked example, gold sets {A, B} and {C}, guesses A, X, B, C:

    guess   places afterwards
    A       AB partial
    X       AB partial, other
    B       other, AB complete               the partial place moved to the end
    C       other, AB complete, C complete

    precision@2 = 1/2, recall@2 = 1/2, success_rate@2 = 1; recall@3 = 2/2 although B is the third page and C the fourth.
    R-precision: {A, B} has R = 2 and one hit in A, X: 1/2; {C} has R = 1 and no hit in A: 0. The larger counts: 1/2.

Two consequences surprise: guesses A, B have recall@1 = 1 for gold {A, B}, and A, X, B have recall@2 = 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

RPREC = "Rprec"
"""The key of R-precision, as KILT spells it."""

EvidenceSets = Sequence[Collection[str]]
"""One collection of page ids per output of the gold record that has provenance; repeated ids count once."""


@dataclass(frozen=True, slots=True)
class Place:
    """One place of the grouped ranking."""

    evidence_set: int | None
    """Which distinct evidence set stands here; None for a page of no set."""
    complete: bool
    """Whether all pages of the set have come."""


OTHER = Place(evidence_set=None, complete=False)


def distinct(pages: Iterable[str]) -> list[str]:
    """The pages in the order of their first appearance, each once."""
    return list(dict.fromkeys(pages))


def r_precision(guessed_pages: Sequence[str], evidence_sets: EvidenceSets) -> float:
    """The best over the evidence sets of: gold pages among the first R distinct guesses / R, with R pages in the set.

    Returns: 0 to 1; 0 where there is no evidence set, or only empty ones.
    """
    guessed = distinct(guessed_pages)
    best = 0.0
    for pages in map(frozenset, evidence_sets):
        if pages:
            best = max(best, len(pages.intersection(guessed[: len(pages)])) / len(pages))
    return best


def distinct_sets(evidence_sets: EvidenceSets) -> list[frozenset[str]]:
    """Equal evidence sets merged, in the order of their first appearance. An empty set is one like any other."""
    return list(dict.fromkeys(map(frozenset, evidence_sets)))


def grouped_ranking(guessed_pages: Sequence[str], evidence_sets: EvidenceSets) -> list[Place]:
    """The places that the module's docstring describes, best first; repeated guesses count once."""
    missing = [set(pages) for pages in distinct_sets(evidence_sets)]
    places: list[Place] = []
    for page in distinct(guessed_pages):
        belongs = [number for number, pages in enumerate(missing) if page in pages]
        for number in belongs:
            missing[number].remove(page)
            earlier = Place(number, complete=False)
            if earlier in places:
                places.remove(earlier)
            places.append(Place(number, complete=not missing[number]))
        if not belongs:
            places.append(OTHER)
    return places


def query_metrics(guessed_pages: Sequence[str], evidence_sets: EvidenceSets, at: Iterable[int]) -> dict[str, float]:
    """All metrics of one query.

    Args: guessed_pages: best first. at: the k of precision@k, recall@k and success_rate@k, each ≥ 1.
    Returns: `Rprec`, then `precision@k`, `recall@k` and `success_rate@k` for each k, ascending; all 0 to 1.
        precision@k divides by k even where fewer pages are guessed; recall@k by the number of distinct evidence sets,
        an empty one included, which nothing can complete.
    """
    places = grouped_ranking(guessed_pages, evidence_sets)
    sets = len(distinct_sets(evidence_sets))
    result = {RPREC: r_precision(guessed_pages, evidence_sets)}
    for k in sorted(set(at)):
        complete = sum(place.complete for place in places[:k])
        result[f"precision@{k}"] = complete / k
        result[f"recall@{k}"] = complete / sets if sets else 0.0
        result[f"success_rate@{k}"] = float(complete > 0)
    return result


def average(queries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over queries, those without gold pages or without guesses included.

    Args: queries: at least one, all with the same keys.
    """
    return {name: sum(query[name] for query in queries) / len(queries) for name in queries[0]}
