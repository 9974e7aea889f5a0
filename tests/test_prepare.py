"""From KILT files to prepared data: rows, gold, quarantine, what stops the job; checking; S3."""

import gzip
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs import prepare as job
from taskspec import store
from taskspec.config import Config, parse_config, with_values
from taskspec.data import preparation
from taskspec.data import prepare as prepare_module
from taskspec.data.check import EstimatedTokens, check
from taskspec.data.prepare import prepare
from taskspec.data.prepared import PreparedData
from taskspec.data.reading import InputFiles
from taskspec.errors import ConfigError, DataError, PlacementError, StoreError


def words(name, count):
    return " ".join(f"{name}{number}" for number in range(count))


def page(wikipedia_id, *paragraphs):
    title = f"Page {wikipedia_id}"
    return {"wikipedia_id": wikipedia_id, "wikipedia_title": title, "text": [title, *paragraphs]}


PAGES = [
    page("10", words("a", 12), words("b", 8), words("c", 10)),  # 3 passages of 10 words: a, a+b, c
    page("20", words("d", 4)),
    page("30"),
    page("40", words("e", 9), words("f", 9)),  # 2 passages
    page("50", words("g", 5)),
]


def query(number, *evidence, text=None):
    """A record whose evidence sets are lists of (page, paragraph)."""
    output = [
        {"answer": "x", "provenance": [{"wikipedia_id": one, "start_paragraph_id": at} for one, at in places]}
        for places in evidence
    ]
    return {"id": f"q{number}", "input": text or f"question {number}", "output": output}


def write_lines(path, records):
    """Writes records, or bytes as they are, one per line. Returns: the path as text."""
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    content = b"".join(line + b"\n" for line in lines)
    Path(path).write_bytes(gzip.compress(content) if str(path).endswith(".gz") else content)
    return str(path)


@pytest.fixture
def make_config(tmp_path, ray_cluster):
    """A configuration of one task over PAGES; arguments replace files and keys of `data`."""

    def make(train=(), dev=(), pages=PAGES, tasks=None, seed=0, **data) -> Config:
        files = {}
        for split, records in (("train", train), ("dev", dev)):
            if records:
                files[split] = [write_lines(tmp_path / f"nq-{split}-kilt.jsonl", records)]
        tree = {
            "name": "test",
            "artifacts": str(tmp_path / "artifacts"),
            "seed": seed,
            "tasks": tasks or [{"name": "nq", "max_query_tokens": 10, **files}],
            "data": {
                "knowledge_source": [write_lines(tmp_path / "pages.jsonl", pages)],
                "passage_words": 10,
                "max_bad_fraction": 0.5,
                **data,
            },
        }
        return parse_config(tree, "test")

    return make


def prepared(config, tmp_path, name="prepared"):
    uri = str(tmp_path / name)
    prepare(config, uri)
    return PreparedData.open(uri)


def rows(store_of_rows, *columns):
    return store_of_rows.take(range(len(store_of_rows)), columns or store_of_rows.schema.names)


def quarantine(data):
    """File name → (line, kind of reason, record), in the order of lines."""
    result = {}
    for path in sorted((data.artifact.folder / "quarantine").glob("*.jsonl")):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        result[path.name] = sorted((e["line"], e["reason"].partition(" (")[0], e["record"]) for e in entries)
    return result


def test_passages_stand_in_the_order_of_the_knowledge_source(make_config, tmp_path):
    data = prepared(make_config([query(1, [("10", 1)])]), tmp_path)
    assert rows(data.passages, "row_id", "passage_id", "page_row", "title") == {
        "row_id": list(range(8)),
        "passage_id": ["10:0", "10:1", "10:2", "20:0", "30:0", "40:0", "40:1", "50:0"],
        "page_row": [0, 0, 0, 1, 2, 3, 3, 4],
        "title": [f"Page {one}" for one in ("10", "10", "10", "20", "30", "40", "40", "50")],
    }
    texts = data.passages.take([1, 4], ["text", "start_paragraph", "end_paragraph"])
    assert texts == {"text": ["a10 a11 " + words("b", 8), ""], "start_paragraph": [1, 0], "end_paragraph": [2, 0]}


