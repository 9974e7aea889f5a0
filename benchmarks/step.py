"""What specialization costs in a training step, against the better of two plain DDP steps on the same global batches.

    python benchmarks/step.py                        # step time, small and medium, 2 workers
    python benchmarks/step.py memory                 # peak memory of each way, checkpoints included, in own processes
    python benchmarks/step.py wire --workers 8       # bytes on the wire
    python benchmarks/step.py growth                 # step time with 16 tasks over that with 2, equal total queries

One run holds all ways and takes a step of each in turn, so what else the machine does meets all alike; ratios are those
of neighbouring steps. T5 encoder, fp32, no dropout, one thread a worker, gloo. Neither Ray nor FAISS is imported. Steps
that are timed do not describe their weights, which a run does every tenth step.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import T5Config, T5EncoderModel

from taskspec.config import Config, parse_config
from taskspec.data.batches import TaskBatch
from taskspec.model.contrastive import allowed_passages, contrastive_loss
from taskspec.model.encoder import Encoder
from taskspec.specialize.collectives import Collectives
from taskspec.specialize.distribution import assign_tasks
from taskspec.specialize.gradients import TaskLoss
from taskspec.train.step import Trainer

QUERY_TOKENS, PASSAGE_TOKENS, PASSAGES_PER_QUERY = 32, 64, 3
TEMPERATURE = 1.0
PLAIN = ("one forward over all tasks", "one forward a task")
DISTRIBUTIONS = ("replicated", "sharded", "task_parallel")


@dataclass(frozen=True)
class Size:
    """A model, and the queries of a task on one worker."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    queries: int


SIZES = {
    "tiny": Size(2000, 64, 2, 2, 2),
    "small": Size(8000, 256, 4, 4, 8),
    "medium": Size(32128, 512, 6, 8, 4),
}


@dataclass(frozen=True)
class Setting:
    """What one run measures."""

    size: Size
    tasks: int
    queries: int
    """Of a task on one worker."""
    steps: int
    whole: bool = False
    """Also what a run does once in a while: describes the weights, compares the workers, takes a checkpoint's state."""


def make_encoder(size: Size) -> Encoder:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size.vocabulary,
        d_model=size.width,
        d_kv=size.width // size.heads,
        d_ff=4 * size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        dropout_rate=0.0,
    )
    return Encoder(T5EncoderModel(config), "mean", "dot")


def whole_batch(setting: Setting, workers: int, step: int, task: int) -> TaskBatch:
    """The batch of one task over all workers: random tokens, every passage of a page of its own."""
    generator = torch.Generator().manual_seed(1000 * step + task)
    queries = setting.queries * workers
    passages = queries * PASSAGES_PER_QUERY

    def tokens(rows: int, length: int) -> Tensor:
        return torch.randint(1, setting.size.vocabulary, (rows, length), generator=generator)

    return TaskBatch(
        query_ids_BL=tokens(queries, QUERY_TOKENS),
        query_mask_BL=torch.ones(queries, QUERY_TOKENS, dtype=torch.int64),
        query_weight_B=torch.full((queries,), 1 / queries),
        gold_page_BG=torch.arange(queries)[:, None],
        passage_ids_NL=tokens(passages, PASSAGE_TOKENS),
        passage_mask_NL=torch.ones(passages, PASSAGE_TOKENS, dtype=torch.int64),
        passage_page_N=torch.arange(passages),
    )


