"""A trial as JSON and back, and what an ablation counts as a hit."""

import json

import pytest

from taskspec.evaluate.trials import Cost, Trial
from taskspec.specialize.analysis import Ablation, Ownership

TRIAL = Trial(
    arm="taco",
    row="taco strength=2",
    values={"specialization.strength": 2.0},
    candidate="learning_rate=0.002",
    seed=3,
    scores={"nq": (1.0, 0.5), "fever": (0.0,)},
    zero_shot={"prompt": {"wow": (1.0,)}, "no prompt": {"wow": (0.0,)}},
    cost=Cost(
        retrievers=1,
        training_queries=4_800,
        training_seconds=31.5,
        parameters=1_000,
        index_bytes=2_000,
        passages_embedded=300,
    ),
    course={"entropy": ((0, 1.0), (10, 0.75))},
    ownership=Ownership(
        entropy=0.9,
        owned={"nq": 0.6, "fever": 0.4},
        by_layer={"encoder.0": {"nq": 1.0, "fever": 0.0}},
        by_kind={"norm": {"nq": 0.5, "fever": 0.5}},
    ),
    ablations={
        "all elements": Ablation(
            share=0.01,
            owned={"nq": {"nq": 0.2, "fever": 0.1}, "fever": {"nq": 0.0, "fever": 0.0}},
            random={"nq": {"nq": 0.1, "fever": 0.1}, "fever": {"nq": 0.0, "fever": 0.0}},
            own={"nq": (0.4, 0.0), "fever": (0.0, 0.0)},
            own_random={"nq": (0.1, 0.1), "fever": (0.0, 0.0)},
        )
    },
    checkpoint="s3://runs/3",
)
BM25 = Trial(
    arm="bm25",
    row="bm25",
    values={},
    candidate="",
    seed=None,
    scores={"nq": (0.0,)},
)


@pytest.mark.parametrize("trial", [TRIAL, BM25], ids=["everything", "nothing optional"])
def test_a_trial_survives_json(trial):
    assert Trial.from_json(json.loads(json.dumps(trial.to_json()))) == trial


@pytest.mark.parametrize(
    ("owned", "random", "both"),
    [
        pytest.param((0.3, 0.1), 0.2, ("a",), id="falls most, and more than by random elements"),
        pytest.param((0.3, 0.3), 0.2, (), id="another falls as much"),
        pytest.param((0.3, 0.4), 0.2, (), id="another falls more"),
        pytest.param((0.3, 0.1), 0.3, (), id="random elements do as much"),
        pytest.param((-0.1, -0.2), -0.3, ("a",), id="rises least"),
    ],
)
def test_both_are_tasks_that_fall_more_than_the_others_and_than_by_random_elements(owned, random, both):
    falls = dict(zip("ab", owned, strict=True))
    assert ablation({"a": falls}, {"a": {"a": random, "b": 9.0}}).both() == both


def test_tasks_keep_their_order():
    owned = {"b": {"a": 0.0, "b": 0.1}, "a": {"a": 0.1, "b": 0.0}}
    random = {"b": {"a": 0.0, "b": 0.0}, "a": {"a": 0.0, "b": 0.0}}
    assert ablation(owned, random).both() == ("b", "a")


def ablation(owned, random) -> Ablation:
    own, own_random = ({task: (falls[task],) for task, falls in grid.items()} for grid in (owned, random))
    return Ablation(share=0.01, owned=owned, random=random, own=own, own_random=own_random)