def test_provenance_becomes_rows_of_passages_and_pages(make_config, tmp_path):
    records = [
        query(1, [("10", 1)]),  # paragraph 1 is in the first two passages
        query(2, [("40", 2), ("20", None)]),  # two pages of one evidence set
        query(3, [("40", 1)], [("40", 1)], [("10", 3)]),  # three sets, two of them equal
        query(4, [("30", 1)]),  # a page without text
        query(5, [("10", 99)]),  # a paragraph that the page does not have
    ]
    config = make_config(records, dev=records[:1])
    data = prepared(config, tmp_path)
    assert data.tasks("train") == data.tasks("dev") == ("nq",)
    assert rows(data.queries("nq", "train")) == {
        "query_id": ["q1", "q2", "q3", "q4", "q5"],
        "text": [f"question {number}" for number in range(1, 6)],
        "gold_pages": [[["10"]], [["40", "20"]], [["40"], ["40"], ["10"]], [["30"]], [["10"]]],
        "positives": [[0, 1], [3, 6], [2, 5], [4], [0]],
        "gold_page_rows": [[0], [1, 3], [0, 3], [2], [0]],
    }
    assert data.config == config.model_dump(mode="json")
    assert quarantine(data) == {}


def test_an_evidence_set_without_its_page_is_dropped_and_counted(make_config, tmp_path):
    config = make_config([query(1, [("10", 3), ("99", 1)], [("20", 1)]), query(2, [("20", 1)])])
    data = prepared(config, tmp_path)
    found = data.queries("nq", "train").take([0], ["gold_pages", "positives", "gold_page_rows"])
    # page 10 is nobody's negative, but it is no positive: half of the evidence does not answer
    assert found == {"gold_pages": [[["20"]]], "positives": [[3]], "gold_page_rows": [[0, 1]]}
    assert data.artifact.manifest.facts["evidence_dropped"] == {"nq": {"train": 1}}


DAMAGE = {
    "is not JSON": b'{"id": "cut", "input": "cut o',
    "is not UTF-8": json.dumps(query("bytes", [("10", 1)])).encode().replace(b"question", b"qu\xe9stion"),
    "is an empty line": b"",
    "is no object": b'["id", "input"]',
    "has no 'input'": {key: value for key, value in query("keys", [("10", 1)]).items() if key != "input"},
    "'id' must be a text": query(7, [("10", 1)]) | {"id": 7},
    "'input' is empty": query("blank", [("10", 1)], text="  "),
    "'id' is a duplicate": query(2, [("10", 1)], text="another question 2"),
    "a provenance has no 'wikipedia_id'": query("page", []) | {"output": [{"provenance": [{"title": "Page 10"}]}]},
    "gold page is not in the knowledge source": query("missing", [("99", 1)], [("98", None), ("10", 1)]),
    "'input' is not Unicode": query("half", [("10", 1)], text="half \ud83d"),
}


def test_every_damaged_record_goes_to_quarantine_with_its_line_and_no_good_one_is_lost(make_config, tmp_path):
    lines, bad = [], []
    for number, (reason, record) in enumerate(DAMAGE.items()):
        lines.append(query(number, [("10", 1)]))
        lines.append(record)
        text = record.decode("utf-8", "replace") if isinstance(record, bytes) else json.dumps(record)
        bad.append((len(lines), reason, text))
    lines.append(query(len(DAMAGE), [("20", 1)]))
    data = prepared(make_config(lines), tmp_path)
    assert quarantine(data) == {"nq-train-kilt.jsonl": bad}
    assert rows(data.queries("nq", "train"), "query_id")["query_id"] == [f"q{n}" for n in range(len(DAMAGE) + 1)]
    (count,) = (one for one in data.artifact.manifest.facts["files"] if one["file"] == "nq-train-kilt.jsonl")
    assert count == {
        "file": "nq-train-kilt.jsonl",
        "use": "nq/train",
        "records": len(lines),
        "without_provenance": 0,
        "bad": len(DAMAGE),
        "kinds": dict.fromkeys(DAMAGE, 1),
    }


