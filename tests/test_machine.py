"""What of a machine a process may take."""

import os
from pathlib import Path

import pytest

from taskspec import machine


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def test_without_limits_it_is_what_the_machine_has_and_affinity_allows(group: Path) -> None:
    whole = machine.own_memory()
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.own_cpus() == 8
    (group / "memory.max").write_text("max\n")
    (group / "cpu.max").write_text("max 100000\n")
    assert (machine.own_memory(), machine.own_cpus()) == (whole, 8)


@pytest.mark.parametrize(("quota", "cpus"), [(350_000, 3), (50_000, 1), (6_400_000, 8)])
def test_a_container_s_limits_count(group: Path, quota: int, cpus: int) -> None:
    (group / "memory.max").write_text("1000000\n")
    (group / "cpu.max").write_text(f"{quota} 100000\n")
    assert (machine.own_memory(), machine.own_cpus()) == (1_000_000, cpus)
