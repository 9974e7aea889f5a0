"""BM25: its scores, its pages, the negatives it mines, and how hard it finds the generated world."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import mine
from taskspec import artifacts
from taskspec.config import Config
from taskspec.data.batches import GivenNegatives
from taskspec.data.kilt import parse_page_line, parse_query_line
from taskspec.data.passages import cut_page
from taskspec.data.prepared import KIND, PASSAGE_SCHEMA, QUERY_SCHEMA, PreparedData
from taskspec.data.world import World, write_world
from taskspec.errors import RequestError
from taskspec.evaluate.metrics import r_precision
from taskspec.index.lexical import Lexical
from taskspec.negatives.bm25 import BM25, mine_bm25

# Page → its passages; what is said of doors is said here.
PAGES = {
    "1": ("Doors", ["a red door and a blue door", "painted by hand"]),
    "2": ("Windows", ["a red window", "a window beside a door"]),
    "3": ("Gardens", ["roses and tulips", "a gate of iron"]),
    "4": ("Gates", ["roses and tulips", "the garden gate was painted"]),
}


def publish(uri: Path, passages: list[dict[str, Any]], queries: Mapping[str, list[dict[str, Any]]]) -> PreparedData:
    """Prepared data of these rows; all queries are train queries."""
    facts = {"queries": {task: {"train": len(rows)} for task, rows in queries.items()}}
    with artifacts.publishing(str(uri), KIND, inputs={}, config={}, facts=facts) as folder:
        (folder / "passages").mkdir()
        pq.write_table(pa.Table.from_pylist(passages, schema=PASSAGE_SCHEMA), folder / "passages" / "0.parquet")
        for task, rows in queries.items():
            (folder / "queries" / task / "train").mkdir(parents=True)
            table = pa.Table.from_pylist(rows, schema=QUERY_SCHEMA)
            pq.write_table(table, folder / "queries" / task / "train" / "0.parquet")
    return PreparedData.open(str(uri))


def passage_rows(pages: Mapping[str, tuple[str, list[str]]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for page_row, (wikipedia_id, (title, texts)) in enumerate(pages.items()):
        for number, text in enumerate(texts):
            rows.append(
                {
                    "row_id": len(rows),
                    "passage_id": f"{wikipedia_id}:{number}",
                    "page_row": page_row,
                    "wikipedia_id": wikipedia_id,
                    "title": title,
                    "text": text,
                    "start_paragraph": number + 1,
                    "end_paragraph": number + 1,
                }
            )
    return rows


def query_row(number: int, text: str, gold: list[str]) -> dict[str, Any]:
    page_rows = sorted(list(PAGES).index(page) for page in gold)
    return {
        "query_id": f"q{number}",
        "text": text,
        "gold_pages": [gold],
        "positives": [2 * row for row in page_rows],
        "gold_page_rows": page_rows,
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    queries = {
        "nq": [
            query_row(0, "who painted the doors", ["1"]),
            query_row(1, "red windows and red doors", ["1", "2"]),
            query_row(2, "zebra", ["3"]),
        ],
        "fever": [query_row(0, "The gate was painted.", ["4"])],
    }
    return publish(tmp_path_factory.mktemp("prepared") / "prepared", passage_rows(PAGES), queries)


@pytest.fixture(scope="module")
def bm25(prepared: PreparedData) -> BM25:
    return BM25.build(prepared)


def config(**sections: Any) -> Config:
    return Config(name="test", artifacts="unused", tasks=({"name": "nq"}, {"name": "fever"}), **sections)


def test_scores_are_those_of_the_formula_with_title_stems_and_stop_words(bm25: BM25) -> None:
    # Words of the passages, title included and stop words left out, worked by hand.
    lengths = [5, 3, 3, 4, 3, 3, 3, 4]
    idf = math.log(1 + (8 - 3 + 0.5) / (3 + 0.5))  # "door" is in rows 0, 1 (by the title) and 3
    (hits,) = bm25.search(["the doors"], "nq", level="passage")
    for hit, row, count in zip(hits, (0, 1, 3), (3, 1, 1), strict=True):
        saturation = count / (count + 0.9 * (1 - 0.4 + 0.4 * lengths[row] / (sum(lengths) / 8)))
        assert hit.score == pytest.approx(idf * saturation, rel=1e-5)


def test_hits_carry_what_a_reader_needs(bm25: BM25) -> None:
    (hits,) = bm25.search(["blue door"], "nq", top_k=1, level="passage", with_text=True)
    assert [(h.rank, h.id, h.wikipedia_id, h.title, h.text) for h in hits] == [
        (1, "1:0", "1", "Doors", "a red door and a blue door")
    ]
    assert bm25.search(["blue door"], "nq", top_k=1)[0][0].text is None


def test_a_page_is_as_good_as_its_best_passage(bm25: BM25) -> None:
    (passages,) = bm25.search(["painted doors"], "nq", level="passage")
    (pages,) = bm25.search(["painted doors"], "nq", level="page")
    best: dict[str, float] = {}
    for hit in passages:
        best.setdefault(hit.wikipedia_id, hit.score)
    assert [hit.wikipedia_id for hit in passages].count("1") == 2
    assert {hit.id: hit.score for hit in pages} == best
    assert [hit.rank for hit in pages] == list(range(1, len(pages) + 1))


def test_pages_are_searched_wider_until_enough_have_come(tmp_path: Path) -> None:
    many = {"1": ("One", ["stone"] * 20), "2": ("Two", ["stone and sand"]), "3": ("Three", ["stone sand and sea"])}
    bm25 = BM25.build(publish(tmp_path / "prepared", passage_rows(many), {}))
    assert [hit.id for hit in bm25.search(["stone"], "nq", top_k=2)[0]] == ["1", "2"]
    assert [hit.id for hit in bm25.search(["stone"], "nq", top_k=3)[0]] == ["1", "2", "3"]


def test_equal_scores_stand_by_passage_row_wherever_the_list_is_cut(tmp_path: Path) -> None:
    pages = {str(number): ("Same", ["the same text"]) for number in range(30)}
    bm25 = BM25.build(publish(tmp_path / "prepared", passage_rows(pages), {}))
    for top_k in (1, 7, 29, 30, 40):
        (hits,) = bm25.search(["text"], "nq", top_k=top_k, level="passage")
        assert [hit.id for hit in hits] == [f"{number}:0" for number in range(min(top_k, 30))]


def test_passages_that_share_no_word_are_no_hits(bm25: BM25) -> None:
    assert bm25.search(["zebra", "the and of", "tulips"], "nq") == [[], [], bm25.search(["tulips"], "nq")[0]]
    assert len(bm25.search(["tulips"], "nq")[0]) == 2


def test_the_task_makes_no_difference(bm25: BM25) -> None:
    assert bm25.search(["red door"], "nq") == bm25.search(["red door"], "anything")


def test_more_queries_than_one_chunk_are_answered_in_order(bm25: BM25, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["red door", "tulips", "zebra", "iron gate", "window"]
    whole = bm25.search(texts, "nq")
    monkeypatch.setattr("taskspec.index.lexical.CHUNK", 2)
    assert bm25.search(texts, "nq") == whole


def test_an_index_built_in_chunks_is_the_same(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BM25.build(prepared).search(["red door"], "nq")
    monkeypatch.setattr("taskspec.index.lexical.CHUNK", 3)
    assert BM25.build(prepared).search(["red door"], "nq") == whole


def test_words_of_queries_are_not_kept(prepared: PreparedData, tmp_path: Path) -> None:
    """An endpoint that kept every new word would grow for ever."""
    built = Lexical.build(prepared.passages)
    built.save(tmp_path / "lexical")
    opened = Lexical.open(tmp_path / "lexical")
    tokenizer = opened._tokenizer
    held = [dict(of) for of in (tokenizer.word_to_stem, tokenizer.stem_to_sid, tokenizer.word_to_id)]
    known = prepared.passages.take([0], ["text"])["text"][0]
    texts = ["quixotically unheard", known, f"{known.split()[-1]}s and {known.split()[-1]}ing"]
    found = opened.words(texts)
    assert found == opened.words(texts) == built.words(texts)
    assert any(found), "some words are of the passages"
    assert held == [tokenizer.word_to_stem, tokenizer.stem_to_sid, tokenizer.word_to_id]


def test_requests_that_break_a_rule_are_refused(bm25: BM25) -> None:
    with pytest.raises(RequestError, match="top_k must be at least 1 but is 0"):
        bm25.search(["red"], "nq", top_k=0)
    with pytest.raises(RequestError, match="query 1 of 2"):
        bm25.search(["red", " "], "nq")


@pytest.fixture
def mined(prepared: PreparedData, tmp_path: Path) -> Callable[..., tuple[artifacts.Artifact, dict[str, Any]]]:
    def run(**negatives: int) -> tuple[artifacts.Artifact, dict[str, Any]]:
        counts = mine_bm25(prepared, config(negatives=negatives), str(tmp_path / "negatives"))
        return artifacts.open_artifact(str(tmp_path / "negatives"), "negatives", verify=True), counts

    return run


def test_negatives_are_the_best_hits_of_no_gold_page(
    mined: Callable[..., Any], prepared: PreparedData, bm25: BM25
) -> None:
    artifact, _ = mined(depth=50, per_query=3)
    for task in ("nq", "fever"):
        queries = prepared.queries(task, "train")
        taken = queries.take(range(len(queries)), ["query_id", "text", "gold_pages"])
        rows = pq.read_table(artifact.folder / f"{task}.parquet").to_pylist()
        assert [row["query_row"] for row in rows] == list(range(len(queries)))
        assert [row["query_id"] for row in rows] == taken["query_id"]
        for row, text, gold in zip(rows, taken["text"], taken["gold_pages"], strict=True):
            hits = [h for h in bm25.search([text], task, level="passage")[0] if h.wikipedia_id not in gold[0]][:3]
            assert row["passage_ids"] == [hit.id for hit in hits]
            assert row["scores"] == pytest.approx([hit.score for hit in hits])
            assert prepared.passages.take(row["passage_rows"], ["passage_id"])["passage_id"] == row["passage_ids"]
            assert row["rule"] == "bm25"


def test_what_is_kept_dropped_and_missing_is_counted(mined: Callable[..., Any]) -> None:
    artifact, counts = mined(depth=50, per_query=2)
    # nq: 2 of {Gates, Windows} after 2 passages of Doors; nothing after all 4 of both gold pages; no hit at all.
    assert asdict(counts["nq"]) == {"queries": 3, "kept": 2, "dropped": 2 + 4, "short": 2}
    assert asdict(counts["fever"]) == {"queries": 1, "kept": 2, "dropped": 2, "short": 0}
    facts = artifact.manifest.facts
    assert facts["tasks"] == {task: asdict(count) for task, count in counts.items()}
    assert (facts["rule"], facts["depth"]) == ("bm25", 50)


def test_negatives_of_the_same_settings_are_left_as_they_are(
    mined: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first, counts = mined(depth=50, per_query=2)
    again, same = mined(depth=50, per_query=2)
    assert "negatives: stands already for the same inputs" in capsys.readouterr().out
    assert (again.manifest, same) == (first.manifest, counts)
    other, _ = mined(depth=50, per_query=1)
    assert other.id != first.id


def test_depth_bounds_where_negatives_come_from(mined: Callable[..., Any]) -> None:
    _, counts = mined(depth=2, per_query=2)
    assert asdict(counts["nq"]) == {"queries": 3, "kept": 0, "dropped": 4, "short": 3}


def test_training_reads_the_negatives_and_only_with_their_prepared_data(
    mined: Callable[..., Any], prepared: PreparedData
) -> None:
    artifact, _ = mined(depth=50, per_query=2)
    assert artifact.manifest.inputs == {"prepared": prepared.id}
    negatives = GivenNegatives(artifact.uri, prepared, ("nq", "fever"))
    assert len(negatives.of("nq", 0)) == 2
    assert len(negatives.of("nq", 2)) == 0


def test_the_job_mines_by_uris_and_prints_counts(
    prepared: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps({"name": "test", "artifacts": str(tmp_path), "tasks": [{"name": "nq"}, {"name": "fever"}]})
    (tmp_path / "test.yaml").write_text(text, encoding="utf-8")
    arguments = ["--config", str(tmp_path / "test.yaml"), "--prepared", prepared.artifact.uri]
    answer = mine.run([*arguments, "--set", "negatives.per_query=2"])
    assert answer["uri"] == str(tmp_path / "negatives")
    assert answer["tasks"]["nq"] == {"queries": 3, "kept": 2, "dropped": 6, "short": 2}
    assert "nq: 2 negatives of 3 queries kept, 6 hits on gold pages dropped, 2 queries with fewer than 2" in (
        capsys.readouterr().out
    )


def prepare_world(world: World, uri: Path) -> PreparedData:
    """A world's passages, cut as prepare cuts them."""
    pages = [parse_page_line(line) for line in world.knowledge_source.read_bytes().splitlines()]
    texts = {p.wikipedia_id: (p.title, [passage.text for passage in cut_page(p.paragraphs, 100)]) for p in pages}
    return publish(uri, passage_rows(texts), {})


def test_bm25_finds_the_generated_world_neither_easy_nor_hopeless(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world", pages=1500, seed=0)
    bm25 = BM25.build(prepare_world(world, tmp_path / "prepared"))
    scores = {}
    for task, (_, dev) in world.tasks.items():
        queries = [parse_query_line(line) for line in dev.read_bytes().splitlines()]
        found = bm25.search([query.text for query in queries], task, top_k=2)
        scores[task] = np.mean(
            [
                r_precision([hit.id for hit in hits], [[p.wikipedia_id for p in proof] for proof in query.evidence])
                for hits, query in zip(found, queries, strict=True)
            ]
        )
    assert 0.15 <= np.mean(list(scores.values())) <= 0.85
    assert all(0.05 < score < 0.95 for score in scores.values()), scores
