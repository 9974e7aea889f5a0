"""From the queries of a request to the encoder, with the version that answers them.

Path: routes (app) → [here] → Encoder.run (deployments).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import TypeVar

from fastapi import HTTPException
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.admission import Admission, Overloaded, query_tokens
from serve.arguments import Limits
from serve.asks import FoundAll, Search
from serve.errors import Late
from serve.remote import ShardsLostError
from serve.versions import Served, Table
from taskspec.model.contract import ContractTask
from taskspec.retrieve.hits import Hit

MOST_SHADOWS = 4
"""Requests of one HTTP replica that are asked of two versions at the same time."""
READY_TIMEOUT_S = 5.0
"""How long a query may take to come back from every shard."""
READY_KEPT_S = 1.0
"""How long an answer to that stays one: asking takes no key, and each time costs a search."""

Answer = TypeVar("Answer")

logger = logging.getLogger("ray.serve")


class Dispatch:
    """What one HTTP replica asks of encoders."""

    def __init__(self, limits: Limits, aliases: DeploymentHandle, encoder: DeploymentHandle) -> None:
        self._limits, self._aliases, self._encoder = limits, aliases, encoder
        self._admission = Admission(limits.tokens_under_way)
        self._table: Table | None = None
        self._shadows: set[asyncio.Task[None]] = set()
        self._readying = asyncio.Lock()
        self._asked_ready = -READY_KEPT_S
        self._missing: str | None = None
        """Why it was not ready then."""

    async def start(self) -> None:
        """Waits for the first table, and follows `Aliases` from then on.

        Raises: what Serve raises if it is not there: then the replica must not start.
        """
        self._table = await self._aliases.table.remote()
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        """Keeps the table as `Aliases` has it; while that is started again the last one counts."""
        while True:
            try:
                self._table = await self._aliases.table.remote(self._table)
            except Exception as error:
                logger.warning("Aliases does not answer: %s", type(error).__name__)
                await asyncio.sleep(1)

    @property
    def tokens_under_way(self) -> int:
        return self._admission.tokens

    @property
    def table(self) -> Table:
        """Which versions answer."""
        assert self._table is not None, "started"
        return self._table

    def _time(self, timeout_ms: int | None) -> int:
        """What a request gets that asks for so long."""
        return min(timeout_ms or self._limits.timeout_ms, self._limits.timeout_ms)

    async def within(self, call: Awaitable[Answer], timeout_ms: int | None = None) -> Answer:
        """What a call gives in time.    Args: timeout_ms: None is the longest that a request may ask for.

        Raises: Late, and what the call raises.
        """
        timeout_ms = self._time(timeout_ms)
        try:
            return await asyncio.wait_for(call, timeout_ms / 1000)
        except TimeoutError as error:
            raise Late(f"no answer within {timeout_ms} ms; ask again") from error

    async def ask(
        self, served: Served, task: str, texts: list[str], search: Search | None, timeout_ms: int | None
    ) -> FoundAll:
        """The answers of a version; `search` None asks for embeddings alone.

        Raises: Overloaded, Late, ShardsLostError, and what Serve raises if no encoder can be reached.
        """
        (of_task,) = [one for one in served.contract.tasks if one.name == task]
        timeout_ms = self._time(timeout_ms)
        with self._admission.admit(query_tokens(texts, of_task.max_query_tokens), timeout_ms / 1000):
            found = await self._run(served, of_task, texts, search, timeout_ms / 1000)
            if found is None:
                fewer = " or for fewer queries" if len(texts) > 1 else ""
                raise Late(f"no answer within {timeout_ms} ms; ask with a longer timeout_ms{fewer}")
        return found

    async def require_ready(self) -> None:
        """Raises: HTTPException (503) unless a query comes back from every shard in time, or did a moment ago."""
        async with self._readying:
            if time.monotonic() - self._asked_ready >= READY_KEPT_S:
                self._missing = await self._ask_ready()
                self._asked_ready = time.monotonic()
        if self._missing:
            raise HTTPException(503, f"{self._missing}; ask again, or see the Serve status")

    async def _ask_ready(self) -> str | None:
        """What is missing; None if a query comes back from every shard in time."""
        served = self.table.current
        search = Search(1, "passage", False)
        try:
            found = await self._run(served, served.contract.tasks[0], ["ready"], search, READY_TIMEOUT_S)
        except (RayActorError, RayServeException, ShardsLostError):
            return "no retriever answers"
        if found is None:
            return "no answer in time"
        return f"no answer from shards {sorted(found.failed)}" if found.failed else None

    def start_shadow(
        self, table: Table, task: str, texts: list[str], search: Search, hits: Sequence[Sequence[Hit]]
    ) -> None:
        """Asks the candidate the same, unless there is much to do, and tells how far its hits agree."""
        if len(self._shadows) < MOST_SHADOWS and 2 * self._admission.tokens <= self._limits.tokens_under_way:
            shadow = asyncio.create_task(self._shadow(table, task, texts, search, hits))
            self._shadows.add(shadow)
            shadow.add_done_callback(self._shadows.discard)

    async def _shadow(
        self, table: Table, task: str, texts: list[str], search: Search, hits: Sequence[Sequence[Hit]]
    ) -> None:
        candidate = table.candidate
        assert candidate is not None
        try:
            found = await self.ask(candidate, task, texts, search, None)
        except (Overloaded, Late, ShardsLostError, RayActorError, RayServeException):
            return  # the answer has been given; nothing is lost but a comparison
        if found.failed:
            return  # a part of the candidate says nothing about the whole
        overlaps = [
            len({hit.id for hit in old} & {hit.id for hit in new}) / len(old)
            for old, new in zip(hits, found.hits, strict=True)
            if old
        ]
        with suppress(RayActorError, RayServeException):
            await self._aliases.compare.remote(task, candidate.version.id, overlaps)

    async def _run(
        self, served: Served, task: ContractTask, texts: list[str], search: Search | None, left_s: float
    ) -> FoundAll | None:
        """Asks an encoder; one that dies meanwhile is replaced by another. None if it is too late."""
        deadline = time.monotonic() + left_s
        tokens = [query_tokens([text], task.max_query_tokens) for text in texts]
        for last in (False, True):
            left_s = deadline - time.monotonic()
            call = self._encoder.run.remote(served.version, task.name, texts, tokens, search, left_s)
            try:
                found: FoundAll | None = await asyncio.wait_for(call, left_s)
                return found
            except TimeoutError:
                return None
            except RayActorError:
                if last:
                    raise
        raise AssertionError
