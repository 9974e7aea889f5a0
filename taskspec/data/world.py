"""The generated mini-KILT: a small made-up encyclopedia and 8 tasks over it, in KILT's exact file formats.

Path: world_text → world_relations → world_pages → world_tasks → [here] → the files that prepare reads.
Everything follows from the seed. Pages and records are made one at a time, so any size runs in the same memory.

Every task walks over its slots (entity × choice of relation and wording) in shuffled order. A slot whose gold pages
include a held-out page may only be an unseen dev query; of the others the first become seen dev queries, then train.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import quote

from taskspec.data.world_pages import Encyclopedia, Entity, Shuffle
from taskspec.data.world_tasks import TASKS, Evidence, Record, TaskPlan
from taskspec.errors import ConfigError

FEWEST_PAGES = 200
"""Fewer do not hold enough distinct queries for the smallest dev sets."""
DEV_PER_PAGE, FEWEST_DEV, MOST_DEV = 0.053, 16, 2000
"""Dev queries of each task, whatever its train size, unless another number is asked for."""


class World(NamedTuple):
    """Where the files of a world are."""

    knowledge_source: Path
    tasks: dict[str, tuple[Path, Path]]
    """Task → train and dev file."""


def write_world(folder: Path, *, pages: int, seed: int, dev_queries: int | None = None) -> World:
    """Writes a world's knowledge source and its tasks' train and dev files.

    Args: pages: from 200 to millions; tasks have 0.05 to 1.6 train queries per page, 4 together. dev_queries: of each
        task; by default 1 per 19 pages, at least 16 and at most 2,000.
    Raises: ConfigError for too few pages, or fewer than the asked number of dev queries need.
    """
    if pages < FEWEST_PAGES:
        raise ConfigError(f"pages: a generated world has at least {FEWEST_PAGES} pages but got {pages}; ask for more")
    folder.mkdir(parents=True, exist_ok=True)
    encyclopedia = Encyclopedia(pages, seed)
    world = World(
        folder / "knowledge_source.jsonl",
        {name: (folder / f"{name}-train-kilt.jsonl", folder / f"{name}-dev-kilt.jsonl") for name in TASKS},
    )
    with world.knowledge_source.open("w", encoding="utf-8") as file:
        for row in range(pages):
            _write_line(file, _page_line(encyclopedia, encyclopedia.entity(row)))
    if dev_queries is None:
        dev_queries = min(max(FEWEST_DEV, round(pages * DEV_PER_PAGE)), MOST_DEV)
    for name, plan in TASKS.items():
        _write_task(encyclopedia, name, plan, seed, dev_queries, *world.tasks[name])
    return world


def _write_task(
    encyclopedia: Encyclopedia, name: str, plan: TaskPlan, seed: int, dev_queries: int, train: Path, dev: Path
) -> None:
    rng = random.Random(f"taskspec world {seed} {name}")
    unseen, seen = dev_queries // 2, dev_queries - dev_queries // 2
    rest = round(encyclopedia.pages * plan.train_per_page)
    slots = Shuffle(encyclopedia.pages * plan.choices, rng)
    with train.open("w", encoding="utf-8") as train_file, dev.open("w", encoding="utf-8") as dev_file:
        for position in range(slots.size):
            slot = slots(position)
            row, choice = divmod(slot, plan.choices)
            record = plan.make(encyclopedia, encyclopedia.entity(row), choice, rng)
            if record is None:
                continue
            if any(encyclopedia.held_out(page) for page in record.gold_pages()):
                if unseen:
                    unseen -= 1
                    _write_line(dev_file, _record_line(encyclopedia, f"{name}-{slot}", record))
            elif seen:
                seen -= 1
                _write_line(dev_file, _record_line(encyclopedia, f"{name}-{slot}", record))
            elif rest:
                rest -= 1
                _write_line(train_file, _record_line(encyclopedia, f"{name}-{slot}", record))
            if not (unseen or seen or rest):
                return
    if unseen or seen:
        raise ConfigError(
            f"dev_queries: {encyclopedia.pages} pages have {dev_queries - unseen - seen} dev queries of {name} but "
            f"{dev_queries} were asked for; ask for fewer, or for more pages"
        )


def _write_line(file: TextIO, value: dict[str, Any]) -> None:
    file.write(f"{json.dumps(value, ensure_ascii=False)}\n")


def _page_line(encyclopedia: Encyclopedia, entity: Entity) -> dict[str, Any]:
    """A page in the format of KILT's knowledge source."""
    page = encyclopedia.page(entity)
    anchors = []
    for other, span in page.mentions:
        title = encyclopedia.title(other)
        start = page.paragraphs[span.paragraph].index(title, span.start)
        anchors.append(
            {
                "paragraph_id": span.paragraph,
                "start": start,
                "end": start + len(title),
                "text": title,
                "href": quote(title),
                "wikipedia_title": title,
                "wikipedia_id": encyclopedia.wikipedia_id(other),
            }
        )
    number = encyclopedia.wikipedia_id(entity)
    return {
        "_id": number,
        "wikipedia_id": number,
        "wikipedia_title": encyclopedia.title(entity),
        "text": page.paragraphs,
        "anchors": anchors,
        "categories": entity.kind,
    }


def _record_line(encyclopedia: Encyclopedia, id: str, record: Record) -> dict[str, Any]:
    """A query in the format of KILT's task files."""
    outputs: list[dict[str, Any]] = []
    for output in record.outputs:
        line: dict[str, Any] = {"answer": output.answer}
        if output.evidence:
            line["provenance"] = [_provenance(encyclopedia, evidence) for evidence in output.evidence]
        outputs.append(line)
    return {"id": id, "input": record.input, "output": outputs, "meta": {}}


def _provenance(encyclopedia: Encyclopedia, evidence: Evidence) -> dict[str, Any]:
    head = {
        "wikipedia_id": encyclopedia.wikipedia_id(evidence.page),
        "title": encyclopedia.title(evidence.page),
    }
    if evidence.fact is None:
        return head
    page = encyclopedia.page(evidence.page)
    span = page.evidence[evidence.fact.key]
    return head | {
        "section": page.sections[span.paragraph],
        "start_paragraph_id": span.paragraph,
        "start_character": span.start,
        "end_paragraph_id": span.paragraph,
        "end_character": span.end,
        "bleu_score": 1.0,
        "meta": {},
    }
