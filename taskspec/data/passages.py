"""Pages → passages of about 100 words, and the passages that a provenance names.

Path: kilt → [here] → prepare.  N passages of one page. Pure: knows neither files nor row ids.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from taskspec.data.kilt import Provenance

# How KILT marks a paragraph that is a heading or an item of a list: "Section::::History.", "BULLET::::- Item".
_MARKER = re.compile(r"\s*(?:Section::::|BULLET::::-?)")


class Passage(NamedTuple):
    """A piece of a page."""

    text: str
    """Its words, single spaces between; the title is not among them."""
    start_paragraph: int
    end_paragraph: int
    """The paragraphs of its first and its last word."""


def cut_page(paragraphs: Sequence[str], passage_words: int) -> list[Passage]:
    """Cuts a page into passages whose lengths differ by one word at most, so that no short tail is left over.

    Their number is words / passage_words, rounded, and at least 1; a page without words has one passage without text.

    Args: paragraphs: KILT's `text`; the first is the title and left out.
    """
    words: list[str] = []
    owners: list[int] = []
    for number, paragraph in enumerate(paragraphs[1:], start=1):
        marker = _MARKER.match(paragraph)
        found = (paragraph[marker.end() :] if marker else paragraph).split()
        words += found
        owners += [number] * len(found)
    if not words:
        return [Passage("", 0, 0)]
    count = max(1, round(len(words) / passage_words))
    cuts = [number * len(words) // count for number in range(count + 1)]
    return [
        Passage(" ".join(words[start:end]), owners[start], owners[end - 1]) for start, end in itertools.pairwise(cuts)
    ]


def gold_passages(spans_N2: np.ndarray, provenance: Provenance) -> list[int]:
    """Which of a page's passages a provenance names: those that share a paragraph with it.

    The first passage where the provenance names no paragraph, or only paragraphs without words: the title, or one that
    another version of the page has.

    Args: spans_N2: first and last paragraph of each passage, ascending.
    """
    start, end = provenance.start_paragraph, provenance.end_paragraph
    if start is None or end is None:
        return [0]
    named_N = (spans_N2[:, 0] <= end) & (spans_N2[:, 1] >= start)
    return [int(number) for number in np.flatnonzero(named_N)] or [0]
