"""URIs and artifacts, on a file system and on an S3 server alike."""

import dataclasses
import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest

from taskspec import artifacts, node_cache, store
from taskspec.errors import ArtifactError, StoreError


@pytest.fixture(params=["folder", "s3"])
def root(request, tmp_path):
    """An empty place of each kind."""
    if request.param == "folder":
        return str(tmp_path / "root")
    return store.join(request.getfixturevalue("s3_bucket"), tmp_path.name)


@pytest.fixture
def s3_calls(s3_bucket, monkeypatch):
    """Names and keys of the S3 calls that change something, in order."""
    calls = []

    def note(params, model, **_):
        if model.name in ("PutObject", "DeleteObject"):
            calls.append((model.name, params["Key"].rpartition("/")[2]))

    events = store._s3().meta.events
    events.register("before-parameter-build.s3", note)
    yield calls
    events.unregister("before-parameter-build.s3", note)


def publish(uri, kind="letters", facts=None, **files):
    with artifacts.publishing(uri, kind, inputs={"from": "x"}, config={"seed": 0}, facts=facts or {}) as folder:
        for name, content in files.items():
            (folder / "sub").mkdir(exist_ok=True)
            (folder / "sub" / name).write_bytes(content.encode())
    return artifacts.open_artifact(uri, kind, verify=True)


def test_small_files_are_written_whole_and_read_back(root):
    uri = store.join(root, "a", "b.txt")
    assert not store.exists(uri)
    store.write_bytes(uri, b"one")
    store.write_bytes(uri, b"two")
    assert store.exists(uri)
    assert store.read_bytes(uri) == b"two"
    assert store.list_files(root) == [uri]


def test_a_large_file_is_streamed(root):
    content = gzip.compress(bytes(range(256)) * 20_000, compresslevel=0)
    store.write_bytes(store.join(root, "a.gz"), content)
    with store.open_input(store.join(root, "a.gz")) as stream, gzip.GzipFile(fileobj=stream) as unpacked:
        assert hash(unpacked.read()) == hash(bytes(range(256)) * 20_000)


def test_a_missing_file_is_named(root):
    for act in (store.read_bytes, store.expand, store.fingerprint):
        with pytest.raises(StoreError, match=r"/a\.txt: .*(does not exist|Not Found)"):
            act(store.join(root, "a.txt"))


def test_an_s3_uri_without_a_bucket_is_refused():
    with pytest.raises(StoreError, match=r"s3:///a: has no bucket; S3 URIs look like s3://bucket/key"):
        store.read_bytes("s3:///a")


def test_a_bucket_that_is_not_there_is_named(s3_bucket):
    with pytest.raises(StoreError, match=r"s3://nowhere/a: cannot be listed: .*NoSuchBucket"):
        store.list_files("s3://nowhere/a")
    with pytest.raises(StoreError, match=r"s3://nowhere/a: cannot be written: .*NoSuchBucket"):
        store.write_bytes("s3://nowhere/a", b"")


def test_what_breaks_again_and_again_while_an_s3_file_is_read_names_the_file(s3_bucket, monkeypatch):
    class Broken:
        def read(self, _):
            raise ConnectionResetError("reset by peer")

        def close(self):
            pass

    asked = []

    def get_object(**arguments):
        asked.append(arguments.get("Range"))
        return {"Body": Broken(), "ETag": "one"}

    monkeypatch.setattr(store._s3(), "get_object", get_object)
    with store.open_input("s3://b/a") as stream, pytest.raises(StoreError, match="s3://b/a: cannot be read: reset"):
        stream.read(10)
    assert asked == [None, *["bytes=0-"] * (store.READ_ATTEMPTS - 1)]


@pytest.mark.parametrize("held", [None, b"held"])
def test_a_swap_on_s3_sees_what_is_written_between_its_reading_and_its_writing(s3_bucket, held):
    uri = store.join(s3_bucket, "race", str(held), "live.json")
    if held is not None:
        store.write_bytes(uri, held)
    events, place = store._s3().meta.events, "before-parameter-build.s3.PutObject"

    def write_another(**_):
        events.unregister(place, write_another)
        store.write_bytes(uri, b"another")

    events.register(place, write_another)
    assert not store.swap(uri, held, b"mine")
    assert store.read_bytes(uri) == b"another"
    assert store.swap(uri, b"another", b"mine")


