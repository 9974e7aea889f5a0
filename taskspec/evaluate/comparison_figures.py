"""What is drawn on the page of a comparison: curves over strength, what specialization did, transfer.

Path: comparison → [here] → comparison report.  Each part writes its figures, as PNG and CSV, and its own tables, as
CSV, into the folder of the page and returns its HTML: empty, and without files, where no trial has what it shows. The
order of the page and the tables of differences are the report's; the look of plots, and how files are written, is
`page`'s. Nothing is measured here. Figures show percent; CSV files hold shares from 0 to 1, unrounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from taskspec.evaluate import page
from taskspec.evaluate.comparison import STRENGTH, Comparison, Recommendation, Row, shared_seeds
from taskspec.evaluate.notation import percent
from taskspec.evaluate.page import Cell, Grid
from taskspec.evaluate.statistics import CONFIDENCE, seed_interval
from taskspec.evaluate.trials import WAYS
from taskspec.specialize.analysis import Falls

STYLES = dict(zip(WAYS, ("-", ":"), strict=True))
"""Way of asking a task that was held out of training → how a line is drawn."""
COURSES_SHOWN = 8
LEANING = ("entropy", "gradient_ratio")
"""Figures of the training log that are 1 where the update is the mean of the tasks' gradients."""
MAPS_OPEN = 4
"""More ablation maps than this are folded."""
NONE = Cell("–")
"""In tables: not measured, or nothing to compare with."""


# --- what several sections use ----------------------------------------------------------------------------------------


def mean_of(values: Iterable[float]) -> float:
    """As a number of Python's own."""
    return float(np.mean(list(values)))


def _mean_grid(grids: Sequence[Grid]) -> Grid:
    """Over trials, cell by cell."""
    first = grids[0]
    return {row: {column: mean_of(grid[row][column] for grid in grids) for column in first[row]} for row in first}


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


def strength_curves(folder: Path, comparison: Comparison, advice: Mapping[str, Recommendation]) -> str:
    """`strength`: a plot per arm beside the baseline's level on the same tasks and seeds, the recommended strength
    marked.

    Args: advice: arm → what `Comparison.recommend` says of its strengths.
    """
    plots = {}
    for arm in dict.fromkeys(row.arm for row in comparison.rows):
        curve = comparison.curve_to_ship(arm, STRENGTH)
        if not curve:
            continue
        seeds = shared_seeds([comparison.baseline, *(row for _, row in curve)])
        if not seeds:  # some trials failed
            continue
        curve = tuple((value, row.on(seeds)) for value, row in curve)
        tasks = comparison.compared_tasks(curve[0][1].name)
        level = mean_of(comparison.baseline.on(seeds).task_average(task) for task in tasks)
        line = _Line("average over tasks", page.COLORS[1], "-", curve)
        marked = advice[arm].value if arm in advice else None
        plots[arm] = _Plot([line], [(comparison.baseline.name, "--", level)], marked)
    if not plots:
        return ""
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


def ownership_maps(folder: Path, comparison: Comparison) -> str:
    """`ownership`: what the tasks own in each analyzed row; `ownership-layer` and `-kind`: where, in two of them."""
    owned = {row: [trial.ownership for trial in row.used_trials() if trial.ownership] for row in comparison.rows}
    owned = {row: found for row, found in owned.items() if found}
    if not owned:
        return ""
    lines, records = [], []
    for row, found in owned.items():
        entropy = mean_of(one.entropy for one in found)
        shares = _mean_grid([{"": one.owned} for one in found])[""]
        cells = [Cell(percent(shares[task])) if task in shares else NONE for task in comparison.tasks]
        lines.append(page.line(Cell(row.name), [Cell(f"{entropy:.3f}"), *cells]))
        records += [(row.name, "entropy", "", entropy)]
        records += [(row.name, "owned", task, share) for task, share in shares.items()]
    page.write_csv(folder / "ownership.csv", ["row", "quantity", "task", "value"], records)
    head = [Cell("row"), Cell("entropy"), *(Cell(task, note="owned, %") for task in comparison.tasks)]
    alike = [row for row in comparison.whole_rows if row in owned] or list(owned)
    control = comparison.baseline if comparison.baseline in owned else alike[0]
    shown = dict.fromkeys([control, max(alike, key=lambda row: row.average)])
    figures = []
    for field, label in (("by_layer", "layer"), ("by_kind", "kind")):
        grids = {row.name: _mean_grid([getattr(one, field) for one in owned[row]]) for row in shown}
        text = f"Share of each {label}'s elements that a task owns, %"
        figures.append(_maps(folder, f"ownership-{label}", text, grids, signed=False, rows=label, columns="task"))
    return page.table(head, lines) + page.note(OWNERSHIP_NOTE) + page.beside(figures)


