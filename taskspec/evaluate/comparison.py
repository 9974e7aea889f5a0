"""From trials to the rows of a comparison, their differences, a strength curve and a recommendation.

Path: trials → [here] → comparison report, comparison text.  S seeds, Q queries of a task.  No files, no drawing; how
sure a difference is comes from `statistics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from taskspec.errors import ConfigError
from taskspec.evaluate.notation import difference_text, percent
from taskspec.evaluate.statistics import Difference, Floats, paired_difference
from taskspec.evaluate.trials import WAYS, Trial
from taskspec.specialize.analysis import Ablation

STRENGTH = "specialization.strength"
"""The key that curves are drawn over and a value is recommended of."""
ALL, EVEN, ODD = slice(None), slice(0, None, 2), slice(1, None, 2)
"""Which queries of a task, by their number."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """What the tables show in one line: one arm at one point of its grid, with all its seeds.

    Where a row has several candidates (learning rates), its scores are cross-fitted: the even-numbered queries of every
    task are measured by the candidate with the best average on the odd-numbered ones, and the other way round. So no
    query chooses the candidate that measures it, and a row gains nothing from candidates that suit some queries by
    luck. A lucky seed still helps its candidate: both halves share the trained models. Equal averages choose the first.
    Only the seeds that every candidate of the row has are used.
    """

    name: str
    arm: str
    values: Mapping[str, Any]
    """Dotted key → value of the arm's grid."""
    seeds: tuple[int, ...]
    """Ascending; empty for what no seed changes (BM25)."""
    scores: Mapping[str, Floats]
    """Task → (S, Q) R-precision, 0 to 1; S is 1 where there are no seeds."""
    candidates: Mapping[str, float]
    """Candidate → its average over seeds and tasks, on all queries; in the order of appearance."""
    chosen: tuple[str, str]
    """The candidates that measured the even-numbered and the odd-numbered queries."""
    trials: tuple[Trial, ...]
    """Of all candidates and seeds, the unused ones included."""

    @staticmethod
    def of(trials: Sequence[Trial]) -> Row:
        """The row of its trials, at least one; of two with the same candidate and seed the last counts.

        Raises: ConfigError if its candidates have no seed in common.
        """
        first = trials[0]
        by_candidate: dict[str, dict[int | None, Trial]] = {}
        for trial in trials:
            by_candidate.setdefault(trial.candidate, {})[trial.seed] = trial
        common = set[int | None].intersection(*map(set, by_candidate.values()))
        if not common:
            raise ConfigError(
                f"row {first.row!r}: its candidates {', '.join(map(repr, by_candidate))} have no seed in common; "
                f"run all of them with the same seeds"
            )
        seeds = tuple(sorted(seed for seed in common if seed is not None))
        scores = {
            candidate: {
                task: np.array([of_seed[seed].scores[task] for seed in seeds or (None,)]) for task in first.scores
            }
            for candidate, of_seed in by_candidate.items()
        }
        for_even = max(scores, key=lambda candidate: _average(scores[candidate], ODD))
        for_odd = max(scores, key=lambda candidate: _average(scores[candidate], EVEN))
        measured = {task: scores_SQ.copy() for task, scores_SQ in scores[for_even].items()}
        for task, scores_SQ in measured.items():
            scores_SQ[:, ODD] = scores[for_odd][task][:, ODD]
        return Row(
            name=first.row,
            arm=first.arm,
            values=first.values,
            seeds=seeds,
            scores=measured,
            candidates={candidate: _average(of_candidate, ALL) for candidate, of_candidate in scores.items()},
            chosen=(for_even, for_odd),
            trials=tuple(trials),
        )

    def averages_S(self) -> Floats:
        """(S,): of each seed, the mean over tasks of the mean over queries."""
        return np.asarray(np.mean([scores_SQ.mean(axis=1) for scores_SQ in self.scores.values()], axis=0))

    @property
    def average(self) -> float:
        """Over seeds and tasks; each task counts once."""
        return float(self.averages_S().mean())

    @property
    def std(self) -> float | None:
        """Standard deviation of the averages over seeds; None for fewer than 2 seeds."""
        return float(self.averages_S().std(ddof=1)) if len(self.seeds) > 1 else None

    def on(self, seeds: Sequence[int]) -> Row:
        """The row with some of its seeds only; as it is if no seed changes it."""
        if not self.seeds:
            return self
        return replace(self, seeds=tuple(seeds), scores=self._taken(tuple(self.scores), seeds))

    def on_task(self, task: str) -> Row:
        """The row with one task of `scores` only."""
        return replace(self, scores={task: self.scores[task]})

    def task_average(self, task: str) -> float:
        """Over the seeds and queries of one task of `scores`."""
        return float(self.scores[task].mean())

    def used_trials(self) -> list[Trial]:
        """The trials that measured the row: of the chosen candidates, with the seeds that count; of equal ones the
        last."""
        last = {(trial.candidate, trial.seed): trial for trial in self.trials}
        return [last[candidate, seed] for candidate in dict.fromkeys(self.chosen) for seed in self.seeds or (None,)]

    def ablations(self, elements: str) -> dict[int | None, Ablation]:
        """Seed → what was ablated of it; of two candidates that measured the row, with the last."""
        return {trial.seed: trial.ablations[elements] for trial in self.used_trials() if elements in trial.ablations}

    def minus(self, other: Row, task: str | None = None) -> Difference:
        """This row minus another, on the seeds that both have, on one task or on all that both have.

        A row without seeds pairs with every seed of the other.
        Raises: ConfigError if they have no seed, or no such task, in common.
        """
        tasks = [name for name in self.scores if name in other.scores and task in (None, name)]
        if not tasks:
            where = "any task" if task is None else f"task {task!r}"
            raise ConfigError(
                f"rows {self.name!r} and {other.name!r} cannot be compared on {where}: the first was measured on "
                f"{_listed(self.scores)}, the second on {_listed(other.scores)}; name tasks that both have"
            )
        seeds = [seed for seed in self.seeds if seed in other.seeds]
        if self.seeds and other.seeds and not seeds:
            raise ConfigError(
                f"rows {self.name!r} and {other.name!r} cannot be compared: their seeds, {_listed(self.seeds)} and "
                f"{_listed(other.seeds)}, have none in common; run both with the same seeds"
            )
        return paired_difference(self._taken(tasks, seeds), other._taken(tasks, seeds))

    def _taken(self, tasks: Sequence[str], seeds: Sequence[int]) -> dict[str, Floats]:
        """The scores of these tasks and seeds; without any seeds, all."""
        places = [self.seeds.index(seed) for seed in seeds] if self.seeds and seeds else ALL
        return {task: self.scores[task][places] for task in tasks}


