"""The report of a comparison: a page that stands alone, and files with the comparison's own numbers."""

import base64
import csv
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from taskspec.arms import Arm
from taskspec.config import Config, parse_config
from taskspec.evaluate import comparison_figures, statistics
from taskspec.evaluate.comparison import STRENGTH, Comparison
from taskspec.evaluate.comparison_report import CHANGE, write_comparison
from taskspec.evaluate.statistics import seed_interval
from taskspec.evaluate.trials import Cost, Trial
from taskspec.specialize.analysis import Ablation, Ownership

TASKS = ("nq", "fever", "wow")
EVIL = '<script>alert("x")</script>'
ENDS, ODD = f"ends-{EVIL}", f"odd {EVIL}"
FIGURES = ["strength", "ownership-layer", "ownership-kind", "course", "ablation-1", "ablation-2", "transfer"]
TABLES = ["rows", "tasks", "ownership", "ablation", "zero-shot", "cost"]


@pytest.fixture(autouse=True, scope="module")
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 199)
        yield


class Page(HTMLParser):
    """The headings of a page, its tables as lists of lines of texts, and the text of its sections."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.heading = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
        if tag == "small":
            self.tables[self.heading][-1][-1] += "|"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.heading += data
            self.sections[self.heading] = ""
        elif self.heading:
            self.sections[self.heading] += data
        if "tr" in self.open:
            self.tables[self.heading][-1][-1] += data

    def line(self, heading: str, name: str) -> list[str]:
        (line,) = [cells for cells in self.tables[heading] if cells[0] == name and len(cells) > 1]
        return line[1:]


def records(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float | None:
    return float(text) if text else None


def trial(row: str, *, seed: int | None = 0, level: float = 0.5, tasks=TASKS, **changes) -> Trial:
    """Its scores are 1 for the first `level` of 10 queries of each task, and a little less for an odd seed."""
    scores = {task: tuple([1.0] * round(10 * level) + [0.1 * (seed or 0)] * (10 - round(10 * level))) for task in tasks}
    cost = Cost(
        retrievers=1,
        training_queries=6400,
        training_seconds=1800.0,
        parameters=1_234_567,
        index_bytes=2_500_000,
        passages_embedded=2228,
    )
    fields = {
        "arm": row.split()[0],
        "row": row,
        "values": {},
        "candidate": "",
        "seed": seed,
        "scores": scores,
        "zero_shot": {},
        "cost": cost,
        "course": {},
        "ownership": None,
        "ablations": {},
        "checkpoint": None,
    }
    return Trial(**{**fields, **changes})


def shares(first: float) -> dict[str, float]:
    return {"nq": first, "fever": 1 - first, "wow": 0.0}


def ownership(first: float) -> Ownership:
    layers = {"embedding": shares(first), "encoder 0": shares(first / 2)}
    return Ownership(entropy=first, owned=shares(first), by_layer=layers, by_kind={"norm": shares(first)})


def ablation(own: float, first: float = 0.0) -> Ablation:
    """Falls of `own` where a task's own elements are zeroed, 0.02 elsewhere and for random ones; the first of two
    queries falls by `first` more than the other."""
    random = {task: dict.fromkeys(TASKS, 0.02) for task in TASKS}
    return Ablation(
        share=0.01,
        owned={task: {**random[task], task: own} for task in TASKS},
        random=random,
        own=dict.fromkeys(TASKS, (own + first / 2, own - first / 2)),
        own_random=dict.fromkeys(TASKS, (0.02, 0.02)),
    )


def ablations(own: float) -> dict[str, Ablation]:
    return {"all elements": ablation(own)}


def course(entropy: float, steps=(10, 20)) -> dict[str, tuple[tuple[int, float], ...]]:
    return {
        "entropy": tuple((step, 1 - (1 - entropy) * step / 20) for step in steps),
        "saturation": tuple((step, 0.5) for step in steps),
        "gradient_ratio": tuple((step, 1.0) for step in steps),
    }


def strength_trials(arm: str, levels: dict[float, float], seeds=(0, 1), **changes) -> list[Trial]:
    return [
        trial(f"{arm} strength={value:g}", seed=seed, level=level, values={STRENGTH: value}, **changes)
        for value, level in levels.items()
        for seed in seeds
    ]


def full_trials() -> list[Trial]:
    zero_shot = {"prompt": {"wow": (1.0, 1.0, 0.0)}, "no prompt": {"wow": (1.0, 0.0, 0.0)}}
    no_better = {"prompt": {"wow": (1.0, 0.0, 0.0)}, "no prompt": {"wow": (1.0, 0.0, 0.0)}}
    held = {"tasks": ("nq", "fever")}
    return [
        trial("bm25", seed=None, level=0.2, cost=None),
        *(
            trial(
                "mean", seed=seed, ownership=ownership(0.2 + 0.2 * seed), ablations=ablations(0.03), course=course(1.0)
            )
            for seed in (0, 1)
        ),
        *strength_trials("taco", {0.5: 0.6, 1.0: 0.8, 4.0: 0.7}, course=course(0.5)),
        *strength_trials(ENDS, {1.0: 0.5, 16.0: 0.9}, ownership=ownership(0.6)),
        *(
            trial(ODD, seed=seed, level=level, candidate=f"rate={rate}", ablations=ablations(0.01))
            for rate, level in ((EVIL, 0.4), ("b", 0.3))
            for seed in (0, 1)
        ),
        *(trial("plain-held", seed=seed, zero_shot=zero_shot, **held) for seed in (0, 1)),
        *strength_trials("held", {0.5: 1.0, 2.0: 0.9}, zero_shot=no_better, ownership=ownership(0.9), **held),
    ]


def config() -> Config:
    return parse_config({"name": "compared", "artifacts": f"x{EVIL}", "tasks": [{"name": "nq"}]}, "test")


def written(folder: Path, comparison: Comparison, **changes) -> Page:
    arms = {row.arm: Arm() for row in comparison.rows} | changes.pop("arms", {})
    arguments = {"title": "t", "facts": {}, "arms": arms, "config": config(), **changes}
    return Page(write_comparison(folder, comparison, **arguments))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return Comparison.of(full_trials(), "mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison") / "new"


@pytest.fixture(scope="module")
def page(folder: Path, comparison: Comparison) -> Page:
    return written(
        folder,
        comparison,
        title=f"a title {EVIL}",
        facts={"what": f"fact {EVIL}"},
        arms={
            "taco": Arm(question=f"should help {EVIL}", set={"train.steps": 3}),
            "mean": Arm(question="the baseline"),
        },
    )


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    assert page.open == []
    assert not {"script", "link", "iframe", "a"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", page.source)


def test_the_sections_come_in_reading_order(page: Page) -> None:
    assert list(page.sections) == [
        "What was run",
        "Recommended strength",
        "All rows",
        "R-precision per task",
        "R-precision over strength",
        "Who owns the parameters",
        "The course of training",
        "Proof by ablation",
        "Tasks held out of training",
        "Cost of ownership",
        "Versions",
        "Resolved configuration",
    ]
    assert "name: compared\n" in page.sections["Resolved configuration"]
    assert "matplotlib" not in page.sections["Versions"]
    assert "scipy" in page.sections["Versions"]


def test_each_figure_is_in_the_page_and_beside_it_as_png_and_csv(folder: Path, page: Page) -> None:
    sources = re.findall(r'src="data:image/png;base64,([^"]*)"', page.source)
    assert [base64.b64decode(data) for data in sources] == [(folder / f"{name}.png").read_bytes() for name in FIGURES]
    names = {"report.html", *(f"{name}.png" for name in FIGURES), *(f"{name}.csv" for name in FIGURES + TABLES)}
    assert {path.name for path in folder.iterdir()} == names
    assert all(len(records(folder / f"{name}.csv")) > 0 for name in FIGURES + TABLES)


def test_everything_from_data_is_escaped(page: Page) -> None:
    assert "<script" not in page.source
    evil = html.escape(EVIL)
    for where in ("a title ", "fact ", "should help ", "odd ", "rate=", "artifacts: x", "<p class=lead>ends-"):
        assert f"{where}{evil}" in page.source


def test_sections_without_data_and_their_files_are_absent(tmp_path: Path) -> None:
    trials = [trial("bm25", seed=None, cost=None), trial("words", seed=None, cost=None, level=0.7)]
    page = written(tmp_path, Comparison.of(trials, "bm25"))
    assert list(page.sections) == [
        "What was run",
        "All rows",
        "R-precision per task",
        "Versions",
        "Resolved configuration",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "rows.csv", "tasks.csv"]


# --- recommendation, rows and tasks -----------------------------------------------------------------------------------


def test_each_recommendation_has_its_reason_and_only_those_at_an_end_warn(page: Page, comparison: Comparison) -> None:
    text = page.sections["Recommended strength"]
    cards = dict(zip(("taco", ENDS), re.split(r"(?=taco: |ends-)", text)[1:], strict=True))
    assert "Where no strength changes anything, one of six is recommended all the same" in text
    for arm, card in cards.items():
        found = comparison.recommend(arm, STRENGTH)
        assert card.startswith(f"{arm}: {found.value:g}{found.reason}.")
        assert (f"⚠ {found.value:g} lies at an end of the range" in card) == (found.end == found.value)
    assert [comparison.recommend(arm, STRENGTH).end is None for arm in cards] == [True, False]


def test_what_an_arm_sets_stands_above_its_rows(page: Page, folder: Path) -> None:
    assert f"taco: should help {html.escape(EVIL)} · train.steps=3" in page.source
    assert {r["settings"] for r in records(folder / "rows.csv") if r["arm"] == "taco"} == {"train.steps=3"}


def test_no_strength_is_recommended_for_an_arm_with_held_out_tasks(page: Page, folder: Path, comparison) -> None:
    assert len(comparison.curve("held", STRENGTH)) > 1
    assert comparison.recommend("held", STRENGTH) is None
    assert "held" not in page.sections["Recommended strength"]
    assert {r["arm"] for r in records(folder / "strength.csv")} == {"taco", ENDS}
    assert {r["arm"] for r in records(folder / "transfer.csv")} == {"held"}


def test_every_row_is_in_every_table_that_is_about_all_rows(page: Page, folder: Path, comparison: Comparison) -> None:
    names = [row.name for row in comparison.rows]
    for heading in ("All rows", "R-precision per task", "Cost of ownership"):
        assert [line[0] for line in page.tables[heading] if len(line) > 1 and line[0] != "row"] == names
    assert [record["row"] for record in records(folder / "rows.csv")] == names


def test_a_row_shows_average_difference_intervals_and_verdict(page: Page) -> None:
    assert page.line("All rows", "mean")[:6] == ["52.5 ± 3.5", "2", "–", "–", "–", "baseline"]
    average, seeds, difference, queries, over_seeds, verdict, candidate = page.line("All rows", "taco strength=1")
    assert (average, seeds, difference, candidate) == ("81.0 ± 1.4", "2", "+28.5", "–")
    assert over_seeds == "+9.4 to +47.6"  # 28.5 ± 12.706 · 1.5
    assert re.fullmatch(r"\+\d+\.\d to \+\d+\.\d", queries)
    assert verdict == "▲ higher"
    assert page.line("All rows", "bm25")[1] == "–"
    assert page.sections["All rows"].startswith("10 row(s) against mean. higher: ")


def test_the_two_candidates_that_measured_a_row_are_named(tmp_path: Path) -> None:
    even, odd = (1.0, 0.0) * 5, (0.0, 1.0) * 5
    scores = {"even": {"nq": even}, "odd": {"nq": odd}}
    trials = [trial("one", candidate=name, scores=of_name, cost=None) for name, of_name in scores.items()]
    page = written(tmp_path, Comparison.of(trials, "one"))
    assert page.line("All rows", "one")[-1] == "odd for even queries, even for odd ones"


def test_the_question_of_an_arm_stands_above_its_rows_once(page: Page) -> None:
    lines = page.tables["All rows"]
    place = lines.index([f"taco: should help {EVIL} · train.steps=3"])
    assert [line[0] for line in lines[place + 1 : place + 5]] == [
        "taco strength=0.5",
        "taco strength=1",
        "taco strength=4",
        ENDS,  # has no question, but must not seem to belong to the one above
    ]
    assert lines.count([f"taco: should help {EVIL} · train.steps=3"]) == 1


def test_the_tables_files_hold_the_comparisons_numbers(page: Page, folder: Path, comparison: Comparison) -> None:
    def same(record: dict[str, str], found: statistics.Difference | None) -> None:
        if found is None:
            assert [record[column] for column in CHANGE] == ["", "", "", "", "", "baseline"]
            return
        seeds = [None, None] if found.seeds is None else [found.seeds.low, found.seeds.high]
        expected = [found.mean, found.queries.low, found.queries.high, *seeds]
        assert [number(record[column]) for column in CHANGE[:5]] == expected
        assert record["verdict"] == found.verdict

    for record in records(folder / "rows.csv"):
        row = comparison.row(record["row"])
        assert (number(record["average"]), number(record["std"])) == (row.average, row.std)
        assert (int(record["seeds"]), int(record["tasks"])) == (len(row.seeds), len(row.scores))
        assert (record["chosen_even"], record["chosen_odd"]) == row.chosen
        same(record, None if row is comparison.baseline else comparison.difference(row.name))
    by_task = records(folder / "tasks.csv")
    assert len(by_task) == sum(len(comparison.compared_tasks(row.name)) for row in comparison.rows)
    for record in by_task:
        row = comparison.row(record["row"])
        assert float(record["average"]) == row.task_average(record["task"])
        found = None if row is comparison.baseline else comparison.difference(row.name, task=record["task"])
        same(record, found)


def test_a_task_has_its_difference_and_a_mark_only_where_it_is_shown(page: Page) -> None:
    assert page.line("R-precision per task", f"{ENDS} strength=16") == ["90.5|+38.0 ▲"] * 3
    # 3 of 10 queries are better: enough for three tasks together, not for one.
    assert page.line("R-precision per task", "taco strength=1") == ["81.0|+28.5"] * 3
    assert page.line("R-precision per task", f"{ENDS} strength=1") == ["52.5|+0.0"] * 3
    assert page.line("R-precision per task", "bm25") == ["20.0|−32.5 ▼"] * 3
    assert page.line("R-precision per task", "mean") == ["52.5|baseline"] * 3
    assert set(re.findall(r"<td class=([^>]*)>", page.source)) == {"higher", "lower", "count", "text"}


def test_a_row_with_other_tasks_says_so(page: Page) -> None:
    assert page.line("All rows", "held strength=2")[0] == "90.5 ± 0.7|over 2 tasks"
    assert page.line("R-precision per task", "held strength=2")[2] == "–"


# --- curves -----------------------------------------------------------------------------------------------------------


def test_the_strength_curves_file_holds_averages_intervals_and_seeds(page: Page, folder: Path, comparison) -> None:
    found = records(folder / "strength.csv")
    row = comparison.row("taco strength=4")
    averages_S = row.averages_S()
    interval = seed_interval(averages_S)
    point = {r["quantity"]: float(r["value"]) for r in found if (r["arm"], r["strength"]) == ("taco", "4.0")}
    assert point == {
        "average": row.average,
        "low": interval.low,
        "high": interval.high,
        "seed 0": averages_S[0],
        "seed 1": averages_S[1],
    }
    levels = {r["arm"]: float(r["value"]) for r in found if r["line"] == "mean"}
    assert levels == {arm: pytest.approx(comparison.baseline.average) for arm in ("taco", ENDS)}


def test_the_baselines_level_is_over_the_tasks_of_the_curve(tmp_path: Path) -> None:
    scores = {"nq": (0.0,), "fever": (0.5,), "wow": (1.0,)}
    held = [trial(f"held {value}", values={STRENGTH: value}, tasks=("nq", "fever"), cost=None) for value in (1, 2)]
    written(tmp_path, Comparison.of([trial("mean", scores={t: s * 10 for t, s in scores.items()}), *held], "mean"))
    (level,) = [r["value"] for r in records(tmp_path / "strength.csv") if r["line"] == "mean"]
    assert float(level) == 0.25


# --- what specialization did ------------------------------------------------------------------------------------------


def test_ownership_is_a_mean_over_seeds(page: Page, folder: Path) -> None:
    assert page.line("Who owns the parameters", "mean") == ["0.300", "30.0", "70.0", "0.0"]
    layers = {(r["map"], r["layer"], r["task"]): float(r["value"]) for r in records(folder / "ownership-layer.csv")}
    assert layers["mean", "encoder 0", "nq"] == pytest.approx(0.15)


def test_the_maps_show_the_baseline_and_the_best_row_over_the_same_tasks(page: Page, folder: Path, comparison) -> None:
    assert comparison.row("held strength=0.5").average > comparison.row(f"{ENDS} strength=16").average
    for name in ("ownership-layer", "ownership-kind"):
        assert list(dict.fromkeys(r["map"] for r in records(folder / f"{name}.csv"))) == ["mean", f"{ENDS} strength=16"]


def test_where_the_baseline_was_not_analyzed_the_first_row_that_was_is_the_control(tmp_path: Path) -> None:
    rows = {"mean": None, "control": ownership(0.2), "better": ownership(0.3), "worse": ownership(0.4)}
    levels = {"mean": 0.9, "control": 0.4, "better": 0.6, "worse": 0.2}
    trials = [trial(row, level=levels[row], ownership=found) for row, found in rows.items()]
    written(tmp_path, Comparison.of(trials, "mean"))
    maps = list(dict.fromkeys(r["map"] for r in records(tmp_path / "ownership-layer.csv")))
    assert maps == ["control", "better"]


def test_only_trials_that_measured_a_row_count(tmp_path: Path) -> None:
    def of(level: float, first: float, seed: int, candidate: str) -> Trial:
        return trial("one", level=level, seed=seed, candidate=candidate, ownership=ownership(first), cost=None)

    # `b` is worse, and seed 2 is not one that both have.
    trials = [of(0.9, 0.2, 0, "a"), of(0.9, 0.4, 1, "a"), of(0.1, 0.9, 0, "b"), of(0.1, 0.9, 1, "b")]
    page = written(tmp_path, Comparison.of([*trials, of(0.9, 0.9, 2, "a")], "one"))
    assert page.line("Who owns the parameters", "one")[0] == "0.300"


def test_the_course_is_a_mean_over_seeds_of_what_was_finite(page: Page, tmp_path: Path) -> None:
    changed = {"entropy": ((10, 0.5), (20, float("nan")))}
    trials = [trial("mean"), trial("mean", seed=1)]
    trials += [trial("taco", course=course(0.5)), trial("taco", seed=1, course=changed)]
    written(tmp_path, Comparison.of(trials, "mean"))
    found = {(r["figure"], r["step"]): float(r["value"]) for r in records(tmp_path / "course.csv")}
    assert (found["entropy", "10"], found["entropy", "20"]) == (pytest.approx((0.75 + 0.5) / 2), 0.5)


def test_the_course_shows_the_best_of_the_rows_that_lean(folder: Path, page: Page, tmp_path: Path) -> None:
    assert {r["row"] for r in records(folder / "course.csv")} == {f"taco strength={s}" for s in ("0.5", "1", "4")}
    many = [trial(f"row{n}", level=n / 10, course=course(0.5), cost=None) for n in range(10)]
    written(tmp_path, Comparison.of([trial("mean", level=1, course=course(1.0)), *many], "mean"))
    shown = list(dict.fromkeys(r["row"] for r in records(tmp_path / "course.csv")))
    assert shown == [f"row{n}" for n in range(9, 1, -1)]


def test_ablation_shows_falls_and_for_how_many_tasks_their_own_are_largest(page: Page, folder: Path) -> None:
    counts = ["3 of 3", "3 of 3", "3 of 3"]
    none = ["0 of 3", "0 of 3", "0 of 3"]
    lower = "−2.0 ▼|−2.0 to −2.0 · −2.0 to −2.0"
    assert page.tables["Proof by ablation"][1:] == [
        ["mean", "all elements", "3.0", "2.0", "2.0", "+1.0 ▲|+1.0 to +1.0 · +1.0 to +1.0", "–", *counts],
        [ODD, "all elements", "1.0", "2.0", "2.0", "−1.0 ▼|−1.0 to −1.0 · −1.0 to −1.0", lower, *none],
    ]
    found = {(r["row"], r["what"]): r for r in records(folder / "ablation.csv")}
    assert list(found)[:5] == [("mean", of) for of in ("mean", "0", "1", "own − random", "to baseline")]
    assert {key[1]: r["both"] for key, r in found.items() if key[0] == "mean"} == {
        "mean": "3",
        "0": "3",
        "1": "3",
        "own − random": "",
        "to baseline": "",
    }
    assert float(found[ODD, "to baseline"]["difference"]) == pytest.approx(-0.02)
    falls = {(r["map"], r["zeroed for"], r["evaluated"]): float(r["value"]) for r in records(folder / "ablation-1.csv")}
    assert len(falls) == 2 * 3 * 3
    assert falls["elements a task owns most", "nq", "nq"] == pytest.approx(0.03)
    assert falls["random elements", "nq", "nq"] == pytest.approx(0.02)


def test_own_minus_random_is_paired_by_seed_and_has_intervals_over_queries_and_seeds(tmp_path: Path) -> None:
    trials = [
        trial(row, seed=seed, ablations={"all elements": ablation(own + 0.1 * seed, first=0.1)})
        for row, own, seeds in (("mean", 0.1, (0, 1)), ("taco", 0.2, (1, 2)))
        for seed in seeds
    ]
    comparison = Comparison.of(trials, "mean")
    page = written(tmp_path, comparison)
    beyond = comparison.own_minus_random("mean", "all elements")
    assert beyond is not None
    assert beyond.mean == pytest.approx(0.13)
    assert (beyond.count, beyond.verdict) == (2, "no difference shown")
    assert beyond.seeds is not None
    assert beyond.seeds.high == pytest.approx(seed_interval(np.array([0.08, 0.18])).high)
    assert 0.08 <= beyond.queries.low < 0.13 < beyond.queries.high <= 0.18
    assert page.line("Proof by ablation", "mean")[4].startswith("+13.0|+")
    change = comparison.own_minus_random("taco", "all elements", to_baseline=True)
    assert change is not None
    assert (change.count, change.seeds) == (1, None)  # only seed 1 was measured of both
    assert change.mean == pytest.approx(0.1)
    assert page.line("Proof by ablation", "taco")[5].endswith(" · one seed")


def test_counts_of_the_mean_are_of_the_mean_falls(tmp_path: Path) -> None:
    trials = [trial("mean", seed=seed, ablations=ablations(own)) for seed, own in ((0, 0.0), (1, 0.1))]
    page = written(tmp_path, Comparison.of(trials, "mean"))
    assert page.line("Proof by ablation", "mean")[-3:] == ["3 of 3", "3 of 3", "3 of 3"]
    assert [r["both"] for r in records(tmp_path / "ablation.csv")][:3] == ["3", "0", "3"]


def test_each_choice_of_elements_is_counted_alone(tmp_path: Path) -> None:
    # nq always has most to lose, so no other task is the one that falls most; yet each falls by its own elements.
    owned = {"nq": {"nq": 0.5, "fever": 0.1}, "fever": {"nq": 0.4, "fever": 0.2}}
    random = {task: {"nq": 0.0, "fever": 0.0} for task in owned}
    falls, nothing = {"nq": (0.5,), "fever": (0.2,)}, {"nq": (0.0,), "fever": (0.0,)}
    found = {
        "all elements": Ablation(share=0.01, owned=owned, random=random, own=falls, own_random=nothing),
        "without embeddings": Ablation(share=0.01, owned=random, random=random, own=nothing, own_random=nothing),
    }
    page = written(tmp_path, Comparison.of([trial("mean", ablations=found, cost=None)], "mean"))
    assert [(line[1], *line[-3:]) for line in page.tables["Proof by ablation"][1:]] == [
        ("all elements", "1 of 2", "2 of 2", "1 of 2"),
        ("without embeddings", "0 of 2", "0 of 2", "0 of 2"),
    ]


def test_rows_that_were_not_ablated_are_not_compared(tmp_path: Path) -> None:
    held = {"nq": {"nq": 0.1}}
    other = Ablation(share=0.01, owned=held, random=held, own={"nq": (0.1,)}, own_random={"nq": (0.1,)})
    trials = [trial("mean", ablations=ablations(0.1)), trial("plain"), trial("held", ablations={"all elements": other})]
    comparison = Comparison.of(trials, "mean")
    assert comparison.own_minus_random("plain", "all elements") is None
    assert comparison.own_minus_random("plain", "all elements", to_baseline=True) is None
    assert comparison.own_minus_random("held", "all elements", to_baseline=True) is None  # of one task, not of three
    assert [line[0] for line in written(tmp_path, comparison).tables["Proof by ablation"][1:]] == ["mean", "held"]


def test_maps_of_many_rows_are_folded(tmp_path: Path, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    assert page.tags.count("details") == 1
    monkeypatch.setattr(comparison_figures, "MAPS_OPEN", 0)
    folded = written(tmp_path, Comparison.of([trial("mean", ablations=ablations(0.1))], "mean"))
    assert folded.tags.count("details") == 2
    assert "1 maps" in folded.source


# --- transfer and cost ------------------------------------------------------------------------------------------------


def test_transfer_compares_prompts_and_rows(page: Page, folder: Path, comparison: Comparison) -> None:
    plain = page.line("Tasks held out of training", "plain-held")
    assert plain[:2] == ["66.7 ± 0.0", "33.3 ± 0.0"]
    assert plain[2].startswith("+33.3")
    assert plain[3:] == ["–", "–"]
    changed = page.line("Tasks held out of training", "held strength=2")
    assert [cell.partition("|")[0] for cell in changed] == ["33.3 ± 0.0", "33.3 ± 0.0", "+0.0", "−33.3", "+0.0"]
    found = {(r["row"], r["what"]): r for r in records(folder / "zero-shot.csv")}
    record = found["held strength=2", "prompt − plain-held, prompt"]
    prompted = {row.name: ways["prompt"] for row, ways in comparison.zero_shot_rows().items()}
    mine, theirs = prompted["held strength=2"], prompted["plain-held"]
    assert float(record["difference"]) == mine.minus(theirs).mean
    assert found["plain-held", "prompt − plain-held, prompt"]["verdict"] == "reference"
    assert float(found["held strength=2", "prompt"]["average"]) == mine.average
    assert "Reference: plain-held for wow." in page.sections["Tasks held out of training"]


def test_several_held_out_tasks_are_shown_one_by_one_too(tmp_path: Path) -> None:
    zero_shot = {way: {"wow": (1.0, 1.0), "fever": (0.0, 0.5)} for way in ("prompt", "no prompt")}
    page = written(tmp_path, Comparison.of([trial("mean", zero_shot=zero_shot)], "mean"))
    shown = {name: page.line("Tasks held out of training", name)[0] for name in ("mean", "· wow", "· fever")}
    assert shown == {"mean": "62.5", "· wow": "100.0", "· fever": "25.0"}
    averages = {r["task"]: float(r["average"]) for r in records(tmp_path / "zero-shot.csv") if r["what"] == "prompt"}
    assert averages == {"": 0.625, "wow": 1.0, "fever": 0.25}


def test_rows_kept_from_different_tasks_have_different_references(tmp_path: Path) -> None:
    def kept(name: str, task: str, score: float, **values) -> Trial:
        zero_shot = {way: {task: (score, score)} for way in ("prompt", "no prompt")}
        return trial(name, tasks=("nq",), zero_shot=zero_shot, cost=None, **values)

    trials = [kept("a2", "wow", 0.9, values={STRENGTH: 2}), kept("a1", "wow", 0.2, values={STRENGTH: 1})]
    trials += [kept("b1", "fever", 0.6, values={STRENGTH: 1}), kept("b", "fever", 0.5)]
    page = written(tmp_path, Comparison.of([*trials, trial("all", cost=None)], "all"))
    differences = [r["difference"] for r in records(tmp_path / "zero-shot.csv") if r["what"].startswith("prompt − a")]
    assert [number(text) for text in differences] == [pytest.approx(0.7), None]
    assert page.line("Tasks held out of training", "b1")[3].startswith("+10.0|")
    assert "Reference: a1 for wow; b for fever." in page.source


def test_the_transfer_curves_file_holds_both_ways_and_the_reference(page: Page, folder: Path) -> None:
    averages = {
        (r["line"], r["strength"]): float(r["value"])
        for r in records(folder / "transfer.csv")
        if r["quantity"] == "average"
    }
    assert averages == {
        ("plain-held, prompt", ""): pytest.approx(2 / 3),
        ("plain-held, no prompt", ""): pytest.approx(1 / 3),
        **{(way, value): pytest.approx(1 / 3) for way in ("prompt", "no prompt") for value in ("0.5", "2.0")},
    }


def test_without_strengths_transfer_is_a_table_only(tmp_path: Path) -> None:
    zero_shot = {way: {"wow": (1.0, 0.0)} for way in ("prompt", "no prompt")}
    page = written(tmp_path, Comparison.of([trial("mean", zero_shot=zero_shot)], "mean"))
    assert page.line("Tasks held out of training", "mean")[:2] == ["50.0", "50.0"]
    assert not (tmp_path / "transfer.png").exists()


def test_costs_are_means_over_seeds_in_units_people_use(page: Page, folder: Path) -> None:
    expected = ["52.5 ± 3.5", "1", "6,400", "0.50", "1,234,567", "2.5", "2,228"]
    assert page.line("Cost of ownership", "mean") == expected
    assert page.line("Cost of ownership", "bm25") == ["20.0", *["–"] * 6]
    (record,) = [r for r in records(folder / "cost.csv") if r["row"] == "mean"]
    assert (float(record["training_seconds"]), float(record["index_bytes"])) == (1800.0, 2_500_000.0)


def test_long_tables_scroll_in_a_frame_and_short_ones_do_not(page: Page, tmp_path: Path) -> None:
    assert page.source.count('class="wide long"') == 1  # with the lines of arms, the table of all rows
    rows = [trial(f"r{n}", cost=None, tasks=("nq",)) for n in range(17)]
    assert written(tmp_path, Comparison.of(rows, "r0")).source.count('class="wide long"') == 2


def test_equal_seeds_and_no_spread_draw_without_a_warning(tmp_path: Path) -> None:
    level = dict.fromkeys(TASKS, (0.5, 0.5))
    trials = [trial("mean", scores=level)]
    trials += [trial(f"taco {value}", scores=level, values={STRENGTH: value}) for value in (0, 1)]
    written(tmp_path, Comparison.of(trials, "mean"))
    values = [float(r["value"]) for r in records(tmp_path / "strength.csv")]
    assert np.unique(values).tolist() == [0.5]