def test_damaged_pages_go_to_quarantine_and_the_others_stay_together(make_config, tmp_path):
    twin = page("10", "another text")
    lines = [PAGES[0], b"{", twin, page("", "no id"), page("20", words("d", 4)), {"wikipedia_id": "30"}, PAGES[4]]
    data = prepared(make_config([query(1, [("50", 1)], [("10", 1)])], pages=lines, max_bad_fraction=0.6), tmp_path)
    assert [(line, reason) for line, reason, _ in quarantine(data)["pages.jsonl"]] == [
        (2, "is not JSON"),
        (3, "'wikipedia_id' is a duplicate"),
        (4, "'wikipedia_id' is empty"),
        (6, "has no 'text'"),
    ]
    assert data.passages.column("page_row").tolist() == [0, 0, 0, 1, 2]
    assert data.queries("nq", "train").take([0], ["positives"]) == {"positives": [[0, 1, 4]]}


def test_the_same_id_in_train_and_dev_or_in_two_tasks_is_no_damage(make_config, tmp_path):
    path = write_lines(tmp_path / "shared.jsonl", [query(1, [("10", 1)])])
    tasks = [{"name": "a", "train": [path], "dev": [path]}, {"name": "b", "train": [path]}]
    data = prepared(make_config(tasks=tasks), tmp_path)
    assert data.tasks("train") == ("a", "b")
    assert data.tasks("dev") == ("a",)
    assert quarantine(data) == {}
    uses = {one["use"]: one["file"] for one in data.artifact.manifest.facts["files"]}
    assert uses == {"knowledge_source": "pages.jsonl", **dict.fromkeys(("a/train", "a/dev", "b/train"), "shared.jsonl")}


def test_the_same_id_in_two_files_of_a_split_is_a_duplicate(make_config, tmp_path):
    folders = [tmp_path / name for name in ("x", "y")]
    for folder in folders:
        folder.mkdir()
    good = [write_lines(folder / "nq.jsonl", [query(folder.name, [("10", 1)])]) for folder in folders]
    write_lines(folders[1] / "nq.jsonl", [query("x", [("10", 1)]), b"{", query("y", [("10", 1)])])
    data = prepared(make_config(tasks=[{"name": "nq", "train": good}], max_bad_fraction=0.9), tmp_path)
    assert rows(data.queries("nq", "train"), "query_id") == {"query_id": ["qx", "qy"]}
    # a file's quarantine has its name, and two files of one name a number each
    assert [(line, reason) for line, reason, _ in quarantine(data)["nq-2.jsonl"]] == [
        (1, "'id' is a duplicate"),
        (2, "is not JSON"),
    ]


def test_a_chunk_without_any_page_to_keep_is_passed_over(make_config, tmp_path):
    files = [
        write_lines(tmp_path / "bad.jsonl", [b"{", b"}"]),
        write_lines(tmp_path / "other.jsonl", [PAGES[4]]),
        write_lines(tmp_path / "gold.jsonl", [PAGES[1]]),
    ]
    config = make_config([query(1, [("20", 1)])], knowledge_source=files, other_pages=0, max_bad_fraction=1)
    assert rows(prepared(config, tmp_path).passages, "passage_id") == {"passage_id": ["20:0"]}


def test_how_the_knowledge_source_is_split_and_packed_does_not_matter(make_config, tmp_path):
    config = make_config([query(1, [("40", 2)])])
    whole = prepared(config, tmp_path)
    write_lines(tmp_path / "part-1.jsonl.gz", PAGES[:2])
    write_lines(tmp_path / "part-2.jsonl.gz", PAGES[2:])
    parts = make_config([query(1, [("40", 2)])], knowledge_source=[str(tmp_path / "part-*.jsonl.gz")])
    split = prepared(parts, tmp_path, "split")
    assert rows(split.passages) == rows(whole.passages)
    assert rows(split.queries("nq", "train")) == rows(whole.queries("nq", "train"))


def test_preparing_twice_gives_the_same_artifact(make_config, tmp_path):
    config = make_config([query(number, [("10", 1)]) for number in range(50)] + [b"{"])
    assert prepared(config, tmp_path, "one").id == prepared(config, tmp_path, "two").id


