"""Jobs submitted to a cluster with token authentication, as `cluster/README.md` tells people to."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from taskspec import store
from taskspec.config import Config

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
COMMANDS = Path(sys.executable).parent
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "ray-client-server-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
)


class Head(NamedTuple):
    """A running head node."""

    url: str
    """Of its dashboard, which takes jobs."""
    environment: dict[str, str]
    """Of a person who has the token."""

    def submit(self, *command: str, with_token: bool = True) -> subprocess.CompletedProcess[str]:
        """Submits a command with the repository as its working directory and waits; stdout holds all its output."""
        environment = {
            name: value for name, value in self.environment.items() if with_token or not name.startswith("RAY_AUTH")
        }
        return subprocess.run(
            [COMMANDS / "ray", "job", "submit", "--address", self.url, "--working-dir", ".", "--", *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with four CPUs and its own ports, folder and token: no other Ray on this machine takes part."""
    # Ray keeps sockets below its folder, and a socket's path has at most 107 characters: tmp_path would be too long.
    with tempfile.TemporaryDirectory(prefix="ray") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "token").write_text(secrets.token_hex(32))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "HOME": str(folder),  # where this machine's user may keep another token
            "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing here is worth 30 s of waiting
        }
        ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        log = folder / "head.log"
        process = subprocess.Popen(
            [
                *(COMMANDS / "ray", "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder / 'ray'}"),
                *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"),
                *(f"--{name}={port}" for name, port in ports.items()),
            ],
            env=environment,
            stdout=stack.enter_context(log.open("w")),
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{ports['dashboard-port']}"
            if not _answers(url, process, wait_s=60):
                pytest.fail(f"the head did not start:\n{log.read_text()}")
            yield Head(url, environment)
        finally:
            process.terminate()  # with --block, the head then ends every process that it started
            process.wait(60)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def _answers(url: str, process: subprocess.Popen[bytes], wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/version").close()
        except urllib.error.HTTPError:
            return True  # 401: it is up and wants the token
        except OSError:
            time.sleep(0.2)
        else:
            return True
    return False


@pytest.fixture(scope="module")
def config(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small configuration, whose artifacts lie beside it."""
    folder = tmp_path_factory.mktemp("submitted")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config.model_dump(mode="json") | {"artifacts": str(folder / "artifacts")}))
    return path


def test_a_submitted_job_publishes_its_artifact(head: Head, config: Path) -> None:
    done = head.submit("python", "-m", "jobs.prepare", "--config", str(config))
    assert done.returncode == 0, done.stdout
    uri = str(config.parent / "artifacts" / "prepared")
    assert uri in done.stdout
    assert store.read_manifest(uri, "prepared-data").id


def test_a_job_without_the_token_is_refused(head: Head) -> None:
    refused = head.submit("python", "-c", "print('I ran')", with_token=False)
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stdout
    assert "I ran" not in refused.stdout


def test_a_job_that_cannot_be_placed_ends_with_both_numbers(head: Head, config: Path) -> None:
    began = time.monotonic()
    refused = head.submit(
        *("python", "-m", "jobs.train", "--config", str(config), "--set", "train.workers=64"),
        *("--set", "cluster.wait_s=5"),
    )
    assert time.monotonic() - began < 60
    assert refused.returncode != 0
    assert "PlacementError: training with 64 worker(s)" in refused.stdout
    assert "needs 81 CPUs" in refused.stdout
    assert "the cluster has 4" in refused.stdout


def test_the_working_directory_is_the_code_and_little_else(head: Head) -> None:
    done = head.submit("find", ".", "-type", "f", "-printf", "%s %p\n")
    assert done.returncode == 0, done.stdout
    files = dict(reversed(line.split(" ", 1)) for line in done.stdout.splitlines() if " ./" in line)
    assert "./taskspec/data/plan.py" in files
    assert "./jobs/configs/quickstart.yaml" in files
    assert not [name for name in files if name.startswith(("./.git/", "./.venv/", "./tests/", "./data/"))]
    assert sum(map(int, files.values())) < 2_000_000
