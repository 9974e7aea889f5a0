"""Methods: updates against a transcription in float64, TorchJD's PCGrad and small numbers by hand; state resumes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskspec.config import Specialization
from taskspec.errors import TrainingError
from taskspec.specialize.gradients import Piece
from taskspec.specialize.methods import (
    CGD,
    Mean,
    Method,
    PCGrad,
    Taco,
    TaskGradients,
    Update,
    make_method,
    projected_shares,
)


def random(tasks: int, elements: int, seed: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(elements, generator=generator, dtype=dtype)
    grads = torch.randn(tasks, elements, generator=generator, dtype=dtype)
    zeroed = torch.rand(tasks, elements, generator=generator) < 0.3  # tokens that a batch does not hold
    return theta, grads.masked_fill(zeroed, 0.0)


def pieces_of(elements: int, width: int = 1) -> list[Piece]:
    """A matrix of rows of that width, and a vector of what is left."""
    matrix = elements // width * width if width > 1 else 0
    pieces = [Piece("matrix", (matrix // width, width), 0)] if matrix else []
    return [*pieces, Piece("vector", (elements - matrix,), matrix)]


def make_taco(config: Specialization, tasks: int, theta, *, steps: int, width: int = 1) -> Taco:
    return Taco(config, tasks, theta, pieces_of(len(theta), width), steps)


def updated(method: Method, theta, grads, losses=None) -> Update:
    losses = torch.ones(len(grads)) if losses is None else losses
    return method.update(TaskGradients(theta, grads, losses), describe=True)


def transcribed(config: Specialization, theta, grads_per_step, width: int):
    """The formulas in numpy and float64, element by element; no code in common."""
    tasks, elements = grads_per_step[0].shape
    matrix = elements // width * width if width > 1 else 0
    rows = [range(p, p + width) for p in range(0, matrix, width)] + [[p] for p in range(matrix, elements)]
    average = np.zeros((tasks, elements))
    count = np.zeros(tasks)
    warmup = max(round(config.warmup * len(grads_per_step)), config.min_warmup_steps)
    updates = []
    for step, grads in enumerate(grads_per_step):
        update = np.zeros(elements)
        weight = np.full((tasks, elements), 1 / tasks)
        for t in range(tasks):
            importance = np.abs(theta * grads[t])
            for row in rows:
                importance[row] = sum(importance[p] for p in row) / len(row)
            values = np.sort(importance[importance > 0])
            median = values[(len(values) - 1) // 2]
            average[t] = config.decay * average[t] + (1 - config.decay) * importance / median
            count[t] += 1
        if step >= warmup:
            strength = config.strength * min(1, (step - warmup + 1) / max(1, warmup))
            for p in range(elements):
                hat = [average[t, p] / (1 - config.decay ** count[t]) for t in range(tasks)]
                powers = np.exp(strength * (np.array(hat) - max(hat)))
                weight[:, p] = powers / powers.sum()
        for p in range(elements):
            update[p] = sum(weight[t, p] * grads[t, p] for t in range(tasks))
        updates.append(update)
    return updates


@pytest.mark.parametrize("decay", [0.0, 0.9])
@settings(max_examples=20)
@given(
    tasks=st.integers(1, 5),
    elements=st.integers(5, 40),
    width=st.integers(1, 6),
    seed=st.integers(0, 1000),
    warmup=st.integers(0, 3),
)
def test_steps_equal_a_float64_transcription(decay, tasks, elements, width, seed, warmup):
    config = Specialization(strength=0.7, decay=decay, warmup=0.0, min_warmup_steps=warmup)
    theta, _ = random(1, elements, seed, torch.float64)
    steps = [random(tasks, elements, seed + 1 + i, torch.float64)[1] for i in range(8)]
    for grads in steps:
        grads[:, 0] = 1.0  # every task touches something
    taco = make_taco(config, tasks, theta, steps=8, width=width)
    mine = [updated(taco, theta, grads).grad_P.numpy() for grads in steps]
    theirs = transcribed(config, theta.numpy(), [grads.numpy() for grads in steps], width)
    np.testing.assert_allclose(np.array(mine), np.array(theirs), rtol=1e-9, atol=1e-12)


def test_taco_at_strength_0_equals_mean_bitwise_over_many_updates():
    config = Specialization(strength=0.0, warmup=0.0, min_warmup_steps=0)
    theta, _ = random(1, 50, 0)
    taco, mean = make_taco(config, 3, theta, steps=10), Mean()
    for step in range(10):
        grads = random(3, 50, step)[1]
        assert torch.equal(updated(taco, theta, grads).grad_P, updated(mean, theta, grads).grad_P)


def test_a_task_without_gradient_neither_counts_an_update_nor_spoils_the_others():
    config = Specialization(warmup=0.0, min_warmup_steps=0)
    theta, grads = random(2, 20, 1)
    grads[1] = 0
    taco = make_taco(config, 2, theta, steps=1)
    update = updated(taco, theta, grads)
    assert update.grad_P.isfinite().all()
    assert taco.updates_T.tolist() == [1, 0]


def test_state_of_other_tasks_is_refused_and_own_state_resumes():
    config = Specialization(decay=0.9, warmup=0.0, min_warmup_steps=0)
    theta, grads = random(2, 20, 1)
    first = make_taco(config, 2, theta, steps=5)
    updated(first, theta, grads)
    second = make_taco(config, 2, theta, steps=5)
    second.load({name: value.clone() for name, value in first.state().items()})
    assert torch.equal(updated(first, theta, grads).grad_P, updated(second, theta, grads).grad_P)
    with pytest.raises(TrainingError, match=r"average_TP is \(2, 20\), this run needs \(3, 20\)"):
        make_taco(config, 3, theta, steps=5).load(first.state())
    with pytest.raises(TrainingError, match=r"average_TP is none"):
        make_taco(config, 2, theta, steps=5).load({})


@settings(max_examples=30)
@given(tasks=st.integers(1, 6), elements=st.integers(1, 20), seed=st.integers(0, 1000))
def test_pcgrad_equals_torchjd_s_for_the_same_order(tasks, elements, seed):
    from torchjd.aggregation import PCGrad as Oracle

    _, grads = random(tasks, elements, seed, torch.float64)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    theirs = Oracle()(grads) / tasks
    torch.random.set_rng_state(state)
    shares = projected_shares(grads @ grads.T, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(shares.mean(0) @ grads, theirs, rtol=1e-6, atol=1e-9)


def test_pcgrad_of_two_opposed_tasks_by_hand():
    grads = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    # task 0 loses its component along (−1, 1): (1, 0) + (−1, 1)/2 = (1/2, 1/2); task 1 its along (1, 0): (0, 1)
    update = updated(PCGrad(seed=0), torch.ones(2), grads)
    torch.testing.assert_close(update.grad_P, torch.tensor([0.25, 0.75]))


def test_pcgrad_leaves_agreeing_tasks_alone():
    grads = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    torch.testing.assert_close(updated(PCGrad(seed=0), torch.ones(2), grads).grad_P, grads.mean(0))


def test_cgd_moves_weight_to_the_task_that_helps_the_others():
    grads = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, -1.0]])
    cgd = CGD(tasks=3, step_size=0.5)
    first = updated(cgd, torch.ones(2), grads, losses=torch.tensor([1.0, 1.0, 1.0]))
    unit = (grads / grads.norm(dim=1, keepdim=True)).numpy().astype(np.float64)
    powers = np.exp(0.5 * (unit @ unit.T).sum(1)) / 3
    np.testing.assert_allclose(cgd.weight_T.numpy(), powers / powers.sum(), rtol=1e-6)
    torch.testing.assert_close(first.grad_P, cgd.weight_T.float() @ grads)
    assert cgd.weight_T[2] < 1 / 3 < cgd.weight_T[1]
    before = cgd.weight_T.clone()
    updated(cgd, torch.ones(2), grads)
    assert cgd.weight_T[2] < before[2]


def test_cgd_weighs_a_pair_by_the_root_of_its_losses():
    grads = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # independent: only the tasks' own losses count
    cgd = CGD(tasks=2, step_size=1.0)
    updated(cgd, torch.ones(2), grads, losses=torch.tensor([4.0, 1.0]))
    powers = np.exp([4.0, 1.0])
    np.testing.assert_allclose(cgd.weight_T.numpy(), powers / powers.sum(), rtol=1e-6)


@pytest.mark.parametrize("method", ["pcgrad", "cgd"])
def test_a_competitor_s_state_resumes(method):
    theta, grads = random(3, 20, 1)

    def make() -> Method:
        return make_method(Specialization(method=method), 3, theta, pieces_of(20), steps=5, seed=0)

    first, second = make(), make()
    updated(first, theta, grads)
    second.load({name: value.clone() for name, value in first.state().items()})
    assert torch.equal(updated(first, theta, grads).grad_P, updated(second, theta, grads).grad_P)
    with pytest.raises(TrainingError, match="is none"):
        make().load({})
