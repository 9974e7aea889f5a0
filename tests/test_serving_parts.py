"""What stands around the model in serving: batches, admission, keys, and what every request passes; without Ray."""

import asyncio
import heapq
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from ray._common.formatters import JSONFormatter  # what Serve formats with if it is told JSON
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from serve import aliases, deployments, guard, keys, remote
from serve.admission import Admission, Overloaded, query_tokens
from serve.alias_schema import AliasRequest
from serve.answers import Answers, Known, digest
from serve.asks import Search, Version
from serve.batching import Batcher, LateError
from serve.deployments import Versions, _cuts
from serve.errors import answer_errors
from serve.keys import Key
from serve.remote import RemoteShards, ShardLine, ShardsLostError
from taskspec.errors import StoreError
from taskspec.index.shard import Results
from taskspec.retrieve.hits import Hit

FOREVER = float("inf")


class Stages:
    """Remembers batches; the first stage waits until it is let go."""

    def __init__(self) -> None:
        self.first: list[list[str]] = []
        self.then: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.second_gate = asyncio.Event()
        self.second_gate.set()

    async def embed(self, items: list[str]) -> list[str | Exception]:
        self.first.append(items)
        await self.gate.wait()
        if "bad" in items:
            raise ValueError("bad batch")
        return [KeyError("alone") if item == "unknown" else item.upper() for item in items]

    async def search(self, items: list[str], between: list[str]) -> list[str | Exception]:
        self.then.append(items)
        await self.second_gate.wait()
        pairs = zip(items, between, strict=True)
        return [KeyError("lost") if item == "lost" else f"{item}{upper}" for item, upper in pairs]


def with_batcher(test: Callable[[Stages, Batcher[str, str, str]], Awaitable[None]], most_tokens: int = 10) -> None:
    async def run() -> None:
        stages = Stages()
        await test(stages, Batcher(stages.embed, stages.search, most_tokens))

    asyncio.run(asyncio.wait_for(run(), 10))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_what_comes_while_a_batch_is_embedded_is_the_next_one_in_order_of_arrival() -> None:
    async def test(stages: Stages, batcher: Batcher[str, str, str]) -> None:
        stages.gate.clear()
        first = asyncio.create_task(batcher.add("a", 3, FOREVER))
        await settle()
        others = [asyncio.create_task(batcher.add(item, 4, FOREVER)) for item in "bcde"]
        large = asyncio.create_task(batcher.add("f", 11, FOREVER))  # more than a batch may have: alone
        last = asyncio.create_task(batcher.add("g", 1, FOREVER))
        await settle()
        assert stages.first == [["a"]]
        stages.gate.set()
        assert await asyncio.gather(first, *others, large, last) == ["aA", "bB", "cC", "dD", "eE", "fF", "gG"]
        assert stages.first == [["a"], ["b", "c"], ["d", "e"], ["f"], ["g"]]

    with_batcher(test)


def test_the_next_batch_is_embedded_while_one_is_searched() -> None:
    async def test(stages: Stages, batcher: Batcher[str, str, str]) -> None:
        stages.second_gate.clear()
        first = asyncio.create_task(batcher.add("a", 1, FOREVER))
        await settle()
        second = asyncio.create_task(batcher.add("b", 1, FOREVER))
        await settle()
        assert (stages.first, stages.then) == ([["a"], ["b"]], [["a"], ["b"]])
        stages.second_gate.set()
        assert await asyncio.gather(first, second) == ["aA", "bB"]

    with_batcher(test)


def test_late_and_abandoned_items_cost_neither_stage() -> None:
    async def test(stages: Stages, batcher: Batcher[str, str, str]) -> None:
        stages.gate.clear()
        going = asyncio.create_task(batcher.add("going", 1, time.monotonic() + 0.05))
        await settle()
        late = asyncio.create_task(batcher.add("late", 1, time.monotonic() + 0.01))
        abandoned = asyncio.create_task(batcher.add("abandoned", 1, FOREVER))
        in_time = asyncio.create_task(batcher.add("in time", 1, FOREVER))
        await settle()
        abandoned.cancel()
        await asyncio.sleep(0.1)
        stages.gate.set()
        assert await in_time == "in timeIN TIME"
        for task in (late, going):
            with pytest.raises(LateError):
                await task
        assert stages.first == [["going"], ["in time"]]
        assert stages.then == [["in time"]]

    with_batcher(test)