def test_prepared_data_of_the_same_files_cut_the_same_way_is_left_as_it_is(make_config, tmp_path, capsys):
    config = make_config([query(number, [("10", 1)]) for number in range(9)] + [b"{"], max_bad_fraction=0.5)
    uri = str(tmp_path / "prepared")
    first = prepare(config, uri)
    made = store.read_bytes(f"{uri}/manifest.json")
    other = with_values(config, {"seed": 7, "prompts.query": "{text}", "tasks.nq.max_query_tokens": 9})
    for same in (config, other):
        again = prepare(same, uri)
        assert (again.to_text(), again.queries) == (first.to_text().replace(f"{tmp_path}/", ""), first.queries)
        assert f"{uri}: stands already for the same inputs" in capsys.readouterr().out
    assert store.read_bytes(f"{uri}/manifest.json") == made
    prepare(with_values(config, {"data.passage_words": 50}), uri)
    assert store.read_bytes(f"{uri}/manifest.json") != made


def test_the_same_files_in_another_folder_give_the_same_artifact(make_config, tmp_path):
    here = make_config([query(1, [("10", 1)])])
    (tmp_path / "moved").mkdir()
    tree = here.model_dump(mode="json")
    files = [tree["data"]["knowledge_source"], tree["tasks"][0]["train"]]
    for names in files:
        names[:] = [shutil.copy(name, tmp_path / "moved") for name in names]
    there = parse_config(tree, "moved")
    assert there != here
    assert prepared(here, tmp_path, "one").id == prepared(there, tmp_path, "two").id


def test_a_file_of_many_chunks_keeps_its_order_and_its_lines(make_config, tmp_path):
    padding = "x" * 50_000
    pages = [page(f"{number}", padding) for number in range(250)]
    pages[200] = {"wikipedia_id": "200"}
    data = prepared(make_config([query(1, [("249", 1)])], pages=pages), tmp_path)
    assert rows(data.passages, "wikipedia_id")["wikipedia_id"] == [str(n) for n in range(250) if n != 200]
    assert quarantine(data)["pages.jsonl"][0][:2] == (201, "has no 'text'")
    assert data.queries("nq", "train").take([0], ["positives"]) == {"positives": [[248]]}


def test_tables_are_split_into_files_in_order(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "ROWS_PER_FILE", 3)
    files = [write_lines(tmp_path / f"p{number}.jsonl", [one]) for number, one in enumerate(PAGES)]
    data = prepared(make_config([query(1, [("10", 1)])], knowledge_source=files), tmp_path)
    names = [path.name for path in sorted((data.artifact.folder / "passages").iterdir())]
    assert names == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert data.passages.column("row_id").tolist() == list(range(8))


def test_other_pages_are_a_choice_by_seed_that_does_not_depend_on_the_order(make_config, tmp_path):
    pages = [page(f"{number}", "text") for number in range(60)]
    records = [query(1, [("7", 1)]), query(2, [("31", 1), ("5", 1)])]

    def kept(name, pages, **settings):
        data = prepared(make_config(records, pages=[*pages, b"{"], **settings), tmp_path, name)
        assert data.passages.column("page_row").tolist() == list(range(len(data.passages)))
        return [int(one) for one in rows(data.passages, "wikipedia_id")["wikipedia_id"]]

    assert kept("none", pages, other_pages=0) == [5, 7, 31]
    chosen = kept("ten", pages, other_pages=10)
    assert len(chosen) == 13
    assert {5, 7, 31} < set(chosen)
    assert chosen == sorted(chosen)
    assert kept("reversed", pages[::-1], other_pages=10) == chosen[::-1]
    assert set(kept("more", pages, other_pages=20)) > set(chosen)
    assert kept("seed", pages, other_pages=10, seed=1) == chosen, "runs of several seeds search the same pages"
    assert len(kept("all", pages, other_pages=1000)) == 60