def course_curves(folder: Path, comparison: Comparison) -> str:
    """`course`: the training log of the best rows that lean to some tasks."""
    courses = {row: _mean_course(row) for row in comparison.whole_rows}
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
    for trial in row.used_trials():
        for key, points in trial.course.items():
            for step, value in points:
                if math.isfinite(value):
                    found.setdefault(key, {}).setdefault(step, []).append(value)
    return {key: [(step, mean_of(values)) for step, values in sorted(steps.items())] for key, steps in found.items()}


def ablation_maps(folder: Path, ablated: Mapping[tuple[str, str], Falls]) -> str:
    """`ablation-<number>`: the falls, map by map.

    Args: ablated: row and elements → means over its seeds.    Returns: the figures alone.
    """
    figures = []
    for number, ((name, elements), mean) in enumerate(ablated.items(), start=1):
        text = f"{name}, {elements}: fall of R-precision, in points, after zeroing {mean.share:.1%}"
        grids = {"elements a task owns most": mean.owned, "random elements": mean.random}
        rows, columns = "zeroed for", "evaluated"
        figures.append(_maps(folder, f"ablation-{number}", text, grids, signed=True, rows=rows, columns=columns))
    maps = page.beside(figures)
    return page.folded(f"{len(figures)} maps", maps) if len(figures) > MAPS_OPEN else maps


# --- transfer ---------------------------------------------------------------------------------------------------------


def transfer_curves(
    folder: Path,
    comparison: Comparison,
    zero_shot: Mapping[Row, Mapping[str, Row]],
    references: Mapping[Row, Row],
) -> str:
    """`transfer`: a plot per arm that has a curve, with both ways of answering beside those of its reference.

    Args: zero_shot: row → way → that row on the tasks held out of its training, for all that have some. references:
        each of these rows → the one to compare it with.
    Returns: the figure alone.
    """
    plots = {}
    for arm in dict.fromkeys(row.arm for row in zero_shot):
        curve = comparison.curve(arm, STRENGTH)
        if len(curve) > 1:
            against = references[curve[0][1]]
            levels = [(f"{against.name}, {way}", STYLES[way], zero_shot[against][way].average) for way in WAYS]
            colors = zip(WAYS, page.COLORS[1:], strict=False)
            ways = {way: [(value, zero_shot[row][way]) for value, row in curve] for way in WAYS}
            plots[arm] = _Plot([_Line(way, color, STYLES[way], ways[way]) for way, color in colors], levels)
    return _curves(folder, "transfer", "Zero-shot R-precision, %, over strength", plots) if plots else ""


CURVES_NOTE = (
    "A point is the mean over the seeds that all points of its plot and the baseline have, its bar the "
    f"{CONFIDENCE:.0%} interval over seeds, cut at the frame; small dots are the seeds. Strengths stand at equal "
    "distances. The wide line marks the recommended strength. Intervals of averages are wider than those of "
    "differences, which decide: what makes a seed lucky for all rows cancels there."
)
OWNERSHIP_NOTE = (
    "An element is owned by the task whose loss is most sensitive to it, by one probe for all models. Entropy of the "
    "tasks' shares of sensitivity: 1 is all alike, 0 is one task each. Means over seeds. The maps show the baseline, "
    "or the first row that was analyzed, and of those that were the one with the highest average."
)
COURSE_NOTE = (
    f"The {COURSES_SHOWN} rows with the highest average among those whose updates are not the plain mean of the tasks' "
    "gradients (entropy or ‖g‖ ratio is not 1)."
)
