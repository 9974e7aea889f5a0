"""From query rows to a worker's batches, and the stream of them on Ray Data."""

import itertools
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from taskspec import artifacts
from taskspec.config import Config
from taskspec.data.batches import BatchMaker, GivenNegatives, dev_batches, from_bytes, to_bytes
from taskspec.data.prepared import PreparedData
from taskspec.data.stream import stream
from taskspec.errors import ArtifactError, DataError
from taskspec.model.encoder import text_tokenizer, train_tokenizer
from taskspec.negatives.bm25 import mine_bm25
from taskspec.train.worker import TrainJob, make_maker, make_plan


@pytest.fixture(scope="module")
def tokenizer(tiny_config: Config, tiny_prepared: PreparedData):
    return train_tokenizer(tiny_prepared.passages.take(range(150), ["text"])["text"], tiny_config.model.scratch)


@pytest.fixture(scope="module")
def job(tiny_config: Config, tiny_prepared: PreparedData, tmp_path_factory) -> TrainJob:
    negatives = str(tmp_path_factory.mktemp("negatives") / "bm25")
    mine_bm25(tiny_prepared, tiny_config, negatives)
    return TrainJob(tiny_config, tiny_prepared.artifact.uri, negatives, "unused")


def equal(a, b) -> bool:
    return list(a) == list(b) and all(
        torch.equal(value, vars(b[task])[name]) for task, batch in a.items() for name, value in vars(batch).items()
    )


def test_a_step_holds_the_plan_s_queries_with_a_gold_passage_each(job, tokenizer, tiny_prepared):
    maker = make_maker(job, tokenizer, rank=0, workers=1)
    batches = maker.step(7)
    assert list(batches) == [task.name for task in job.config.tasks]
    for task, batch in batches.items():
        rows = maker.plan.rows(task, 7)
        taken = tiny_prepared.queries(task, "train").take(rows, ["gold_page_rows", "text"])
        expected = maker.tokenize.queries(task, taken["text"])
        assert batch.query_ids_BL.tolist() == expected.ids_BL.tolist()
        assert batch.query_weight_B.sum() == pytest.approx(1)
        positives = batch.passage_page_N[: len(rows)].tolist()
        assert all(page in gold for page, gold in zip(positives, taken["gold_page_rows"], strict=True))


def test_negatives_are_of_no_gold_page_of_their_query(job, tokenizer, tiny_prepared):
    maker = make_maker(job, tokenizer, rank=0, workers=1)
    given = GivenNegatives(job.negatives, tiny_prepared, ("nq",))
    pages = tiny_prepared.passages.column("page_row")
    queries = tiny_prepared.queries("nq", "train")
    for step in range(5):
        batch = maker.step(step)["nq"]
        rows = maker.plan.rows("nq", step)
        negatives = batch.passage_page_N[len(rows) :].reshape(len(rows), -1)
        assert negatives.shape[1] == job.config.contrastive.negatives
        for row, found in zip(rows, negatives.tolist(), strict=True):
            gold = set(queries.take([row], ["gold_page_rows"])["gold_page_rows"][0])
            if len(given.of("nq", row)) >= len(found):
                assert not gold & set(found)
                assert set(found) <= set(pages[given.of("nq", row)].tolist())


def test_parts_of_two_workers_are_the_whole_batch_in_order(job, tokenizer):
    whole = make_maker(job, tokenizer, 0, 1).step(3)
    parts = [make_maker(job, tokenizer, rank, 2).step(3) for rank in (0, 1)]
    for task, batch in whole.items():
        real = [part[task].query_weight_B > 0 for part in parts]
        gold = [part[task].gold_page_BG[keep].tolist() for part, keep in zip(parts, real, strict=True)]
        assert [[p for p in row if p >= 0] for row in itertools.chain(*gold)] == [
            [p for p in row if p >= 0] for row in batch.gold_page_BG.tolist()
        ]
        assert sum(float(part[task].query_weight_B.sum()) for part in parts) == pytest.approx(1)
        assert len({len(part[task].query_weight_B) for part in parts}) == 1


def test_batches_travel_as_bytes_unchanged(job, tokenizer):
    batches = make_maker(job, tokenizer, 0, 1).step(0)
    assert equal(from_bytes(to_bytes(batches), tuple(batches)), batches)


def test_the_stream_on_ray_gives_the_steps_in_order_from_any_step(job, tokenizer):
    maker = make_maker(job, tokenizer, 1, 2)
    tasks = tuple(task.name for task in job.config.tasks)
    for start, steps in ((0, 20), (13, 20), (20, 20)):
        streamed = list(stream(partial(make_maker, job, tokenizer, 1, 2), tasks, start, steps))
        assert len(streamed) == steps - start
        assert all(equal(found, maker.step(start + number)) for number, found in enumerate(streamed))


def test_dev_batches_are_fixed_and_split_over_workers(job, tokenizer, tiny_prepared):
    tokenize = text_tokenizer(job.config, tokenizer)
    make = partial(dev_batches, tiny_prepared, tokenize, ("nq", "wow"), queries=7, seed=0)
    assert equal(make(), make())
    parts = [make(rank=rank, workers=2)["nq"] for rank in (0, 1)]
    assert [int((part.query_weight_B > 0).sum()) for part in parts] == [4, 3]
    assert sum(float(part.query_weight_B.sum()) for part in parts) == pytest.approx(1)


def test_negatives_of_other_prepared_data_or_without_a_task_are_refused(job, tiny_prepared, tmp_path):
    with artifacts.publishing(str(tmp_path / "n"), "negatives", inputs={"prepared": "0" * 64}, config={}, facts={}):
        pass
    with pytest.raises(ArtifactError, match=r"was mined from prepared data 000000000000, this is .*; mine again"):
        GivenNegatives(str(tmp_path / "n"), tiny_prepared, ("nq",))
    with pytest.raises(ArtifactError, match="has no negatives for task 'unheard'"):
        GivenNegatives(job.negatives, tiny_prepared, ("unheard",))


def test_negatives_asked_for_and_not_given_are_refused(job, tokenizer, tiny_prepared):
    with pytest.raises(DataError, match=r"contrastive\.negatives is 1 but no negatives are given"):
        BatchMaker(
            make_plan(job.config, tiny_prepared),
            tiny_prepared,
            text_tokenizer(job.config, tokenizer),
            negatives=None,
            negatives_per_query=1,
        )


def test_a_query_without_given_negatives_gets_random_passages(job, tokenizer, tiny_prepared, tmp_path):
    """Values that come from Arrow are read-only, and an empty slice of them is not copied."""
    queries = len(tiny_prepared.queries("nq", "train"))
    with artifacts.publishing(
        str(tmp_path / "n"), "negatives", inputs={"prepared": tiny_prepared.id}, config={}, facts={}
    ) as folder:
        pq.write_table(
            pa.table({"passage_rows": pa.array([[]] * queries, pa.list_(pa.int64()))}), folder / "nq.parquet"
        )
    given = GivenNegatives(str(tmp_path / "n"), tiny_prepared, ("nq",))
    maker = make_maker(job, tokenizer, 0, 1)
    maker.negatives = given
    generator = maker.plan.random("nq", 0)
    drawn = maker._draw("nq", 0, generator)
    assert len(drawn) == job.config.contrastive.negatives
    assert all(0 <= row < len(tiny_prepared.passages) for row in drawn)
