"""Which version is served, and how it changes while requests go on.

Path: alias file, `PUT /aliases` → [here] → what every replica has open, and which version answers which query.

One replica of `Aliases` holds the state; a small file is the truth that outlives it, changed by compare-and-swap, with
a log beside it that is only added to. All other replicas ask it again and again what to have open (`follow`), which
also tells it what they have. A new version is opened by all of them beside the old one, tried with golden queries on
the serving path, and only then answers; requests that are under way end on the version that they began with, and the
last version stays open, so that going back is as quick as going on.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.admission import query_tokens
from serve.arguments import ServeArgs
from serve.asks import FoundAll, Search, Version
from serve.errors import Conflict
from serve.schema import AliasRequest, AliasResponse, Compared, VersionInfo
from taskspec import artifacts, store
from taskspec.errors import StoreError, TaskspecError
from taskspec.evaluate.metrics import r_precision
from taskspec.index.golden import GOLDEN_FILE, read_golden
from taskspec.index.manifest import KIND, IndexManifest
from taskspec.model.contract import Contract
from taskspec.retrieve.catalog import index_version
from taskspec.train.checkpoint import read_contract

FOLLOW_S = 5.0
"""How long `follow` waits for a change before it answers the same again."""
Status = Literal["served", "loading", "trying", "refused"]
LOST_AFTER_S = 3 * FOLLOW_S
"""A replica that has not asked for so long is no longer waited for."""
OPEN_TIMEOUT_S = 1800.0
"""How long replicas may take to open a version."""
GOLDEN_TIMEOUT_S = 60.0
GOLDEN_AT_A_TIME = 4
"""Golden queries of a task that are asked together: beside the traffic, not instead of it."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Served:
    """What the routes know of a version."""

    version: Version
    contract: Contract
    index: IndexManifest


def open_version(checkpoint: str, index: str) -> Served:
    """Raises: ContractError, ArtifactError, StoreError."""
    contract, manifest = read_contract(checkpoint), artifacts.read_manifest(index, KIND)
    facts = IndexManifest.of(index, manifest)
    facts.require_built_by(contract, checkpoint, index)
    return Served(Version(index_version(manifest.id), checkpoint, index), contract, facts)


@dataclass(frozen=True)
class Table:
    """What the replicas go by."""

    revision: int
    current: Served
    candidate: Served | None = None
    shares: dict[str, int] = field(default_factory=dict)
    shadow: bool = False
    opened: tuple[Version, ...] = ()
    """Beside these two: what is being brought in, and the last one."""

    @property
    def versions(self) -> list[Version]:
        """To have open."""
        candidate = [self.candidate.version] if self.candidate else []
        return list(dict.fromkeys([self.current.version, *candidate, *self.opened]))

    def serving(self, task: str, text: str) -> Served:
        """The version that answers a query: the same one for the same query."""
        if self.candidate and zlib.crc32(text.encode()) % 100 < self.shares.get(task, 0):
            return self.candidate
        return self.current


class AliasFile:
    """`<folder>/<alias>.json`, and `<folder>/<alias>/log/…json` beside it."""

    def __init__(self, folder: str, alias: str) -> None:
        self.uri = store.join(folder, f"{alias}.json")
        self._log = store.join(folder, alias, "log")
        self._held: bytes | None = None

    def read(self) -> dict[str, Any] | None:
        """None if there is none yet.    Raises: StoreError."""
        if not store.exists(self.uri):
            return None
        self._held = store.read_bytes(self.uri)
        tree: dict[str, Any] = json.loads(self._held)
        return tree

    def write(self, table: Table) -> None:
        """Raises: Conflict if somebody else has changed it since it was read or written; StoreError."""
        tree = {
            "revision": table.revision,
            "current": _uris(table.current),
            "candidate": table.candidate and _uris(table.candidate),
            "shares": table.shares,
            "shadow": table.shadow,
        }
        content = json.dumps(tree, indent=1).encode()
        if not store.swap(self.uri, self._held, content):
            raise Conflict(f"{self.uri} was changed by another endpoint; ask for its state, then again")
        self._held = content

    def log(self, **entry: Any) -> None:
        now = datetime.datetime.now(datetime.UTC)
        name = store.join(self._log, f"{now.strftime('%Y%m%dT%H%M%S.%fZ')}.json")
        store.write_bytes(name, json.dumps({"time": now.isoformat(), **entry}, indent=1).encode())


def _uris(served: Served) -> dict[str, str]:
    return {"checkpoint": served.version.checkpoint, "index": served.version.index}


