"""The client against a real HTTP server on loopback that is told how to misbehave."""

import asyncio
import contextlib
import email.utils
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from taskspec.errors import EndpointError
from taskspec.retrieve.client import Answer, AsyncClient, Client, _Attempts
from taskspec.retrieve.hits import Hit

HIT = {"rank": 1, "id": "7", "score": 0.5, "wikipedia_id": "7", "title": "Ceres", "text": None}


def answer(query: str) -> dict[str, Any]:
    return {"query": query, "truncated": False, "complete": True, "hits": [HIT]}


class Server(ThreadingHTTPServer):
    """Answers as `POST /retrieve` does once its list of (status, headers, body) is used up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.before: list[tuple[int, dict[str, str], bytes]] = []
        self.requests: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.pause_s = self.drip_s = 0.0
        self.hang_up = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append(body | {"_key": self.headers.get("authorization")})
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            hang_up = self.server.hang_up > 0
            self.server.hang_up -= hang_up
            given = self.server.before.pop(0) if self.server.before and not hang_up else None
        time.sleep(self.server.pause_s)
        with self.server.lock:
            self.server.at_once -= 1
        if hang_up:
            self.close_connection = True
            return
        if given is None:
            data = [answer(query) for query in body["query"]]
            given = 200, {}, json.dumps({"index": {"version": "v1"}, "coverage": {"full": True}, "data": data}).encode()
        status, headers, content = given
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that has left
            for number in range(len(content) if self.server.drip_s else 1):
                self.wfile.write(content[number : number + 1] if self.server.drip_s else content)
                time.sleep(self.server.drip_s)

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # a client that has left
            super().finish()

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def sync(url: str, call: Callable[[Any], Any], **settings: Any) -> Any:
    with Client(url, **settings) as client:
        return call(client)


def asynchronous(url: str, call: Callable[[Any], Any], **settings: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(url, **settings) as client:
            return await call(client)

    return asyncio.run(run())


@pytest.fixture(params=[sync, asynchronous])
def ask(request) -> Callable[..., Any]:
    return request.param


def refusal(status: int, headers: dict[str, str] | None = None, **error: Any) -> tuple[int, dict[str, str], bytes]:
    body = {"error": {"message": "no", "type": "overloaded", "param": None, "code": "full"} | error, "request_id": "r1"}
    return status, headers or {}, json.dumps(body).encode()


def test_a_query_gets_its_hits(server, ask):
    (found,) = ask(
        server.url, lambda client: client.retrieve("who", "nq", top_k=3), headers={"authorization": "Bearer k"}
    )
    assert found == Answer("who", False, True, True, (Hit(**HIT),), "v1")
    (request,) = server.requests
    assert 29_000 < request.pop("timeout_ms") <= 30_000, "what is left: later nobody waits for it"
    assert request == {
        "query": ["who"], "task": "nq", "top_k": 3, "level": "page", "with_text": False, "_key": "Bearer k"
    }  # fmt: skip


def test_a_long_list_goes_out_in_parts_and_comes_back_in_order(server, ask):
    queries = [f"q{number}" for number in range(10)]
    found = ask(server.url, lambda client: client.retrieve(queries, "nq"), batch_size=4)
    assert [one.query for one in found] == queries
    assert sorted(len(request["query"]) for request in server.requests) == [2, 4, 4]
    assert ask(server.url, lambda client: client.retrieve([], "nq")) == []


def test_no_more_requests_are_under_way_than_allowed(server):
    server.pause_s = 0.05
    asynchronous(server.url, lambda client: client.retrieve(["q"] * 12, "nq"), batch_size=1, concurrency=3)
    assert server.most_at_once == 3
    server.most_at_once = 0
    with Client(server.url, concurrency=2) as client:
        threads = [threading.Thread(target=client.retrieve, args=("q", "nq")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert server.most_at_once == 2


@pytest.mark.parametrize("status", [429, 502, 503])
def test_what_is_refused_for_the_moment_is_sent_again(server, ask, status):
    server.before = [refusal(status), refusal(status)]
    assert len(ask(server.url, lambda client: client.retrieve("who", "nq"))) == 1
    assert len(server.requests) == 3


def test_a_500_is_sent_again_only_where_a_proxy_says_it(server, ask):
    server.before = [(500, {}, b"Internal Server Error")]
    assert len(ask(server.url, lambda client: client.retrieve("who", "nq"))) == 1
    server.before = [refusal(500, message="the server failed", type="internal", param=None, code="internal")]
    with pytest.raises(EndpointError, match="500: the server failed"):
        ask(server.url, lambda client: client.retrieve("who", "nq"))


def test_a_broken_connection_is_tried_again(server, ask):
    server.hang_up = 2
    assert len(ask(server.url, lambda client: client.retrieve("who", "nq"))) == 1
    assert len(server.requests) == 3


def test_the_time_that_the_server_asks_for_is_waited(server, ask):
    server.before = [refusal(429, {"retry-after": "0.4"})]
    started = time.monotonic()
    ask(server.url, lambda client: client.retrieve("who", "nq"))
    assert time.monotonic() - started >= 0.4
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    server.before = [refusal(503, {"retry-after": date})]
    with pytest.raises(EndpointError, match=r"after 1 attempt\(s\); the next .* in 3[56]\d\d\.\d s; .* 503"):
        ask(server.url, lambda client: client.retrieve("who", "nq"))


def test_a_server_that_asks_for_no_time_at_all_is_not_hammered(server, ask):
    server.before = [refusal(429, {"retry-after": "0"}) for _ in range(1000)]
    with pytest.raises(EndpointError, match="no answer in time"):
        ask(server.url, lambda client: client.retrieve("who", "nq"), timeout_s=1.0)
    assert len(server.requests) < 50
    attempts = _Attempts("POST", time.monotonic() + 60)
    for _ in range(2000):  # a thousand doublings are more than a float holds
        attempts.done(503, {}, b"")
    assert 0 <= attempts.wait() <= 5


def test_an_answer_that_is_no_json_is_an_error_of_the_endpoint(server, ask):
    server.before = [(200, {}, b"<html>Sign in</html>")]
    with pytest.raises(EndpointError, match="the answer is no JSON: <html>Sign in</html>"):
        ask(server.url, lambda client: client.retrieve("who", "nq"))


def test_what_a_request_got_wrong_is_not_sent_again(server, ask):
    server.before = [refusal(422, message="unknown task", type="invalid_request", param="task", code="invalid_task")]
    with pytest.raises(EndpointError, match=r"POST http://.*/retrieve: 422: unknown task") as caught:
        ask(server.url, lambda client: client.retrieve("who", "none"))
    error = caught.value
    assert (error.status, error.type, error.param, error.code) == (422, "invalid_request", "task", "invalid_task")
    assert error.request_id == "r1"
    assert len(server.requests) == 1


def test_a_proxy_s_page_is_an_error_too(server, ask):
    server.before = [(403, {}, b"<html>\nForbidden</html>")]
    with pytest.raises(EndpointError, match="403: <html> Forbidden</html>") as caught:
        ask(server.url, lambda client: client.retrieve("who", "nq"))
    assert (caught.value.status, caught.value.code) == (403, None)


@pytest.mark.parametrize(("slow", "why"), [({"pause_s": 5.0}, ""), ({"drip_s": 0.05}, "came too slowly")])
def test_a_deadline_bounds_a_slow_answer(server, ask, slow, why):
    for name, value in slow.items():
        setattr(server, name, value)
    started = time.monotonic()
    with pytest.raises(EndpointError, match=f"no answer in time after .*{why}"):
        ask(server.url, lambda client: client.retrieve("who", "nq"), timeout_s=0.5)
    assert time.monotonic() - started < 4


def test_a_deadline_bounds_the_wait_for_a_turn(server):
    with Client(server.url, concurrency=1, timeout_s=0.2) as client, client._turn:
        with pytest.raises(EndpointError, match=r"after 0 attempt\(s\); waiting for its turn"):
            client.retrieve("who", "nq")
        assert server.requests == []

    async def run() -> None:
        async with AsyncClient(server.url, concurrency=1, timeout_s=0.2) as client, client._turn:
            with pytest.raises(EndpointError, match=r"after 0 attempt\(s\); waiting for its turn"):
                await client.retrieve("who", "nq")

    asyncio.run(run())
    assert server.requests == []


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_error_names_the_address_that_was_asked(server, ask, slash):
    server.before = [refusal(422)]
    with pytest.raises(EndpointError, match=rf"^POST {server.url}/aliased/retrieve: 422: no"):
        ask(f"{server.url}/aliased{slash}", lambda client: client.retrieve("who", "nq"))


def test_an_endpoint_that_is_not_there_is_named(ask):
    with pytest.raises(EndpointError, match=r"/retrieve: no answer in time.*is the endpoint there") as caught:
        ask("http://127.0.0.1:9", lambda client: client.retrieve("who", "nq"), timeout_s=0.5)
    assert caught.value.status is None


def test_an_address_without_a_scheme_is_refused_at_once(ask):
    with pytest.raises(EndpointError, match=r"UnsupportedProtocol .*'http://' or 'https://'.*its address right"):
        ask("127.0.0.1:9", lambda client: client.retrieve("who", "nq"), timeout_s=1e6)


def test_after_an_error_the_rest_of_a_list_is_not_sent(server):
    server.before = [refusal(422) for _ in range(20)]
    with pytest.raises(EndpointError, match="422: no"):
        asynchronous(server.url, lambda client: client.retrieve(["q"] * 20, "nq"), batch_size=1, concurrency=2)
    assert len(server.requests) <= 4


def test_what_may_be_found_is_asked_only_where_it_is_said(server: Server) -> None:
    with Client(server.url) as client:
        client.retrieve("who", "nq")
        client.retrieve("who", "nq", only_pages=("1", "2"), without_pages=["3"], allow_partial=True)
    plain, chosen = server.requests
    assert not {"only_pages", "without_pages", "allow_partial"} & plain.keys()
    assert (chosen["only_pages"], chosen["without_pages"], chosen["allow_partial"]) == (["1", "2"], ["3"], True)
