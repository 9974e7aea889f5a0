"""Who is let in: work under way is counted in tokens, and what would be too much, or too late, is refused at once.

Path: checked request → [here] → encoder. A refusal costs nothing and comes early, so that what is let in is answered in
time; it says when there will be room, by how fast work can be done. One event loop, no threads, no HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LETTERS_A_TOKEN = 4
"""Of English text, about. The tokenizer would be exact, and cost a tenth of embedding the query."""
WINDOW_S = 1.0
"""How long answers are counted for a rate, or until there is no work."""
SHARE_OF_TIME = 0.5
"""How much of its time a request may be expected to take: the rate is no better known than that."""
REMEMBERED = 0.9
"""Share of the usual time of an answer that stays when there is another."""
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
    """The work under way in one replica.

    How much can be done is seen only where it is too little: as long as no request is late, all have time. From then on
    the rate of that second bounds what is let in; a better one raises it, and it is forgotten when nothing is refused.
    A request that asked for less time than answers usually take says nothing about the others.
    """

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.tokens = 0
        self._rate = 0.0
        """Tokens a second that were answered in the last window."""
        self._most_rate = math.inf
        """Tokens a second that can be answered."""
        self._usual_s = 0.0
        """What an answer takes; 0 before the first."""
        self._begin_window()

    @contextmanager
    def admit(self, tokens: int, time_s: float) -> Iterator[None]:
        """Counts a request while it is inside. It is let in in any case where there is nothing else to do.

        Args: time_s: what the request has; inside, a TimeoutError says that it was not enough.
        Raises: Overloaded.
        """
        wait_s = self._wait_s(tokens, time_s)
        if self.tokens and wait_s > 0:
            self._refused = True
            raise Overloaded(math.ceil(min(LONGEST_WAIT_S, wait_s)))
        if not self.tokens:
            self._begin_window()
        self.tokens += tokens
        came = time.monotonic()
        try:
            yield
            self._done += tokens
            took_s = time.monotonic() - came
            self._usual_s = REMEMBERED * self._usual_s + (1 - REMEMBERED) * took_s if self._usual_s else took_s
        except TimeoutError:
            self._late |= 0 < self._usual_s <= time_s
            raise
        finally:
            self.tokens -= tokens
            self._end_window()

    def _wait_s(self, tokens: int, time_s: float) -> float:
        """Until there is room for so many tokens and time to do them; 0 or less is now."""
        under_way = self.tokens + tokens
        excess = under_way - self.most_tokens
        room_s = excess / self._rate if self._rate else float(excess > 0)
        return max(room_s, under_way / self._most_rate - SHARE_OF_TIME * time_s)

    def _begin_window(self) -> None:
        self._since, self._done, self._late, self._refused = time.monotonic(), 0, False, False

    def _end_window(self) -> None:
        """If it is time."""
        seconds = time.monotonic() - self._since
        if seconds <= 0 or (self.tokens and seconds < WINDOW_S):
            return
        self._rate = self._done / seconds
        if self._late:
            before = self._rate if math.isinf(self._most_rate) else self._most_rate
            self._most_rate = max(1.0, (before + self._rate) / 2)
        elif not self._refused:
            self._most_rate *= 2
        self._most_rate = max(self._most_rate, self._rate)
        self._begin_window()
