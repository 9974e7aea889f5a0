"""What one trial of a comparison measured: scores, costs, what specialization did; as plain JSON and back.

Path: sweep job → [here] → comparison → comparison report.  T tasks. A *trial* is one seed of one *candidate*; the
candidates of a *row* differ only in values that are chosen between (a learning rate); a row is what the tables show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from taskspec.specialize.analysis import Ablation, Ownership

Scores = Mapping[str, tuple[float, ...]]
"""Task → R-precision of each of its dev queries, 0 to 1, in the order of the task's files."""

WAYS = ("prompt", "no prompt")
"""How tasks that were held out of training are asked: with their own prompts, and with an empty one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a row's retrievers cost to make and to run, all of them together."""

    retrievers: int
    """Models, and indexes, and deployments: 1, or T where each task has its own."""
    training_queries: int
    """Queries that all updates together saw."""
    training_seconds: float
    parameters: int
    index_bytes: int
    passages_embedded: int
    """For one refresh of the corpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One seed of one candidate."""

    arm: str
    row: str
    """The arm, with the values of its grid where it has one: `taco strength=2`."""
    values: Mapping[str, Any]
    """Dotted key → value of the arm's grid; the report draws curves over them."""
    candidate: str
    """The values that are chosen between: `learning_rate=0.002`; empty where there is nothing to choose."""
    seed: int | None
    """None for what no seed changes (BM25)."""
    scores: Scores
    zero_shot: Mapping[str, Scores] = field(default_factory=dict)
    """Way of asking, as in `WAYS` → scores on the tasks held out of training; empty where none were."""
    cost: Cost | None = None
    """None for BM25."""
    course: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    """Figure of the training log (`entropy`, `saturation`, `gradient_ratio`, `clip_rate`) → (step, value)."""
    ownership: Ownership | None = None
    ablations: Mapping[str, Ablation] = field(default_factory=dict)
    """By the elements that could be zeroed, as `ablation.ablate` returns them; empty where nothing was analyzed."""
    checkpoint: str | None = None
    """URI; None for BM25 and where each task has its own."""
    code: str = ""
    """Which states of the library trained and measured it, as `Manifest.code`; "" where that is not known."""

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Trial:
        def scores(tree: Mapping[str, Any]) -> Scores:
            return {task: tuple(values) for task, values in tree.items()}

        return Trial(
            **{
                **value,
                "scores": scores(value["scores"]),
                "zero_shot": {name: scores(tree) for name, tree in value["zero_shot"].items()},
                "cost": Cost(**value["cost"]) if value["cost"] else None,
                "course": {name: tuple((s, v) for s, v in points) for name, points in value["course"].items()},
                "ownership": Ownership(**value["ownership"]) if value["ownership"] else None,
                "ablations": {
                    name: Ablation(**{**tree, **{key: scores(tree[key]) for key in ("own", "own_random")}})
                    for name, tree in value["ablations"].items()
                },
            }
        )
