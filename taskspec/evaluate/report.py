"""One HTML page that says what was run and what came of it, and its figures as PNG files beside it.

Path: evaluation tables, training metrics, sample answers → [here] → a person.  What pages are made of is in `page`.
Nothing is measured here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from taskspec.config import Config
from taskspec.evaluate import page
from taskspec.evaluate.metrics import RPREC
from taskspec.evaluate.page import Cell
from taskspec.evaluate.run import EvaluationTable

if TYPE_CHECKING:
    from taskspec.data.prepared import PreparedData
    from taskspec.retrieve.hits import Hit
    from taskspec.retrieve.retriever import Searcher

MetricsLine = Mapping[str, Any]
"""One line of a run's metrics, as `train.worker.read_metrics` returns them."""

ANSWERS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAnswer:
    """What the systems answered to one query."""

    task: str
    query: str
    gold_pages: Mapping[str, str]
    """wikipedia id → title of every page of every evidence set."""
    hits: Mapping[str, Sequence[Hit]]
    """System → its first pages, best first."""


def sample_answers(
    systems: Mapping[str, Searcher | Mapping[str, Searcher]], prepared: PreparedData
) -> list[SampleAnswer]:
    """The answers to the first dev query of each task: not chosen by how well they turned out.

    Args: systems: as `run.publish_evaluation` takes them.
    """
    result = []
    for task in prepared.tasks("dev"):
        (query,), (sets,), (positives,) = (
            prepared.queries(task, "dev").take([0], ["text", "gold_pages", "positives"]).values()
        )
        passages = prepared.passages.take(positives, ["wikipedia_id", "title"])
        titles = dict(zip(passages["wikipedia_id"], passages["title"], strict=True))
        hits = {}
        for system, searcher in systems.items():
            one = searcher.get(task) if isinstance(searcher, Mapping) else searcher
            if one is not None:
                hits[system] = one.search([query], task, top_k=ANSWERS_SHOWN, level="page")[0]
        gold_pages = {gold: titles.get(gold, gold) for pages in sets for gold in pages}
        result.append(SampleAnswer(task=task, query=query, gold_pages=gold_pages, hits=hits))
    return result


