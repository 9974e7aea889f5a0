"""One HTML page that says what was run and what came of it, and its figures as PNG files beside it.

Path: evaluation tables, training metrics, sample answers → [here] → a person.  The page needs no network: figures are
data URIs, there is no script. Everything that comes from data is escaped. Nothing is measured here.
"""

from __future__ import annotations

import base64
import html
import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from taskspec.config import Config
from taskspec.evaluate.metrics import RPREC
from taskspec.evaluate.run import EvaluationTable

if TYPE_CHECKING:
    from taskspec.data.prepared import PreparedData
    from taskspec.retrieve.retriever import Hit, Searcher

MetricsLine = Mapping[str, Any]
"""One line of a run's metrics, as `train.worker.read_metrics` returns them."""

ANSWERS_SHOWN = 3
COLORS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
"""One per system, in the order of the table: told apart by color-blind readers too (Okabe and Ito's, and two more)."""
FIGURE_WIDTH = 5.0
"""Inches at 96 dots: narrow enough for a phone, and two of them beside each other on a desk."""
PACKAGES = ("ray", "torch", "transformers", "tokenizers", "faiss-cpu", "faiss-gpu", "numpy", "pyarrow", "bm25s")

COURSE: dict[str, tuple[str, float]] = {
    "entropy": ("entropy of weights (1: all equal)", 1),
    "saturation": ("saturated elements, %", 100),
    "gradient_ratio": ("‖g‖ / ‖mean gradient‖", 1),
    "clip_rate": ("clipped steps, %", 100),
    "learning_rate": ("learning rate", 1),
    "queries_per_second": ("queries per second", 1),
    "wait_share": ("time waiting for data, %", 100),
}
"""Key of a metrics line → title of its plot and the factor to its unit."""


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
        gold_pages = {page: titles.get(page, page) for pages in sets for page in pages}
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
    color = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    # Names come from data: no TeX-like markup in them. The settings hold only inside the block.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 8.5, "axes.titlesize": 8.5}):
        scores = _figure(folder, "r-precision", "R-precision per task and system, %", _draw_scores(table, color))
        drawn = {
            "loss": ("Training loss per task", _draw_panels(_by_task(training, "loss", 1), color)),
            "dev-accuracy": (
                "In-batch accuracy on dev queries, %",
                _draw_panels(_by_task(training, "dev_accuracy", 100), color),
            ),
            "course": ("The course of training", _draw_panels(_course(training), color)),
        }
        curves = [_figure(folder, name, text, figure) for name, (text, figure) in drawn.items() if figure]
    recalls = [name for name in table.metrics if name.startswith("recall@") and name != "recall@1"]
    sections = [
        _section("What was run", _pairs(facts)),
        _section("R-precision per task, %", _row([_score_table(table, RPREC), scores]) + RPREC_NOTE),
        _section("Recall of evidence sets, %", _row([_score_table(table, name) for name in recalls]))
        if recalls
        else "",
        _section("Training", _row(curves)) if curves else "",
        _section("Sample answers", "".join(map(_answer, answers))) if answers else "",
        _section("Versions", _pairs(versions())),
        _section("Resolved configuration", _configuration(config)),
    ]
    page = folder / "report.html"
    page.write_text(PAGE.format(title=html.escape(title), style=STYLE, sections="\n".join(sections)), encoding="utf-8")
    return page


def versions() -> dict[str, str]:
    """Python, taskspec and the packages that figures depend on, as installed here."""
    installed = {"python": platform.python_version()}
    for package in ("taskspec", *PACKAGES):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


# --- figures ----------------------------------------------------------------------------------------------------------

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
"""Title of a plot → run → its points (step, value)."""


def _figure(folder: Path, name: str, text: str, figure: Figure) -> str:
    """Saves a figure as PNG, at twice the screen's dots. Returns: its HTML."""
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=192, facecolor="white")
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(text)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _canvas(height: float) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_scores(table: EvaluationTable, color: Mapping[str, str]) -> Figure:
    """Horizontal bars: a group per task and for the average, a bar per system, from the top down."""
    groups = [*table.tasks, "average"]
    thickness = 0.8 / len(table.systems)
    figure = _canvas(0.9 + len(groups) * (0.16 + 0.15 * len(table.systems)))
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
    _tidy(axes, "x")
    _legend(figure, table.systems, color)
    return figure


def _by_task(training: Mapping[str, Sequence[MetricsLine]], key: str, factor: float) -> Curves:
    """A plot per task of one of its figures."""
    tasks = dict.fromkeys(task for lines in training.values() for line in lines for task in line["tasks"])
    return {
        task: {
            run: _points([(line["step"], line["tasks"].get(task, {}).get(key)) for line in lines], factor)
            for run, lines in training.items()
        }
        for task in tasks
    }


def _course(training: Mapping[str, Sequence[MetricsLine]]) -> Curves:
    """A plot per figure of the run as a whole."""
    return {
        title: {
            run: _points([(line["step"], line.get(key)) for line in lines], factor) for run, lines in training.items()
        }
        for key, (title, factor) in COURSE.items()
    }


