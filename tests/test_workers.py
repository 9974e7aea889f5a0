"""Several workers do what one does: real processes, gloo, float64, no dropout unless a test is about it."""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from taskspec.config import Config, parse_config, with_values
from taskspec.data.batches import BatchMaker, GivenNegatives, StepBatches
from taskspec.data.plan import Plan
from taskspec.data.prepared import PreparedData
from taskspec.errors import TrainingError
from taskspec.model.encoder import Shapes, build_encoder, text_tokenizer
from taskspec.model.lora import add_lora
from taskspec.negatives.bm25 import mine_bm25
from taskspec.specialize import gradients
from taskspec.specialize.collectives import Collectives
from taskspec.specialize.stability import LEAST_UPDATES
from taskspec.train.planning import plan_training
from taskspec.train.step import Trainer
from taskspec.train.worker import task_owners

STEPS = 3
SIZES = {"nq": 5, "fever": 4, "hotpotqa": 3}
"""Queries per step: with two workers, 3 + 2, 2 + 2 and 2 + 1."""
DISTRIBUTIONS = ("replicated", "sharded", "task_parallel")


def configure(config: Config, method: str, **train: Any) -> Config:
    tree = config.model_dump(mode="json")
    tree["model"]["dropout"] = 0.0
    tree["train"] |= {"tasks": list(SIZES), "steps": STEPS, "learning_rate": 1e-3, "compare_every": 1} | train
    tree["specialization"] |= {"method": method, "min_warmup_steps": 0, "warmup": 0.0, "strength": 1.0}
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def negatives(tiny_prepared: PreparedData, tiny_config: Config, tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("negatives") / "bm25")
    mine_bm25(tiny_prepared, tiny_config, uri)
    return uri


class Bench:
    """A trainer with its batches, as one worker of the process group (or one alone) has them."""

    def __init__(self, config: Config, prepared: PreparedData, negatives: str | None = None, seed: int = 0) -> None:
        collectives = Collectives()
        self.rank, self.workers = collectives.rank, collectives.workers
        texts = prepared.passages.take(range(100), ["text"])["text"]
        self.encoder, tokenizer = build_encoder(config.model, texts, seed=seed)
        plan = Plan(0, {task: len(prepared.queries(task, "train")) for task in SIZES}, SIZES)
        owners = task_owners(config, plan, self.workers)
        if config.model.lora:
            add_lora(self.encoder, config.model.lora, seed)
        if config.model.dropout == 0:
            self.encoder.double()
        self.trainer = Trainer(config, self.encoder, torch.device("cpu"), owners)
        self.maker = BatchMaker(
            plan,
            prepared,
            text_tokenizer(config, tokenizer),
            negatives=GivenNegatives(negatives, prepared, tuple(SIZES)) if negatives else None,
            negatives_per_query=2 if negatives else 0,
            rank=0 if owners else self.rank,
            workers=1 if owners else self.workers,
            tasks=[task for task, owner in owners.items() if owner == self.rank] if owners else None,
        )

    @property
    def theta_P(self) -> torch.Tensor:
        return self.trainer.flat.theta_P[: self.trainer.flat.size]

    def run(self, *steps: int) -> None:
        self.trainer.settle(self.maker.step(steps[0]))
        for step in steps:
            self.trainer.step(step, self.maker.step(step))

    def weights_and_state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        weights = {name: value.clone() for name, value in self.encoder.state_dict().items()}
        return weights, {name: value.clone() for name, value in self.trainer.state().items()}


def work(rank: int, workers: int, asked: Any, answered: Any) -> None:
    """One process of a crew: joins a group for each function that it is asked to call, and saves what it returns."""
    torch.set_num_threads(1)
    while (ask := asked.get()) is not None:
        folder, function, arguments = ask
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
            torch.save(function(*arguments), f"{folder}/{rank}.pt")
            dist.destroy_process_group()
            answered.put(None)
        except BaseException:
            answered.put(traceback.format_exc())
            raise


