"""Asks the endpoint of `serve/`, and keeps asking where that is right: for programs, sync and async.

    with Client("http://localhost:8000") as client:
        answer, = client.retrieve("who wrote Faust", task="nq", top_k=3)

Path: HTTP → [here] → hits.  What is asked here only reads, so a request that was lost or refused for the moment (429,
502, 503, a broken connection) is sent again, after the time that the server asks for (Retry-After), if it asks for any,
and a random time that doubles. A deadline bounds all of it. What a request got wrong is never sent again, nor
what the endpoint itself answers with 500; a 500 that is not in its shape is Serve's proxy, which has lost a process.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from taskspec.errors import EndpointError
from taskspec.retrieve.hits import Hit, Level

Body = dict[str, Any]
"""Of a request."""

SENT_AGAIN = (429, 502, 503)
FIRST_WAIT_S, LONGEST_WAIT_S, DOUBLED = 0.1, 5.0, 10
"""Between attempts; how often the first one doubles at most."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the endpoint found for one query."""

    query: str
    truncated: bool
    """Whether the query was longer than its task allows and was cut."""
    complete: bool
    """Whether the hits are all that were asked for, or all that there are."""
    covered: bool
    """Whether the whole index was searched; false only with `allow_partial`."""
    hits: tuple[Hit, ...]
    index_version: str


