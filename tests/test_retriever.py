"""The retriever over a real text store and real shards, with an encoder of one-hot words."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec import artifacts
from taskspec.data.rows import RowStore
from taskspec.errors import ArtifactError, ContractError, RequestError
from taskspec.index.lexical import Lexical
from taskspec.index.manifest import IndexManifest, ShardFile
from taskspec.index.page_ids import PageIds
from taskspec.index.recall import MeasuredRecall, Recall
from taskspec.index.shard import make_shard
from taskspec.model.contract import Contract, ContractTask
from taskspec.negatives.bm25 import BM25
from taskspec.retrieve.catalog import Catalog, LocalShards
from taskspec.retrieve.fusion import fuse
from taskspec.retrieve.hits import Hit, Level
from taskspec.retrieve.pages import Ranking
from taskspec.retrieve.retriever import Retriever
from taskspec.sections import Prompts

WORDS = ("moon", "ice", "ring", "dust")
PASSAGES = (  # passage id, page row, title, text
    ("10:0", 0, "Europa", "moon ice"),
    ("10:1", 0, "Europa", "ice"),
    ("20:0", 1, "Saturn", "ring ice dust"),
    ("30:0", 2, "Phobos", "moon dust"),
    ("30:1", 2, "Phobos", "dust"),
)


def contract(**changes: object) -> Contract:
    tasks = tuple(ContractTask(name=n, prompt=n, max_query_tokens=8, keep="beginning") for n in ("nq", "fever"))
    whole = Contract(
        name="words",
        weights="0" * 64,
        tasks=tasks,
        prompts=Prompts(),
        pooling="mean",
        similarity="dot",
        max_passage_tokens=16,
        dimension=len(WORDS),
    )
    return whole.model_copy(update=changes)


class WordEncoder:
    """One dimension per word; texts of more than three words count as cut."""

    contract = contract()

    def embed_queries(self, task: str, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return embed(texts), np.array([len(text.split()) > 3 for text in texts])


def embed(texts: Sequence[str]) -> np.ndarray:
    return np.array([[text.split().count(word) for word in WORDS] for text in texts], dtype=np.float32)


def passage_store(folder: Path) -> RowStore:
    columns = [list(column) for column in zip(*PASSAGES, strict=True)]
    wikipedia_ids = [name.partition(":")[0] for name in columns[0]]
    table = pa.table(
        {
            "passage_id": columns[0],
            "page_row": pa.array(columns[1], pa.int64()),
            "wikipedia_id": wikipedia_ids,
            "title": columns[2],
            "text": columns[3],
        }
    )
    RowStore.write(folder / "passages.arrow", [table])
    return RowStore(folder / "passages.arrow")


@pytest.fixture(params=[1, 2, 5], ids=lambda count: f"{count} shards")
def retriever(request: pytest.FixtureRequest, tmp_path: Path) -> Retriever:
    shards = []
    for rows in np.array_split(np.arange(len(PASSAGES)), request.param):
        shards.append(make_shard("flat", embed([PASSAGES[row][3] for row in rows]), int(rows[0])))
    return Retriever(WordEncoder(), LocalShards(shards), Catalog(passage_store(tmp_path), "abc"))


def test_passages_come_best_first_and_ties_by_row(retriever: Retriever) -> None:
    hits = retriever.search(["ice moon", "dust"], "nq", top_k=4, level="passage")
    assert [(hit.rank, hit.id, hit.score) for hit in hits[0]] == [
        (1, "10:0", 2.0),
        (2, "10:1", 1.0),
        (3, "20:0", 1.0),
        (4, "30:0", 1.0),
    ]
    assert [hit.id for hit in hits[1]] == ["20:0", "30:0", "30:1", "10:0"]


def test_a_page_comes_once_with_its_best_passage(retriever: Retriever) -> None:
    hits = retriever.search(["ice moon"], "nq", top_k=2, with_text=True)
    assert hits == [
        [
            Hit(1, "10", 2.0, "10", "Europa", "moon ice"),
            Hit(2, "20", 1.0, "20", "Saturn", "ring ice dust"),
        ]
    ]


def test_more_than_there_is_gives_all_there_is(retriever: Retriever) -> None:
    assert [hit.id for hit in retriever.search(["dust"], "nq", top_k=50)[0]] == ["20", "30", "10"]
    assert len(retriever.search(["dust"], "nq", top_k=50, level="passage")[0]) == len(PASSAGES)


def test_text_comes_only_where_asked_for(retriever: Retriever) -> None:
    assert retriever.search(["ring"], "nq", top_k=1)[0][0].text is None


@pytest.mark.parametrize("level", ["page", "passage"])
def test_only_chosen_pages_are_found_and_all_of_them(retriever: Retriever, level: Level) -> None:
    def pages(top_k: int, **choice: list[str]) -> list[str]:
        (hits,) = retriever.search(["dust"], "nq", top_k=top_k, level=level, **choice)
        return [hit.id for hit in hits]

    every = ["20", "30", "10"] if level == "page" else ["20:0", "30:0", "30:1", "10:0", "10:1"]
    assert pages(9) == pages(9, only_pages=["10", "20", "30", "unknown"]) == every
    assert pages(9, without_pages=["20", "unknown"]) == every[1:]
    assert pages(1, without_pages=["20"]) == every[1:2]
    assert pages(9, only_pages=["30", "10"], without_pages=["10"]) == [one for one in every if one[:2] == "30"]
    assert pages(1, only_pages=["10"]) == [one for one in every if one[:2] == "10"][:1]
    assert pages(9, only_pages=[]) == pages(9, only_pages=["unknown"]) == []


def test_no_shards_find_nothing() -> None:
    queries_BD = np.ones((3, 2), dtype=np.float32)
    assert LocalShards([]).search(queries_BD, 5, None).rows_BK.shape == (3, 0)
    assert LocalShards([]).rank(queries_BD, np.array([4]), 5).rows_BK.shape == (3, 0)


@pytest.mark.parametrize("level", ["page", "passage"])
def test_few_results_are_as_good_as_the_recall_that_was_measured(tmp_path: Path, level: Level) -> None:
    """Four-bit codes find candidates to refine, a multiple of what is asked for: of few they would miss the best."""
    rng = np.random.default_rng(6)
    centers_ND = rng.standard_normal((20, 32))
    vectors_ND = (centers_ND[rng.integers(0, 20, 4000)] + rng.standard_normal((4000, 32))).astype(np.float32)
    queries_BD = (vectors_ND[:100] + 0.5 * rng.standard_normal((100, 32))).astype(np.float32)
    shards = LocalShards([make_shard("pq", vectors_ND, 0)])
    recall = Recall(effort=2, chosen_at=1.0, queries=1, value=1.0, low=1.0, high=1.0)
    names = [f"{row}:0" for row in range(4000)]
    columns = {"passage_id": names, "page_row": range(4000), "wikipedia_id": names, "title": names, "text": names}
    RowStore.write(tmp_path / "passages.arrow", [pa.table({key: list(of) for key, of in columns.items()})])
    measured = MeasuredRecall(at=50, wanted=0.9, tasks={"nq": recall})
    catalog = Catalog(RowStore(tmp_path / "passages.arrow"), "abc", measured)
    best = [names.index(hits[0].id) for hits in catalog.search(shards, queries_BD, 1, level, False, effort=2)]
    assert best == shards.search(queries_BD, 50, 2).rows_BK[:, 0].tolist()
    assert (shards.search(queries_BD, 3, 2).rows_BK[:, 0] != best).sum() > 10


def test_a_fused_ranking_is_that_of_both(tmp_path: Path) -> None:
    """`dust` and `ice` stand where their ranks among the dense and the lexical results put them together."""
    passages = passage_store(tmp_path)
    shards = LocalShards([make_shard("flat", embed([text for *_, text in PASSAGES]), 0)])
    Lexical.build(passages).save(tmp_path / "lexical")
    lexical = Lexical.open(tmp_path / "lexical")
    retriever = Retriever(WordEncoder(), shards, Catalog(passages, "abc", lexical=lexical))
    bm25 = BM25(passages, lexical)
    for level in ("page", "passage"):
        (dense,) = retriever.search(["ice moon"], "nq", top_k=9, level=level)
        (words,) = bm25.search(["ice moon"], "nq", top_k=9, level=level)
        (both,) = retriever.search(["ice moon"], "nq", top_k=9, level=level, fused=True)
        expected: dict[str, float] = {}
        for hits in (dense, words):
            for hit in hits:
                expected[hit.id] = expected.get(hit.id, 0) + 1 / (60 + hit.rank)
        assert {hit.id: hit.score for hit in both} == pytest.approx(expected)
        assert [hit.score for hit in both] == sorted((hit.score for hit in both), reverse=True)
        (chosen,) = retriever.search(["ice moon"], "nq", top_k=9, level=level, fused=True, only_pages=["20", "30"])
        assert {hit.wikipedia_id for hit in chosen} == {"20", "30"}
        (rest,) = retriever.search(["ice moon"], "nq", top_k=9, level=level, fused=True, without_pages=["10"])
        assert {hit.wikipedia_id for hit in rest} == {"20", "30"}
        (first,) = retriever.search(["ice moon"], "nq", top_k=1, level=level, fused=True)
        assert first == both[:1]
    with pytest.raises(ArtifactError, match=r"cannot be read as a lexical index .*; build it again"):
        Lexical.open(tmp_path / "nothing")


def test_an_index_without_a_lexical_part_fuses_nothing(retriever: Retriever) -> None:
    with pytest.raises(
        RequestError, match=r"fused needs an index with a lexical part: .* index\.lexical=true"
    ) as caught:
        retriever.search(["ice"], "nq", fused=True)
    assert caught.value.param == "fused"


@given(
    rankings=st.lists(st.lists(st.integers(0, 9), unique=True, max_size=8), min_size=1, max_size=3),
    top_k=st.integers(1, 10),
)
def test_fusing_keeps_every_result_once_and_one_ranking_as_it_is(rankings: list[list[int]], top_k: int) -> None:
    parts = [Ranking(np.zeros(len(rows), np.float32), np.array(rows, np.int64)) for rows in rankings]
    fused = fuse(parts, None, top_k).rows_K.tolist()
    every = {row for rows in rankings for row in rows}
    assert len(fused) == len(set(fused)) == min(top_k, len(every))
    assert set(fused) <= every
    assert fuse(parts[:1], None, 10).rows_K.tolist() == rankings[0]
    assert fuse([parts[0], parts[0]], None, 10).rows_K.tolist() == rankings[0]


def test_page_ids_read_from_disk_are_those_of_the_passages(retriever: Retriever, tmp_path: Path) -> None:
    PageIds.of(RowStore(tmp_path / "passages.arrow")).save(tmp_path)
    ids = PageIds.open(tmp_path)
    assert len(ids.find(["10"])) == 1
    assert ids.find(["10\0"]).tolist() == [], "numpy would take the id that ends with NUL for the one without"
    assert ids.find(["30", "10", "1", "300", "30"]).tolist() == [0, 2]
    assert ids.find([]).tolist() == []
    (tmp_path / "page_rows.npy").write_bytes(b"broken")
    with pytest.raises(ArtifactError, match=r"its page ids cannot be read .*; build the index again"):
        PageIds.open(tmp_path)


def test_an_id_longer_than_any_of_the_index_costs_no_copy_of_its_ids() -> None:
    ids = PageIds(np.array([f"{number:05}".encode() for number in range(10_000)]), np.arange(10_000))
    tracemalloc.start()
    found = ids.find(["x" * 2000, "00007", "00007x"])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.tolist() == [7]
    assert most < 1_000_000, "of 20 million bytes"


def test_a_passage_is_read_by_its_id_whatever_else_is_asked(retriever: Retriever) -> None:
    found = retriever._catalog.passage("30:1")
    assert found == {"passage_id": "30:1", "wikipedia_id": "30", "title": "Phobos", "text": "dust"}
    for unknown in ("30:2", "30:01", "30", ":1", "30:", "30:-1", "30:²", "30:" + 5000 * "9"):
        assert retriever._catalog.passage(unknown) is None


def test_no_queries_no_answers(retriever: Retriever) -> None:
    assert retriever.search([], "nq") == []


def test_requests_that_break_a_rule_are_refused_by_parameter(retriever: Retriever) -> None:
    for arguments, param, message in [
        ((["ice"], "trex", 1), "task", "unknown task 'trex'; known: nq, fever"),
        ((["ice"], "nq", 0), "top_k", "top_k must be at least 1 but is 0"),
        ((["ice", " \n"], "nq", 1), "query", r"query 1 of 2 \(from 0\) is empty"),
    ]:
        with pytest.raises(RequestError, match=message) as caught:
            retriever.search(*arguments)
        assert caught.value.param == param


def publish(folder: Path, kind: str, facts: dict[str, object]) -> str:
    uri = str(folder / kind)
    with artifacts.publishing(uri, kind, inputs={}, config={}, facts=facts):
        pass
    return uri


def index_facts(of: Contract) -> dict[str, object]:
    shard = ShardFile(file="shards/00000.faiss", row_start=0, rows=5, max_norm=1.0)
    manifest = IndexManifest(
        contract=of,
        fingerprint=of.fingerprint,
        prepared="0" * 64,
        precision="fp32",
        kind="flat",
        factory="Flat",
        dimension=of.dimension,
        passages=5,
        shards=(shard,),
        recall=MeasuredRecall(at=10, wanted=0.95, tasks={}),
        recall_queries=200,
        lexical=False,
    )
    return manifest.model_dump(mode="json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "1" * 64}, "weights differs"),
        ({"prompts": Prompts(passage="{title} {text}")}, "prompts differs"),
        ({"tasks": contract().tasks[:1]}, "tasks.fever differs"),
    ],
)
def test_a_checkpoint_of_another_contract_is_refused_by_field(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    checkpoint = publish(tmp_path, "checkpoint", {"contract": contract(**changes).model_dump(mode="json")})
    index = publish(tmp_path, "index", index_facts(contract()))
    with pytest.raises(ContractError, match=f"checkpoint .* index .*: {message}.*python -m jobs.index .*--checkpoint"):
        Retriever.open(checkpoint, index)


def test_an_index_whose_facts_are_not_whole_is_refused(tmp_path: Path) -> None:
    index = publish(tmp_path, "index", index_facts(contract()) | {"shards": [{"file": "a"}]})
    with pytest.raises(ArtifactError, match=r"fact shards.0.row_start of the index: Field required; build the index"):
        Retriever.open("unused", index)