class Crew:
    """Worker processes that stay for many tests: starting them takes longer than most of what they do."""

    def __init__(self, workers: int) -> None:
        context = mp.get_context("spawn")
        self.asked = [context.SimpleQueue() for _ in range(workers)]
        self.answered = context.Queue()
        self.processes = [
            context.Process(target=work, args=(rank, workers, queue, self.answered), daemon=True)
            for rank, queue in enumerate(self.asked)
        ]
        for process in self.processes:
            process.start()

    def call(self, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        for queue in self.asked:
            queue.put((folder, function, arguments))
        for _ in self.asked:
            error = self.answered.get(timeout=200)
            assert error is None, error

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


CREWS: dict[int, Crew] = {}


@pytest.fixture(scope="module", autouse=True)
def _crews() -> Iterator[None]:
    yield
    while CREWS:
        CREWS.popitem()[1].end()


def together(workers: int, folder, function, *arguments) -> list[Any]:
    """What the function returns in each of so many workers."""
    folder.mkdir(exist_ok=True)
    if workers not in CREWS:
        CREWS[workers] = Crew(workers)
    try:
        CREWS[workers].call(str(folder), function, arguments)
    except BaseException:
        CREWS.pop(workers).end()  # the others may wait for one that failed
        raise
    return [torch.load(folder / f"{rank}.pt") for rank in range(workers)]


def train(config: Config, prepared: PreparedData, negatives: str) -> dict[str, torch.Tensor]:
    """Some steps; everything that must not depend on the number of workers."""
    bench = Bench(config, prepared, negatives)
    result = {}
    for step in range(config.train.steps):
        before = bench.theta_P.clone()
        batches = bench.maker.step(step)
        if step == 0:
            bench.trainer.settle(batches)
        said = bench.trainer.step(step, batches, describe=True)
        assert said.skipped is None
        described = vars(said.specialized).values() if said.specialized else (0.0,)  # PCGrad's factors are no shares
        result |= {
            f"loss {step}": said.loss_T,
            f"accuracy {step}": said.accuracy_T,
            f"norm {step}": torch.tensor([said.gradient_norm, said.gradient_ratio], dtype=torch.float64),
            f"described {step}": torch.tensor([1 + value for value in described]),
            f"update {step}": (bench.theta_P - before) / said.learning_rate,
        }
        result |= {f"{name} {step}": value.clone() for name, value in bench.trainer.state().items() if value.any()}
    return result


CASES = [
    (method, distribution, workers, {})
    for method in ("mean", "taco")
    for distribution in DISTRIBUTIONS
    for workers in (2, 3 if distribution == "task_parallel" else 4)
]
"""Method, distribution, workers, what else is set for the workers."""
CASES += [("taco", "sharded", 2, {"model.pooling": "first"})]
CASES += [("taco", name, 2, {"train.chunk_texts": 2}) for name in DISTRIBUTIONS]
CASES += [("taco", "sharded", 2, {"train.gradient_checkpointing": True, "specialization.decay": 0.9})]
CASES += [(method, "sharded", 2, {}) for method in ("pcgrad", "cgd", "gradnorm")]
CASES += [("taco", name, 2, {"model.lora": 2}) for name in ("replicated", "sharded")]
CASES += [("pcgrad", "replicated", 2, {}), ("gradnorm", "task_parallel", 2, {})]
CASES += [("taco", "sharded", 2, {"specialization.shrinkage": True, "train.steps": LEAST_UPDATES + 3})]
CHUNKED = [
    (method, distribution, workers, {"train.chunk_texts": 2})
    for method in ("mean", "taco")
    for distribution, workers in [("replicated", 1), ("replicated", 4), ("sharded", 4), ("task_parallel", 3)]
]
CHUNKED += [("mean", name, 2, {"train.chunk_texts": 2}) for name in DISTRIBUTIONS]
CASES += [pytest.param(*case, marks=pytest.mark.acceptance) for case in CHUNKED]
ROUNDING_ONLY = ("train.chunk_texts", "train.gradient_checkpointing")


@pytest.mark.parametrize(("method", "distribution", "workers", "values"), CASES)
def test_workers_together_do_what_one_does(
    method, distribution, workers, values, tiny_config, tiny_prepared, negatives, tmp_path
):
    plain = {key: value for key, value in values.items() if key not in ROUNDING_ONLY}
    alone = train(with_values(configure(tiny_config, method), plain), tiny_prepared, negatives)
    config = with_values(configure(tiny_config, method, distribution=distribution), values)
    found = together(workers, tmp_path, train, config, tiny_prepared, negatives)
    for name, expected in alone.items():
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), f"{name}: workers drifted apart"
        mine = found[0][name]
        assert expected.abs().max() > 0, name
        if name.startswith("update "):
            # Adam makes a step of any gradient, rounding included: elements whose true gradient is 0 are left out.
            touched = alone[name.replace("update ", "optimizer.exp_avg ")].abs() > 1e-12
            expected, mine = expected[touched], mine[touched]
            assert expected.abs().max() > 0.1, "an Adam step moves a weight by about the learning rate"
        error = (mine.double() - expected.double()).norm() / expected.double().norm()
        assert error < 1e-7, f"{name}: relative difference {error:.1e}"