@pytest.mark.parametrize("held", [None, b"held"])
def test_a_swap_on_a_file_system_waits_for_one_under_way(tmp_path, monkeypatch, held):
    uri, write, swapped = str(tmp_path / "live.json"), store.write_bytes, []
    if held is not None:
        write(uri, held)
    other = threading.Thread(target=lambda: swapped.append(store.swap(uri, held, b"another")))

    def write_slowly(*arguments):
        monkeypatch.setattr(store, "write_bytes", write)
        other.start()
        other.join(0.2)  # time enough, if nothing made it wait
        write(*arguments)

    monkeypatch.setattr(store, "write_bytes", write_slowly)
    assert store.swap(uri, held, b"mine")
    other.join()
    assert swapped == [False]
    assert store.read_bytes(uri) == b"mine"


def test_a_star_in_the_last_part_is_expanded(root):
    for name in ("b.jsonl", "a.jsonl", "a.txt", "deeper/c.jsonl"):
        store.write_bytes(store.join(root, name), b"")
    assert store.expand(store.join(root, "*.jsonl")) == [store.join(root, "a.jsonl"), store.join(root, "b.jsonl")]
    assert store.expand(store.join(root, "a.txt")) == [store.join(root, "a.txt")]
    with pytest.raises(StoreError, match=r"\*\.gz: names no file"):
        store.expand(store.join(root, "*.gz"))


def test_a_relative_pattern_is_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.write_bytes("data/a.jsonl", b"")
    for pattern in ("data/*.jsonl", "./data/*.jsonl", "data//*.jsonl"):
        assert store.expand(pattern) == ["data/a.jsonl"]
    with pytest.raises(StoreError, match=r"data: is a folder; name its files, such as data/\*\.jsonl"):
        store.expand("data")


def test_a_fingerprint_follows_the_content(root):
    uri = store.join(root, "a.txt")
    store.write_bytes(uri, b"one")
    first = store.fingerprint(uri)
    store.write_bytes(uri, b"two")
    second = store.fingerprint(uri)
    store.write_bytes(uri, b"one")
    assert store.fingerprint(uri) == first != second


def test_an_artifact_has_its_files_and_a_manifest(root):
    artifact = publish(store.join(root, "x"), facts={"rows": 3}, a="A", b="B")
    manifest = artifact.manifest
    assert (artifact.folder / "sub" / "a").read_text() == "A"
    assert list(manifest.files) == ["sub/a", "sub/b"]
    assert (manifest.kind, manifest.inputs, manifest.config) == ("letters", {"from": "x"}, {"seed": 0})
    assert manifest.facts == {"rows": 3}


def test_equal_content_has_the_same_id_and_other_content_another(root):
    first = publish(store.join(root, "x"), a="A")
    assert publish(store.join(root, "y"), a="A").id == first.id
    later = dataclasses.replace(first.manifest, created="2020-01-01T00:00:00+00:00", config={"seed": 1})
    assert later.id == first.id
    assert publish(store.join(root, "z"), a="B").id != first.id
    assert publish(store.join(root, "z"), facts={"rows": 3}, a="A").id != first.id


def test_facts_may_be_filled_while_writing(root):
    facts = {}
    with artifacts.publishing(store.join(root, "x"), "letters", inputs={}, config={}, facts=facts):
        facts["rows"] = 7
    assert artifacts.read_manifest(store.join(root, "x"), "letters").facts == {"rows": 7}


def test_publishing_again_replaces_all_of_what_stood_there(root):
    uri = store.join(root, "x")
    publish(uri, a="A", old="old")
    artifact = publish(uri, a="B")
    assert list(artifact.manifest.files) == ["sub/a"]
    assert store.list_files(uri) == [store.join(uri, "manifest.json"), store.join(uri, "sub", "a")]


def test_an_error_while_writing_leaves_what_stood_there(root):
    uri = store.join(root, "x")
    publish(uri, a="A")
    with pytest.raises(AttributeError):
        publish(uri, a="B", b=None)
    assert (artifacts.open_artifact(uri, "letters", verify=True).folder / "sub" / "a").read_text() == "A"
    assert len(store.list_files(root)) == 2


def test_an_error_while_writing_leaves_nothing_behind(root):
    with pytest.raises(KeyError), artifacts.publishing(store.join(root, "x"), "k", inputs={}, config={}, facts={}):
        raise KeyError
    assert store.list_files(root) == []


