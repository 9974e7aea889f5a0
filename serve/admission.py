"""Who is let in: work under way is counted in tokens, and what would be too much is refused at once.

Path: checked request → [here] → encoder. A refusal costs nothing and comes early, so that what is let in is answered in
time; it says when there will be room, by how fast work has been done of late. One event loop, no threads, no HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LETTERS_A_TOKEN = 4
"""Of English text, about. The tokenizer would be exact, and cost a tenth of embedding the query."""
REMEMBERED = 0.9
"""Share of the rate that stays when another request is done."""
LONGEST_WAIT_S = 30.0


class Overloaded(Exception):
    """There is too much under way.

    Attributes: retry_after_s: when there should be room again, whole seconds.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too much work is under way; ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


def query_tokens(texts: Iterable[str], most: int) -> int:
    """About how many tokens the queries of one task are.    Args: most: the task's max_query_tokens."""
    return sum(min(most, 4 + len(text) // LETTERS_A_TOKEN) for text in texts)


class Admission:
    """The work under way in one replica."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.tokens = 0
        self._rate = 0.0
        """Tokens a second while there was work."""
        self._done, self._since = 0, 0.0

    @contextmanager
    def admit(self, tokens: int) -> Iterator[None]:
        """Counts a request while it is inside. One with more tokens than there is room for at all is let in alone.

        Raises: Overloaded.
        """
        if self.tokens and self.tokens + tokens > self.most_tokens:
            raise Overloaded(self._wait_s(tokens))
        if not self.tokens:
            self._done, self._since = 0, time.monotonic()
        self.tokens += tokens
        try:
            yield
        finally:
            self.tokens -= tokens
            self._done += tokens
            seconds = time.monotonic() - self._since
            if seconds > 0:
                rate = self._done / seconds
                self._rate = REMEMBERED * self._rate + (1 - REMEMBERED) * rate if self._rate else rate

    def _wait_s(self, tokens: int) -> int:
        excess = self.tokens + tokens - self.most_tokens
        wait_s = excess / self._rate if self._rate else 1.0
        return math.ceil(min(LONGEST_WAIT_S, max(1.0, wait_s)))
