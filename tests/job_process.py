"""A job as a process of its own, for tests that kill it."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The job in a Ray of its own; what it prints goes to `log`."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(found: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for it while the job runs."""
    deadline = time.monotonic() + 240
    while not found():
        assert process.poll() is None, f"it ended before:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