def test_what_a_killed_process_left_goes_when_the_next_one_publishes(root, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    publish(store.join(root, "x"), a="A")
    parent = tmp_path if store.is_s3(root) else Path(root)
    script = (
        "import os, signal, sys; from taskspec import artifacts\n"
        "with artifacts.publishing(sys.argv[1], 'letters', inputs={}, config={}, facts={}):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, store.join(root, "y")], env=environment, check=False)
    (left,) = parent.glob(".publishing-*")
    with artifacts.publishing(store.join(root, "z"), "letters", inputs={}, config={}, facts={}) as working:
        assert left.exists(), "it may be one that was made this moment"
        for folder in (left, working):
            os.utime(folder, (0, 0))
        publish(store.join(root, "x"), a="B")
        assert not left.exists()
        assert working.exists(), "whoever prepares it lives"


def test_an_artifact_whose_replacement_was_killed_half_way_comes_back(tmp_path):
    uri = str(tmp_path / "x")
    script = (
        "import os, sys\nfrom taskspec import artifacts\n"
        "os.rename, rename = (lambda a, b: os._exit(9) if str(b) == sys.argv[1] else rename(a, b)), os.rename\n"
        "with artifacts.publishing(sys.argv[1], 'letters', inputs={}, config={}, facts={}): pass"
    )
    before = publish(uri, a="A").id
    subprocess.run([sys.executable, "-c", script, uri], check=False)
    assert not Path(uri).exists(), "killed between the two renames"
    with (
        pytest.raises(KeyError),
        artifacts.publishing(uri, "letters", inputs={}, config={}, facts={}),
    ):
        raise KeyError
    assert artifacts.open_artifact(uri, "letters", verify=True).id == before
    publish(uri, b="B")
    assert not list(tmp_path.glob("x?*"))


def test_a_full_disk_is_an_error_of_the_uri(root):
    uri = store.join(root, "x")
    with (
        pytest.raises(StoreError, match=r"/x: cannot be written \(prepared in .*, scratch in .*\): .*No space left"),
        artifacts.publishing(uri, "letters", inputs={}, config={}, facts={}),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(FileNotFoundError, match="elsewhere"),
        artifacts.publishing(uri, "letters", inputs={}, config={}, facts={}),
    ):
        raise FileNotFoundError(errno.ENOENT, "no such file", "elsewhere")


def test_what_is_no_artifact_is_not_replaced(root):
    uri = store.join(root, "home")
    store.write_bytes(store.join(uri, "letter.txt"), b"dear")
    with (
        pytest.raises(StoreError, match=r"/home: stands already and is no artifact; remove it or name another place"),
        artifacts.publishing(uri, "letters", inputs={}, config={}, facts={}),
    ):
        pytest.fail("refused before work starts")
    assert store.read_bytes(store.join(uri, "letter.txt")) == b"dear"


def test_the_manifest_is_the_last_object_put_on_s3(s3_bucket, s3_calls):
    uri = store.join(s3_bucket, "ordered")
    publish(uri, a="A", b="B")
    assert s3_calls == [
        *[("PutObject", name) for name in (".publishing", "a", "b", "manifest.json")],
        ("DeleteObject", ".publishing"),
    ]


def test_while_an_artifact_on_s3_is_replaced_there_is_none(s3_bucket, s3_calls):
    uri = store.join(s3_bucket, "replaced")
    publish(uri, a="A")
    s3_calls.clear()
    publish(uri, b="B")
    puts = [name for call, name in s3_calls if call == "PutObject"]
    assert s3_calls.index(("DeleteObject", "manifest.json")) < s3_calls.index(("PutObject", "b"))
    assert puts[-1] == "manifest.json"


def test_a_broken_upload_is_no_artifact_and_can_be_published_over(s3_bucket, monkeypatch):
    uri = store.join(s3_bucket, "broken")

    def broken(path, bucket, key):
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(store._s3(), "upload_file", broken)
        with pytest.raises(StoreError, match="broken/sub/a: cannot be written: connection lost"):
            publish(uri, a="A")
    with pytest.raises(ArtifactError, match=r"broken: holds no manifest\.json, so it is no complete letters"):
        artifacts.open_artifact(uri, "letters")
    assert list(publish(uri, b="B").manifest.files) == ["sub/b"]


def test_of_two_writers_of_one_artifact_on_s3_the_first_gives_up(s3_bucket, monkeypatch):
    uri = store.join(s3_bucket, "shared")
    upload, second = store.upload, []

    def slow(path, target):
        upload(path, target)
        if not second:
            second.append(target)
            publish(uri, b="B")  # begins, and ends, while the first is at its first file

    monkeypatch.setattr(store, "upload", slow)
    with pytest.raises(StoreError, match="shared: another process publishes there at the same time"):
        publish(uri, a="A")
    assert list(artifacts.open_artifact(uri, "letters", verify=True).manifest.files) == ["sub/b"]


def test_a_stream_from_s3_that_breaks_off_is_read_on_from_there(s3_bucket):
    uri, content = store.join(s3_bucket, "long"), os.urandom(3 << 20)
    store.write_bytes(uri, content)

    class Breaking:
        def __init__(self, body):
            self._body, self._left = body, 1_500_000

        def read(self, size):
            if not self._left:
                raise ConnectionResetError("connection lost")
            size = min(size, self._left)
            self._left -= size
            return self._body.read(size)

        def close(self):
            self._body.close()

    with store.open_input(uri) as stream:
        stream.raw._body = Breaking(stream.raw._body)
        assert stream.read() == content
    with store.open_input(uri) as stream:
        stream.raw._body = Breaking(stream.raw._body)
        stream.read(1000)
        store.write_bytes(uri, content[::-1])
        with pytest.raises(StoreError, match=r"long: cannot be read: .*Precondition"):
            stream.read()


def test_an_artifact_on_s3_is_fetched_once(s3_bucket):
    uri = store.join(s3_bucket, "fetched")
    folder = publish(uri, a="A").folder
    artifacts.remove(uri)
    assert (folder / "sub" / "a").read_text() == "A"
    assert publish(uri, a="A").folder == folder


def test_only_the_files_that_are_needed_are_fetched_and_looked_at(root):
    uri = store.join(root, "parts")
    with artifacts.publishing(uri, "letters", inputs={}, config={}, facts={}) as folder:
        (folder / "a").write_text("part a")
        (folder / "b").write_text("part b")
    store.write_bytes(store.join(uri, "b"), b"spoiled")
    opened = artifacts.open_artifact(uri, "letters", verify=True, files=["a"])
    assert (opened.folder / "a").read_text() == "part a"
    if store.is_s3(uri):
        assert not (opened.folder / "b").exists()
    with pytest.raises(ArtifactError, match=r"/parts: c is not in the manifest; make the letters again"):
        artifacts.open_artifact(uri, "letters", files=["c"])


def test_artifacts_on_s3_share_what_they_have_in_common(s3_bucket, monkeypatch):
    uris = [store.join(s3_bucket, name) for name in ("first", "second")]
    for uri in uris:
        with artifacts.publishing(uri, "letters", inputs={}, config={}, facts={"uri": uri}) as folder:
            (folder / "a").write_text("in common")
    first, second = (artifacts.open_artifact(uri, "letters").folder / "a" for uri in uris)
    assert first != second
    assert first.samefile(second)


class Disk(NamedTuple):
    total: int
    free: int


def age(folder, hours):
    """As if a cached artifact and its contents had been opened so long ago."""
    then = time.time() - 3600 * hours
    for path in (folder, *(path for path in folder.rglob("*") if path.is_file())):
        os.utime(path, (then, then))


def test_a_full_disk_makes_the_cache_give_way_longest_unopened_first(s3_bucket, monkeypatch):
    old, older, recent, new = (store.join(s3_bucket, "evicted", name) for name in ("old", "older", "recent", "new"))
    folders = {uri: publish(uri, a="12345678", b=uri).folder for uri in (old, older, recent)}
    age(folders[old], hours=30)
    age(folders[older], hours=40)
    content = node_cache.folder() / "files" / hashlib.sha256(older.encode()).hexdigest()
    mapped = pa.memory_map(str(folders[older] / "sub" / "b"))
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda _: Disk(total=1000, free=110))
    publish(new, c="some eleven")
    assert not content.exists()
    assert not folders[older].exists()
    assert folders[old].exists(), "that was enough: a tenth of the disk is free"
    assert mapped.read() == older.encode(), "who has it open can go on"
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda _: Disk(total=1000, free=0))
    publish(new, d="more")
    assert not folders[old].exists()
    assert (folders[recent] / "sub" / "a").read_text() == "12345678", "opened lately: stays, with what others had too"
    assert publish(old, a="12345678", b=old).folder == folders[old]


