"""What an HTTP replica counts, for Prometheus.

Path: guard, app → [here] → `GET /metrics`. Each HTTP replica answers with its own numbers, labelled with its name;
Ray's metrics port has the queues and latencies of every deployment.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge beside each counter, of when it began

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """One process's numbers."""

    def __init__(self, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._replica = replica
        labels = ["replica"]
        self._requests = Counter(
            "taskspec_requests", "Requests", [*labels, "method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "taskspec_request_seconds",
            "Time to the answer",
            [*labels, "route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._queries = Counter("taskspec_queries", "Queries", [*labels, "task", "cached"], registry=self._registry)
        self._stages = Histogram(
            "taskspec_stage_seconds",
            "Time of a batch in a stage, for the last batch of a request",
            [*labels, "stage"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batch = Histogram(
            "taskspec_batch_queries",
            "Queries embedded together",
            labels,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self._registry,
        )
        self._tokens = Gauge("taskspec_tokens_under_way", "Query tokens, about", labels, registry=self._registry)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(self._replica, method, route, str(status)).inc()
        self._seconds.labels(self._replica, route).observe(seconds)

    def queries(self, task: str, asked: int, cached: int) -> None:
        self._queries.labels(self._replica, task, "no").inc(asked)
        self._queries.labels(self._replica, task, "yes").inc(cached)

    def stages(self, wait_ms: float, embed_ms: float, search_ms: float, batch_queries: int) -> None:
        for stage, milliseconds in (("wait", wait_ms), ("embed", embed_ms), ("search", search_ms)):
            self._stages.labels(self._replica, stage).observe(milliseconds / 1000)
        self._batch.labels(self._replica).observe(batch_queries)

    def text(self, tokens_under_way: int) -> bytes:
        self._tokens.labels(self._replica).set(tokens_under_way)
        return generate_latest(self._registry)
