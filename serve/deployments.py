"""What Serve runs behind the routes: the query encoder, which batches, and one deployment per shard of the index.

Path: app → encoder → shards → encoder → app. A batch of queries of any requests, tasks and versions is embedded in one
thread while the last one is still being searched; each search goes to all shards once. Requests come checked; nothing
here knows HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import faiss
import numpy as np
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.arguments import ServeArgs
from serve.asks import Ask, Batch, Embedded, Found, FoundAll, Search, Version
from serve.batching import Batcher, LateError
from serve.guard import LOGGING
from serve.remote import RemoteShards, ShardLine
from serve.versions import Table, reopen_version, require_version
from taskspec import artifacts
from taskspec.index.manifest import KIND, LEXICAL_FOLDER, PASSAGES_FILE, IndexManifest
from taskspec.index.page_ids import PAGE_ID_FILES
from taskspec.index.shard import Results
from taskspec.machine import own_cpus
from taskspec.model.encoder import TextEncoder
from taskspec.retrieve.catalog import Catalog, LocalShards
from taskspec.sections import Precision
from taskspec.train.checkpoint import open_encoder

logger = logging.getLogger("ray.serve")

Key = TypeVar("Key", bound=Hashable)
Opened = TypeVar("Opened")
TOP_K_STEPS = (10, 100, 1000)
"""Exact searches for as many results are shared by queries that ask for fewer."""
SEARCH_THREADS = 16
"""Batches that may wait for shards at the same time."""
ENCODER_CPUS = 0.5
"""Logical CPUs that an encoder reserves unless a configuration says otherwise: little, so that any laptop can serve."""
SHARED_CPUS = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}
"""Runtime environment of a replica that has no CPUs to itself: threads that wait for each other sleep; by spinning they
would take the time that other replicas need. A configuration that reserves CPUs for it replaces this too."""
CLOSE_AFTER_S = 60.0
"""How long a version that is wanted no more stays open; longer than a request may take by default."""
RETRY_AFTER_S = 30.0
"""How long after it failed a version that is still wanted is tried again: what was wrong may have been mended."""


class Versions(Generic[Opened]):
    """What a replica has open: what `Aliases` says, which is asked again and again.

    A version that is wanted no more stays open for a while: requests that began with it are still under way.
    """

    def __init__(self, open_one: Callable[[Version], Opened]) -> None:
        self._open_one = open_one
        self._opened: dict[str, Opened] = {}
        self._failed: dict[str, str] = {}
        self._failed_at: dict[str, float] = {}
        self._unwanted: dict[str, float] = {}
        """Since when, by the monotonic clock."""
        self._lock = threading.Lock()
        self._asked = asyncio.Lock()

    def get(self, version: Version) -> Opened:
        """Opens it first where that is new here; safe from threads.    Raises: ArtifactError, StoreError."""
        opened = self._opened.get(version.id)
        if opened is None:
            with self._lock:
                if version.id not in self._opened:
                    self._opened[version.id] = self._open_one(version)
                opened = self._opened[version.id]
        return opened

    async def require(self, version: Version) -> None:
        """Opens it where a request is faster than the table, without keeping other requests from their threads.

        Raises: ArtifactError, StoreError.
        """
        if version.id not in self._opened:
            async with self._asked:
                await asyncio.to_thread(self.get, version)

    async def start(self) -> None:
        """`begin` in a replica of Serve."""
        context = serve.get_replica_context()
        aliases = serve.get_deployment_handle("Aliases", context.app_name)
        await self.begin(partial(aliases.follow.remote, context.deployment, context.replica_tag))

    async def begin(self, say: Callable[..., Awaitable[Table]]) -> None:
        """Opens what is served now, and follows from the first moment: a change meanwhile waits for this replica.

        Args: as of `follow`.    Raises: ArtifactError, StoreError.
        """
        table = await say(frozenset(), {}, None)
        opening = asyncio.create_task(self.keep(table))
        self._following = asyncio.create_task(self.follow(say, table, opening))
        await opening
        await asyncio.to_thread(self.get, table.current.version)  # without it the replica must not start

    async def follow(
        self, say: Callable[..., Awaitable[Table]], table: Table, keeping: asyncio.Task[None] | None = None
    ) -> None:
        """Says again and again what is open, and opens and closes what the answer asks for, for ever.

        Opening takes minutes and goes on beside: a replica that says nothing for long is given up.
        Args: say: (open ids, failures, table known here) → the table. keeping: what is being opened already.
        """
        while True:
            said = frozenset(self._opened), dict(self._failed)
            saying = asyncio.create_task(_awaited(say(*said, table)))
            while not saying.done() and said == (frozenset(self._opened), self._failed):
                under_way = [saying, *([keeping] if keeping else [])]
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                if keeping is not None and keeping.done():
                    keeping = None
            if not saying.done():  # what is open has changed: say so at once
                saying.cancel()
                continue
            try:
                table = saying.result()
            except Exception as error:  # it is being started again: what is open stays open
                logger.warning("Aliases does not answer: %s", type(error).__name__)
                await asyncio.sleep(1)
            if keeping is None:
                keeping = asyncio.create_task(self.keep(table))

    async def keep(self, table: Table) -> None:
        """Opens what is missing, one after the other, and closes what has not been wanted for a while."""
        wanted = {version.id: version for version in table.versions}
        self._failed = {name: reason for name, reason in self._failed.items() if name in wanted}
        for name, version in wanted.items():
            failed_lately = name in self._failed and time.monotonic() - self._failed_at[name] < RETRY_AFTER_S
            if name not in self._opened and not failed_lately:
                try:
                    await asyncio.to_thread(self.get, version)
                except Exception as error:
                    logger.exception("version %s cannot be opened", name)
                    self._failed[name], self._failed_at[name] = str(error), time.monotonic()
            if name in self._opened:
                self._failed.pop(name, None)
        now = time.monotonic()
        self._unwanted = {name: self._unwanted.get(name, now) for name in self._opened.keys() - wanted.keys()}
        for name, since in self._unwanted.items():
            if now - since >= CLOSE_AFTER_S:
                del self._opened[name]


async def _awaited(call: Awaitable[Table]) -> Table:
    """A coroutine, which a task can be made of, of what Serve returns."""
    return await call


@dataclass(frozen=True)
class OpenModel:
    """What an encoder replica needs of a version."""

    encoder: TextEncoder
    catalog: Catalog
    index: IndexManifest


def open_model(version: Version, precision: Precision = "fp32") -> OpenModel:
    """Args: precision: of the encoder.

    Raises: ArtifactError, StoreError; ContractError if the checkpoint is not the one that built the index.
    """
    served = reopen_version(version)
    held = artifacts.read_manifest(version.index, KIND)
    lexical = [name for name in held.files if name.startswith(f"{LEXICAL_FOLDER}/")]
    files = (PASSAGES_FILE, *PAGE_ID_FILES, *lexical)
    artifact = artifacts.open_artifact(version.index, KIND, verify=True, files=files)
    require_version(artifact.id, version)
    catalog = Catalog.open(artifact.folder, served.index, version.id)
    return OpenModel(open_encoder(version.checkpoint, precision=precision), catalog, served.index)


@serve.deployment(
    ray_actor_options={"num_cpus": ENCODER_CPUS, "runtime_env": SHARED_CPUS},
    max_ongoing_requests=256,
    graceful_shutdown_timeout_s=30,
    logging_config=LOGGING,
)
class Encoder:
    """Embeds queries, asks the shards, and makes hits of what they find."""

    async def __init__(self, args: ServeArgs, shards: list[DeploymentHandle]) -> None:  # type: ignore[misc]
        torch.set_num_threads(args.threads or own_cpus())
        self._lines = [
            ShardLine(number, handle.run.remote, handle.ping.remote, args.shard_timeout_ms / 1000)
            for number, handle in enumerate(shards)
        ]
        self._most_tokens = args.batch_tokens
        self._models = Versions(partial(open_model, precision=args.precision))
        self._embedding = ThreadPoolExecutor(1, "embed")
        self._searching = ThreadPoolExecutor(SEARCH_THREADS, "search")
        await self._models.start()
        self._batcher: Batcher[Ask, Embedded, Found] = Batcher(self._embed, self._search, args.batch_tokens)

    async def run(
        self,
        version: Version,
        task: str,
        texts: Sequence[str],
        tokens: Sequence[int],
        search: Search | None,
        left_s: float,
    ) -> FoundAll | None:
        """Args: tokens: of each text, about. left_s: until the deadline.    Returns: None if it is too late.

        Raises: ShardsLostError.
        """
        came = time.monotonic()
        await self._models.require(version)
        asks = [
            (Ask(version, task, tuple(texts[start:stop]), search, came + left_s), sum(tokens[start:stop]))
            for start, stop in _cuts(tokens, self._most_tokens)
        ]
        try:
            parts = await asyncio.gather(*(self._batcher.add(ask, size, ask.deadline) for ask, size in asks))
        except LateError:
            return None
        last = max((part.embedded.batch for part in parts), key=lambda batch: batch.began)
        return FoundAll(
            hits=[hits for part in parts for hits in part.hits or ()],
            embeddings_BD=np.concatenate([part.embedded.embeddings_BD for part in parts])[: 0 if search else None],
            truncated=[bool(cut) for part in parts for cut in part.embedded.truncated_B],
            tokens=sum(int(part.embedded.tokens_B.sum()) for part in parts),
            complete=[complete for part in parts for complete in part.complete],
            failed=frozenset().union(*(part.failed for part in parts)),
            late=frozenset().union(*(part.late for part in parts)),
            last=last,
            wait_ms=(last.began - came) * 1000,
        )

    async def passage(self, version: Version, passage_id: str) -> dict[str, str] | None:
        """One passage by its id."""
        return await asyncio.to_thread(lambda: self._models.get(version).catalog.passage(passage_id))

    async def _embed(self, asks: list[Ask]) -> list[Embedded | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self._embedding, self._embed_batch, asks)

    def _embed_batch(self, asks: Sequence[Ask]) -> list[Embedded | Exception]:
        """Version by version, all tasks together; where that fails half by half: a failure is its request's own."""
        began = time.monotonic()
        parts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray] | Exception] = {}
        groups = deque(_numbers_by(ask.version for ask in asks))
        while groups:
            version, numbers = groups.popleft()
            try:
                encoder = self._models.get(version).encoder
                tasks = [asks[number].task for number in numbers for _ in asks[number].texts]
                texts = [text for number in numbers for text in asks[number].texts]
                queries = encoder.tokenizer.queries_by_task(tasks, texts)
                columns = encoder.embed_tokens(queries), queries.truncated_B, queries.mask_BL.sum(axis=1)
            except Exception as error:
                if len(numbers) == 1:
                    parts[numbers[0]] = error
                else:
                    middle = len(numbers) // 2
                    groups.extend([(version, numbers[:middle]), (version, numbers[middle:])])
                continue
            stops = np.cumsum([len(asks[number].texts) for number in numbers])[:-1]
            parts.update(zip(numbers, zip(*(np.split(column, stops) for column in columns), strict=True), strict=True))
        batch = Batch(began, sum(len(ask.texts) for ask in asks), (time.monotonic() - began) * 1000)
        ordered = [parts[number] for number in range(len(asks))]
        return [part if isinstance(part, Exception) else Embedded(*part, batch) for part in ordered]

    async def _search(self, asks: list[Ask], embedded: list[Embedded]) -> list[Found | Exception]:
        """One search for all asks that can share it; the groups side by side, and none fails with another."""
        loop = asyncio.get_running_loop()
        groups = [numbers for _, numbers in _numbers_by(map(self._group, asks))]

        def search(numbers: list[int]) -> list[Found]:
            return self._search_group([asks[n] for n in numbers], [embedded[n] for n in numbers], loop)

        searches = (loop.run_in_executor(self._searching, search, numbers) for numbers in groups)
        found: dict[int, Found | Exception] = {}
        for numbers, part in zip(groups, await asyncio.gather(*searches, return_exceptions=True), strict=True):
            if isinstance(part, Exception):
                found.update(dict.fromkeys(numbers, part))
            else:
                assert not isinstance(part, BaseException)
                found.update(zip(numbers, part, strict=True))
        return [found[number] for number in range(len(asks))]

    def _group(self, ask: Ask) -> Hashable:
        if ask.search is None:
            return None
        search, model = ask.search, self._models.get(ask.version)
        # Of an exact search the first are the same however many are asked for; else an answer would hang on the others.
        exact = model.index.kind == "flat" and not search.fused
        most = sum(search.top_k > step for step in TOP_K_STEPS) if exact else search.top_k
        what = search.level, search.with_text, search.only_pages, search.without_pages, search.fused
        return ask.version, model.catalog.effort(ask.task), what, most

    def _search_group(
        self, asks: Sequence[Ask], embedded: Sequence[Embedded], loop: asyncio.AbstractEventLoop
    ) -> list[Found]:
        began = time.monotonic()
        first = asks[0]
        if first.search is None:
            return [Found(one, None, [True] * len(one.tokens_B), frozenset(), frozenset()) for one in embedded]
        model = self._models.get(first.version)
        catalog, search = model.catalog, first.search
        pages = catalog.choose_pages(search.only_pages, search.without_pages)
        deadline = max(ask.deadline for ask in asks)
        shards = RemoteShards(self._lines[: len(model.index.shards)], loop, first.version, deadline)
        hits = catalog.search(
            shards,
            np.concatenate([one.embeddings_BD for one in embedded]),
            max(ask.search.top_k for ask in asks if ask.search),
            search.level,
            search.with_text,
            catalog.effort(first.task),
            pages,
            [text for ask in asks for text in ask.texts] if search.fused else None,
        )
        search_ms = (time.monotonic() - began) * 1000
        found, start = [], 0
        for ask, one in zip(asks, embedded, strict=True):
            assert ask.search is not None
            own = [each[: ask.search.top_k] for each in hits[start : start + len(ask.texts)]]
            start += len(ask.texts)
            there_are = min(ask.search.top_k, catalog.count(search.level, pages))
            complete = [not shards.failed and len(each) >= there_are for each in own]
            with_time = replace(one, batch=replace(one.batch, search_ms=search_ms))
            found.append(Found(with_time, own, complete, frozenset(shards.failed), frozenset(shards.late)))
        return found


