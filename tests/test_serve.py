"""The HTTP endpoint on a real Ray Serve: answers, batches, errors, and pairs that it refuses to serve."""

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
import yaml
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from small_index import TEXTS, TITLES, configuration, publish_index, publish_model, serving

from serve import dispatch
from serve.admission import Overloaded
from serve.answers import Answers
from serve.app import Api, Refusal, build
from serve.arguments import Limits, ServeArgs, TooLarge
from serve.asks import Ask, Batch, FoundAll, Search, Version
from serve.deployments import Encoder, Shard, Versions, open_model
from serve.dispatch import Dispatch
from serve.errors import Late, Uncovered, answer_errors
from serve.guard import GuardMiddleware, Seen, note
from serve.metrics import Metrics
from serve.remote import ShardsLostError
from serve.schema import RetrieveRequest, RetrieveResponse
from serve.versions import Table, open_version
from taskspec import artifacts
from taskspec.errors import ArtifactError
from taskspec.index.manifest import KIND
from taskspec.retrieve.catalog import LocalShards, index_version
from taskspec.retrieve.hits import Hit
from taskspec.retrieve.retriever import Retriever

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `checkpoint` with its index `index`, and `other` of other weights."""
    folder = tmp_path_factory.mktemp("serve")
    config = configuration(folder)
    contract = publish_model(str(folder / "checkpoint"), config, seed=0)
    publish_model(str(folder / "other"), config, seed=1)
    publish_index(str(folder / "index"), contract, str(folder / "checkpoint"))
    return folder


@pytest.fixture(scope="module")
def url(folder: Path, serve_port: int) -> Iterator[str]:
    args = ServeArgs(
        checkpoint=str(folder / "checkpoint"),
        index=str(folder / "index"),
        batch_tokens=100,
        threads=1,
        shard_threads=1,
    )
    with serving(args, serve_port, "plain") as url:
        yield url


def post(url: str, **body: object) -> httpx.Response:
    content = json.dumps(body)  # escapes halves of surrogate pairs, which httpx would not send
    return httpx.post(f"{url}/retrieve", content=content, headers={"content-type": "application/json"}, timeout=30)


def test_an_answer_is_the_retriever_s(url: str, folder: Path) -> None:
    response = post(url, query="which body is Io", task="nq", top_k=3, with_text=True)
    assert response.status_code == 200, response.text
    answer = response.json()
    retriever = Retriever.open(str(folder / "checkpoint"), str(folder / "index"))
    (expected,) = retriever.search(["which body is Io"], "nq", top_k=3, with_text=True)
    (data,) = answer["data"]
    assert data["query"] == "which body is Io"
    assert data["truncated"] is False
    assert [(h["rank"], h["id"], h["wikipedia_id"], h["title"], h["text"]) for h in data["hits"]] == [
        (h.rank, h.id, h.wikipedia_id, h.title, h.text) for h in expected
    ]
    assert [h["score"] for h in data["hits"]] == pytest.approx([h.score for h in expected], rel=1e-5)
    assert (answer["model"], answer["task"]) == ("tiny", "nq")
    artifact = artifacts.open_artifact(str(folder / "index"), KIND)
    fingerprint = retriever.contract.fingerprint
    assert answer["index"] == {"alias": None, "version": index_version(artifact.id), "fingerprint": fingerprint}
    assert answer["coverage"] == {"full": True, "shards": {"total": 2, "successful": 2, "failed": 0}}
    assert set(answer["time"]) == {
        "wait_ms",
        "embed_ms",
        "search_ms",
        "total_ms",
        "batch_queries",
        "cached_queries",
    }


def test_a_list_of_queries_is_answered_in_order(url: str) -> None:
    queries = [f"{title} far from the sun" for title in TITLES] * 3  # more than one batch holds
    together = post(url, query=queries, task="fever", level="passage", top_k=2).json()["data"]
    assert [data["query"] for data in together] == queries
    for data in together[:3]:
        (alone,) = post(url, query=data["query"], task="fever", level="passage", top_k=2).json()["data"]
        assert [hit["id"] for hit in alone["hits"]] == [hit["id"] for hit in data["hits"]]
        assert alone["hits"][0]["text"] is None


def test_embeddings_are_those_that_are_searched_with(url: str, folder: Path) -> None:
    texts = ["which body is Io", "far from the sun " * 30]
    expected_BD, _ = Retriever.open(str(folder / "checkpoint"), str(folder / "index")).embed("nq", texts)
    answer = httpx.post(f"{url}/embed", json={"query": texts, "task": "nq"}).json()
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], expected_BD, rtol=1e-4, atol=1e-6)
    assert [one["truncated"] for one in answer["data"]] == [False, True]
    body = {"input": texts, "model": "tiny@nq"}
    listed = httpx.post(f"{url}/v1/embeddings", json=body).json()
    assert [(one["object"], one["index"]) for one in listed["data"]] == [("embedding", 0), ("embedding", 1)]
    np.testing.assert_allclose([one["embedding"] for one in listed["data"]], expected_BD, rtol=1e-4, atol=1e-6)
    assert listed["usage"]["total_tokens"] == answer["tokens"] > 24
    packed = httpx.post(f"{url}/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    row = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(row, expected_BD[0], rtol=1e-4, atol=1e-6)
    ids = httpx.post(f"{url}/v1/embeddings", json=body | {"input": [[1, 2], [3]]}).json()
    assert ids["error"]["message"] == "input: holds token ids, which are not taken; send texts"
    refused = httpx.post(f"{url}/v1/embeddings", json=body | {"model": "tiny"})
    assert refused.status_code == 422
    assert refused.json()["error"]["message"] == "unknown model 'tiny'; known: tiny@nq, tiny@fever"


def test_queries_may_be_embedded_in_bf16(folder: Path, serve_port: int) -> None:
    pair = {"checkpoint": str(folder / "checkpoint"), "index": str(folder / "index")}
    expected_BD, _ = Retriever.open(*pair.values()).embed("nq", ["which body is Io"])
    with serving(ServeArgs(**pair, precision="bf16", threads=1), serve_port, "bf16") as url:
        answer = httpx.post(f"{url}/embed", json={"query": "which body is Io", "task": "nq"}).json()
        assert httpx.get(f"{url}/info").json()["precision"] == "bf16"
    difference = np.abs(np.array(answer["data"][0]["embedding"]) - expected_BD[0]).max() / np.abs(expected_BD).max()
    assert 1e-5 < difference < 0.03


def test_pages_may_be_chosen_and_passages_read(url: str) -> None:
    (data,) = post(url, query="Io", task="nq", only_pages=["3", "1", "no such"]).json()["data"]
    assert sorted(hit["id"] for hit in data["hits"]) == ["1", "3"]
    assert data["complete"] is True
    (data,) = post(url, query="Io", task="nq", without_pages=["3"], level="passage", top_k=50).json()["data"]
    assert len(data["hits"]) == 10
    assert {hit["wikipedia_id"] for hit in data["hits"]} == set("01245")
    passage = httpx.get(f"{url}/passages/3:1").json()
    assert passage.pop("index") == post(url, query="Io", task="nq").json()["index"]
    assert passage == {"id": "3:1", "wikipedia_id": "3", "title": "Phobos", "text": TEXTS[7]}
    for unknown in ("3:2", "9:0", "3", "3:x", "a/3:1", "a%2F3:1"):
        response = httpx.get(f"{url}/passages/{unknown}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        assert f"the index has no passage '{unquote(unknown)}'" in response.json()["error"]["message"]


def test_a_fused_answer_ranks_by_words_too(url: str) -> None:
    (plain,) = post(url, query="Triton Triton", task="nq").json()["data"]
    (fused,) = post(url, query="Triton Triton", task="nq", fused=True).json()["data"]
    assert {hit["id"] for hit in fused["hits"]} == {hit["id"] for hit in plain["hits"]}
    places = {one["hits"][n]["title"]: n for one in (fused,) for n in range(6)}
    before = {hit["title"]: hit["rank"] - 1 for hit in plain["hits"]}
    assert places["Triton"] <= before["Triton"]
    assert fused["hits"][places["Triton"]]["score"] == pytest.approx(1 / (61 + before["Triton"]) + 1 / 61, rel=1e-5)
    assert httpx.get(f"{url}/info").json()["fused"] is True


def test_a_deadline_that_cannot_be_met_is_told(url: str) -> None:
    queries = [f"number {number} {number}" for number in range(900)]
    response = post(url, query=queries, task="nq", timeout_ms=1)
    assert response.status_code == 504, response.text
    assert response.json()["error"]["type"] == "deadline"
    assert response.json()["error"]["message"].startswith("no answer within 1 ms")


def test_metrics_count_requests_and_queries(url: str) -> None:
    def count(line: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(one.split()[-1]) for one in lines if re.match(line, one))

    asked = r'taskspec_queries_total\{cached="no".*task="fever"'
    before = count(asked), count(r'taskspec_requests_total\{.*route="/retrieve".*status="422"')
    post(url, query=["never asked before", "nor this"], task="fever")
    post(url, query="Io", task="no such")
    after = count(asked), count(r'taskspec_requests_total\{.*route="/retrieve".*status="422"')
    assert (after[0] - before[0], after[1] - before[1]) == (2, 1)


def test_a_query_that_was_cut_says_so(url: str) -> None:
    (data,) = post(url, query="far from the sun " * 30, task="nq").json()["data"]
    assert data["truncated"] is True


def test_concurrent_requests_share_batches_and_get_their_own_answers(url: str) -> None:
    async def ask_all() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            bodies = [{"query": f"number {n}", "task": ("nq", "fever")[n % 2], "top_k": 1 + n % 3} for n in range(24)]
            responses = await asyncio.gather(*(client.post("/retrieve", json=body) for body in bodies))
            return [response.json() for response in responses]

    answers = asyncio.run(ask_all())
    assert max(answer["time"]["batch_queries"] for answer in answers) > 1
    assert all(answer["time"]["batch_queries"] <= 16 for answer in answers)  # of 6 tokens
    for number, answer in enumerate(answers):
        assert answer["data"][0]["query"] == f"number {number}"
        assert answer["task"] == ("nq", "fever")[number % 2]
        assert len(answer["data"][0]["hits"]) == 1 + number % 3


def test_kilt_lines_are_what_its_evaluation_reads(url: str) -> None:
    response = post(url, query=["Io", "Titan"], id=["q7", "q8"], task="nq", top_k=6, format="kilt")
    assert response.headers["content-type"] == "application/x-ndjson", response.text
    assert (response.headers["x-truncated"], response.headers["x-incomplete"]) == ("0", "0")
    cut = post(url, query=["Io", "Io " * 99], task="nq", format="kilt")
    assert cut.headers["x-truncated"] == "1"
    body = {"input": ["Io " * 99, "Io", "Io " * 99], "model": "tiny@nq"}
    assert httpx.post(f"{url}/v1/embeddings", json=body).headers["x-truncated"] == "2"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [(line["id"], line["input"]) for line in lines] == [("q7", "Io"), ("q8", "Titan")]
    for line in lines:
        (output,) = line["output"]
        assert output["answer"] == ""
        assert sorted(page["wikipedia_id"] for page in output["provenance"]) == list("012345")
        scores = [page["score"] for page in output["provenance"]]
        assert scores == sorted(scores, reverse=True)
    (without,) = post(url, query="Io", task="nq", top_k=1, format="kilt", with_text=True).text.splitlines()
    assert set(json.loads(without)) == {"input", "output"}
    assert set(json.loads(without)["output"][0]["provenance"][0]) == {"wikipedia_id", "title", "score", "text"}


GOOD = {"query": "Io", "task": "nq"}


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "message"),
    [
        (GOOD | {"task": "trex"}, 422, "task", "invalid_task", "unknown task 'trex'; known: nq, fever"),
        (GOOD | {"query": ["Io", " "]}, 422, "query", "invalid_query", "query 1 of 2 (from 0) is empty"),
        (GOOD | {"query": []}, 422, "query", "value_error", "query: needs a query, or a list with at least one"),
        (GOOD | {"query": 5}, 422, "query", "string_type", "query: Input should be a valid string"),
        (GOOD | {"top_k": 0}, 422, "top_k", "greater_than_equal", "top_k: Input should be greater than or equal to 1"),
        (GOOD | {"top_k": "5"}, 422, "top_k", "int_type", "top_k: Input should be a valid integer"),
        (GOOD | {"top_k": 1001}, 422, "top_k", "invalid_top_k", "top_k is 1001 but may be 1000 at most"),
        (GOOD | {"query": ["Io"] * 65, "top_k": 1000}, 413, "top_k", "too_long", "65 queries with top_k 1000 ask for"),
        (GOOD | {"only_pages": ["1"] * 10_001}, 413, "only_pages", "too_long", "only_pages and without_pages name"),
        (GOOD | {"query": "x" * 20_001}, 413, "query", "too_long", "a query has 20001 characters but may have 20000"),
        (GOOD | {"query": "\ud800"}, 422, "query", "value_error", "query: holds half of a surrogate pair, which is no"),
        (GOOD | {"only_pages": ["1", "a\udfff"]}, 422, "only_pages", "value_error", "only_pages: holds half of a"),
        (GOOD | {"topk": 5}, 422, "topk", "extra_forbidden", "unknown field topk; known: query, task, top_k"),
        (GOOD | {"level": "para"}, 422, "level", "literal_error", "level: Input should be 'page' or 'passage'"),
        ({"query": "Io"}, 422, "task", "missing", "task: Field required"),
        (
            GOOD | {"format": "kilt", "level": "passage"},
            422,
            "format",
            "value_error",
            "format: kilt ranks pages; leave level at page",
        ),
        (GOOD | {"id": "1"}, 422, "id", "value_error", "id: is only for format kilt"),
        (
            GOOD | {"format": "kilt", "id": ["1", "1"]},
            422,
            "id",
            "value_error",
            "id: needs one id per query, all distinct: 1 distinct for 1 queries",
        ),
        (
            GOOD | {"query": ["Io"] * 1001},
            413,
            "query",
            "too_long",
            "query has 1001 queries but a request",
        ),
    ],
)
def test_a_request_that_breaks_a_rule_is_told_which(
    url: str, body: dict[str, Any], status: int, param: str, code: str, message: str
) -> None:
    response = post(url, **body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == {422: "invalid_request", 413: "too_large"}[status]
    assert error["message"].startswith(message)
    assert response.json()["request_id"] == response.headers["x-request-id"] != ""


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "type_", "message"),
    [
        ("POST", "/retrieve", b"{query", 400, "invalid_request", "the body is not JSON: Expecting property name"),
        ("POST", "/retrieve", b"", 422, "invalid_request", "the body must be a JSON object, of query, task, top_k"),
        ("POST", "/embed", b"[]", 422, "invalid_request", "the body must be a JSON object, of query, task, timeout_ms"),
        ("GET", "/retrieve", None, 405, "invalid_request", "GET /retrieve: Method Not Allowed"),
        ("POST", "/aliases/live", None, 405, "invalid_request", "POST /aliases/live: Method Not Allowed"),
        ("GET", "/nowhere", None, 404, "not_found", "GET /nowhere: Not Found"),
    ],
)
def test_errors_have_one_shape_everywhere(
    url: str, method: str, path: str, content: bytes | None, status: int, type_: str, message: str
) -> None:
    response = httpx.request(
        method, f"{url}{path}", content=content, headers={"content-type": "application/json", "x-request-id": "mine"}
    )
    assert response.status_code == status
    assert set(response.json()) == {"error", "request_id"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["request_id"] == "mine"
    assert response.json()["error"]["type"] == type_
    assert response.json()["error"]["message"].startswith(message)
    allowed = {"/retrieve": "POST", "/aliases/live": "GET, PUT"}
    assert response.headers.get("allow") == (allowed[path] if status == 405 else None)


def test_what_may_be_asked_is_told(url: str) -> None:
    answer = httpx.get(f"{url}/tasks").json()
    assert answer["model"] == "tiny"
    assert answer["tasks"][1] == {"name": "fever", "prompt": "fever", "max_query_tokens": 24, "keep": "beginning"}
    info = httpx.get(f"{url}/info").json()
    assert (info["passages"], info["dimension"], info["shards"], info["kind"]) == (12, 16, 2, "flat")
    assert info["limits"] == Limits().model_dump()
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
    assert httpx.get(f"{url}/docs").status_code == 200
    schema = httpx.get(f"{url}/openapi.json").json()
    assert "/retrieve" in schema["paths"]
    assert schema["components"]["schemas"]["RetrieveRequest"]["properties"]["top_k"]["description"] == "Hits per query."


class Unreachable:
    """A handle whose every call fails, or answers without some shards."""

    def __init__(self, answer: FoundAll | Exception) -> None:
        self.run = self
        self._answer = answer

    async def remote(self, *arguments: object) -> FoundAll:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def api_of(folder: Path, answer: FoundAll | Exception, **args: Any) -> Any:
    """The routes in this process, without Serve."""
    api = object.__new__(Api.func_or_class.__mro__[1])
    api._args = ServeArgs(checkpoint=str(folder / "checkpoint"), index=str(folder / "index"), **args)
    served = open_version(api._args.checkpoint, api._args.index)
    api._shard_deployments = api._args.shard_deployments or len(served.index.shards)
    api._dispatch = Dispatch(api._args.limits, None, Unreachable(answer))
    api._dispatch._table = Table(1, served)
    api._answers = Answers(10_000)
    api._metrics = Metrics("one")
    note(Seen("mine"))
    return api


def found(failed: set[int], hits: int = 1, late: set[int] | None = None) -> FoundAll:
    batch = Batch(0.0, 1, 1.0, 1.0)
    hit = Hit(1, "0", 1.0, "0", "Ceres", None)
    gone = frozenset(failed), frozenset(late or ())
    return FoundAll([[hit] * hits], np.zeros((1, 16)), [False], 3, [not failed], *gone, batch, 0.0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (DeploymentUnavailableError("Encoder"), "no retriever answers; ask again, or see the Serve status"),
        (ShardsLostError("no shard answers"), "no retriever answers; ask again, or see the Serve status"),
        (found({1}), r"no answer from shards \[1\]; ask again"),
    ],
)
def test_without_every_shard_the_server_is_not_ready(folder: Path, answer: FoundAll | Exception, message: str) -> None:
    with pytest.raises(HTTPException, match=message) as caught:
        asyncio.run(api_of(folder, answer).ready())
    assert caught.value.status_code == 503


def test_probes_at_the_same_time_and_soon_after_cost_one_search(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = api_of(folder, found(set()))
    asked = []

    async def remote(*arguments: object) -> FoundAll:
        asked.append(arguments)
        await asyncio.sleep(0)
        return found({1} if len(asked) > 1 else set())

    api._dispatch._encoder.remote = remote

    async def run() -> None:
        for answer in await asyncio.gather(*(api.ready() for _ in range(5))):
            assert answer.status == "ready"
        assert len(asked) == 1
        monkeypatch.setattr(dispatch, "READY_KEPT_S", 0.0)
        with pytest.raises(HTTPException, match=r"no answer from shards \[1\]"):
            await api.ready()
        assert len(asked) == 2

    asyncio.run(run())


def test_a_part_of_the_index_answers_only_where_that_is_allowed(folder: Path) -> None:
    def ask(failed: set[int], allow_partial: bool, late: set[int] | None = None, **args: Any) -> RetrieveResponse:
        request = RetrieveRequest(query="Io", task="nq", allow_partial=allow_partial)
        api = api_of(folder, found(failed, late=late), **args)
        response: RetrieveResponse = asyncio.run(api.retrieve(request))
        return response

    assert ask(set(), False).coverage.full
    with pytest.raises(Uncovered, match="1 of 2 shards do not answer; ask again, or with allow_partial"):
        ask({0}, False)
    partial = ask({0}, True)
    assert partial.coverage.model_dump() == {"full": False, "shards": {"total": 2, "successful": 1, "failed": 1}}
    assert not partial.data[0].complete
    with pytest.raises(Uncovered, match=r"1 of 2 shards do not answer, min_coverage asks for 0\.6 of them"):
        ask({0}, True, min_coverage=0.6)
    with pytest.raises(Uncovered, match="2 of 2 shards"):
        ask({0}, True, shard_deployments=1)  # both shards are this deployment's
    # Where only the request's time was too short, sending it again would not help.
    with pytest.raises(Late, match="1 of 2 shards do not answer in time; ask with a longer timeout_ms, or with allow"):
        ask({0}, False, late={0})
    with pytest.raises(Uncovered, match="2 of 2 shards do not answer; ask again"):
        ask({0, 1}, False, late={0})
    assert not ask({0}, True, late={0}).coverage.full


def test_a_partial_answer_is_no_match_for_a_shadow(folder: Path) -> None:
    compared = []
    for failed in ({1}, set()):
        api = api_of(folder, found(failed))
        served = api._dispatch.table.current
        api._dispatch._table = Table(1, served, served, shadow=True)
        api._dispatch.start_shadow = lambda *arguments, failed=failed: compared.append(failed)
        asyncio.run(api.retrieve(RetrieveRequest(query="Io", task="nq", allow_partial=True)))
    assert compared == [set()]


def test_a_request_that_only_an_idle_server_could_admit_is_refused_for_good(folder: Path) -> None:
    api = api_of(folder, found(set()), limits={"tokens": 30})
    with pytest.raises(TooLarge, match=r"have about 35 tokens but a request may have 30 \(limits\.tokens\); send"):
        asyncio.run(api.retrieve(RetrieveRequest(query=["Titania"] * 7, task="nq")))
    asyncio.run(api.retrieve(RetrieveRequest(query="Titania", task="nq")))


def test_an_answer_is_kept_unless_it_is_partial(folder: Path) -> None:
    api = api_of(folder, found(set()))

    def ask(**fields: Any) -> RetrieveResponse:
        response: RetrieveResponse = asyncio.run(
            api.retrieve(RetrieveRequest(query="Io", task="nq", allow_partial=True, **fields))
        )
        return response

    assert ask().time.cached_queries == 0
    api._dispatch._encoder = Unreachable(ShardsLostError("nobody is asked"))
    kept = ask()
    assert (kept.time.cached_queries, kept.data[0].hits[0].title, kept.coverage.full) == (1, "Ceres", True)
    for other in ({"top_k": 3}, {"with_text": True}, {"level": "passage"}, {"only_pages": ["0"]}):
        with pytest.raises(ShardsLostError):
            ask(**other)
    api._dispatch._encoder = Unreachable(found(set()))
    ask(without_pages=["9" * 100_000])
    assert max(len(repr(key)) for key in api._answers._held) < 1000, "however long the pages' ids are"
    api._dispatch._encoder = Unreachable(found({1}))
    assert ask(top_k=5).time.cached_queries == 0
    assert ask(top_k=5).time.cached_queries == 0


@pytest.mark.parametrize(
    ("raised", "status", "type_", "message"),
    [
        (HTTPException(503, "no retriever answers"), 503, "unavailable", "GET /broken: no retriever answers"),
        (DeploymentUnavailableError("Encoder"), 503, "unavailable", "the process that would answer is not there"),
        (BackPressureError(num_queued_requests=9, max_queued_requests=9), 503, "unavailable", "the process that would"),
        (ActorDiedError(), 503, "unavailable", "the process that would answer is not there"),
        (Uncovered("1 of 2 shards do not answer"), 503, "unavailable", "1 of 2 shards do not answer"),
        (Overloaded(7), 429, "overloaded", "too much work is under way; ask again in 7 s"),
        (Late("no answer within 5 ms"), 504, "deadline", "no answer within 5 ms"),
        (KeyError("secret"), 500, "internal", "the server failed on this request; its log has the details"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_faults_keep_the_shape_and_hide_their_details(raised: Exception, status: int, type_: str, message: str) -> None:
    app = FastAPI()
    answer_errors(app)
    app.add_middleware(GuardMiddleware)

    @app.get("/broken")
    async def broken() -> None:
        raise raised

    response = TestClient(app, raise_server_exceptions=False).get("/broken", headers={"x-request-id": "mine"})
    assert response.status_code == status
    assert response.json()["request_id"] == "mine"
    assert response.json()["error"]["type"] == type_
    assert response.json()["error"]["message"].startswith(message)
    assert "secret" not in response.text
    if status in (429, 503):
        assert response.headers["retry-after"] == ("7" if status == 429 else "1")


def test_a_pair_that_does_not_belong_together_is_refused_by_field(folder: Path) -> None:
    args = ServeArgs(checkpoint=str(folder / "other"), index=str(folder / "index"))
    with pytest.raises(Refusal, match=r"ContractError: checkpoint .*other .*: weights differs .*python -m jobs.index"):
        build(args.model_dump())
    with pytest.raises(Refusal, match=r"ArtifactError: .*nothing: does not exist, or is empty; needed here: index"):
        build(args.model_dump() | {"index": str(folder / "nothing")})
    assert issubclass(Refusal, RayServeException)  # so that a deployment by file shows the message and does not retry


def test_every_shard_of_an_index_grows_alike(folder: Path) -> None:
    (written,) = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())["applications"]
    of = {"checkpoint": str(folder / "checkpoint"), "index": str(folder / "index")}

    def limits(args: dict[str, Any]) -> list[tuple[int, int] | None]:
        *_, encoder, _ = build(args | of)._bound_deployment.init_args
        shards = [one._bound_deployment._deployment_config for one in encoder._bound_deployment.init_args[1]]
        growing = [one.autoscaling_config for one in shards]
        return [one and (one.min_replicas, one.max_replicas) for one in growing]

    assert limits(written["args"]) == [(1, 4), (1, 4)]
    assert limits({}) == [None, None]


def test_serve_run_ends_with_one_line_before_ray_starts(folder: Path) -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("serve")),
            "run",
            "serve.app:build",
            f"checkpoint={folder / 'other'}",
            f"index={folder / 'index'}",
        ],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},  # connecting to Ray would fail in another way
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "differs" in line]
    assert line.startswith("Error: ContractError: checkpoint ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"checkpoint": "c"}, "argument index: Field required; known: checkpoint, index, aliases"),
        ({"checkpoint": "c", "index": "i", "treads": "2"}, "argument treads: Extra inputs are not permitted; known:"),
        (
            {"checkpoint": "c", "index": "i", "limits": {"tokens_under_way": 1000}},
            "argument limits: Value error, tokens is 50000, more than tokens_under_way, 1000: such a request would",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_one_line(args, message):
    with pytest.raises(Refusal, match=message):
        build(args)


@pytest.mark.parametrize("name", ["5.faiss", "passages.arrow", "page_ids.npy", "page_rows.npy"])
@pytest.mark.parametrize("damage", ["a bit flipped", "cut short", "missing"])
def test_a_damaged_part_of_an_index_is_refused_by_name(name: str, damage: str, folder: Path, tmp_path: Path) -> None:
    index = shutil.copytree(folder / "index", tmp_path / "index")
    served = open_version(str(folder / "checkpoint"), str(index))
    path = index / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content if damage == "a bit flipped" else content[:-1])
    opening = open_shard if name.endswith("faiss") else open_model
    refused = rf"index: {name} is (not the file in the manifest|missing)"
    with pytest.raises(ArtifactError, match=refused):
        opening(served.version)
    with pytest.raises(Refusal, match=refused):
        build({"checkpoint": str(folder / "checkpoint"), "index": str(index)})


def open_shard(version: Version) -> LocalShards:
    shard = object.__new__(Shard.func_or_class)
    shard._number, shard._of = 1, 2
    opened: LocalShards = shard._open(version)
    return opened


def test_shards_that_do_not_hold_every_row_once_are_refused(folder: Path, tmp_path: Path) -> None:
    index = shutil.copytree(folder / "index", tmp_path / "index")
    manifest = index / artifacts.MANIFEST
    for wrong, message in (
        ('"row_start": 6', "shard 1 begins at row 6, but those before it end at 5"),
        ('"row_start": 4', "shard 1 begins at row 4, but those before it end at 5"),
    ):
        manifest.write_text((folder / "index" / artifacts.MANIFEST).read_text().replace('"row_start": 5', wrong))
        with pytest.raises(ArtifactError, match=message):
            open_version(str(folder / "checkpoint"), str(index))


def test_what_the_tokenizer_cannot_do_for_one_request_fails_none_beside_it(folder: Path) -> None:
    """Requests of all tasks are embedded together."""
    encoder = object.__new__(Encoder.func_or_class)
    encoder._models = Versions(open_model)
    served = open_version(str(folder / "checkpoint"), str(folder / "index"))
    texts = (("Io",), ("\ud800",), ("Ceres", "Titan"))  # half of a surrogate pair, which the schema refuses
    asks = [
        Ask(served.version, task, of_one, None, float("inf"))
        for task, of_one in zip(("nq", "nq", "fever"), texts, strict=True)
    ]
    good, bad, two = encoder._embed_batch(asks)
    assert isinstance(bad, TypeError)
    assert [len(one.embeddings_BD) for one in (good, two)] == [1, 2]
    alone = open_model(served.version).encoder.embed_queries("nq", ["Io"])[0]
    np.testing.assert_allclose(good.embeddings_BD, alone, atol=1e-6)


def test_only_searches_whose_answers_cannot_hang_on_each_other_are_one(folder: Path) -> None:
    """The first of an exact search are the same however many are asked for; not those of codes, graphs and fusions."""
    encoder = object.__new__(Encoder.func_or_class)
    served = open_version(str(folder / "checkpoint"), str(folder / "index"))
    model = open_model(served.version)

    def groups(kind: str, *searches: Search) -> int:
        encoder._models = Versions(lambda _: replace(model, index=model.index.model_copy(update={"kind": kind})))
        asks = [Ask(served.version, "nq", ("Io",), search, float("inf")) for search in searches]
        return len({encoder._group(ask) for ask in asks})

    few, more, many = (Search(top_k, "page", False) for top_k in (3, 10, 90))
    assert groups("flat", few, more) == 1
    assert groups("flat", few, more, many) == 2, "ninety hits are much to make for who wants three"
    assert groups("flat", replace(few, fused=True), replace(more, fused=True)) == 2
    assert groups("pq", few, more) == 2
    assert groups("pq", few, replace(few)) == 1


def test_a_call_that_hangs_ends_with_the_longest_time_that_a_request_may_take() -> None:
    async def run() -> None:
        calls = Dispatch(Limits(timeout_ms=20), None, None)
        assert await calls.within(asyncio.sleep(0, "there")) == "there"
        for longer in (None, 99_999):
            with pytest.raises(Late, match="no answer within 20 ms; ask again"):
                await calls.within(asyncio.sleep(60), longer)

    asyncio.run(asyncio.wait_for(run(), 30))
