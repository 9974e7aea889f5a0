"""Batches of what concurrent requests ask, by tokens, in the order of arrival; what nobody waits for is dropped.

Path: requests → [here] → one stage that works on batch after batch, and one that may overlap. A batch is whatever has
come while the last one was worked on, up to a number of tokens: nothing waits for a batch to fill, and nothing is
overtaken. Knows neither HTTP nor models; one event loop, no threads.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Between = TypeVar("Between")
Result = TypeVar("Result")


class LateError(Exception):
    """The deadline of an item came before its turn, or its result."""


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    tokens: int
    deadline: float
    result: asyncio.Future[Result]

    def wanted(self) -> bool:
        """Whether somebody still waits for it; tells them if it is too late."""
        if self.result.done():
            return False
        if time.monotonic() >= self.deadline:
            self.result.set_exception(LateError())
            return False
        return True


class Batcher(Generic[Item, Between, Result]):
    """Two stages over items of any callers.

    Example:
        batcher = Batcher(embed, search, most_tokens=4096)
        found = await batcher.add(query, tokens=12, deadline=time.monotonic() + 1)
    """

    def __init__(
        self,
        first: Callable[[list[Item]], Awaitable[list[Between | Exception]]],
        then: Callable[[list[Item], list[Between]], Awaitable[list[Result | Exception]]],
        most_tokens: int,
    ) -> None:
        """Args: first: for one batch at a time. then: for batches at the same time. Both may have an exception for an
        item, which is that item's alone. most_tokens: of a batch; an item with more of them is a batch by itself.
        """
        self._first, self._then, self._most_tokens = first, then, most_tokens
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._came = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._loop())

    async def add(self, item: Item, tokens: int, deadline: float) -> Result:
        """What the stages make of the item.

        Args: deadline: by the monotonic clock; it is looked at before each stage.
        Raises: LateError; what a stage has for the item, or raises for the batch.
        """
        waiting = _Waiting[Item, Result](item, tokens, deadline, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._came.set()
        return await waiting.result

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # a loop keeps weak references only
        task.add_done_callback(self._tasks.discard)

    async def _loop(self) -> None:
        while True:
            await self._came.wait()
            batch = self._take()
            if not self._queue:
                self._came.clear()
            if not batch:
                continue
            try:
                between = await self._first([waiting.item for waiting in batch])
            except Exception as error:
                _fail(batch, error)
            else:
                self._start(self._finish(batch, between))

    def _take(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        tokens = 0
        while self._queue:
            if not self._queue[0].wanted():
                self._queue.popleft()
                continue
            tokens += self._queue[0].tokens
            if batch and tokens > self._most_tokens:
                break
            batch.append(self._queue.popleft())
        return batch

    async def _finish(self, batch: list[_Waiting[Item, Result]], between: Sequence[Between | Exception]) -> None:
        wanted: list[_Waiting[Item, Result]] = []
        made: list[Between] = []
        for waiting, one in zip(batch, between, strict=True):
            if isinstance(one, Exception):
                _fail([waiting], one)
            elif waiting.wanted():
                wanted.append(waiting)
                made.append(one)
        if not wanted:
            return
        try:
            results = await self._then([waiting.item for waiting in wanted], made)
        except Exception as error:
            _fail(wanted, error)
            return
        for waiting, result in zip(wanted, results, strict=True):
            if isinstance(result, Exception):
                _fail([waiting], result)
            elif not waiting.result.done():
                waiting.result.set_result(result)


def _fail(batch: Sequence[_Waiting[Item, Result]], error: Exception) -> None:
    for waiting in batch:
        if not waiting.result.done():
            waiting.result.set_exception(error)
