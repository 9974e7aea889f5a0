"""One local Ray cluster for the whole test run, and worlds small enough for seconds."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The node cache of a test run is its own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TASKSPEC_CACHE"] = str(folder)
    yield folder
    del os.environ["TASKSPEC_CACHE"]


@pytest.fixture(scope="session")
def ray_cluster(_own_cache: Path) -> Iterator[None]:
    """Ray on this machine with four logical CPUs: two workers and two for Ray Data."""
    import ray

    from taskspec.cluster import connect
    from taskspec.config import Cluster

    connect(Cluster(local_cpus=4))
    yield
    ray.shutdown()
