"""What every request passes before its route: an id, a key, a limit on its body; and a line in the log after it.

Path: HTTP → [here] → routes. Plain ASGI, so that nothing is read before it may be.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.keys import Key, find_key, presented
from serve.schema import Error, ErrorResponse

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
"""What needs no key: what probes ask, and pages that hold nothing."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_GONE = 499
"""In the log and the metrics, as other servers count it: nobody waits for the answer any more."""

LOGGING = {"encoding": "JSON", "enable_access_log": False}
"""Of all deployments: an object a line; the guard's own line per request takes the place of Serve's."""

logger = logging.getLogger("ray.serve")


@dataclass
class Seen:
    """What is noted about a request while it is served, for the log and the metrics."""

    request_id: str
    key: Key | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What the route adds: task, queries, tokens, stages."""


_current: ContextVar[Seen] = ContextVar("current")


def note(request: Seen) -> None:
    """Makes it the request that is being served, for what runs in the same task."""
    _current.set(request)


def seen() -> Seen:
    """The request that is being served."""
    return _current.get()


@dataclass(frozen=True)
class Settings:
    """What the middleware goes by."""

    keys: Sequence[Key] = ()
    body_bytes: int = 0
    """0 is any."""
    body_timeout_s: float = 60.0
    count: Callable[[str, str, int, float], None] = lambda method, path, status, seconds: None
    """Takes every request into the metrics."""


_settings = Settings()


def configure(settings: Settings) -> None:
    """For this process; the one that serves routes calls it when it starts."""
    global _settings
    _settings = settings


class GuardMiddleware:
    """Around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # without the application's route_prefix
        # The client's, or one that Serve's proxy made; the proxy puts it on the answer too.
        request = Seen(headers.get("x-request-id") or uuid.uuid4().hex)
        note(request)
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._refusal(path, headers, request)
            if refused is not None:
                request.facts["error"] = refused[1].code
                await _respond(answer, *refused, request.request_id)
            else:
                await self._app(scope, _Limited(receive, _settings.body_bytes), answer)
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "none")  # /passages/{id}, not each id
            method = scope["method"] if scope["method"] in METHODS else "other"  # the client's text
            _settings.count(method, route, status, seconds)
            line = {
                "request_id": request.request_id,
                "method": scope["method"],
                "path": path,
                "status": status,
                "ms": round(1000 * seconds, 2),
                "key": request.key.name if request.key else None,
            }
            # By the route: a path is the client's text, and not every formatter writes it so that it keeps its line.
            extra = {"request": line | request.facts}
            logger.info("%s %s %d, %.0f ms", method, route, status, 1000 * seconds, extra=extra)

    @staticmethod
    def _refusal(path: str, headers: Headers, request: Seen) -> tuple[int, Error, Mapping[str, str]] | None:
        if _settings.keys and path not in OPEN_PATHS:
            secret = presented(headers.get("authorization"), headers.get("x-api-key"))
            key = find_key(_settings.keys, secret) if secret else None
            if key is None:
                message = "no key, or none that is known: send Authorization: Bearer KEY, or X-API-Key: KEY"
                error = Error(message=message, type="unauthorized", param=None, code="no_key")
                return 401, error, {"www-authenticate": "Bearer"}
            request.key = key
            if "read" not in key.scopes and "admin" not in key.scopes:
                error = Error(message=f"key {key.name} may not ask", type="unauthorized", param=None, code="scope")
                return 403, error, {}
        length = headers.get("content-length", "")
        if _settings.body_bytes and length.isdecimal() and int(length) > _settings.body_bytes:
            return 413, _too_long(), {}
        return None


class _Limited:
    """Counts what is received, whatever Content-Length says, and how long it takes to come."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left, self._limited = receive, most, most > 0
        self._ends: float | None = time.monotonic() + _settings.body_timeout_s
        """None once the body is there: what comes then is that the client leaves, or never."""

    async def __call__(self) -> Message:
        left_s = None if self._ends is None else self._ends - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), left_s)
        except TimeoutError as error:
            limit = f"{_settings.body_timeout_s:g} s (limits.body_timeout_ms)"
            raise HTTPException(408, f"the body did not come within {limit}; send it again") from error
        if message["type"] == "http.request":
            if not message.get("more_body", False):
                self._ends = None
            self._left -= len(message.get("body", b""))
            if self._limited and self._left < 0:
                raise HTTPException(413, _too_long().message)
        return message


def _too_long() -> Error:
    message = f"the body is longer than {_settings.body_bytes} bytes (limits.body_bytes); send fewer queries at a time"
    return Error(message=message, type="too_large", param=None, code="body")


async def _respond(send: Send, status: int, error: Error, headers: Mapping[str, str], request_id: str) -> None:
    body = ErrorResponse(error=error, request_id=request_id).model_dump_json().encode()
    pairs = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    encoded = [(name.encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
