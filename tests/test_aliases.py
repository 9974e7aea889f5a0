"""Changing what is served while it is served: trials, flips, pilots, shadows, and what is refused."""

import asyncio
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from small_index import GOLDEN, TITLES, best_page, configuration, publish_index, publish_model, serving

from serve import aliases
from serve.alias_file import AliasFile
from serve.arguments import ServeArgs
from serve.errors import Conflict
from serve.keys import Key
from serve.versions import Table, open_version, reopen_version
from taskspec import store
from taskspec.errors import ArtifactError, StoreError

ADMIN, READER = {"x-api-key": "a" * 43}, {"x-api-key": "r" * 43}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions `a` and `b`: checkpoints `a`, `b` with indexes `index-a`, `index-b`; a finds its golden page, b does not
    find its own; `c` has another task only."""
    folder = tmp_path_factory.mktemp("aliases")
    config = configuration(folder)
    for seed, name in enumerate("ab"):
        contract = publish_model(str(folder / name), config, seed)
        page = best_page(str(folder / "a"))
        publish_index(str(folder / f"index-{name}"), contract, str(folder / name), golden_page=page)
    assert best_page(str(folder / "b")) != best_page(str(folder / "a"))
    less = config.model_copy(update={"tasks": config.tasks[:1]})
    contract = publish_model(str(folder / "c"), less, seed=2)
    publish_index(str(folder / "index-c"), contract, str(folder / "c"))
    return folder


@pytest.fixture(scope="module")
def url(folder: Path, serve_port: int) -> Iterator[str]:
    def key(name: str, headers: dict[str, str], *scopes: str) -> dict[str, Any]:
        return {"name": name, "sha256": hashlib.sha256(headers["x-api-key"].encode()).hexdigest(), "scopes": scopes}

    args = ServeArgs(
        checkpoint=str(folder / "a"),
        index=str(folder / "index-a"),
        aliases=str(folder / "aliases"),
        keys=tuple(Key.model_validate(k) for k in (key("ops", ADMIN, "read", "admin"), key("app", READER, "read"))),
        shard_deployments=2,
        threads=1,
        shard_threads=1,
        cache_bytes=0,
    )
    with serving(args, serve_port, "aliased") as url:
        yield url


def state(url: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{url}/aliases/live", headers=READER, timeout=30).json()
    return answer


def change(url: str, folder: Path, name: str, **fields: Any) -> dict[str, Any]:
    """Asks for a version and waits for what becomes of it."""
    body = {"checkpoint": str(folder / name), "index": str(folder / f"index-{name}")}
    now = state(url)
    body |= {"expected": now["current"]["version"], "revision": now["revision"]} | fields
    response = httpx.put(f"{url}/aliases/live", json=body, headers=ADMIN, timeout=30)
    assert response.status_code == 202, response.text
    while state(url)["status"] in ("loading", "trying"):
        time.sleep(0.1)
    return state(url)


def ask(url: str, query: str, task: str = "nq") -> str:
    """The version that answers."""
    body = {"query": query, "task": task}
    response = httpx.post(f"{url}/retrieve", json=body, headers=READER, timeout=30)
    assert response.status_code == 200, response.text
    assert response.json()["index"]["alias"] == "live"
    version: str = response.json()["index"]["version"]
    return version


def version(folder: Path, name: str) -> str:
    return open_version(str(folder / name), str(folder / f"index-{name}")).version.id


def test_a_version_that_finds_less_is_refused_and_the_old_one_goes_on(url: str, folder: Path) -> None:
    after = change(url, folder, "b")
    a, b = version(folder, "a"), version(folder, "b")
    assert (after["status"], after["current"]["version"], after["candidate"]) == ("refused", a, None)
    assert after["reason"] == (
        "task nq: R-precision on the golden queries falls from 1.000 to 0.000, more than epsilon 0.02"
    )
    assert after["golden"] == {a: {"nq": 1.0}, b: {"nq": 0.0}}
    assert ask(url, GOLDEN) == a
    after = change(url, folder, "c")
    assert after["reason"] == f"version {version(folder, 'c')} has no task fever, which is served; it has nq"
    body = {"checkpoint": str(folder / "b"), "index": str(folder / "index-a"), "expected": a}
    httpx.put(f"{url}/aliases/live", json=body, headers=ADMIN)
    while state(url)["status"] == "loading":
        time.sleep(0.1)
    assert "weights differs" in state(url)["reason"]
    assert ask(url, GOLDEN) == a


def test_a_flip_under_load_fails_no_request_and_going_back_is_quick(url: str, folder: Path) -> None:
    a, b = version(folder, "a"), version(folder, "b")
    seen: list[str] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            seen.append(ask(url, f"query {len(seen)}", ("nq", "fever")[len(seen) % 2]))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        after = change(url, folder, "b", epsilon=1)
        assert (after["status"], after["current"]["version"]) == ("served", b)
        assert ask(url, GOLDEN) == b
        before = len(seen)
        while len(seen) < before + 5:
            assert thread.is_alive()
            time.sleep(0.05)
        assert change(url, folder, "a")["current"]["version"] == a
        back = change(url, folder, "b")  # which finds less: but it was served last, and going back takes no trial
        assert (back["status"], back["current"]["version"]) == ("served", b)
        assert change(url, folder, "a")["current"]["version"] == a
    finally:
        stop.set()
        thread.join()
    assert set(seen) == {a, b}
    assert ask(url, GOLDEN) == a


def test_a_pilot_answers_its_share_of_its_task_only(url: str, folder: Path) -> None:
    a, b = version(folder, "a"), version(folder, "b")
    after = change(url, folder, "b", shares={"nq": 40}, epsilon=1)
    assert (after["current"]["version"], after["candidate"]["version"], after["shares"]) == (a, b, {"nq": 40})
    queries = [f"query {number}" for number in range(40)]
    table = Table(1, open_version(str(folder / "a"), str(folder / "index-a")), shares={"nq": 40})
    table = Table(1, table.current, open_version(str(folder / "b"), str(folder / "index-b")), {"nq": 40})
    answered = [ask(url, query) for query in queries]
    assert answered == [table.serving("nq", query).version.id for query in queries]
    assert 5 <= answered.count(b) <= 30
    assert {ask(url, query, "fever") for query in queries[:10]} == {a}
    after = change(url, folder, "a")
    assert after["candidate"] is None
    assert {ask(url, query) for query in queries} == {a}


def test_a_shadow_is_compared_and_never_answers(url: str, folder: Path) -> None:
    a = version(folder, "a")
    change(url, folder, "b", shadow=True, epsilon=1)
    assert {ask(url, f"about {title}", "fever") for title in TITLES} == {a}
    deadline = time.monotonic() + 20
    while (compared := state(url)["compared"].get("fever", {}).get("queries", 0)) < len(TITLES):
        assert time.monotonic() < deadline, compared
        time.sleep(0.1)
    assert state(url)["compared"]["fever"] == {"queries": len(TITLES), "overlap": 1.0}  # six pages: all are found
    change(url, folder, "a")
    assert state(url)["compared"] == {}
    *_, last = store.list_files(str(folder / "aliases/live/log"))
    assert json.loads(store.read_bytes(last))["compared"]["fever"] == {"queries": len(TITLES), "overlap": 1.0}


@pytest.mark.parametrize(
    ("headers", "name", "fields", "status", "message"),
    [
        (READER, "live", {}, 403, "PUT /aliases/live: changing an alias takes a key of scope admin"),
        ({}, "live", {}, 401, "no key, or none that is known"),
        (ADMIN, "other", {}, 404, "PUT /aliases/other: there is no alias 'other' here"),
        (ADMIN, "live", {"expected": "somebody"}, 409, "the alias live points to version "),
        (ADMIN, "live", {"revision": 0}, 409, "the alias live has revision "),
        (ADMIN, "live", {"shares": {"trex": 5}}, 409, "shares: unknown task 'trex'; known: nq, fever"),
        (ADMIN, "live", {"shares": {"nq": 101}}, 422, "shares: nq must have 0 to 100 percent but has 101"),
        (ADMIN, "live", {"share": 5}, 422, "unknown field share; known: checkpoint, index, expected, revision"),
    ],
)
def test_a_change_that_may_not_be_is_refused_at_once(
    url: str, folder: Path, headers: dict[str, str], name: str, fields: dict[str, Any], status: int, message: str
) -> None:
    body = {"checkpoint": str(folder / "b"), "index": str(folder / "index-b"), "expected": version(folder, "a")}
    response = httpx.put(f"{url}/aliases/{name}", json=body | fields, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"].startswith(message)
    assert state(url)["status"] == "served"


def test_every_change_is_in_the_log_and_the_file_says_what_is_served(url: str, folder: Path) -> None:
    log = [json.loads(store.read_bytes(name)) for name in store.list_files(str(folder / "aliases/live/log"))]
    assert [entry["revision"] for entry in log] == sorted(entry["revision"] for entry in log)
    assert (log[0]["who"], log[0]["action"]) == (None, "begin")
    assert {entry["who"] for entry in log[1:]} == {"ops"}
    flips = [entry["version"] for entry in log if entry["action"] == "serve"]
    assert flips[:2] == [version(folder, "b"), version(folder, "a")]
    assert [entry for entry in log if entry["action"] == "refuse" and "R-precision" in entry["reason"]]
    tree = json.loads((folder / "aliases/live.json").read_bytes())
    a = {"id": version(folder, "a"), "checkpoint": str(folder / "a"), "index": str(folder / "index-a")}
    assert tree["current"] == a
    assert tree["revision"] == state(url)["revision"]


def test_an_endpoint_overwrites_no_change_that_it_has_not_seen(folder: Path, s3_bucket: str) -> None:
    a, b = (open_version(str(folder / name), str(folder / f"index-{name}")) for name in "ab")
    for root in (str(folder / "race"), store.join(s3_bucket, "race")):
        first, second = AliasFile(root, "live"), AliasFile(root, "live")
        assert first.read() is None
        assert second.read() is None
        first.write(Table(1, a))
        with pytest.raises(Conflict, match=r"race/live\.json was changed by another endpoint, which this one follows"):
            second.write(Table(1, b))
        found = second.read()
        assert found is not None
        assert found.table == Table(1, a)
        with pytest.raises(Conflict):
            second.write(Table(1, b))  # what was read may be something that it cannot serve
        second.hold(found)
        assert second.read() is None, "as it is held"
        second.write(Table(2, b, opened=(a.version,)))
        again = AliasFile(root, "live").read()
        assert again is not None
        assert again.table == Table(2, b, opened=(a.version,))
        with pytest.raises(Conflict):
            first.write(Table(2, a))


def test_a_trial_without_an_encoder_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve keeps a call for as long as no replica is there to take it."""
    monkeypatch.setattr(aliases, "GOLDEN_TIMEOUT_S", 0.05)
    served = open_version(str(folder / "a"), str(folder / "index-a"))
    nobody = SimpleNamespace(run=SimpleNamespace(remote=lambda *_: asyncio.sleep(60)))
    with pytest.raises(Conflict, match=f"version {served.version.id} does not answer golden queries from every shard"):
        asyncio.run(aliases.golden_precision(nobody, served, served))


