"""Prepares KILT-format files: parses, cuts pages into passages, maps gold provenance; or only checks the files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs import cli
from taskspec import store
from taskspec.config import Config
from taskspec.errors import ConfigError
from taskspec.sections import Train

if TYPE_CHECKING:
    from taskspec.model.prompts import TextTokenizer


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser("Read task files and a knowledge source, and publish prepared data for all later jobs.")
    result.add_argument("--out", type=store.absolute, help="where to publish; default <artifacts>/prepared")
    result.add_argument("--check", action="store_true", help="read everything, write nothing, report what is odd")
    return result


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the prepared data, and counts; with --check `uri` is the configuration that was checked."""
    arguments = build_parser().parse_args(argv)
    config = cli.configuration(arguments)

    from taskspec import cluster
    from taskspec.data.check import check
    from taskspec.data.prepare import prepare
    from taskspec.data.reading import InputFiles

    InputFiles.find(config)  # what is missing shows before Ray starts
    if arguments.check:
        tokenizer = _tokenizer(config)
        cluster.connect(config.cluster)
        report = check(config, tokenizer)
        if not arguments.json:
            print(report.to_text(), flush=True)
        return {"uri": arguments.config, **report.to_json()}
    cluster.connect(config.cluster)
    uri = arguments.out or store.join(config.artifacts, "prepared")
    summary = prepare(config, uri)
    if not arguments.json:
        print(summary.to_text(), flush=True)
    return {"uri": uri, **summary.to_facts()}


def _tokenizer(config: Config) -> TextTokenizer | None:
    """The tokenizer of the model that the configuration names; one from scratch has none yet.

    Raises: ConfigError if it cannot be loaded.
    """
    if config.model.source is None:
        return None
    from transformers import AutoTokenizer

    from taskspec.model.encoder import text_tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.source)
    except (OSError, ValueError, TypeError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.source {config.model.source}: no tokenizer: {first_line}") from error
    every_task = config.model_copy(update={"train": Train()})
    return text_tokenizer(every_task, tokenizer)


if __name__ == "__main__":
    cli.main(run)