@dataclass
class Follower:
    """What is known of a replica."""

    has: frozenset[str]
    failed: dict[str, str]
    """Version → why it could not be opened."""
    seen: float = field(default_factory=time.monotonic)


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000)
class Aliases:
    """The state of the alias that is served."""

    async def __init__(self, args: ServeArgs, served: Served) -> None:
        self._file = AliasFile(args.aliases, args.alias) if args.aliases else None
        self._alias = args.alias
        self._table = Table(0, served)
        self._changed = asyncio.Condition()
        self._followers: dict[tuple[str, str], Follower] = {}
        self._compared: dict[str, Compared] = {}
        self._golden: dict[str, dict[str, float]] = {}
        self._status: Status = "served"
        self._reason: str | None = None
        self._task: asyncio.Task[None] | None = None
        if self._file:
            self._table = await asyncio.to_thread(self._first_table, self._file, served)

    @staticmethod
    def _first_table(file: AliasFile, served: Served) -> Table:
        """What the file says; the first endpoint writes it."""
        tree = file.read()
        if tree is None:
            table = Table(1, served)
            try:
                file.write(table)
            except Conflict:  # another endpoint was faster
                tree = file.read()
            else:
                file.log(who=None, revision=1, action="begin", version=served.version.id, **_uris(served))
                return table
        assert tree is not None
        current = open_version(**tree["current"])
        if current.version != served.version:
            logger.warning("%s points to version %s, which is served", file.uri, current.version.id)
        candidate = open_version(**tree["candidate"]) if tree["candidate"] else None
        return Table(tree["revision"], current, candidate, tree["shares"], tree["shadow"])

    async def table(self, known: Table | None = None) -> Table:
        """The table, once it is another than the one that is known, or after a while."""
        async with self._changed:
            if known is not None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait_for(lambda: self._table != known), FOLLOW_S)
            return self._table

    async def follow(
        self, deployment: str, replica: str, has: frozenset[str], failed: dict[str, str], known: Table | None
    ) -> Table:
        """`table`, for a replica that opens versions: says what it has open, and what it could not open."""
        async with self._changed:
            self._followers[deployment, replica] = Follower(has, failed)
            self._changed.notify_all()
        return await self.table(known)

    async def compare(self, task: str, version: str, overlaps: Sequence[float]) -> None:
        """Counts how far the candidate's hits agree with the current version's."""
        if self._table.candidate and self._table.candidate.version.id == version:
            before = self._compared.get(task, Compared(queries=0, overlap=0.0))
            count = before.queries + len(overlaps)
            if count:
                mean = (before.overlap * before.queries + sum(overlaps)) / count
                self._compared[task] = Compared(queries=count, overlap=mean)

    async def state(self) -> AliasResponse:
        candidate = self._table.candidate
        return AliasResponse(
            alias=self._alias,
            revision=self._table.revision,
            current=_info(self._table.current),
            candidate=_info(candidate) if candidate else None,
            shares=self._table.shares,
            shadow=self._table.shadow,
            compared=self._compared,
            status=self._status,
            reason=self._reason,
            golden=self._golden,
        )

    async def change(self, request: AliasRequest, who: str) -> AliasResponse:
        """Begins a change, which goes on by itself.    Raises: Conflict; ContractError, ArtifactError, StoreError."""
        if self._file is None:
            raise Conflict("versions are not changed here: start the endpoint with aliases=FOLDER")
        if self._task is not None and not self._task.done():
            raise Conflict(f"the alias {self._alias} is being changed: {self._status}; ask again when that is done")
        if request.expected != self._table.current.version.id:
            raise Conflict(
                f"the alias {self._alias} points to version {self._table.current.version.id}, not to {request.expected}"
            )
        self._status, self._reason = "loading", None
        self._task = asyncio.get_running_loop().create_task(self._change(self._file, request, who))
        await asyncio.sleep(0)
        return await self.state()

    async def _change(self, file: AliasFile, request: AliasRequest, who: str) -> None:
        """Opens, tries and serves a version, or refuses it and leaves everything as it was."""
        before = self._table
        entry: dict[str, Any] = {"who": who, "request": request.model_dump()}
        try:
            new = await asyncio.to_thread(open_version, request.checkpoint, request.index)
            after = await self._bring_in(before, new, request)
            await asyncio.to_thread(file.write, after)
            entry |= {"action": "serve", "revision": after.revision, "version": new.version.id, "golden": self._golden}
            if after.candidate != before.candidate:
                self._compared.clear()
            await self._set(after)
            self._status = "served"
        except Exception as error:
            self._status = "refused"
            self._reason = str(error) if isinstance(error, TaskspecError) else f"{type(error).__name__}: {error}"
            entry |= {"action": "refuse", "revision": before.revision, "reason": self._reason}
            if not isinstance(error, TaskspecError):
                logger.exception("changing the alias failed")
            await self._set(before)
        try:
            await asyncio.to_thread(file.log, **entry)
        except StoreError:
            logger.exception("the log of the alias could not be written")

    async def _bring_in(self, before: Table, new: Served, request: AliasRequest) -> Table:
        """Returns: the table to serve by.    Raises: TaskspecError if the new version must not answer."""
        tasks = [task.name for task in before.current.contract.tasks]
        have = [task.name for task in new.contract.tasks]
        lost = [task for task in tasks if task not in have]
        unknown = [task for task in request.shares if task not in tasks]
        if lost:
            raise Conflict(f"version {new.version.id} has no task {lost[0]}, which is served; it has {', '.join(have)}")
        if unknown:
            raise Conflict(f"shares: unknown task {unknown[0]!r}; known: {', '.join(tasks)}")
        if new.version != before.current.version:
            await self._set(replace(before, opened=(*before.opened, new.version)))
            await self._opened_everywhere(new.version)
            if new.version not in before.opened:  # going back to the last version must not depend on a trial
                self._status = "trying"
                await self._try(before.current, new, request.epsilon)
        revision, last = before.revision + 1, tuple({v for v in before.opened if v != new.version})
        if new.version == before.current.version:
            return Table(revision, new, opened=last)
        if request.shares or request.shadow:
            return Table(revision, before.current, new, request.shares, request.shadow, opened=last)
        return Table(revision, new, opened=(before.current.version,))

    async def _opened_everywhere(self, version: Version) -> None:
        """Waits until every replica that asks for the table has the version open.

        Raises: Conflict if one cannot open it, or not in time.
        """

        def opened() -> bool:
            now = time.monotonic()
            alive = {key: one for key, one in self._followers.items() if now - one.seen < LOST_AFTER_S}
            self._followers = alive
            return bool(alive) and all(version.id in one.has or version.id in one.failed for one in alive.values())

        deadline = time.monotonic() + OPEN_TIMEOUT_S
        async with self._changed:
            while not opened():
                if time.monotonic() >= deadline:
                    raise Conflict(f"not every replica has opened version {version.id} in {OPEN_TIMEOUT_S:.0f} s")
                try:
                    await asyncio.wait_for(self._changed.wait(), FOLLOW_S)
                except TimeoutError:
                    continue
        for (deployment, _), follower in self._followers.items():
            if version.id in follower.failed:
                raise Conflict(f"{deployment} cannot open version {version.id}: {follower.failed[version.id]}")

    async def _try(self, old: Served, new: Served, epsilon: float) -> None:
        """Asks both versions the new one's golden queries, as requests are asked.

        Raises: Conflict naming the first task whose R-precision is lower than it may be.
        """
        encoder = serve.get_deployment_handle("Encoder", serve.get_replica_context().app_name)
        self._golden = {served.version.id: await golden_precision(encoder, served, new) for served in (old, new)}
        before, after = (self._golden[served.version.id] for served in (old, new))
        for task, value in after.items():
            if task in before and value < before[task] - epsilon:
                raise Conflict(
                    f"task {task}: R-precision on the golden queries falls from {before[task]:.3f} to {value:.3f}, "
                    f"more than epsilon {epsilon:g}"
                )

    async def _set(self, table: Table) -> None:
        async with self._changed:
            self._table = table
            self._changed.notify_all()


