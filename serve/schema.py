"""The shapes of HTTP: what builds the server, what a request may say, what answers and errors look like.

Path: [here] ← app, deployments.  Field names and defaults of `POST /retrieve` stand here once; `/docs` shows them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from taskspec.model.contract import ContractTask
from taskspec.retrieve.hits import Level
from taskspec.sections import Section

MAX_TOP_K = 1000
"""Most hits per query that a request may ask for."""
MAX_QUERIES = 1000
"""Most queries that one request may hold."""


class ServeArgs(Section):
    """What `serve run serve.app:build name=value …` takes."""

    checkpoint: str
    """URI that jobs.train printed."""
    index: str
    """URI that jobs.index printed for this checkpoint."""
    max_batch: int = Field(64, ge=1)
    """Queries, of any requests, that are embedded and searched together."""
    batch_wait_ms: float = Field(5, ge=0)
    """How long a query waits for others to share its batch."""
    threads: int | None = Field(None, ge=1)
    """Threads of one retriever replica; None is every core of its node."""


class Model(BaseModel):
    """A part of a request or an answer: unknown fields refused, types taken as they are."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class RetrieveRequest(Model):
    """A query, or several of one task."""

    query: str | list[str]
    """The task's input as it stands in its files; the prompt is put round it here."""
    task: str
    """One of `GET /tasks`."""
    top_k: int = Field(10, ge=1, le=MAX_TOP_K)
    """Hits per query."""
    level: Level = "page"
    """`page` gives each page once, ranked by its best passage."""
    with_text: bool = False
    """Whether hits carry the passage's text (at page level that of the page's best passage)."""
    format: Literal["default", "kilt"] = "default"
    """`kilt` answers with one JSON line per query, as KILT's retrieval evaluation reads predictions: `id`, `input`,
    and one `output` whose `provenance` lists the pages best first; its `answer` is empty."""
    id: str | list[str] | None = None
    """With `kilt`: the queries' ids in the gold file, by which the evaluation joins. One per query, all distinct."""

    @property
    def queries(self) -> list[str]:
        return _as_list(self.query)

    @property
    def ids(self) -> list[str] | None:
        return None if self.id is None else _as_list(self.id)

    @field_validator("query")
    @classmethod
    def _some(cls, query: str | list[str]) -> str | list[str]:
        if not query:
            raise ValueError("needs a query, or a list with at least one")
        return query

    @field_validator("format")
    @classmethod
    def _kilt_ranks_pages(cls, value: str, info: ValidationInfo) -> str:
        if value == "kilt" and info.data.get("level") == "passage":
            raise ValueError("kilt ranks pages; leave level at page")
        return value

    @field_validator("id")
    @classmethod
    def _one_per_query(cls, value: str | list[str] | None, info: ValidationInfo) -> str | list[str] | None:
        if value is None or not {"format", "query"} <= set(info.data):  # these have errors of their own
            return value
        if info.data["format"] != "kilt":
            raise ValueError("is only for format kilt")
        ids, queries = _as_list(value), _as_list(info.data["query"])
        if len(ids) != len(queries) or len(set(ids)) != len(ids):
            raise ValueError(
                f"needs one id per query, all distinct: {len(set(ids))} distinct for {len(queries)} queries"
            )
        return value


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class HitModel(Model):
    """One result; the fields are those of `taskspec.retrieve.retriever.Hit`."""

    rank: int
    id: str
    score: float
    wikipedia_id: str
    title: str
    text: str | None


class Answer(Model):
    """The hits of one query."""

    query: str
    truncated: bool
    """Whether the query was longer than its task's max_query_tokens and was cut."""
    hits: list[HitModel]


class IndexInfo(Model):
    """Which index answered."""

    alias: str | None
    """Null: the index was named by its URI."""
    version: str
    """First 12 characters of the index artifact's id."""
    fingerprint: str
    """Of the contract under which it was built."""


class ShardCounts(Model):
    total: int
    successful: int
    failed: int


class Coverage(Model):
    """How much of the index the answer is from."""

    full: bool
    shards: ShardCounts


class Time(Model):
    """Milliseconds that the request spent, by stage. Embedding and search are those of a whole batch; queries of a
    long request may be in several, then the last one counts."""

    wait_ms: float
    """Until the batch began."""
    embed_ms: float
    search_ms: float
    total_ms: float
    batch_queries: int
    """Queries in the batch, those of other requests included."""


class RetrieveResponse(Model):
    """The answer of `POST /retrieve`."""

    model: str
    task: str
    index: IndexInfo
    data: list[Answer]
    """In the order of the queries."""
    coverage: Coverage
    time: Time


class Limits(Model):
    """What a request may ask for at most."""

    queries_per_request: int
    top_k: int


class TasksResponse(Model):
    """The answer of `GET /tasks`."""

    model: str
    tasks: list[ContractTask]
    limits: Limits


class Status(Model):
    """The answer of `GET /health` and `GET /ready`."""

    status: Literal["ok", "ready"]


class Error(Model):
    message: str
    type: Literal["invalid_request", "not_found", "too_large", "unavailable", "internal"]
    param: str | None
    """The field of the request that is at fault."""
    code: str
    """The rule that was broken, for programs."""


class ErrorResponse(Model):
    """The body of every answer that is not 2xx."""

    error: Error
    request_id: str
    """Also the header X-Request-ID; name it when you report a fault."""