def test_too_many_bad_records_stop_the_job_and_stay_readable(make_config, tmp_path):
    good = [query(number, [("10", 1)]) for number in range(96)]
    config = make_config([*good, b"", b"{", b"[]", b""], max_bad_fraction=0.03)
    uri = str(tmp_path / "prepared")
    with pytest.raises(
        DataError,
        match=r"nq-train-kilt\.jsonl: 4 of 100 records are bad \(4\.0%\), more than data\.max_bad_fraction = 0\.03 "
        r"allows: line 97: is an empty line; line 98: is not JSON \(.*\); line 99: is no object \(is list\); "
        r"see .*prepared-quarantine/nq-train-kilt\.jsonl, then mend the file or raise the limit",
    ):
        prepare(config, uri)
    left = Path(f"{uri}-quarantine", "nq-train-kilt.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in left] == [97, 98, 99, 100]
    assert not store.exists(uri)
    one_more = make_config([*good, query(96, [("10", 1)]), b"", b"{", b"[]"], max_bad_fraction=0.03)
    assert len(prepared(one_more, tmp_path).queries("nq", "train")) == 97


def test_records_without_provenance_are_left_out_however_many_and_are_not_bad(make_config, tmp_path):
    """As in KILT's own train files, of which one has more than a tenth of them."""
    lines = [query(number, *([[("10", 1)]] if number % 3 else [])) for number in range(30)]
    config = make_config([*lines, query(0, [("10", 1)])], max_bad_fraction=0.05)
    data = prepared(config, tmp_path)
    assert len(data.queries("nq", "train")) == 20
    (count,) = (one for one in data.artifact.manifest.facts["files"] if one["use"] == "nq/train")
    assert (count["records"], count["without_provenance"], count["bad"]) == (31, 10, 1)
    assert quarantine(data) == {"nq-train-kilt.jsonl": [(31, "'id' is a duplicate", json.dumps(query(0, [("10", 1)])))]}
    assert "left out: 10 of 31 records of" in check(config).to_text()


def test_too_many_missing_gold_pages_stop_the_job(make_config, tmp_path):
    config = make_config([query(1, [("10", 1)]), query(2, [("98", 1)]), query(3, [("99", 1)])])
    with pytest.raises(DataError, match=r"2 of 3 .*line 2: gold page is not in the knowledge source \(98\); line 3"):
        prepare(config, str(tmp_path / "prepared"))


def test_too_many_bad_pages_stop_the_job(make_config, tmp_path):
    with pytest.raises(DataError, match=r"pages\.jsonl: 6 of 11 records are bad \(54\.5%\)"):
        prepare(make_config([query(1, [("10", 1)])], pages=[*PAGES, *[b"{"] * 6]), str(tmp_path / "prepared"))


def test_a_file_without_records_is_refused(make_config, tmp_path):
    config = make_config(tasks=[{"name": "nq", "train": [write_lines(tmp_path / "empty.jsonl", [])]}])
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no record; name another file or leave it out"):
        prepare(config, str(tmp_path / "prepared"))


def test_a_split_without_good_records_is_refused(make_config, tmp_path):
    with pytest.raises(DataError, match=r"tasks\.nq\.train: none of its records is good .* lower data\.max_bad_fr"):
        prepare(make_config([b"{", query(1)], max_bad_fraction=1), str(tmp_path / "prepared"))


def test_a_packed_file_that_breaks_off_is_named_with_its_line(make_config, tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    records = [query(number, [("10", 1)], text=f"{np.random.default_rng(number).bytes(40)}") for number in range(99)]
    write_lines(path, records)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz line \d+: cannot be read on \(.*\); if the file is damaged"):
        prepare(make_config(tasks=[{"name": "nq", "train": [str(path)]}]), str(tmp_path / "prepared"))


def test_a_file_that_is_not_packed_but_named_so_is_refused(make_config, tmp_path):
    path = tmp_path / "plain.jsonl.gz"
    path.write_bytes(b"{}\n")
    with pytest.raises(DataError, match=r"plain\.jsonl\.gz line 1: cannot be read on \(Not a gzipped file"):
        prepare(make_config(tasks=[{"name": "nq", "train": [str(path)]}]), str(tmp_path / "prepared"))


def test_all_missing_files_are_named_at_once(tmp_path, monkeypatch):
    tree = {
        "name": "test",
        "artifacts": str(tmp_path),
        "tasks": [{"name": "nq", "train": ["/none/train.jsonl"], "dev": ["/none/dev-*.jsonl"]}],
        "data": {"knowledge_source": ["/none/pages.jsonl"]},
    }
    (tmp_path / "test.yaml").write_text(json.dumps(tree))
    monkeypatch.setattr("taskspec.cluster.connect", lambda _: pytest.fail("no cluster for files that are not there"))
    with pytest.raises(
        StoreError,
        match=r"^input files cannot be found: /none/pages\.jsonl: does not exist; /none/train\.jsonl: does not exist; "
        r"/none/dev-\*\.jsonl: names no file; mend their paths in the configuration$",
    ):
        job.run(["--config", str(tmp_path / "test.yaml")])


def test_a_configuration_without_files_is_refused():
    tree = {"name": "test", "artifacts": "x", "tasks": [{"name": "nq"}]}
    with pytest.raises(ConfigError, match=r"data\.knowledge_source: names no file"):
        InputFiles.find(parse_config(tree, "test"))
    tree["data"] = {"knowledge_source": [__file__]}
    with pytest.raises(ConfigError, match=r"tasks\.nq: has neither train nor dev files; give some or leave it out"):
        InputFiles.find(parse_config(tree, "test"))


def test_one_cpu_is_too_few(make_config, tmp_path, monkeypatch):
    import ray

    config = make_config([query(1, [("10", 1)])])
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"wait_s": 0})})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(PlacementError, match="prepare with one reading and one parsing task needs 2 CPUs"):
        prepare(config, str(tmp_path / "prepared"))


