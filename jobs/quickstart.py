"""The whole product on a generated world: train, compare, report, serve, ask; minutes on two cores."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jobs import cli
from taskspec.config import Config, with_values
from taskspec.errors import ConfigError, TaskspecError

if TYPE_CHECKING:
    from taskspec.retrieve.client import Answer

PAGES = 1500
SYSTEMS: dict[str, dict[str, Any]] = {
    "untrained": {"train.steps": 0},
    "mean": {"specialization.method": "mean"},
    "taco": {"specialization.method": "taco"},
}
SERVED = "taco"
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 30


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser(
        "Generate a small world, train on it, compare, write a report, serve and ask.", config_required=False
    )
    result.set_defaults(config="quickstart")
    result.add_argument("--pages", type=int, default=PAGES, help=f"pages of the generated world; default {PAGES}")
    return result


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the report, the evaluation's, and those of the served checkpoint and index."""
    arguments = build_parser().parse_args(argv)
    config = cli.configuration(arguments)
    started = time.monotonic()

    def stage(text: str) -> None:
        print(f"\n[{time.monotonic() - started:3.0f} s] {text}", flush=True)

    world = Path(*config.data.knowledge_source[:1]).parent
    if not config.data.knowledge_source or not world.is_relative_to(config.artifacts):
        raise ConfigError(
            f"{arguments.config}: a generated world is written beside data.knowledge_source, and {world} is not below "
            f"artifacts, {config.artifacts}, so what lies there may be somebody's data; name a place below artifacts"
        )
    stage(f"a world of {arguments.pages:,} pages and {len(config.tasks)} tasks in {world}")

    from jobs.pipeline import open_systems, run_pipeline
    from taskspec.data.prepared import PreparedData
    from taskspec.data.world import write_world
    from taskspec.evaluate.report import sample_answers, write_report
    from taskspec.retrieve.client import Client
    from taskspec.train.worker import read_metrics

    write_world(world, pages=arguments.pages, seed=0)

    stage(f"prepare, mine negatives, then train, index and evaluate: {', '.join(SYSTEMS)}")
    systems = {system: with_values(config, changes) for system, changes in SYSTEMS.items()}
    result = run_pipeline(config, systems)
    served = result.trained[SERVED]

    stage("write the report")
    prepared = PreparedData.open(result.prepared)
    samples = sample_answers(open_systems(systems, result.trained, prepared), prepared)
    report = write_report(
        Path(config.artifacts) / "report",
        title=f"{config.name}: one retriever, {len(config.tasks)} tasks",
        facts={"World": f"{arguments.pages:,} generated pages", "Checkpoint": served.checkpoint, "Index": served.index},
        table=result.table,
        training={system: read_metrics(one.run) for system, one in result.trained.items() if system != "untrained"},
        answers=samples,
        config=config,
    )

    stage(f"serve {SERVED} and ask one question per task")
    settings = write_serve_config(config, served.checkpoint, served.index)
    try:
        with serving(settings) as url, Client(url, timeout_s=60) as client:
            for sample in samples:
                (answer,) = client.retrieve(sample.query, sample.task, top_k=1)
                print(answer_text(sample.task, sample.query, set(sample.gold_pages), answer))
    finally:  # the table stands, whatever becomes of the server
        stage("pages found for the dev queries (* above: a gold page came first)")
        print(f"\n{result.table.to_text()}\n\nreport:      {report}")
        print(f"serve again: {_command('serve')} run {settings}", flush=True)
    return {"uri": str(report), "evaluation": result.evaluation, **asdict(served)}


def write_serve_config(config: Config, checkpoint: str, index: str) -> Path:
    """A Serve config on loopback: port 8000, or a free one if that is taken."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 8000))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = Path(config.artifacts) / "serve.yaml"
    application = {"import_path": "serve.app:build", "args": {"checkpoint": checkpoint, "index": index}}
    content = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@contextmanager
def serving(settings: Path) -> Iterator[str]:
    """Runs `serve run` on a Serve config until the block ends. Gives: the server's URL.

    Raises: TaskspecError with the end of the server's log if it does not become ready.
    """
    import ray

    ray.shutdown()  # the server starts its own Ray, as it will when a person starts it again
    url = f"http://127.0.0.1:{yaml.safe_load(settings.read_text(encoding='utf-8'))['http_options']['port']}"
    log = settings.with_suffix(".log")
    with log.open("w") as output:
        server = subprocess.Popen(
            [_command("serve"), "run", str(settings)], stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_ready(url, server, log)
        yield url
    finally:
        with suppress(ProcessLookupError):
            server.terminate()  # SIGINT would be ignored where this was started in the background
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5):
            return
        time.sleep(0.5)
    how = "ended" if server.poll() is not None else f"did not become ready within {START_TIMEOUT_S} s"
    tail = " ".join(log.read_text(errors="replace").split("\n")[-4:])
    raise TaskspecError(f"{url}: the server {how}; {log} ends with: {tail}; mend that, then serve again as said above")


def answer_text(task: str, query: str, gold: set[str], answer: Answer) -> str:
    """One line: task, the end of the query, the first page; a star if it is a gold page."""
    hit = answer.hits[0]
    line = " / ".join(query.split("\n"))
    short = line if len(line) <= 70 else "…" + line[-69:]
    return f"  {task:10} {short:70} → {'*' if hit.wikipedia_id in gold else ' '} {hit.title}"


def _command(name: str) -> str:
    """A command of the environment that this runs in, relative to the working folder where that is shorter."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    cli.main(run)
