"""The HTTP endpoint: `serve run serve.app:build checkpoint=… index=…`.

Path: a checkpoint and its index → [here] → answers.  `build` refuses a pair that does not belong together before any
replica starts; `Api` checks requests and shapes answers and errors; the work is done in `deployments`.
"""

# Serve copies `app` and what its routes use when it decorates `Api`: annotations must be types (so no `from __future__
# import annotations` here), and helpers and error handlers must stand above the class.

import base64
import dataclasses
import platform
import time
from importlib import metadata
from typing import Any

import click
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.admission import query_tokens
from serve.alias_schema import AliasesResponse, AliasRequest, AliasResponse
from serve.aliases import Aliases
from serve.answers import Answers, Known, digest
from serve.arguments import ServeArgs, TooLarge
from serve.asks import FoundAll, Search
from serve.deployments import Encoder, Shard
from serve.dispatch import Dispatch
from serve.errors import ERROR_RESPONSES, Late, Uncovered, answer_errors
from serve.guard import LOGGING, GuardMiddleware, Settings, configure, seen
from serve.kilt import KILT_LINES, kilt_lines
from serve.metrics import Metrics
from serve.playground import HEADERS, PAGE
from serve.schema import (
    Answer,
    Coverage,
    Embedding,
    EmbedRequest,
    EmbedResponse,
    HitModel,
    IndexInfo,
    InfoResponse,
    OpenAIEmbedding,
    OpenAIRequest,
    OpenAIResponse,
    OpenAIUsage,
    PassageResponse,
    RetrieveRequest,
    RetrieveResponse,
    ShardCounts,
    Status,
    TasksResponse,
    Time,
)
from serve.versions import Served, open_version, require_whole
from taskspec import __version__
from taskspec.errors import ConfigError, RequestError, TaskspecError
from taskspec.retrieve.retriever import check_request, require_lexical

API_CPUS = 0.25
"""Logical share of a CPU that an HTTP replica reserves: it waits more than it works."""
SHARD_BATCHES = 4
"""Batches under way in a shard's replica from which on another one helps: one is searched, others wait."""
NO_BATCH = Time(wait_ms=0, embed_ms=0, search_ms=0, total_ms=0, batch_queries=0, cached_queries=0)

app = FastAPI(
    title="taskspec",
    description="One dense retriever for many retrieval tasks.",
    responses=ERROR_RESPONSES,
    redoc_url=None,
)
answer_errors(app)
app.add_middleware(GuardMiddleware)


class Refusal(click.ClickException, RayServeException):  # type: ignore[misc]
    """Why the server does not start: `serve run` prints it as one line and exits 1 (a ClickException), a deployment
    by configuration file shows it as the application's message (a RayServeException)."""

    def __init__(self, error: TaskspecError) -> None:
        super().__init__(f"{type(error).__name__}: {error}")


def build(args: dict[str, Any]) -> Application:
    """The Serve application; what `args` may hold stands in `ServeArgs`.

    Serve would check a parameter typed as `ServeArgs` by itself, and print a traceback where a line is wanted.
    Raises: Refusal if an argument is missing, unknown or wrong, or if checkpoint and index are not whole or do not
        belong together.
    """
    try:
        settings = ServeArgs.model_validate(args)
    except ValidationError as error:
        problem = error.errors()[0]
        name, known = ".".join(map(str, problem["loc"])), ", ".join(ServeArgs.model_fields)
        raise Refusal(ConfigError(f"argument {name}: {problem['msg']}; known: {known}")) from error
    try:
        served = open_version(settings.checkpoint, settings.index)
        require_whole(served.version)
    except TaskspecError as error:
        raise Refusal(error) from error
    return _bind(settings, served)


def _bind(args: ServeArgs, served: Served) -> Application:
    count = args.shard_deployments or len(served.index.shards)
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": args.shard_cpus}}
    if args.shard_replicas > 1:
        options["autoscaling_config"] = {
            "min_replicas": 1,
            "max_replicas": args.shard_replicas,
            "target_ongoing_requests": SHARD_BATCHES,
        }
    shards = [Shard.options(name=f"Shard{number}", **options).bind(args, number, count) for number in range(count)]  # type: ignore[attr-defined]
    return Api.bind(args, Aliases.bind(args, served), Encoder.bind(args, shards), count)  # type: ignore[attr-defined]