def test_an_error_of_a_stage_reaches_its_batch_and_no_other() -> None:
    async def test(stages: Stages, batcher: Batcher[str, str, str]) -> None:
        with pytest.raises(ValueError, match="bad batch"):
            await batcher.add("bad", 1, FOREVER)
        assert await batcher.add("good", 1, FOREVER) == "goodGOOD"

    with_batcher(test)


def test_what_a_stage_cannot_do_for_one_item_fails_that_item_alone() -> None:
    async def test(stages: Stages, batcher: Batcher[str, str, str]) -> None:
        items = ("unknown", "good", "lost", "fine")
        found = await asyncio.gather(*(batcher.add(item, 1, FOREVER) for item in items), return_exceptions=True)
        assert [str(one) for one in found] == ["'alone'", "goodGOOD", "'lost'", "fineFINE"]
        assert (stages.first, stages.then) == ([list(items)], [["good", "lost", "fine"]])

    with_batcher(test)


@given(tokens=st.lists(st.integers(1, 30), min_size=1, max_size=40), most=st.integers(1, 40))
def test_cuts_cover_all_texts_once_and_keep_to_the_tokens(tokens: list[int], most: int) -> None:
    cuts = _cuts(tokens, most)
    assert [number for start, stop in cuts for number in range(start, stop)] == list(range(len(tokens)))
    assert all(stop - start == 1 or sum(tokens[start:stop]) <= most for start, stop in cuts)


def test_work_over_the_limit_is_refused_and_room_comes_back() -> None:
    admission = Admission(most_tokens=100)
    with admission.admit(60, 1000):
        with pytest.raises(Overloaded, match="too much work is under way; ask again in 1 s"), admission.admit(41, 1000):
            pytest.fail("there is no room for 41")
        with admission.admit(40, 1000):
            assert admission.tokens == 100
        assert admission.tokens == 60
    # more than there is room for at all is let in alone
    with admission.admit(1000, 1000), pytest.raises(Overloaded), admission.admit(1, 1000):
        pytest.fail("nothing fits beside it")
    with pytest.raises(ValueError, match="inside"), admission.admit(5, 1000):
        raise ValueError("inside")
    assert admission.tokens == 0


def test_the_time_to_come_back_follows_from_how_fast_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    admission = Admission(most_tokens=100)
    with admission.admit(50, 1000):
        now[0] += 5  # 10 tokens a second
    with admission.admit(100, 1000), pytest.raises(Overloaded) as caught, admission.admit(75, 1000):
        pytest.fail("there is no room")
    assert caught.value.retry_after_s == 8
    with admission.admit(100, 1000), pytest.raises(Overloaded) as caught, admission.admit(1000, 1000):
        pytest.fail("there is no room")
    assert caught.value.retry_after_s == 30


def answered_and_late(
    monkeypatch: pytest.MonkeyPatch, *, clients: int, think_s: float, rate: Callable[[float], float]
) -> tuple[list[int], list[int], list[int]]:
    """Second by second, how many queries are answered, late and refused: of 13 tokens and one second each, by a server
    that takes them in order and drops those that it comes to too late.    Args: rate: second → tokens a second."""
    now, free_s = [0.0], 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    admission, counts = Admission(100_000), ([0] * 21, [0] * 21, [0] * 21)
    events: list[tuple[float, int, Any]] = [(think_s * number / clients, number, None) for number in range(clients)]
    while events[0][0] < 20:
        now[0], client, inside = heapq.heappop(events)
        second = int(now[0])
        if inside is not None:
            request, deadline = inside
            late = now[0] >= deadline
            counts[late][second] += 1
            request.__exit__(*((TimeoutError, TimeoutError(), None) if late else (None, None, None)))
            heapq.heappush(events, (now[0] + think_s, client, None))
            continue
        request, deadline = admission.admit(13, 1.0), now[0] + 1.0
        try:
            request.__enter__()
        except Overloaded as refusal:
            counts[2][second] += 1
            heapq.heappush(events, (now[0] + refusal.retry_after_s + client % 100 / 100, client, None))
            continue
        ends = deadline
        if max(free_s, now[0]) < deadline:
            free_s = max(free_s, now[0]) + 13 / rate(now[0])
            ends = min(free_s, deadline)
        heapq.heappush(events, (ends, client, (request, deadline)))
    return counts