def train_as_on_gpus(config: Config, prepared: PreparedData, negatives: str) -> dict[str, torch.Tensor]:
    """By the operations that are there for NCCL; gloo has them too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda: "nccl")
        return train(config, prepared, negatives)


def test_the_operations_of_nccl_give_what_those_of_gloo_give(tiny_config, tiny_prepared, negatives, tmp_path):
    config = configure(tiny_config, "taco", distribution="sharded")
    as_on_gpus = together(2, tmp_path / "nccl", train_as_on_gpus, config, tiny_prepared, negatives)
    for mine, theirs in zip(
        together(2, tmp_path / "gloo", train, config, tiny_prepared, negatives), as_on_gpus, strict=True
    ):
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-12)


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


def resume_in_the_middle(config: Config, prepared: PreparedData) -> list[torch.Tensor]:
    """Three steps unbroken; and the last of them again by a trainer that starts from the state before it."""
    unbroken = Bench(config, prepared)
    unbroken.run(*range(STEPS - 1))
    weights, state = unbroken.weights_and_state()
    unbroken.trainer.step(STEPS - 1, unbroken.maker.step(STEPS - 1))
    resumed = Bench(config, prepared, seed=1)
    resumed.encoder.load_state_dict(weights)
    resumed.trainer.load(state)
    resumed.run(STEPS - 1)
    return [unbroken.theta_P, resumed.theta_P]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_three_workers_resume_to_the_same_bits(distribution, tiny_config, tiny_prepared, tmp_path):
    """With three, a sum depends on the order in which the ring adds, and that on how DDP packs its buckets."""
    tree = configure(tiny_config, "taco", distribution=distribution).model_dump(mode="json")
    tree["model"] |= {"dropout": 0.1, "scratch": {"vocabulary": 600, "width": 128, "layers": 4, "heads": 2}}
    for unbroken, resumed in together(3, tmp_path, resume_in_the_middle, parse_config(tree, "test"), tiny_prepared):
        assert torch.equal(unbroken, resumed)


def sent_in_a_step(config: Config, prepared: PreparedData) -> tuple[int, int]:
    """Bytes that were counted, and those that a plan foresees."""
    bench = Bench(config, prepared)
    bench.run(0)
    before = bench.trainer.collectives.bytes_sent
    bench.trainer.step(1, bench.maker.step(1))
    shapes = Shapes([piece.shape for piece in bench.trainer.flat.pieces], frozen=0)
    plan = plan_training(with_values(config, {"train.workers": bench.workers}), bench.maker.plan, shapes)
    return bench.trainer.collectives.bytes_sent - before, plan.sent


@pytest.mark.parametrize("method", ["mean", "taco"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_plan_foresees_the_bytes_on_the_wire(method, distribution, tiny_config, tiny_prepared, tmp_path):
    config = with_values(configure(tiny_config, method, distribution=distribution), {"model.dropout": 0.1})  # fp32
    found = together(2, tmp_path, sent_in_a_step, config, tiny_prepared)
    counted = max(sent for sent, _ in found)  # task-parallel workers with fewer tasks send less
    assert counted == pytest.approx(found[0][1], rel=0.06)  # the rest is gathered embeddings, of a tiny model


def start(config: Config, prepared: PreparedData) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    bench = Bench(config, prepared)
    bench.run(0, 1)
    return bench.weights_and_state()


def go_on(config: Config, prepared: PreparedData, weights: dict, state: dict) -> torch.Tensor:
    """Twenty steps from a state, in learning rates."""
    bench = Bench(config, prepared, seed=1)
    bench.encoder.load_state_dict(weights)
    bench.trainer.load(state)
    before = bench.theta_P.clone()
    bench.run(*range(2, 22))
    return (bench.theta_P - before) / config.train.learning_rate


@pytest.mark.parametrize("method", ["taco", "cgd"])
def test_a_run_goes_on_with_other_workers_and_another_distribution(method, tiny_config, tiny_prepared, tmp_path):
    def config(distribution: str) -> Config:
        base = configure(tiny_config, method, distribution=distribution, steps=22)
        return with_values(base, {"specialization.decay": 0.9})

    weights, state = together(2, tmp_path / "start", start, config("sharded"), tiny_prepared)[0]
    alone = go_on(config("sharded"), tiny_prepared, weights, state)
    assert alone.abs().max() > 5
    # Adam makes a step of any gradient, rounding included: elements whose true gradient is 0 are left out.
    moved = state["optimizer.exp_avg"].abs() > 1e-9
    assert moved.double().mean() > 0.5
    for workers, distribution in ((2, "sharded"), (3, "replicated"), (3, "task_parallel"), (4, "sharded")):
        folder = tmp_path / f"{workers} {distribution}"
        found = together(workers, folder, go_on, config(distribution), tiny_prepared, weights, state)[0]
        error = (found - alone)[moved].norm() / alone[moved].norm()
        assert error < 1e-6, f"{workers} {distribution}: relative difference {error:.1e}"


def spoiled(bench: Bench, step: int, task: str) -> StepBatches:
    batches = bench.maker.step(step)
    if task not in batches:  # another worker has it
        return batches
    return batches | {task: replace(batches[task], query_weight_B=batches[task].query_weight_B * float("nan"))}


def train_with_a_bad_step(config: Config, prepared: PreparedData) -> tuple[list[str | None], int, list[torch.Tensor]]:
    """Eight steps; the seventh has a third task without finite gradient, in the first worker's part only."""
    bench = Bench(config, prepared)
    thetas, skipped = [], []
    for step in range(8):
        bad = step == 6 and (bench.rank == 0 or config.train.distribution == "task_parallel")
        batches = spoiled(bench, step, "hotpotqa") if bad else bench.maker.step(step)
        if step == 0:
            bench.trainer.settle(batches)
        skipped.append(bench.trainer.step(step, batches, describe=True).skipped)
        thetas.append(bench.theta_P.clone())
    return skipped, bench.trainer.bad_steps, thetas


