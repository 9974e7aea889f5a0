"""What a retriever answers with, in this process or over HTTP.

Path: [here] ← retriever, BM25, client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["page", "passage"]


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a query."""

    rank: int
    """From 1, best first."""
    id: str
    """Passage id, or the page's wikipedia id at page level."""
    score: float
    """The passage's score; at page level that of the page's best passage."""
    wikipedia_id: str
    title: str
    text: str | None
    """The passage (at page level the page's best one) where texts were asked for."""
