"""Jobs submitted to a cluster with token authentication, as `cluster/README.md` tells people to."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from head_node import Head, head_node

from taskspec import artifacts
from taskspec.config import Config
from taskspec.data.prepared import PreparedData

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node() as head:
        yield head


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
    assert artifacts.read_manifest(uri, "prepared-data").id


def test_a_job_without_the_token_is_refused(head: Head) -> None:
    refused = head.submit("python", "-c", "print('I ran')", with_token=False)
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stdout
    assert "I ran" not in refused.stdout


def test_a_job_that_cannot_be_placed_ends_with_both_numbers(
    head: Head, config: Path, tiny_prepared: PreparedData
) -> None:
    began = time.monotonic()
    refused = head.submit(
        *("python", "-m", "jobs.train", "--config", str(config), "--prepared", tiny_prepared.artifact.uri),
        *("--set", "contrastive.negatives=0", "--set", "train.workers=64", "--set", "cluster.wait_s=5"),
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
