"""A Ray head node as `cluster/README.md` tells people to start one, for tests that submit to it and deploy on it."""

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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

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


@contextmanager
def head_node(**variables: str) -> Iterator[Head]:
    """A head with four CPUs and its own ports, folder and token: no other Ray on this machine takes part.

    Args: variables: more of the environment of its processes.
    """
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
            **variables,
        }
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
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
                raise AssertionError(f"the head did not start:\n{log.read_text()}")
            yield Head(url, environment)
        finally:
            process.terminate()  # with --block, the head then ends every process that it started
            process.wait(60)


def free_ports(count: int) -> list[int]:
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
