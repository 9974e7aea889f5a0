"""One local Ray cluster and one S3 server for the whole test run, and a world small enough for seconds."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from taskspec.config import Config, parse_config
from taskspec.data.prepared import PreparedData

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
def s3_bucket() -> Iterator[str]:
    """URI of an empty bucket of an S3 server on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    from taskspec import store

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = dict(os.environ)
    os.environ.update(settings)
    store._s3.cache_clear()
    boto3.client("s3").create_bucket(Bucket="taskspec")
    yield "s3://taskspec"
    server.stop()
    store._s3.cache_clear()
    for name in settings:
        os.environ.pop(name)
        if name in before:
            os.environ[name] = before[name]


@pytest.fixture(scope="session")
def ray_cluster(_own_cache: Path, s3_bucket: str) -> Iterator[None]:
    """Ray on this machine with four logical CPUs: two workers and two for Ray Data.

    Its processes have the environment of the moment they start in, so the S3 server stands before.
    """
    import ray

    from taskspec.cluster import connect
    from taskspec.sections import Cluster

    connect(Cluster(local_cpus=4))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def serve_port(ray_cluster: None) -> Iterator[int]:
    """The port of Ray Serve on this machine; each test module runs an application of its own there."""
    import ray.serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    ray.serve.shutdown()


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration of seconds: a generated world of 200 pages, all its tasks, a small encoder."""
    from taskspec.data.world import write_world

    folder = tmp_path_factory.mktemp("tiny")
    world = write_world(folder / "world", pages=200, seed=0)
    tasks = [{"name": name, "train": [str(train)], "dev": [str(dev)]} for name, (train, dev) in world.tasks.items()]
    return parse_config(
        {
            "name": "tiny",
            "artifacts": str(folder / "artifacts"),
            "tasks": tasks,
            "data": {"knowledge_source": [str(world.knowledge_source)]},
            "model": {
                "scratch": {"vocabulary": 600, "width": 32, "layers": 1, "heads": 2},
                "pooling": "mean",
                "similarity": "cosine",
                "max_passage_tokens": 48,
            },
            "contrastive": {"temperature": 0.05, "negatives": 2},
            "mixing": {"queries_per_step": 24},
            "train": {
                "steps": 6,
                "learning_rate": 1e-3,
                "checkpoint_every": 3,
                "log_every": 1,
                "compare_every": 1,
                "threads": 1,
            },
            "negatives": {"depth": 20, "per_query": 5},
            "evaluate": {"top_k": 20},
        },
        "tiny_config",
    )


@pytest.fixture(scope="session")
def tiny_prepared(tiny_config: Config, ray_cluster: None) -> PreparedData:
    """The prepared data of `tiny_config`, made as jobs make it."""
    from taskspec import store
    from taskspec.data.prepare import prepare

    uri = store.join(tiny_config.artifacts, "prepared")
    prepare(tiny_config, uri)
    return PreparedData.open(uri)
