"""Evaluates retrievers, BM25 beside them, on the dev queries of every task; or scores an existing KILT prediction file.

python -m jobs.evaluate --config kilt --checkpoint URI --index URI
python -m jobs.evaluate --gold nq-dev-kilt.jsonl --guess predictions/bm25/nq.jsonl --json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs import cli
from taskspec import artifacts, store
from taskspec.config import Config
from taskspec.errors import ConfigError
from taskspec.sections import Evaluate

if TYPE_CHECKING:
    from taskspec.evaluate.run import FileScores

BM25 = "bm25"


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser(
        "Evaluate retrievers and BM25 on the dev queries of every task (--config), or score a KILT prediction file "
        "(--gold and --guess).",
        config_required=False,
    )
    searchers = result.add_argument_group("with --config")

    def add_uri(name: str, text: str) -> None:
        searchers.add_argument(name, type=store.absolute, metavar="URI", help=text)

    add_uri("--checkpoint", "a retriever's checkpoint")
    searchers.add_argument(
        "--index", type=store.absolute, metavar="URI", help="the index built from it; default <artifacts>/index"
    )
    searchers.add_argument(
        "--systems",
        nargs="+",
        default=[],
        metavar="NAME=CHECKPOINT,INDEX",
        help="several retrievers, a column each; NAME:TASK=… is a retriever of that task alone, and NAME the column "
        "of all of them",
    )
    searchers.add_argument("--no-bm25", action="store_true", help="leave BM25 out")
    searchers.add_argument(
        "--prepared", type=store.absolute, metavar="URI", help="prepared data; default <artifacts>/prepared"
    )
    searchers.add_argument(
        "--out", type=store.absolute, metavar="URI", help="where the evaluation goes; default <artifacts>/evaluation"
    )
    files = result.add_argument_group("without --config")
    files.add_argument("--gold", metavar="FILE", help="KILT task file with the answers, .jsonl or .jsonl.gz")
    files.add_argument("--guess", metavar="FILE", help="KILT prediction file, pages best first")
    files.add_argument(
        "--at",
        nargs="+",
        type=int,
        default=None,
        metavar="K",
        help="the k of precision@k, recall@k and success_rate@k; default 1 5 20",
    )
    return result


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the evaluation, `average` and `scores` (system → task → metric); with --gold the metrics."""
    arguments = build_parser().parse_args(argv)
    if (arguments.gold is None) != (arguments.guess is None):
        raise ConfigError("--gold and --guess go together: the task file with the answers and the predictions for it")
    if (arguments.gold is None) == (arguments.config is None):
        raise ConfigError("give either --config, or --gold and --guess; --help tells what each does")
    return _score_files(arguments) if arguments.gold else _evaluate(arguments)


def _score_files(arguments: argparse.Namespace) -> dict[str, Any]:
    from taskspec.evaluate.run import score_files

    at = arguments.at or Evaluate().at
    if min(at) < 1:
        raise ConfigError(f"--at needs numbers ≥ 1 but got {' '.join(map(str, at))}")
    scores = score_files(arguments.gold, arguments.guess, at)
    if arguments.json:
        return dict(scores.metrics)
    print(_file_table(scores))
    return {"uri": arguments.guess}


