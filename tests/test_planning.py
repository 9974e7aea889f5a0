"""Plans: small numbers by hand, what cannot fit is refused, and a run's summary stands beside its plan."""

import pytest

from taskspec.config import Config, with_values
from taskspec.data.plan import Plan
from taskspec.errors import ConfigError, PlacementError, TrainingError
from taskspec.model.encoder import Shapes, encoder_shapes
from taskspec.train.checkpoint import Run
from taskspec.train.planning import measured, plan_training, summary, write_plan

SHAPES = Shapes([(10, 4), (6,), (2, 3, 1)], frozen=7)
"""52 elements in 10 + 6 + 2 rows, and 7 that are not trained."""
DATA = Plan(0, {"a": 100, "b": 10}, {"a": 5, "b": 3})


def planned(config: Config, **values):
    changes = {"train.steps": 20} | {key.replace("__", "."): value for key, value in values.items()}
    return plan_training(with_values(config, changes), DATA, SHAPES)


def test_one_worker_holds_everything_and_sends_nothing(tiny_config):
    plan = planned(tiny_config, specialization__method="taco", train__distribution="sharded")
    assert (plan.parameters, plan.rows, plan.distribution, plan.sent) == (52, 18, "replicated", 0)
    assert plan.memory == {
        "parameters": 208,
        "frozen parameters": 28,
        "gradients": 208,
        "exchange": 0,
        "optimizer": 416,
        "method": 208 + 4 * 5 * 2 * 18,
        "measuring": 208,
    }
    assert plan.epochs == {"a": 1.0, "b": 6.0}
    assert plan.queries == 8


def test_shares_of_two_workers(tiny_config):
    sharded = planned(tiny_config, specialization__method="taco", train__workers=2, train__distribution="sharded")
    assert sharded.memory["optimizer"] == 208
    assert sharded.memory["gradients"] == 416
    # two gradients and the parameters, half of each; two all-reduces of the rows' sums
    assert sharded.sent == 104 * 3 + 2 * 72
    pcgrad = planned(tiny_config, specialization__method="pcgrad", train__workers=2, train__distribution="sharded")
    assert pcgrad.memory["method"] == 2 * 104
    mean = planned(tiny_config, specialization__method="mean", train__workers=2)
    assert (mean.memory["method"], mean.memory["measuring"], mean.sent) == (0, 0, 208)
    assert mean.memory["gradients"] == 208, "their sum is one gradient"
    tasks = planned(tiny_config, specialization__method="taco", train__workers=2, train__distribution="task_parallel")
    assert tasks.sent == 104 * 2 + 2 * 72


@pytest.mark.parametrize(
    ("distribution", "way_out"), [("replicated", r"set train\.distribution=sharded"), ("sharded", "take more workers")]
)
def test_what_cannot_fit_is_refused_with_both_numbers_and_a_way_out(tiny_config, distribution, way_out):
    plan = planned(tiny_config, specialization__method="taco", train__workers=2, train__distribution=distribution)
    plan.require_fits(None)
    plan.require_fits(plan.held)
    with pytest.raises(PlacementError, match=rf"needs 0\.0 MB a worker .*parameters 0\.0 MB.*; {way_out}"):
        plan.require_fits(plan.held - 1)
    tried = measured(plan, [line(5, 60.0), line(10, 10.0)])
    tried.require_fits(2_000_000_000)
    with pytest.raises(
        PlacementError, match=rf"took 2\.00 GB at its peak in 10 steps.* set train\.chunk_texts, or {way_out}"
    ):
        tried.require_fits(1_999_999_999)


def test_a_task_parallel_run_with_more_workers_than_tasks_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"8 tasks for 9 workers; take train\.workers=8 at most"):
        with_values(tiny_config, {"train.workers": 9, "train.distribution": "task_parallel"})