def _points(values: Iterable[tuple[int, float | None]], factor: float) -> list[tuple[int, float]]:
    return [(step, factor * value) for step, value in values if value is not None and math.isfinite(value)]


def _draw_panels(curves: Curves, color: Mapping[str, str]) -> Figure | None:
    """Small plots over steps, two in a row, a line per run; plots without points are left out, None if all are."""
    filled = {title: {run: points for run, points in runs.items() if points} for title, runs in curves.items()}
    filled = {title: runs for title, runs in filled.items() if runs}
    if not filled:
        return None
    rows = math.ceil(len(filled) / 2)
    figure = _canvas(0.5 + 1.45 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (title, runs) in zip(grid, filled.items(), strict=False):
        for run, points in runs.items():
            axes.plot(
                *zip(*points, strict=True), color=color[run], linewidth=1.2, marker="." if len(points) < 12 else ""
            )
        axes.set_title(title)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        _tidy(axes, "both")
    for axes in grid[len(filled) :]:
        axes.set_axis_off()
    _legend(figure, dict.fromkeys(run for runs in filled.values() for run in runs), color)
    figure.supxlabel("step", size=8)
    return figure


def _tidy(axes: Axes, grid: Literal["both", "x"]) -> None:
    axes.grid(axis=grid, color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7.5)


def _legend(figure: Figure, names: Iterable[str], color: Mapping[str, str]) -> None:
    handles = [Patch(color=color[name]) for name in names]
    figure.legend(handles, list(names), loc="outside upper left", ncols=4, frameon=False, handlelength=1)


# --- the page ---------------------------------------------------------------------------------------------------------


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{body}</section>"


def _pairs(pairs: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in pairs.items()) + "</dl>"


def _score_table(table: EvaluationTable, metric: str) -> str:
    """A row per task and the average, a column per system, in percent."""

    def row(name: str, scores: Sequence[float | None], queries: str) -> str:
        shown = ["–" if score is None else f"{100 * score:.1f}" for score in scores]
        best = f"{100 * max([score for score in scores if score is not None], default=-1):.1f}"
        cells = "".join(f"<td>{f'<b>{text}</b>' if text == best else text}</td>" for text in shown)
        return f"<tr><th scope=row>{html.escape(name)}</th>{cells}<td class=count>{queries}</td></tr>"

    heads = "".join(f"<th scope=col>{html.escape(system)}</th>" for system in table.systems)
    queries = {score.task: score.queries for score in table.rows}
    body = "".join(
        row(task, [table.score(task, system, metric) for system in table.systems], f"{queries[task]:,}")
        for task in table.tasks
    )
    average = row("average", [table.average(system, metric) for system in table.systems], f"{sum(queries.values()):,}")
    head = f"<th scope=col>task</th>{heads}<th scope=col class=count>queries</th>"
    return (
        f"<div class=wide><table><caption>{html.escape(metric)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody><tfoot>{average}</tfoot></table></div>"
    )


def _row(parts: Sequence[str]) -> str:
    """Parts beside each other where the screen is wide enough."""
    return f"<div class=row>{''.join(parts)}</div>"


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


def _configuration(config: Config) -> str:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return f"<details><summary>all keys and values</summary><pre>{html.escape(text)}</pre></details>"


RPREC_NOTE = (
    "<p class=note>R-precision (Rprec): share of the gold pages found among as many first guesses as there are gold "
    "pages, the best evidence set counting. The average counts each task once. Best of each row in bold.</p>"
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{sections}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6470; --line: #d9dde3; --paper: #fff; --card: #f5f6f8;
  --good: #00734f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3abb6; --line: #3a3f47; --paper: #16181c;
  --card: #202329; --good: #4fd1a5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
h4 { font-size: .85rem; margin: 0; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .85rem; margin: .5rem 0; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-spacing: 0; font-variant-numeric: tabular-nums; }
caption { color: var(--soft); font-size: .85rem; text-align: left; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; font-weight: normal; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
thead th { color: var(--soft); border-bottom: 1px solid var(--line); }
tfoot { display: table-row-group; }
tfoot th, tfoot td { border-top: 1px solid var(--line); }
.count { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin-top: 1rem; }
figure { margin: 0; flex: 0 1 30.5rem; min-width: 0; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .4rem; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem; }
article { background: var(--card); border-radius: 6px; padding: .8rem 1rem; margin: .8rem 0; }
blockquote { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .6rem 1.2rem; }
ol { margin: .2rem 0 0; padding-left: 1.3rem; overflow-wrap: anywhere; }
.gold { color: var(--good); white-space: nowrap; font-size: .85rem; font-weight: 600; }
pre { background: var(--card); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; font-size: .85rem; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --card: #fff; --good: #00734f; }
  main { max-width: none; padding: 0; } body { font-size: 11pt; } th:first-child { position: static; }
  figure, article, .wide { break-inside: avoid; }
  h2, h3 { break-after: avoid; } article { border: 1px solid var(--line); } figure { flex-basis: 45%; } }
"""
