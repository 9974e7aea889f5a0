"""The shards of an index behind Serve: asked all at once, and what can be had when some do not answer.

Path: one batch → [here] → shard deployments.  B queries, K results. `RemoteShards` serves one batch: it remembers which
shards have failed, so that every search of the batch is over the same ones. `ShardLine` lives as long as the process:
who has not answered of late is not waited for again until it answers a probe, so that a shard that is down costs one
wait and not one for each request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from serve.batching import LateError
from taskspec.index.shard import Results, merge_top_k

SHARE_OF_DEADLINE = 0.8
"""How much of the time that is left shards may take: the rest is for an answer from those that did."""
PROBE_EVERY_S = 0.5
PROBE_TIMEOUT_S = 2.0

logger = logging.getLogger("ray.serve")

Call = Callable[..., Awaitable[Results]]
"""(version, left_s, name of the method, its arguments …) → results of one shard deployment."""


class ShardsLostError(Exception):
    """No shard has answered, or not this one."""


class ShardLine:
    """The way to one shard deployment, with a circuit breaker."""

    def __init__(self, number: int, call: Call, ping: Callable[[], Awaitable[Any]], timeout_s: float) -> None:
        """Args: ping: answers if a replica is there and free to search. timeout_s: the longest that a call is waited
        for."""
        self._number, self._call, self._ping, self._timeout_s = number, call, ping, timeout_s
        self._probing: asyncio.Task[None] | None = None

    @property
    def broken(self) -> bool:
        """Whether it has not answered of late."""
        return self._probing is not None and not self._probing.done()

    async def ask(self, version: Any, left_s: float, method: str, *arguments: Any) -> Results:
        """Its answer.    Raises: LateError if only the request's time was too short; ShardsLostError if it fails, takes
        longer than any call may, or has not answered of late."""
        if self.broken:
            raise ShardsLostError
        patience_s = min(self._timeout_s, SHARE_OF_DEADLINE * left_s)
        ends = time.monotonic() + patience_s
        for last in (False, True):  # a replica that died is replaced by another
            left_s = max(0.0, ends - time.monotonic())
            try:
                return await asyncio.wait_for(self._call(version, left_s, method, *arguments), left_s)
            except (RayActorError, DeploymentUnavailableError) as error:
                if last:
                    self._break(type(error).__name__)
            except TimeoutError as error:
                if patience_s < self._timeout_s:
                    raise LateError from error
                self._break(f"no answer in {patience_s:g} s")
                break
            except Exception:
                logger.exception("shard %d fails", self._number)
                break
        raise ShardsLostError

    def _break(self, reason: str) -> None:
        if not self.broken:
            logger.warning("shard %d is left out until it answers again: %s", self._number, reason)
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._ping(), PROBE_TIMEOUT_S)
                break
            except Exception:
                await asyncio.sleep(PROBE_EVERY_S)
        logger.warning("shard %d answers again", self._number)


class RemoteShards:
    """Implements `taskspec.retrieve.catalog.Shards`, for a thread beside the event loop.

    Attributes: failed: numbers of the deployments that gave no answer. late: of these, for which only the time was too
        short.
    """

    def __init__(
        self, lines: Sequence[ShardLine], loop: asyncio.AbstractEventLoop, version: Any, deadline: float
    ) -> None:
        """Args: lines: one a deployment. loop: the one that the calls run in. deadline: by the monotonic clock."""
        self._lines, self._loop, self._version, self._deadline = lines, loop, version, deadline
        self.failed: set[int] = set()
        self.late: set[int] = set()

    def search(self, queries_BD: np.ndarray, top_k: int, effort: int | None) -> Results:
        return merge_top_k(self._ask("search", queries_BD, top_k, effort), top_k)

    def rank(self, queries_BD: np.ndarray, rows: np.ndarray, top_k: int) -> Results:
        return merge_top_k(self._ask("rank", queries_BD, rows, top_k), top_k)

    def _ask(self, method: str, *arguments: Any) -> list[Results]:
        """Raises: ShardsLostError, LateError if no shard answers."""
        return asyncio.run_coroutine_threadsafe(self._scatter(method, *arguments), self._loop).result()

    async def _scatter(self, method: str, *arguments: Any) -> list[Results]:
        asked = [number for number in range(len(self._lines)) if number not in self.failed]
        left_s = self._deadline - time.monotonic()
        calls = (self._lines[number].ask(self._version, left_s, method, *arguments) for number in asked)
        results = []
        for number, answer in zip(asked, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(answer, Results):
                results.append(answer)
            elif isinstance(answer, LateError | ShardsLostError):
                self.failed.add(number)
                if isinstance(answer, LateError):
                    self.late.add(number)
            else:
                raise answer
        if not results:
            raise LateError if self.failed == self.late else ShardsLostError("no shard answers")
        return results
