"""One line of a KILT file → `Query` or `Page`, or the reason why it is neither.

Path: reading → [here] → passages, prepare.  Strict: what is not in the format is an error, nothing is guessed. Keys
that no stage reads (meta, anchors, answers) are not looked at, and other records, such as one with the same id, are not
seen from here.

A reason puts what differs from record to record into parentheses at its end, so that reasons can be counted by kind.
Format: github.com/facebookresearch/KILT, section "KILT data catalogue".
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, NoReturn

from taskspec.errors import DataError


class Provenance(NamedTuple):
    """Where an answer stands: a page and, where known, a span of its paragraphs, both ends included."""

    wikipedia_id: str
    start_paragraph: int | None
    end_paragraph: int | None


class Query(NamedTuple):
    """A record of a task file."""

    query_id: str
    text: str
    evidence: list[list[Provenance]]
    """One evidence set per output that has provenance, none empty; no set at all in many of KILT's own train records,
    whose pages were not found again in its knowledge source."""


class Page(NamedTuple):
    """A record of a knowledge source."""

    wikipedia_id: str
    title: str
    paragraphs: list[str]
    """KILT's `text`: paragraph ids are positions in it, and the first is the title again."""


def parse_query_line(line: bytes) -> Query:
    """A record of a task file. Raises: DataError with the reason."""
    record = _record(line)
    outputs = _value(record, "output", list)
    evidence = [found for number, output in enumerate(outputs) if (found := _evidence(output, number))]
    return Query(_text(record, "id"), _text(record, "input"), evidence)


def parse_page_line(line: bytes) -> Page:
    """A record of a knowledge source. Raises: DataError with the reason."""
    record = _record(line)
    paragraphs = _value(record, "text", list)
    if not paragraphs:
        raise DataError("'text' is empty")
    for number, paragraph in enumerate(paragraphs):
        if not isinstance(paragraph, str):
            raise DataError(f"'text' must be a list of texts (item {number} is {_type(paragraph)})")
        _require_unicode("text", paragraph)
    return Page(_text(record, "wikipedia_id"), _text(record, "wikipedia_title"), paragraphs)


def _evidence(output: Any, number: int) -> list[Provenance]:
    if not isinstance(output, dict):
        raise DataError(f"an output is no object (output {number} is {_type(output)})")
    provenance = _value(output, "provenance", list) if "provenance" in output else []
    return [_provenance(item, f"output {number}, provenance {place}") for place, item in enumerate(provenance)]


def _provenance(item: Any, where: str) -> Provenance:
    if not isinstance(item, dict):
        raise DataError(f"a provenance is no object ({where} is {_type(item)})")
    if "wikipedia_id" not in item:
        raise DataError(f"a provenance has no 'wikipedia_id' ({where})")
    start, end = _paragraph(item, "start_paragraph_id"), _paragraph(item, "end_paragraph_id")
    if start is None:
        return Provenance(_text(item, "wikipedia_id"), None, None)
    end = start if end is None else end
    if end < start:
        raise DataError(f"a provenance ends before it starts ({where}: paragraphs {start} to {end})")
    return Provenance(_text(item, "wikipedia_id"), start, end)


def _paragraph(item: dict[str, Any], key: str) -> int | None:
    """KILT writes an unknown paragraph as a missing key, null or −1."""
    value = item.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value >= 2**31:
        raise DataError(f"'{key}' must be a whole number (is {_type(value)})")
    return value if value >= 0 else None


def _record(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise DataError("is an empty line")
    try:
        # A byte order mark, as some editors put it before the first line, is no damage.
        record = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON ({error.msg} at position {error.pos})") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of brackets
        raise DataError(f"is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"is no object (is {_type(record)})")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise DataError(f"is not JSON ({name} is no JSON value)")


def _value(record: dict[str, Any], key: str, kind: type) -> Any:
    if key not in record:
        raise DataError(f"has no '{key}'")
    value = record[key]
    if not isinstance(value, kind):
        raise DataError(f"'{key}' must be a {_NAMES[kind]} (is {_type(value)})")
    return value


def _text(record: dict[str, Any], key: str) -> str:
    value: str = _value(record, key, str)
    if not value.strip():
        raise DataError(f"'{key}' is empty")
    _require_unicode(key, value)
    return value


def _require_unicode(key: str, value: str) -> None:
    """JSON can spell half of a surrogate pair, which no file can hold as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"'{key}' is not Unicode (half a surrogate pair at position {error.start})") from error


_NAMES = {str: "text", list: "list", dict: "object", bool: "boolean", int: "number", float: "number"}


def _type(value: Any) -> str:
    return _NAMES.get(type(value), "null")
