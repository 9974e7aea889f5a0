"""How the encoder's replicas follow a load that rises and falls, and what that does to the time an answer takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
from load import Send, Sent, open_loop
from ray import serve

from taskspec.evaluate import page

WINDOW_S = 5.0
"""Over which rates and percentiles are taken."""
ENCODER: dict[str, Any] = {
    "name": "Encoder",
    "ray_actor_options": {"num_cpus": 0.5},
    "autoscaling_config": {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 5,
        "downscale_delay_s": 30,
        "metrics_interval_s": 2,
        "look_back_period_s": 6,
    },
}
"""As in cluster/serve.yaml, but for two cores and minutes: a replica has one thread, reserves half a CPU so that two
fit beside the rest, and the delays are shorter."""

Replicas = list[tuple[float, int]]
"""Seconds from the beginning → running replicas."""


async def follow(send: Send, phases: Sequence[tuple[float, float]]) -> tuple[list[Sent], Replicas]:
    """Asks at one constant rate after the other.

    Args: phases: (requests a second, seconds) each.    Returns: all requests, and the replicas once a second.
    """
    began = time.monotonic()
    replicas: Replicas = []

    async def watch() -> None:
        while True:
            replicas.append((time.monotonic() - began, await asyncio.to_thread(running)))
            await asyncio.sleep(1)

    ray.init(address="auto", log_to_driver=False, logging_level="warning")
    watching = asyncio.create_task(watch())
    loads = []
    start = 0.0
    for rate, seconds in phases:  # the next rate begins in time, whatever still waits for answers
        loads.append(asyncio.create_task(_later(start + began, send, rate, seconds, start)))
        start += seconds
    sent = [one for load in await asyncio.gather(*loads) for one in load]
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    ray.shutdown()
    return sent, replicas


async def _later(at: float, send: Send, rate: float, seconds: float, offset: float) -> list[Sent]:
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    load = await open_loop(send, rate, seconds)
    return [Sent(one.at + offset, one.latency, one.queries) for one in load.sent]


def running() -> int:
    """Replicas of the encoder that answer."""
    (application,) = serve.status().applications.values()
    states = application.deployments["Encoder"].replica_states
    return int(states.get("RUNNING", 0))


def windows(sent: Sequence[Sent]) -> list[tuple[float, float, float, float]]:
    """Of each window: its middle, requests sent and answered a second, p95 in seconds."""
    lines = []
    for n in range(int(max(one.at for one in sent) // WINDOW_S) + 1):
        within = [one for one in sent if n * WINDOW_S <= one.at < (n + 1) * WINDOW_S]
        latencies = [one.latency for one in within if one.queries]
        p95 = float(np.percentile(latencies, 95)) if latencies else float("nan")
        lines.append(((n + 0.5) * WINDOW_S, len(within) / WINDOW_S, len(latencies) / WINDOW_S, p95))
    return lines


def save(folder: Path, sent: Sequence[Sent], replicas: Replicas) -> None:
    """`scaling.png`, and `scaling.csv` and `scaling-replicas.csv` with what is drawn."""
    measured = windows(sent)
    page.write_csv(folder / "scaling.csv", ["seconds", "sent_per_s", "answered_per_s", "p95_s"], measured)
    page.write_csv(folder / "scaling-replicas.csv", ["seconds", "replicas"], replicas)
    figure = page.canvas(4.2)
    rate, count, p95 = figure.subplots(3, 1, sharex=True)
    middle, asked, _, slowest = zip(*measured, strict=True)
    rate.step(middle, asked, where="mid", color=page.COLORS[0], linewidth=1.2)
    rate.set_title("requests sent a second")
    count.step(*zip(*replicas, strict=True), where="post", color=page.COLORS[1], linewidth=1.2)
    count.set_title("running replicas of the encoder")
    count.set_yticks(range(max(n for _, n in replicas) + 1))
    p95.plot(middle, [1000 * one for one in slowest], color=page.COLORS[2], linewidth=1.2, marker=".")
    p95.set_title(f"p95 of the answers to what was asked in each {WINDOW_S:.0f} s, ms")
    p95.set_xlabel("seconds")
    for axes in (rate, count, p95):
        axes.set_ylim(bottom=0)
        page.tidy(axes, "both")
    page.save_figure(folder, "scaling", "replicas and p95", figure)
