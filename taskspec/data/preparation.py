"""The passes from KILT files to the tables of prepared data.

Path: kilt, passages, reading → [here] → prepare, check.  Four passes, the driver being the single consumer, so that
rows are in the order of the files: (1) task files, for their gold pages; (2) the pages to keep, where the configuration
limits them; (3) the knowledge source, cut into passages; (4) the queries, now that the rows of their gold pages are
known. Nothing is published here.

In memory: a few chunks of files, the ids of all pages (about 0.7 GB for KILT's 5.9 million) and of one task's queries,
and the paragraph spans of gold pages. Parsed queries wait in a scratch folder.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from taskspec.config import Config
from taskspec.data.kilt import Provenance
from taskspec.data.passages import gold_passages
from taskspec.data.prepared import PAGE_SCHEMA, PASSAGE_SCHEMA, QUERY_SCHEMA, Split
from taskspec.data.quarantine import FileCount, Quarantine
from taskspec.data.reading import InputFiles, read_pages, read_queries

PROGRESS_S = 30.0


@dataclass(frozen=True)
class PrepareSummary:
    """What prepared data holds, and what did not get into it."""

    pages: int
    passages: int
    gold_pages: int
    queries: dict[str, dict[str, int]]
    """Task → split → queries."""
    evidence: dict[str, dict[str, int]]
    """Task → split → evidence sets of the well-formed records."""
    evidence_dropped: dict[str, dict[str, int]]
    """Task → split → those of them with a page that is not in the knowledge source; they are left out."""
    files: list[FileCount]
    """A file that is used several times stands here as often."""

    def to_facts(self) -> dict[str, Any]:
        """As JSON, for the manifest: files by name alone, so that it does not depend on where they lie."""
        files = [count._asdict() | {"file": count.file.rpartition("/")[2]} for count in self.files]
        return asdict(self) | {"files": files}

    @staticmethod
    def of(facts: Mapping[str, Any]) -> PrepareSummary | None:
        """From a manifest; None if another version wrote it."""
        try:
            return PrepareSummary(**{**facts, "files": [FileCount(**count) for count in facts["files"]]})
        except (KeyError, TypeError):
            return None

    def to_text(self) -> str:
        """For the console: a line per task and, where records were bad, per kind of damage."""
        lines = [f"{self.pages:,} pages ({self.gold_pages:,} gold) in {self.passages:,} passages"]
        for task, splits in self.queries.items():
            dropped = sum(self.evidence_dropped[task].values())
            counts = ", ".join(f"{count:,} {split}" for split, count in splits.items())
            lines.append(f"  {task}: {counts}" + (f"; {dropped:,} evidence sets without their page" if dropped else ""))
        for count in self.files:
            of = f"of {count.records:,} records of {count.file}"
            if count.without_provenance:
                lines.append(f"  left out: {count.without_provenance:,} {of} have no provenance")
            if count.bad:
                kinds = ", ".join(f"{number:,} {kind}" for kind, number in count.kinds.items())
                lines.append(f"  quarantine: {count.bad:,} {of}: {kinds}")
        return "\n".join(lines)


class GoldPage(NamedTuple):
    """Where a gold page's passages are."""

    page_row: int
    first_row: int
    """Row of its first passage."""
    spans_N2: np.ndarray
    """int32: first and last paragraph of each passage."""


