"""What the reports are made of: one HTML page that stands alone, its tables, its figures and their files.

Path: [here] → report, comparison figures, comparison report.  A page needs no network: figures are data URIs, there is
no script. Functions take plain text, escape it and return HTML; nothing here knows what is reported.
"""

from __future__ import annotations

import base64
import csv
import html
import importlib.metadata
import math
import platform
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import yaml
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

from taskspec.config import Config

COLORS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
"""One per system or row, in their order: told apart by color-blind readers too (Okabe and Ito's, and two more)."""
FIGURE_WIDTH = 5.0
"""Inches at 96 dots: narrow enough for a phone, and two of them beside each other on a desk."""
DRAWING = {"text.parse_math": False, "font.size": 8.5, "axes.titlesize": 8.5}
"""matplotlib's settings while a report draws. Names come from data: no TeX-like markup in them."""
LONG = 16
"""Tables with more lines scroll inside a frame, their head in sight."""
PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
    "scipy",
    "pyarrow",
    "bm25s",
)

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


def versions() -> dict[str, str]:
    """Python, taskspec and the packages that figures depend on, as installed here."""
    installed = {"python": platform.python_version()}
    for package in ("taskspec", *PACKAGES):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


# --- the page ---------------------------------------------------------------------------------------------------------


def write_page(path: Path, title: str, sections: Mapping[str, str]) -> Path:
    """Writes a page of sections, heading → HTML; those without a body are left out. Returns: its path."""
    bodies = "\n".join(
        f"<section><h2>{html.escape(heading)}</h2>{body}</section>" for heading, body in sections.items() if body
    )
    path.write_text(PAGE.format(title=html.escape(title), style=STYLE, sections=bodies), encoding="utf-8")
    return path


def pairs(pairs: Mapping[str, str]) -> str:
    """Labels and their texts."""
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in pairs.items()) + "</dl>"


def note(text: str, kind: str = "note") -> str:
    """A paragraph, in small print unless another class of `STYLE` is named."""
    return f"<p class={kind}>{html.escape(text)}</p>"


def beside(parts: Iterable[str]) -> str:
    """Parts beside each other where the screen is wide enough."""
    return f"<div class=row>{''.join(parts)}</div>"


def folded(summary: str, body: str) -> str:
    """A body that opens with a click, and on paper."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def configuration(config: Config) -> str:
    """All keys and values, folded."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return folded("all keys and values", f"<pre>{html.escape(text)}</pre>")


class Cell(NamedTuple):
    """One cell of a table."""

    text: str
    kind: str = ""
    """A class of `STYLE`; the empty one is a number."""
    note: str = ""
    """A second line in small print."""
    bold: bool = False

    def html(self, tag: str) -> str:
        text = html.escape(self.text)
        text = f"<b>{text}</b>" if self.bold else text
        small = f"<small>{html.escape(self.note)}</small>" if self.note else ""
        return f"<{tag}{f' class={self.kind}' if self.kind else ''}>{text}{small}</{tag.partition(' ')[0]}>"


def line(name: Cell, cells: Iterable[Cell]) -> str:
    """A line of a table."""
    return f"<tr>{name.html('th scope=row')}{''.join(cell.html('td') for cell in cells)}</tr>"


def group_line(text: str, columns: int) -> str:
    """A line across a table that says what the next lines have in common. It stays in sight when the table scrolls."""
    return f"<tr class=group><th scope=rowgroup colspan={columns}><span>{html.escape(text)}</span></th></tr>"


def table(head: Sequence[Cell], lines: Sequence[str], foot: str = "", caption: str = "") -> str:
    """A table of lines; its first column stays where it is when a narrow screen scrolls the others."""
    kind = '"wide long"' if len(lines) > LONG else "wide"
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    top = "".join(cell.html("th scope=col") for cell in head)
    end = f"<tfoot>{foot}</tfoot>" if foot else ""
    body = "".join(lines)
    return f"<div class={kind}><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody>{end}</table></div>"


# --- files ------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, head: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Numbers as they are, unrounded; None is an empty field."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(lines)


def save_figure(folder: Path, name: str, text: str, figure: Figure) -> str:
    """Saves a figure as `<name>.png`, at twice the screen's dots. Returns: its HTML."""
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=192, facecolor="white")
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(text)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


# --- drawing ----------------------------------------------------------------------------------------------------------

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
"""Title of a plot → run or row → its points (step, value)."""

Grid = Mapping[str, Mapping[str, float]]
"""Row of a map → column → value."""


