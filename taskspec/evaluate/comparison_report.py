"""The report of a comparison: one HTML page, its figures as PNG and CSV beside it, its tables as CSV.

Path: comparison → comparison figures → [here] → a person.  Here are the order of the page and the tables of rows and
differences. What is drawn comes from `comparison_figures`, what pages are made of from `page`; what is compared, and
how sure it is, was decided in `comparison`. Nothing is measured here. The page shows percent; CSV files hold shares
from 0 to 1, unrounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path

import matplotlib

from taskspec.arms import Arm
from taskspec.config import Config
from taskspec.evaluate import page
from taskspec.evaluate.comparison import (
    STRENGTH,
    Comparison,
    Recommendation,
)
from taskspec.evaluate.comparison_figures import (
    NONE,
    ablation_maps,
    course_curves,
    mean_of,
    ownership_maps,
    strength_curves,
    transfer_curves,
)
from taskspec.evaluate.notation import average_text, interval_text, percent, signed
from taskspec.evaluate.page import Cell
from taskspec.evaluate.statistics import CONFIDENCE, Difference, Verdict
from taskspec.evaluate.trials import WAYS, Cost
from taskspec.specialize.analysis import mean_falls

MARKS: dict[Verdict, str] = {"higher": "▲", "lower": "▼", "no difference shown": "", "not judged": ""}
"""Verdict → its mark."""
CHANGE = ("difference", "queries_low", "queries_high", "seeds_low", "seeds_high", "verdict")
"""Columns of CSV files, as `_change` fills them."""


def write_comparison(
    folder: Path,
    comparison: Comparison,
    *,
    title: str,
    facts: Mapping[str, str],
    arms: Mapping[str, Arm],
    config: Config,
) -> Path:
    """Writes `report.html`, `<name>.png` and `<name>.csv` of each figure, and `<name>.csv` of each table.

    Args: folder: is made where it does not exist. facts: what was run, label → text. arms: by name; what each is to
        show, and what it sets, stands above its rows.
    Returns: the path of the page.
    Raises: ConfigError if a row has no seed, or no task, in common with the baseline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    advice = {
        arm: found
        for arm in dict.fromkeys(row.arm for row in comparison.rows)
        if (found := comparison.recommend(arm, STRENGTH))
    }
    with matplotlib.rc_context(page.DRAWING):
        sections = {
            "What was run": page.pairs(facts),
            "Recommended strength": _recommended(advice),
            "All rows": _all_rows(folder, comparison, arms),
            "R-precision per task": _per_task(folder, comparison),
            "R-precision over strength": strength_curves(folder, comparison, advice),
            "Who owns the parameters": ownership_maps(folder, comparison),
            "The course of training": course_curves(folder, comparison),
            "Proof by ablation": _ablation(folder, comparison),
            "Tasks held out of training": _transfer(folder, comparison),
            "Cost of ownership": _cost(folder, comparison),
            "Versions": page.pairs(page.versions()),
            "Resolved configuration": page.configuration(config),
        }
    return page.write_page(folder / "report.html", title, sections)


# --- differences, as cells and as fields ------------------------------------------------------------------------------


def _change(found: Difference | None, without: str = "baseline") -> tuple[object, ...]:
    """The fields of `CHANGE`; None is what others are compared with itself, or nothing that is compared."""
    if found is None:
        return (*[None] * 5, without)
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


# --- recommendation and rows ------------------------------------------------------------------------------------------


def _recommended(advice: Mapping[str, Recommendation]) -> str:
    cards = page.beside(_advice(arm, found) for arm, found in advice.items())
    return cards + page.note(ADVICE_NOTE) if advice else ""


def _advice(arm: str, found: Recommendation) -> str:
    ship = "the baseline" if found.value is None else f"{found.value:g}"
    text = page.note(f"{arm}: {ship}", "lead") + page.note(f"{found.reason}.", "sentence")
    if found.end is not None:
        warning = f"⚠ {found.end:g} lies at an end of the range: beyond it a value may do better. Try more."
        text += page.note(warning, "warning")
    return f"<article>{text}</article>"


