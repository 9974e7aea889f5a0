"""Every error of the endpoint in one shape: {"error": {message, type, param, code}, "request_id"}.

Path: app, taskspec, FastAPI, Serve raise → [here] → body and status.  Nothing is raised or decided here.
"""

from __future__ import annotations

import logging
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from serve.schema import Error, ErrorResponse, RetrieveRequest
from taskspec.errors import RequestError

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 404, 405, 413, 422, 500, 503)
}
"""What `/docs` says of errors."""

logger = logging.getLogger("ray.serve")


class TooLarge(RequestError):
    """A request that asks for more at once than the server does."""


def answer_errors(app: FastAPI) -> None:
    """Makes an application answer its errors in this shape. Call it before `serve.ingress`, which copies the app."""
    app.add_exception_handler(RequestError, _rule_of_the_retriever)
    app.add_exception_handler(RequestValidationError, _rule_of_the_schema)
    app.add_exception_handler(HTTPException, _refusal)
    for kind in (RayActorError, DeploymentUnavailableError, BackPressureError):
        app.add_exception_handler(kind, _no_retriever)
    app.add_exception_handler(Exception, _fault)


def _answer(request: Request, status: int, error: Error) -> JSONResponse:
    request_id = request.headers.get("x-request-id", "")  # the client's, or one that Serve's proxy made
    return JSONResponse(ErrorResponse(error=error, request_id=request_id).model_dump(), status_code=status)


async def _rule_of_the_retriever(request: Request, exception: Exception) -> JSONResponse:
    error = cast(RequestError, exception)
    if isinstance(error, TooLarge):
        return _answer(request, 413, Error(message=str(error), type="too_large", param=error.param, code="too_long"))
    code = f"invalid_{error.param}"
    return _answer(request, 422, Error(message=str(error), type="invalid_request", param=error.param, code=code))


async def _rule_of_the_schema(request: Request, exception: Exception) -> JSONResponse:
    """Tells the first rule that is broken; `code` is pydantic's name of it."""
    problem = cast(RequestValidationError, exception).errors()[0]
    param = str(problem["loc"][1]) if len(problem["loc"]) > 1 else None  # the field, without place or type inside it
    message = problem["msg"].removeprefix("Value error, ")
    status = 422
    if problem["type"] == "json_invalid":
        message, param, status = f"the body is not JSON: {problem['ctx']['error']}", None, 400
    elif problem["type"] == "extra_forbidden":
        message = f"unknown field {param}; known: {', '.join(RetrieveRequest.model_fields)}"
    elif param:
        message = f"{param}: {message}"
    return _answer(request, status, Error(message=message, type="invalid_request", param=param, code=problem["type"]))


async def _refusal(request: Request, exception: Exception) -> JSONResponse:
    """No such route or method, or nobody behind it."""
    error = cast(HTTPException, exception)
    message = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code == 404:
        return _answer(request, 404, Error(message=message, type="not_found", param=None, code="no_route"))
    if error.status_code == 503:
        return _answer(request, 503, Error(message=message, type="unavailable", param=None, code="not_ready"))
    return _answer(
        request, error.status_code, Error(message=message, type="invalid_request", param=None, code="method")
    )


async def _no_retriever(request: Request, exception: Exception) -> JSONResponse:
    """The retriever's process is gone, or takes no more."""
    message = "no retriever could take the request; send it again"
    return _answer(request, 503, Error(message=message, type="unavailable", param=None, code="no_replica"))


async def _fault(request: Request, exception: Exception) -> JSONResponse:
    """Ours: the log has the details, under the request's id."""
    logger.error("request failed", exc_info=exception)
    message = "the server failed on this request; its log has the details under the request_id"
    return _answer(request, 500, Error(message=message, type="internal", param=None, code="internal"))
