"""Which version is served, and how it changes while requests go on.

Path: alias file, `PUT /aliases` → [here] → what every replica has open, and which version answers which query.

One replica of `Aliases` holds the state, and a small file outlives it. All other replicas ask it again and again what
to have open (`follow`), which also tells it what they have. A new version is opened by all of them beside the old one,
tried with golden queries on the serving path, and only then answers; requests that are under way end on the version
that they began with, and the last version stays open, so that going back is as quick as going on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.admission import query_tokens
from serve.alias_file import AliasFile, Found
from serve.alias_schema import AliasRequest, AliasResponse, Compared, VersionInfo
from serve.arguments import ServeArgs
from serve.asks import FoundAll, Search, Version
from serve.errors import Conflict
from serve.guard import LOGGING
from serve.versions import Served, Table, open_version, require_whole
from taskspec import artifacts
from taskspec.errors import StoreError, TaskspecError
from taskspec.evaluate.metrics import r_precision
from taskspec.index.golden import GOLDEN_FILE, read_golden
from taskspec.index.manifest import KIND

FOLLOW_S = 5.0
"""How long `follow` waits for a change before it answers the same again."""
Status = Literal["served", "loading", "trying", "refused"]
LOST_AFTER_S = 3 * FOLLOW_S
"""A replica that has not asked for so long is no longer waited for."""
OPEN_TIMEOUT_S = 1800.0
"""How long replicas may take to open a version."""
WATCH_S = 10.0
"""How often the file is looked at, which other endpoints may change."""
GOLDEN_TIMEOUT_S = 60.0
GOLDEN_AT_A_TIME = 4
"""Golden queries of a task that are asked together: beside the traffic, not instead of it."""

logger = logging.getLogger("ray.serve")


@dataclass
class Follower:
    """What is known of a replica."""

    has: frozenset[str]
    failed: dict[str, str]
    """Version → why it could not be opened."""
    seen: float = field(default_factory=time.monotonic)


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000, logging_config=LOGGING)
class Aliases:
    """The state of the alias that is served."""

    async def __init__(self, args: ServeArgs, served: Served) -> None:  # type: ignore[misc]
        self._file = AliasFile(args.aliases, args.alias) if args.aliases else None
        self._alias = args.alias
        self._table = Table(0, served)
        self._changed = asyncio.Condition()
        self._followers: dict[tuple[str, str], Follower] = {}
        self._compared: dict[str, Compared] = {}
        self._golden: dict[str, dict[str, float]] = {}
        self._status: Status = "served"
        self._reason: str | None = None
        self._asked: AliasRequest | None = None
        self._at_work = asyncio.Lock()
        """Held while the table changes, by a request or by the file."""
        if self._file:
            self._table = await asyncio.to_thread(self._first_table, self._file, served)
            self._watching = asyncio.create_task(self._watch(self._file))

    @staticmethod
    def _first_table(file: AliasFile, served: Served) -> Table:
        """What the file says; the first endpoint writes it."""
        found = file.read()
        table = Table(1, served)
        if found is None:
            try:
                file.write(table)
            except Conflict:  # another endpoint was faster
                found = file.read()
                assert found is not None
            else:
                version = served.version
                uris = {"checkpoint": version.checkpoint, "index": version.index}
                file.log(who=None, revision=1, action="begin", version=version.id, **uris)
        if found is not None:
            file.hold(found)
            table = found.table
        if table.current.version != served.version:
            logger.warning("%s points to version %s, which is served", file.uri, table.current.version.id)
        return table

    async def _watch(self, file: AliasFile) -> None:
        """Follows what other endpoints write into the file; they have tried it."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                async with self._at_work:
                    found = await asyncio.to_thread(file.read)
                    if found is not None:
                        await self._adopt(file, found)
            except Exception:
                logger.exception("%s cannot be followed; what is served stays", file.uri)

    async def _adopt(self, file: AliasFile, found: Found) -> None:
        """Opens and serves what the file says, or leaves everything as it was."""
        before, table = self._table, found.table
        self._status = "loading"
        try:
            await self._set(replace(before, opened=(*before.opened, *table.versions)))
            for served in (table.current, table.candidate):
                if served is not None:
                    await self._opened_everywhere(served.version)
        except Exception:
            await self._set(before)
            raise
        finally:
            self._status = "served"
        file.hold(found)
        await self._serve(table)

    async def _serve(self, table: Table) -> None:
        if table.candidate != self._table.candidate:
            self._compared.clear()
        await self._set(table)

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
            asked=self._asked,
            golden=self._golden,
        )

    async def change(self, request: AliasRequest, who: str) -> AliasResponse:
        """Begins a change, which goes on by itself: what is wrong with the version shows in the state.

        Raises: Conflict.
        """
        if self._file is None:
            raise Conflict("versions are not changed here: start the endpoint with aliases=FOLDER")
        if self._status in ("loading", "trying"):
            raise Conflict(f"the alias {self._alias} is being changed: {self._status}; ask again when that is done")
        self._require_possible(request)
        self._status, self._reason, self._asked = "loading", None, request
        self._task = asyncio.create_task(self._change(self._file, request, who))
        await asyncio.sleep(0)
        return await self.state()

    def _require_possible(self, request: AliasRequest) -> None:
        current = self._table.current.version.id
        if request.expected != current:
            raise Conflict(f"the alias {self._alias} points to version {current}, not to {request.expected}")
        if request.revision not in (None, self._table.revision):
            raise Conflict(
                f"the alias {self._alias} has revision {self._table.revision}, not {request.revision}: somebody has "
                f"changed it; ask for its state"
            )
        tasks = [task.name for task in self._table.current.contract.tasks]
        for task in request.shares:
            if task not in tasks:
                raise Conflict(f"shares: unknown task {task!r}; known: {', '.join(tasks)}")

    async def _change(self, file: AliasFile, request: AliasRequest, who: str) -> None:
        """Opens, tries and serves a version, or refuses it and leaves everything as it was."""
        async with self._at_work:
            await self._change_alone(file, request, who)

    async def _change_alone(self, file: AliasFile, request: AliasRequest, who: str) -> None:
        before = self._table
        self._status = "loading"
        entry: dict[str, Any] = {"who": who, "request": request.model_dump()}
        try:
            self._require_possible(request)  # another endpoint may have been faster
            new = await asyncio.to_thread(open_version, request.checkpoint, request.index)
            after = await self._bring_in(before, new, request)
            await asyncio.to_thread(file.write, after)
            entry |= {"action": "serve", "revision": after.revision, "version": new.version.id, "golden": self._golden}
            entry["compared"] = {task: one.model_dump() for task, one in self._compared.items()}
            await self._serve(after)
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
        if lost:
            raise Conflict(f"version {new.version.id} has no task {lost[0]}, which is served; it has {', '.join(have)}")
        if before.current.index.lexical and not new.index.lexical:
            raise Conflict(f"version {new.version.id} has no lexical part for fused searches, the one served has")
        known = {version.id: version for version in before.versions}
        if known.get(new.version.id, new.version) != new.version:
            # Replicas have that version open, from where it was, and would not look at this copy of it.
            await asyncio.to_thread(require_whole, new.version)
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
        if not after:
            self._reason = f"version {new.version.id} has no golden queries of a served task, so it was not tried"
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
            search = Search(max(1, top_k), "page", False)
            call = encoder.run.remote(served.version, task, texts, tokens, search, GOLDEN_TIMEOUT_S)
            answer: FoundAll | None = None
            with suppress(TimeoutError):  # Serve waits for ever while no encoder is there
                answer = await asyncio.wait_for(call, GOLDEN_TIMEOUT_S)
            if answer is None or answer.failed:
                raise Conflict(f"version {served.version.id} does not answer golden queries from every shard in time")
            for query, hits in zip(part, answer.hits, strict=True):
                found[task].append(r_precision([hit.wikipedia_id for hit in hits], query.gold_pages))
    return {task: sum(values) / len(values) for task, values in found.items()}


def _info(served: Served) -> VersionInfo:
    version = served.version
    return VersionInfo(version=version.id, checkpoint=version.checkpoint, index=version.index)