def _all_rows(folder: Path, comparison: Comparison, arms: Mapping[str, Arm]) -> str:
    head = [*map(Cell, ("row", "average ± std", "seeds", "difference", "over queries", "over seeds", "verdict"))]
    head.append(Cell("candidate", "text"))
    columns = ["row", "arm", "question", "settings", "average", "std", "seeds", "tasks", *CHANGE]
    columns += ["chosen_even", "chosen_odd"]
    whole = comparison.whole_rows
    lines, records, verdicts, arm = [], [], [], ""
    for row in comparison.rows:
        plan = arms[row.arm]
        if row.arm != arm:
            said = " · ".join(filter(None, [plan.question, plan.describe()]))
            lines.append(page.group_line(f"{row.arm}: {said}" if said else row.arm, len(head)))
        arm = row.arm
        cells = [Cell(average_text(row.average, row.std), note="" if row in whole else f"over {len(row.scores)} tasks")]
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
        records.append((row.name, row.arm, plan.question, plan.describe(), *averages, *_change(found), even, odd))
    page.write_csv(folder / "rows.csv", columns, records)
    counts = ", ".join(f"{verdict}: {verdicts.count(verdict)}" for verdict in MARKS)
    summary = page.note(f"{len(verdicts)} row(s) against {comparison.baseline.name}. {counts}.", "lead")
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


# --- ablation ---------------------------------------------------------------------------------------------------------


def _ablation(folder: Path, comparison: Comparison) -> str:
    """`ablation`: how much more a task falls by what it owns than by random elements; the falls, map by map."""
    lines, records, ablated = [], [], {}
    for row in comparison.rows:
        for elements in row.used_trials()[0].ablations:
            found = row.ablations(elements)
            mean = ablated[row.name, elements] = mean_falls(list(found.values()))
            tasks = len(mean.owned)
            beyond = comparison.own_minus_random(row.name, elements)
            is_baseline = row is comparison.baseline
            change = None if is_baseline else comparison.own_minus_random(row.name, elements, to_baseline=True)
            cells = [Cell(elements, "text"), *(Cell(f"{100 * fall:.1f}") for fall in mean.means())]
            cells += [_change_cell(beyond), _change_cell(change)]
            cells += [Cell(f"{len(of)} of {tasks}") for of in (mean.largest(), mean.beyond_random(), mean.both())]
            lines.append(page.line(Cell(row.name), cells))
            for seed, one in [("mean", mean), *found.items()]:
                counts = [len(of) for of in (one.largest(), one.beyond_random(), one.both())]
                records.append((row.name, elements, seed, tasks, *one.means(), *counts, *_change(None, "")))
            nothing = [None] * 6
            records.append((row.name, elements, "own − random", tasks, *nothing, *_change(beyond)))
            records.append((row.name, elements, "to baseline", tasks, *nothing, *_change(change)))
    if not ablated:
        return ""
    columns = ["row", "elements", "what", "tasks", "own", "others", "random", "largest", "beyond_random", "both"]
    page.write_csv(folder / "ablation.csv", [*columns, *CHANGE], records)
    head = [Cell("row"), Cell("zeroed among", "text"), *map(Cell, ("own", "others", "random", "own − random"))]
    head.append(Cell("to baseline", note="own − random"))
    head += map(Cell, ("largest", "beyond random", "both"))
    return page.table(head, lines) + page.note(ABLATION_NOTE) + ablation_maps(folder, ablated)


# --- transfer and cost ------------------------------------------------------------------------------------------------