class Client:
    """One connection pool to an endpoint; may be shared by threads."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        concurrency: int = 8,
        batch_size: int = 64,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Args: timeout_s: of one call, whatever is sent again in it. concurrency: requests under way at a time, of all
        threads; others wait for their turn, inside their deadlines. batch_size: queries of a request; a longer list is
        sent as several.
        """
        self._timeout_s, self._batch_size = timeout_s, batch_size
        self._http = httpx.Client(base_url=url, headers=headers, timeout=None, limits=_limits(concurrency))
        self._turn = threading.BoundedSemaphore(concurrency)

    def retrieve(
        self,
        query: str | Sequence[str],
        task: str,
        *,
        top_k: int = 10,
        level: Level = "page",
        with_text: bool = False,
        only_pages: Sequence[str] | None = None,
        without_pages: Sequence[str] = (),
        fused: bool = False,
        allow_partial: bool = False,
    ) -> list[Answer]:
        """The hits of a query, or of each of several.

        Args: only_pages, without_pages: wikipedia ids of pages that may, or may not, be found. fused: fuse the ranking
            with BM25's. allow_partial: answer from the rest of the index while a part of it is down.
        Raises: EndpointError.
        """
        deadline = time.monotonic() + self._timeout_s
        answers = []
        search = _search(top_k, level, with_text, only_pages, without_pages, fused, allow_partial)
        for body in _bodies(query, self._batch_size, task=task, **search):
            answers += _answers(self._call("POST", "/retrieve", deadline, body))
        return answers

    def tasks(self) -> dict[str, Any]:
        """What `GET /tasks` says. Raises: EndpointError."""
        answer: dict[str, Any] = self._call("GET", "/tasks", time.monotonic() + self._timeout_s)
        return answer

    def _call(self, method: str, path: str, deadline: float, body: Body | None = None) -> Any:
        attempts = _Attempts(f"{method} {_url(self._http, path)}", deadline)
        for left_s in attempts:
            if not self._turn.acquire(timeout=left_s):
                raise attempts.late("waiting for its turn")
            try:
                with self._http.stream(method, path, timeout=attempts.left(), json=attempts.timed(body)) as response:
                    answer = bytearray()
                    for chunk in response.iter_bytes():
                        answer += chunk
                        if not attempts.left():  # httpx limits the time between two chunks only
                            raise attempts.late("its answer came too slowly")
                if attempts.done(response.status_code, response.headers, bytes(answer)):
                    return attempts.parsed(bytes(answer))
            except httpx.TransportError as error:
                attempts.failed(error)
            finally:
                self._turn.release()
            time.sleep(attempts.wait())
        raise attempts.late("")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio: a list of queries goes out in requests at the same time."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        concurrency: int = 8,
        batch_size: int = 64,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Args: as those of `Client`."""
        self._timeout_s, self._batch_size = timeout_s, batch_size
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=_limits(concurrency))
        self._turn = asyncio.Semaphore(concurrency)

    async def retrieve(
        self,
        query: str | Sequence[str],
        task: str,
        *,
        top_k: int = 10,
        level: Level = "page",
        with_text: bool = False,
        only_pages: Sequence[str] | None = None,
        without_pages: Sequence[str] = (),
        fused: bool = False,
        allow_partial: bool = False,
    ) -> list[Answer]:
        """The hits of a query, or of each of several.

        Args: only_pages, without_pages: wikipedia ids of pages that may, or may not, be found. fused: fuse the ranking
            with BM25's. allow_partial: answer from the rest of the index while a part of it is down.
        Raises: EndpointError.
        """
        deadline = time.monotonic() + self._timeout_s
        search = _search(top_k, level, with_text, only_pages, without_pages, fused, allow_partial)
        bodies = _bodies(query, self._batch_size, task=task, **search)
        try:
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(self._call("POST", "/retrieve", deadline, body)) for body in bodies]
        except ExceptionGroup as errors:  # of the first that failed; it ended the others
            raise errors.exceptions[0] from None
        return [answer for call in calls for answer in _answers(call.result())]

    async def tasks(self) -> dict[str, Any]:
        """What `GET /tasks` says. Raises: EndpointError."""
        answer: dict[str, Any] = await self._call("GET", "/tasks", time.monotonic() + self._timeout_s)
        return answer

    async def _call(self, method: str, path: str, deadline: float, body: Body | None = None) -> Any:
        attempts = _Attempts(f"{method} {_url(self._http, path)}", deadline)
        for left_s in attempts:
            try:
                await asyncio.wait_for(self._turn.acquire(), left_s)
            except TimeoutError as error:
                raise attempts.late("waiting for its turn") from error
            try:
                async with asyncio.timeout(attempts.left()):  # httpx limits the time between two chunks only
                    response = await self._http.request(method, path, timeout=None, json=attempts.timed(body))
                if attempts.done(response.status_code, response.headers, response.content):
                    return attempts.parsed(response.content)
            except httpx.TransportError as error:
                attempts.failed(error)
            except TimeoutError as error:
                raise attempts.late("its answer came too slowly") from error
            finally:
                self._turn.release()
            await asyncio.sleep(attempts.wait())
        raise attempts.late("")

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Attempts:
    """Whether and when a request is sent again; knows no network, so sync and async share it."""

    def __init__(self, what: str, deadline: float) -> None:
        self._what, self._deadline = what, deadline
        self._sent = 0
        self._asked_s: float | None = None
        self._last: EndpointError | None = None

    def __iter__(self) -> Iterator[float]:
        """Seconds left for each attempt, as long as there are some."""
        while (left_s := self.left()) > 0:
            yield left_s

    def left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def done(self, status: int, headers: Mapping[str, str], body: bytes) -> bool:
        """Whether the answer is there. Raises: EndpointError if another attempt would not help."""
        self._sent += 1
        if 200 <= status < 300:
            return True
        self._last = _error(self._what, status, body)
        lost = status == 500 and self._last.code is None  # not the endpoint's own: a proxy lost the process behind it
        if status not in SENT_AGAIN and not lost:
            raise self._last
        self._asked_s = _retry_after(headers.get("retry-after", ""))
        return False

    def parsed(self, body: bytes) -> Any:
        """The answer.    Raises: EndpointError if it is no JSON: something else than the endpoint has answered."""
        try:
            return json.loads(body)
        except ValueError as error:
            text = " ".join(body.decode(errors="replace").split())[:200]
            raise EndpointError(f"{self._what}: the answer is no JSON: {text}") from error

    def timed(self, body: Body | None) -> Body | None:
        """What is sent now: with the time that is left, so that nothing is begun that comes too late."""
        return body and {**body, "timeout_ms": math.ceil(1000 * self.left()) or 1}

    def failed(self, error: httpx.TransportError) -> None:
        """Raises: EndpointError if another attempt would not help."""
        self._sent += 1
        self._asked_s = None
        reason = f"{type(error).__name__} {error}".strip()
        late = isinstance(error, httpx.TimeoutException)
        way_out = "is timeout_s too short?" if late else "is the endpoint there, and its address right?"
        self._last = EndpointError(f"{self._what}: {reason}; {way_out}")
        if isinstance(error, httpx.UnsupportedProtocol):
            raise self._last from error

    def wait(self) -> float:
        """Seconds until the next attempt: a random time that doubles, after the time that the server asked for, so that
        clients that were refused together do not come back together.

        Raises: EndpointError if the deadline comes before it.
        """
        asked_s, left_s = self._asked_s or 0.0, self.left()
        longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(self._sent - 1, DOUBLED))
        wait_s = asked_s + random.uniform(0, min(longest_s, max(0.0, left_s - asked_s)))
        if wait_s >= left_s:
            raise self.late(f"the next attempt would be in {wait_s:.1f} s" if left_s else "")
        return wait_s

    def late(self, why: str) -> EndpointError:
        """The error of a deadline, with what the last attempt met."""
        last = self._last
        parts = [f"{self._what}: no answer in time after {self._sent} attempt(s)", why, str(last) if last else ""]
        text = "; ".join(filter(None, parts))
        if last is None:
            return EndpointError(text)
        return EndpointError(
            text, status=last.status, type=last.type, param=last.param, code=last.code, request_id=last.request_id
        )


def _url(http: httpx.Client | httpx.AsyncClient, path: str) -> str:
    """Where httpx sends a request: below the path that the endpoint's own address may have."""
    return str(http.base_url).rstrip("/") + path


