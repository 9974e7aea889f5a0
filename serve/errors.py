"""Every error of the endpoint in one shape: {"error": {message, type, param, code}, "request_id"}.

Path: app, taskspec, FastAPI, Serve raise → [here] → body and status.  Nothing is raised or decided here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from serve.admission import Overloaded
from serve.alias_schema import AliasRequest
from serve.arguments import TooLarge
from serve.guard import seen
from serve.remote import ShardsLostError
from serve.schema import EmbedRequest, Error, ErrorResponse, OpenAIRequest, RetrieveRequest
from taskspec.errors import RequestError, TaskspecError

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 404, 405, 408, 409, 413, 422, 429, 500, 503, 504)
}
"""What `/docs` says of errors."""
BODIES: dict[str, type[BaseModel]] = {
    "/retrieve": RetrieveRequest,
    "/embed": EmbedRequest,
    "/v1/embeddings": OpenAIRequest,
    "/aliases/{name}": AliasRequest,
}
RETRY_AFTER = {"retry-after": "1"}

logger = logging.getLogger("ray.serve")


class Conflict(TaskspecError):
    """The alias is not as the request expects it, or is being changed."""


class Late(TimeoutError):
    """The request's own deadline has come."""


class Uncovered(Exception):
    """Too little of the index answers, or not all of it where all is wanted."""


def answer_errors(app: FastAPI) -> None:
    """Makes an application answer its errors in this shape. Call it before `serve.ingress`, which copies the app."""
    app.add_exception_handler(RequestError, _rule_of_the_retriever)
    app.add_exception_handler(RequestValidationError, _rule_of_the_schema)
    app.add_exception_handler(HTTPException, _refusal)
    app.add_exception_handler(Overloaded, _overload)
    app.add_exception_handler(Conflict, _conflict)
    app.add_exception_handler(Late, _deadline)
    for kind in (Uncovered, ShardsLostError):
        app.add_exception_handler(kind, _no_shard)
    for kind in (RayActorError, DeploymentUnavailableError, BackPressureError):
        app.add_exception_handler(kind, _no_encoder)
    app.add_exception_handler(Exception, _fault)


def _answer(status: int, error: Error, headers: dict[str, str] | None = None) -> JSONResponse:
    request = seen()
    request.facts |= {"error": error.code, "param": error.param}
    content = ErrorResponse(error=error, request_id=request.request_id).model_dump()
    return JSONResponse(content, status_code=status, headers=headers)


def _said(exception: Exception) -> str:
    """What an error says; one that comes from another process says where it was raised as well."""
    return str(getattr(exception, "cause", exception))


async def _rule_of_the_retriever(request: Request, exception: Exception) -> JSONResponse:
    error = cast(RequestError, exception)
    if isinstance(error, TooLarge):
        return _answer(413, Error(message=str(error), type="too_large", param=error.param, code="too_long"))
    code = f"invalid_{error.param}"
    return _answer(422, Error(message=str(error), type="invalid_request", param=error.param, code=code))


async def _rule_of_the_schema(request: Request, exception: Exception) -> JSONResponse:
    """Tells the first rule that is broken; `code` is pydantic's name of it."""
    problem = cast(RequestValidationError, exception).errors()[0]
    param = str(problem["loc"][1]) if len(problem["loc"]) > 1 else None  # the field, without place or type inside it
    message = problem["msg"].removeprefix("Value error, ")
    status = 422
    if problem["type"] == "json_invalid":
        message, param, status = f"the body is not JSON: {problem['ctx']['error']}", None, 400
    elif problem["type"] == "extra_forbidden":
        message = f"unknown field {param}; known: {', '.join(_fields(request))}"
    elif param:
        message = f"{param}: {message}"
    elif problem["type"] in ("missing", "model_attributes_type"):
        message = f"the body must be a JSON object, of {', '.join(_fields(request))}"
    return _answer(status, Error(message=message, type="invalid_request", param=param, code=problem["type"]))


def _fields(request: Request) -> Iterable[str]:
    return BODIES[request.scope["route"].path].model_fields


async def _refusal(request: Request, exception: Exception) -> JSONResponse:
    """No such route or method, nothing of that id, a body that is too long, or nobody behind the route."""
    error = cast(HTTPException, exception)
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    message = f"{request.method} {path}: {error.detail}"
    if error.status_code == 404:
        code = "no_route" if error.detail == "Not Found" else "not_found"
        return _answer(404, Error(message=message, type="not_found", param=None, code=code))
    if error.status_code == 403:
        return _answer(403, Error(message=message, type="unauthorized", param=None, code="scope"))
    if error.status_code == 413:
        return _answer(413, Error(message=error.detail, type="too_large", param=None, code="body"))
    if error.status_code == 503:
        return _answer(503, Error(message=message, type="unavailable", param=None, code="not_ready"), RETRY_AFTER)
    code = "method" if error.status_code == 405 else "request"
    told = Error(message=message, type="invalid_request", param=None, code=code)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers = _allowed(request) or headers
    return _answer(error.status_code, told, headers)


def _allowed(request: Request) -> dict[str, str]:
    """All methods of a documented path; Starlette names those of its first route only. Empty for other paths."""
    path = getattr(request.scope.get("route"), "path", None)
    methods = request.app.openapi()["paths"].get(path, {})
    return {"allow": ", ".join(sorted(map(str.upper, methods)))} if methods else {}


async def _overload(request: Request, exception: Exception) -> JSONResponse:
    error = cast(Overloaded, exception)
    told = Error(message=str(error), type="overloaded", param=None, code="tokens_under_way")
    return _answer(429, told, {"retry-after": str(error.retry_after_s)})


async def _conflict(request: Request, exception: Exception) -> JSONResponse:
    """The state is not as the request expects it."""
    return _answer(409, Error(message=_said(exception), type="conflict", param=None, code="conflict"))


async def _deadline(request: Request, exception: Exception) -> JSONResponse:
    return _answer(504, Error(message=str(exception), type="deadline", param="timeout_ms", code="deadline"))


async def _no_shard(request: Request, exception: Exception) -> JSONResponse:
    """Shards of the index do not answer."""
    return _answer(503, Error(message=_said(exception), type="unavailable", param=None, code="no_shard"), RETRY_AFTER)


async def _no_encoder(request: Request, exception: Exception) -> JSONResponse:
    """A process behind the route is gone, or takes no more."""
    message = "the process that would answer is not there, or takes no more; send the request again"
    return _answer(503, Error(message=message, type="unavailable", param=None, code="no_replica"), RETRY_AFTER)


async def _fault(request: Request, exception: Exception) -> JSONResponse:
    """Ours: the log has the details, under the request's id."""
    logger.error("request %s failed", seen().request_id, exc_info=exception)
    message = "the server failed on this request; its log has the details under the request_id"
    return _answer(500, Error(message=message, type="internal", param=None, code="internal"))
