"""The endpoint under what the internet sends: fields at random, huge and broken bodies, slow and leaving clients."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from small_index import configuration, publish_index, publish_model, serving

from serve.arguments import ServeArgs

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]
GOOD = {"query": "Io", "task": "nq"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, serve_port: int) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("abused")
    contract = publish_model(str(folder / "a"), configuration(folder), 0)
    publish_index(str(folder / "index-a"), contract, str(folder / "a"))
    args = ServeArgs(checkpoint=str(folder / "a"), index=str(folder / "index-a"), threads=1, shard_threads=1)
    with serving(args, serve_port, "abused") as url:
        yield url


def memory(name: str) -> int:
    """Resident bytes of the replicas of a deployment."""
    lines = subprocess.run(["ps", "-eo", "rss,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    sizes = [1024 * int(line.split()[0]) for line in lines if f"ray::ServeReplica:abused:{name}" in line]
    assert sizes, f"no process has the title of a replica of {name}"
    return sum(sizes)


def answers(url: str) -> bool:
    response = httpx.post(f"{url}/retrieve", json=GOOD, timeout=60)
    return response.status_code == 200 and len(response.json()["data"][0]["hits"]) > 0


def test_no_request_of_the_schema_or_beside_it_is_answered_otherwise_than_documented(url: str, tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "25", "--seed", "1"]
    # Rules that no schema can say, such as which tasks there are, refuse bodies that it allows.
    command += ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:]


def test_bodies_that_are_too_long_are_refused_before_they_are_kept(url: str) -> None:
    before = memory("Api")

    def pieces() -> Iterator[bytes]:
        yield b'{"query": "'
        for _ in range(100):
            yield b"x" * 1_000_000
        yield b'", "task": "nq"}'

    statuses = []
    for content in (pieces(), b'{"query": "' + b"x" * 100_000_000 + b'", "task": "nq"}'):
        try:
            refused = httpx.post(f"{url}/retrieve", content=content, timeout=60)
        except httpx.TransportError:  # it has hung up while we were still sending, which is its right
            continue
        assert (refused.status_code, refused.json()["error"]["type"]) == (413, "too_large")
        statuses.append(refused.status_code)
    assert statuses, "at least one of them was told"
    assert answers(url)
    assert memory("Api") < before + 100_000_000


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("\0", 200),
        ("a\0b", 200),
        ("\u202e‮🪐" * 500, 200),
        ("x" * 20_000, 200),
        ("x" * 1_000_000, 413),
        ("\ud800", 422),
        (" ", 422),
    ],
    ids=["NUL", "NUL inside", "letters of all kinds", "a long word", "a word of a megabyte", "half a pair", "white"],
)
def test_texts_of_every_kind_are_answered_or_refused(url: str, query: str, status: int) -> None:
    content = json.dumps(GOOD | {"query": query})  # escapes halves of surrogate pairs, which httpx would not send
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/retrieve", content=content, headers=headers, timeout=60)
    assert response.status_code == status, response.text
    assert answers(url)


def test_slow_clients_and_those_that_leave_keep_nobody_waiting(url: str) -> None:
    host, port = urlsplit(url).hostname, urlsplit(url).port
    path = urlsplit(url).path
    sockets = []
    for number in range(100):
        connection = socket.create_connection((host, port), timeout=30)
        head = f"POST {path}/retrieve HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        body = b'{"query": "who leaves", "task": "nq"}'
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode())
        connection.sendall(body if number % 2 else body[:5])  # half of them leave, the others never finish
        sockets.append(connection)
    for connection in sockets[1::2]:
        connection.close()
    began = time.monotonic()
    for _ in range(5):
        assert answers(url)
    assert time.monotonic() - began < 60
    for connection in sockets[::2]:
        connection.close()
    deadline = time.monotonic() + 60
    while "taskspec_tokens_under_way" in (text := httpx.get(f"{url}/metrics").text):
        (line,) = [one for one in text.splitlines() if one.startswith("taskspec_tokens_under_way{")]
        if float(line.split()[-1]) == 0:
            break
        assert time.monotonic() < deadline, "what nobody waits for is still counted"
        time.sleep(0.2)


def test_memory_does_not_grow_with_requests(url: str) -> None:
    def ask(count: int) -> None:
        with httpx.Client(timeout=60) as client:
            for number in range(count):
                body = GOOD | {"query": [f"{os.urandom(8).hex()} {number}" for _ in range(20)], "fused": True}
                assert client.post(f"{url}/retrieve", json=body).status_code == 200

    ask(100)  # the cache fills, allocators settle
    before = {name: memory(name) for name in ("Api", "Encoder", "Shard0")}
    ask(300)
    for name, size in before.items():
        assert memory(name) < size + 60_000_000, name