def _limits(concurrency: int) -> httpx.Limits:
    return httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)


def _bodies(query: str | Sequence[str], size: int, **fields: Any) -> list[Body]:
    queries = [query] if isinstance(query, str) else list(query)
    return [{"query": queries[first : first + size], **fields} for first in range(0, len(queries), size)]


def _search(
    top_k: int,
    level: Level,
    with_text: bool,
    only_pages: Sequence[str] | None,
    without_pages: Sequence[str],
    fused: bool,
    allow_partial: bool,
) -> Body:
    """The fields of a request that are not the endpoint's defaults anyway."""
    fields: Body = {"top_k": top_k, "level": level, "with_text": with_text}
    if only_pages is not None:
        fields["only_pages"] = list(only_pages)
    if without_pages:
        fields["without_pages"] = list(without_pages)
    if fused:
        fields["fused"] = True
    if allow_partial:
        fields["allow_partial"] = True
    return fields


def _answers(body: Mapping[str, Any]) -> list[Answer]:
    version = body["index"]["version"]
    return [
        Answer(
            query=one["query"],
            truncated=one["truncated"],
            complete=one["complete"],
            covered=body["coverage"]["full"],
            hits=tuple(Hit(**hit) for hit in one["hits"]),
            index_version=version,
        )
        for one in body["data"]
    ]


def _retry_after(text: str) -> float | None:
    """Seconds that the server asks for, as a number or a date (RFC 9110, 10.2.3); None if it does not."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _error(what: str, status: int, body: bytes) -> EndpointError:
    """From the endpoint's own shape, or from whatever a proxy before it answers with."""
    try:
        tree = json.loads(body)
        said = tree["error"]
        fields = {name: said.get(name) for name in ("type", "param", "code")}
        message = f"{what}: {status}: {said['message']}"
        return EndpointError(message, status=status, request_id=tree.get("request_id"), **fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        text = " ".join(body.decode(errors="replace").split())[:200]
        return EndpointError(f"{what}: {status}: {text}", status=status)
