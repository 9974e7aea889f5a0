"""The HTTP endpoint: `serve run serve.app:build checkpoint=… index=…`.

Path: a checkpoint and its index → [here] → answers.  `build` refuses a pair that does not belong together before any
replica starts; `Api` checks requests and shapes answers and errors; the work is done in `deployments`.
"""

# Serve copies `app` and what its routes use when it decorates `Api`: annotations must be types (so no `from __future__
# import annotations` here), and helpers and error handlers must stand above the class.

import asyncio
import dataclasses
import json
import time
from typing import Any

import click
from fastapi import FastAPI, HTTPException, Response
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.deployments import FoundAll, Query, RetrieverDeployment
from serve.errors import ERROR_RESPONSES, TooLarge, answer_errors
from serve.schema import (
    MAX_QUERIES,
    MAX_TOP_K,
    Answer,
    Coverage,
    HitModel,
    IndexInfo,
    Limits,
    RetrieveRequest,
    RetrieveResponse,
    ServeArgs,
    ShardCounts,
    Status,
    TasksResponse,
    Time,
)
from taskspec import store
from taskspec.errors import ConfigError, TaskspecError
from taskspec.index.manifest import KIND, IndexManifest
from taskspec.model.contract import Contract
from taskspec.retrieve.retriever import check_request
from taskspec.train.checkpoint import read_contract

API_CPUS = 0.25
"""Logical share of a CPU that an HTTP replica reserves: it waits more than it works."""
READY_TIMEOUT_S = 2.0
"""How long `GET /ready` waits for a retriever before it says that there is none."""
KILT_LINES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-ndjson": {}}, "description": "JSON, or JSON lines with format kilt"}
}

app = FastAPI(title="taskspec", description="One dense retriever for many retrieval tasks.", responses=ERROR_RESPONSES)
answer_errors(app)


class Refusal(click.ClickException, RayServeException):
    """Why the server does not start: `serve run` prints it as one line and exits 1 (a ClickException), a deployment
    by configuration file shows it as the application's message (a RayServeException)."""

    def __init__(self, error: TaskspecError) -> None:
        super().__init__(f"{type(error).__name__}: {error}")


def build(args: dict[str, Any]) -> Application:
    """The Serve application; what `args` may hold stands in `ServeArgs`.

    Serve would check a parameter typed as `ServeArgs` by itself, and print a traceback where a line is wanted.
    Raises: Refusal if an argument is missing, unknown or wrong, or if checkpoint and index cannot be read or do not
        belong together.
    """
    try:
        settings = ServeArgs.model_validate(args)
    except ValidationError as error:
        problem = error.errors()[0]
        name, known = ".".join(map(str, problem["loc"])), ", ".join(ServeArgs.model_fields)
        raise Refusal(ConfigError(f"argument {name}: {problem['msg']}; known: {known}")) from error
    return _build(settings)


def _build(args: ServeArgs) -> Application:
    try:
        contract = read_contract(args.checkpoint)
        index = IndexManifest.of(args.index, store.read_manifest(args.index, KIND))
        index.require_built_by(contract, args.checkpoint, args.index)
    except TaskspecError as error:
        raise Refusal(error) from error
    retriever = RetrieverDeployment.options(max_ongoing_requests=max(100, 2 * args.max_batch))
    return Api.bind(retriever.bind(args), contract, index.fingerprint)


def _kilt_lines(request: RetrieveRequest, found: FoundAll) -> Response:
    """Predictions in KILT's format, one JSON line per query, pages best first."""
    lines = []
    for number, (text, one) in enumerate(zip(request.queries, found.queries, strict=True)):
        provenance = [
            {"wikipedia_id": hit.wikipedia_id, "title": hit.title, "score": hit.score}
            | ({"text": hit.text} if request.with_text else {})
            for hit in one.hits
        ]
        line: dict[str, Any] = {"id": request.ids[number]} if request.ids else {}
        line |= {"input": text, "output": [{"answer": "", "provenance": provenance}]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return Response("".join(lines), media_type="application/x-ndjson")


@serve.deployment(ray_actor_options={"num_cpus": API_CPUS}, max_ongoing_requests=1000)
@serve.ingress(app)
class Api:
    """The routes."""

    def __init__(self, retriever: DeploymentHandle, contract: Contract, fingerprint: str) -> None:
        self._retriever = retriever
        self._contract = contract
        self._fingerprint = fingerprint

    @app.post("/retrieve", response_model=RetrieveResponse, responses=KILT_LINES)
    async def retrieve(self, request: RetrieveRequest) -> RetrieveResponse | Response:
        """The best pages or passages for one query or several of one task."""
        began = time.monotonic()
        texts = request.queries
        if len(texts) > MAX_QUERIES:
            raise TooLarge(f"query has {len(texts)} queries but a request may hold {MAX_QUERIES}", param="query")
        check_request((task.name for task in self._contract.tasks), request.task, texts, request.top_k)
        queries = [Query(text, request.task, request.top_k, request.level, request.with_text) for text in texts]
        found: FoundAll = await self._retriever.search.remote(queries)
        if request.format == "kilt":
            return _kilt_lines(request, found)
        return RetrieveResponse(
            model=self._contract.name,
            task=request.task,
            index=IndexInfo(alias=None, version=found.version, fingerprint=self._fingerprint),
            data=[
                Answer(
                    query=text,
                    truncated=one.truncated,
                    hits=[HitModel(**dataclasses.asdict(hit)) for hit in one.hits],
                )
                for text, one in zip(texts, found.queries, strict=True)
            ],
            coverage=Coverage(full=True, shards=ShardCounts(total=found.shards, successful=found.shards, failed=0)),
            time=Time(
                wait_ms=round(found.wait_ms, 3),
                embed_ms=round(found.last.embed_ms, 3),
                search_ms=round(found.last.search_ms, 3),
                total_ms=round((time.monotonic() - began) * 1000, 3),
                batch_queries=found.last.queries,
            ),
        )

    @app.get("/tasks")
    async def tasks(self) -> TasksResponse:
        """What may be asked: the tasks of the model and the limits of a request."""
        limits = Limits(queries_per_request=MAX_QUERIES, top_k=MAX_TOP_K)
        return TasksResponse(model=self._contract.name, tasks=list(self._contract.tasks), limits=limits)

    @app.get("/health")
    async def health(self) -> Status:
        """This process answers."""
        return Status(status="ok")

    @app.get("/ready")
    async def ready(self) -> Status:
        """A retriever answers too; 503 otherwise."""
        try:
            await asyncio.wait_for(self._retriever.ready.remote(), READY_TIMEOUT_S)
        except (TimeoutError, RayActorError, RayServeException) as error:
            raise HTTPException(503, "no retriever answers; ask again, or see the Serve status") from error
        return Status(status="ready")
