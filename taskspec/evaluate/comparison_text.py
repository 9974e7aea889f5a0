"""A comparison for a terminal: its rows, its tasks, and what else its trials measured.

Path: comparison → [here] → sweep job.  In percent; the report shows the same with figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from taskspec.evaluate.comparison import Comparison
from taskspec.evaluate.notation import average_text, interval_text, percent, signed
from taskspec.evaluate.statistics import CONFIDENCE
from taskspec.evaluate.trials import WAYS
from taskspec.specialize.analysis import mean_falls

TEXT_WIDTH = 120
"""Columns of a terminal that the tables keep to."""
NAME_WIDTH = 20
"""Columns to which a row's name may be cut."""
COUNTS = ("largest", "beyond", "both")
"""Columns of how many tasks prove to own what they own, as `Falls` counts them."""
ABLATION_NOTES = (
    "Falls of tasks by zeroing what they own most, what others own most, and as many random elements of each tensor.",
    "Largest: tasks that fall most of all by their own elements; beyond: more than by random ones; both.",
)


def comparison_text(comparison: Comparison) -> str:
    """All tables that the trials have something for, one below the other."""
    tables = (rows_text, tasks_text, zero_shot_text, ablation_text, cost_text)
    return "\n\n".join(filter(None, (table(comparison) for table in tables)))


def rows_text(comparison: Comparison) -> str:
    """One line per row with its average and its difference to the baseline."""
    baseline = comparison.baseline
    lines = [["row", "seeds", "R-precision", "difference", "over queries", "over seeds", "verdict"]]
    for row in comparison.rows:
        mark = "" if row.scores.keys() == baseline.scores.keys() else "*"
        cells = [row.name, str(len(row.seeds) or "–"), average_text(row.average, row.std) + mark]
        if row is baseline:
            lines.append([*cells, "", "", "", "baseline"])
        else:
            found = comparison.difference(row.name)
            intervals = [interval_text(found.queries), interval_text(found.seeds)]
            lines.append([*cells, signed(found.mean), *intervals, found.verdict])
    notes = [
        "R-precision % ± standard deviation over seeds. Differences: tasks and seeds that both rows have,",
        f"with {CONFIDENCE:.0%} intervals.",
    ]
    if any(row.scores.keys() != baseline.scores.keys() for row in comparison.rows):
        notes.append("* Has other tasks than the baseline; its R-precision is over its own.")
    by_code: dict[str, list[str]] = {}
    for row in comparison.rows:
        for code in sorted({trial.code for trial in row.used_trials() if trial.code}):
            by_code.setdefault(code, []).append(row.name)
    if len(by_code) > 1:
        notes.append(f"The trials were made by {len(by_code)} states of the code:")
        notes += [f"  {code}: {', '.join(by_code[code])}" for code in sorted(by_code)]
    return "\n".join([_table(lines), "", *notes])


def tasks_text(comparison: Comparison) -> str | None:
    """R-precision of each row on each task; None if so many tasks do not fit."""
    lines = [["R-precision %", *comparison.tasks]]
    for row in comparison.rows:
        cells = [percent(row.task_average(task)) if task in row.scores else "–" for task in comparison.tasks]
        lines.append([row.name, *cells])
    text = _table(lines)
    return text if max(map(len, text.splitlines())) <= TEXT_WIDTH else None


def zero_shot_text(comparison: Comparison) -> str | None:
    """Tasks held out of training, with their prompts and without, and the difference to the reference row."""
    found = comparison.zero_shot_rows()
    if not found:
        return None
    lines = [["zero-shot R-precision %", *(cell for way in WAYS for cell in (way, "difference", "verdict"))]]
    for row, answered in found.items():
        against = comparison.zero_shot_reference(row, found)
        cells = []
        for way in WAYS:
            cells.append(average_text(answered[way].average, answered[way].std))
            if row is against:
                cells += ["", "reference"]
            else:
                change = answered[way].minus(found[against][way])
                cells += [signed(change.mean), change.verdict]
        lines.append([row.name, *cells])
        for task in answered[WAYS[0]].scores:
            single = [answered[way].on_task(task) for way in WAYS]
            cells = [cell for row in single for cell in (average_text(row.average, row.std), "", "")]
            lines.append([f"  {task}", *cells])
    return _table(lines)


def ablation_text(comparison: Comparison) -> str | None:
    """Falls after zeroing what a task owns most, in points: its own, other tasks', by a random mask; own − random
    with its intervals, and that to the baseline's; and for how many tasks the own fall is the largest and beyond the
    random mask's.
    """
    lines = [["fall, points", "own", "others", "random", "own − random", "over queries", "over seeds", *COUNTS]]
    for row in comparison.rows:
        for elements in row.used_trials()[0].ablations:
            mean = mean_falls(list(row.ablations(elements).values()))
            cells = [f"{100 * fall:.1f}" for fall in mean.means()]
            beyond = comparison.own_minus_random(row.name, elements)
            assert beyond is not None  # the row was ablated
            cells += [signed(beyond.mean), interval_text(beyond.queries), interval_text(beyond.seeds)]
            counts = [
                f"{len(tasks)} of {len(mean.owned)}" for tasks in (mean.largest(), mean.beyond_random(), mean.both())
            ]
            lines.append([f"{row.name}, {elements}", *cells, *counts])
            change = None
            if row is not comparison.baseline:
                change = comparison.own_minus_random(row.name, elements, to_baseline=True)
            if change is not None:
                cells = [signed(change.mean), interval_text(change.queries), interval_text(change.seeds)]
                short = "not shown" if change.verdict == "no difference shown" else change.verdict
                lines.append([f"  to {comparison.baseline.name}", "", "", "", *cells, "", "", short])
    if len(lines) == 1:
        return None
    return "\n".join([_table(lines), "", *ABLATION_NOTES])


def cost_text(comparison: Comparison) -> str | None:
    """What a row's retrievers cost to make and to keep, all of them together."""
    lines = [["cost", "retrievers", "training queries", "parameters", "index, MB", "passages per refresh"]]
    for row in comparison.rows:
        cost = row.used_trials()[0].cost
        if cost:
            numbers = [cost.retrievers, cost.training_queries, cost.parameters]
            cells = [f"{number:,}" for number in numbers]
            lines.append([row.name, *cells, f"{cost.index_bytes / 1e6:,.1f}", f"{cost.passages_embedded:,}"])
    return _table(lines) if len(lines) > 1 else None


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns at the width of their cells; the names in front are cut to what remains of the terminal."""
    name_width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    name_width = min(name_width, max(NAME_WIDTH, TEXT_WIDTH - sum(width + 2 for width in widths)))
    return "\n".join(
        "  ".join([_cut(name, name_width).ljust(name_width), *map(str.rjust, cells, widths)]).rstrip()
        for name, *cells in lines
    )


def _cut(name: str, width: int) -> str:
    """At most `width` columns: cut in the middle, because names of rows tell themselves apart at their ends."""
    tail = width // 2
    return name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}"
