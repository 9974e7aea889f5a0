"""Searchers over dev queries → an evaluation: table, KILT prediction files, TREC runs; and scores of existing files.

Path: prepared data, retriever, BM25 → [here] → report.  What the metrics mean stands in `metrics.py`. Only pages are
scored, no answers. Importing this loads neither torch nor ray nor pyarrow, so scoring files starts at once.
"""

from __future__ import annotations

import gzip
import json
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from taskspec import artifacts, store
from taskspec.config import Config
from taskspec.errors import ConfigError, DataError
from taskspec.evaluate.metrics import RPREC, average, query_metrics
from taskspec.sections import Evaluate

if TYPE_CHECKING:
    from taskspec.data.prepared import PreparedData
    from taskspec.retrieve.hits import Hit
    from taskspec.retrieve.retriever import Searcher

KIND = "evaluation"
TABLE_FILE = "table.json"
QUERIES_PER_SEARCH = 256
SYSTEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """What one system reaches on one task's dev queries."""

    task: str
    system: str
    queries: int
    metrics: Mapping[str, float]
    """The keys of `metrics.query_metrics` → mean over the queries, 0 to 1."""
    per_query_rprec: tuple[float, ...]
    """R-precision of each query, in the order of the task's files, so that systems can be compared query by query."""


