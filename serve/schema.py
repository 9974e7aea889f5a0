"""The shapes of HTTP: what a request may say, what answers and errors look like.

Path: [here] ← app, aliases.  Field names and defaults of `POST /retrieve` stand here once; `/docs` shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from serve.arguments import Limits
from taskspec.model.contract import ContractTask
from taskspec.retrieve.hits import Level
from taskspec.sections import Precision


class Model(BaseModel):
    """A part of a request or an answer: unknown fields refused, types taken as they are."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Request(Model):
    """A part of a request: its strings are text."""

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for text in _strings(value):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError("holds half of a surrogate pair, which is no character")
        return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value:
            yield from _strings(one)


class RetrieveRequest(Request):
    """A query, or several of one task."""

    query: str | list[str]
    """The task's input as it stands in its files; the prompt is put round it here."""
    task: str
    """One of `GET /tasks`."""
    top_k: int = Field(10, ge=1)
    """Hits per query."""
    level: Level = "page"
    """`page` gives each page once, ranked by its best passage."""
    with_text: bool = False
    """Whether hits carry the passage's text (at page level that of the page's best passage)."""
    only_pages: list[str] | None = None
    """wikipedia ids of the pages that may be found; unknown ones match nothing."""
    without_pages: list[str] = []
    """wikipedia ids of pages that may not be found."""
    fused: bool = False
    """Whether to fuse the ranking with BM25's (reciprocal rank fusion); scores are then the fusion's. `GET /info` says
    whether the index can."""
    timeout_ms: int | None = Field(None, ge=1)
    """How long the answer is waited for, `limits.timeout_ms` at most: work that cannot be done by then is not begun,
    and the answer is 504."""
    allow_partial: bool = False
    """Whether to answer from the rest of the index while a shard is down; `coverage` tells. Otherwise that is 503."""
    format: Literal["default", "kilt"] = "default"
    """`kilt` answers with one JSON line per query, as KILT's retrieval evaluation reads predictions: `id`, `input`,
    and one `output` whose `provenance` lists the pages best first; its `answer` is empty. How many queries were cut,
    and how many have fewer hits than they might, are the headers X-Truncated and X-Incomplete."""
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
        return _at_least_one(query)

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


def _at_least_one(query: str | list[str]) -> str | list[str]:
    if not query:
        raise ValueError("needs a query, or a list with at least one")
    return query


class HitModel(Model):
    """One result; the fields are those of `taskspec.retrieve.retriever.Hit`."""

    rank: int
    id: str
    score: float
    wikipedia_id: str
    title: str
    text: str | None


class IndexInfo(Model):
    """Which index answered."""

    alias: str | None
    """Null: versions are not changed while serving."""
    version: str
    """First 12 characters of the index artifact's id."""
    fingerprint: str
    """Of the contract under which it was built."""


class EmbedRequest(Request):
    """A query, or several of one task."""

    query: str | list[str]
    task: str
    timeout_ms: int | None = Field(None, ge=1)

    @property
    def queries(self) -> list[str]:
        return _as_list(self.query)

    @field_validator("query")
    @classmethod
    def _some(cls, query: str | list[str]) -> str | list[str]:
        return _at_least_one(query)


class Embedding(Model):
    embedding: list[float]
    truncated: bool


class EmbedResponse(Model):
    """The answer of `POST /embed`."""

    model: str
    task: str
    index: IndexInfo
    """The index that these embeddings can search."""
    data: list[Embedding]
    """In the order of the queries."""
    tokens: int
    """Of all queries, prompts included."""


class OpenAIRequest(Request):
    """The part of OpenAI's request for embeddings that has a meaning here."""

    input: str | list[str]
    model: str
    """`<name>@<task>`."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64 is of the float32 numbers, little-endian."""
    user: str | None = None
    """Is not used."""

    @property
    def queries(self) -> list[str]:
        return _as_list(self.input)

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], int | list):
            raise ValueError("holds token ids, which are not taken; send texts")
        return value

    @field_validator("input")
    @classmethod
    def _some(cls, query: str | list[str]) -> str | list[str]:
        return _at_least_one(query)


class OpenAIEmbedding(Model):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class OpenAIUsage(Model):
    prompt_tokens: int
    total_tokens: int


class OpenAIResponse(Model):
    """The answer of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class Answer(Model):
    """The hits of one query."""

    query: str
    truncated: bool
    """Whether the query was longer than its task's max_query_tokens and was cut."""
    complete: bool
    """Whether these are top_k hits, or all that there are. False where shards did not answer, or where an approximate
    index reached no more pages among those that may be found."""
    hits: list[HitModel]


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
    cached_queries: int
    """Queries of this request whose answer was known."""


class RetrieveResponse(Model):
    """The answer of `POST /retrieve`."""

    model: str
    task: str
    index: IndexInfo
    data: list[Answer]
    """In the order of the queries."""
    coverage: Coverage
    time: Time


class TasksResponse(Model):
    """The answer of `GET /tasks`."""

    model: str
    index: IndexInfo
    tasks: list[ContractTask]


class InfoResponse(Model):
    """The answer of `GET /info`."""

    model: str
    index: IndexInfo
    passages: int
    dimension: int
    shards: int
    kind: str
    """Of index."""
    fused: bool
    """Whether searches can be fused with BM25."""
    recall: dict[str, float]
    """Task → share of the exact best passages that its searches find, as measured when the index was built."""
    limits: Limits
    min_coverage: float
    """Share of the shards without which even a request with allow_partial is refused."""
    shard_timeout_ms: int
    """How long a shard is waited for, within the request's own time."""
    precision: Precision
    """Of the queries' embedding."""
    batch_tokens: int
    """Tokens, about, of the queries that are embedded together."""
    keys: bool
    """Whether a key is needed."""
    versions: dict[str, str]
    """Of the software."""


class PassageResponse(Model):
    """The answer of `GET /passages/{id}`."""

    index: IndexInfo
    id: str
    wikipedia_id: str
    title: str
    text: str


class Status(Model):
    """The answer of `GET /health` and `GET /ready`."""

    status: Literal["ok", "ready"]


class Error(Model):
    message: str
    type: Literal[
        "invalid_request",
        "unauthorized",
        "conflict",
        "not_found",
        "too_large",
        "overloaded",
        "unavailable",
        "deadline",
        "internal",
    ]
    param: str | None
    """The field of the request that is at fault."""
    code: str
    """The rule that was broken, for programs."""


class ErrorResponse(Model):
    """The body of every answer that is not 2xx."""

    error: Error
    request_id: str
    """Also the header X-Request-ID; name it when you report a fault."""
