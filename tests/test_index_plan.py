"""Index plans: bytes as they are known, budgets that cannot be met, and the fewest shards that meet them."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import index
from taskspec.errors import PlacementError
from taskspec.index.kinds import KINDS
from taskspec.index.plan import Budget, IndexPlan, Speed, plan_index, require_memory

SPEEDS = {
    "flat": Speed(rows=10_000, search_s=2e-3, build_s=0.01),
    "fp16": Speed(rows=10_000, search_s=2e-3, build_s=0.01),
    "sq8": Speed(rows=10_000, search_s=1e-3, build_s=0.02),
    "ivf": Speed(rows=10_000, search_s=5e-4, build_s=1.0),
    "hnsw": Speed(rows=10_000, search_s=3e-4, build_s=10.0),
    "pq": Speed(rows=10_000, search_s=1e-4, build_s=0.5),
}
WIKIPEDIA = (36_000_000, 768)


def planned(passages: int, dimension: int, **changes: object) -> IndexPlan:
    budget = {"nodes": 1, "node_bytes": 256e9, "node_cores": 16, "latency_s": None, "recall": 0.95} | changes
    return plan_index(passages, dimension, Budget(**budget), SPEEDS)  # type: ignore[arg-type]


def test_36_million_passages_take_what_is_known_of_them() -> None:
    sizes = {one.kind: one.bytes / 1e9 for one in planned(*WIKIPEDIA).candidates}
    known = {"flat": 110.6, "fp16": 55.3, "sq8": 27.6, "pq": 27.6 + 1.7, "ivf": 55.3 + 0.4, "hnsw": 55.3 + 9.8}
    assert sizes == pytest.approx(known, rel=0.01)
    assert [one.kind for one in planned(*WIKIPEDIA).candidates] == list(KINDS)


def test_the_most_exact_kind_that_fits_is_chosen() -> None:
    chosen = {gb: planned(*WIKIPEDIA, node_bytes=gb * 1e9).chosen for gb in (256, 128, 80, 40)}
    assert {gb: one.kind for gb, one in chosen.items()} == {256: "flat", 128: "fp16", 80: "fp16", 40: "sq8"}
    # a shard of fp16 is built from its fp32 embeddings: 6 bytes a number in half of the node
    assert {gb: one.shards for gb, one in chosen.items()} == {256: 2, 128: 3, 80: 5, 40: 7}
    assert planned(*WIKIPEDIA, node_bytes=40e9, nodes=4).chosen.kind == "flat"


def test_a_time_for_a_query_is_met_by_shards_on_other_cores_or_by_another_kind() -> None:
    # 36 M rows of 10,000 rows in 2 ms: 7.2 s on one core, 0.45 s on 16
    flat = planned(*WIKIPEDIA, latency_s=1.0).chosen
    assert (flat.kind, flat.shards, flat.search_s) == ("flat", 8, pytest.approx(0.9))
    ivf = planned(*WIKIPEDIA, latency_s=0.05).chosen
    assert ivf.kind == "ivf"
    assert ivf.search_s <= 0.05
    refused = {one.kind: one.refused for one in planned(*WIKIPEDIA, latency_s=0.05).candidates}
    assert refused["flat"] is not None
    assert "ms a query" in refused["flat"]
    both = planned(*WIKIPEDIA, latency_s=0.05, node_bytes=64e9).candidates[0].refused
    assert both == "needs 110.6 GB a node, there are 51.2 GB (80% of 64.0 GB), takes 450 ms a query"


def test_what_no_kind_can_meet_is_refused_with_every_reason() -> None:
    with pytest.raises(PlacementError, match="no kind of index of 36,000,000 passages of 768 numbers fits") as caught:
        _ = planned(*WIKIPEDIA, node_bytes=16e9).chosen
    for kind in KINDS:
        assert f"{kind} needs " in str(caught.value)
    assert "pq needs 29.4 GB a node, there are 12.8 GB (80% of 16.0 GB); take more or larger" in str(caught.value)
    with pytest.raises(PlacementError, match=r"sq8 finds about 0\.98 of the exact best at most"):
        _ = planned(*WIKIPEDIA, node_bytes=48e9, recall=0.99).chosen


@given(
    passages=st.integers(1, 10**8),
    dimension=st.sampled_from([16, 384, 768]),
    nodes=st.integers(1, 8),
    node_bytes=st.floats(1e9, 1e12),
    latency_s=st.none() | st.floats(1e-3, 10),
)
def test_what_fits_meets_the_budget_and_more_memory_never_hurts(
    passages: int, dimension: int, nodes: int, node_bytes: float, latency_s: float | None
) -> None:
    def fitting(memory: float) -> set[str]:
        plan = planned(passages, dimension, nodes=nodes, node_bytes=memory, latency_s=latency_s)
        for one in plan.candidates:
            if one.refused is None:
                assert one.node_bytes <= 0.8 * memory
                assert latency_s is None or one.search_s <= latency_s
                assert one.shards % nodes == 0
        return {one.kind for one in plan.candidates if one.refused is None}

    assert fitting(node_bytes) <= fitting(2 * node_bytes)


def test_the_job_plans_what_is_not_there_yet_and_ends_with_the_keys_to_set(tmp_path) -> None:
    words = ["--config", "quickstart", "--plan", "--passages", "36e6", "--dimension", "96", "--node-gb", "10"]
    command = [sys.executable, "-m", "jobs.index", *words, "--json", "--out", str(tmp_path / "index")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    assert shown[0].startswith("36,000,000 passages of 96 numbers on 1 node(s) of 10.0 GB")
    assert [line.split()[0] for line in shown[1:-1]] == ["kind", *KINDS, "times"]
    assert shown[-1] == "the most exact that fits: --set index.kind=fp16 --set index.shards=5"
    assert json.loads(last)["chosen"] == "fp16"
    assert json.loads((tmp_path / "index-plan.json").read_bytes())["passages"] == 36_000_000


def test_a_plan_that_is_not_told_how_large_is_refused() -> None:
    command = [sys.executable, "-m", "jobs.index", "--config", "quickstart", "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        "ConfigError: --plan needs either --checkpoint URI or the --dimension of its embeddings\n",
    )


@pytest.mark.parametrize(("option", "value"), [("--node-gb", "-5"), ("--latency-ms", "0"), ("--node-gb", "inf")])
def test_a_budget_of_nothing_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        index.build_parser().parse_args(["--config", "quickstart", "--plan", option, value])
    assert f"argument {option}: must be a number above 0 but is {value}" in capsys.readouterr().err


def test_a_shard_that_does_not_fit_while_it_is_built_is_refused_before_work_starts() -> None:
    require_memory("flat", 1_000_000, 768, node_bytes=13_000_000_000)
    with pytest.raises(PlacementError, match=r"a shard of 1,000,000 passages takes .* GB while it is built"):
        require_memory("flat", 1_000_000, 768, node_bytes=12_000_000_000)