def test_of_single_queries_that_are_twice_too_many_nearly_all_that_are_let_in_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thousand clients at a server of 500 queries a second; once it has seen what it can do."""
    answered, late, refused = answered_and_late(monkeypatch, clients=1000, think_s=0, rate=lambda _: 6500)
    assert sum(answered[5:20]) > 0.9 * 500 * 15
    assert sum(late[5:20]) < 0.02 * 500 * 15
    assert sum(refused) > 1000


def test_nobody_is_refused_where_nobody_is_late_and_again_when_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, refused = answered_and_late(monkeypatch, clients=400, think_s=1.0, rate=lambda _: 6500)
    assert sum(refused) == 0
    # From second 5 to 10 it does a tenth.
    slow = answered_and_late(monkeypatch, clients=400, think_s=1.0, rate=lambda s: 650 if 5 <= s < 10 else 6500)
    assert sum(slow[2][5:10]) > 100
    assert sum(slow[2][15:]) == sum(slow[1][15:]) == 0


def test_one_who_has_no_patience_does_not_have_others_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    admission = Admission(100_000)
    for _ in range(50):
        with admission.admit(13, 1.0):
            hasty = admission.admit(13, 0.001)
            hasty.__enter__()
            now[0] += 0.001
            assert not hasty.__exit__(TimeoutError, TimeoutError(), None)
            with admission.admit(13, 1.0):
                now[0] += 0.05
        now[0] += 1.0


def test_tokens_of_queries_are_counted_from_their_letters_and_cut_as_they_are() -> None:
    assert query_tokens(["", "a" * 40, "a" * 4000], most=32) == 4 + 14 + 32


SECRET = "s" * 43


def key(name: str, secret: str, *scopes: str) -> Key:
    return Key.model_validate(
        {"name": name, "sha256": keys.hashlib.sha256(secret.encode()).hexdigest(), "scopes": scopes}
    )


def test_a_new_key_is_found_by_its_hash_and_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["team-a"])
    first, second = capsys.readouterr().out.splitlines()
    secret = first.removeprefix("key: ")
    (found,) = map(Key.model_validate, yaml.safe_load(second)["keys"])
    assert len(secret) == 43
    assert secret not in second
    assert (found.name, found.scopes) == ("team-a", ("read",))
    assert keys.find_key([key("other", "x"), found], secret) == found
    assert keys.find_key([found], secret[:-1]) is None
    keys.main(["team-b", "--admin"])
    assert '"scopes": ["read", "admin"]' in capsys.readouterr().out


@pytest.fixture
def client() -> Any:
    app = FastAPI()
    answer_errors(app)
    app.add_middleware(guard.GuardMiddleware)

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/echo/{name}")
    async def echo(name: str, request: Request) -> int:
        guard.seen().facts["task"] = name
        return len(await request.json())

    yield TestClient(app, raise_server_exceptions=False)
    guard.configure(guard.Settings())


def test_a_key_opens_the_routes_and_probes_need_none(client: TestClient) -> None:
    guard.configure(guard.Settings(keys=[key("team-a", SECRET, "read"), key("none", "n" * 43)]))
    assert client.get("/health").status_code == 200
    for headers in (
        {"authorization": f"Bearer {SECRET}"},
        {"x-api-key": SECRET},
        {"authorization": f"bearer {SECRET} "},
    ):
        assert client.post("/echo/nq", json=[1, 2], headers=headers).json() == 2
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": SECRET}, {"authorization": "Bearer "}):
        refused = client.post("/echo/nq", json=[1, 2], headers=headers)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["message"].startswith("no key, or none that is known: send Authorization")
    refused = client.post("/echo/nq", json=[1, 2], headers={"x-api-key": "n" * 43})
    assert (refused.status_code, refused.json()["error"]["message"]) == (403, "key none may not ask")


def test_a_body_over_the_limit_is_refused_whatever_its_header_says(client: TestClient) -> None:
    guard.configure(guard.Settings(body_bytes=20))
    assert client.post("/echo/nq", json=[1, 2]).status_code == 200

    def pieces() -> Any:
        yield from (b"[", b"1," * 20, b"1]")  # chunked: no Content-Length

    for content in (b"[" + b"1," * 20 + b"1]", pieces()):
        refused = client.post("/echo/nq", content=content, headers={"content-type": "application/json"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body")
        assert refused.json()["error"]["message"].startswith("the body is longer than 20 bytes (limits.body_bytes)")


def test_a_body_that_does_not_come_is_not_waited_for(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    guard.configure(guard.Settings(body_bytes=20, body_timeout_s=0.05))
    sent = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)  # always a little more, and never the end
        return {"type": "http.request", "body": b"", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/echo/nq", "query_string": b"", "headers": headers}
    asyncio.run(asyncio.wait_for(client.app(scope, receive, send), 10))
    assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["type"]) == (408, "invalid_request")
    assert b"the body did not come within 0.05 s (limits.body_timeout_ms); send it again" in sent[1]["body"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/aliases/live", {"shares": {"\ud800": 101}}, "shares: holds half of a surrogate pair"),
        ("/aliases/live", {"shares": {"\ud800": "all"}}, "shares: Input should be a valid integer"),
        ("/aliases/live", {"\ud800": 1}, "Input should be a valid string, unable to"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(path: str, body: dict[str, Any], message: str) -> None:
    app = FastAPI()
    answer_errors(app)
    app.add_middleware(guard.GuardMiddleware)

    @app.put("/aliases/{name}")
    async def change(name: str, request: AliasRequest) -> None: ...

    content = json.dumps({"checkpoint": "c", "index": "i", "expected": "e"} | body)
    response = TestClient(app, raise_server_exceptions=False).put(
        path, content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 422, response.text
    assert response.json()["error"]["message"].startswith(message)


def test_every_request_leaves_one_line_and_one_count(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    counted: list[tuple[str, str, int]] = []
    settings = guard.Settings(
        keys=[key("team-a", SECRET, "read")],
        count=lambda method, route, status, _: counted.append((method, route, status)),
    )
    guard.configure(settings)
    caplog.set_level(logging.INFO, logger="ray.serve")
    headers = {"x-api-key": SECRET, "x-request-id": "mine"}
    client.post("/echo/nq", json=["secret text"], headers=headers)
    client.post("/echo/nq", json=[])
    client.get("/nowhere", headers=headers)
    records = [one for one in caplog.records if one.name == "ray.serve"]
    assert [one.getMessage().split(",")[0] for one in records] == [
        "POST /echo/{name} 200",
        "POST none 401",
        "GET none 404",
    ]
    lines = [json.loads(JSONFormatter().format(one))["request"] for one in records]
    assert [line.get("error") for line in lines] == [None, "no_key", "no_route"]
    assert [(line["method"], line["path"], line["status"], line["key"]) for line in lines] == [
        ("POST", "/echo/nq", 200, "team-a"),
        ("POST", "/echo/nq", 401, None),
        ("GET", "/nowhere", 404, "team-a"),
    ]
    assert (lines[0]["request_id"], lines[0]["task"]) == ("mine", "nq")
    assert "secret text" not in json.dumps(lines)
    assert SECRET not in json.dumps(lines)
    assert counted == [("POST", "/echo/{name}", 200), ("POST", "none", 401), ("GET", "none", 404)]


def shards(*calls: Callable[..., Awaitable[Results]], left_s: float = 5.0) -> tuple[Results | Exception, set[int]]:
    """What a search of these shard deployments finds, and which of them have failed."""

    async def run() -> tuple[Results | Exception, set[int]]:
        loop = asyncio.get_running_loop()
        lines = [ShardLine(number, call, never, 5.0) for number, call in enumerate(calls)]
        remote = RemoteShards(lines, loop, "v", time.monotonic() + left_s)
        query = np.ones((1, 2), dtype=np.float32)
        try:
            return await asyncio.to_thread(remote.search, query, 2, None), remote.failed
        except (ShardsLostError, LateError) as error:
            return error, remote.failed

    return asyncio.run(run())


def answering(*rows: int) -> Callable[..., Awaitable[Results]]:
    async def call(version: Any, left_s: float, method: str, *arguments: Any) -> Results:
        assert (version, method) == ("v", "search")
        return Results(np.array([[float(row) for row in rows]], dtype=np.float32), np.array([rows]))

    return call


def failing(error: Exception, times: int, then: Callable[..., Awaitable[Results]]) -> Callable[..., Awaitable[Results]]:
    left = [times]

    async def call(*arguments: Any) -> Results:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return await then(*arguments)

    return call


async def never(*arguments: Any) -> Results:
    await asyncio.sleep(60)
    raise AssertionError


def test_shards_that_fail_are_left_out_and_told() -> None:
    found, failed = shards(answering(5, 1), answering(7, 2))
    assert isinstance(found, Results)
    assert (found.rows_BK.tolist(), failed) == ([[7, 5]], set())
    found, failed = shards(answering(5, 1), failing(ValueError("corrupt"), 1, answering(7, 2)))
    assert isinstance(found, Results)
    assert (found.rows_BK.tolist(), failed) == ([[5, 1]], {1})
    found, failed = shards(answering(5, 1), never, left_s=0.1)
    assert isinstance(found, Results)
    assert (found.rows_BK.tolist(), failed) == ([[5, 1]], {1})
    found, failed = shards(failing(ValueError("corrupt"), 1, answering(7, 2)))
    assert isinstance(found, ShardsLostError)
    assert failed == {0}


def test_shards_that_only_the_request_has_no_time_for_are_late_and_not_lost() -> None:
    found, failed = shards(never, never, left_s=0.1)
    assert isinstance(found, LateError)
    assert failed == {0, 1}
    found, _ = shards(never, failing(ValueError("corrupt"), 1, never), left_s=0.1)
    assert isinstance(found, ShardsLostError), "more time would not help"


def test_a_shard_whose_replica_dies_is_asked_again_once() -> None:
    found, failed = shards(failing(ActorDiedError(), 1, answering(5, 1)), answering(7, 2))
    assert isinstance(found, Results)
    assert (found.rows_BK.tolist(), failed) == ([[7, 5]], set())
    _, failed = shards(failing(ActorDiedError(), 2, answering(5, 1)), answering(7, 2))
    assert failed == {0}


def test_a_shard_that_does_not_answer_costs_one_wait_until_it_answers_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PROBE_EVERY_S", 0.01)
    back = asyncio.Event()
    calls: list[str] = []

    async def call(version: str, left_s: float, method: str, *arguments: Any) -> Results:
        calls.append(method)
        await back.wait()
        return await answering(1)(version, left_s, method)

    async def ping() -> None:
        if not back.is_set():
            raise DeploymentUnavailableError("Shard0")

    async def run() -> None:
        line = ShardLine(0, call, ping, timeout_s=0.2)
        # A request that is in a hurry itself says nothing about the shard.
        with pytest.raises(LateError):
            await line.ask("v", 0.05, "search")
        assert not line.broken
        began = time.monotonic()
        with pytest.raises(ShardsLostError):
            await line.ask("v", 60, "search")
        assert 0.15 < time.monotonic() - began < 5
        assert line.broken
        with pytest.raises(ShardsLostError):
            await line.ask("v", 60, "search")
        assert len(calls) == 2, "nobody waits for it again"
        back.set()
        while line.broken:
            await asyncio.sleep(0.01)
        assert await line.ask("v", 60, "search") is not None

    asyncio.run(asyncio.wait_for(run(), 30))


def test_an_answer_from_the_rest_comes_before_the_requests_own_deadline() -> None:
    began = time.monotonic()
    found, failed = shards(answering(5, 1), never, left_s=1.0)
    assert isinstance(found, Results)
    assert failed == {1}
    assert time.monotonic() - began < 1.0


def test_a_replica_that_opens_a_version_for_long_goes_on_to_say_that_it_is_there() -> None:
    """And what is wanted no more stays open for a while."""
    opening, said = threading.Event(), []
    first, second = Version("one", "c", "i"), Version("two", "c", "i")

    def table(revision: int, *versions: Version) -> Any:
        return SimpleNamespace(revision=revision, versions=list(versions), current=None)

    def open_one(version: Version) -> str:
        if version.id == "two":
            assert opening.wait(30)
        return version.id

    asked = table(2, first, second)

    async def say(has: frozenset[str], failed: dict[str, str], known: Any) -> Any:
        said.append((sorted(has), failed))
        await asyncio.sleep(0.01)
        return asked

    async def run() -> None:
        nonlocal asked
        versions = Versions(open_one)
        await versions.keep(table(1, first))
        following = asyncio.create_task(versions.follow(say, table(1, first)))
        while len(said) < 5:
            await asyncio.sleep(0.01)
        assert said[-1] == (["one"], {}), "it says so while it is opening"
        opening.set()
        while said[-1] != (["one", "two"], {}):
            await asyncio.sleep(0.01)
        asked = table(3, second)
        count = len(said)
        while len(said) < count + 5:
            await asyncio.sleep(0.01)
        assert said[-1] == (["one", "two"], {}), "requests that began with it may be under way"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deployments, "CLOSE_AFTER_S", 0.0)
            while said[-1] != (["two"], {}):
                await asyncio.sleep(0.01)
        following.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_change_waits_for_a_replica_that_is_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes up with what is served when it is up, not with what was when it began."""
    monkeypatch.setattr(aliases, "FOLLOW_S", 0.05)
    opening = threading.Event()
    first, second = Version("one", "c", "i"), Version("two", "c", "i")

    def table(*versions: Version) -> Any:
        return SimpleNamespace(versions=list(versions), current=SimpleNamespace(version=versions[0]))

    def open_one(version: Version) -> str:
        assert opening.wait(30)
        return version.id

    async def run() -> None:
        state = object.__new__(aliases.Aliases.func_or_class)
        state._table, state._changed, state._followers = table(first), asyncio.Condition(), {}
        both = frozenset({"one", "two"})
        others = asyncio.create_task(state.follow("Encoder", "others", both, {}, state._table))
        versions = Versions(open_one)
        starting = asyncio.create_task(versions.begin(partial(state.follow, "Encoder", "new")))
        while len(state._followers) < 2:
            await asyncio.sleep(0.01)
        await state._set(table(first, second))
        change = asyncio.create_task(state._opened_everywhere(second))
        await asyncio.sleep(0.05)
        assert not starting.done()
        assert not change.done()
        opening.set()
        await asyncio.gather(starting, change, others)
        assert versions._opened.keys() == both
        versions._following.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_version_that_is_opened_for_one_request_keeps_no_other_waiting() -> None:
    opening = threading.Event()
    first, second = Version("one", "c", "i"), Version("two", "c", "i")

    async def run() -> None:
        versions = Versions(lambda version: version.id == "one" or opening.wait(30))
        await versions.require(first)
        waiting = [asyncio.create_task(versions.require(second)) for _ in range(100)]
        await settle()
        await asyncio.wait_for(versions.require(first), 1)
        assert await asyncio.wait_for(asyncio.to_thread(versions.get, first), 1), "no thread is missing"
        opening.set()
        await asyncio.gather(*waiting)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_version_that_could_not_be_opened_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def open_one(version: Version) -> str:
        tried.append(version.id)
        if len(tried) == 1:
            raise StoreError("no connection")
        return version.id

    async def run() -> None:
        versions, table = Versions(open_one), SimpleNamespace(versions=[Version("one", "c", "i")])
        await versions.keep(table)
        await versions.keep(table)
        assert (tried, versions._failed) == (["one"], {"one": "no connection"})
        monkeypatch.setattr(deployments, "RETRY_AFTER_S", 0.0)
        await versions.keep(table)
        assert (tried, versions._failed, list(versions._opened)) == (["one", "one"], {}, ["one"])

    asyncio.run(run())


def test_answers_are_kept_within_their_bytes() -> None:
    search = digest(Search(1, "page", False))

    def known(letters: int) -> Known:
        return Known([Hit(1, "0", 1.0, "0", "t" * letters, None)], False, True)

    answers = Answers(5000)
    for number in range(20):
        answers.keep(("v", "nq", search, str(number)), known(1000))
    kept = [number for number in range(20) if answers.get(("v", "nq", search, str(number)))]
    assert kept == [18, 19], "a kilobyte of title and some of objects each"
    answers.keep(("v", "nq", search, "long"), known(6000))
    assert answers.get(("v", "nq", search, "long")) is None
    assert answers.get(("v", "nq", search, "19")) == known(1000)
    nothing = Answers(0)
    nothing.keep(("v", "nq", search, "x"), known(1))
    assert nothing.get(("v", "nq", search, "x")) is None
