"""A retriever on tasks that it was not trained on, with their prompts and without: what specialization costs there.

Path: retriever, prepared data → [here] → comparison. The index stays: a task changes queries only.
"""

from __future__ import annotations

from collections.abc import Sequence

from taskspec.config import Config
from taskspec.data.prepared import PreparedData
from taskspec.evaluate.run import evaluate
from taskspec.evaluate.trials import WAYS, Scores
from taskspec.model.encoder import contract_task
from taskspec.retrieve.retriever import Retriever


def zero_shot(retriever: Retriever, prepared: PreparedData, config: Config, tasks: Sequence[str]) -> dict[str, Scores]:
    """R-precision of each dev query of tasks of the configuration, trained or not.

    Returns: by the ways of asking: with each task's own prompt, and with an empty one, all else equal.
    Raises: ConfigError for a task that the configuration lacks; what `evaluate` raises.
    """
    own = [contract_task(config.task(name)) for name in tasks]
    bare = [task.model_copy(update={"prompt": ""}) for task in own]
    result: dict[str, Scores] = {}
    for name, asked in zip(WAYS, (own, bare), strict=True):
        rows = evaluate(retriever.with_tasks(asked), prepared, tasks, config.evaluate, system="zero-shot")
        result[name] = {row.task: row.per_query_rprec for row in rows}
    return result