def _average(scores: Mapping[str, Floats], queries: slice) -> float:
    """The mean over tasks of the mean over seeds and some of the queries; a task that has none of them counts 0."""
    parts = [scores_SQ[:, queries] for scores_SQ in scores.values()]
    return sum(float(part_SQ.mean()) for part_SQ in parts if part_SQ.size) / len(parts)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What to ship, by a curve."""

    value: float | None
    """Of those shown to be higher than the baseline the one with the highest average; the smallest of equals. None:
    none is shown to be higher, and the baseline costs less."""
    reason: str
    """A sentence with the numbers."""
    end: float | None
    """The value with the highest average of these, or else of all, if it is above the baseline's and the value is the
    largest that was tried, or the smallest and above 0: beyond it, one may be better."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Rows, one of them the baseline of the differences."""

    rows: tuple[Row, ...]
    """In the order of their first trials."""
    baseline: Row

    @staticmethod
    def of(trials: Iterable[Trial], baseline: str) -> Comparison:
        """The comparison of all rows that the trials name.

        Args: baseline: the name of one of them.
        Raises: ConfigError if it is none of them, or if the candidates of a row have no seed in common.
        """
        by_row: dict[str, list[Trial]] = {}
        for trial in trials:
            by_row.setdefault(trial.row, []).append(trial)
        rows = tuple(map(Row.of, by_row.values()))
        return Comparison(rows=rows, baseline=_named(rows, baseline))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those of the baseline, in its order."""
        return tuple(self.baseline.scores)

    @property
    def whole_rows(self) -> list[Row]:
        """The rows with the tasks of the baseline: averages of others, over other tasks, do not compare with theirs."""
        return [row for row in self.rows if row.scores.keys() == self.baseline.scores.keys()]

    def row(self, name: str) -> Row:
        """Raises: ConfigError with the known names."""
        return _named(self.rows, name)

    def compared_tasks(self, name: str) -> tuple[str, ...]:
        """The tasks that a row shares with the baseline: not all of them where tasks were held out of its training."""
        return tuple(task for task in self.tasks if task in self.row(name).scores)

    @cache  # noqa: B019 - a bootstrap takes a third of a second, and tables and figures ask again
    def difference(self, name: str, other: str | None = None, task: str | None = None) -> Difference:
        """A row minus another, by default the baseline, as `Row.minus` takes it."""
        return self.row(name).minus(self.baseline if other is None else self.row(other), task)

    @cache  # noqa: B019
    def own_minus_random(self, name: str, elements: str, *, to_baseline: bool = False) -> Difference | None:
        """How much more a task's own queries lose of R-precision by zeroing what it owns most than by zeroing random
        elements.

        Args: elements: a key of `Trial.ablations`. to_baseline: how much larger that is than the baseline's, on the
            seeds that both were ablated with.
        Returns: None if the row was not ablated, or with `to_baseline` no seed of both on the same tasks.
        """
        mine = self.row(name).ablations(elements)
        if not to_baseline:
            return paired_difference(_falls(mine, "own"), _falls(mine, "own_random")) if mine else None
        theirs = self.baseline.ablations(elements)
        seeds = [seed for seed in mine if seed in theirs]
        beyond = []
        for found in (mine, theirs):
            own, random = (_falls({seed: found[seed] for seed in seeds}, kind) for kind in ("own", "own_random"))
            beyond.append({task: own[task] - random[task] for task in own})
        of_row, of_baseline = beyond
        return paired_difference(of_row, of_baseline) if seeds and of_row.keys() == of_baseline.keys() else None

    def zero_shot_rows(self) -> dict[Row, dict[str, Row]]:
        """Row → way of asking, as in `WAYS` → that row on the tasks held out of its training, for all that have some.

        All its queries are measured by the candidate with the best average on the trained tasks: no query of a held-out
        task takes part in that choice.
        """
        result = {}
        for row in self.rows:
            if row.trials[0].zero_shot:
                best = max(row.candidates, key=row.candidates.__getitem__)
                used = [one for one in row.trials if one.candidate == best and one.seed in (row.seeds or (None,))]
                result[row] = {way: Row.of([replace(one, scores=one.zero_shot[way]) for one in used]) for way in WAYS}
        return result

    def zero_shot_reference(self, row: Row, zero_shot: Mapping[Row, Mapping[str, Row]]) -> Row:
        """What a row's zero-shot answers are compared with: of the rows kept from the same tasks the baseline if it is
        one of them, else the one with the lowest strength, where one without any counts as 0.

        Args: zero_shot: as `zero_shot_rows` returns it.
        """
        tasks = zero_shot[row][WAYS[0]].scores.keys()
        alike = [other for other, found in zero_shot.items() if found[WAYS[0]].scores.keys() == tasks]
        if self.baseline in alike:
            return self.baseline
        return min(alike, key=lambda other: float(other.values.get(STRENGTH, 0)))

    def curve(self, arm: str, key: str) -> tuple[tuple[float, Row], ...]:
        """(value, row) of every row of an arm, by ascending value; empty unless numbers of `key` are the arm's grid.

        Args: key: as in `Row.values`. With a second key in the grid there is no single curve.
        """
        rows = [row for row in self.rows if row.arm == arm]
        if not all(row.values.keys() == {key} and isinstance(row.values[key], int | float) for row in rows):
            return ()
        return tuple(sorted(((float(row.values[key]), row) for row in rows), key=lambda point: point[0]))

    def curve_to_ship(self, arm: str, key: str) -> tuple[tuple[float, Row], ...]:
        """The curve if there is something to choose: 2 points at least, and no tasks held out, as such a curve is about
        transfer; else empty."""
        curve = self.curve(arm, key)
        return () if len(curve) < 2 or curve[0][1].trials[0].zero_shot else curve

    def recommend(self, arm: str, key: str) -> Recommendation | None:
        """What a curve to ship from says about its key, on the seeds that all its points and the baseline have; None if
        there is no such curve, or if these are fewer than 2: one shows nothing."""
        curve = self.curve_to_ship(arm, key)
        seeds = shared_seeds([self.baseline, *(row for _, row in curve)])
        if not curve or len(seeds) < 2:
            return None
        baseline, rows = self.baseline.on(seeds), {value: row.on(seeds) for value, row in curve}
        average = {value: row.average for value, row in rows.items()}
        to_baseline = {value: row.minus(baseline) for value, row in rows.items()}
        higher = [value for value in average if to_baseline[value].verdict == "higher"]
        best = max(higher or average, key=average.__getitem__)
        at_end = best == curve[-1][0] or best == curve[0][0] > 0
        end = best if at_end and to_baseline[best].mean > 0 else None
        name = self.baseline.name
        change, shared = difference_text(to_baseline[best]), f"on the {len(seeds)} seeds that all have"
        if not higher:
            reason = f"{shared}, none is shown to be higher than {name}; {best:g} has the highest average: {change}"
            return Recommendation(value=None, reason=reason, end=end)
        like = [f"{v:g}" for v in average if v != best and rows[v].minus(rows[best]).verdict == "no difference shown"]
        reason = (
            f"{best:g} has the highest average, {percent(average[best])} {shared}, of those shown to be higher than "
            f"{name} ({change})" + (f"; not told apart from it: {', '.join(like)}" if like else "")
        )
        return Recommendation(value=best, reason=reason, end=end)


def _falls(found: Mapping[int | None, Ablation], kind: Literal["own", "own_random"]) -> dict[str, Floats]:
    """Task → (S, Q); empty for no seeds."""
    by_seed = [getattr(one, kind) for one in found.values()]
    return {task: np.array([falls[task] for falls in by_seed]) for task in by_seed[0]} if by_seed else {}


def shared_seeds(rows: Iterable[Row]) -> tuple[int, ...]:
    """The seeds that all of the rows have, those that no seed changes left out, ascending."""
    having = [set(row.seeds) for row in rows if row.seeds]
    return tuple(sorted(set.intersection(*having))) if having else ()


def _named(rows: Sequence[Row], name: str) -> Row:
    for row in rows:
        if row.name == name:
            return row
    raise ConfigError(f"row {name!r} is not in the comparison; its rows are: {_listed(row.name for row in rows)}")
