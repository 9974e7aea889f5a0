"""The report: one page that stands alone, whatever the data holds, and its figures."""

import base64
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest

from taskspec.config import Config, parse_config
from taskspec.evaluate.page import versions
from taskspec.evaluate.report import SampleAnswer, sample_answers, write_report
from taskspec.evaluate.run import EvaluationTable, TaskScores
from taskspec.retrieve.hits import Hit

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """The tags and the text of a page, and the headings in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def row(task: str, system: str, rprec: float) -> TaskScores:
    metrics = {"Rprec": rprec, "recall@1": rprec, "recall@5": rprec, "recall@20": 1.0}
    return TaskScores(task=task, system=system, queries=1234, metrics=metrics, per_query_rprec=())


def line(step: int, dev: float | None = None, **changes: object) -> dict[str, object]:
    task = {"loss": 3.0 / step} if dev is None else {"loss": 3.0 / step, "dev_accuracy": dev}
    course = {"entropy": 1.0, "saturation": 0.0, "gradient_ratio": 1.0, "clip_rate": 0.1, "learning_rate": 1e-4}
    return {"step": step, "tasks": {"nq": task}, **course, "queries_per_second": 99.0, "wait_share": 0.0, **changes}


def hit(rank: int, page: str, title: str) -> Hit:
    return Hit(rank, page, 1.0 / rank, page, title, None)


TABLE = EvaluationTable(
    (row("nq", "bm25", 0.25), row("nq", "taco", 0.5), row("fever", "bm25", 0.75), row("fever", "taco", 0.5))
)
ANSWERS = [
    SampleAnswer(
        task="nq",
        query=f"which page holds {EVIL}?",
        gold_pages={"1": f"gold {EVIL}"},
        hits={"bm25": [hit(1, "2", f"other {EVIL}"), hit(2, "1", f"gold {EVIL}")], "taco": []},
    )
]


def config(name: str = "reported") -> Config:
    task = {"name": "nq", "prompt": f"prompt {EVIL}"}
    return parse_config({"name": name, "artifacts": "x", "tasks": [task]}, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    path = write_report(
        folder,
        title=f"a title {EVIL}",
        facts={"what": f"fact {EVIL}"},
        table=TABLE,
        training={
            "taco": [line(1), line(2, dev=0.5), line(3, entropy=float("nan"))],
            f"run {EVIL}": [line(1, dev=0.1)],
        },
        answers=ANSWERS,
        config=config(),
    )
    assert path == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(folder: Path, text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert [attrs for _, attrs in page.tags if "href" in attrs] == []
    assert not re.search(r"url\(|@import|https?:", text)
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 4
    for source, name in zip(sources, ("r-precision", "loss", "dev-accuracy", "course"), strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (folder / f"{name}.png").read_bytes()


def test_figures_are_png_files_beside_the_page(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.html"}
    assert sorted(files) == ["course.png", "dev-accuracy.png", "loss.png", "r-precision.png"]
    assert all(content.startswith(PNG) for content in files.values())


def test_everything_from_data_is_escaped(text: str) -> None:
    assert "<script" not in text
    evil = html.escape(EVIL)
    for where in ("a title", "fact", "which page holds", "gold", "other", "prompt"):
        assert f"{where} {evil}" in text


def test_the_sections_come_in_reading_order(text: str) -> None:
    assert Page(text).headings == [
        "What was run",
        "R-precision per task, %",
        "Recall of evidence sets, %",
        "Training",
        "Sample answers",
        "Versions",
        "Resolved configuration",
    ]


def test_the_table_has_a_row_per_task_and_the_average_with_the_best_in_bold(text: str) -> None:
    assert "<th scope=row>nq</th><td>25.0</td><td><b>50.0</b></td><td class=count>1,234</td>" in text
    assert "<th scope=row>fever</th><td><b>75.0</b></td><td>50.0</td>" in text
    assert "<th scope=row>average</th><td><b>50.0</b></td><td><b>50.0</b></td><td class=count>2,468</td>" in text
    assert [name for name in ("recall@1", "recall@5", "recall@20") if f">{name}<" in text] == ["recall@5", "recall@20"]


def test_gold_pages_among_the_answers_are_marked(text: str) -> None:
    marked = re.findall(r"<li>(\w+) [^✓]*?(✓ gold)?(?:</span>)?</li>", text)
    assert marked == [("other", ""), ("gold", "✓ gold")]


def test_the_page_shows_versions_and_configuration(text: str) -> None:
    assert {"python", "taskspec", "ray", "torch", "numpy"} <= set(versions())
    assert f"<dt>taskspec</dt><dd>{versions()['taskspec']}</dd>" in text
    assert "name: reported\n" in text


def test_a_report_without_training_and_answers_leaves_them_out(tmp_path: Path) -> None:
    gap = EvaluationTable((row("nq", "a", 0.0), row("fever", "a", 1.0), row("nq", "$_x$", 0.5)))
    path = write_report(tmp_path, title="t", facts={}, table=gap, training={}, answers=[], config=config())
    page = path.read_text(encoding="utf-8")
    assert not {"Training", "Sample answers"} & set(Page(page).headings)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r-precision.png", "report.html"]
    assert "<th scope=row>fever</th><td><b>100.0</b></td><td>–</td>" in page


def test_a_long_dialogue_is_shown_by_its_beginning_and_its_end(tmp_path: Path) -> None:
    query = "first turn. " + "…" * 1000 + " last turn?"
    answer = SampleAnswer(task="wow", query=query, gold_pages={}, hits={})
    path = write_report(tmp_path, title="t", facts={}, table=TABLE, training={}, answers=[answer], config=config())
    page = path.read_text(encoding="utf-8")
    assert "first turn." in page
    assert "last turn?" in page
    assert "…" * 500 not in page


def test_the_settings_of_matplotlib_are_left_as_they_were(folder: Path) -> None:
    assert matplotlib.rcParams["text.parse_math"] is True


def test_samples_are_the_first_dev_query_of_each_task_and_every_systems_answer() -> None:
    class Rows:
        def __init__(self, **columns):
            self.columns = columns

        def take(self, rows, names):
            return {name: [self.columns[name][row] for row in rows] for name in names}

    class Always:
        def search(self, texts, task, top_k=10, level="page", with_text=False):
            assert (texts, top_k, level) == (["first"], 3, "page")
            return [[hit(1, "7", "Seven")]]

    queries = Rows(text=["first", "second"], gold_pages=[[["7"], ["8", "9"]], [["8"]]], positives=[[0, 1], [1]])
    prepared = SimpleNamespace(
        tasks=lambda split: ("nq", "fever"),
        queries=lambda task, split: queries,
        passages=Rows(wikipedia_id=["7", "8"], title=["Seven", "Eight"]),
    )
    nq, fever = sample_answers({"bm25": Always(), "single": {"fever": Always()}}, prepared)
    assert (nq.task, nq.query, nq.gold_pages) == ("nq", "first", {"7": "Seven", "8": "Eight", "9": "9"})
    assert nq.hits == {"bm25": [hit(1, "7", "Seven")]}
    assert list(fever.hits) == ["bm25", "single"]
