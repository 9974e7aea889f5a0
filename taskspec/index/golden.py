"""Golden queries: some dev queries of each task with their gold pages, kept in the index, to try it where it serves.

Path: prepared data → [here] → index → a new version's trial on the serving path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from taskspec.data.prepared import PreparedData
from taskspec.errors import ArtifactError
from taskspec.sections import Section

GOLDEN_FILE = "golden.jsonl"
GOLDEN_QUERIES = 50
"""Of a task, at most."""


class GoldenQuery(Section):
    """One query and what it should find."""

    task: str
    query: str
    gold_pages: tuple[tuple[str, ...], ...]
    """Its evidence sets of wikipedia ids."""


def write_golden(path: Path, prepared: PreparedData, tasks: Iterable[str]) -> None:
    """Takes queries from all over the dev files of these tasks; a task may have none."""
    lines = []
    for task in (task for task in tasks if task in prepared.tasks("dev")):
        queries = prepared.queries(task, "dev")
        rows = np.linspace(0, len(queries) - 1, min(GOLDEN_QUERIES, len(queries))).astype(np.int64)
        taken = queries.take(rows, ["text", "gold_pages"])
        for text, pages in zip(taken["text"], taken["gold_pages"], strict=True):
            lines.append(GoldenQuery(task=task, query=text, gold_pages=pages).model_dump_json() + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def read_golden(path: Path) -> list[GoldenQuery]:
    """Raises: ArtifactError naming the line that is none."""
    found = []
    with path.open(encoding="utf-8") as lines:  # which end at \n: splitlines ends them at U+2028 in a query, too
        for number, line in enumerate(lines, start=1):
            try:
                found.append(GoldenQuery.model_validate(json.loads(line)))
            except ValueError as error:
                raise ArtifactError(f"{path} line {number}: is no golden query; build the index again") from error
    return found