def write_report(
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    table: EvaluationTable,
    training: Mapping[str, Sequence[MetricsLine]],
    answers: Sequence[SampleAnswer],
    config: Config,
) -> Path:
    """Writes `report.html` and its figures, `<name>.png`, into `folder`.

    Args: facts: what was run, label → text. table: at least one row. training: run → the lines of its metrics; a run
        named like a system of the table has its color.
    Returns: the path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys([*table.systems, *training])
    color = {name: page.COLORS[number % len(page.COLORS)] for number, name in enumerate(names)}
    with matplotlib.rc_context(page.DRAWING):
        bars = _draw_scores(table, color)
        scores = page.save_figure(folder, "r-precision", "R-precision per task and system, %", bars)
        drawn = {
            "loss": ("Training loss per task", page.draw_panels(_by_task(training, "loss", 1), color)),
            "dev-accuracy": (
                "In-batch accuracy on dev queries, %",
                page.draw_panels(_by_task(training, "dev_accuracy", 100), color),
            ),
            "course": ("The course of training", page.draw_panels(_course(training), color)),
        }
        curves = [page.save_figure(folder, name, text, figure) for name, (text, figure) in drawn.items() if figure]
    recalls = [name for name in table.metrics if name.startswith("recall@") and name != "recall@1"]
    sections = {
        "What was run": page.pairs(facts),
        "R-precision per task, %": page.beside([_score_table(table, RPREC), scores]) + page.note(RPREC_NOTE),
        "Recall of evidence sets, %": page.beside(_score_table(table, name) for name in recalls) if recalls else "",
        "Training": page.beside(curves) if curves else "",
        "Sample answers": "".join(map(_answer, answers)),
        "Versions": page.pairs(page.versions()),
        "Resolved configuration": page.configuration(config),
    }
    return page.write_page(folder / "report.html", title, sections)


# --- figures ----------------------------------------------------------------------------------------------------------


def _draw_scores(table: EvaluationTable, color: Mapping[str, str]) -> Figure:
    """Horizontal bars: a group per task and for the average, a bar per system, from the top down."""
    groups = [*table.tasks, "average"]
    thickness = 0.8 / len(table.systems)
    figure = page.canvas(0.9 + len(groups) * (0.16 + 0.15 * len(table.systems)))
    axes = figure.subplots()
    for number, system in enumerate(table.systems):
        scores = [*(table.score(task, system) for task in table.tasks), table.average(system)]
        for group, score in enumerate(scores):
            if score is None:
                continue
            y = group - 0.4 + (number + 0.5) * thickness
            axes.barh(y, 100 * score, thickness, color=color[system])
            axes.annotate(
                f"{100 * score:.1f}", (100 * score, y), (2, 0), textcoords="offset points", va="center", size=6.5
            )
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.axhline(len(table.tasks) - 0.5, color="#999999", linewidth=0.6)
    page.tidy(axes, "x")
    page.legend(figure, {system: Patch(color=color[system]) for system in table.systems})
    return figure


def _by_task(training: Mapping[str, Sequence[MetricsLine]], key: str, factor: float) -> page.Curves:
    """A plot per task of one of its figures."""
    tasks = dict.fromkeys(task for lines in training.values() for line in lines for task in line["tasks"])
    return {
        task: {
            run: _points([(line["step"], line["tasks"].get(task, {}).get(key)) for line in lines], factor)
            for run, lines in training.items()
        }
        for task in tasks
    }


def _course(training: Mapping[str, Sequence[MetricsLine]]) -> page.Curves:
    """A plot per figure of the run as a whole."""
    return {
        title: {
            run: _points([(line["step"], line.get(key)) for line in lines], factor) for run, lines in training.items()
        }
        for key, (title, factor) in page.COURSE.items()
    }


def _points(values: Iterable[tuple[int, float | None]], factor: float) -> list[tuple[int, float]]:
    return [(step, factor * value) for step, value in values if value is not None and math.isfinite(value)]


# --- the page ---------------------------------------------------------------------------------------------------------


def _score_table(table: EvaluationTable, metric: str) -> str:
    """A row per task and the average, a column per system, in percent."""

    def line(name: str, scores: Sequence[float | None], queries: int) -> str:
        shown = ["–" if score is None else f"{100 * score:.1f}" for score in scores]
        best = f"{100 * max([score for score in scores if score is not None], default=-1):.1f}"
        cells = [Cell(text, bold=text == best) for text in shown]
        return page.line(Cell(name), [*cells, Cell(f"{queries:,}", "count")])

    queries = {score.task: score.queries for score in table.rows}
    lines = [
        line(task, [table.score(task, system, metric) for system in table.systems], queries[task])
        for task in table.tasks
    ]
    average = line("average", [table.average(system, metric) for system in table.systems], sum(queries.values()))
    head = [Cell("task"), *map(Cell, table.systems), Cell("queries", "count")]
    return page.table(head, lines, average, caption=metric)


def _answer(answer: SampleAnswer) -> str:
    columns = []
    for system, hits in answer.hits.items():
        items = []
        for hit in hits:
            gold = hit.wikipedia_id in answer.gold_pages
            mark = "<span class=gold>✓ gold</span>" if gold else ""
            items.append(f"<li>{html.escape(hit.title)} {mark}</li>")
        columns.append(f"<div><h4>{html.escape(system)}</h4><ol>{''.join(items)}</ol></div>")
    wanted = " · ".join(html.escape(title) for title in answer.gold_pages.values())
    return (
        f"<article><h3>{html.escape(answer.task)}</h3><blockquote>{html.escape(_shortened(answer.query))}</blockquote>"
        f"<p class=note>gold: {wanted}</p><div class=answers>{''.join(columns)}</div></article>"
    )


def _shortened(text: str) -> str:
    """Long dialogues by their beginning and, at greater length, their end, where the question stands."""
    return text if len(text) <= 400 else f"{text[:120]} […] {text[-260:]}"


RPREC_NOTE = (
    "R-precision (Rprec): share of the gold pages found among as many first guesses as there are gold pages, the best "
    "evidence set counting. The average counts each task once. Bold is the highest of this one run; whether a "
    "difference is more than luck, jobs.sweep tells."
)