def canvas(height: float) -> Figure:
    """An empty figure, `height` inches high."""
    figure = Figure(figsize=(FIGURE_WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    """The look of all plots."""
    axes.grid(axis=grid, color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7.5)


def legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """Above the plots, in as many columns as the longest name leaves room for."""
    columns = int(75 / (max(map(len, handles)) + 5))
    place = "outside upper left"
    figure.legend(list(handles.values()), list(handles), loc=place, ncols=min(max(columns, 1), 4), frameon=False)


def draw_panels(curves: Curves, color: Mapping[str, str]) -> Figure | None:
    """Small plots over steps, two in a row, a line per run; plots without points are left out, None if all are."""
    filled = {title: {run: points for run, points in runs.items() if points} for title, runs in curves.items()}
    filled = {title: runs for title, runs in filled.items() if runs}
    if not filled:
        return None
    rows = math.ceil(len(filled) / 2)
    figure = canvas(0.5 + 1.45 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (title, runs) in zip(grid, filled.items(), strict=False):
        for run, points in runs.items():
            axes.plot(
                *zip(*points, strict=True), color=color[run], linewidth=1.2, marker="." if len(points) < 12 else ""
            )
        axes.set_title(title)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        tidy(axes, "both")
    for axes in grid[len(filled) :]:
        axes.set_axis_off()
    legend(figure, {run: Patch(color=color[run]) for runs in filled.values() for run in runs})
    figure.supxlabel("step", size=8)
    return figure


def draw_maps(maps: Mapping[str, Grid], *, signed: bool, rows: str, columns: str) -> Figure:
    """Heat maps beside each other on one scale, the value in each cell.

    Args: maps: title → grid, at most two; rows that only one of them has stay empty in the other. signed: colors say
        on which side of 0 a value lies, and cells with the row's name in the column are framed. rows, columns: what
        they are.
    """
    down = list(dict.fromkeys(row for grid in maps.values() for row in grid))
    across = list(dict.fromkeys(column for grid in maps.values() for line in grid.values() for column in line))
    values = {
        title: np.array([[grid.get(row, {}).get(column, np.nan) for column in across] for row in down])
        for title, grid in maps.items()
    }
    reach = max(float(np.nanmax(np.abs(part))) for part in values.values()) or 1.0
    scale = Normalize(-reach if signed else 0.0, reach)
    colors = colormaps["RdBu_r" if signed else "Blues"]
    digits = 1 if reach < 9.95 else 0
    figure = canvas(1.1 + 0.21 * len(down))
    panels = figure.subplots(1, len(values), squeeze=False, sharey=True).flatten()
    for axes, (title, part) in zip(panels, values.items(), strict=True):
        axes.imshow(part, cmap=colors, norm=scale, aspect="auto")
        for (y, x), value in np.ndenumerate(part):
            if math.isnan(value):
                continue
            dark = np.dot(colors(scale(value))[:3], (0.3, 0.59, 0.11)) < 0.5
            text = f"{value:z.{digits}f}".replace("-", "−")
            axes.text(x, y, text, ha="center", va="center", size=6, color="white" if dark else "black")
            if signed and down[y] == across[x]:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.1))
        axes.set_title(textwrap.fill(title, 30))
        axes.set_xticks(range(len(across)), across, rotation=90)
        axes.set_yticks(range(len(down)), down)
        axes.tick_params(labelsize=7, length=0)
    figure.supxlabel(columns, size=8)
    figure.supylabel(rows, size=8)
    return figure


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
  --good: #00734f; --bad: #a33b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3abb6; --line: #3a3f47; --paper: #16181c;
  --card: #202329; --good: #4fd1a5; --bad: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
h4 { font-size: .85rem; margin: 0; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.lead { font-weight: 600; margin: 0 0 .2rem; }
.sentence { margin: 0; } .sentence::first-letter { text-transform: uppercase; }
.note { color: var(--soft); font-size: .85rem; margin: .5rem 0; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-spacing: 0; font-size: .93rem; font-variant-numeric: tabular-nums; }
.long { overflow-y: auto; max-height: 85vh; }
.long thead th { position: sticky; top: 0; background: var(--paper); z-index: 1; }
.long thead th:first-child { z-index: 2; }
caption { color: var(--soft); font-size: .85rem; text-align: left; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; font-weight: normal; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
thead th { color: var(--soft); border-bottom: 1px solid var(--line); white-space: normal; vertical-align: bottom; }
tbody th { white-space: normal; overflow-wrap: break-word; }
td small, th small { display: block; color: var(--soft); font-size: .78em; line-height: 1.25; }
.text { text-align: left; white-space: normal; min-width: 10rem; font-size: .85rem; }
.higher, .higher small { color: var(--good); font-weight: 600; }
.lower, .lower small { color: var(--bad); font-weight: 600; }
.group th { padding-top: .8rem; border-top: 1px solid var(--line); }
.group span { display: block; position: sticky; left: 0; contain: inline-size; max-width: min(60rem, 100vw - 3rem);
  white-space: normal; color: var(--soft); font-size: .85rem; }
tfoot { display: table-row-group; }
tfoot th, tfoot td { border-top: 1px solid var(--line); }
.count { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin-top: 1rem; }
figure { margin: 0; flex: 0 1 30.5rem; min-width: 0; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .4rem; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem; }
article { background: var(--card); border-radius: 6px; padding: .8rem 1rem; margin: .8rem 0; }
.row article { flex: 1 1 24rem; margin: 0; }
blockquote { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .6rem 1.2rem; }
ol { margin: .2rem 0 0; padding-left: 1.3rem; overflow-wrap: anywhere; }
.warning { border-left: 4px solid var(--bad); padding: .2rem .7rem; margin: .5rem 0 0; font-weight: 600; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--soft); }
.gold { color: var(--good); white-space: nowrap; font-size: .85rem; font-weight: 600; }
pre { background: var(--card); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; font-size: .85rem; }
  tbody th { min-width: 7rem; } }
@page { margin: 12mm; }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --card: #fff; --good: #00734f;
  --bad: #a33b00; }
  main { max-width: none; padding: 0; } body { font-size: 11pt; }
  .wide { overflow: visible; max-height: none; } th, td, .text, .group span, .note, figcaption { font-size: 8pt; }
  th, td { padding: .15rem .3rem; }
  .wide th { position: static !important; white-space: normal; } .text { min-width: 0; }
  figure, article, tr { break-inside: avoid; } .group, .lead, caption, h2, h3, summary { break-after: avoid; }
  article { border: 1px solid var(--line); } figure { flex-basis: 45%; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 7pt; columns: 3; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