def test_a_cache_of_local_artifacts_gives_way_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKSPEC_CACHE", str(tmp_path))
    old = node_cache.entry("rows", "old")
    (old / "passages.arrow").write_text("rows")
    age(old, hours=30)
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda _: Disk(total=1000, free=0))
    node_cache.make_room(1)
    assert not old.exists()


def test_a_cache_keeps_to_the_bytes_that_it_may_have(tmp_path, monkeypatch):
    """A pod's disk is its node's, which has room when the pod has none left."""
    monkeypatch.setenv("TASKSPEC_CACHE", str(tmp_path))
    monkeypatch.setenv("TASKSPEC_CACHE_BYTES", "1e3")
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda _: Disk(total=10**9, free=10**9))
    old, older = (node_cache.entry("rows", name) for name in ("old", "older"))
    for hours, place in ((30, old), (40, older)):
        (place / "passages.arrow").write_bytes(b"x" * 400)
        age(place, hours)
    os.link(old / "passages.arrow", old / "again.arrow")  # one file, which counts once
    node_cache.make_room(200)
    assert old.exists()
    assert older.exists(), "800 and 200 are the limit"
    node_cache.make_room(201)
    assert old.exists()
    assert not older.exists()


def test_an_altered_file_in_the_cache_is_fetched_again(s3_bucket):
    uri = store.join(s3_bucket, "spoiled")
    cached = publish(uri, a="spoiled in the cache").folder / "sub" / "a"
    cached.write_text("something else")
    assert (artifacts.open_artifact(uri, "letters").folder / "sub" / "a").read_text() == "something else"
    verified = artifacts.open_artifact(uri, "letters", verify=True)
    assert (verified.folder / "sub" / "a").read_text() == "spoiled in the cache"


