"""The generated world: KILT's formats, true evidence, the promised sizes, and tasks that need more than their words."""

import json
import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec.data.world import World, write_world
from taskspec.data.world_pages import Encyclopedia, Entity, Link, Shuffle
from taskspec.data.world_relations import KINDS, RELATIONS
from taskspec.data.world_tasks import TASKS
from taskspec.errors import ConfigError

PAGES = 1500
TRAIN, DEV = 0, 1
SPAN = {"section", "start_paragraph_id", "start_character", "end_paragraph_id", "end_character", "bleu_score", "meta"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), pages=PAGES, seed=0)


@pytest.fixture(scope="module")
def pages(world: World) -> dict[str, dict[str, Any]]:
    return {page["wikipedia_id"]: page for page in read(world.knowledge_source)}


@pytest.fixture(scope="module")
def records(world: World) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    return {task: (read(train), read(dev)) for task, (train, dev) in world.tasks.items()}


def provenance(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [evidence for output in record["output"] for evidence in output.get("provenance", ())]


def gold(record: dict[str, Any]) -> set[str]:
    return {evidence["wikipedia_id"] for evidence in provenance(record)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_files(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_world(tmp_path / name, pages=200, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert all(contents(tmp_path / "c")[name] != content for name, content in contents(tmp_path / "a").items())


def test_files_are_named_as_kilt_names_them(world: World) -> None:
    assert world.knowledge_source.name == "knowledge_source.jsonl"
    assert {task: (train.name, dev.name) for task, (train, dev) in world.tasks.items()} == {
        task: (f"{task}-train-kilt.jsonl", f"{task}-dev-kilt.jsonl")
        for task in ("fever", "aidayago2", "trex", "zsre", "nq", "hotpotqa", "triviaqa", "wow")
    }


def test_pages_have_kilts_keys_and_distinct_ids_and_titles(pages: dict[str, dict[str, Any]]) -> None:
    assert len(pages) == len({page["wikipedia_title"] for page in pages.values()}) == PAGES
    for page in pages.values():
        assert set(page) == {"_id", "wikipedia_id", "wikipedia_title", "text", "anchors", "categories"}
        assert page["_id"] == page["wikipedia_id"]
        assert page["text"][0] == page["wikipedia_title"] + "\n"
        assert len(page["text"]) >= 2
        assert all(paragraph.endswith("\n") and len(paragraph) > 1 for paragraph in page["text"])


def test_anchors_stand_where_they_say_and_link_to_the_page_they_name(pages: dict[str, dict[str, Any]]) -> None:
    for page in pages.values():
        for anchor in page["anchors"]:
            paragraph = page["text"][anchor["paragraph_id"]]
            assert paragraph[anchor["start"] : anchor["end"]] == anchor["text"]
            assert pages[anchor["wikipedia_id"]]["wikipedia_title"] == anchor["wikipedia_title"] == anchor["text"]


def test_records_have_kilts_keys(records: dict[str, Any]) -> None:
    for task, splits in records.items():
        for record in [*splits[TRAIN], *splits[DEV]]:
            assert set(record) == {"id", "input", "output", "meta"}
            assert isinstance(record["id"], str)
            assert record["input"].strip()
            assert all(set(output) <= {"answer", "provenance"} and output["answer"] for output in record["output"])
            for evidence in provenance(record):
                span = set() if task == "aidayago2" else SPAN
                assert set(evidence) == {"wikipedia_id", "title"} | span


def test_evidence_stands_at_its_offsets_and_is_one_whole_sentence(
    pages: dict[str, dict[str, Any]], records: dict[str, Any]
) -> None:
    for task, splits in records.items():
        for evidence in (evidence for record in [*splits[TRAIN], *splits[DEV]] for evidence in provenance(record)):
            page = pages[evidence["wikipedia_id"]]
            assert evidence["title"] == page["wikipedia_title"]
            if task == "aidayago2":
                continue
            number = evidence["start_paragraph_id"]
            assert evidence["end_paragraph_id"] == number
            before, sentence = (
                page["text"][number][: evidence["start_character"]],
                page["text"][number][evidence["start_character"] : evidence["end_character"]],
            )
            assert sentence[0].isupper()
            assert sentence.endswith(".")
            assert before == "" or before.endswith(". ")
            headings = [text.strip() for text in page["text"][:number] if text.startswith("Section::::")]
            assert evidence["section"] == (headings[-1] if headings else "Section::::Abstract.")


def test_the_answer_of_slot_filling_stands_in_its_evidence(
    pages: dict[str, dict[str, Any]], records: dict[str, Any]
) -> None:
    for record in records["trex"][DEV]:
        (evidence,) = provenance(record)
        paragraph = pages[evidence["wikipedia_id"]]["text"][evidence["start_paragraph_id"]]
        assert record["output"][0]["answer"] in paragraph[evidence["start_character"] : evidence["end_character"]]


def test_train_sizes_range_from_1_to_30_and_dev_sizes_are_equal(records: dict[str, Any]) -> None:
    train = {task: len(splits[TRAIN]) for task, splits in records.items()}
    assert sum(train.values()) == pytest.approx(6000, rel=0.02)
    assert max(train.values()) / min(train.values()) == pytest.approx(30, rel=0.03)
    assert {len(splits[DEV]) for splits in records.values()} == {80}


def test_sizes_grow_with_the_pages_and_small_worlds_fill_their_files(tmp_path: Path) -> None:
    world = write_world(tmp_path, pages=200, seed=4)
    for task, (train, dev) in world.tasks.items():
        assert len(read(train)) == round(200 * TASKS[task].train_per_page)
        assert len(read(dev)) == 16


def test_a_world_may_have_more_dev_queries_and_then_trains_on_as_many_as_before(tmp_path: Path) -> None:
    world = write_world(tmp_path, pages=200, seed=4, dev_queries=24)
    for task, (train, dev) in world.tasks.items():
        assert len(read(train)) == round(200 * TASKS[task].train_per_page)
        assert len(read(dev)) == 24


def test_more_dev_queries_than_the_pages_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"200 pages have \d+ dev queries of \w+ but 100000 were asked for"):
        write_world(tmp_path, pages=200, seed=4, dev_queries=100_000)


def test_too_few_pages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pages: a generated world has at least 200 pages but got 199"):
        write_world(tmp_path, pages=199, seed=0)


def test_no_input_of_a_task_comes_twice(records: dict[str, Any]) -> None:
    for splits in records.values():
        both = [*splits[TRAIN], *splits[DEV]]
        assert len({record["input"] for record in both}) == len({record["id"] for record in both}) == len(both)


def test_half_of_dev_asks_for_pages_that_are_gold_for_no_training_query(records: dict[str, Any]) -> None:
    trained = {page for splits in records.values() for record in splits[TRAIN] for page in gold(record)}
    for splits in records.values():
        unseen = sum(not gold(record) <= trained for record in splits[DEV])
        assert 0.45 <= unseen / len(splits[DEV]) <= 0.6


def test_trex_and_zsre_want_different_pages_for_the_same_inputs(records: dict[str, Any]) -> None:
    wanted = {
        task: {record["input"]: gold(record) for record in [*records[task][TRAIN], *records[task][DEV]]}
        for task in ("trex", "zsre")
    }
    shared = wanted["trex"].keys() & wanted["zsre"].keys()
    assert len(shared) > 200
    assert all(wanted["trex"][text].isdisjoint(wanted["zsre"][text]) for text in shared)


def test_hotpotqa_needs_two_pages_and_names_only_the_first(records: dict[str, Any]) -> None:
    for record in records["hotpotqa"][DEV]:
        first, second = provenance(record)
        assert first["title"] in record["input"]
        assert second["title"] not in record["input"]


def test_true_claims_may_have_two_evidence_sets_and_some_claims_are_false(records: dict[str, Any]) -> None:
    shapes = Counter(tuple(output["answer"] for output in record["output"]) for record in records["fever"][TRAIN])
    assert set(shapes) == {("SUPPORTS",), ("SUPPORTS", "SUPPORTS"), ("REFUTES",)}
    assert min(shapes.values()) > 100


def test_some_answers_have_a_second_name_without_provenance(records: dict[str, Any]) -> None:
    assert any("provenance" not in output for record in records["nq"][TRAIN] for output in record["output"])


def test_entity_linking_marks_one_mention_and_most_are_surnames_that_others_share(
    pages: dict[str, dict[str, Any]], records: dict[str, Any]
) -> None:
    surnames = Counter(p["wikipedia_title"].split()[-1] for p in pages.values() if p["categories"] == "person")
    shared = 0
    for record in records["aidayago2"][DEV]:
        assert record["input"].count("[START_ENT] ") == record["input"].count(" [END_ENT]") == 1
        mention = record["input"].split("[START_ENT] ")[1].split(" [END_ENT]")[0]
        assert record["output"][0]["answer"].endswith(mention)
        shared += surnames[mention] >= 4
    assert shared > len(records["aidayago2"][DEV]) / 2


def test_dialogues_are_turns_on_lines_and_the_last_names_no_page(
    pages: dict[str, dict[str, Any]], records: dict[str, Any]
) -> None:
    titles = {page["wikipedia_title"] for page in pages.values()}
    stays = 0
    for record in records["wow"][DEV]:
        *earlier, last = record["input"].split("\n")
        assert len(earlier) in (2, 4)
        assert not any(title in last for title in titles)
        stays += provenance(record)[0]["title"] in earlier[-2]
    assert 0.25 < stays / len(records["wow"][DEV]) < 0.75


@given(size=st.integers(1, 400), seed=st.integers(0, 5))
def test_a_shuffle_is_a_permutation_and_inverse_undoes_it(size: int, seed: int) -> None:
    shuffle = Shuffle(size, random.Random(seed))
    assert sorted(shuffle(number) for number in range(size)) == list(range(size))
    assert all(shuffle.inverse(shuffle(number)) == number for number in range(size))


@given(subjects=st.integers(1, 60), objects=st.integers(1, 60), crowd=st.integers(1, 6))
def test_a_link_is_found_from_both_ends(subjects: int, objects: int, crowd: int) -> None:
    link = Link(subjects, objects, crowd, random.Random(0))
    pairs = {(subject, link.object(subject)) for subject in range(subjects)}
    assert pairs == {(subject, object) for object in range(objects) for subject in link.subjects(object)}
    assert len({object for _, object in pairs}) <= -(-objects // crowd)


@pytest.mark.parametrize("pages", [200, 5000, 1_000_000])
def test_titles_of_each_kind_are_distinct_at_any_size(pages: int) -> None:
    encyclopedia = Encyclopedia(pages, seed=0)
    for kind in KINDS:
        count = encyclopedia.count(kind.name)
        numbers = [*range(min(count, 2000)), *range(max(2000, count - 2000), count)]
        titles = [encyclopedia.title(Entity(kind.name, number)) for number in numbers]
        assert len(set(titles)) == len(titles)


def test_a_page_states_its_own_facts_and_those_of_which_it_is_the_value() -> None:
    encyclopedia = Encyclopedia(200, seed=0)
    for row in range(200):
        entity = encyclopedia.entity(row)
        stated = set(encyclopedia.page(entity).evidence)
        assert stated == {fact.key for fact in [*encyclopedia.facts(entity), *encyclopedia.about(entity)]}


def test_wordings_of_one_relation_differ_and_relations_with_objects_have_all_of_them() -> None:
    for relation in RELATIONS:
        assert all(a != b for a, b in combinations([*relation.statements, *relation.questions], 2))
        assert bool(relation.object) == all((relation.reverse, relation.noun, relation.clue)) != bool(relation.values)
        assert len(relation.questions) == 2