def test_long_reading_shows_progress(make_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "PROGRESS_S", -1.0)
    prepared(make_config([query(1, [("10", 1)])]), tmp_path)
    assert capsys.readouterr().out == "prepare: 5 pages read\n"


def test_prepared_data_travels_as_its_uri_and_refuses_what_it_does_not_have(tiny_prepared):
    again = pickle.loads(pickle.dumps(tiny_prepared))
    assert again.id == tiny_prepared.id
    assert again.passages.take([5], ["passage_id"]) == tiny_prepared.passages.take([5], ["passage_id"])
    with pytest.raises(DataError, match=r"has no dev queries of task 'mine' \(tasks with some: fever, .*\); name its"):
        tiny_prepared.queries("mine", "dev")


def test_every_query_of_a_world_has_its_gold(tiny_prepared):
    page_of_passage = tiny_prepared.passages.column("page_row")
    id_of_page = dict(zip(page_of_passage, rows(tiny_prepared.passages, "wikipedia_id")["wikipedia_id"], strict=True))
    for split in ("train", "dev"):
        for task in tiny_prepared.tasks(split):
            found = rows(tiny_prepared.queries(task, split), "gold_pages", "positives", "gold_page_rows")
            for sets, positives, pages in zip(*found.values(), strict=True):
                assert {id_of_page[row] for row in pages} == {one for ids in sets for one in ids}
                assert set(page_of_passage[positives]) == set(pages)


def test_check_reports_and_writes_nothing(make_config, tmp_path):
    train = [
        query(1, [("10", 1)], text="who found Pluto"),
        query(2, [("10", 1)], text="Who found  Pluto?"),  # repeated
        query(3, [("20", 1)], text="who found Pluto!"),  # contradicting
        query(4, [("99", 1)]),
        query(5, [("40", 1)], text=words("long", 9)),  # prompt, sentinel and 9 words: over 10 tokens
    ]
    dev = [query(1, [("10", 1)], text="WHO FOUND PLUTO"), query(2, [("50", 1)])]
    config = make_config(train, dev, max_bad_fraction=0.1)
    before = sorted(tmp_path.rglob("*"))
    report = check(config)
    assert sorted(tmp_path.rglob("*")) == before
    found = report.splits["nq"]["train"]
    assert (found.queries, found.words_median, found.words_max) == (4, 3, 9)
    assert (found.max_query_tokens, found.cut) == (10, 0.25)
    assert (found.repeated, found.contradicting) == (1, 1)
    assert (found.gold_pages, found.evidence, found.evidence_dropped) == (3, 5, 1)
    assert (report.leakage["nq"].inputs, report.leakage["nq"].gold_pages) == (0.5, 0.5)
    assert (report.passage_words_mean, report.passage_words_max) == (pytest.approx(58 / 8), 10)
    assert report.over_limit == {config.tasks[0].train[0]: 0.2}
    text = report.to_text()
    for part in (
        "nq  train        4      3        9     10  25.0%         1              1       80.0%",
        "in tokens, estimated as 1.35 per word",
        "nq: train has 50.0% of the dev inputs, 50.0% of their pages",
        "5 pages (4 gold) in 8 passages",
        "quarantine: 1 of 5 records of",
        "1 gold page is not in the knowledge source",
        "20.0% of its records are bad: prepare would stop, see data.max_bad_fraction",
    ):
        assert part in text
    assert json.loads(json.dumps(report.to_json()))["splits"]["nq"]["dev"]["queries"] == 2