def _transfer(folder: Path, comparison: Comparison) -> str:
    zero_shot = comparison.zero_shot_rows()
    if not zero_shot:
        return ""
    references = {row: comparison.zero_shot_reference(row, zero_shot) for row in zero_shot}
    prompt, bare = WAYS
    lines, records = [], []
    for row, found in zero_shot.items():
        against = references[row]
        changes: dict[str, Difference | None] = {f"{prompt} − {bare}": found[prompt].minus(found[bare])}
        for way in WAYS:
            change = None if row is against else found[way].minus(zero_shot[against][way])
            changes[f"{way} − {against.name}, {way}"] = change
        tasks = list(found[prompt].scores)
        for part, name in [(None, row.name), *((task, f"· {task}") for task in tasks if len(tasks) > 1)]:
            answers = {way: found[way] if part is None else found[way].on_task(part) for way in WAYS}
            cells = [Cell(average_text(one.average, one.std)) for one in answers.values()]
            compared = map(_change_cell, changes.values()) if part is None else [NONE] * len(changes)
            lines.append(page.line(Cell(name), [*cells, *compared]))
            records += [(row.name, way, part, one.average, one.std, *_change(None, "")) for way, one in answers.items()]
        records += [
            (row.name, what, None, None, None, *_change(change, "reference")) for what, change in changes.items()
        ]
    columns = ["row", "what", "task", "average", "std", *CHANGE]
    page.write_csv(folder / "zero-shot.csv", columns, records)
    held_out = {against.name: ", ".join(zero_shot[against][prompt].scores) for against in references.values()}
    pairs = "; ".join(f"{name} for {tasks}" for name, tasks in held_out.items())
    head = ["row", *WAYS, f"{prompt} − {bare}", *(f"{way} − that of the reference" for way in WAYS)]
    text = page.note(f"Reference: {pairs}. {TRANSFER_NOTE}")
    figure = transfer_curves(folder, comparison, zero_shot, references)
    return page.table([*map(Cell, head)], lines) + text + page.beside([figure])


def _cost(folder: Path, comparison: Comparison) -> str:
    lines, records = [], []
    for row in comparison.rows:
        costs = [trial.cost for trial in row.used_trials() if trial.cost]
        cells = [NONE] * len(COSTS)
        if costs:
            mean = {field.name: mean_of(getattr(cost, field.name) for cost in costs) for field in fields(Cost)}
            cells = [Cell(f"{mean[key] / unit:,.{digits}f}") for key, (_, unit, digits) in COSTS.items()]
            records.append((row.name, row.average, *mean.values()))
        lines.append(page.line(Cell(row.name), [Cell(average_text(row.average, row.std)), *cells]))
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

ADVICE_NOTE = (
    "Where no strength changes anything, one of six is recommended all the same in 8 to 12, 11 to 17 and 12 to 21% of "
    "comparisons of 3, 5 and 10 seeds (simulated, with the differences of strengths correlated by 0.5 to 0.8); and the "
    "average of the best of several is flattered by its choice. New seeds tell."
)
ROWS_NOTE = (
    "R-precision in percent ± standard deviation over seeds; each task counts once. The difference is to the baseline, "
    f"on the tasks and seeds that both have, with {CONFIDENCE:.0%} intervals over queries and over seeds. Higher or "
    "lower only where both intervals lie on one side of 0. Each row is judged alone: of many rows that change nothing, "
    "a few will seem to. A row's candidate is chosen on one half of the queries and measured on the other."
)
TASKS_NOTE = "R-precision in percent; below it the difference to the baseline, ▲ or ▼ where it is shown, as for rows."
TRANSFER_NOTE = (
    "R-precision in percent on tasks that were not trained, with their prompts and with an empty one; the reference of "
    "a row is, of those kept from the same tasks, the baseline, or else the one with the lowest strength. Below each "
    "difference its intervals, over queries · over seeds; ▲ or ▼ where it is shown. Dotted: without prompt."
)
COST_NOTE = (
    "R-precision in percent. All retrievers of a row together, means over seeds. MB are millions of bytes. Hours are "
    "those on the clock, whatever else the machines did."
)
ABLATION_NOTE = (
    "Fall of R-precision, in points, over tasks: by zeroing the elements that the task owns most (own), that other "
    "tasks own most (others), and as many random elements of each tensor (random). Below a difference its intervals, "
    "over queries · over seeds; ▲ or ▼ where it is shown. Largest: tasks that fall more than every other by their own "
    "elements; beyond random: more than by the random ones. In the maps a row is a task whose elements were zeroed, a "
    "column an evaluated task; positive is worse."
)