def part_of(batch: TaskBatch, rank: int, workers: int) -> TaskBatch:
    """One worker's part: its queries, their positives, then their negatives."""
    queries = len(batch.query_ids_BL)
    of_query_N = torch.cat([torch.arange(queries), torch.arange(queries).repeat_interleave(PASSAGES_PER_QUERY - 1)])
    mine = slice(rank * queries // workers, (rank + 1) * queries // workers)
    passages = (of_query_N >= mine.start) & (of_query_N < mine.stop)
    return TaskBatch(
        **{
            name: value[mine] if name.startswith(("query", "gold")) else value[passages]
            for name, value in vars(batch).items()
        }
    )


class AllTasks(nn.Module):
    """Plain multitask training in one forward pass: all tasks' queries, then all their passages."""

    def __init__(self, encoder: Encoder, temperature: float, collectives: Collectives) -> None:
        super().__init__()
        self.encoder, self.temperature, self.collectives = encoder, temperature, collectives

    def forward(self, batches: Sequence[TaskBatch]) -> Tensor:
        queries = len(batches[0].query_ids_BL)
        passages = len(batches[0].passage_ids_NL)
        query_all_BD = self.encoder(
            torch.cat([batch.query_ids_BL for batch in batches]), torch.cat([batch.query_mask_BL for batch in batches])
        )
        passage_all_ND = self.encoder(
            torch.cat([batch.passage_ids_NL for batch in batches]),
            torch.cat([batch.passage_mask_NL for batch in batches]),
        )
        losses = []
        own_parts = zip(batches, query_all_BD.split(queries), passage_all_ND.split(passages), strict=True)
        for batch, query_BD, own_ND in own_parts:
            passage_ND = self.collectives.gather(own_ND)
            page_N = self.collectives.gather(batch.passage_page_N)
            first = self.collectives.rank * len(batch.passage_page_N)
            positive_B = torch.arange(first, first + queries)
            allowed_BN = allowed_passages(batch.gold_page_BG, positive_B, page_N)
            loss_B, _ = contrastive_loss(query_BD, passage_ND, positive_B, allowed_BN, self.temperature)
            losses.append(loss_B @ batch.query_weight_B)
        return torch.stack(losses).mean()


class Plain:
    """What a user writes without specialization: DDP, clip, AdamW."""

    def __init__(self, way: str, setting: Setting) -> None:
        encoder = make_encoder(setting.size)
        self.collectives = Collectives()
        self.one_forward = way == PLAIN[0]
        kind = AllTasks if self.one_forward else TaskLoss
        module = kind(encoder, TEMPERATURE, self.collectives)
        self.model: Any = DistributedDataParallel(module) if self.collectives.workers > 1 else module
        self.parameters = list(encoder.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, batches: Sequence[TaskBatch]) -> None:
        self.optimizer.zero_grad()
        if self.one_forward:
            (self.model(batches) * self.collectives.workers).backward()
        else:
            scale = self.collectives.workers / len(batches)
            for batch in batches[:-1]:
                with self.model.no_sync() if self.collectives.workers > 1 else nullcontext():
                    (self.model(batch)[0] * scale).backward()
            (self.model(batches[-1])[0] * scale).backward()
        self.collectives.count_all_reduce(4 * sum(p.numel() for p in self.parameters))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def configuration(setting: Setting, distribution: str, workers: int) -> Config:
    return parse_config(
        {
            "name": "step",
            "artifacts": "none",
            "tasks": [{"name": f"t{number}"} for number in range(setting.tasks)],
            "contrastive": {"temperature": TEMPERATURE},
            "specialization": {"method": "taco", "warmup": 0.0, "min_warmup_steps": 0},
            "train": {
                "distribution": distribution,
                "workers": workers,
                "learning_rate": 1e-4,
                "steps": 10**6,
                "compare_every": 1 if setting.whole else 10**6,
            },
        },
        "benchmark",
    )


def make_step(way: str, setting: Setting, collectives: Collectives) -> tuple[Callable[[int], None], Collectives]:
    """A function that takes the step of that number, its batches made beforehand, and the counter of its bytes."""
    rank, workers = collectives.rank, collectives.workers
    wholes = {
        (step, task): whole_batch(setting, workers, step, task)
        for step in range(setting.steps)
        for task in range(setting.tasks)
    }
    if way in PLAIN:
        plain = Plain(way, setting)
        parts = [
            [part_of(wholes[step, task], rank, workers) for task in range(setting.tasks)]
            for step in range(setting.steps)
        ]
        return (lambda step: plain.step(parts[step])), plain.collectives
    names = [f"t{number}" for number in range(setting.tasks)]
    owners = assign_tasks(dict.fromkeys(names, 1), workers) if way == "task_parallel" and workers > 1 else None
    trainer = Trainer(configuration(setting, way, workers), make_encoder(setting.size), torch.device("cpu"), owners)
    steps = [
        {
            name: wholes[step, task] if owners else part_of(wholes[step, task], rank, workers)
            for task, name in enumerate(names)
            if owners is None or owners[name] == rank
        }
        for step in range(setting.steps)
    ]

    def take(step: int) -> None:
        assert trainer.step(step, steps[step], describe=setting.whole).skipped is None
        if setting.whole:
            trainer.state(keep=rank == 0)

    trainer.settle(steps[0])
    return take, trainer.collectives


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Run = tuple[str, Setting]
"""A way to take a step, and of what."""


def work(rank: int, workers: int, folder: str, steps: int, runs: Mapping[str, Run]) -> None:
    """One process: takes a step of each run in turn. Saves seconds by run and step, bytes sent a step, peak memory."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    made = {name: make_step(way, setting, Collectives()) for name, (way, setting) in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    sent: dict[str, int] = {}
    for step in range(steps):
        for name, (take, collectives) in made.items():
            before = collectives.bytes_sent
            dist.barrier()
            started = time.perf_counter()
            take(step)
            dist.barrier()
            if step:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
            sent[name] = collectives.bytes_sent - before
    torch.save({"seconds": seconds, "sent": sent, "peak": peak_bytes()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def measure(runs: Mapping[str, Run], workers: int) -> list[dict[str, Any]]:
    """What each worker saved."""
    steps = max(setting.steps for _, setting in runs.values())
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (workers, folder, steps, runs), nprocs=workers)
        return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(workers)]


def all_ways(setting: Setting) -> dict[str, Run]:
    return {way: (way, setting) for way in (*PLAIN, *DISTRIBUTIONS)}


def spread(times: Sequence[float], plain: Sequence[float]) -> str:
    """Median and quartiles of the ratios of neighbouring steps."""
    low, middle, high = statistics.quantiles([one / other for one, other in zip(times, plain, strict=True)], n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def step_time(sizes: Sequence[str], tasks: int, workers: int, pairs: int) -> None:
    print(f"step time over the better plain step, median (quartiles) of {pairs} pairs; T = {tasks}, W = {workers}\n")
    print(f"| size | {' | '.join(PLAIN)} | {' | '.join(DISTRIBUTIONS)} |\n|---|{'---|' * 5}")
    for name in sizes:
        size = SIZES[name]
        found = measure(all_ways(Setting(size, tasks, size.queries, pairs + 1)), workers)[0]["seconds"]
        better = min(PLAIN, key=lambda way: statistics.median(found[way]))
        cells = [f"{statistics.median(found[way]):.2f} s" for way in PLAIN]
        for way in DISTRIBUTIONS:
            cells.append(spread(found[way], found[better]))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def memory(name: str, tasks: int, workers: int) -> None:
    size = SIZES[name]
    parameters = sum(parameter.numel() for parameter in make_encoder(size).parameters())
    setting = Setting(size, tasks, size.queries, 2, whole=True)
    peaks = {way: max(one["peak"] for one in measure({way: run}, workers)) for way, run in all_ways(setting).items()}
    better = min(peaks[way] for way in PLAIN)
    print(f"peak memory of a worker, {name} ({parameters / 1e6:.1f} M parameters), T = {tasks}, W = {workers}\n")
    print("| way | GB | bytes a parameter over the plain step that takes less |\n|---|---|---|")
    for way, peak in peaks.items():
        print(f"| {way} | {peak / 1e9:.2f} | {(peak - better) / parameters:+.1f} |")


def wire(tasks: int, workers: int) -> None:
    size = SIZES["tiny"]
    sent = measure(all_ways(Setting(size, tasks, size.queries, 1)), workers)
    total = {way: sum(one["sent"][way] for one in sent) for way in sent[0]["sent"]}
    print(f"bytes on the wire in a step, all workers, over the plain DDP step; T = {tasks}, W = {workers}\n")
    print("| way | MB | ratio |\n|---|---|---|")
    for way, bytes_sent in total.items():
        print(f"| {way} | {bytes_sent / 1e6:.1f} | {bytes_sent / total[PLAIN[1]]:.2f} |")


def growth(workers: int, pairs: int) -> None:
    """Few and many tasks in turn in one run, the plain step of both beside them."""
    size = SIZES["small"]
    few, many = (Setting(size, tasks, size.queries * 8 // tasks, pairs + 1) for tasks in (2, 16))
    ways = ("sharded", PLAIN[0])
    runs = {f"{way}, {one.tasks} tasks": (way, one) for way in ways for one in (few, many)}
    found = measure(runs, workers)[0]["seconds"]
    print(f"step time with 16 tasks over that with 2, small, equal total queries, W = {workers}; {pairs} pairs\n")
    for way in ways:
        print(f"{way}: {spread(found[f'{way}, 16 tasks'], found[f'{way}, 2 tasks'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="time", choices=("time", "memory", "wire", "growth"))
    parser.add_argument("--sizes", nargs="+", default=["small", "medium"], choices=list(SIZES))
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.what == "time":
        step_time(arguments.sizes, arguments.tasks, arguments.workers, arguments.pairs)
    elif arguments.what == "memory":
        memory(arguments.sizes[-1], arguments.tasks, arguments.workers)
    elif arguments.what == "wire":
        wire(arguments.tasks, arguments.workers)
    else:
        growth(arguments.workers, arguments.pairs)


if __name__ == "__main__":
    main()