@serve.deployment(
    ray_actor_options={"num_cpus": API_CPUS},
    max_ongoing_requests=1000,
    graceful_shutdown_timeout_s=60,
    logging_config=LOGGING,
)
@serve.ingress(app)
class Api:
    """The routes."""

    async def __init__(  # type: ignore[misc]
        self, args: ServeArgs, aliases: DeploymentHandle, encoder: DeploymentHandle, shard_deployments: int
    ) -> None:
        self._args, self._aliases, self._encoder = args, aliases, encoder
        self._shard_deployments = shard_deployments
        self._dispatch = Dispatch(args.limits, aliases, encoder)
        await self._dispatch.start()
        self._answers = Answers(args.cache_bytes)
        self._metrics = Metrics(serve.get_replica_context().replica_tag)
        limits = args.limits
        configure(Settings(args.keys, limits.body_bytes, limits.body_timeout_ms / 1000, self._metrics.request))

    @app.post("/retrieve", response_model=RetrieveResponse, responses=KILT_LINES)
    async def retrieve(self, request: RetrieveRequest) -> RetrieveResponse | Response:
        """The best pages or passages for one query or several of one task."""
        began = time.monotonic()
        texts = request.queries
        self._check(request.task, texts, request.top_k)
        table = self._dispatch.table
        served = table.serving(request.task, texts[0])
        if request.fused:
            require_lexical(served.index.lexical)
        chosen = len(request.only_pages or ()) + len(request.without_pages)
        if chosen > self._args.limits.chosen_pages:
            limit = self._args.limits.chosen_pages
            raise TooLarge(f"only_pages and without_pages name {chosen} pages but may name {limit}", param="only_pages")
        only = None if request.only_pages is None else tuple(sorted(set(request.only_pages)))
        without = tuple(sorted(set(request.without_pages)))
        search = Search(request.top_k, request.level, request.with_text, only, without, request.fused)
        asked_for = digest(search)
        keys = [(served.version.id, request.task, asked_for, text) for text in texts]
        answers = {number: known for number, key in enumerate(keys) if (known := self._answers.get(key))}
        asked = [number for number in range(len(texts)) if number not in answers]
        found = None
        if asked:
            found = await self._dispatch.ask(
                served, request.task, [texts[n] for n in asked], search, request.timeout_ms
            )
            self._require_covered(served, found, request.allow_partial)
            parts = zip(asked, found.hits, found.truncated, found.complete, strict=True)
            for number, hits, truncated, complete in parts:
                answers[number] = Known(hits, truncated, complete)
                if not found.failed:
                    self._answers.keep(keys[number], answers[number])
        data = [answers[number] for number in range(len(texts))]
        spent = self._spent(request.task, found, len(asked), len(texts) - len(asked), began)
        seen().facts["version"] = served.version.id
        if table.shadow and served is table.current and not (found and found.failed):
            self._dispatch.start_shadow(table, request.task, texts, search, [one.hits for one in data])
        coverage = self._coverage(served, found)
        if request.format == "kilt":
            shards = coverage.shards
            headers = {
                "x-index-version": served.version.id,
                "x-coverage": f"{shards.successful}/{shards.total}",
                "x-truncated": str(sum(one.truncated for one in data)),
                "x-incomplete": str(sum(not one.complete for one in data)),
            }
            return kilt_lines(request, [one.hits for one in data], headers)
        return RetrieveResponse(
            model=served.contract.name,
            task=request.task,
            index=self._index(served),
            data=[
                Answer(
                    query=text,
                    truncated=one.truncated,
                    complete=one.complete,
                    hits=[HitModel(**dataclasses.asdict(hit)) for hit in one.hits],
                )
                for text, one in zip(texts, data, strict=True)
            ],
            coverage=coverage,
            time=spent,
        )

    @app.post("/embed")
    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """The embeddings of one query or several of one task, as /retrieve searches with them."""
        began = time.monotonic()
        self._check(request.task, request.queries)
        served = self._dispatch.table.current
        found = await self._dispatch.ask(served, request.task, request.queries, None, request.timeout_ms)
        self._spent(request.task, found, len(request.queries), 0, began)
        return EmbedResponse(
            model=served.contract.name,
            task=request.task,
            index=self._index(served),
            data=[
                Embedding(embedding=row, truncated=cut)
                for row, cut in zip(found.embeddings_BD.tolist(), found.truncated, strict=True)
            ],
            tokens=found.tokens,
        )

    @app.post("/v1/embeddings")
    async def openai_embeddings(self, request: OpenAIRequest, response: Response) -> OpenAIResponse:
        """The same in the shape of OpenAI's API: `model` is `<name>@<task>`."""
        began = time.monotonic()
        served = self._dispatch.table.current
        contract = served.contract
        name, _, task = request.model.partition("@")
        tasks = [one.name for one in contract.tasks]
        if name != contract.name or task not in tasks:
            known = ", ".join(f"{contract.name}@{one}" for one in tasks)
            raise RequestError(f"unknown model {request.model!r}; known: {known}", param="model")
        self._check(task, request.queries, param="input")
        found = await self._dispatch.ask(served, task, request.queries, None, None)
        response.headers["x-index-version"] = served.version.id
        response.headers["x-truncated"] = str(sum(found.truncated))
        self._spent(task, found, len(request.queries), 0, began)
        rows: list[list[float] | str] = found.embeddings_BD.tolist()
        if request.encoding_format == "base64":
            little = found.embeddings_BD.astype("<f4")
            rows = [base64.b64encode(row.tobytes()).decode() for row in little]
        return OpenAIResponse(
            data=[OpenAIEmbedding(index=number, embedding=row) for number, row in enumerate(rows)],
            model=request.model,
            usage=OpenAIUsage(prompt_tokens=found.tokens, total_tokens=found.tokens),
        )

    @app.get("/tasks")
    async def tasks(self) -> TasksResponse:
        """What may be asked: the tasks of the model."""
        served = self._dispatch.table.current
        contract = served.contract
        return TasksResponse(model=contract.name, index=self._index(served), tasks=list(contract.tasks))

    @app.get("/info")
    async def info(self) -> InfoResponse:
        """What answers here, and every limit."""
        served = self._dispatch.table.current
        index = served.index
        return InfoResponse(
            model=served.contract.name,
            index=self._index(served),
            passages=index.passages,
            dimension=index.dimension,
            shards=len(index.shards),
            kind=index.kind,
            fused=index.lexical,
            recall={task: one.value for task, one in index.recall.tasks.items()},
            limits=self._args.limits,
            min_coverage=self._args.min_coverage,
            shard_timeout_ms=self._args.shard_timeout_ms,
            precision=self._args.precision,
            batch_tokens=self._args.batch_tokens,
            keys=bool(self._args.keys),
            versions={
                "taskspec": __version__,
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("ray", "torch", "transformers")},
            },
        )

    @app.get("/passages/{passage_id:path}")
    async def passage(self, passage_id: str) -> PassageResponse:
        """The text of a passage, by the id that a hit carries."""
        served = self._dispatch.table.current
        found = await self._dispatch.within(self._encoder.passage.remote(served.version, passage_id))
        if found is None:
            raise HTTPException(404, f"the index has no passage {passage_id!r}; level passage has their ids")
        return PassageResponse(index=self._index(served), id=found.pop("passage_id"), **found)

    @app.get("/aliases")
    async def aliases(self) -> AliasesResponse:
        """The alias that is served here, if versions are changed while serving."""
        return AliasesResponse(aliases=[await self._state()] if self._args.aliases else [])

    @app.get("/aliases/{name}")
    async def alias(self, name: str) -> AliasResponse:
        """What an alias points to, and how its last change goes."""
        self._require_alias(name)
        return await self._state()

    async def _state(self) -> AliasResponse:
        state: AliasResponse = await self._dispatch.within(self._aliases.state.remote())
        return state

    @app.put("/aliases/{name}", status_code=202)
    async def change_alias(self, name: str, request: AliasRequest) -> AliasResponse:
        """Begins to bring in a version: it is opened beside the one that is served, tried, and then answers."""
        key = seen().key
        if key is None or "admin" not in key.scopes:
            raise HTTPException(403, "changing an alias takes a key of scope admin")
        self._require_alias(name)
        state: AliasResponse = await self._dispatch.within(self._aliases.change.remote(request, key.name))
        return state

    def _require_alias(self, name: str) -> None:
        if not self._args.aliases or name != self._args.alias:
            raise HTTPException(404, f"there is no alias {name!r} here")

    @app.get("/health")
    async def health(self) -> Status:
        """This process answers."""
        return Status(status="ok")

    @app.get("/ready")
    async def ready(self) -> Status:
        """A query comes back from every shard; 503 otherwise."""
        await self._dispatch.require_ready()
        return Status(status="ready")

    @app.get("/", include_in_schema=False)
    async def playground(self) -> HTMLResponse:
        """A page that asks all tasks at once."""
        return HTMLResponse(PAGE, headers=HEADERS)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(self) -> Response:
        """What this HTTP replica has counted, for Prometheus."""
        return Response(self._metrics.text(self._dispatch.tokens_under_way), media_type="text/plain; version=0.0.4")

    def _check(self, task: str, texts: list[str], top_k: int = 1, param: str = "query") -> None:
        """Raises: RequestError for what breaks a rule or a limit."""
        if self._args.log_queries:
            seen().facts["query"] = texts
        self._args.limits.check(texts, param, top_k)
        tasks = {one.name: one for one in self._dispatch.table.current.contract.tasks}
        check_request(tasks, task, texts, top_k)
        tokens, most = query_tokens(texts, tasks[task].max_query_tokens), self._args.limits.tokens
        if tokens > most:
            asked = f"the queries have about {tokens} tokens but a request may have {most} (limits.tokens)"
            raise TooLarge(f"{asked}; send fewer at a time", param=param)

    def _require_covered(self, served: Served, found: FoundAll, allow_partial: bool) -> None:
        """Raises: Uncovered; Late where only the request's time was too short for shards."""
        coverage = self._coverage(served, found)
        if coverage.full:
            return
        counts = coverage.shards
        late = found.failed == found.late
        missing = f"{counts.failed} of {counts.total} shards do not answer" + (" in time" if late else "")
        again = "ask with a longer timeout_ms" if late else "ask again"
        refusal = Late if late else Uncovered
        if not allow_partial:
            raise refusal(f"{missing}; {again}, or with allow_partial for an answer from the rest")
        if counts.successful < self._args.min_coverage * counts.total:
            raise refusal(f"{missing}, min_coverage asks for {self._args.min_coverage:g} of them; {again}")

    def _coverage(self, served: Served, found: FoundAll | None) -> Coverage:
        total = len(served.index.shards)
        failed = sum(number % self._shard_deployments in found.failed for number in range(total)) if found else 0
        counts = ShardCounts(total=total, successful=total - failed, failed=failed)
        return Coverage(full=not failed, shards=counts)

    def _spent(self, task: str, found: FoundAll | None, asked: int, cached: int, began: float) -> Time:
        """Where the request's time went; also for the log and the metrics."""
        self._metrics.queries(task, asked, cached)
        total_ms = round((time.monotonic() - began) * 1000, 3)
        spent = NO_BATCH.model_copy(update={"total_ms": total_ms, "cached_queries": cached})
        if found is not None:
            spent = Time(
                wait_ms=round(found.wait_ms, 3),
                embed_ms=round(found.last.embed_ms, 3),
                search_ms=round(found.last.search_ms, 3),
                total_ms=total_ms,
                batch_queries=found.last.queries,
                cached_queries=cached,
            )
            self._metrics.stages(spent.wait_ms, spent.embed_ms, spent.search_ms, spent.batch_queries)
        seen().facts |= {"task": task, "queries": asked + cached, **spent.model_dump()}
        return spent

    def _index(self, served: Served) -> IndexInfo:
        alias = self._args.alias if self._args.aliases else None
        return IndexInfo(alias=alias, version=served.version.id, fingerprint=served.index.fingerprint)