def test_a_damaged_copy_of_what_is_served_is_refused(url: str, folder: Path) -> None:
    before = state(url)
    copy = shutil.copytree(folder / "index-a", folder / "index-copy")
    body = {"checkpoint": str(folder / "a"), "expected": before["current"]["version"]}
    shard = copy / "5.faiss"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    for wanted in ("refused", "served"):
        assert httpx.put(f"{url}/aliases/live", json=body | {"index": str(copy)}, headers=ADMIN).status_code == 202
        while (after := state(url))["status"] in ("loading", "trying"):
            time.sleep(0.1)
        assert after["status"] == wanted
        assert after["asked"]["index"] == str(copy)
        if wanted == "refused":
            assert after["current"] == before["current"]
            assert "index-copy: 5.faiss is not the file in the manifest" in after["reason"]
            shard.write_bytes(whole)
    assert after["current"] == before["current"] | {"index": str(copy)}
    change(url, folder, "a")


def test_a_version_whose_index_was_built_anew_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "index-a", tmp_path / "index")
    file = AliasFile(str(tmp_path / "aliases"), "live")
    served = open_version(str(folder / "a"), str(tmp_path / "index"))
    file.write(Table(1, served))
    assert reopen_version(served.version) == served
    shutil.rmtree(tmp_path / "index")
    publish_index(str(tmp_path / "index"), served.contract, str(folder / "a"))
    with pytest.raises(
        ArtifactError, match=rf"index: holds version \w+ and no longer {served.version.id}; an index that"
    ):
        AliasFile(str(tmp_path / "aliases"), "live").read()


