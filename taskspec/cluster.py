"""Ray: connect a job to its cluster, and make sure before work starts that the cluster can hold it."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from taskspec.errors import PlacementError
from taskspec.sections import Cluster


def connect(config: Cluster) -> None:
    """Joins the cluster that this job was submitted to (RAY_ADDRESS), else starts Ray on this machine.

    A job's console holds the job's own lines: what workers and Ray print stays in Ray's log folder.
    """
    # Ray overrides CUDA_VISIBLE_DEVICES of processes that ask for no GPU; the future default is to leave it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Below this level, Ray's core prints an "E" line for every actor pool of Ray Data, about restarts.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    # It only says that authentication is on, which cluster/README.md explains.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if not address:
            # Else Ray goes by the machine's cores, and warns in between a job's lines about processes it was asked for.
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(config.local_cpus))
        try:
            ray.init(
                address=address or "local",  # with None, Ray joins whatever cluster this machine happens to run
                num_cpus=None if address else config.local_cpus,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
        except Exception as error:  # Ray raises a bare Exception where a node does not start in time
            where = f"join the cluster at {address}" if address else "start on this machine"
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise PlacementError(
                f"Ray could not {where}: {reason}; see that the machine is not overloaded, then run again"
            ) from error
    prepare_ray_data()
    import ray.train
    import ray.tune

    for name in ("ray.data", "ray.train"):  # after the imports, which set these levels themselves
        logging.getLogger(name).setLevel(logging.WARNING)
    # After Ctrl-C, Tune tells how to restore from its own folder; a sweep goes on from its trials' files.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


def worker_memory(workers: int) -> int:
    """Bytes that Ray has for each of so many workers on its largest node, if the nodes share them evenly."""
    import ray

    nodes = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
    return int(max(nodes) / math.ceil(workers / len(nodes)))


def prepare_ray_data() -> Any:
    """Sets this process's Ray Data: order preserved, no progress bars. Returns: its DataContext."""
    import ray.data

    # It only says that progress bars are off, which the next lines ask for.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    return context


def require(what: str, *, cpus: float, gpus: float = 0, wait_s: float) -> None:
    """Waits until the cluster as a whole has that much. Raises: PlacementError with both numbers after `wait_s`.

    Counts resources that exist, taken or free, so that a busy cluster queues a job and a small one refuses it. An
    autoscaler is asked for what is missing; a Ray that this process started has none, so it is not waited for.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    if os.environ.get("RAY_ADDRESS") is None:
        wait_s = 0
    deadline = time.monotonic() + wait_s
    asked = False
    while True:
        have = ray.cluster_resources()
        if have.get("CPU", 0) >= cpus and have.get("GPU", 0) >= gpus:
            if asked:
                request_resources(bundles=[])  # a request stands until it is replaced
            return
        if not asked:
            request_resources(bundles=[{"CPU": 1}] * math.ceil(cpus) + [{"GPU": 1}] * math.ceil(gpus))
            asked = True
            if wait_s:
                print(f"{_lacks(what, cpus, gpus, have)}; waits for nodes, {wait_s:g} s at most", flush=True)
        if time.monotonic() >= deadline:
            request_resources(bundles=[])
            waited = f" after {wait_s:g} s" if wait_s else ""
            way_out = "add nodes, ask for less, or raise cluster.local_cpus"
            raise PlacementError(f"{_lacks(what, cpus, gpus, have)}{waited}; {way_out}")
        time.sleep(1)


def _lacks(what: str, cpus: float, gpus: float, have: Mapping[str, float]) -> str:
    has = f"{have.get('CPU', 0):g} and {have.get('GPU', 0):g}"
    return f"{what} needs {cpus:g} CPUs and {gpus:g} GPUs, the cluster has {has}"