def test_check_looks_at_spaced_passages_of_all(make_config, monkeypatch):
    monkeypatch.setattr("taskspec.data.check.PASSAGES_TOKENIZED", 20)
    pages = [page(f"{number}", words("w", 300 if number % 2 else 5)) for number in range(100)]
    config = make_config([query(1, [("7", 1)])], pages=pages, passage_words=300)
    assert check(config).passages_cut == pytest.approx(0.0)
    monkeypatch.setattr("taskspec.data.check.PASSAGES_TOKENIZED", 100)
    assert check(config).passages_cut == pytest.approx(0.5)


def test_estimated_tokens_count_the_prompt(make_config):
    tokens = EstimatedTokens(make_config([query(1, [("10", 1)])]))
    # "nq <extra_id_1> …" and an end: 2 + 4 words are 9 + 1 tokens, 2 + 5 words are 10 + 1
    assert tokens.queries("nq", [words("w", 4), words("w", 5)]).truncated_B.tolist() == [False, True]


def test_the_job_checks_with_the_tokenizer_of_the_model(make_config, tmp_path, tiny_prepared, tiny_config, capsys):
    from taskspec.model.encoder import build_encoder

    _, tokenizer = build_encoder(tiny_config.model, rows(tiny_prepared.passages, "text")["text"], seed=0)
    tokenizer.save_pretrained(tmp_path / "model")
    config = make_config([query(1, [("10", 1)])]).model_dump(mode="json")
    config["model"] |= {"source": str(tmp_path / "model")}
    (tmp_path / "test.yaml").write_text(json.dumps(config))
    answer = job.run(["--config", str(tmp_path / "test.yaml"), "--check"])
    assert answer["uri"] == str(tmp_path / "test.yaml")
    assert not answer["tokens_estimated"]
    assert "in tokens, of the model's tokenizer" in capsys.readouterr().out


def test_the_job_refuses_a_model_without_tokenizer(make_config, tmp_path):
    config = make_config([query(1, [("10", 1)])]).model_dump(mode="json")
    (tmp_path / "model").mkdir()
    config["model"] |= {"source": str(tmp_path / "model")}
    (tmp_path / "test.yaml").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model\.source .*/model: no tokenizer: "):
        job.run(["--config", str(tmp_path / "test.yaml"), "--check"])


def test_the_job_prepares_from_s3_to_s3(make_config, tmp_path, s3_bucket, capsys):
    root = store.join(s3_bucket, tmp_path.name)
    for name, records in (("pages-1", PAGES[:3]), ("pages-2", PAGES[3:]), ("nq", [query(1, [("40", 2)]), b"{"])):
        path = write_lines(tmp_path / f"{name}.jsonl.gz", records)
        store.write_bytes(store.join(root, f"{name}.jsonl.gz"), Path(path).read_bytes())
    config = make_config(
        tasks=[{"name": "nq", "dev": [store.join(root, "nq.jsonl.gz")]}],
        knowledge_source=[store.join(root, "pages-*.jsonl.gz")],
    )
    config = config.model_copy(update={"artifacts": store.join(root, "artifacts")})
    (tmp_path / "test.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    answer = job.run(["--config", str(tmp_path / "test.yaml")])
    assert answer["uri"] == store.join(root, "artifacts", "prepared")
    assert capsys.readouterr().out.startswith(
        "5 pages (1 gold) in 8 passages\n  nq: 1 dev\n  quarantine: 1 of 2 records"
    )
    data = PreparedData.open(answer["uri"])
    assert len(data.passages) == 8
    assert data.queries("nq", "dev").take([0], ["query_id", "positives"]) == {"query_id": ["q1"], "positives": [[6]]}
    assert quarantine(data)["nq.jsonl"][0][:2] == (2, "is not JSON")
    assert all(value.startswith("etag:") for value in data.artifact.manifest.inputs.values())


def test_help_imports_neither_torch_nor_ray_nor_arrow():
    code = (
        "import sys\nfrom jobs import prepare\ntry: prepare.run(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'ray', 'pyarrow') if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.endswith("[]\n")
