"""What embedding, exact search and serving cost, each beside its plain baseline in the same run.

    python benchmarks/serve.py prepare     # six real tasks, MiniLM as it comes, two shards: see minikilt.yaml
    python benchmarks/serve.py embed       # jobs.index past its start-up, beside sentence-transformers
    python benchmarks/serve.py search      # a batch over two shards, beside one FAISS call
    python benchmarks/serve.py endpoint    # served queries a second, beside one process and an afternoon's server
    python benchmarks/serve.py scale       # replicas and p95 while the load rises and falls: scaling.png
    python benchmarks/serve.py recall      # of an approximate index as served, beside what its manifest says

`embed` and `endpoint` need `pip install sentence-transformers`. Server and client share the machine; what the client
takes of it is printed too.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import faiss
import numpy as np
import scaling
import yaml
from load import TOP_K, closed_loop, open_loop, requests
from transformers import AutoTokenizer

from jobs.quickstart import serving
from taskspec import artifacts, cluster, store
from taskspec.config import Config, load_config, with_values
from taskspec.data.prepared import PreparedData
from taskspec.errors import TaskspecError
from taskspec.index import build
from taskspec.index.manifest import KIND, IndexManifest
from taskspec.index.shard import Shard, load_shard, merge_top_k
from taskspec.model.contract import Contract
from taskspec.retrieve.client import Client
from taskspec.retrieve.retriever import Retriever
from taskspec.sections import Precision

CONFIG = Path(__file__).with_name("minikilt.yaml")
QUERIES_A_REQUEST = 16
AFTERNOON_PORT = 8123
KEEPS_UP = 0.95
"""Share of the queries asked in a second that have to be answered in one, or the rate is past the knee."""


def places(config: Config) -> dict[str, str]:
    root = config.artifacts
    return {
        "prepared": store.join(root, "prepared"),
        "run": store.join(root, "runs", "untrained"),
        "checkpoint": store.join(root, "runs", "untrained", "step-00000000"),
        "index": store.join(root, "served-index"),
    }


def prepare(config: Config, path: str, overrides: Sequence[str]) -> None:
    """The artifacts that the others use; run again it makes what is missing."""
    at = places(config)
    common = ["--config", path, *(word for one in overrides for word in ("--set", one))]
    untrained = ["train.steps=0", "specialization.method=mean", "contrastive.negatives=0"]
    for job, words in (
        ("prepare", []),
        ("train", ["--out", at["run"], *(word for one in untrained for word in ("--set", one))]),
        ("index", ["--checkpoint", at["checkpoint"], "--out", at["index"], "--set", "index.shards=2"]),
    ):
        subprocess.run([sys.executable, "-m", f"jobs.{job}", *common, *words], check=True)


def ratio(name: str, ours: Sequence[float], plain: Sequence[float]) -> None:
    """Prints how many times as fast ours is, of runs in turn."""
    ratios = sorted(b / a for a, b in zip(ours, plain, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(f"{name}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) times the plain one, {len(ratios)} pairs")


def embed(config: Config, pairs: int, passages: int) -> None:
    """Seconds for the same passages by one process with every core."""
    from sentence_transformers import SentenceTransformer

    at = places(config)
    opened = artifacts.open_artifact(at["checkpoint"], "checkpoint")
    contract = Contract.model_validate(opened.manifest.facts["contract"])
    prepared = PreparedData.open(at["prepared"])
    source = build.Source(config, opened, contract, prepared)
    cluster.connect(config.cluster)
    texts = prepared.passages.take(range(passages), ["title", "text"])
    written = [f"{title} {text}" for title, text in zip(texts["title"], texts["text"], strict=True)]
    plain_model = SentenceTransformer(config.model.source, device="cpu")
    plain_model.max_seq_length = config.model.max_passage_tokens
    ours, plain = [], []
    for _ in range(pairs):
        ours.append(job_seconds(source, passages))
        started = time.perf_counter()
        theirs_ND = plain_model.encode(written, batch_size=32, normalize_embeddings=True)
        plain.append(time.perf_counter() - started)
    own_ND = np.concatenate(list(build._embedded(source, [build.PlannedShard("", 0, 64)])))
    error = float(np.abs(own_ND - theirs_ND[:64]).max())
    print(f"the same embeddings to {error:.1e}; jobs.index {passages / min(ours):.0f}/s, {config.index.precision}")
    ratio("embedding", ours, plain)


def job_seconds(source: build.Source, passages: int) -> float:
    """Of the job's stream, from its first block on, for as many passages."""
    blocks = build._embedded(source, [build.PlannedShard("", 0, passages)])
    first = len(next(blocks))
    started = time.perf_counter()
    rest = sum(map(len, blocks))
    return (time.perf_counter() - started) * (first + rest) / rest


