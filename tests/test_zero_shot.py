"""Answering for tasks outside the contract: a bag of four words for what is asked, a real encoder for how."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from taskspec.config import Config, parse_config
from taskspec.data.rows import RowStore
from taskspec.errors import ConfigError, RequestError
from taskspec.evaluate.run import evaluate
from taskspec.evaluate.zero_shot import zero_shot
from taskspec.index.shard import make_shard
from taskspec.model.contract import Contract, ContractTask
from taskspec.model.encoder import TextEncoder, build_encoder, contract_tasks, save_encoder
from taskspec.model.prompts import query_text
from taskspec.retrieve.catalog import Catalog, LocalShards
from taskspec.retrieve.retriever import Retriever

WORDS = ("moon", "ice", "ring", "dust")
PAGES = ("moon", "moon ring", "ice", "ice dust")
QUERIES = {
    "held": [("moon", ["1"]), ("ice", ["2"]), ("dust", ["3"])],
    "out": [("moon", ["0"]), ("ice", ["3"])],
}


def configure(*, trained: Sequence[str]) -> Config:
    tasks = [{"name": "seen"}, {"name": "held", "prompt": "ring", "max_query_tokens": 20}, {"name": "out"}]
    model = {"scratch": {"vocabulary": 200, "width": 16, "layers": 1, "heads": 2}, "pooling": "mean"}
    tree = {"name": "words", "artifacts": "nowhere", "tasks": tasks, "model": model | {"similarity": "cosine"}}
    return parse_config(tree | {"train": {"tasks": list(trained)}, "evaluate": {"top_k": 4, "at": [1]}}, "test")


CONFIG = configure(trained=["seen"])


@pytest.fixture
def prepared(tmp_path: Path) -> SimpleNamespace:
    rows = list(range(len(PAGES)))
    numbers = [str(row) for row in rows]
    passages = {"passage_id": numbers, "page_row": rows, "wikipedia_id": numbers, "title": PAGES, "text": PAGES}
    RowStore.write(tmp_path / "passages", [pa.table(passages)])
    for task, queries in QUERIES.items():
        texts, gold = zip(*queries, strict=True)
        RowStore.write(
            tmp_path / task, [pa.table({"query_id": texts, "text": texts, "gold_pages": [[pages] for pages in gold]})]
        )
    return SimpleNamespace(
        passages=RowStore(tmp_path / "passages"), queries=lambda task, split: RowStore(tmp_path / task)
    )


class WordEncoder:
    """One dimension per word of the query that the task makes of a text."""

    def __init__(self, contract: Contract, asked: list[tuple[ContractTask, ...]]) -> None:
        self.contract = contract
        self.asked = asked

    def with_tasks(self, tasks: Sequence[ContractTask]) -> "WordEncoder":
        self.asked.append(tuple(tasks))
        return WordEncoder(self.contract.model_copy(update={"tasks": tuple(tasks)}), self.asked)

    def embed_queries(self, task: str, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        (one,) = [known for known in self.contract.tasks if known.name == task]
        return bag([query_text(self.contract.prompts, one, text) for text in texts]), np.zeros(len(texts), dtype=bool)


def bag(texts: Sequence[str]) -> np.ndarray:
    return np.array([[text.split().count(word) for word in WORDS] for text in texts], dtype=np.float32)


def contract(tasks: Sequence[ContractTask]) -> Contract:
    return Contract(
        name="words",
        weights="0" * 64,
        tasks=tuple(tasks),
        prompts=CONFIG.prompts,
        pooling="mean",
        similarity="dot",
        max_passage_tokens=16,
        dimension=len(WORDS),
    )


def word_retriever(prepared: SimpleNamespace, asked: list[tuple[ContractTask, ...]]) -> Retriever:
    shard = make_shard("flat", bag(PAGES), row_start=0)
    return Retriever(
        WordEncoder(contract(contract_tasks(CONFIG)), asked), LocalShards([shard]), Catalog(prepared.passages, "abc")
    )


def test_scores_with_prompt_and_without_are_those_worked_out_by_hand(prepared):
    scores = zero_shot(word_retriever(prepared, []), prepared, CONFIG, ["held", "out"])
    # `held` asks for a ring in every query: "moon ring" wins for moon, and ties with "ice" and comes first for ice.
    assert scores == {
        "prompt": {"held": (1, 0, 0), "out": (1, 0)},
        "no prompt": {"held": (0, 1, 1), "out": (1, 0)},
    }


def test_without_prompt_nothing_but_the_prompt_differs(prepared):
    asked: list[tuple[ContractTask, ...]] = []
    zero_shot(word_retriever(prepared, asked), prepared, CONFIG, ["held", "out"])
    own, bare = asked
    assert own == (
        ContractTask(name="held", prompt="ring", max_query_tokens=20, keep="beginning"),
        ContractTask(name="out", prompt="out", max_query_tokens=32, keep="beginning"),
    )
    assert bare == tuple(task.model_copy(update={"prompt": ""}) for task in own)


def test_a_task_that_the_configuration_lacks_is_refused(prepared):
    with pytest.raises(ConfigError, match="unknown task 'trex'; known: seen, held, out"):
        zero_shot(word_retriever(prepared, []), prepared, CONFIG, ["trex"])


def test_the_same_weights_answer_as_if_they_were_trained_with_the_task(prepared, tmp_path):
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS] * 4
    encoder, tokenizer = build_encoder(CONFIG.model, texts, seed=0)
    trained_on = (["seen"], ["seen", "held"])
    seen, trained = (
        TextEncoder(encoder, tokenizer, save_encoder(configure(trained=tasks), encoder, tokenizer, folder))
        for tasks, folder in zip(trained_on, (tmp_path / "seen", tmp_path / "both"), strict=True)
    )
    asked = [task for task in trained.contract.tasks if task.name == "held"]
    found_BD, _ = seen.with_tasks(asked).embed_queries("held", texts)
    np.testing.assert_array_equal(found_BD, trained.embed_queries("held", texts)[0])

    shard = make_shard("flat", seen.embed_passages(PAGES, PAGES), row_start=0)
    retriever = Retriever(seen, LocalShards([shard]), Catalog(prepared.passages, "abc"))
    (row,) = evaluate(
        Retriever(trained, LocalShards([shard]), Catalog(prepared.passages, "abc")),
        prepared,
        ["held"],
        CONFIG.evaluate,
        system="trained",
    )
    scores = zero_shot(retriever, prepared, CONFIG, ["held"])
    assert scores["prompt"]["held"] == row.per_query_rprec
    assert set(row.per_query_rprec) == {0, 1}
    with pytest.raises(RequestError, match="unknown task 'held'; known: seen"):
        retriever.search(["moon"], "held")
