"""Answers in the lines that KILT's own evaluation reads.

Path: [here] ← app.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import Response

from serve.schema import RetrieveRequest
from taskspec.retrieve.hits import Hit

KILT_LINES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-ndjson": {}}, "description": "JSON, or JSON lines with format kilt"}
}


def kilt_lines(request: RetrieveRequest, found: Sequence[Sequence[Hit]], headers: dict[str, str]) -> Response:
    """Predictions in KILT's format, one JSON line per query, best page first; what has no place in it is in headers."""
    lines = []
    for number, (text, hits) in enumerate(zip(request.queries, found, strict=True)):
        provenance = [
            {"wikipedia_id": hit.wikipedia_id, "title": hit.title, "score": hit.score}
            | ({"text": hit.text} if request.with_text else {})
            for hit in hits
        ]
        line: dict[str, Any] = {"id": request.ids[number]} if request.ids else {}
        line |= {"input": text, "output": [{"answer": "", "provenance": provenance}]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return Response("".join(lines), media_type="application/x-ndjson", headers=headers)
