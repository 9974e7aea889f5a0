"""The index job: passages embedded in order, cut into shards, resumed shard by shard, published whole."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import index as job
from taskspec import artifacts
from taskspec.config import Config, load_config, with_values
from taskspec.data.prepared import KIND as PREPARED_KIND
from taskspec.data.prepared import PASSAGE_SCHEMA, QUERY_SCHEMA, PreparedData
from taskspec.data.rows import RowStore
from taskspec.errors import ArtifactError, ConfigError, PlacementError, RecallError
from taskspec.index import build
from taskspec.index.embed import EmbedPassages
from taskspec.index.golden import GOLDEN_FILE, GoldenQuery, read_golden
from taskspec.index.manifest import KIND, PASSAGE_COLUMNS, PASSAGES_FILE, IndexManifest
from taskspec.index.shard import load_shard
from taskspec.model.contract import Contract
from taskspec.model.encoder import build_encoder
from taskspec.retrieve.retriever import Retriever
from taskspec.train.checkpoint import open_encoder, publish_checkpoint

CONFIG = """
name: tiny
artifacts: {folder}
tasks: [{{name: nq}}, {{name: fever}}]
model: {{scratch: {{vocabulary: 300, width: 16, layers: 1, heads: 2}}}}
index: {{shards: 3, batch_size: 16}}
"""
PASSAGES, DEV_QUERIES = 200, 30


def passage_texts() -> list[str]:
    """Lengths from 1 to 39 words, so that batches sorted by length come out in another order than they went in."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioumnrst"), 4)) for _ in range(120)]
    return [" ".join(rng.choice(words, rng.integers(1, 40))) for _ in range(PASSAGES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration, prepared data and a checkpoint."""
    folder = tmp_path_factory.mktemp("index")
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder), encoding="utf-8")
    rows = [
        {
            "row_id": row,
            "passage_id": f"{row // 2}:{row % 2}",
            "page_row": row // 2,
            "wikipedia_id": str(row // 2),
            "title": f"page {row // 2}",
            "text": text,
            "start_paragraph": 0,
            "end_paragraph": 0,
        }
        for row, text in enumerate(passage_texts())
    ]
    queries = [
        {
            "query_id": str(row),
            "text": passage_texts()[row],
            "gold_pages": [[str(row // 2)], ["7", "8"]],
            "positives": [],
            "gold_page_rows": [],
        }
        for row in range(DEV_QUERIES)
    ]
    prepared, facts = str(folder / "prepared"), {"queries": {"nq": {"dev": DEV_QUERIES}}}
    with artifacts.publishing(prepared, PREPARED_KIND, inputs={}, config={}, facts=facts) as work:
        (work / "passages").mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=PASSAGE_SCHEMA), work / "passages" / "0.parquet")
        (work / "queries/nq/dev").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(queries, schema=QUERY_SCHEMA), work / "queries/nq/dev/0.parquet")
    config = load_config(folder / "tiny.yaml")
    encoder, tokenizer = build_encoder(config.model, passage_texts(), seed=0)
    publish_checkpoint(
        str(folder / "checkpoint"), config, encoder, tokenizer, step=0, state={}, inputs={}, dev_accuracy={}
    )
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return load_config(folder / "tiny.yaml")


@pytest.fixture(scope="module")
def built(folder: Path, ray_cluster: None) -> dict[str, Any]:
    """What `python -m jobs.index` answers for its default places."""
    return job.run(["--config", str(folder / "tiny.yaml"), "--checkpoint", str(folder / "checkpoint")])


def embeddings(folder: Path) -> np.ndarray:
    texts = passage_texts()
    return open_encoder(str(folder / "checkpoint")).embed_passages(
        [f"page {row // 2}" for row in range(PASSAGES)], texts
    )


def stored(index: str) -> np.ndarray:
    """The embeddings in an index's shards, one after the other."""
    artifact = artifacts.open_artifact(index, KIND, verify=True)
    manifest = IndexManifest.of(index, artifact.manifest)
    parts = []
    for shard in manifest.shards:
        loaded = load_shard(artifact.folder / shard.file, manifest.kind, shard.row_start, shard.max_norm)
        parts.append(loaded.index.reconstruct_n(0, loaded.rows))
    return np.concatenate(parts)


def test_the_job_answers_with_what_it_built(folder: Path, built: dict[str, Any]) -> None:
    contract = open_encoder(str(folder / "checkpoint")).contract
    assert built == {
        "uri": str(folder / "index"),
        "passages": PASSAGES,
        "shards": 3,
        "dimension": 16,
        "kind": "flat",
        "recall": {"nq": 1.0},
        "fingerprint": contract.fingerprint,
    }
    artifact = artifacts.open_artifact(built["uri"], KIND)
    manifest = IndexManifest.of(built["uri"], artifact.manifest)
    assert manifest.contract == contract
    assert manifest.prepared == PreparedData.open(str(folder / "prepared")).id == artifact.manifest.inputs["prepared"]
    assert [(shard.row_start, shard.rows) for shard in manifest.shards] == [(0, 66), (66, 67), (133, 67)]
    assert {shard.file for shard in manifest.shards} <= artifact.manifest.files.keys()
    recall = manifest.recall.tasks["nq"]
    assert (recall.queries, recall.value, recall.high, recall.effort) == (DEV_QUERIES, 1.0, 1.0, None)


def test_every_row_holds_its_own_passage_s_embedding(folder: Path, built: dict[str, Any]) -> None:
    np.testing.assert_allclose(stored(built["uri"]), embeddings(folder), rtol=0, atol=1e-5)


def test_the_text_store_holds_the_prepared_passages(folder: Path, built: dict[str, Any]) -> None:
    texts = RowStore(Path(built["uri"]) / PASSAGES_FILE)
    prepared = PreparedData.open(str(folder / "prepared")).passages
    assert texts.schema.names == list(PASSAGE_COLUMNS)
    assert texts.take(range(PASSAGES), PASSAGE_COLUMNS) == prepared.take(range(PASSAGES), PASSAGE_COLUMNS)


def test_the_index_carries_golden_queries(folder: Path, built: dict[str, Any], tmp_path: Path) -> None:
    golden = read_golden(Path(built["uri"]) / GOLDEN_FILE)
    assert [(one.task, one.query) for one in golden] == [("nq", text) for text in passage_texts()[:DEV_QUERIES]]
    assert golden[7].gold_pages == (("3",), ("7", "8"))
    (tmp_path / "golden.jsonl").write_text(golden[0].model_dump_json() + "\n{}\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"golden\.jsonl line 2: is no golden query; build the index again"):
        read_golden(tmp_path / "golden.jsonl")


def test_golden_queries_keep_every_letter(tmp_path: Path) -> None:
    """Also those that Python takes for ends of lines; and a file may be empty."""
    path = tmp_path / "golden.jsonl"
    golden = [GoldenQuery(task="nq", query=f"a{letter}b", gold_pages=()) for letter in "\n\r\x85\u2028\u2029\v"]
    path.write_text("".join(one.model_dump_json() + "\n" for one in golden), encoding="utf-8")
    assert read_golden(path) == golden
    path.write_text("")
    assert read_golden(path) == []


def test_a_retriever_opens_what_the_job_built(folder: Path, built: dict[str, Any]) -> None:
    retriever = Retriever.open(str(folder / "checkpoint"), built["uri"])
    hits = retriever.search([passage_texts()[7]], "nq", top_k=PASSAGES, level="passage")[0]
    assert len(hits) == PASSAGES
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_an_index_that_stands_is_left_as_it_is(
    folder: Path, config: Config, built: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (Path(built["uri"]) / artifacts.MANIFEST).read_bytes()
    build.build_index(config, str(folder / "checkpoint"), str(folder / "prepared"), built["uri"])
    assert "stands already" in capsys.readouterr().out
    assert (Path(built["uri"]) / artifacts.MANIFEST).read_bytes() == before
    assert not Path(f"{built['uri']}-shards").exists()


def test_a_broken_build_goes_on_with_the_shards_that_are_missing(
    folder: Path, config: Config, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index lacks a file; of its shards 0 and 2 are finished, 1 is damaged: only rows 66 to 132 are embedded."""
    out = str(folder / "again")
    shutil.copytree(built["uri"], out)
    (folder / "again" / "shards" / "00000.faiss").unlink()
    source = source_of(folder, config)
    plan = build.plan_shards(out, PASSAGES, 3)
    whole_ND = stored(built["uri"])
    for planned in plan:
        build.publish_shard(source, planned, whole_ND[planned.row_start : planned.row_start + planned.rows])
    damaged = Path(plan[1].uri) / build.SHARD_FILE
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    embedded: list[build.PlannedShard] = []

    def embed(source: build.Source, missing: Sequence[build.PlannedShard]) -> Any:
        embedded.extend(missing)
        return original(source, missing)

    original = build._embedded
    monkeypatch.setattr(build, "_embedded", embed)
    build.build_index(config, str(folder / "checkpoint"), str(folder / "prepared"), out)
    assert embedded == [plan[1]]
    np.testing.assert_allclose(stored(out), whole_ND, rtol=0, atol=1e-5)
    assert not Path(f"{out}-shards").exists()


def test_a_shard_of_another_model_is_not_taken(folder: Path, config: Config) -> None:
    source = source_of(folder, config)
    planned = build.PlannedShard(str(folder / "one-shard"), 0, 5)
    build.publish_shard(source, planned, np.ones((5, 16), dtype=np.float32))
    assert planned.finished(source) is not None
    assert planned.finished(replace(source, contract=source.contract.model_copy(update={"weights": "other"}))) is None
    assert replace(planned, rows=4).finished(source) is None
    assert planned.finished(replace(source, config=with_values(source.config, {"index.precision": "bf16"}))) is None


def test_rows_are_cut_into_even_runs() -> None:
    plan = build.plan_shards("s3://bucket/index/", 10, 4)
    assert [(shard.row_start, shard.rows) for shard in plan] == [(0, 2), (2, 3), (5, 2), (7, 3)]
    assert plan[3].uri == "s3://bucket/index-shards/shard-00003"


def test_positions_count_through_the_missing_rows() -> None:
    missing = [build.PlannedShard("a", 10, 2), build.PlannedShard("b", 100, 3)]
    assert build.global_rows(np.arange(5), missing).tolist() == [10, 11, 100, 101, 102]


def test_passages_come_out_as_they_went_in(folder: Path) -> None:
    embed = EmbedPassages(str(folder / "checkpoint"), threads=1, precision="fp32")
    texts = passage_texts()[:9]
    titles = ["page 0"] * 9
    batch = {"row": np.arange(9), "title": np.array(titles, dtype=object), "text": np.array(texts, dtype=object)}
    result = embed(batch)
    assert result["row"].tolist() == list(range(9))
    assert result["embedding"].dtype == np.float32
    np.testing.assert_allclose(result["embedding"], embeddings(folder)[:9], rtol=0, atol=1e-5)


def test_bf16_embeds_nearly_as_fp32_does(folder: Path) -> None:
    embed = EmbedPassages(str(folder / "checkpoint"), threads=1, precision="bf16")
    batch = {"row": np.arange(9), "title": np.array(["page 0"] * 9, dtype=object)}
    result = embed(batch | {"text": np.array(passage_texts()[:9], dtype=object)})
    assert result["embedding"].dtype == np.float32
    error = np.linalg.norm(result["embedding"] - embeddings(folder)[:9]) / np.linalg.norm(embeddings(folder)[:9])
    assert 1e-5 < error < 0.02  # bf16 keeps 8 bits: 0.4% in each product


@pytest.fixture(scope="module")
def approximate(folder: Path, config: Config, built: dict[str, Any]) -> tuple[Config, str]:
    """Three shards of PQ codes, which must try hard, built from the embeddings of the exact index, and not published
    as more recall is asked for than they have."""
    changes = {"index.kind": "pq", "index.recall": 1.0, "index.recall_queries": 25, "index.lexical": True}
    config = with_values(config, changes)
    source, out = source_of(folder, config), str(folder / "approximate")
    whole_ND = stored(built["uri"])
    for planned in build.plan_shards(out, PASSAGES, 3):
        build.publish_shard(source, planned, whole_ND[planned.row_start : planned.row_start + planned.rows])
    return config, out


def source_of(folder: Path, config: Config) -> build.Source:
    opened = artifacts.open_artifact(str(folder / "checkpoint"), "checkpoint")
    contract = Contract.model_validate(opened.manifest.facts["contract"])
    return build.Source(config, opened, contract, PreparedData.open(str(folder / "prepared")))


def test_an_index_that_misses_its_recall_is_not_published_and_keeps_its_shards(
    folder: Path, approximate: tuple[Config, str]
) -> None:
    config, out = approximate
    with pytest.raises(RecallError, match=r"pq finds 0\.9\d+ of the exact best 10 of task nq by the queries that"):
        build.build_index(config, str(folder / "checkpoint"), str(folder / "prepared"), out)
    assert not Path(out).exists()
    assert len(list(Path(f"{out}-shards").iterdir())) == 3


def test_the_recall_in_the_manifest_is_what_an_outsider_measures(
    folder: Path,
    approximate: tuple[Config, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With other queries of the task, through the retriever, against products by numpy; nothing is embedded again."""
    config, out = with_values(approximate[0], {"index.recall": 0.9}), approximate[1]
    monkeypatch.setattr(build, "_embedded", None)
    manifest = build.build_index(config, str(folder / "checkpoint"), str(folder / "prepared"), out)
    recall = manifest.recall.tasks["nq"]
    assert (manifest.kind, manifest.factory, recall.queries) == ("pq", "PQ2x4fs,Refine(SQ8)", 12)
    assert recall.chosen_at >= 0.9

    retriever = Retriever.open(str(folder / "checkpoint"), out)
    texts = passage_texts()[60:160]
    queries_BD, _ = retriever.embed("nq", texts)
    exact_BK = np.argsort(-queries_BD @ embeddings(folder).T, axis=1, kind="stable")[:, :10]
    ids = [[f"{row // 2}:{row % 2}" for row in rows] for rows in exact_BK.tolist()]
    found = retriever.search(texts, "nq", top_k=10, level="passage")
    shares = [len({hit.id for hit in hits} & set(wanted)) / 10 for hits, wanted in zip(found, ids, strict=True)]
    assert recall.low <= np.mean(shares) <= recall.high
    assert len(retriever.search(texts[:1], "nq", top_k=10, fused=True)[0]) == 10

    source, plan = source_of(folder, config), build.plan_shards(out, PASSAGES, 3)
    assert build._standing_index(out, source, plan) is not None
    damaged = shutil.copytree(out, folder / "damaged")
    shard = damaged / "shards" / "00001.faiss"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert build._standing_index(str(damaged), source, plan) is None, "its way out is to make it again"
    said = capsys.readouterr().out
    assert "shards/00001.faiss is not the file in the manifest (sha256); make the index again: that is done" in said
    stricter = source_of(folder, with_values(config, {"index.recall": 1.0}))
    assert build._standing_index(out, stricter, plan) is None, "it does not have what is asked for now"


def test_embeddings_that_are_not_finite_are_refused() -> None:
    embedding_ND = np.ones((3, 2), dtype=np.float32)
    embedding_ND[1, 0] = np.nan
    with pytest.raises(ArtifactError, match="some/model: embeds passage row 7 as numbers that are not finite"):
        build.require_finite(np.array([6, 7, 8]), embedding_ND, "some/model")


def test_more_shards_than_passages_are_refused(folder: Path) -> None:
    config = load_config(folder / "tiny.yaml", ["index.shards=201"])
    with pytest.raises(ConfigError, match=r"index.shards is 201 but .*prepared has 200 passages; ask for less"):
        build.build_index(config, str(folder / "checkpoint"), str(folder / "prepared"), str(folder / "none"))


def test_a_cluster_that_is_too_small_is_told_what_is_needed(folder: Path, ray_cluster: None) -> None:
    config = load_config(folder / "tiny.yaml", ["index.actors=40", "cluster.wait_s=0"])
    with pytest.raises(PlacementError, match=r"index with 40 embedding actors and one reading task needs 41 CPUs"):
        build.build_index(config, str(folder / "checkpoint"), str(folder / "prepared"), str(folder / "none"))
