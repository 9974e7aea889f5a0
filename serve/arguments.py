"""What builds the server, and its limits.

Path: `serve run serve.app:build name=value …` → [here] → app, deployments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from serve.keys import Key
from taskspec.errors import RequestError
from taskspec.sections import Precision, Section


class TooLarge(RequestError):
    """A request that asks for more at once than the server does."""


class Limits(Section):
    """What a request may ask for, and what a replica takes on. `GET /info` shows it."""

    query_characters: int = Field(20_000, ge=1)
    """Longest query. What is longer than its task's max_query_tokens is cut, but has to be split into tokens first."""
    body_bytes: int = Field(4_000_000, ge=1000)
    """Longest body of a request."""
    queries: int = Field(1000, ge=1)
    """Most queries that one request may hold."""
    top_k: int = Field(1000, ge=1)
    """Most hits per query."""
    hits: int = Field(64_000, ge=1)
    """Most hits that one request may ask for, its queries times top_k: all of them are one answer in memory."""
    chosen_pages: int = Field(10_000, ge=1)
    """Most pages in `only_pages` and `without_pages` together."""
    timeout_ms: int = Field(30_000, ge=1)
    """Longest time that a request gets, whatever it asks for."""
    tokens: int = Field(50_000, ge=1)
    """Most query tokens, about, that one request may hold: what needs all of a replica would never find it idle."""
    tokens_under_way: int = Field(100_000, ge=1)
    """Query tokens, about, that one HTTP replica has under way; what would be more is refused with 429."""
    body_timeout_ms: int = Field(60_000, ge=1)
    """How long a body may take to come, all of it: meanwhile its request takes one of the places of a replica."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.tokens > self.tokens_under_way:
            raise ValueError(
                f"tokens is {self.tokens}, more than tokens_under_way, {self.tokens_under_way}: such a request would "
                f"never be let in beside another; lower it"
            )
        return self

    def check(self, texts: Sequence[str], param: str, top_k: int) -> None:
        """Raises: TooLarge, RequestError naming the limit that is passed. Args: param: what the texts came in."""
        longest = max(map(len, texts), default=0)
        if longest > self.query_characters:
            most = self.query_characters
            raise TooLarge(f"a {param} has {longest} characters but may have {most}; send less of it", param=param)
        if len(texts) > self.queries:
            raise TooLarge(f"{param} has {len(texts)} queries but a request may hold {self.queries}", param=param)
        if top_k > self.top_k:
            raise RequestError(f"top_k is {top_k} but may be {self.top_k} at most", param="top_k")
        if len(texts) * top_k > self.hits:
            asked = f"{len(texts)} queries with top_k {top_k} ask for {len(texts) * top_k} hits"
            raise TooLarge(
                f"{asked} but a request may ask for {self.hits}; send fewer queries at a time", param="top_k"
            )


class ServeArgs(Section):
    """What `serve run serve.app:build name=value …` takes."""

    checkpoint: str
    """URI that jobs.train printed."""
    index: str
    """URI that jobs.index printed for this checkpoint."""
    aliases: str | None = None
    """Folder, local or s3://, whose `<alias>.json` says which version is served; where it does not stand yet, the one
    above is written into it. By it versions are changed while serving (`PUT /aliases/{name}`). None: the one above."""
    alias: str = Field("live", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """The alias that is served."""
    keys: tuple[Key, ...] = ()
    """Who may ask, by the hash of a key (`python -m serve.keys NAME`); none: anybody."""
    limits: Limits = Limits()
    precision: Precision = "fp32"
    """Of the queries' embedding: bf16 takes about half the time for batches where the processor multiplies it, and its
    embeddings are those of `jobs.evaluate` to about a thousandth."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens, about, of the queries that are embedded together."""
    cache_bytes: int = Field(64_000_000, ge=0)
    """Memory, about, for answers that each HTTP replica keeps; 0 keeps none."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Share of the shards without which even a request with allow_partial is refused."""
    shard_timeout_ms: int = Field(5000, ge=1)
    """How long a shard is waited for, within the request's own time; one that takes longer is left out until it answers
    again."""
    shard_deployments: int | None = Field(None, ge=1)
    """None is one for each shard of the index."""
    shard_cpus: float = Field(0.1, gt=0)
    """Logical CPUs that a shard's replica reserves: little by default, so that any laptop can serve."""
    shard_replicas: int = Field(1, ge=1)
    """Most replicas of each shard; there is one of it until `SHARD_BATCHES` batches are under way."""
    threads: int | None = Field(None, ge=1)
    """Threads of one encoder replica; None is every CPU that it may use."""
    shard_threads: int | None = Field(None, ge=1)
    """Threads that one search of a shard replica takes; None is every CPU that it may use."""
    log_queries: bool = False
    """Whether the log of requests holds their queries."""
