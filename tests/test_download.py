"""Downloads from a server on this machine that breaks as real ones do."""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from jobs import cli
from jobs import download as job
from taskspec.config import load_config
from taskspec.data import download as module
from taskspec.data import triviaqa
from taskspec.data.download import RemoteFile, download, require_room, require_sha256, show_bytes
from taskspec.errors import ConfigError, DataError, StoreError

CONTENT = bytes(range(256)) * 400  # 100 KiB
NAME = "nq-dev-kilt.jsonl"


class Server:
    """Files by name; what is set here is what goes wrong."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {NAME: CONTENT}
        self.etags: dict[str, str] = {}
        self.statuses: list[int] = []
        """Answered first, one request each."""
        self.retry_after: str | None = None
        self.cuts: list[int] = []
        """Bytes after which a body breaks off, one GET each."""
        self.knows_range = True
        self.heeds_if_range = True
        self.gives_length = True
        self.gives_validator = True
        self.after_head: Callable[[], object] = lambda: None
        self.requests: list[tuple[str, str, str | None]] = []
        """(method, name, Range) of every request."""
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def gets(self) -> list[str | None]:
        return [wanted for method, _, wanted in self.requests if method == "GET"]

    def etag(self, name: str) -> str:
        return self.etags.get(name) or f'"{hashlib.md5(self.files[name]).hexdigest()}"'

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def end_headers(self) -> None:
                if self.command == "HEAD":  # the answer stands, and the client cannot have asked on yet
                    server.after_head()
                super().end_headers()

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                name, wanted = self.path.lstrip("/"), self.headers["Range"]
                server.requests.append((self.command, name, wanted))
                if server.statuses or name not in server.files:
                    self.send_response(server.statuses.pop(0) if server.statuses else 404)
                    if server.retry_after:
                        self.send_header("Retry-After", server.retry_after)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content, etag = server.files[name], server.etag(name)
                start = 0
                same = self.headers["If-Range"] == etag or not server.heeds_if_range
                if wanted and server.knows_range and same:
                    start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                else:
                    self.send_response(200)
                if server.gives_length:
                    self.send_header("Content-Length", str(len(content) - start))
                if server.gives_validator:
                    self.send_header("ETag", etag)
                self.end_headers()
                if body:
                    cut = server.cuts.pop(0) if server.cuts else len(content)
                    self.wfile.write(content[start : start + cut])

        return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(module, "BLOCK_BYTES", 10_000)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def fetch(server: Server, tmp_path: Path, said: list[str]) -> Callable[..., bytes]:
    """Downloads the server's one file and gives what then stands on disk."""

    def run(**more: Any) -> bytes:
        say = more.pop("say", said.append)
        remote = RemoteFile.look_up(f"{server.url}/{NAME}", say)
        download(remote, tmp_path / "data" / NAME, label="nq dev", say=say, **more)
        assert [path.name for path in (tmp_path / "data").iterdir()] == [NAME]
        return (tmp_path / "data" / NAME).read_bytes()

    return run


def parts(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "data").glob("*.part"))


def test_a_file_comes_whole_and_without_its_part(fetch, server, said):
    assert fetch() == CONTENT
    assert server.gets() == [None]
    assert said == ["nq dev: 100.0 KiB complete"]


def test_an_empty_file_is_a_file(fetch, server):
    server.files[NAME] = b""
    assert fetch() == b""


def test_a_cut_connection_goes_on_where_it_broke(fetch, server, said):
    server.cuts = [30_000, 20_000]
    assert fetch() == CONTENT
    assert server.gets() == [None, "bytes=30000-", "bytes=50000-"]
    assert "the connection broke after 30,000 of 102,400 bytes (closed by the server); next try in 0 s" in said[0]


def test_more_cuts_than_tries_are_no_fault_while_bytes_come(fetch, server):
    server.cuts = [10_000] * 9
    assert fetch() == CONTENT


