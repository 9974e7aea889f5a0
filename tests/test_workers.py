"""Several workers equal one: real processes, gloo, float64, no dropout."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from taskspec.config import Config, parse_config, with_values
from taskspec.data.batches import BatchMaker, GivenNegatives
from taskspec.data.plan import Plan
from taskspec.data.prepared import PreparedData
from taskspec.model.encoder import build_encoder, text_tokenizer
from taskspec.negatives.bm25 import mine_bm25
from taskspec.train.step import Trainer

STEPS = 3
SIZES = {"nq": 5, "fever": 4, "hotpotqa": 3}
"""Queries per step: with two workers, 3 + 2, 2 + 2 and 2 + 1."""


def configure(config: Config, method: str) -> Config:
    tree = config.model_dump(mode="json")
    tree["model"]["dropout"] = 0.0
    tree["train"] |= {"tasks": list(SIZES), "steps": STEPS, "learning_rate": 1e-3}
    tree["specialization"] |= {"method": method, "min_warmup_steps": 0, "warmup": 0.0, "strength": 1.0}
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def negatives(tiny_prepared: PreparedData, tiny_config: Config, tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("negatives") / "bm25")
    mine_bm25(tiny_prepared, tiny_config, uri)
    return uri


def train(config: Config, prepared: PreparedData, negatives: str, rank: int, workers: int) -> dict[str, torch.Tensor]:
    """Three steps in float64; everything that must not depend on the number of workers."""
    texts = prepared.passages.take(range(100), ["text"])["text"]
    encoder, tokenizer = build_encoder(config.model, texts, seed=0)
    trainer = Trainer(config, encoder.double(), torch.device("cpu"))
    plan = Plan(0, {task: len(prepared.queries(task, "train")) for task in SIZES}, SIZES)
    maker = BatchMaker(
        plan,
        prepared,
        text_tokenizer(config, tokenizer),
        negatives=GivenNegatives(negatives, prepared, tuple(SIZES)),
        negatives_per_query=2,
        rank=rank,
        workers=workers,
    )
    result = {}
    for step in range(STEPS):
        before = trainer.flat.theta_P.clone()
        batches = maker.step(step)
        if step == 0:
            trainer.settle(batches)
        said = trainer.step(step, batches, describe=True)
        result |= {
            f"loss {step}": said.loss_T,
            f"accuracy {step}": said.accuracy_T,
            f"gradient {step}": trainer.grad_TP.clone(),
            f"update {step}": (trainer.flat.theta_P - before) / said.learning_rate,
        }
        result |= {f"{name} {step}": value.clone() for name, value in trainer.method.state().items()}
    return result


def run_worker(rank: int, workers: int, folder: str, config: Config, prepared: PreparedData, negatives: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    torch.save(train(config, prepared, negatives, rank, workers), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("method", "workers", "pooling"),
    [("mean", 2, "mean"), ("taco", 2, "mean"), ("mean", 4, "mean"), ("taco", 4, "mean"), ("taco", 2, "first")],
)
def test_workers_with_parts_of_a_batch_match_one(
    method, workers, pooling, tiny_config, tiny_prepared, negatives, tmp_path
):
    config = with_values(configure(tiny_config, method), {"model.pooling": pooling})
    alone = train(config, tiny_prepared, negatives, 0, 1)
    mp.spawn(run_worker, (workers, str(tmp_path), config, tiny_prepared, negatives), nprocs=workers)
    together = [torch.load(tmp_path / f"{rank}.pt") for rank in range(workers)]
    for name, expected in alone.items():
        for rank in range(1, workers):
            assert torch.equal(together[rank][name], together[0][name]), f"{name}: workers drifted apart"
        found = together[0][name]
        assert expected.abs().max() > 0, name
        if name.startswith("update "):
            touched = alone[name.replace("update ", "gradient ")].abs().max(0).values > 1e-12
            expected, found = expected[touched], found[touched]
            assert expected.abs().max() > 0.1, "an Adam step moves a weight by about the learning rate"
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < 1e-7, f"{name}: relative difference {error:.1e}"


def test_filling_rows_change_nothing(tiny_config, tiny_prepared, negatives):
    """Four workers and a task of three queries: the last worker holds nothing but filling."""
    config = configure(tiny_config, "mean")
    texts = tiny_prepared.passages.take(range(100), ["text"])["text"]
    _, tokenizer = build_encoder(config.model, texts, seed=0)
    plan = Plan(0, {task: len(tiny_prepared.queries(task, "train")) for task in SIZES}, SIZES)
    given = GivenNegatives(negatives, tiny_prepared, tuple(SIZES))
    parts = [
        BatchMaker(
            plan,
            tiny_prepared,
            text_tokenizer(config, tokenizer),
            negatives=given,
            negatives_per_query=2,
            rank=rank,
            workers=4,
        ).step(0)["hotpotqa"]
        for rank in range(4)
    ]
    assert [len(part.query_weight_B) for part in parts] == [1, 1, 1, 1]
    assert sum(float(part.query_weight_B.sum()) for part in parts) == pytest.approx(1.0)
    assert parts[3].query_weight_B.tolist() == [0.0]
    assert parts[3].passage_page_N.tolist() == [-1, -1, -1]


def resume_in_the_middle(rank: int, workers: int, folder: str, config: Config, prepared: PreparedData) -> None:
    """Three steps unbroken; and the last of them again by a trainer that starts from the state before it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    texts = prepared.passages.take(range(100), ["text"])["text"]
    plan = Plan(0, {task: len(prepared.queries(task, "train")) for task in SIZES}, SIZES)
    encoder, tokenizer = build_encoder(config.model, texts, seed=0)
    tokenize = text_tokenizer(config, tokenizer)
    maker = BatchMaker(plan, prepared, tokenize, negatives=None, negatives_per_query=0, rank=rank, workers=workers)
    trainer = Trainer(config, encoder, torch.device("cpu"))
    trainer.settle(maker.step(0))
    for step in range(STEPS - 1):
        trainer.step(step, maker.step(step))
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = {name: value.clone() for name, value in trainer.state().items()}
    trainer.step(STEPS - 1, maker.step(STEPS - 1))

    again, _ = build_encoder(config.model, texts, seed=1)
    again.load_state_dict(weights)
    resumed = Trainer(config, again, torch.device("cpu"))
    resumed.load(state)
    resumed.settle(maker.step(STEPS - 1))
    resumed.step(STEPS - 1, maker.step(STEPS - 1))
    torch.save([trainer.flat.theta_P, resumed.flat.theta_P], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_three_workers_resume_to_the_same_bits(tiny_config, tiny_prepared, tmp_path):
    """With three, a sum depends on the order in which the ring adds, and that on how DDP packs its buckets."""
    tree = configure(tiny_config, "taco").model_dump(mode="json")
    tree["model"] |= {"dropout": 0.1, "scratch": {"vocabulary": 600, "width": 128, "layers": 4, "heads": 2}}
    config = parse_config(tree, "test")
    mp.spawn(resume_in_the_middle, (3, str(tmp_path), config, tiny_prepared), nprocs=3)
    for rank in range(3):
        unbroken, resumed = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(unbroken, resumed)