@serve.deployment(max_ongoing_requests=SEARCH_THREADS, graceful_shutdown_timeout_s=30, logging_config=LOGGING)
class Shard:
    """The shards of an index with this deployment's number, plus any multiple of the number of deployments."""

    async def __init__(self, args: ServeArgs, number: int, of: int) -> None:  # type: ignore[misc]
        # FAISS keeps its number of threads by calling thread.
        threads = args.shard_threads or own_cpus()
        self._searching = ThreadPoolExecutor(SEARCH_THREADS, "search", faiss.omp_set_num_threads, (threads,))
        self._number, self._of = number, of
        self._versions = Versions(self._open)
        await self._versions.start()

    def _open(self, version: Version) -> LocalShards:
        manifest = reopen_version(version).index
        own = manifest.shards[self._number :: self._of]
        artifact = artifacts.open_artifact(version.index, KIND, verify=True, files=[shard.file for shard in own])
        require_version(artifact.id, version)
        return LocalShards.open(artifact.folder, manifest, own)

    async def ping(self) -> None:
        """Answers if a replica is there, and one of its threads is free."""
        await asyncio.get_running_loop().run_in_executor(self._searching, int)

    async def run(self, version: Version, left_s: float, method: str, *arguments: Any) -> Results:
        """`search` or `rank` of `LocalShards`.    Raises: TimeoutError if nobody waits for it any more."""
        deadline = time.monotonic() + left_s
        await self._versions.require(version)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._searching, self._run, version, deadline, method, arguments)

    def _run(self, version: Version, deadline: float, method: str, arguments: tuple[Any, ...]) -> Results:
        shards = self._versions.get(version)
        if time.monotonic() >= deadline:
            raise TimeoutError
        results: Results = getattr(shards, method)(*arguments)
        return results


def _numbers_by(keys: Iterable[Key]) -> list[tuple[Key, list[int]]]:
    """Each distinct key with the numbers of the places where it stands."""
    groups: dict[Key, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.items())


def _cuts(tokens: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Start and stop of runs that have at most so many tokens together, or one text."""
    cuts, start, size = [], 0, 0
    for number, count in enumerate(tokens):
        if number > start and size + count > most:
            cuts.append((start, number))
            start, size = number, 0
        size += count
    return [*cuts, (start, len(tokens))]
