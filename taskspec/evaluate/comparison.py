"""From trials to the rows of a comparison, their differences, a strength curve and a recommendation.

Path: trials → [here] → comparison report, terminal.  S seeds, Q queries of a task.  No files, no drawing; how sure a
difference is comes from `statistics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from taskspec.errors import ConfigError
from taskspec.evaluate.statistics import CONFIDENCE, Difference, Floats, Interval, paired_difference
from taskspec.evaluate.trials import Trial

TEXT_WIDTH = 120
"""Columns of a terminal that the tables keep to."""
NAME_WIDTH = 20
"""Columns to which a row's name may be cut."""

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

    def task_average(self, task: str) -> float:
        """Over the seeds and queries of one task of `scores`."""
        return float(self.scores[task].mean())

    def used_trials(self) -> list[Trial]:
        """The trials that measured the row: of the chosen candidates, with the seeds that count; of equal ones the
        last."""
        last = {(trial.candidate, trial.seed): trial for trial in self.trials}
        return [last[candidate, seed] for candidate in dict.fromkeys(self.chosen) for seed in self.seeds or (None,)]

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
    """The value of a curve to ship."""

    value: float
    """The smallest one whose average is not shown to be lower than the best one's."""
    best: float
    """The one with the highest average; the smallest of equal ones."""
    reason: str
    """A sentence with the numbers."""
    ends: tuple[float, ...]
    """Those of the two that lie at an end of the range: `value` if it is the smallest tried and above 0, as a smaller
    one may do as well, and `best` if it is the largest, as a larger one may be better."""


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

    def zero_shot_row(self, name: str, way: str) -> Row | None:
        """A row measured on the tasks that were held out of its training.

        All its queries are measured by the candidate with the best average on the trained tasks: no query of a held-out
        task takes part in that choice.
        Args: way: a key of `Trial.zero_shot`.
        Returns: None if nothing was held out.
        """
        row = self.row(name)
        if way not in row.trials[0].zero_shot:
            return None
        best = max(row.candidates, key=row.candidates.__getitem__)
        used = [trial for trial in row.trials if trial.candidate == best and trial.seed in (row.seeds or (None,))]
        return Row.of([replace(trial, scores=trial.zero_shot[way]) for trial in used])

    def curve(self, arm: str, key: str) -> tuple[tuple[float, Row], ...]:
        """(value, row) of every row of an arm, by ascending value; empty unless numbers of `key` are the arm's grid.

        Args: key: as in `Row.values`. With a second key in the grid there is no single curve.
        """
        rows = [row for row in self.rows if row.arm == arm]
        if not all(row.values.keys() == {key} and isinstance(row.values[key], int | float) for row in rows):
            return ()
        return tuple(sorted(((float(row.values[key]), row) for row in rows), key=lambda point: point[0]))

    def recommend(self, arm: str, key: str) -> Recommendation | None:
        """What a curve says about its key; None if it has fewer than 2 points, or tasks were held out: such a curve is
        about transfer, and none of its rows is one to ship."""
        curve = self.curve(arm, key)
        if len(curve) < 2 or curve[0][1].trials[0].zero_shot:
            return None
        best, best_row = max(curve, key=lambda point: point[1].average)
        against_best = ((value, row, row.minus(best_row)) for value, row in curve)
        # There is one: the best row is not lower than itself.
        value, row, found = next(point for point in against_best if point[2].verdict != "lower")
        reason = f"{key.rpartition('.')[2]} {best:g} has the highest average, {percent(best_row.average)}"
        if row is not best_row:
            reason += f"; {value:g} is the smallest that is not shown to be lower ({difference_text(found)})"
        elif row is curve[0][1]:
            reason += ", and is the smallest tried"
        else:
            reason += "; all smaller ones are shown to be lower"
        ends = [value] if value == curve[0][0] and value > 0 else []
        ends += [best] if best == curve[-1][0] else []
        return Recommendation(value=value, best=best, reason=reason, ends=tuple(ends))

    def to_text(self) -> str:
        """For a terminal, in percent: one line per row with its average and its difference to the baseline."""
        lines = [["row", "seeds", "R-precision", "difference", "over queries", "over seeds", "verdict"]]
        for row in self.rows:
            mark = "" if row.scores.keys() == self.baseline.scores.keys() else "*"
            cells = [row.name, str(len(row.seeds) or "–"), average_text(row) + mark]
            if row is self.baseline:
                lines.append([*cells, "", "", "", "baseline"])
            else:
                found = self.difference(row.name)
                intervals = [interval_text(found.queries), interval_text(found.seeds)]
                lines.append([*cells, signed(found.mean), *intervals, found.verdict])
        notes = (
            f"R-precision % ± standard deviation over seeds. Differences: tasks and seeds that both rows have,\n"
            f"with {CONFIDENCE:.0%} intervals."
        )
        if any(row.scores.keys() != self.baseline.scores.keys() for row in self.rows):
            notes += "\n* Has other tasks than the baseline; its R-precision is over its own."
        return f"{_table(lines)}\n\n{notes}"

    def task_table_text(self) -> str | None:
        """For a terminal: R-precision % of each row on each task; None if so many tasks do not fit."""
        lines = [["R-precision %", *self.tasks]]
        for row in self.rows:
            cells = [percent(row.task_average(task)) if task in row.scores else "–" for task in self.tasks]
            lines.append([row.name, *cells])
        text = _table(lines)
        return text if max(map(len, text.splitlines())) <= TEXT_WIDTH else None


def _named(rows: Sequence[Row], name: str) -> Row:
    for row in rows:
        if row.name == name:
            return row
    raise ConfigError(f"row {name!r} is not in the comparison; its rows are: {_listed(row.name for row in rows)}")


def percent(share: float) -> str:
    """`26.1` of 0.261."""
    return f"{100 * share:.1f}"


def signed(difference: float) -> str:
    """`+0.4` of 0.004, with a real minus sign; what rounds to zero is `+0.0`."""
    return f"{100 * difference:+z.1f}".replace("-", "−")


def average_text(row: Row) -> str:
    """`26.1 ± 0.4`; `26.1` for fewer than 2 seeds."""
    return percent(row.average) + ("" if row.std is None else f" ± {percent(row.std)}")


def interval_text(interval: Interval | None) -> str:
    """`−0.9 to +0.2`; `one seed` for no interval."""
    return "one seed" if interval is None else f"{signed(interval.low)} to {signed(interval.high)}"


def difference_text(difference: Difference) -> str:
    """`−0.4, over queries −0.9 to +0.2, over seeds −1.0 to +0.3`."""
    seeds = "one seed" if difference.seeds is None else f"over seeds {interval_text(difference.seeds)}"
    return f"{signed(difference.mean)}, over queries {interval_text(difference.queries)}, {seeds}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns at the width of their cells; the names in front are cut to what remains of the terminal."""
    name_width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    name_width = min(name_width, max(NAME_WIDTH, TEXT_WIDTH - sum(width + 2 for width in widths)))
    return "\n".join(
        "  ".join([_cut(name, name_width).ljust(name_width), *map(str.rjust, cells, widths)]) for name, *cells in lines
    )


def _cut(name: str, width: int) -> str:
    """At most `width` columns: cut in the middle, because names of rows tell themselves apart at their ends."""
    tail = width // 2
    return name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}"
