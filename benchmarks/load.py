"""Loads on an endpoint: clients that wait for their answers, and requests that come whatever happens to the rest."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import aiohttp
import numpy as np

LEVEL, TOP_K = "passage", 10


@dataclass
class Sent:
    """One request."""

    at: float
    """Seconds from the load's beginning at which it was to be sent."""
    latency: float
    """Seconds from then to its answer."""
    queries: int
    """Answered; 0 if it failed."""


@dataclass
class Load:
    """What a load met."""

    sent: list[Sent]
    seconds: float
    client_cpu_s: float

    @property
    def rate(self) -> float:
        """Queries answered a second."""
        return sum(one.queries for one in self.sent) / self.seconds

    def percentile(self, percent: float) -> float:
        """Seconds, of the requests that were answered."""
        latencies = [one.latency for one in self.sent if one.queries]
        return float(np.percentile(latencies, percent)) if latencies else float("nan")

    @property
    def failed(self) -> int:
        """Requests."""
        return sum(not one.queries for one in self.sent)

    def line(self, name: str) -> str:
        p50, p95, p99 = (1000 * self.percentile(percent) for percent in (50, 95, 99))
        return (
            f"{name:34} {self.rate:7.1f} queries/s  p50 {p50:6.0f}  p95 {p95:6.0f}  p99 {p99:6.0f} ms  "
            f"{self.failed} failed, client {100 * self.client_cpu_s / self.seconds:.0f}% of a core"
        )


Send = Callable[[], Awaitable[int]]
"""One request. Returns: the queries that were answered, 0 if it failed."""


async def closed_loop(send: Send, clients: int, seconds: float) -> Load:
    """Each client sends its next request when it has the answer to the last."""
    sent: list[Sent] = []
    cpu, began = _cpu(), time.monotonic()

    async def client() -> None:
        while (at := time.monotonic() - began) < seconds:
            queries = await send()
            sent.append(Sent(at, time.monotonic() - began - at, queries))

    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(sent, time.monotonic() - began, _cpu() - cpu)


async def open_loop(send: Send, requests_per_s: float, seconds: float) -> Load:
    """Requests at a constant rate."""
    cpu, began = _cpu(), time.monotonic()

    async def one(at: float) -> Sent:
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        queries = await send()
        return Sent(at, time.monotonic() - began - at, queries)

    sent = await asyncio.gather(*(one(n / requests_per_s) for n in range(int(requests_per_s * seconds))))
    return Load(sent, time.monotonic() - began, _cpu() - cpu)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def requests(
    session: aiohttp.ClientSession,
    url: str,
    asked: Mapping[str, Sequence[str]],
    size: int,
    batches: list[int] | None = None,
) -> Send:
    """Requests of `size` queries of one task, tasks in turn.

    Args: asked: task → texts. batches: takes, for each answer, how many queries were embedded together with its last;
        without it no answer has to say, and passages are not asked for by name.
    """
    tasks = list(asked)
    numbers = count()

    async def send() -> int:
        number = next(numbers)
        task = tasks[number % len(tasks)]
        texts = [asked[task][(number * size + n) % len(asked[task])] for n in range(size)]
        body: dict[str, Any] = {"query": texts if size > 1 else texts[0], "task": task, "top_k": TOP_K}
        if batches is not None:
            body["level"] = LEVEL
        try:
            async with session.post(f"{url}/retrieve", json=body) as response:
                answer = await response.json()
        except (aiohttp.ClientError, TimeoutError):
            return 0
        if response.status != 200:
            return 0
        if batches is not None:
            batches.append(answer["time"]["batch_queries"])
        return size

    return send
