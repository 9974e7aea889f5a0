"""An index job that is killed with signal 9, and one that loses an embedding process: nothing is made twice or lost."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from job_process import running, until
from small_index import publish_model

from taskspec import artifacts
from taskspec.config import Config, with_values
from taskspec.data.prepared import PreparedData
from taskspec.index.manifest import KIND, IndexManifest
from taskspec.index.shard import load_shard

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(600)]
SHARDS = 4


@pytest.fixture(scope="module")
def command(tiny_config: Config, tiny_prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`jobs.index` over the tiny world, slowly: few passages at a time."""
    folder = tmp_path_factory.mktemp("killed")
    config = with_values(tiny_config, {"index.shards": SHARDS, "index.batch_size": 2, "index.kind": "ivf"})
    publish_model(str(folder / "model"), config, seed=0)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words = ["--config", str(folder / "config.yaml"), "--checkpoint", str(folder / "model")]
    return [sys.executable, "-m", "jobs.index", *words, "--prepared", tiny_prepared.artifact.uri]


def descendants(pid: int, name: str) -> list[int]:
    """Processes of that name that a process started, or that those did."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    parents = {int(child): int(parent) for child, parent, _ in rows}

    def below(child: int) -> bool:
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return [int(row[0]) for row in rows if name in row[2] and below(int(row[0]))]


def vectors(index: str) -> np.ndarray:
    artifact = artifacts.open_artifact(index, KIND, verify=True)
    manifest = IndexManifest.of(index, artifact.manifest)
    parts = []
    for shard in manifest.shards:
        opened = load_shard(artifact.folder / shard.file, manifest.kind, shard.row_start, shard.max_norm)
        opened.index.make_direct_map()
        parts.append(opened.index.reconstruct_n(0, opened.rows))
    return np.concatenate(parts)


def test_a_killed_job_goes_on_with_the_shards_that_are_missing(command: list[str], tmp_path: Path) -> None:
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    with running([*command, "--out", str(whole)], log) as process:
        assert process.wait(300) == 0, log.read_text()
    first = Path(f"{broken}-shards/shard-00000/{artifacts.MANIFEST}")
    with running([*command, "--out", str(broken)], log) as process:
        until(first.exists, process, log)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    standing = sorted(path.parent.name for path in Path(f"{broken}-shards").glob(f"shard-*/{artifacts.MANIFEST}"))
    assert 1 <= len(standing) < SHARDS
    before = first.stat().st_mtime_ns
    with running([*command, "--out", str(broken)], log) as process:
        until(lambda: f"{len(standing)} of {SHARDS} shards stand already" in log.read_text(), process, log)
        assert first.stat().st_mtime_ns == before
        assert process.wait(300) == 0, log.read_text()
    np.testing.assert_allclose(vectors(str(broken)), vectors(str(whole)), atol=1e-2)
    assert not Path(f"{broken}-shards").exists()


def test_a_killed_embedding_process_is_replaced(command: list[str], tmp_path: Path) -> None:
    out, log = tmp_path / "index", tmp_path / "log"
    with running([*command, "--out", str(out)], log) as process:
        until(lambda: re.search(r"index: \d+/\d+ passages", log.read_text()), process, log)
        (embedding, *_) = descendants(process.pid, "EmbedPassages")
        os.kill(embedding, signal.SIGKILL)
        assert process.wait(300) == 0, log.read_text()
    manifest = IndexManifest.of(str(out), artifacts.open_artifact(str(out), KIND, verify=True).manifest)
    assert sum(shard.rows for shard in manifest.shards) == manifest.passages == len(vectors(str(out)))
