"""The shapes of `/aliases`.

Path: [here] ← app, aliases.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from serve.schema import Model, Request


class AliasRequest(Request):
    """Which version an alias is to point to, and for how much of the traffic.

    Neither `shares` nor `shadow`: all of it, which is a flip. The version that it points to now: nothing else is tried
    any more.
    """

    checkpoint: str
    index: str
    expected: str
    """The version that the alias points to now, as `GET /aliases/{name}` tells; another one is a conflict."""
    revision: int | None = None
    """Of the alias, as told there: of two changes of `shares` or `shadow` at the same time the second is a conflict.
    Null is any."""
    shares: dict[str, int] = Field({})
    """Task → percent of its queries that the new version answers, by the query; other tasks stay. A pilot."""
    shadow: bool = False
    """Ask both versions, answer from the old one, and count how far their pages agree."""
    epsilon: float = Field(0.02, ge=0)
    """By how much a task's R-precision on the golden queries may be lower than now."""

    @field_validator("shares")
    @classmethod
    def _percents(cls, shares: dict[str, int]) -> dict[str, int]:
        for task, percent in shares.items():
            if not 0 <= percent <= 100:
                raise ValueError(f"{task} must have 0 to 100 percent but has {percent}")
        return shares


class Compared(Model):
    """How far two versions agree on a task's queries, since the shadow began."""

    queries: int
    overlap: float
    """Mean share of the old version's hits that the new one has too."""


class VersionInfo(Model):
    version: str
    checkpoint: str
    index: str


class AliasResponse(Model):
    """The answer of `GET /aliases/{name}`."""

    alias: str
    revision: int
    """Counts the changes."""
    current: VersionInfo
    candidate: VersionInfo | None
    shares: dict[str, int]
    shadow: bool
    compared: dict[str, Compared]
    """Of the candidate, by task."""
    status: Literal["served", "loading", "trying", "refused"]
    """Of the last change that was asked for: `loading` into every replica, `trying` golden queries on it, `served`, or
    `refused`, then `reason` says why and nothing has changed."""
    reason: str | None
    """Why it was refused, or served without a trial."""
    asked: AliasRequest | None
    """That last change; null if none was asked for since `Aliases` started."""
    golden: dict[str, dict[str, float]]
    """Version → task → R-precision on the golden queries, when they were last tried."""


class AliasesResponse(Model):
    """The answer of `GET /aliases`."""

    aliases: list[AliasResponse]