@dataclass(frozen=True, slots=True)
class EvaluationTable:
    """Scores of several systems on several tasks; a system may lack a task. Order is that of first appearance."""

    rows: tuple[TaskScores, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.task for row in self.rows))

    @property
    def systems(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.system for row in self.rows))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that every row has."""
        names = dict.fromkeys(name for row in self.rows for name in row.metrics)
        return tuple(name for name in names if all(name in row.metrics for row in self.rows))

    def score(self, task: str, system: str, metric: str = RPREC) -> float | None:
        """One cell, 0 to 1; None where the system was not evaluated on the task."""
        for row in self.rows:
            if (row.task, row.system) == (task, system):
                return row.metrics[metric]
        return None

    def average(self, system: str, metric: str = RPREC) -> float | None:
        """The mean over tasks, each task counting once; None for a system that lacks a task, as its mean would not
        compare with the others'."""
        scores = [score for task in self.tasks if (score := self.score(task, system, metric)) is not None]
        return sum(scores) / len(scores) if len(scores) == len(self.tasks) else None

    def to_text(self, width: int = 120) -> str:
        """For a terminal, in percent: R-precision, and below it recall at the two largest k if that fits `width`."""
        recalls = [name for name in self.metrics if name.startswith("recall@")][-2:]
        blocks = [self._block("R-precision %", [RPREC])]
        if recalls:
            block = self._block(" / ".join(recalls) + " %", recalls)
            if max(map(len, block.splitlines())) <= width:
                blocks.append(block)
        return "\n\n".join(blocks)

    def _block(self, title: str, metrics: Sequence[str]) -> str:
        def cell(scores: Sequence[float | None]) -> str:
            return " / ".join("–" if score is None else f"{100 * score:.1f}" for score in scores)

        lines = [[title, *self.systems]]
        for task in self.tasks:
            lines.append([task, *(cell([self.score(task, system, m) for m in metrics]) for system in self.systems)])
        lines.append(["average", *(cell([self.average(system, m) for m in metrics]) for system in self.systems)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))])
            for name, *cells in lines
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads; the averages in it are for other readers."""
        averages = {system: {m: self.average(system, m) for m in self.metrics} for system in self.systems}
        return {"average": averages, "rows": [asdict(row) for row in self.rows]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> EvaluationTable:
        rows = [{**row, "per_query_rprec": tuple(row["per_query_rprec"])} for row in value["rows"]]
        return EvaluationTable(tuple(TaskScores(**row) for row in rows))

    @staticmethod
    def open(uri: str) -> EvaluationTable:
        """The table of an evaluation artifact. Raises: ArtifactError."""
        artifacts.read_manifest(uri, KIND)
        return EvaluationTable.from_json(json.loads(store.read_bytes(store.join(uri, TABLE_FILE))))


def evaluate(
    searcher: Searcher | Mapping[str, Searcher],
    prepared: PreparedData,
    tasks: Sequence[str],
    settings: Evaluate,
    *,
    system: str,
    folder: Path | None = None,
) -> list[TaskScores]:
    """Scores one system on the dev queries of each task.

    Args: searcher: answers all tasks; or a mapping task → searcher, where a system is one retriever per task: tasks
        that it lacks are left out. system: its name in tables and file names. folder: where to write
        `predictions/<system>/<task>.jsonl` and `runs/<system>/<task>.trec`; None writes nothing.
    Raises: ConfigError, DataError, and what the searcher raises.
    """
    if not SYSTEM_NAME.fullmatch(system):
        raise ConfigError(f"system {system!r}: the name goes into file names; use letters, digits, - _ and .")
    scores = []
    for task in tasks:
        one = searcher.get(task) if isinstance(searcher, Mapping) else searcher
        if one is not None:
            scores.append(_evaluate_task(one, prepared, task, settings, system, folder))
    return scores


def _evaluate_task(
    searcher: Searcher, prepared: PreparedData, task: str, settings: Evaluate, system: str, folder: Path | None
) -> TaskScores:
    rows = prepared.queries(task, "dev")
    if not len(rows):
        raise DataError(
            f"{prepared.artifact.uri}: has 0 dev queries of task {task!r}, there is nothing to evaluate; look into its "
            f"quarantine folder and prepare again with: python -m jobs.prepare"
        )
    per_query = []
    with ExitStack() as files:
        predictions = run = None
        if folder is not None:
            predictions = files.enter_context(_create(folder / "predictions" / system / f"{task}.jsonl"))
            run = files.enter_context(_create(folder / "runs" / system / f"{task}.trec"))
        for start in range(0, len(rows), QUERIES_PER_SEARCH):
            batch = range(start, min(start + QUERIES_PER_SEARCH, len(rows)))
            taken = rows.take(batch, ["query_id", "text", "gold_pages"])
            found = searcher.search(taken["text"], task, top_k=settings.top_k, level="page")
            for query_id, text, gold_pages, hits in zip(*taken.values(), found, strict=True):
                per_query.append(query_metrics([hit.wikipedia_id for hit in hits], gold_pages, settings.at))
                if predictions and run:
                    predictions.write(json.dumps(kilt_prediction(query_id, text, hits)) + "\n")
                    run.writelines(trec_lines(query_id, hits, system))
    return TaskScores(
        task=task,
        system=system,
        queries=len(per_query),
        metrics=average(per_query),
        per_query_rprec=tuple(query[RPREC] for query in per_query),
    )


def _create(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "w", encoding="utf-8")


def kilt_prediction(query_id: str, text: str, hits: Sequence[Hit]) -> dict[str, Any]:
    """One record of a KILT prediction file: the pages found, best first, and no answer."""
    provenance = [{"wikipedia_id": hit.wikipedia_id, "title": hit.title, "score": hit.score} for hit in hits]
    return {"id": query_id, "input": text, "output": [{"answer": "", "provenance": provenance}]}


def trec_lines(query_id: str, hits: Sequence[Hit], system: str) -> Iterator[str]:
    """One line per page of a TREC run: `query Q0 page rank score system`.

    Fields are split at white space, so white space and % in ids are percent-encoded. Readers sort by score and break
    ties by id: scores are float32, and each is at least the smallest step below the one before, so our order stays.
    """
    last = np.float32(np.inf)
    for hit in hits:
        last = min(np.float32(hit.score), np.nextafter(last, np.float32(-np.inf)))
        yield f"{_trec_id(query_id)} Q0 {_trec_id(hit.wikipedia_id)} {hit.rank} {last!s} {system}\n"


def _trec_id(text: str) -> str:
    return re.sub(r"[\s%]", lambda match: quote(match[0]), text)


def publish_evaluation(
    uri: str,
    systems: Mapping[str, Searcher | Mapping[str, Searcher]],
    prepared: PreparedData,
    config: Config,
    *,
    inputs: Mapping[str, str],
) -> EvaluationTable:
    """Evaluates every system on every task with dev queries, publishes it all at `uri`, prints one line per system.

    Args: systems: name → what `evaluate` takes, in the order of the columns. inputs: name → id of the artifacts that
        the systems came from; the prepared data is added here.
    Returns: the table, also in the artifact as `table.json`.
    Raises: DataError if no task has dev queries; what `evaluate` and the store raise.
    """
    tasks = prepared.tasks("dev")
    if not tasks:
        raise DataError(
            f"{prepared.artifact.uri}: has no dev queries of any task; name files under tasks.<name>.dev and prepare "
            f"again with: python -m jobs.prepare"
        )
    facts: dict[str, Any] = {}
    rows: list[TaskScores] = []
    all_inputs = {"prepared": prepared.id, **inputs}
    config_tree = config.model_dump(mode="json")
    with artifacts.publishing(uri, KIND, inputs=all_inputs, config=config_tree, facts=facts) as folder:
        for system, searcher in systems.items():
            started = time.perf_counter()
            scores = evaluate(searcher, prepared, tasks, config.evaluate, system=system, folder=folder)
            rows += scores
            queries = sum(row.queries for row in scores)
            seconds = time.perf_counter() - started
            print(f"evaluated {system}: {len(scores)} tasks, {queries:,} queries in {seconds:.1f} s", flush=True)
        table = EvaluationTable(tuple(rows))
        text = json.dumps(table.to_json(), indent=1)
        (folder / TABLE_FILE).write_text(text, encoding="utf-8")
        facts["average_rprec"] = {system: table.average(system) for system in table.systems}
    return table


@dataclass(frozen=True, slots=True)
class FileScores:
    """Scores of a KILT prediction file."""

    metrics: Mapping[str, float]
    queries: int
    """Gold records, all of which count in the means."""
    ignored: int
    """Guess records whose id no gold record has; they count nowhere, as in KILT."""


def score_files(gold: str, guess: str, at: Sequence[int]) -> FileScores:
    """Scores a KILT prediction file against a gold file, both .jsonl or .jsonl.gz, as kilt/eval_retrieval.py does.

    Records are matched by id, in any order; ids of records and pages are compared as text without surrounding white
    space. Guessed provenance without a `wikipedia_id` is passed over. Of the outputs of a guess the one with provenance
    counts; where none has, nothing is guessed.
    Raises: DataError with file and line: not JSON, a missing key, an id twice, several outputs with provenance; without
        line: gold ids that have no guess. StoreError if a file cannot be read.
    """
    evidence_sets = {
        query_id: [_pages(output, where, strict=True) for output in outputs]
        for query_id, where, outputs in _kilt_records(gold)
    }
    if not evidence_sets:
        raise DataError(f"{gold}: holds no records; give the gold file of the task")
    guessed = {query_id: _guessed_pages(outputs, where) for query_id, where, outputs in _kilt_records(guess)}
    missing = [query_id for query_id in evidence_sets if query_id not in guessed]
    if missing:
        first = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
        raise DataError(
            f"{guess}: {len(missing)} of the {len(evidence_sets)} ids in {gold} have no prediction: {first}; "
            f"write one record for each, with an empty provenance where nothing was found"
        )
    per_query = [query_metrics(guessed[query_id], sets, at) for query_id, sets in evidence_sets.items()]
    return FileScores(average(per_query), len(per_query), len(guessed.keys() - evidence_sets.keys()))


def _kilt_records(uri: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(id, "file line n", its outputs with provenance) of each record."""
    lines: dict[str, int] = {}
    for number, record in _json_lines(uri):
        where = f"{uri} line {number}"
        if "id" not in record:
            raise DataError(f"{where}: has no 'id'; every record needs one")
        query_id = str(record["id"]).strip()
        if query_id in lines:
            raise DataError(f"{where}: id {query_id!r} stands in line {lines[query_id]} already; each may stand once")
        lines[query_id] = number
        outputs = record.get("output")
        if not isinstance(outputs, list) or not outputs or not all(isinstance(output, dict) for output in outputs):
            raise DataError(f"{where}: 'output' must be a list of objects, at least one, but is {_short(outputs)}")
        yield query_id, where, [output for output in outputs if "provenance" in output]