class Preparation:
    """The passes over the files, in the order of the methods; shared by those who write and those who only look."""

    def __init__(self, config: Config, files: InputFiles, scratch: Path, quarantine: Path) -> None:
        """Args: scratch: an empty folder; holds the parsed queries. quarantine: folder of the bad records."""
        self._config = config
        self._files = files
        self._scratch = scratch
        stems: Counter[str] = Counter()

        def new_quarantine(uri: str, use: str) -> Quarantine:
            stem = uri.rpartition("/")[2].removesuffix(".gz").removesuffix(".jsonl")
            stems[stem] += 1
            number = f"-{stems[stem]}" if stems[stem] > 1 else ""
            return Quarantine(uri, use, quarantine / f"{stem}{number}.jsonl")

        self.task_quarantines = [new_quarantine(file.uri, f"{file.task}/{file.split}") for file in files.task_files]
        self.source_quarantines = [new_quarantine(uri, "knowledge_source") for uri in files.knowledge_source]
        self._gold_ids: set[str] = set()
        self._queries: Counter[tuple[str, Split]] = Counter()
        self._evidence: Counter[tuple[str, Split]] = Counter()
        self._evidence_dropped: Counter[tuple[str, Split]] = Counter()
        self._kept: set[str] | None = None
        self._gold: dict[str, GoldPage] = {}
        self._pages = self._passages = 0

    def read_task_files(self) -> None:
        """First pass: parses the task files and remembers which pages are gold."""
        uris = [file.uri for file in self._files.task_files]
        seen: set[str] = set()
        seen_in = None
        for chunk, table in enumerate(read_queries(uris)):
            file = table["file"][0].as_py()
            task, split, _ = self._files.task_files[file]
            if seen_in != (task, split):
                seen, seen_in = set(), (task, split)
            quarantine, good = self.task_quarantines[file], []
            for line, reason, query_id, record, evidence in _rows(
                table, "line", "reason", "query_id", "record", "evidence"
            ):
                if reason is None and query_id in seen:
                    reason = f"'id' is a duplicate ({query_id!r})"
                good.append(reason is None and bool(evidence))
                if reason is None:
                    seen.add(query_id)
                    quarantine.without_provenance += not evidence
                else:
                    quarantine.add(line, reason, record)
            quarantine.records += table.num_rows
            table = table.filter(pa.array(good, pa.bool_()))
            places = pc.list_flatten(pc.list_flatten(table["evidence"]))
            self._gold_ids.update(pc.unique(pc.struct_field(places, "wikipedia_id")).to_pylist())
            pq.write_table(table, self._scratch / f"{file:04d}-{chunk:08d}.parquet", compression="zstd")

    def choose_pages(self) -> None:
        """Second pass: the pages to keep, where their number is limited: the gold ones and a fixed choice of others.

        A page's chance depends on its id alone, so the choice is the same wherever the page stands, and for every seed
        of a run.
        """
        limit = self._config.data.other_pages
        if limit is None:
            return
        others = (
            # The prefix chooses as seed 0 did when the seed of a run decided.
            (hashlib.sha256(f"0:{wikipedia_id}".encode()).digest(), wikipedia_id)
            for table in self._good_pages(count=False)
            for wikipedia_id in table["wikipedia_id"].to_pylist()
            if wikipedia_id not in self._gold_ids
        )
        self._kept = self._gold_ids | {wikipedia_id for _, wikipedia_id in heapq.nsmallest(limit, others)}

    def pages(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Third pass: tables of pages (`PAGE_SCHEMA`) and of their passages (`PASSAGE_SCHEMA`), some thousand pages at
        a time."""
        for records in self._good_pages(count=True):
            if self._kept is not None:
                ids = records["wikipedia_id"].to_pylist()
                records = records.filter(pa.array([wikipedia_id in self._kept for wikipedia_id in ids], pa.bool_()))
            pages, passages = _page_tables(records, self._pages, self._passages)
            self._remember_gold(pages, passages)
            self._pages += pages.num_rows
            self._passages += passages.num_rows
            yield pages, passages

    def _remember_gold(self, pages: pa.Table, passages: pa.Table) -> None:
        page_row_N = passages["page_row"].to_numpy()
        spans_N2 = np.stack([passages["start_paragraph"].to_numpy(), passages["end_paragraph"].to_numpy()], axis=1)
        for page_row, wikipedia_id in _rows(pages, "page_row", "wikipedia_id"):
            if wikipedia_id in self._gold_ids:
                start, end = np.searchsorted(page_row_N, [page_row, page_row + 1])
                self._gold[wikipedia_id] = GoldPage(page_row, self._passages + int(start), spans_N2[start:end].copy())

    def queries(self, task: str, split: Split) -> Iterator[pa.Table]:
        """Fourth pass: tables of a task's queries, `QUERY_SCHEMA`."""
        key = (task, split)
        for number, file in enumerate(self._files.task_files):
            if (file.task, file.split) != key:
                continue
            for path in sorted(self._scratch.glob(f"{number:04d}-*.parquet")):
                rows = []
                for line, record, query_id, text, evidence in _rows(
                    pq.read_table(path), "line", "record", "query_id", "text", "evidence"
                ):
                    gold = self._gold_columns([[Provenance(**place) for place in places] for places in evidence])
                    self._evidence[key] += len(evidence)
                    self._evidence_dropped[key] += len(evidence) - len(gold["gold_pages"])
                    if gold["gold_pages"]:
                        rows.append({"query_id": query_id, "text": text} | gold)
                    else:
                        ids = (place["wikipedia_id"] for places in evidence for place in places)
                        missing = ", ".join(dict.fromkeys(one for one in ids if one not in self._gold))
                        reason = f"gold page is not in the knowledge source ({missing})"
                        self.task_quarantines[number].add(line, reason, record)
                self._queries[key] += len(rows)
                yield pa.Table.from_pylist(rows, QUERY_SCHEMA)

    def _gold_columns(self, evidence: Sequence[Sequence[Provenance]]) -> dict[str, list[Any]]:
        """gold_pages, positives and gold_page_rows of a query.

        An evidence set with a page that is not in the knowledge source is left out, but its other pages stay gold, so
        that they are nobody's negatives.
        """
        sets = []
        positives: set[int] = set()
        page_rows: set[int] = set()
        for places in evidence:
            pages = [self._gold.get(place.wikipedia_id) for place in places]
            page_rows.update(page.page_row for page in pages if page)
            if None in pages:
                continue
            sets.append(list(dict.fromkeys(place.wikipedia_id for place in places)))
            for page, place in zip(pages, places, strict=True):
                assert page is not None
                positives.update(page.first_row + number for number in gold_passages(page.spans_N2, place))
        return {"gold_pages": sets, "positives": sorted(positives), "gold_page_rows": sorted(page_rows)}

    def summary(self) -> PrepareSummary:
        """Counts, after the last pass."""
        quarantines = [*self.source_quarantines, *self.task_quarantines]
        return PrepareSummary(
            pages=self._pages,
            passages=self._passages,
            gold_pages=len(self._gold),
            queries=self._by_task(self._queries),
            evidence=self._by_task(self._evidence),
            evidence_dropped=self._by_task(self._evidence_dropped),
            files=[quarantine.count for quarantine in quarantines],
        )

    def _by_task(self, counts: Counter[tuple[str, Split]]) -> dict[str, dict[str, int]]:
        result: dict[str, dict[str, int]] = {}
        for task, split in self._files.splits:
            result.setdefault(task, {})[split] = counts[task, split]
        return result

    def _good_pages(self, *, count: bool) -> Iterator[pa.Table]:
        """The knowledge source without its bad pages, which are counted and kept if `count`."""
        seen: set[str] = set()
        last_line, lines = time.monotonic(), 0
        for table in read_pages(self._files.knowledge_source, self._config.data.passage_words):
            quarantine = self.source_quarantines[table["file"][0].as_py()]
            good = []
            for line, reason, record, *page in _rows(table, "line", "reason", "record", "wikipedia_id", "title"):
                if reason is None and page[0] in seen:
                    reason = f"'wikipedia_id' is a duplicate ({page[0]!r})"
                    record = json.dumps(dict(zip(("wikipedia_id", "wikipedia_title"), page, strict=True)))
                good.append(reason is None)
                if reason is None:
                    seen.add(page[0])
                elif count:
                    quarantine.add(line, reason, record)
            if count:
                quarantine.records += table.num_rows
            yield table.filter(pa.array(good, pa.bool_()))
            lines += table.num_rows
            if time.monotonic() - last_line > PROGRESS_S:
                print(f"prepare: {lines:,} pages read", flush=True)
                last_line = time.monotonic()


def _rows(table: pa.Table, *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _page_tables(records: pa.Table, first_page: int, first_passage: int) -> tuple[pa.Table, pa.Table]:
    """Pages and passages of `PAGE_RECORDS`, numbered from those rows on."""
    records = records.combine_chunks()
    page_row = np.arange(records.num_rows) + first_page
    count = pc.list_value_length(records["texts"]).to_numpy()
    owner = np.repeat(np.arange(records.num_rows), count)
    number = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
    ids = records["wikipedia_id"].take(pa.array(owner))
    columns = {
        "row_id": np.arange(len(owner)) + first_passage,
        "passage_id": pc.binary_join_element_wise(ids, pa.array(number).cast(pa.string()), ":"),
        "page_row": page_row[owner],
        "wikipedia_id": ids,
        "title": records["title"].take(pa.array(owner)),
        "text": pc.list_flatten(records["texts"]),
        "start_paragraph": pc.list_flatten(records["start_paragraphs"]),
        "end_paragraph": pc.list_flatten(records["end_paragraphs"]),
    }
    pages = pa.table([page_row, records["wikipedia_id"], records["title"]], schema=PAGE_SCHEMA)
    return pages, pa.table([columns[name] for name in PASSAGE_SCHEMA.names], schema=PASSAGE_SCHEMA)