def own_shards(config: Config) -> list[Shard]:
    at = places(config)
    artifact = artifacts.open_artifact(at["index"], KIND)
    manifest = IndexManifest.of(at["index"], artifact.manifest)
    return [load_shard(artifact.folder / s.file, manifest.kind, s.row_start, s.max_norm) for s in manifest.shards]


def one_index(config: Config) -> faiss.IndexFlatIP:
    """All passages in one exact index of FAISS's."""
    shards = own_shards(config)
    one = faiss.IndexFlatIP(shards[0].index.d)
    for shard in shards:
        one.add(shard.index.reconstruct_n(0, shard.rows))
    return one


def search(config: Config, pairs: int, batch: int) -> None:
    """Seconds for the best 10 of a batch, exact, by as many threads as FAISS takes."""
    at = places(config)
    shards, one = own_shards(config), one_index(config)
    retriever = Retriever.open(at["checkpoint"], at["index"])
    queries_BD, _ = retriever.embed("nq", questions(config)["nq"][:batch])
    ours, plain = [], []
    for _ in range(pairs):
        started = time.perf_counter()
        own = merge_top_k([shard.search(queries_BD, TOP_K) for shard in shards], TOP_K)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        _, rows_BK = one.search(queries_BD, TOP_K)
        plain.append(time.perf_counter() - started)
    agree = float((own.rows_BK == rows_BK).mean())
    print(f"{len(queries_BD)} queries, {one.ntotal:,} passages, {len(shards)} shards; {100 * agree:.1f}% of rows alike")
    ratio("exact search", ours, plain)


def questions(config: Config) -> dict[str, list[str]]:
    """Task → its dev queries, none twice, as much of them as the task takes: so that no server has to cut any."""
    prepared = PreparedData.open(places(config)["prepared"])
    tokenizer = AutoTokenizer.from_pretrained(config.model.source)
    found = {}
    for task in config.tasks:
        queries = prepared.queries(task.name, "dev")
        prompt = tokenizer(config.prompts.query.format(prompt=task.name, text=""))["input_ids"]
        most = task.max_query_tokens - len(prompt)
        texts = []
        for text in queries.take(range(len(queries)), ["text"])["text"]:
            spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if len(spans) > most:
                text = text[spans[-most][0] :] if task.keep == "end" else text[: spans[most - 1][1]]
            texts.append(text)
        found[task.name] = list(dict.fromkeys(texts))
    return found


def floor(
    config: Config, asked: Mapping[str, Sequence[str]], batch: int, seconds: float, precision: Precision
) -> float:
    """Queries a second of the encoder's forward pass and one FAISS search in this process, a batch of one task at a
    time; no texts or exact scores are made of what is found."""
    at = places(config)
    retriever, one = Retriever.open(at["checkpoint"], at["index"], precision), one_index(config)
    batches = [
        (task, texts[start : start + batch])
        for task, texts in asked.items()
        for start in range(0, len(texts) - batch + 1, batch)
    ]
    done, began = 0, time.monotonic()
    for task, texts in batches * 1000:
        one.search(retriever.embed(task, texts)[0], TOP_K)
        done += len(texts)
        if time.monotonic() - began > seconds:
            break
    return done / (time.monotonic() - began)