def _guessed_pages(outputs: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    if len(outputs) > 1:
        raise DataError(f"{where}: {len(outputs)} outputs have provenance; a prediction has one, its pages best first")
    return _pages(outputs[0], where, strict=False) if outputs else []


def _pages(output: Mapping[str, Any], where: str, *, strict: bool) -> list[str]:
    """The page ids of an output's provenance. Args: strict: refuse items without one instead of passing over them."""
    provenance = output["provenance"]
    if not isinstance(provenance, list) or not all(isinstance(item, dict) for item in provenance):
        raise DataError(f"{where}: 'provenance' must be a list of objects but is {_short(provenance)}")
    if strict and any("wikipedia_id" not in item for item in provenance):
        raise DataError(f"{where}: provenance has no 'wikipedia_id'; gold pages are known by it")
    return [str(item["wikipedia_id"]).strip() for item in provenance if "wikipedia_id" in item]


def _json_lines(uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl or .jsonl.gz file; empty lines are passed over."""
    number = 0
    with ExitStack() as opened:
        stream = opened.enter_context(store.open_input(uri))
        try:
            lines = opened.enter_context(gzip.open(stream)) if uri.endswith(".gz") else stream
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(f"{uri} line {number}: must be a JSON object but is {_short(record)}")
                yield number, record
        except (ValueError, RecursionError) as error:
            raise DataError(f"{uri} line {number}: is not JSON ({error})") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{uri} line {number + 1}: is damaged gzip ({error})") from error


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