def _file_table(scores: FileScores) -> str:
    """R-precision, then a row per kind of metric and a column per k."""
    cells: dict[str, dict[str, float]] = {}
    for name, score in scores.metrics.items():
        kind, _, k = name.partition("@")
        cells.setdefault(kind, {})[k] = score
    (rprec,) = cells.pop("Rprec").values()
    ignored = f", {scores.ignored:,} guesses with other ids ignored" if scores.ignored else ""
    columns = next(iter(cells.values()))
    lines = [f"{scores.queries:,} queries{ignored}", f"{'Rprec':<14}{rprec:.4f}", ""]
    lines.append(" " * 14 + "".join(f"{'@' + k:<9}" for k in columns).rstrip())
    lines += [f"{kind:<14}" + "   ".join(f"{score:.4f}" for score in row.values()) for kind, row in cells.items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Source:
    """Where one retriever comes from, and the column that it fills."""

    system: str
    task: str | None
    """The only task that it answers; None answers all that it was trained on."""
    checkpoint: str
    index: str


def parse_source(word: str) -> Source:
    """`NAME=CHECKPOINT,INDEX` or `NAME:TASK=CHECKPOINT,INDEX`. Raises: ConfigError for another form."""
    column, _, uris = word.partition("=")
    system, colon, task = column.partition(":")
    checkpoint, _, index = uris.partition(",")
    if not system or not checkpoint or not index or (colon and not task):
        raise ConfigError(f"--systems {word}: must look like NAME=CHECKPOINT,INDEX or NAME:TASK=CHECKPOINT,INDEX")
    return Source(system, task or None, checkpoint, index)


def sources(arguments: argparse.Namespace, config: Config) -> list[Source]:
    """Every retriever that the command line names; the column of --checkpoint has the name of the configuration.

    Raises: ConfigError if two of them fill the same cells, or there is nothing to evaluate at all.
    """
    result = [parse_source(word) for word in arguments.systems]
    if arguments.index and not arguments.checkpoint:
        raise ConfigError(f"--index {arguments.index}: give --checkpoint too, the encoder that it was built from")
    if arguments.checkpoint:
        index = arguments.index or store.join(config.artifacts, "index")
        result.insert(0, Source(config.name, None, arguments.checkpoint, index))
    if not result and arguments.no_bm25:
        raise ConfigError("nothing to evaluate: give --checkpoint, or --systems, or leave out --no-bm25")
    for number, source in enumerate(result):
        others = [other for other in result[:number] if other.system == source.system]
        if source.system == BM25:
            raise ConfigError(f"system {BM25!r} is the lexical baseline; give this one another name")
        if any(None in (source.task, other.task) or source.task == other.task for other in others):
            raise ConfigError(
                f"system {source.system!r} is there twice for the same task; give one of them another name"
            )
    return result


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.at:
        raise ConfigError("--at goes with --gold and --guess; with --config use --set evaluate.at=[1,5,20]")
    config = cli.configuration(arguments)
    retrievers = sources(arguments, config)

    from taskspec.data.prepared import PreparedData
    from taskspec.evaluate.run import publish_evaluation
    from taskspec.negatives.bm25 import BM25 as Lexical
    from taskspec.retrieve.retriever import Retriever

    prepared_uri = arguments.prepared or store.join(config.artifacts, "prepared")
    cli.require("--prepared", prepared_uri, "prepared-data")
    prepared = PreparedData.open(prepared_uri)
    systems: dict[str, Any] = {} if arguments.no_bm25 else {BM25: Lexical.build(prepared)}
    inputs: dict[str, str] = {}
    for source in retrievers:
        retriever = Retriever.open(source.checkpoint, source.index)
        column = source.system if source.task is None else f"{source.system}:{source.task}"
        answers = [task.name for task in retriever.contract.tasks] if source.task is None else [source.task]
        if not set(answers) & set(prepared.tasks("dev")):
            raise ConfigError(
                f"{column} answers {', '.join(answers)}, of which {prepared.artifact.uri} has no dev queries, but of "
                f"{', '.join(prepared.tasks('dev')) or 'no task'}; give another --prepared"
            )
        systems.setdefault(source.system, {}).update(dict.fromkeys(answers, retriever))
        inputs[f"checkpoint of {column}"] = artifacts.read_manifest(source.checkpoint, "checkpoint").id
        inputs[f"index of {column}"] = artifacts.read_manifest(source.index, "index").id
    uri = arguments.out or store.join(config.artifacts, "evaluation")
    table = publish_evaluation(uri, systems, prepared, config, inputs=inputs)
    if not arguments.json:
        print(f"\n{table.to_text()}\n", flush=True)
    answer: dict[str, Any] = {"uri": uri, "average": table.to_json()["average"], "scores": {}}
    for row in table.rows:
        answer["scores"].setdefault(row.system, {})[row.task] = row.metrics
    return answer


if __name__ == "__main__":
    cli.main(run)