def test_removing_takes_everything_below_and_nothing_beside(root):
    publish(store.join(root, "x"), a="A")
    publish(store.join(root, "xy"), a="A")
    artifacts.remove(store.join(root, "x"))
    artifacts.remove(store.join(root, "never"))
    assert all("/xy/" in name for name in store.list_files(root))
    assert len(store.list_files(root)) == 2


def test_an_artifact_that_lacks_a_file_is_not_whole(root):
    publish(store.join(root, "x"), a="A")
    assert artifacts.require_whole(store.join(root, "x"), "letters").files
    publish(store.join(root, "y"), a="A")
    (file,) = [name for name in store.list_files(store.join(root, "y")) if name.endswith("sub/a")]
    store.delete(file)
    with pytest.raises(ArtifactError, match=r"/y: sub/a is missing; make the letters again"):
        artifacts.require_whole(store.join(root, "y"), "letters")


def test_an_artifact_of_another_kind_is_refused(root):
    publish(store.join(root, "x"))
    with pytest.raises(ArtifactError, match=r"/x: holds letters; needed here: checkpoint"):
        artifacts.open_artifact(store.join(root, "x"), "checkpoint")


def change_manifest(uri, **changes):
    name = store.join(uri, "manifest.json")
    store.write_bytes(name, json.dumps(json.loads(store.read_bytes(name)) | changes).encode())


def test_an_artifact_of_another_format_version_is_refused(root):
    publish(store.join(root, "x"))
    change_manifest(store.join(root, "x"), format_version=99)
    with pytest.raises(ArtifactError, match=r"/x: has format version 99, this taskspec reads 1; make it again"):
        artifacts.open_artifact(store.join(root, "x"), "letters")


def test_a_damaged_manifest_is_refused(root):
    publish(store.join(root, "x"))
    change_manifest(store.join(root, "x"), unknown=1)
    with pytest.raises(ArtifactError, match=r"manifest\.json: is damaged \(.*unknown.*\); make the letters again"):
        artifacts.open_artifact(store.join(root, "x"), "letters")


def test_a_missing_and_an_altered_file_are_named(tmp_path):
    uri = str(tmp_path / "x")
    publish(uri, a="A", b="B")
    Path(uri, "sub", "a").write_text("C")
    artifacts.open_artifact(uri, "letters")
    with pytest.raises(ArtifactError, match=r"/x: sub/a is not the file in the manifest \(sha256\)"):
        artifacts.open_artifact(uri, "letters", verify=True)
    Path(uri, "sub", "b").unlink()
    with pytest.raises(ArtifactError, match=r"/x: sub/b is missing; make the letters again"):
        artifacts.open_artifact(uri, "letters")


def test_an_altered_file_on_s3_is_named_and_nothing_is_cached(s3_bucket):
    uri = store.join(s3_bucket, "altered")
    with artifacts.publishing(uri, "letters", inputs={}, config={}, facts={}) as folder:
        (folder / "a").write_text("only here")
    store.write_bytes(store.join(uri, "a"), b"C")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"altered: a is not the file in the manifest \(sha256\); publish it"):
            artifacts.open_artifact(uri, "letters")