@pytest.mark.parametrize("method", ["mean", "taco"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_all_workers_skip_a_step_whose_gradient_is_not_finite_on_one(
    method, distribution, tiny_config, tiny_prepared, tmp_path
):
    config = configure(tiny_config, method, distribution=distribution, steps=8)
    found = together(2, tmp_path, train_with_a_bad_step, config, tiny_prepared)
    for skipped, bad_steps, thetas in found:
        reason = "step 6: the gradient of task hotpotqa (first in shared.weight) is not finite"
        assert skipped == [None] * 6 + [reason, None]
        assert bad_steps == 1
        assert torch.equal(thetas[6], thetas[5])
        assert not torch.equal(thetas[7], thetas[6])
        assert thetas[7].isfinite().all()
        for mine, first in zip(thetas, found[0][2], strict=True):
            assert torch.equal(mine, first)


def drift(config: Config, prepared: PreparedData) -> list[str]:
    """A weight, or with taco a sensitivity, changes on one worker only, before the second of three steps."""
    bench = Bench(config, prepared)
    said = []
    for step in range(3):
        if step == 1 and bench.rank == 1:
            kept = bench.trainer.method.state().get("mean_TR")
            (bench.theta_P[:1] if kept is None else kept[:1, :1]).add_(1)
        try:
            bench.trainer.step(step, bench.maker.step(step))
        except TrainingError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("method", ["mean", "taco"])
def test_workers_that_drift_apart_are_found_at_the_next_comparison(method, tiny_config, tiny_prepared, tmp_path):
    config = configure(tiny_config, method, compare_every=3, distribution="replicated")  # others gather each step
    for said in together(2, tmp_path, drift, config, tiny_prepared):
        assert said == [
            "step 2: the workers' parameters or sensitivities differ; go on from the last checkpoint, and look for a "
            "worker whose memory or network fails"
        ]


def test_chunks_replay_their_dropout(tiny_config, tiny_prepared, monkeypatch):
    """Whether a chunk's activations are kept or made again, dropout on: the same gradient."""
    config = with_values(configure(tiny_config, "mean", chunk_texts=2), {"model.dropout": 0.2})
    bench = Bench(config, tiny_prepared)
    trainer, batch = bench.trainer, bench.maker.step(0)["nq"]

    def gradient(step: int) -> torch.Tensor:
        grad_P = torch.zeros_like(trainer.flat.theta_P)
        trainer.flat.collect_gradients_in(grad_P)
        trainer._begin(step)
        trainer.task_loss(batch)[0].backward()
        return grad_P

    made_again, other_masks = gradient(0), gradient(1)
    monkeypatch.setattr(gradients, "checkpoint", lambda function, *inputs, use_reentrant: function(*inputs))
    kept = gradient(0)
    assert (made_again - kept).norm() < 1e-5 * kept.norm()
    assert (other_masks - kept).norm() > 0.1 * kept.norm()
