"""One trial of a sweep: train, index, evaluate, analyze; the index is removed when its checkpoint has been measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from jobs.pipeline import Inputs, train_run
from taskspec import artifacts, store
from taskspec.arms import Candidate
from taskspec.config import Config, canonical_sha256
from taskspec.evaluate.run import evaluate
from taskspec.evaluate.trials import Cost, Trial
from taskspec.specialize.analysis import Ablation
from taskspec.train.checkpoint import encoder_id, open_encoder, run_identity

if TYPE_CHECKING:
    from taskspec.data.prepared import PreparedData
    from taskspec.model.encoder import TextEncoder
    from taskspec.specialize.analysis import Ownership

PROBE_STEPS = 16
"""Steps whose batches measure who owns which parameter: those after the last one trained on."""
APPROXIMATION = {"recall", "recall_at", "recall_queries", "shards"}
"""What decides the answers of an index that is not exact."""
COURSE = ("entropy", "saturation", "gradient_ratio", "clip_rate")


def trial_key(candidate: Candidate, seed: int | None, inputs: Inputs) -> str:
    """sha256, 16 hex characters, of the configuration and inputs that decide a trial's numbers.

    Not of the code, which a trial names (`Trial.code`), nor of threads, which decide only the rounding; of workers only
    where dropout draws their masks one by one.
    """
    plan, config = candidate.plan, candidate.config
    runs = {} if seed is None else {task: run_identity(one) for task, one in candidate.runs(seed).items()}
    exact = config.index.kind == "flat"
    measured = [
        plan.lexical,
        config.train.workers if config.model.dropout else None,
        plan.held_out,
        plan.analyze and [field.name for field in fields(Ablation)],  # another shape: to be made again
        config.index.model_dump(mode="json", include={"precision", "kind"} | (set() if exact else APPROXIMATION)),
        config.evaluate.model_dump(mode="json"),
    ]
    return canonical_sha256([runs, measured, encoder_id(config), inputs.ids()])[:16]


def measure(candidate: Candidate, seed: int | None, inputs: Inputs, parts: str) -> Trial:
    """Trains and measures one candidate with one seed. Ray must be connected.

    Args: parts: URI of a folder of its own, which holds what is measured of several retrievers; to be removed when the
        trial is kept.
    """
    from taskspec.data.prepared import PreparedData

    prepared = PreparedData.open(inputs.prepared)
    if seed is None:
        return _lexical_trial(candidate, prepared)
    runs = candidate.runs(seed)
    if len(runs) == 1:
        (config,) = runs.values()
        return _dense_trial(candidate, seed, config, inputs, prepared)
    trials = []
    for task, config in runs.items():
        part = store.join(parts, f"{task}.json")
        if not store.exists(part):
            measured = _dense_trial(candidate, seed, config, inputs, prepared)
            store.write_bytes(part, json.dumps(measured.to_json()).encode())
        trials.append(Trial.from_json(json.loads(store.read_bytes(part))))
    return combined(trials)


def combined(trials: Sequence[Trial]) -> Trial:
    """The trial of several retrievers of one task each: all scores, and the sum of the costs."""
    first = trials[0]
    costs = [trial.cost for trial in trials if trial.cost]
    return replace(
        first,
        scores={task: scores for trial in trials for task, scores in trial.scores.items()},
        cost=Cost(**{field.name: sum(getattr(cost, field.name) for cost in costs) for field in fields(Cost)}),
        course={},
        checkpoint=None,
        code=artifacts.joined_code(*(trial.code for trial in trials)),
    )


def _lexical_trial(candidate: Candidate, prepared: PreparedData) -> Trial:
    from taskspec.negatives.bm25 import BM25

    settings = candidate.config.evaluate
    rows = evaluate(BM25.build(prepared), prepared, prepared.tasks("dev"), settings, system="bm25")
    return Trial(
        arm=candidate.arm,
        row=candidate.row,
        values=candidate.values,
        candidate=candidate.label,
        seed=None,
        scores={row.task: row.per_query_rprec for row in rows},
        code=artifacts.code_id(),
    )


def _dense_trial(candidate: Candidate, seed: int, config: Config, inputs: Inputs, prepared: PreparedData) -> Trial:
    from taskspec.evaluate.zero_shot import zero_shot
    from taskspec.index.build import build_index
    from taskspec.retrieve.retriever import Retriever
    from taskspec.train.worker import read_metrics, seconds_taken

    plan = candidate.plan
    run = train_run(config, inputs)
    index = store.join(config.artifacts, "sweep", "indexes", run.uri.rpartition("/")[2])
    built = build_index(config, run.best_uri, inputs.prepared, index)
    folder = artifacts.open_artifact(index, "index").folder
    retriever = Retriever.open(run.best_uri, index)
    tasks = [task.name for task in config.trained_tasks if task.name in prepared.tasks("dev")]
    rows = evaluate(retriever, prepared, tasks, config.evaluate, system=config.specialization.method)
    lines = read_metrics(run.uri)
    encoder = open_encoder(run.best_uri)
    ownership, ablations = _analyze(config, encoder, inputs, prepared, seed) if plan.analyze else (None, {})
    trial = Trial(
        arm=candidate.arm,
        row=candidate.row,
        values=candidate.values,
        candidate=candidate.label,
        seed=seed,
        scores={row.task: row.per_query_rprec for row in rows},
        zero_shot=zero_shot(retriever, prepared, config, plan.held_out) if plan.held_out else {},
        cost=Cost(
            retrievers=1,
            training_queries=sum(line["queries"] for line in lines),
            training_seconds=seconds_taken(lines),
            parameters=sum(parameter.numel() for parameter in encoder.encoder.parameters()),
            index_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            passages_embedded=built.passages,
        ),
        course={name: tuple((line["step"], line[name]) for line in lines if line[name] is not None) for name in COURSE},
        ownership=ownership,
        ablations=ablations,
        checkpoint=run.best_uri,
        code=artifacts.joined_code(artifacts.read_manifest(run.best_uri, "checkpoint").code, artifacts.code_id()),
    )
    if not config.sweep.keep_indexes:
        artifacts.remove(index)
    return trial


def _analyze(
    config: Config, encoder: TextEncoder, inputs: Inputs, prepared: PreparedData, seed: int
) -> tuple[Ownership, dict[str, Ablation]]:
    from taskspec.evaluate.ablation import ablate
    from taskspec.specialize.analysis import ownership, probe
    from taskspec.train.worker import TrainJob, make_maker

    maker = make_maker(TrainJob(config, inputs.prepared, inputs.negatives, ""), encoder.tokenizer.tokenizer, 0, 1)
    steps = [maker.step(config.train.steps + number) for number in range(PROBE_STEPS)]
    found = probe(encoder.encoder, config.contrastive.temperature, steps)
    return ownership(found), ablate(encoder, prepared, found, config.evaluate, seed=seed)
