"""The report of a comparison: one HTML page, its figures as PNG and CSV beside it, its tables as CSV.

Path: comparison → [here] → a person.  What pages are made of is in `page`; what is compared, and how sure it is, was
decided in `comparison`. Nothing is measured here. The page shows percent; CSV files hold shares from 0 to 1, unrounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from taskspec.config import Config
from taskspec.evaluate import page
from taskspec.evaluate.comparison import (
    Comparison,
    Recommendation,
    Row,
    average_text,
    interval_text,
    percent,
    signed,
)
from taskspec.evaluate.page import Cell, Grid
from taskspec.evaluate.statistics import CONFIDENCE, Difference, Verdict, seed_interval
from taskspec.evaluate.trials import Cost, Trial
from taskspec.specialize.analysis import Ablation

STRENGTH = "specialization.strength"
"""The key that curves are drawn over."""
WAYS = {"prompt": "-", "no prompt": ":"}
"""Of answering a task that was held out of training, as `Trial.zero_shot` names them → how a line is drawn."""
COURSES_SHOWN = 8
LEANING = ("entropy", "gradient_ratio")
"""Figures of the training log that are 1 where the update is the mean of the tasks' gradients."""
MAPS_OPEN = 4
"""More ablation maps than this are folded."""
MARKS: dict[Verdict, str] = {"higher": "▲", "lower": "▼", "no difference shown": ""}
"""Verdict → its mark."""
CHANGE = ("difference", "queries_low", "queries_high", "seeds_low", "seeds_high", "verdict")
"""Columns of CSV files, as `_change` fills them."""
NONE = Cell("–")