def write_settings(
    config: Config, args: Mapping[str, Any] | None = None, deployments: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """A Serve config of the prepared index on loopback, without a cache.    Returns: its path."""
    at = places(config)
    application = {
        "import_path": "serve.app:build",
        "args": {"checkpoint": at["checkpoint"], "index": at["index"], "cache_bytes": 0, **(args or {})},
        "deployments": list(deployments),
    }
    content = {"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [application]}
    path = Path(config.artifacts) / "benchmark-serve.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


async def endpoint(config: Config, seconds: float, precision: Precision) -> None:
    """Args: precision: of the queries' embedding, in one process and served; the afternoon's server has fp32."""
    asked = questions(config)
    settings = write_settings(config, args={"precision": precision})
    batches: list[int] = []
    """Queries that were embedded together with each request's last one."""

    # Ray runs its workers at nice 15, which would starve them beside the client on the same machine.
    os.environ |= {"RAY_worker_niceness": "0"}
    physical = {batch: floor(config, asked, batch, seconds, precision) for batch in (1, 16, 32, 64)}
    print(
        f"one process, encoder in {precision} and search:",
        {batch: f"{rate:.1f} queries/s" for batch, rate in physical.items()},
    )
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
        with serving(settings) as url:
            send = requests(session, url, asked, QUERIES_A_REQUEST, batches)
            await closed_loop(send, 2, 5)  # warm
            batches.clear()
            best, of_batch = 0.0, 1.0
            for clients in (1, 2, 4, 8):
                load = await closed_loop(send, clients, seconds)
                together = statistics.fmean(batches)
                name = f"{QUERIES_A_REQUEST} a request, {clients} clients"
                print(f"{load.line(name)}, {together:.0f} queries a batch", flush=True)
                batches.clear()
                best, of_batch = max((best, of_batch), (load.rate, together))
            knee = 0.0
            for share in (0.5, 0.7, 0.8, 0.9, 1.0, 1.1):
                rate = share * best / QUERIES_A_REQUEST
                load = await open_loop(send, rate, seconds)
                print(load.line(f"open loop, {share:.0%} of that"), flush=True)
                if not load.failed and load.rate > KEEPS_UP * share * best:
                    knee = max(knee, load.rate)
            ours = await closed_loop(requests(session, url, asked, 1, batches), 32, seconds)
            print(ours.line("single queries, 32 clients"), flush=True)
        like = min(physical, key=lambda batch: abs(math.log(batch / of_batch)))
        print(f"the most served over one process at batches of {like}: {best / physical[like]:.2f}", flush=True)
        print(f"served at the knee, the highest rate kept up with, over the same: {knee / physical[like]:.2f}")
        with afternoon(config) as url:
            await closed_loop(requests(session, url, asked, 1), 4, 5)
            plain = await closed_loop(requests(session, url, asked, 1), 32, seconds)
            print(plain.line("the afternoon's, 32 clients"), flush=True)
    slower = ours.percentile(99) / plain.percentile(99)
    print(f"single queries over the afternoon's: {ours.rate / plain.rate:.2f}, p99 {slower:.2f} times its")


async def scale(config: Config) -> None:
    """One replica of the encoder is asked for less than it can do, then for more, then for less again."""
    settings = write_settings(config, args={"threads": 1, "shard_threads": 1}, deployments=[scaling.ENCODER])
    os.environ |= {"RAY_worker_niceness": "0"}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:
        with serving(settings) as url:
            send = requests(session, url, questions(config), QUERIES_A_REQUEST, [])
            await closed_loop(send, 1, 5)  # warm
            alone = await closed_loop(send, 2, 20)  # too few to grow for
            print(alone.line("one replica, 2 clients"), flush=True)
            rate = alone.rate / QUERIES_A_REQUEST
            sent, replicas = await scaling.follow(send, [(0.4 * rate, 60), (1.25 * rate, 120), (0.4 * rate, 120)])
    scaling.save(Path(__file__).parent, sent, replicas)
    failed = sum(not one.queries for one in sent)
    print(f"{len(sent)} requests, {failed} failed; replicas from {min(replicas)[1]} to {max(n for _, n in replicas)}")


def recall(config: Config, path: str, overrides: Sequence[str], kind: str) -> None:
    """Builds an index of that kind and asks it, as it is served, all dev queries: the share of the exact best passages
    that it finds, by FAISS's own exact search."""
    at = places(config) | {"index": store.join(config.artifacts, f"served-index-{kind}")}
    shape = [f"index.kind={kind}", "index.shards=2"]
    words = ["--config", path, *(word for one in [*overrides, *shape] for word in ("--set", one))]
    job = [sys.executable, "-m", "jobs.index", *words, "--checkpoint", at["checkpoint"], "--out", at["index"]]
    subprocess.run(job, check=True)
    said = IndexManifest.of(at["index"], artifacts.read_manifest(at["index"], KIND)).recall
    retriever, one = Retriever.open(at["checkpoint"], places(config)["index"]), one_index(config)
    passages = PreparedData.open(at["prepared"]).passages
    inside = 0
    settings = write_settings(config, args={"index": at["index"]})
    with serving(settings) as url, Client(url, timeout_s=120) as client:
        for task, texts in questions(config).items():
            shares = []
            for start in range(0, len(texts), 64):
                some = texts[start : start + 64]
                _, rows_BK = one.search(retriever.embed(task, some)[0], said.at)
                for rows, answer in zip(
                    rows_BK, client.retrieve(some, task, top_k=said.at, level="passage"), strict=True
                ):
                    right = set(passages.take(rows, ["passage_id"])["passage_id"])
                    shares.append(len(right & {hit.id for hit in answer.hits}) / said.at)
            found, told = statistics.fmean(shares), said.tasks[task]
            inside += told.low <= found <= told.high
            by_manifest = f"{told.value:.3f} ({told.low:.3f} to {told.high:.3f}), {told.queries} of them"
            print(f"{task:12} {found:.3f}, {len(texts)} queries; by the manifest {by_manifest}")
    print(f"recall@{said.at} of kind {kind}: within the manifest's interval for {inside} of {len(said.tasks)} tasks")


@contextmanager
def afternoon(config: Config) -> Iterator[str]:
    """The afternoon's server, until the block ends.    Gives: its URL."""
    environment = os.environ | {"MODEL": str(config.model.source), "INDEX": places(config)["index"]}
    command = [sys.executable, "-m", "uvicorn", "benchmarks.afternoon:app", "--port", str(AFTERNOON_PORT)]
    server = subprocess.Popen([*command, "--log-level", "warning"], env=environment)
    url = f"http://127.0.0.1:{AFTERNOON_PORT}"
    try:
        deadline = time.monotonic() + 120
        import httpx

        while True:
            try:
                httpx.get(f"{url}/docs", timeout=5)
                break
            except httpx.TransportError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "embed", "search", "endpoint", "scale", "recall"])
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--passages", type=int, default=4096, help="for embed")
    parser.add_argument("--batch", type=int, default=64, help="for search")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of queries, for endpoint")
    parser.add_argument("--kind", default="ivf", help="for recall")
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except TaskspecError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def run(arguments: argparse.Namespace) -> None:
    tree = load_config(arguments.config, arguments.overrides).model_dump(mode="json")
    tree["artifacts"] = store.absolute(tree["artifacts"])
    config = Config.model_validate(tree)
    if arguments.what == "prepare":
        prepare(config, arguments.config, arguments.overrides)
    elif arguments.what == "embed":
        for precision in ("fp32", "bf16"):
            embed(with_values(config, {"index.precision": precision}), arguments.pairs, arguments.passages)
    elif arguments.what == "search":
        search(config, arguments.pairs, arguments.batch)
    elif arguments.what == "recall":
        recall(config, arguments.config, arguments.overrides, arguments.kind)
    elif arguments.what == "scale":
        asyncio.run(scale(config))
    else:
        asyncio.run(endpoint(config, arguments.seconds, arguments.precision))


if __name__ == "__main__":
    main()
