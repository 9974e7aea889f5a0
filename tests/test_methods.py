"""Methods: updates against a transcription in float64, TorchJD's PCGrad and small numbers by hand; state resumes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskspec.errors import TrainingError
from taskspec.sections import Specialization
from taskspec.specialize.distribution import Share
from taskspec.specialize.gradients import Piece
from taskspec.specialize.methods import CGD, GradNorm, Mean, Method, PCGrad, Taco, Update, make_method, projected_shares
from taskspec.specialize.rows import Rows


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
    return pieces + [Piece("vector", (elements - matrix,), matrix)] * (matrix < elements)


def share_of(elements: int, width: int = 1) -> Share:
    whole = slice(0, elements)
    return Share(whole, Rows(pieces_of(elements, width), whole, torch.device("cpu")))


def make_taco(config: Specialization, tasks: int, theta, *, steps: int, width: int = 1) -> Taco:
    return Taco(config, tasks, theta, share_of(len(theta), width), steps)


def updated(method: Method, grads, losses=None) -> Update:
    """One step that is taken, its update copied."""
    if method.separate:
        for task, grad in enumerate(grads):
            method.add(task, grad.clone())
    else:
        total = grads[0].clone()
        for grad in grads[1:]:
            total += grad
        method.add(0, total)
    update = method.update(torch.ones(len(grads)) if losses is None else losses, describe=True)
    method.accept()
    return Update(update.grad_P.clone(), update.specialized)


def transcribed(config: Specialization, theta, grads_per_step, width: int):
    """The formulas in numpy and float64, element by element; no code in common."""
    tasks, elements = grads_per_step[0].shape
    matrix = elements // width * width if width > 1 else 0
    rows = [range(p, p + width) for p in range(0, matrix, width)] + [[p] for p in range(matrix, elements)]
    average = np.zeros((tasks, elements))
    count = np.zeros(tasks)
    warmup = max(round(config.warmup * len(grads_per_step)), min(config.min_warmup_steps, len(grads_per_step) // 4))
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
    mine = [updated(taco, grads).grad_P.numpy() for grads in steps]
    theirs = transcribed(config, theta.numpy(), [grads.numpy() for grads in steps], width)
    np.testing.assert_allclose(np.array(mine), np.array(theirs), rtol=1e-9, atol=1e-12)


def test_taco_at_strength_0_equals_mean_bitwise_over_many_updates():
    config = Specialization(strength=0.0, warmup=0.0, min_warmup_steps=0)
    theta, _ = random(1, 50, 0)
    taco, mean = make_taco(config, 3, theta, steps=10, width=4), Mean(3)
    for step in range(10):
        grads = random(3, 50, step)[1]
        assert torch.equal(updated(taco, grads).grad_P, updated(mean, grads).grad_P)


def test_a_task_without_gradient_neither_counts_an_update_nor_spoils_the_others():
    config = Specialization(warmup=0.0, min_warmup_steps=0)
    theta, grads = random(2, 20, 1)
    grads[1] = 0
    taco = make_taco(config, 2, theta, steps=1)
    update = updated(taco, grads)
    assert update.grad_P.isfinite().all()
    assert taco.updates_T.tolist() == [1, 0]


def test_the_average_of_a_task_without_gradient_stays_as_it_is():
    config = Specialization(decay=0.9, warmup=0.0, min_warmup_steps=0)
    theta, grads = random(2, 20, 1)
    taco = make_taco(config, 2, theta, steps=9)
    updated(taco, grads)
    before = taco.average_TR[1].clone()
    assert before.any()
    without = grads.clone()
    without[1] = 0
    for _ in range(3):
        updated(taco, without)
    assert torch.equal(taco.average_TR[1], before)
    assert taco.updates_T.tolist() == [4, 1]


def test_the_least_warmup_takes_no_more_than_a_quarter_of_a_short_run():
    theta, _ = random(1, 20, 1)
    config = Specialization(warmup=0.1, min_warmup_steps=100)
    assert [make_taco(config, 2, theta, steps=steps).warmup_steps for steps in (8, 100, 400, 1000, 2000)] == [
        2, 25, 100, 100, 200,
    ]  # fmt: skip


def test_state_of_other_tasks_is_refused_and_own_state_resumes():
    config = Specialization(decay=0.9, warmup=0.0, min_warmup_steps=0)
    theta, grads = random(2, 20, 1)
    first = make_taco(config, 2, theta, steps=5)
    updated(first, grads)
    second = make_taco(config, 2, theta, steps=5)
    second.load({name: value.clone() for name, value in first.state().items()})
    assert torch.equal(updated(first, grads).grad_P, updated(second, grads).grad_P)
    with pytest.raises(TrainingError, match=r"average_TR is \(2, 20\), this run needs \(3, 20\)"):
        make_taco(config, 3, theta, steps=5).load(first.state())
    with pytest.raises(TrainingError, match=r"average_TR is none"):
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
    update = updated(PCGrad(2, torch.ones(2), share_of(2), seed=0), grads)
    torch.testing.assert_close(update.grad_P, torch.tensor([0.25, 0.75]))


def test_pcgrad_leaves_agreeing_tasks_alone():
    grads = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    torch.testing.assert_close(updated(PCGrad(2, torch.ones(2), share_of(2), seed=0), grads).grad_P, grads.mean(0))


def test_cgd_moves_weight_to_the_task_that_helps_the_others():
    grads = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, -1.0]])
    cgd = CGD(3, torch.ones(2), share_of(2), step_size=0.5)
    first = updated(cgd, grads, losses=torch.tensor([1.0, 1.0, 1.0]))
    unit = (grads / grads.norm(dim=1, keepdim=True)).numpy().astype(np.float64)
    powers = np.exp(0.5 * (unit @ unit.T).sum(1)) / 3
    np.testing.assert_allclose(cgd.weight_T.numpy(), powers / powers.sum(), rtol=1e-6)
    torch.testing.assert_close(first.grad_P, cgd.weight_T.float() @ grads)
    assert cgd.weight_T[2] < 1 / 3 < cgd.weight_T[1]
    before = cgd.weight_T.clone()
    updated(cgd, grads)
    assert cgd.weight_T[2] < before[2]


def test_cgd_weighs_a_pair_by_the_root_of_its_losses():
    grads = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # independent: only the tasks' own losses count
    cgd = CGD(2, torch.ones(2), share_of(2), step_size=1.0)
    updated(cgd, grads, losses=torch.tensor([4.0, 1.0]))
    powers = np.exp([4.0, 1.0])
    np.testing.assert_allclose(cgd.weight_T.numpy(), powers / powers.sum(), rtol=1e-6)


@pytest.mark.parametrize("method", ["pcgrad", "cgd", "gradnorm"])
def test_a_competitor_s_state_resumes(method):
    theta, grads = random(3, 20, 1)

    def make() -> Method:
        return make_method(Specialization(method=method), 3, theta, share_of(20), steps=5, seed=0)

    first, second = make(), make()
    updated(first, grads)
    second.load({name: value.clone() for name, value in first.state().items()})
    assert torch.equal(updated(first, grads).grad_P, updated(second, grads).grad_P)
    with pytest.raises(TrainingError, match="is none"):
        make().load({})


def test_gradnorm_draws_norms_together_by_hand():
    """Equal losses want equal norms: with gradients of norms 3 and 1, weights move by 0.1 times 3/2 and 1/2."""
    grads = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    gradnorm = GradNorm(2, torch.ones(2), share_of(2), step_size=0.1, restoring=1.5)
    first = updated(gradnorm, grads)
    torch.testing.assert_close(first.grad_P, torch.tensor([1.5, 0.5]))
    moved = np.array([1 - 0.15, 1 + 0.05])
    np.testing.assert_allclose(gradnorm.weight_T.numpy(), 2 * moved / moved.sum(), rtol=1e-12)


def test_gradnorm_favours_the_task_that_has_learned_less():
    grads = torch.eye(2)
    gradnorm = GradNorm(2, torch.ones(2), share_of(2), step_size=0.1, restoring=1.5)
    updated(gradnorm, grads, losses=torch.tensor([4.0, 1.0]))
    assert gradnorm.weight_T.tolist() == [1.0, 1.0]  # both at the start: nothing to favour, whatever the losses
    updated(gradnorm, grads, losses=torch.tensor([1.0, 0.9]))
    assert gradnorm.weight_T[1] > 1 > gradnorm.weight_T[0]


@pytest.mark.parametrize("method", ["mean", "taco", "pcgrad", "cgd", "gradnorm"])
def test_a_step_that_is_not_taken_leaves_no_trace(method):
    theta, grads = random(3, 20, 1)
    config = Specialization(method=method, decay=0.9, warmup=0.0, min_warmup_steps=0)

    def make() -> Method:
        return make_method(config, 3, theta, share_of(20, width=4), steps=5, seed=0)

    clean, broken = make(), make()
    for one in (clean, broken):
        updated(one, grads)
    bad = grads.clone()
    bad[1, 3] = torch.nan
    for task, grad in enumerate(bad if broken.separate else bad.sum(0, keepdim=True)):
        broken.add(task, grad.clone())
    assert not broken.update(torch.ones(3), describe=True).grad_P.isfinite().all()
    again = random(3, 20, 2)[1]
    assert torch.equal(updated(clean, again).grad_P, updated(broken, again).grad_P)
    for name, value in clean.state().items():
        assert torch.equal(value, broken.state()[name]), name
