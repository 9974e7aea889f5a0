"""What every job's command line shares: `--config`, `--set`, `--json`, and errors as one line and status 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from taskspec import artifacts, store
from taskspec.config import Config, load_config, parse_config
from taskspec.errors import ArtifactError, TaskspecError


def parser(description: str, *, config_required: bool = True) -> argparse.ArgumentParser:
    """A parser with the options of every job."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--config", required=config_required, help="YAML file, or a preset of jobs/configs, by its name"
    )
    result.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=value",
        help="override one key of the configuration; may be repeated",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return result


def configuration(arguments: argparse.Namespace) -> Config:
    """The configuration that `--config` and `--set` name, its local paths made absolute."""
    config = load_config(arguments.config, arguments.overrides)

    def located(uri: str) -> str:
        whole = store.is_s3(uri) or os.path.isabs(uri)
        return store.absolute(uri if whole else store.join(config.data.folder, uri))

    tree = config.model_dump(mode="json")
    tree["artifacts"] = store.absolute(config.artifacts)
    tree["data"] |= {"folder": ".", "knowledge_source": [located(uri) for uri in config.data.knowledge_source]}
    for task in tree["tasks"]:
        task |= {split: [located(uri) for uri in task[split]] for split in ("train", "dev")}
    if config.model.source and os.path.isdir(config.model.source):
        tree["model"]["source"] = store.absolute(config.model.source)
    return parse_config(tree, arguments.config)


MADE_BY = {"prepared-data": "jobs.prepare", "negatives": "jobs.mine", "checkpoint": "jobs.train"}


def require(option: str, uri: str, kind: str) -> None:
    """Ends a job before Ray starts where an artifact that it needs is not there.

    Raises: ArtifactError naming the option that says where it is, and the job that makes it.
    """
    try:
        artifacts.read_manifest(uri, kind)
    except ArtifactError as error:
        raise ArtifactError(f"{option} {error}; {MADE_BY[kind]} makes it") from error


def main(run: Callable[[Sequence[str] | None], dict[str, Any]], argv: Sequence[str] | None = None) -> None:
    """Runs a job and prints its answer: the artifact's URI, or with --json the whole answer.

    Args: run: returns the answer, with the artifact under "uri".
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        answer = run(words)
    except TaskspecError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(answer, ensure_ascii=False) if "--json" in words else answer["uri"], flush=True)
