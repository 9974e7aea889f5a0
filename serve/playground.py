"""The page at `/`: every task's answer to a query, side by side. One file, which asks this endpoint and nobody else.

Path: playground.html → [here] → browser.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("playground.html").read_text(encoding="utf-8")


def _sources(tag: str) -> str:
    """The hashes of the page's own inline code, the only one that a browser is to run."""
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
    return " ".join(f"'sha256-{one}'" for one in hashes)


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; connect-src 'self'; script-src {_sources('script')}; style-src {_sources('style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
