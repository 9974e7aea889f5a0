"""Serving on a real cluster: under load nothing is lost while replicas are killed, versions flip and the app scales."""

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from head_node import COMMANDS, ROOT, Head, free_ports, head_node
from small_index import configuration, publish_index, publish_model

from serve.versions import open_version
from taskspec.errors import EndpointError
from taskspec.retrieve.client import Client

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

APPLICATION = f"acceptance{os.getpid()}"
KEY = {"x-api-key": "k" * 43}
CLIENTS = 3


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node(PYTHONPATH=str(ROOT)) as head:
        yield head


@pytest.fixture(scope="module")
def url(head: Head) -> str:
    """Where the application answers: Serve keeps its first port."""
    (port,) = free_ports(1)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for seed, name in enumerate("ab"):
        contract = publish_model(str(folder / name), configuration(folder), seed)
        publish_index(str(folder / f"index-{name}"), contract, str(folder / name))
    return folder


def deploy(head: Head, folder: Path, url: str, replicas: int, **changed: Any) -> None:
    """As a person does who has the token: `serve deploy`.    Args: changed: arguments of the application."""
    key = {"name": "ops", "sha256": hashlib.sha256(KEY["x-api-key"].encode()).hexdigest(), "scopes": ["read", "admin"]}
    args = {
        "checkpoint": str(folder / "a"),
        "index": str(folder / "index-a"),
        "aliases": str(folder / "aliases"),
        "keys": [key],
        "cache_bytes": 0,
        "threads": 1,
        "shard_threads": 1,
    } | changed
    deployments = [{"name": name, "num_replicas": replicas} for name in ("Api", "Encoder", "Shard0", "Shard1")]
    application = {"name": APPLICATION, "import_path": "serve.app:build", "args": args, "deployments": deployments}
    config = {"http_options": {"host": "127.0.0.1", "port": int(url.rpartition(":")[2])}, "applications": [application]}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [COMMANDS / "serve", "deploy", str(path), "--address", head.url]
    done = subprocess.run(command, env=head.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def replicas(name: str) -> list[int]:
    """Process ids of a deployment's replicas."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if f"ray::ServeReplica:{APPLICATION}:{name}" in line]


def until(condition: Any, what: str, wait_s: float = 180) -> None:
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.5)


def count(name: str, wanted: int) -> None:
    """Waits until a deployment has so many replicas."""
    until(lambda: len(replicas(name)) == wanted, f"{wanted} replicas of {name}, there are {len(replicas(name))}")


class LoadOfClients:
    """Clients that honour the protocol, each asking one query after the other."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.versions: Counter[str] = Counter()
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def _run(self, number: int) -> None:
        with Client(self._url, timeout_s=120, headers=KEY) as client:
            while not self._stop.is_set():
                query = f"client {number} asks {sum(self.versions.values())}"
                try:
                    (answer,) = client.retrieve(query, ("nq", "fever")[number % 2])
                except EndpointError as error:
                    self.errors.append(str(error))
                else:
                    assert answer.complete
                    self.versions[answer.index_version] += 1

    def __enter__(self) -> "LoadOfClients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def go_on(self, answers: int = 20) -> None:
        """Until so many more have been answered."""
        wanted = sum(self.versions.values()) + answers
        until(lambda: sum(self.versions.values()) >= wanted or self.errors, f"{answers} answers")
        assert not self.errors


def test_no_request_is_lost_while_replicas_die_a_version_flips_and_the_app_scales(
    head: Head, folder: Path, url: str
) -> None:
    a, b = (open_version(str(folder / name), str(folder / f"index-{name}")).version.id for name in "ab")

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    deploy(head, folder, url, replicas=2)
    until(ready, "the endpoint answers")
    for name in ("Api", "Encoder", "Shard0", "Shard1"):
        count(name, 2)
    with LoadOfClients(url) as load:
        load.go_on()
        for name in ("Encoder", "Shard0", "Api"):
            os.kill(replicas(name)[0], signal.SIGKILL)
            load.go_on()
            count(name, 2)  # Serve has started another
        body = {"checkpoint": str(folder / "b"), "index": str(folder / "index-b"), "expected": a, "epsilon": 1}
        assert httpx.put(f"{url}/aliases/live", json=body, headers=KEY).status_code == 202

        def flipped() -> bool:
            state = httpx.get(f"{url}/aliases/live", headers=KEY, timeout=30).json()
            assert state["status"] != "refused", state["reason"]
            return bool(state["current"]["version"] == b and state["status"] == "served")

        until(flipped, "the flip")
        load.go_on()
        deploy(head, folder, url, replicas=1)
        for name in ("Encoder", "Shard0", "Api"):
            count(name, 1)
        load.go_on()
        deploy(head, folder, url, replicas=2)
        for name in ("Encoder", "Shard0", "Api"):
            count(name, 2)
        load.go_on()
        # the one that knows what is served: another reads it from its file
        os.kill(replicas("Aliases")[0], signal.SIGKILL)
        load.go_on()
        count("Aliases", 1)
        load.go_on()
    assert load.errors == []
    assert load.versions.keys() == {a, b}
    final = httpx.post(f"{url}/retrieve", json={"query": "Io", "task": "nq"}, headers=KEY, timeout=60).json()
    assert final["index"]["version"] == b
    print(f"{sum(load.versions.values())} answers, none lost: {dict(load.versions)}")


def test_while_the_only_replica_of_a_shard_is_gone_the_rest_answers_and_then_all_of_it(
    head: Head, folder: Path, url: str
) -> None:
    # Less than a replica takes to start, or the rest need not answer: requests would wait for the new one.
    deploy(head, folder, url, replicas=1, shard_timeout_ms=500)

    def settled() -> bool:
        """Whether the replicas of the deployment before are gone."""
        command = [COMMANDS / "serve", "status", "--address", head.url]
        said = subprocess.run(command, env=head.environment, cwd=ROOT, capture_output=True, text=True, check=True)
        application = yaml.safe_load(said.stdout)["applications"][APPLICATION]
        states = [one["replica_states"] for one in application["deployments"].values()]
        return bool(application["status"] == "RUNNING" and all(one == {"RUNNING": 1} for one in states))

    def ask(**fields: Any) -> httpx.Response:
        body = {"query": f"who {time.monotonic()}", "task": "nq", "level": "passage", "top_k": 12, **fields}
        return httpx.post(f"{url}/retrieve", json=body, headers=KEY, timeout=60)

    def whole() -> bool:
        try:
            answer = ask()
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and len(answer.json()["data"][0]["hits"]) == 12

    until(settled, "one replica of each")
    until(whole, "the endpoint answers")
    count("Shard1", 1)
    (pid,) = replicas("Shard1")
    os.kill(pid, signal.SIGKILL)
    seen = Counter()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        partial, strict = ask(allow_partial=True), ask()
        coverage = partial.json()["coverage"]["shards"] if partial.status_code == 200 else None
        seen[partial.status_code, coverage and coverage["successful"], strict.status_code] += 1
        if coverage and coverage["failed"]:
            assert len(partial.json()["data"][0]["hits"]) == 5, "the rows of the other shard"
            assert not partial.json()["data"][0]["complete"]
        if strict.status_code == 200 and sum(seen.values()) > 1:
            break
    assert not [kind for kind in seen if kind[0] != 200], seen
    assert any(successful == 1 and strict == 503 for _, successful, strict in seen), seen
    until(whole, "the whole index answers again")