def write_comparison(
    folder: Path,
    comparison: Comparison,
    *,
    title: str,
    facts: Mapping[str, str],
    questions: Mapping[str, str],
    config: Config,
) -> Path:
    """Writes `report.html`, `<name>.png` and `<name>.csv` of each figure, and `<name>.csv` of each table.

    Args: folder: is made where it does not exist. facts: what was run, label → text. questions: arm → what it should
        change, said before it ran.
    Returns: the path of the page.
    Raises: ConfigError if a row has no seed, or no task, in common with the baseline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arms = dict.fromkeys(row.arm for row in comparison.rows)
    advice = {arm: found for arm in arms if (found := comparison.recommend(arm, STRENGTH))}
    with matplotlib.rc_context(page.DRAWING):
        sections = {
            "What was run": page.pairs(facts),
            "Recommended strength": page.beside(_advice(arm, found) for arm, found in advice.items()) if advice else "",
            "All rows": _all_rows(folder, comparison, questions),
            "R-precision per task": _per_task(folder, comparison),
            "R-precision over strength": _strength(folder, comparison, advice) if advice else "",
            "Who owns the parameters": _ownership(folder, comparison),
            "The course of training": _course(folder, comparison),
            "Proof by ablation": _ablation(folder, comparison),
            "Tasks held out of training": _transfer(folder, comparison),
            "Cost of ownership": _cost(folder, comparison),
            "Versions": page.pairs(page.versions()),
            "Resolved configuration": page.configuration(config),
        }
    return page.write_page(folder / "report.html", title, sections)


# --- what all sections use --------------------------------------------------------------------------------------------


def _used(row: Row) -> list[Trial]:
    """The trials that measured a row: of the chosen candidates, with the seeds that count; of equal ones the last."""
    last = {(trial.candidate, trial.seed): trial for trial in row.trials}
    return [last[candidate, seed] for candidate in dict.fromkeys(row.chosen) for seed in row.seeds or (None,)]


def _whole(comparison: Comparison) -> list[Row]:
    """The rows with the tasks of the baseline: averages of others, over other tasks, do not compare with theirs."""
    return [row for row in comparison.rows if row.scores.keys() == comparison.baseline.scores.keys()]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _mean_grid(grids: Sequence[Grid]) -> Grid:
    """Over trials, cell by cell."""
    first = grids[0]
    return {row: {column: _mean(grid[row][column] for grid in grids) for column in first[row]} for row in first}


def _change(found: Difference | None) -> tuple[object, ...]:
    """The fields of `CHANGE`; None is the baseline itself."""
    if found is None:
        return (*[None] * 5, "baseline")
    seeds = (None, None) if found.seeds is None else astuple(found.seeds)
    return (found.mean, *astuple(found.queries), *seeds, found.verdict)


def _mark(found: Difference) -> tuple[str, str]:
    """`+0.4 ▲`, and the class that colors it; neither mark nor color where no difference is shown."""
    mark = MARKS[found.verdict]
    return f"{signed(found.mean)} {mark}".strip(), found.verdict if mark else ""


def _change_cell(found: Difference | None) -> Cell:
    """A difference with both intervals below it."""
    if found is None:
        return NONE
    return Cell(*_mark(found), f"{interval_text(found.queries)} · {interval_text(found.seeds)}")


def _figure(
    folder: Path, name: str, text: str, drawing: Figure, columns: Sequence[str], records: Iterable[Sequence[object]]
) -> str:
    page.write_csv(folder / f"{name}.csv", columns, records)
    return page.save_figure(folder, name, f"{text} ({name}.csv)", drawing)


def _maps(
    folder: Path, name: str, text: str, grids: Mapping[str, Grid], *, signed: bool, rows: str, columns: str
) -> str:
    """A figure of heat maps, title → shares."""
    percents = {
        title: {row: {column: 100 * value for column, value in line.items()} for row, line in grid.items()}
        for title, grid in grids.items()
    }
    records = [
        (title, row, column, value)
        for title, grid in grids.items()
        for row, line in grid.items()
        for column, value in line.items()
    ]
    drawing = page.draw_maps(percents, signed=signed, rows=rows, columns=columns)
    return _figure(folder, name, text, drawing, ["map", rows, columns, "value"], records)


# --- recommendation and rows ------------------------------------------------------------------------------------------


def _advice(arm: str, found: Recommendation) -> str:
    warning = f"⚠ The best value, {found.best:g}, lies at an end of the range: a better one may lie beyond. Try more."
    text = page.note(f"{arm}: {found.value:g}", "lead") + page.note(f"{found.reason}.", "sentence")
    return f"<article>{text}{page.note(warning, 'warning') if found.at_end else ''}</article>"


def _all_rows(folder: Path, comparison: Comparison, questions: Mapping[str, str]) -> str:
    head = [*map(Cell, ("row", "average ± std", "seeds", "difference", "over queries", "over seeds", "verdict"))]
    head.append(Cell("candidate", "text"))
    columns = ["row", "arm", "question", "average", "std", "seeds", "tasks", *CHANGE, "chosen_even", "chosen_odd"]
    whole = _whole(comparison)
    lines, records, verdicts, arm = [], [], [], ""
    for row in comparison.rows:
        question = questions.get(row.arm, "")
        if row.arm != arm and questions:
            lines.append(page.group_line(f"{row.arm}: {question}" if question else row.arm, len(head)))
        arm = row.arm
        cells = [Cell(average_text(row), note="" if row in whole else f"over {len(row.scores)} tasks")]
        cells.append(Cell(str(len(row.seeds) or "–"), "count"))
        if row is comparison.baseline:
            found = None
            cells += [NONE, NONE, NONE, Cell("baseline")]
        else:
            found = comparison.difference(row.name)
            verdicts.append(found.verdict)
            cells += map(Cell, (signed(found.mean), interval_text(found.queries), interval_text(found.seeds)))
            cells.append(Cell(f"{MARKS[found.verdict]} {found.verdict}".strip(), _mark(found)[1]))
        even, odd = row.chosen
        chosen = even if even == odd else f"{even} for even queries, {odd} for odd ones"
        lines.append(page.line(Cell(row.name), [*cells, Cell(chosen or "–", "text")]))
        averages = (row.average, row.std, len(row.seeds), len(row.scores))
        records.append((row.name, row.arm, question, *averages, *_change(found), even, odd))
    page.write_csv(folder / "rows.csv", columns, records)
    counts = ", ".join(f"{verdict}: {verdicts.count(verdict)}" for verdict in MARKS)
    summary = page.note(f"{len(verdicts)} rows against {comparison.baseline.name}. {counts}.", "lead")
    return summary + page.table(head, lines) + page.note(ROWS_NOTE)


def _per_task(folder: Path, comparison: Comparison) -> str:
    lines, records = [], []
    for row in comparison.rows:
        cells = dict.fromkeys(comparison.tasks, NONE)
        for task in comparison.compared_tasks(row.name):
            found = None if row is comparison.baseline else comparison.difference(row.name, task=task)
            change, kind = _mark(found) if found else ("baseline", "")
            cells[task] = Cell(percent(row.task_average(task)), kind, change)
            records.append((row.name, task, row.task_average(task), *_change(found)))
        lines.append(page.line(Cell(row.name), cells.values()))
    page.write_csv(folder / "tasks.csv", ["row", "task", "average", *CHANGE], records)
    return page.table([Cell("row"), *map(Cell, comparison.tasks)], lines) + page.note(TASKS_NOTE)


# --- curves over strength ---------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    label: str
    color: str
    style: str
    points: Sequence[tuple[float, Row]]


class _Plot(NamedTuple):
    lines: Sequence[_Line]
    levels: Sequence[tuple[str, str, float]]
    """Label, style and average of what has no strength. The first stands at the same height in all plots."""
    marked: float | None = None
    """The strength to point out."""


def _strength(folder: Path, comparison: Comparison, advice: Mapping[str, Recommendation]) -> str:
    plots = {}
    for arm, found in advice.items():
        curve = comparison.curve(arm, STRENGTH)
        tasks = comparison.compared_tasks(curve[0][1].name)
        level = _mean(comparison.baseline.task_average(task) for task in tasks)
        line = _Line("average over tasks", page.COLORS[1], "-", curve)
        plots[arm] = _Plot([line], [(comparison.baseline.name, "--", level)], found.value)
    return page.beside([_curves(folder, "strength", "R-precision, %, over strength", plots)]) + page.note(CURVES_NOTE)


def _curves(folder: Path, name: str, text: str, plots: Mapping[str, _Plot]) -> str:
    """A plot per arm, over equally spaced strengths: 0.1 and 0.25 need as much room as 8 and 16."""
    strengths = sorted({value for plot in plots.values() for line in plot.lines for value, _ in line.points})
    across = min(len(plots), 2)
    down = math.ceil(len(plots) / across)
    figure = page.canvas(0.6 + (2.6 if across == 1 else 1.8) * down)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    handles: dict[str, Line2D] = {}
    records: list[tuple[object, ...]] = []
    below, above = _reach(plots.values())
    for axes, (arm, plot) in zip(panels, plots.items(), strict=False):
        for label, style, level in plot.levels:
            handles[label] = axes.axhline(100 * level, color=page.COLORS[0], linestyle=style, linewidth=1)
            records.append((arm, label, None, "average", level))
        for number, line in enumerate(plot.lines):
            handles[line.label] = _draw_line(axes, line, strengths, 0.2 * number)
            for value, row in line.points:
                records += [(arm, line.label, value, *observed) for observed in _observations(row)]
        if plot.marked is not None:
            at = strengths.index(plot.marked)
            handles["recommended"] = axes.axvline(at, color=page.COLORS[3], linewidth=8, alpha=0.25, zorder=0)
        axes.set_title(arm)
        middle = plot.levels[0][2]
        axes.set_ylim(100 * (middle + below), 100 * (middle + above))
        axes.set_xticks(range(len(strengths)), [f"{value:g}" for value in strengths])
        page.tidy(axes, "y")
    for axes in panels[len(plots) :]:
        axes.set_axis_off()
    page.legend(figure, handles)
    figure.supxlabel("strength", size=8)
    return _figure(folder, name, text, figure, ["arm", "line", "strength", "quantity", "value"], records)


def _reach(plots: Iterable[_Plot]) -> tuple[float, float]:
    """How far below and above its first level a plot reaches, the same for all, with half a point of air.

    To every seed, but not to every interval: that of two seeds is 13 times as wide as they lie apart.
    """
    offsets = []
    for plot in plots:
        seeds = [value for line in plot.lines for _, row in line.points for value in row.averages_S()]
        offsets += [value - plot.levels[0][2] for value in [*seeds, *(level for *_, level in plot.levels)]]
    return min(offsets) - 0.005, max(offsets) + 0.005


def _draw_line(axes: Axes, line: _Line, strengths: Sequence[float], shift: float) -> Line2D:
    """The averages, each with its interval over seeds and, a little to the right, the seeds."""
    at = [strengths.index(value) + shift for value, _ in line.points]
    averages = [100 * row.average for _, row in line.points]
    (drawn,) = axes.plot(at, averages, line.style, color=line.color, linewidth=1.3, marker="o", markersize=4)
    for x, (_, row) in zip(at, line.points, strict=True):
        averages_S = row.averages_S()
        interval = seed_interval(averages_S)
        if interval:
            axes.vlines(x, 100 * interval.low, 100 * interval.high, color=line.color, linewidth=1)
        axes.plot([x + 0.1] * len(averages_S), 100 * averages_S, ".", color=line.color, markersize=3, alpha=0.6)
    return drawn


def _observations(row: Row) -> list[tuple[str, float]]:
    """What a point of a curve shows, quantity and value."""
    averages_S = row.averages_S()
    interval = seed_interval(averages_S)
    ends = [] if interval is None else [("low", interval.low), ("high", interval.high)]
    seeds = zip((f"seed {seed}" for seed in row.seeds), averages_S.tolist(), strict=False)
    return [("average", row.average), *ends, *seeds]


# --- what specialization did ------------------------------------------------------------------------------------------


def _ownership(folder: Path, comparison: Comparison) -> str:
    owned = {row: [trial.ownership for trial in _used(row) if trial.ownership] for row in comparison.rows}
    owned = {row: found for row, found in owned.items() if found}
    if not owned:
        return ""
    lines, records = [], []
    for row, found in owned.items():
        entropy = _mean(one.entropy for one in found)
        shares = _mean_grid([{"": one.owned} for one in found])[""]
        cells = [Cell(percent(shares[task])) if task in shares else NONE for task in comparison.tasks]
        lines.append(page.line(Cell(row.name), [Cell(f"{entropy:.3f}"), *cells]))
        records += [(row.name, "entropy", "", entropy)]
        records += [(row.name, "owned", task, share) for task, share in shares.items()]
    page.write_csv(folder / "ownership.csv", ["row", "quantity", "task", "value"], records)
    head = [Cell("row"), Cell("entropy"), *(Cell(task, note="owned, %") for task in comparison.tasks)]
    best = max([row for row in _whole(comparison) if row in owned] or owned, key=lambda row: row.average)
    shown = [row for row in dict.fromkeys([comparison.baseline, best]) if row in owned]
    figures = []
    for field, label in (("by_layer", "layer"), ("by_kind", "kind")):
        grids = {row.name: _mean_grid([getattr(one, field) for one in owned[row]]) for row in shown}
        text = f"Share of each {label}'s elements that a task owns, %"
        figures.append(_maps(folder, f"ownership-{label}", text, grids, signed=False, rows=label, columns="task"))
    return page.table(head, lines) + page.note(OWNERSHIP_NOTE) + page.beside(figures)


def _course(folder: Path, comparison: Comparison) -> str:
    courses = {row: _mean_course(row) for row in _whole(comparison)}
    leaning = [
        row
        for row, course in courses.items()
        if any(abs(value - 1) > 1e-3 for key in LEANING for _, value in course.get(key, ()))
    ]
    rows = sorted(leaning, key=lambda row: -row.average)[:COURSES_SHOWN]
    if not rows:
        return ""
    curves = {
        title: {row.name: [(step, factor * value) for step, value in courses[row].get(key, ())] for row in rows}
        for key, (title, factor) in page.COURSE.items()
    }
    records = [
        (row.name, key, step, value) for row in rows for key, points in courses[row].items() for step, value in points
    ]
    drawing = page.draw_panels(curves, dict(zip((row.name for row in rows), page.COLORS, strict=False)))
    assert drawing is not None  # each of the rows has a point
    columns = ["row", "figure", "step", "value"]
    figure = _figure(folder, "course", "Figures of the training log, means over seeds", drawing, columns, records)
    return page.beside([figure]) + page.note(COURSE_NOTE)


def _mean_course(row: Row) -> dict[str, list[tuple[int, float]]]:
    """Figure of the training log → (step, mean over the trials that logged it there)."""
    found: dict[str, dict[int, list[float]]] = {}
    for trial in _used(row):
        for key, points in trial.course.items():
            for step, value in points:
                if math.isfinite(value):
                    found.setdefault(key, {}).setdefault(step, []).append(value)
    return {key: [(step, _mean(values)) for step, values in sorted(steps.items())] for key, steps in found.items()}


def _ablation(folder: Path, comparison: Comparison) -> str:
    ablated = {
        (row.name, elements): [(trial.seed, trial.ablations[elements]) for trial in _used(row)]
        for row in comparison.rows
        for elements in _used(row)[0].ablations
    }
    if not ablated:
        return ""
    figures, lines, records = [], [], []
    for number, ((name, elements), found) in enumerate(ablated.items(), start=1):
        mean = Ablation(
            share=_mean(one.share for _, one in found),
            owned=_mean_grid([one.owned for _, one in found]),
            random=_mean_grid([one.random for _, one in found]),
        )
        tasks = len(mean.owned)
        hits = ", ".join(str(len(one.hits())) for _, one in found)
        specific = ", ".join(str(len(one.specific())) for _, one in found)
        counts = Cell(f"{len(mean.hits())} of {tasks}"), Cell(hits), Cell(f"{len(mean.specific())} of {tasks}")
        lines.append(page.line(Cell(name), [Cell(elements, "text"), *counts, Cell(specific)]))
        for seed, one in [("mean", mean), *found]:
            records.append((name, elements, seed, tasks, len(one.hits()), len(one.specific())))
        text = (
            f"{name}, {elements}: fall of R-precision, in points, after zeroing {mean.share:.1%}. For "
            f"{len(mean.hits())} of {tasks} tasks the fall is largest for the task whose elements were zeroed, and "
            f"larger than for the random mask; seed by seed for {hits}"
        )
        grids = {"elements a task owns most": mean.owned, "random elements": mean.random}
        rows, columns = "zeroed for", "evaluated"
        figures.append(_maps(folder, f"ablation-{number}", text, grids, signed=True, rows=rows, columns=columns))
    page.write_csv(folder / "ablation.csv", ["row", "elements", "seed", "tasks", "hits", "specific"], records)
    head = [Cell("row"), Cell("zeroed among", "text"), Cell("tasks hit, mean fall"), Cell("seed by seed")]
    head += [Cell("tasks specific, mean fall"), Cell("seed by seed")]
    maps = page.beside(figures)
    if len(figures) > MAPS_OPEN:
        maps = page.folded(f"{len(figures)} maps", maps)
    return page.note(ABLATION_NOTE) + page.table(head, lines) + maps


# --- transfer and cost ------------------------------------------------------------------------------------------------


def _transfer(folder: Path, comparison: Comparison) -> str:
    zero_shot = {
        row: {way: answered for way in WAYS if (answered := comparison.zero_shot_row(row.name, way))}
        for row in comparison.rows
        if row.trials[0].zero_shot
    }
    if not zero_shot:
        return ""
    prompt, bare = WAYS

    def reference(row: Row) -> Row:
        """Of the rows that were kept from the same tasks: no strength is strength 0."""
        alike = [other for other in zero_shot if zero_shot[other][prompt].scores.keys() == held_out(row)]
        return min(alike, key=lambda other: float(other.values.get(STRENGTH, 0)))

    def held_out(row: Row) -> KeysView[str]:
        return zero_shot[row][prompt].scores.keys()

    lines, records = [], []
    for row, found in zero_shot.items():
        against = reference(row)
        changes: dict[str, Difference | None] = {f"{prompt} − {bare}": found[prompt].minus(found[bare])}
        for way in WAYS:
            change = None if row is against else found[way].minus(zero_shot[against][way])
            changes[f"{way} − {against.name}, {way}"] = change
        cells = [Cell(average_text(found[way])) for way in WAYS]
        lines.append(page.line(Cell(row.name), [*cells, *map(_change_cell, changes.values())]))
        records += [(row.name, name, *_change(change)) for name, change in changes.items()]
    page.write_csv(folder / "zero-shot.csv", ["row", "what", *CHANGE], records)
    plots = {}
    for arm in dict.fromkeys(row.arm for row in zero_shot):
        curve = comparison.curve(arm, STRENGTH)
        if len(curve) > 1:
            against = reference(curve[0][1])
            levels = [(f"{against.name}, {way}", WAYS[way], zero_shot[against][way].average) for way in WAYS]
            colors = zip(WAYS, page.COLORS[1:], strict=False)
            ways = {way: [(value, zero_shot[row][way]) for value, row in curve] for way in WAYS}
            plots[arm] = _Plot([_Line(way, color, WAYS[way], ways[way]) for way, color in colors], levels)
    figure = [_curves(folder, "transfer", "Zero-shot R-precision, %, over strength", plots)] if plots else []
    references = {against.name: ", ".join(held_out(against)) for against in map(reference, zero_shot)}
    pairs = "; ".join(f"{name} for {tasks}" for name, tasks in references.items())
    head = ["row", *WAYS, f"{prompt} − {bare}", *(f"{way} − that of the reference" for way in WAYS)]
    text = page.note(f"Reference: {pairs}. {TRANSFER_NOTE}")
    return page.table([*map(Cell, head)], lines) + text + page.beside(figure)


def _cost(folder: Path, comparison: Comparison) -> str:
    lines, records = [], []
    for row in comparison.rows:
        costs = [trial.cost for trial in _used(row) if trial.cost]
        cells = [NONE] * len(COSTS)
        if costs:
            mean = {field.name: _mean(getattr(cost, field.name) for cost in costs) for field in fields(Cost)}
            cells = [Cell(f"{mean[key] / unit:,.{digits}f}") for key, (_, unit, digits) in COSTS.items()]
            records.append((row.name, row.average, *mean.values()))
        lines.append(page.line(Cell(row.name), [Cell(average_text(row)), *cells]))
    if not records:
        return ""
    page.write_csv(folder / "cost.csv", ["row", "average", *(field.name for field in fields(Cost))], records)
    head = [Cell("row"), Cell("average ± std"), *(Cell(label) for label, *_ in COSTS.values())]
    return page.table(head, lines) + page.note(COST_NOTE)


COSTS = {
    "retrievers": ("retrievers = deployments", 1, 0),
    "training_queries": ("training queries", 1, 0),
    "training_seconds": ("training hours", 3600, 2),
    "parameters": ("parameters", 1, 0),
    "index_bytes": ("index, MB", 1e6, 1),
    "passages_embedded": ("passages per refresh", 1, 0),
}
"""Field of `Cost` → its label, what it is divided by, and digits."""

ROWS_NOTE = (
    "R-precision in percent ± standard deviation over seeds; each task counts once. The difference is to the baseline, "
    f"on the tasks and seeds that both have, with {CONFIDENCE:.0%} intervals over queries and over seeds. Higher or "
    "lower only where both intervals lie on one side of 0. Each row is judged alone: of many rows that change nothing, "
    "a few will seem to. A row's candidate is chosen on one half of the queries and measured on the other."
)
TASKS_NOTE = "R-precision in percent; below it the difference to the baseline, ▲ or ▼ where it is shown, as for rows."
CURVES_NOTE = (
    f"A point is the mean over seeds, its bar the {CONFIDENCE:.0%} interval over seeds, cut at the frame; small dots "
    "are the seeds. Strengths stand at equal distances. The wide line marks the recommended strength. Intervals of "
    "averages are wider than those of differences, which decide: what makes a seed lucky for all rows cancels there."
)
OWNERSHIP_NOTE = (
    "An element is owned by the task whose loss is most sensitive to it, by one probe for all models. Entropy of the "
    "tasks' shares of sensitivity: 1 is all alike, 0 is one task each. Means over seeds. The maps show the baseline "
    "and, of the rows that were analyzed, the one with the highest average."
)
COURSE_NOTE = (
    f"The {COURSES_SHOWN} rows with the highest average among those whose updates are not the plain mean of the tasks' "
    "gradients (entropy or ‖g‖ ratio is not 1)."
)
ABLATION_NOTE = (
    "A task is hit if zeroing the elements that it owns most lowers its own R-precision more than every other task's. "
    "It is specific if they lower it more than the elements of any other task do, which does not depend on how much a "
    "task has to lose. Both also ask for more than as many random elements of each tensor do. In the maps a row is a "
    "task whose elements were zeroed, a column an evaluated task; positive is worse."
)
TRANSFER_NOTE = (
    "R-precision in percent on tasks that were not trained; the reference of a row is, of those kept from the same "
    "tasks, the one with the lowest strength. Below each difference its intervals, over queries · over seeds; ▲ or ▼ "
    "where it is shown. Dotted: without prompt."
)
COST_NOTE = "R-precision in percent. All retrievers of a row together, means over seeds. MB are millions of bytes."