def test_a_later_run_goes_on_with_the_part(fetch, server, tmp_path, said):
    server.cuts = [30_000, 0, 0, 0]
    with pytest.raises(StoreError, match=r"broke after 30,000 of 102,400 .* try 4 of as many; run the same command"):
        fetch()
    assert [part.stat().st_size for part in parts(tmp_path)] == [30_000]
    server.requests.clear()
    remote = RemoteFile.look_up(f"{server.url}/{NAME}", said.append)
    assert remote.missing_bytes(tmp_path / "data" / NAME) == len(CONTENT) - 30_000
    assert fetch() == CONTENT
    assert server.gets() == ["bytes=30000-"]


def test_ctrl_c_keeps_the_part(fetch, server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS_S", 0.0)

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(say=interrupt)
    (part,) = parts(tmp_path)
    size = part.stat().st_size
    assert 0 < size <= 10_000
    server.requests.clear()
    assert fetch() == CONTENT
    assert server.gets() == [f"bytes={size}-"]


def test_a_server_without_range_is_asked_again_from_the_beginning(fetch, server):
    server.knows_range = False
    server.cuts = [30_000]
    assert fetch() == CONTENT
    assert server.gets() == [None, "bytes=30000-"]


def test_a_server_without_range_that_breaks_at_the_same_place_ends(fetch, server):
    server.knows_range = False
    server.cuts = [30_000] * 9
    with pytest.raises(StoreError, match="broke after 30,000"):
        fetch()


def test_without_etag_and_date_nothing_is_resumed(fetch, server):
    server.gives_validator = False
    server.cuts = [30_000]
    assert fetch() == CONTENT
    assert server.gets() == [None, None]


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_a_new_version_between_two_parts_is_never_mixed_with_the_old(fetch, server, heeds_if_range):
    server.heeds_if_range = heeds_if_range
    server.cuts = [30_000]
    new = CONTENT[::-1]
    heads = iter(range(9))
    server.after_head = lambda: next(heads) == 1 and server.files.update({NAME: new})
    assert fetch() == new
    assert server.gets() == [None, "bytes=30000-", None]


def test_a_new_version_between_two_runs_drops_the_old_part(fetch, server, tmp_path):
    server.cuts = [30_000, 0, 0, 0]
    with pytest.raises(StoreError, match="broke after"):
        fetch()
    server.files[NAME] = CONTENT[::-1] + b"more"
    server.requests.clear()
    assert fetch() == CONTENT[::-1] + b"more"
    assert server.gets() == [None]


def test_a_version_that_changes_with_every_look_ends(fetch, server):
    server.after_head = lambda: server.etags.update({NAME: f'"{len(server.requests)}"'})
    with pytest.raises(StoreError, match="the file on the server changed meanwhile; that was try 4"):
        fetch()


def test_a_weak_etag_is_no_ground_to_go_on(server, said):
    server.etags[NAME] = 'W/"1"'
    assert RemoteFile.look_up(f"{server.url}/{NAME}", said.append).validator is None


def test_a_wrong_length_is_never_a_whole_file(fetch, server, tmp_path):
    server.cuts = [50_000] + [0] * 9
    with pytest.raises(StoreError, match="broke after 50,000 of 102,400 bytes"):
        fetch()
    assert not (tmp_path / "data" / NAME).exists()


def test_no_length_is_refused(fetch, server):
    server.gives_length = False
    with pytest.raises(StoreError, match="gives no length, so a broken download would look like a whole one"):
        fetch()


@pytest.mark.parametrize("status", [403, 404])
def test_a_missing_file_is_refused_at_once(fetch, server, status):
    server.statuses = [status]
    with pytest.raises(StoreError, match=rf"{server.url}/{NAME}: the server answers {status} .*--base-url"):
        fetch()
    assert len(server.requests) == 1


def test_503_twice_and_then_the_file(fetch, server, said):
    server.statuses = [503, 503]
    assert fetch() == CONTENT
    assert [line for line in said if "answers 503 Service Unavailable; next try in 0 s" in line] == said[:2]


def test_a_server_that_stays_down_is_given_up(fetch, server):
    server.statuses = [503] * 9
    with pytest.raises(StoreError, match="answers 503 Service Unavailable; that was try 4 of as many"):
        fetch()


def test_a_server_that_asks_for_patience_gets_it(server, said, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    server.statuses, server.retry_after = [429, 503], "7"
    RemoteFile.look_up(f"{server.url}/{NAME}", said.append)
    server.statuses, server.retry_after = [429], "3600"
    RemoteFile.look_up(f"{server.url}/{NAME}", said.append)
    assert slept == [7, 7, 60]


def test_no_server_is_named_with_its_reason(server, said):
    server.http.server_close()
    with pytest.raises(StoreError, match=r"the server cannot be reached \(.*refused\); that was try 4"):
        RemoteFile.look_up(f"{server.url}/{NAME}", said.append)
    with pytest.raises(StoreError, match="starts with http:// or https://"):
        RemoteFile.look_up("file:///etc/hosts", said.append)


def test_a_silent_server_counts_as_broken(server, said, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    waiting = threading.Event()
    server.statuses = []
    server.files["slow"] = b"x"
    monkeypatch.setattr(server, "etag", lambda name: str(waiting.wait(0.5)))
    with pytest.raises(StoreError, match=r"the server (does not answer|cannot be reached) \(.*timed out\)"):
        RemoteFile.look_up(f"{server.url}/slow", said.append)
    waiting.set()


def test_progress_names_what_came_and_how_fast(fetch, said, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS_S", 0.0)
    fetch()
    assert re.fullmatch(r"nq dev: \d+\.\d of 100\.0 KiB, \d+ [KMG]iB/s", said[len(said) // 2])


def test_bytes_have_a_unit():
    assert [show_bytes(size) for size in (0, 1023, 1536, 34.76 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "34.8 GiB"]


def test_a_wrong_sha256_leaves_no_file_and_no_part(fetch, tmp_path):
    with pytest.raises(StoreError, match=f"its sha256 is {hashlib.sha256(CONTENT).hexdigest()}, not 00, so it was"):
        fetch(sha256="00")
    assert list((tmp_path / "data").iterdir()) == []
    assert fetch(sha256=hashlib.sha256(CONTENT).hexdigest()) == CONTENT
    with pytest.raises(StoreError, match="not 00; remove it and run the same command again"):
        require_sha256(tmp_path / "data" / NAME, "00")


def test_two_processes_do_not_write_the_same_part(fetch, server, tmp_path, said):
    part = RemoteFile.look_up(f"{server.url}/{NAME}", said.append).part_of(tmp_path / "data" / NAME)
    part.parent.mkdir()
    with open(part, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another process downloads it"):
            fetch()


def test_too_little_room_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    needed = {tmp_path / "new" / "a": 1 << 29, tmp_path / "b": 1 << 29}
    require_room(needed)
    with pytest.raises(StoreError, match=r"the download needs 1\.5 GiB but 1\.0 GiB are free; make room.*--out"):
        require_room({**needed, tmp_path / "c": 1 << 29})


def test_a_disk_that_fills_meanwhile_is_named(fetch, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=rf"{NAME}: cannot be written \(No space left on device\)"):
        fetch()


# The job


TRIVIA = {
    "Domain": "Wikipedia",
    "Data": [{"Question": f"Wer ist „{n}“?", "QuestionId": f"tc_{n}", "EntityPages": ["x" * 50]} for n in range(30)],
}
MEMBERS = ("qa/wikipedia-train.json", "qa/wikipedia-dev.json", "qa/wikipedia-test-without-answers.json")


def archive(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def trivia_archive() -> bytes:
    members = {"evidence/wikipedia/England.txt": b"text"}
    for place, name in enumerate(MEMBERS):
        share = {**TRIVIA, "Data": TRIVIA["Data"][10 * place : 10 * place + 10]}
        members[name] = json.dumps(share, indent=4).encode()
    return archive(members)


def ids(*numbers: int) -> bytes:
    records = [{"id": f"tc_{n}", "output": [{"answer": "a"}]} for n in numbers]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def kilt(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the job in an empty folder against a server with the preset's files, each holding its own name."""
    config = load_config("kilt")
    uris = [uri for task in config.tasks for uri in (*task.train, *task.dev)] + [*config.data.knowledge_source]
    names = [Path(uri).name for uri in uris]
    server.files = {name: name.encode() for name in names if not name.startswith("triviaqa")}
    server.files |= {
        "triviaqa-train_id-kilt.jsonl": ids(3, 1, 12),
        "triviaqa-dev_id-kilt.jsonl": ids(25),
        "triviaqa-rc.tar.gz": trivia_archive(),
    }
    monkeypatch.chdir(tmp_path)
    return lambda *more: job.run(["--config", "kilt", "--base-url", server.url + "/", *more])


def test_the_preset_finds_every_file_afterwards_and_a_second_run_asks_nothing(kilt, server, tmp_path):
    answer = kilt()
    folder = tmp_path / "data/kilt"
    config = cli.configuration(cli.parser("").parse_args(["--config", "kilt"]))
    for task in config.tasks:
        for uri in (*task.train, *task.dev):
            assert Path(uri).is_file()
            if task.name != "triviaqa":
                assert Path(uri).read_text() == Path(uri).name
    assert Path(config.data.knowledge_source[0]).read_text() == "kilt_knowledgesource.json"
    assert answer["uri"] == str(folder)
    assert (len(answer["downloaded"]), answer["present"]) == (17, [])

    server.requests.clear()
    again = kilt()
    assert (len(again["present"]), again["downloaded"]) == (17, [])
    assert server.requests == []


def test_triviaqa_gets_its_questions_as_they_stand_in_the_archive(kilt, tmp_path, capsys):
    kilt("--only", "triviaqa")
    lines = (tmp_path / "data/kilt/triviaqa-train-kilt.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": f"tc_{n}", "output": [{"answer": "a"}], "input": f"Wer ist „{n}“?"} for n in (3, 1, 12)
    ]
    (line,) = (tmp_path / "data/kilt/triviaqa-dev-kilt.jsonl").read_text().splitlines()
    assert json.loads(line)["input"] == "Wer ist „25“?"
    said = capsys.readouterr().out
    assert "triviaqa: 3 questions filled into triviaqa-train-kilt.jsonl" in said
    assert "triviaqa-rc.tar.gz and the files of ids are not needed any more" in said


def test_an_archive_that_is_there_is_used(kilt, server, tmp_path):
    (tmp_path / "data/kilt").mkdir(parents=True)
    (tmp_path / "data/kilt/triviaqa-rc.tar.gz").write_bytes(server.files.pop("triviaqa-rc.tar.gz"))
    kilt("--only", "triviaqa")
    assert (tmp_path / "data/kilt/triviaqa-dev-kilt.jsonl").exists()


def test_only_the_names_given_are_fetched(kilt, server):
    kilt("--only", "nq", "knowledge_source")
    fetched = {name for _, name, _ in server.requests}
    assert fetched == {"nq-train-kilt.jsonl", "nq-dev-kilt.jsonl", "kilt_knowledgesource.json"}
    with pytest.raises(ConfigError, match=r"--only nqq: .*known: nq, triviaqa, .*, knowledge_source"):
        kilt("--only", "nqq")


def test_out_gathers_the_files_and_says_what_the_configuration_looks_for(kilt, tmp_path, capsys):
    answer = kilt("--only", "nq", "--out", "elsewhere")
    assert answer["uri"] == str(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / NAME).exists()
    assert (
        f"kilt looks for {tmp_path}/data/kilt/nq-train-kilt.jsonl, not {tmp_path}/elsewhere" in capsys.readouterr().out
    )


def test_one_missing_file_ends_the_job_before_anything_is_fetched(kilt, server, tmp_path):
    del server.files["kilt_knowledgesource.json"]
    with pytest.raises(StoreError, match=r"kilt_knowledgesource\.json: the server answers 404"):
        kilt()
    assert server.gets() == []


def test_too_little_room_ends_the_job_before_anything_is_fetched(kilt, server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(StoreError, match="10 B are free"):
        kilt()
    assert server.gets() == []


def test_the_room_for_filled_files_counts(kilt, server, monkeypatch):
    sizes = [
        len(server.files[f"triviaqa-{name}"]) for name in ("train_id-kilt.jsonl", "dev_id-kilt.jsonl", "rc.tar.gz")
    ]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=sum(sizes)))
    with pytest.raises(StoreError, match="are free"):
        kilt("--only", "triviaqa")


def test_checksums_hold_for_what_comes_and_for_what_is_there(kilt, tmp_path):
    (tmp_path / "sums").write_text(f"{hashlib.sha256(NAME.encode()).hexdigest()}  data/{NAME}\n{'0' * 64} *other\n")
    kilt("--only", "nq", "--checksums", "sums")
    (tmp_path / "data/kilt" / NAME).write_text("altered")
    with pytest.raises(StoreError, match=f"{NAME}: its sha256 is .*; remove it"):
        kilt("--only", "nq", "--checksums", "sums")
    (tmp_path / "sums").write_text(f"{'0' * 64}  {NAME}\n")
    (tmp_path / "data/kilt" / NAME).unlink()
    with pytest.raises(StoreError, match="so it was thrown away"):
        kilt("--only", "nq", "--checksums", "sums")
    (tmp_path / "sums").write_text("nq 12\n")
    with pytest.raises(DataError, match="sums line 1: is no line of sha256sum"):
        kilt("--checksums", "sums")


@pytest.mark.parametrize(
    ("tree", "more", "message"),
    [
        ({"knowledge_source": ["pages/*.jsonl"]}, (), "is a pattern, and a server cannot be asked for it"),
        ({"knowledge_source": ["s3://bucket/pages.jsonl"]}, (), "lies on S3; download to a local folder with --out"),
        ({"knowledge_source": ["pages.jsonl"]}, ("--out", "s3://bucket/kilt"), "--out s3://bucket/kilt: files are"),
        ({}, (), "own: names no file to download"),
    ],
)
def test_what_cannot_be_downloaded_is_refused(tree, more, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(
        yaml.safe_dump({"name": "own", "artifacts": "a", "tasks": [{"name": "own"}], "data": tree})
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        job.run(["--config", "own.yaml", *more])


def test_items_come_whole_whatever_the_size_of_the_chunks(monkeypatch, tmp_path):
    path = tmp_path / "triviaqa-rc.tar.gz"
    path.write_bytes(trivia_archive())
    for size in (45, 100, 10_000):
        monkeypatch.setattr(triviaqa, "_CHUNK_BYTES", size)
        assert triviaqa.read_questions(path) == {f"tc_{n}": f"Wer ist „{n}“?" for n in range(30)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "cannot be read"),
        (trivia_archive()[:200], "remove it and run the same command again"),
        (trivia_archive()[:-200], "remove it and run the same command again"),
        (trivia_archive()[:100] + bytes(200), "cannot be read"),
        (archive({MEMBERS[0]: b'{"Data": [{"Question": "a"'}), "cannot be read"),
        (archive({MEMBERS[0]: b'{"Data": [{"Question": "a"}]}'}), "cannot be read"),
        (archive({MEMBERS[0]: b"[]"}), 'no list "Data"'),
        (archive({MEMBERS[0]: b'{"Data": []}'}), "holds no qa/wikipedia-dev.json, qa/wikipedia-test-without-answers"),
    ],
)
def test_a_damaged_archive_is_named(content, message, tmp_path):
    path = tmp_path / "triviaqa-rc.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"triviaqa-rc\.tar\.gz: .*{re.escape(message)}"):
        triviaqa.read_questions(path)


@pytest.mark.parametrize("line", [ids(99), b"no JSON\n", b"\xff\n", b"[]\n"])
def test_an_id_without_a_question_is_named_and_leaves_no_file(line, tmp_path):
    path = tmp_path / "triviaqa-dev-kilt.jsonl"
    path.with_name("triviaqa-dev_id-kilt.jsonl").write_bytes(ids(1) + line)
    with pytest.raises(DataError, match=r"triviaqa-dev_id-kilt\.jsonl line 2: no question belongs to it"):
        triviaqa.fill_in(path, {"tc_1": "a"})
    assert [each.name for each in tmp_path.iterdir()] == ["triviaqa-dev_id-kilt.jsonl"]


def test_a_file_without_its_file_of_ids_is_not_made(tmp_path):
    with pytest.raises(StoreError, match=r"cannot be made of triviaqa-dev_id-kilt\.jsonl .*No such file"):
        triviaqa.fill_in(tmp_path / "triviaqa-dev-kilt.jsonl", {})