async def golden_precision(encoder: DeploymentHandle, served: Served, of: Served) -> dict[str, float]:
    """Task → mean R-precision of a version on the golden queries of a version.

    Raises: Conflict if an answer does not come in time, or not from every shard.
    """
    opening = asyncio.to_thread(artifacts.open_artifact, of.version.index, KIND, verify=True, files=(GOLDEN_FILE,))
    queries = await asyncio.to_thread(read_golden, (await opening).folder / GOLDEN_FILE)
    found: dict[str, list[float]] = defaultdict(list)
    tasks = {task.name: task for task in served.contract.tasks}
    for task in dict.fromkeys(query.task for query in queries if query.task in tasks):
        own = [query for query in queries if query.task == task]
        for start in range(0, len(own), GOLDEN_AT_A_TIME):
            part = own[start : start + GOLDEN_AT_A_TIME]
            texts = [query.query for query in part]
            tokens = [query_tokens([text], tasks[task].max_query_tokens) for text in texts]
            top_k = max(len(set(pages)) for query in part for pages in query.gold_pages)
            answer: FoundAll | None = await encoder.run.remote(
                served.version, task, texts, tokens, Search(max(1, top_k), "page", False), GOLDEN_TIMEOUT_S
            )
            if answer is None or answer.failed:
                raise Conflict(f"version {served.version.id} does not answer golden queries from every shard in time")
            for query, hits in zip(part, answer.hits, strict=True):
                found[task].append(r_precision([hit.wikipedia_id for hit in hits], query.gold_pages))
    return {task: sum(values) / len(values) for task, values in found.items()}


def _info(served: Served) -> VersionInfo:
    version = served.version
    return VersionInfo(version=version.id, checkpoint=version.checkpoint, index=version.index)