def test_shapes_are_those_of_the_encoder_that_is_built(tiny_config, tiny_prepared):
    from taskspec.model.encoder import build_encoder

    texts = tiny_prepared.passages.take(range(200), ["text"])["text"]
    for pooling in ("mean", "first"):
        config = with_values(tiny_config, {"model.pooling": pooling})
        encoder, tokenizer = build_encoder(config.model, texts, seed=0)
        same_vocabulary = with_values(config, {"model.scratch.vocabulary": len(tokenizer)})
        assert encoder_shapes(same_vocabulary.model, None) == ([tuple(one.shape) for one in encoder.parameters()], 0)


def line(step: int, seconds: float, **values):
    return {
        "step": step,
        "seconds": seconds,
        "checkpoint_seconds": 1.0,
        "queries": 64,
        "peak_bytes": 2_000_000_000,
        "bad_steps": 0,
        "dev_at_start": {"a": 0.1},
        "tasks": {"a": {"loss": 1.0}},
    } | values


def test_a_summary_stands_beside_the_plan_and_shows_what_each_task_lost_or_won(tiny_config, tmp_path):
    plan = measured(planned(tiny_config), [line(5, 60.0), line(10, 10.0)])
    assert (plan.step_seconds, plan.peak) == (2.0, 2_000_000_000)
    assert "2 s a step in 10 steps, 1 s a checkpoint: 47 s" in plan.to_text(4_000_000_000)
    assert "2.00 GB at its peak in 10 steps, of 4.00 GB" in plan.to_text(4_000_000_000)
    run = Run(str(tmp_path), "step-00000020", "step-00000010", 0.5, 0.5, finished=True)
    write_plan(run.uri, plan, tiny_config)
    lines = [line(10, 30.0), line(20, 33.0, bad_steps=2, tasks={"a": {"loss": 1.0, "dev_accuracy": 0.45}})]
    assert summary(run, lines, tiny_config).splitlines() == [
        "trained 20 steps in 65 s, 2.00 GB a worker at its peak, 2 step(s) skipped; "
        "best checkpoint step-00000010, dev accuracy 50%",
        "planned: 47 s, 2.00 GB at its peak",
        "dev accuracy from start to end: a 10 → 45%",
    ]
    other = with_values(tiny_config, {"train.steps": 30})
    said = summary(run, lines, other).splitlines()
    assert said[1] == "plan.json is of another configuration, so nothing is compared with it"
    assert not any(one.startswith("planned") for one in said)


def test_a_summary_of_several_workers_has_the_bytes_that_one_sends_in_a_step(tiny_config, tmp_path):
    config = with_values(tiny_config, {"train.workers": 2})
    run = Run(str(tmp_path), "step-00000020", "step-00000010", 0.5, 0.5, finished=True)
    plan = planned(config, specialization__method="mean", train__workers=2)
    write_plan(run.uri, measured(plan, [line(5, 60.0), line(10, 10.0)]), config)
    # Bytes are counted from where a start begins.
    lines = [line(4, 1.0, start="a", bytes_sent=9e9), *(line(n, 1.0, start="b", bytes_sent=n * 3e5) for n in (8, 16))]
    took, foreseen, *_ = summary(run, lines, config).splitlines()
    assert "2.00 GB a worker at its peak, which sent 0.3 MB a step; best" in took
    assert foreseen == "planned: 47 s, 2.00 GB at its peak, 0.0 MB a step"
    assert "sent" not in summary(run, lines[:1], config), "from one line nothing is known"


def test_a_run_whose_every_step_was_skipped_says_so_and_a_plan_of_such_steps_is_refused(tiny_config, tmp_path):
    run = Run(str(tmp_path), "step-00000005", "step-00000000", 0.1, 0.1, finished=True)
    assert summary(run, [line(5, 1.0, bad_steps=5)], tiny_config).startswith(
        "trained no step: no gradient was finite; lower train.learning_rate"
    )
    with pytest.raises(TrainingError, match="of the 10 steps that were tried too few had a finite gradient"):
        measured(planned(tiny_config), [line(10, 1.0)])
    with pytest.raises(TrainingError, match="of the 10 steps that were tried too few had a finite gradient"):
        measured(planned(tiny_config), [line(5, 1.0), line(10, 1.0, queries=0, bad_steps=5)])