def test_a_file_of_another_shape_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "live.json").write_text('{"revision": 3, "current": {"checkpoint": "c", "index": "i"}}')
    with pytest.raises(StoreError, match=r"live\.json: is no alias of this version of taskspec .*; remove it, and"):
        AliasFile(str(tmp_path), "live").read()


def test_a_file_that_was_removed_is_written_anew(folder: Path, tmp_path: Path) -> None:
    table = Table(1, open_version(str(folder / "a"), str(folder / "index-a")))
    file = AliasFile(str(tmp_path), "live")
    file.write(table)
    (tmp_path / "live.json").unlink()
    assert file.read() is None
    file.write(replace(table, revision=2))
    found = AliasFile(str(tmp_path), "live").read()
    assert found is not None
    assert found.table.revision == 2


def test_what_another_endpoint_writes_and_this_one_cannot_serve_changes_nothing(folder: Path, url: str) -> None:
    """It goes on to try; and a change of its own does not overwrite what it could not follow."""
    before = state(url)
    alias = folder / "aliases" / "live.json"
    content = alias.read_bytes()
    tree = json.loads(content)
    broken = folder / "index-broken"
    contract = open_version(str(folder / "b"), str(folder / "index-b")).contract
    publish_index(str(broken), contract, str(folder / "b"), golden_page="4")  # so that it is a version of its own
    served = open_version(str(folder / "b"), str(broken))
    (broken / "0.faiss").write_bytes(b"no shard")
    tree["revision"] += 1
    tree["current"] = {"id": served.version.id, "checkpoint": str(folder / "b"), "index": str(broken)}
    alias.write_text(json.dumps(tree))
    time.sleep(15)
    assert state(url)["current"] == before["current"]
    expected = before["current"]["version"]
    name = "b" if expected == version(folder, "a") else "a"
    body = {"checkpoint": str(folder / name), "index": str(folder / f"index-{name}"), "expected": expected}
    deadline = time.monotonic() + 120
    while (answer := httpx.put(f"{url}/aliases/live", json=body, headers=ADMIN, timeout=60)).status_code == 409:
        assert time.monotonic() < deadline  # it is trying to follow
        time.sleep(0.2)
    assert answer.status_code == 202
    while state(url)["status"] in ("loading", "trying"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert json.loads(alias.read_bytes())["current"]["index"] == str(broken), "it was not overwritten unseen"
    assert state(url)["current"] == before["current"]
    alias.write_bytes(content)


def test_an_endpoint_follows_what_another_writes_into_the_file(folder: Path, url: str) -> None:
    """Last of the module: it leaves the alias where the other endpoint put it."""
    before = state(url)
    other = AliasFile(str(folder / "aliases"), "live")
    found = other.read()
    assert found is not None
    other.hold(found)
    table = found.table
    name = "b" if before["current"]["version"] == version(folder, "a") else "a"
    new = open_version(str(folder / name), str(folder / f"index-{name}"))
    other.write(Table(table.revision + 1, new, opened=(table.current.version,)))
    deadline = time.monotonic() + 60
    while state(url)["current"]["version"] != new.version.id:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert state(url)["revision"] == table.revision + 1
