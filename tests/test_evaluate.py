"""Evaluation of searchers on prepared data, its tables and files, and the scoring of existing KILT prediction files.

The searcher is a bag of five words, so every ranking can be worked out by eye.
"""

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from jobs import evaluate as job
from taskspec import artifacts
from taskspec.config import Config, load_config, parse_config, with_values
from taskspec.data.prepared import KIND, PASSAGE_SCHEMA, QUERY_SCHEMA, PreparedData
from taskspec.errors import ConfigError, DataError, StoreError
from taskspec.evaluate.run import (
    EvaluationTable,
    TaskScores,
    evaluate,
    publish_evaluation,
    score_files,
    trec_lines,
)
from taskspec.retrieve.hits import Hit
from taskspec.sections import Evaluate

WORDS = ("red", "green", "blue", "gold", "gray")
PAGES = {"1": "red", "2": "green", "3": "blue gold", "4": "gold", "5": "gray red"}
QUERIES = {
    "color": [("q1", "red", [["1"]]), ("q2", "blue gold", [["3", "4"]]), ("q 3", "gray", [["1"], ["5"]])],
    "metal": [("m1", "gold", [["4"]])],
}


class WordSearcher:
    """Scores a page by the words that it shares with the query; equal scores by id."""

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self.words = words
        self.calls: list[tuple[str, int]] = []

    def search(self, texts, task, top_k=10, level="page", with_text=False):
        assert level == "page"
        self.calls.append((task, len(texts)))
        return [self._ranked(text)[:top_k] for text in texts]

    def _ranked(self, text: str) -> list[Hit]:
        def shared(page: str) -> int:
            return sum(word in text.split() and word in page.split() for word in self.words)

        order = sorted(PAGES, key=lambda page: (-shared(PAGES[page]), page))
        return [
            Hit(rank, page, float(shared(PAGES[page])), page, PAGES[page], None) for rank, page in enumerate(order, 1)
        ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> PreparedData:
    uri = str(tmp_path_factory.mktemp("data") / "prepared")
    return write_prepared(uri, QUERIES)


def write_prepared(uri: str, queries) -> PreparedData:
    """Prepared data of the five pages, one passage each."""
    passages = [
        dict(zip(PASSAGE_SCHEMA.names, (row, f"{page}:0", row, page, text, text, 0, 0), strict=True))
        for row, (page, text) in enumerate(PAGES.items())
    ]
    rows = {page: row for row, page in enumerate(PAGES)}
    facts = {"queries": {task: {"dev": len(records)} for task, records in queries.items()}}
    with artifacts.publishing(uri, KIND, inputs={}, config={}, facts=facts) as folder:
        write_parquet(folder / "passages" / "0.parquet", passages, PASSAGE_SCHEMA)
        for task, records in queries.items():
            table = []
            for query_id, text, sets in records:
                gold = sorted(rows[page] for page in {page for pages in sets for page in pages})
                values = (query_id, text, sets, gold, gold)
                table.append(dict(zip(QUERY_SCHEMA.names, values, strict=True)))
            write_parquet(folder / "queries" / task / "dev" / "0.parquet", table, QUERY_SCHEMA)
    return PreparedData.open(uri)


def write_parquet(path: Path, rows, schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def config(artifacts: Path | str = "nowhere", **evaluation) -> Config:
    tree = {"name": "five-words", "artifacts": str(artifacts), "tasks": [{"name": name} for name in QUERIES]}
    return parse_config({**tree, "evaluate": evaluation}, "test")


def scores(task: str, system: str, rprec: float, **metrics: float) -> TaskScores:
    return TaskScores(
        task=task, system=system, queries=1, metrics={"Rprec": rprec, **metrics}, per_query_rprec=(rprec,)
    )


# --- evaluating a searcher --------------------------------------------------------------------------------------------


def test_a_searchers_scores_are_those_worked_out_by_hand(prepared):
    color, metal = evaluate(WordSearcher(), prepared, ["color", "metal"], Evaluate(at=(1, 2)), system="words")
    # q1: 1, 5, …; q2: 3, 4, …; q3: 5, 1, …
    assert (color.task, color.system, color.queries) == ("color", "words", 3)
    assert color.per_query_rprec == (1, 1, 1)
    assert color.metrics["recall@1"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert color.metrics["recall@2"] == 1
    assert color.metrics["precision@2"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    # m1: 3, 4, …
    assert (metal.metrics["Rprec"], metal.metrics["recall@1"], metal.metrics["recall@2"]) == (0, 0, 1)


def test_queries_are_searched_in_batches(tmp_path):
    many = write_prepared(str(tmp_path / "many"), {"color": [(f"q{n}", "red", [["1"]]) for n in range(300)]})
    searcher = WordSearcher()
    (row,) = evaluate(searcher, many, ["color"], Evaluate(), system="words")
    assert searcher.calls == [("color", 256), ("color", 44)]
    assert row.queries == len(row.per_query_rprec) == 300


def test_a_system_of_one_searcher_per_task_is_evaluated_where_it_has_one(prepared):
    rows = evaluate({"metal": WordSearcher()}, prepared, ["color", "metal"], Evaluate(), system="single")
    assert [row.task for row in rows] == ["metal"]


def test_a_system_name_that_is_no_file_name_is_refused(prepared):
    with pytest.raises(ConfigError, match=r"system '\.\./x': the name goes into file names"):
        evaluate(WordSearcher(), prepared, ["color"], Evaluate(), system="../x")


def test_fewer_pages_than_the_largest_k_are_refused_before_any_work():
    with pytest.raises(ValueError, match="top_k is 10 but at asks for recall@20; set top_k to that or more"):
        Evaluate(top_k=10)


def test_a_task_without_dev_queries_is_refused():
    empty = SimpleNamespace(artifact=SimpleNamespace(uri="prepared"), queries=lambda task, split: ())
    with pytest.raises(DataError, match="has 0 dev queries of task 'color'"):
        evaluate(WordSearcher(), empty, ["color"], Evaluate(), system="words")


def test_prepared_data_without_dev_queries_is_refused(tmp_path):
    none = write_prepared(str(tmp_path / "none"), {})
    with pytest.raises(DataError, match="has no dev queries of any task"):
        publish_evaluation(str(tmp_path / "out"), {"words": WordSearcher()}, none, config(), inputs={})


# --- the artifact -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(prepared, tmp_path_factory) -> tuple[str, EvaluationTable]:
    uri = str(tmp_path_factory.mktemp("evaluation") / "evaluation")
    systems = {"words": WordSearcher(), "no-gold": WordSearcher(WORDS[:3])}
    return uri, publish_evaluation(uri, systems, prepared, config(top_k=20), inputs={"index of words": "abc"})


def test_an_evaluation_is_an_artifact_with_its_table(published, prepared):
    uri, table = published
    assert EvaluationTable.open(uri) == table
    manifest = artifacts.read_manifest(uri, "evaluation")
    assert manifest.inputs == {"prepared": prepared.id, "index of words": "abc"}
    assert manifest.facts["average_rprec"] == {"words": 0.5, "no-gold": table.average("no-gold")}
    assert sorted(manifest.files) == sorted(
        ["table.json"]
        + [f"predictions/{system}/{task}.jsonl" for system in ("words", "no-gold") for task in QUERIES]
        + [f"runs/{system}/{task}.trec" for system in ("words", "no-gold") for task in QUERIES]
    )


def test_predictions_are_kilt_records_best_page_first(published):
    uri, _ = published
    lines = Path(uri, "predictions/words/color.jsonl").read_text().splitlines()
    record = json.loads(lines[1])
    assert (record["id"], record["input"]) == ("q2", "blue gold")
    (output,) = record["output"]
    assert output["answer"] == ""
    assert [item["wikipedia_id"] for item in output["provenance"]][:2] == ["3", "4"]
    assert output["provenance"][0] == {"wikipedia_id": "3", "title": "blue gold", "score": 2.0}


def test_written_predictions_score_as_the_table_says(published, tmp_path):
    uri, table = published
    gold = write_lines(
        tmp_path / "gold.jsonl",
        [gold_record(query_id, *sets) for query_id, _, sets in QUERIES["color"]],
    )
    again = score_files(gold, f"{uri}/predictions/words/color.jsonl", (1, 5, 20))
    (row,) = [row for row in table.rows if (row.task, row.system) == ("color", "words")]
    assert again.metrics == row.metrics


def test_trec_runs_are_read_in_our_order_by_ir_measures(published, prepared):
    ir_measures = pytest.importorskip("ir_measures")
    uri, _ = published
    rows = list(ir_measures.read_trec_run(f"{uri}/runs/words/color.trec"))
    read: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        read.setdefault(row.query_id, []).append((row.score, row.doc_id))
    assert list(read) == ["q1", "q2", "q%203"]
    for query_id, text in (("q1", "red"), ("q2", "blue gold"), ("q%203", "gray")):
        ours = [hit.wikipedia_id for hit in WordSearcher()._ranked(text)]
        assert [page for _, page in sorted(read[query_id], reverse=True)] == ours
    relevant = [ir_measures.Qrel("q1", "1", 1), ir_measures.Qrel("q2", "3", 1), ir_measures.Qrel("q%203", "1", 1)]
    assert ir_measures.calc_aggregate([ir_measures.RR], relevant, rows)[ir_measures.RR] == pytest.approx(2.5 / 3)


def test_equal_scores_in_a_trec_run_fall_so_that_readers_keep_the_order():
    pages = ["b", "a", "c"]
    hits = [Hit(rank, page, 0.1, page, page, None) for rank, page in enumerate(pages, 1)]
    lines = [line.split() for line in trec_lines("q 1%", hits, "words")]
    assert [line[:4] for line in lines] == [["q%201%25", "Q0", page, str(rank)] for rank, page in enumerate(pages, 1)]
    falling = [float(line[4]) for line in lines]
    assert falling[0] == 0.1
    assert sorted(set(falling), reverse=True) == falling
    assert falling[2] == pytest.approx(0.1)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_prints_a_row_per_task_a_column_per_system_and_the_average():
    table = EvaluationTable(
        (
            scores("nq", "bm25", 0.246, **{"recall@1": 0.2, "recall@5": 0.4, "recall@20": 0.5}),
            scores("nq", "taco", 0.6, **{"recall@1": 0.5, "recall@5": 0.7, "recall@20": 0.8}),
            scores("fever", "bm25", 0.43, **{"recall@1": 0.4, "recall@5": 0.6, "recall@20": 1.0}),
        )
    )
    assert table.to_text() == (
        "R-precision %  bm25  taco\n"
        "nq             24.6  60.0\n"
        "fever          43.0     –\n"
        "average        33.8     –\n"
        "\n"
        "recall@5 / recall@20 %          bm25         taco\n"
        "nq                       40.0 / 50.0  70.0 / 80.0\n"
        "fever                   60.0 / 100.0        – / –\n"
        "average                  50.0 / 75.0        – / –"
    )


def test_recall_is_left_out_of_the_text_where_it_does_not_fit():
    table = EvaluationTable((scores("nq", "bm25", 0.5, **{"recall@5": 0.5, "recall@20": 0.5}),))
    assert "recall" in table.to_text(width=40)
    assert "recall" not in table.to_text(width=30)


def test_a_table_survives_json():
    table = EvaluationTable((scores("nq", "bm25", 0.1 + 0.2), scores("fever", "bm25", 1 / 3)))
    text = json.dumps(table.to_json())
    assert EvaluationTable.from_json(json.loads(text)) == table
    assert json.loads(text)["average"] == {"bm25": {"Rprec": pytest.approx(0.95 / 3)}}


def test_a_system_that_lacks_a_task_has_no_average():
    bm25, nq, fever = scores("nq", "bm25", 0.2), scores("nq", "single", 0.5), scores("fever", "single", 0.7)
    merged = EvaluationTable((bm25, nq, fever))
    assert (merged.tasks, merged.systems) == (("nq", "fever"), ("bm25", "single"))
    assert merged.average("single") == pytest.approx(0.6)
    assert merged.average("bm25") is None


def test_a_table_shows_only_metrics_that_all_rows_have():
    table = EvaluationTable((scores("nq", "a", 0.5, **{"recall@5": 0.5}), scores("nq", "b", 0.5)))
    assert table.metrics == ("Rprec",)


# --- KILT files -------------------------------------------------------------------------------------------------------


def gold_record(query_id, *sets) -> dict:
    output = [{"answer": "x", "provenance": [{"wikipedia_id": page} for page in pages]} for pages in sets]
    return {"id": query_id, "input": "…", "output": [*output, {"answer": "an answer without provenance"}]}


def guess_record(query_id, *pages) -> dict:
    return {"id": query_id, "output": [{"provenance": [{"wikipedia_id": page} for page in pages]}]}


def write_lines(path: Path, records) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def gold(tmp_path) -> str:
    return write_lines(tmp_path / "gold.jsonl", [gold_record("1", ["A", "B"]), gold_record("2", ["C"])])


def test_files_are_matched_by_id_in_any_order_and_other_ids_are_ignored(gold, tmp_path):
    guess = write_lines(
        tmp_path / "guess.jsonl",
        [guess_record("other", "A"), guess_record("2", "X", "C"), guess_record("1", "A", "B")],
    )
    result = score_files(gold, guess, (1, 2))
    assert (result.queries, result.ignored) == (2, 1)
    assert result.metrics == {
        "Rprec": 0.5,
        "precision@1": 0.5,
        "recall@1": 0.5,
        "success_rate@1": 0.5,
        "precision@2": 0.5,
        "recall@2": 1.0,
        "success_rate@2": 1.0,
    }


def test_ids_are_compared_as_text_without_surrounding_space(tmp_path):
    gold = write_lines(tmp_path / "gold.jsonl", [gold_record(1, [" 7", 8])])
    guess = write_lines(tmp_path / "guess.jsonl", [guess_record(" 1 ", 7, "8 ")])
    assert score_files(gold, guess, (1,)).metrics["Rprec"] == 1


def test_guesses_without_provenance_count_as_nothing_found(gold, tmp_path):
    nothing = [{"id": "1", "output": [{"answer": "yes"}]}, guess_record("2")]
    guess = write_lines(tmp_path / "guess.jsonl", nothing)
    assert set(score_files(gold, guess, (1, 5)).metrics.values()) == {0.0}


def test_guessed_provenance_without_a_page_is_passed_over(gold, tmp_path):
    record = {"id": "2", "output": [{"answer": "x"}, {"provenance": [{"title": "X"}, {"wikipedia_id": "C"}]}]}
    guess = write_lines(tmp_path / "guess.jsonl", [guess_record("1", "A", "B"), record])
    assert score_files(gold, guess, (1,)).metrics["Rprec"] == 1


def test_an_empty_gold_provenance_is_an_evidence_set_of_its_own(tmp_path):
    gold = write_lines(tmp_path / "gold.jsonl", [gold_record("1", ["A"], [])])
    guess = write_lines(tmp_path / "guess.jsonl", [guess_record("1", "A")])
    metrics = score_files(gold, guess, (1,)).metrics
    assert (metrics["Rprec"], metrics["recall@1"]) == (1, 0.5)


def test_compressed_files_and_empty_lines_are_read(gold, tmp_path):
    guess = tmp_path / "guess.jsonl.gz"
    records = [json.dumps(guess_record("1", "A", "B")), "", json.dumps(guess_record("2", "C"))]
    guess.write_bytes(gzip.compress("\n".join(records).encode()))
    assert score_files(gold, str(guess), (1,)).metrics["Rprec"] == 1


@pytest.mark.parametrize(
    ("records", "message"),
    [
        pytest.param(
            [guess_record("9", "A")],
            r"guess.jsonl: 2 of the 2 ids in .*gold.jsonl have no prediction: '1', '2'; write one",
            id="missing ids",
        ),
        pytest.param(
            [guess_record("1", "A"), guess_record(" 1", "A")],
            r"guess.jsonl line 2: id '1' stands in line 1 already",
            id="an id twice",
        ),
        pytest.param(["{"], r"guess.jsonl line 1: is not JSON \(Expecting", id="bad JSON"),
        pytest.param(["", "[1]"], r"guess.jsonl line 2: must be a JSON object but is \[1\]", id="no object"),
        pytest.param([{"output": []}], r"guess.jsonl line 1: has no 'id'", id="no id"),
        pytest.param([{"id": "1"}], r"line 1: 'output' must be a list of objects, .* but is null", id="no output"),
        pytest.param([{"id": "1", "output": []}], r"line 1: 'output' must be .* but is \[\]", id="empty output"),
        pytest.param(
            [{"id": "1", "output": ["x" * 99]}], r"line 1: 'output' must be .* but is \[\"x{57}…$", id="output of texts"
        ),
        pytest.param(
            [{"id": "1", "output": [{"provenance": "A"}]}],
            r"line 1: 'provenance' must be a list of objects but is \"A\"",
            id="provenance of another type",
        ),
        pytest.param(
            [{"id": "1", "output": [{"provenance": []}, {"provenance": []}]}],
            r"line 1: 2 outputs have provenance; a prediction has one",
            id="several outputs",
        ),
    ],
)
def test_a_bad_guess_file_is_refused_by_line(gold, tmp_path, records, message):
    guess = write_lines(tmp_path / "guess.jsonl", records)
    with pytest.raises(DataError, match=message):
        score_files(gold, guess, (1,))


def test_of_many_missing_ids_the_first_three_are_named(tmp_path):
    gold = write_lines(tmp_path / "gold.jsonl", [gold_record(str(n), ["A"]) for n in range(5)])
    guess = write_lines(tmp_path / "guess.jsonl", [guess_record("0", "A")])
    with pytest.raises(DataError, match=r"4 of the 5 ids in .* have no prediction: '1', '2', '3', …;"):
        score_files(gold, guess, (1,))


def test_a_gold_page_without_id_is_refused(tmp_path):
    record = {"id": "1", "output": [{"provenance": [{"title": "A"}]}]}
    gold = write_lines(tmp_path / "gold.jsonl", [record])
    with pytest.raises(DataError, match=r"gold.jsonl line 1: provenance has no 'wikipedia_id'"):
        score_files(gold, gold, (1,))


def test_an_empty_gold_file_is_refused(tmp_path):
    gold = write_lines(tmp_path / "gold.jsonl", [])
    with pytest.raises(DataError, match=r"gold.jsonl: holds no records"):
        score_files(gold, gold, (1,))


def test_a_truncated_gzip_file_is_refused_by_line(gold, tmp_path):
    guess = tmp_path / "guess.jsonl.gz"
    text = "\n".join(json.dumps(guess_record(str(n), "A")) for n in range(1000))
    guess.write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(DataError, match=r"guess.jsonl.gz line \d+: is damaged gzip \(Compressed file ended"):
        score_files(gold, str(guess), (1,))
    guess.write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"guess.jsonl.gz line 1: is damaged gzip \(Not a gzipped file"):
        score_files(gold, str(guess), (1,))


def test_a_missing_file_is_named(gold):
    with pytest.raises(StoreError, match=r"nowhere.jsonl: does not exist"):
        score_files(gold, "nowhere.jsonl", (1,))


# --- the job ----------------------------------------------------------------------------------------------------------


def test_the_job_prints_one_json_object_for_files(gold, tmp_path, capsys):
    guess = write_lines(tmp_path / "guess.jsonl", [guess_record("1", "A", "B"), guess_record("2", "X", "C")])
    cli.main(job.run, ["--gold", gold, "--guess", guess, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["Rprec"] + [f"{kind}@{k}" for k in (1, 5, 20) for kind in KINDS]
    assert printed["Rprec"] == 0.5
    cli.main(job.run, ["--gold", gold, "--guess", guess, "--at", "3", "2", "--json"])
    assert list(json.loads(capsys.readouterr().out)) == ["Rprec"] + [f"{kind}@{k}" for k in (2, 3) for kind in KINDS]


KINDS = ("precision", "recall", "success_rate")


def test_the_job_prints_a_table_for_files(gold, tmp_path, capsys):
    guess = write_lines(tmp_path / "guess.jsonl", [guess_record("1", "A", "B"), guess_record("2", "X", "C")])
    cli.main(job.run, ["--gold", gold, "--guess", guess, "--at", "1", "20"])
    assert capsys.readouterr().out == (
        "2 queries\n"
        "Rprec         0.5000\n"
        "\n"
        "              @1       @20\n"
        "precision     0.5000   0.0500\n"
        "recall        0.5000   1.0000\n"
        "success_rate  0.5000   1.0000\n"
        f"{guess}\n"
    )


def test_scoring_files_needs_neither_torch_nor_ray(gold, tmp_path):
    guess = write_lines(tmp_path / "guess.jsonl", [guess_record("1"), guess_record("2")])
    program = (
        "import sys; from jobs import evaluate; evaluate.run(sys.argv[1:]);"
        "print([name for name in ('torch', 'ray', 'pyarrow', 'faiss') if name in sys.modules])"
    )
    words = [sys.executable, "-c", program, "--gold", gold, "--guess", guess, "--json"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_job_ends_with_one_line_and_status_2(gold, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(job.run, ["--gold", gold, "--guess", "nowhere.jsonl"])
    assert capsys.readouterr().err == "StoreError: nowhere.jsonl: does not exist\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gold", "g"], "--gold and --guess go together"),
        ([], "give either --config, or --gold and --guess"),
        (["--gold", "g", "--guess", "h", "--config", "c"], "give either --config, or --gold and --guess"),
        (["--gold", "g", "--guess", "h", "--at", "0"], "--at needs numbers ≥ 1 but got 0"),
        (["--config", "CONFIG", "--at", "1"], "--at goes with --gold and --guess; with --config use --set"),
        (["--config", "CONFIG", "--index", "i"], "--index .*i: give --checkpoint too"),
        (["--config", "CONFIG", "--no-bm25"], "nothing to evaluate: give --checkpoint, or"),
        (["--config", "CONFIG", "--systems", "mean=c"], "--systems mean=c: must look like NAME=CHECKPOINT,INDEX or"),
        (["--config", "CONFIG", "--systems", "a:=c,i"], "--systems a:=c,i: must look like"),
        (["--config", "CONFIG", "--systems", "a=c,i", "a=d,j"], "system 'a' is there twice for the same task"),
        (["--config", "CONFIG", "--systems", "a=c,i", "a:nq=d,j"], "system 'a' is there twice"),
        (["--config", "CONFIG", "--systems", "bm25=c,i"], "system 'bm25' is the lexical baseline; give this one"),
        (
            ["--config", "CONFIG", "--checkpoint", "c", "--index", "i", "--systems", "five-words=d,j"],
            "system 'five-words' is there twice",
        ),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(words, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config().model_dump(mode="json")))
    with pytest.raises(ConfigError, match=message):
        job.run([str(path) if word == "CONFIG" else word for word in words])


def test_a_checkpoint_and_its_index_are_evaluated_beside_bm25(prepared, tmp_path, ray_cluster, capsys, monkeypatch):
    from taskspec.index.build import build_index
    from taskspec.model.encoder import build_encoder
    from taskspec.train.checkpoint import publish_checkpoint

    tree = config(tmp_path).model_dump(mode="json")
    tree["model"]["scratch"] = {"vocabulary": 260, "width": 16, "layers": 1, "heads": 2}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    made_with = load_config(path)
    texts = [" ".join(WORDS[(n + k) % 5] + chr(97 + k) for k in range(9)) for n in range(200)]
    encoder, tokenizer = build_encoder(made_with.model, texts, seed=0)
    checkpoint, index = str(tmp_path / "checkpoint"), str(tmp_path / "index")
    publish_checkpoint(checkpoint, made_with, encoder, tokenizer, step=0, state={}, inputs={}, dev_accuracy={})
    build_index(made_with, checkpoint, prepared.artifact.uri, index)

    words = ["--config", str(path), "--prepared", prepared.artifact.uri, "--checkpoint", checkpoint]
    answer = job.run([*words, "--systems", f"single:metal={checkpoint},{index}"])
    assert answer["uri"] == str(tmp_path / "evaluation")
    table = EvaluationTable.open(answer["uri"])
    assert (table.systems, table.tasks) == (("bm25", "five-words", "single"), ("color", "metal"))
    assert table.score("color", "single") is None
    assert (
        table.score("metal", "single")
        == table.score("metal", "five-words")
        == answer["scores"]["single"]["metal"]["Rprec"]
    )
    assert answer["average"]["bm25"]["Rprec"] == 1  # BM25 prefers the shorter of two pages with the query's word
    assert artifacts.read_manifest(answer["uri"], "evaluation").inputs == {
        "prepared": prepared.id,
        **{
            f"checkpoint of {name}": artifacts.read_manifest(checkpoint, "checkpoint").id
            for name in ("five-words", "single:metal")
        },
        **{f"index of {name}": artifacts.read_manifest(index, "index").id for name in ("five-words", "single:metal")},
    }
    assert table.to_text() in capsys.readouterr().out

    # One that was trained on some tasks is asked these only.
    values = {"train.tasks": ["metal"], "specialization.method": "single"}
    metal, metals = str(tmp_path / "metal"), str(tmp_path / "metals")
    only = with_values(made_with, values)
    publish_checkpoint(metal, only, encoder, tokenizer, step=0, state={}, inputs={}, dev_accuracy={})
    build_index(only, metal, prepared.artifact.uri, metals)
    words = [*words[:4], "--checkpoint", metal, "--index", metals, "--out", str(tmp_path / "of-metal")]
    table = EvaluationTable.open(job.run(words)["uri"])
    assert table.score("metal", "five-words") is not None
    assert table.score("color", "five-words") is None
    monkeypatch.setattr(PreparedData, "tasks", lambda self, split: ("color",))
    with pytest.raises(
        ConfigError, match=r"five-words answers metal, of which .* has no dev queries, but of color; give"
    ):
        job.run(words)


def test_systems_name_a_column_and_perhaps_its_task():
    assert job.parse_source("taco=s3://b/c,s3://b/i") == job.Source("taco", None, "s3://b/c", "s3://b/i")
    assert job.parse_source("single:nq=c,i") == job.Source("single", "nq", "c", "i")
