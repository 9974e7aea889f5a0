"""What of this machine a process may take: its container's limits are below what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own control group (version 2)."""


def own_memory() -> int:
    """Bytes of this machine, or fewer if its container has a limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_limits("memory.max")])


def own_cpus() -> int:
    """CPUs that this process may use, at least 1: of the machine, or fewer by its affinity or its container."""
    allowed = len(os.sched_getaffinity(0))
    limits = _limits("cpu.max")
    if len(limits) < 2:  # without a quota there is only the period
        return allowed
    quota, period = limits
    return max(1, min(allowed, quota // period))


def _limits(name: str) -> list[int]:
    """The numbers in a file of the control group; what has no limit says `max` and is left out."""
    path = CONTROL_GROUP / name
    return [int(word) for word in path.read_text().split() if word != "max"] if path.exists() else []
