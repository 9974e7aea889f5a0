"""The shards of an index behind Serve: asked all at once, and what can be had when some do not answer.

Path: one batch → [here] → shard deployments.  B queries, K results. One object serves one batch: it remembers which
shards have failed, so that every search of the batch is over the same ones.
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

from taskspec.index.shard import Results, merge_top_k

logger = logging.getLogger("ray.serve")

Call = Callable[..., Awaitable[Results]]
"""(version, left_s, name of the method, its arguments …) → results of one shard deployment."""


class ShardsLostError(Exception):
    """No shard has answered."""


class RemoteShards:
    """Implements `taskspec.retrieve.catalog.Shards`, for a thread beside the event loop.

    Attributes: failed: numbers of the deployments that gave no answer.
    """

    def __init__(self, calls: Sequence[Call], loop: asyncio.AbstractEventLoop, version: Any, deadline: float) -> None:
        """Args: calls: one a deployment. loop: the one that the calls run in. deadline: by the monotonic clock."""
        self._calls, self._loop, self._version, self._deadline = calls, loop, version, deadline
        self.failed: set[int] = set()

    def search(self, queries_BD: np.ndarray, top_k: int, effort: int | None) -> Results:
        return merge_top_k(self._ask("search", queries_BD, top_k, effort), top_k)

    def rank(self, queries_BD: np.ndarray, rows: np.ndarray) -> Results:
        return merge_top_k(self._ask("rank", queries_BD, rows), len(rows))

    def _ask(self, method: str, *arguments: Any) -> list[Results]:
        """Raises: ShardsLostError."""
        return asyncio.run_coroutine_threadsafe(self._scatter(method, *arguments), self._loop).result()

    async def _scatter(self, method: str, *arguments: Any) -> list[Results]:
        asked = [number for number in range(len(self._calls)) if number not in self.failed]
        answers = await asyncio.gather(*(self._call(number, method, *arguments) for number in asked))
        results = [answer for answer in answers if answer is not None]
        self.failed |= {number for number, answer in zip(asked, answers, strict=True) if answer is None}
        if not results:
            raise ShardsLostError("no shard answers")
        return results

    async def _call(self, number: int, method: str, *arguments: Any) -> Results | None:
        """One shard's answer; None if it fails, or is not there in time. A replica that died is replaced by another."""
        for last in (False, True):
            left_s = self._deadline - time.monotonic()
            try:
                return await asyncio.wait_for(self._calls[number](self._version, left_s, method, *arguments), left_s)
            except (RayActorError, DeploymentUnavailableError) as error:
                if last:
                    logger.warning("shard %d does not answer: %s", number, type(error).__name__)
            except TimeoutError:
                break
            except Exception:
                logger.exception("shard %d fails", number)
                break
        return None
