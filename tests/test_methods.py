"""Methods: updates against a transcription in float64, TorchJD's PCGrad and small numbers by hand; state resumes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskspec.config import Specialization
from taskspec.errors import TrainingError
from taskspec.specialize import sensitivity as s
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
    median_groups,
    piecewise_permutation,
    projected_shares,
)

NO_WARMUP = {"warmup": 0.0, "min_warmup_steps": 0}


def random(tasks: int, elements: int, seed: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(elements, generator=generator, dtype=dtype)
    grads = torch.randn(tasks, elements, generator=generator, dtype=dtype)
    zeroed = torch.rand(tasks, elements, generator=generator) < 0.3  # tokens that a batch does not hold
    return theta, grads.masked_fill(zeroed, 0.0)


def make_taco(config: Specialization, tasks: int, theta, *, steps: int) -> Taco:
    return Taco(config, tasks, theta, [Piece("encoder.weight", (len(theta),), 0)], steps, seed=0)


def updated(method: Method, theta, grads, losses=None, second_moment=None) -> Update:
    losses = torch.ones(len(grads)) if losses is None else losses
    return method.update(TaskGradients(theta, grads, losses, second_moment), describe=True)


def transcribed(config: Specialization, theta, grads_per_step):
    """DESIGN.md's formulas in numpy and float64, element by element; no code in common."""
    tasks, elements = grads_per_step[0].shape
    average = np.zeros((tasks, elements))
    count = np.zeros(tasks)
    warmup = max(round(config.warmup * len(grads_per_step)), config.min_warmup_steps)
    updates = []
    for step, grads in enumerate(grads_per_step):
        update = np.zeros(elements)
        weight = np.full((tasks, elements), 1 / tasks)
        reference = config.compat == "reference"
        for t in range(tasks):
            importance = np.abs(theta * grads[t])
            values = np.sort(importance if reference else importance[importance > 0])
            median = values[(len(values) - 1) // 2] + (1e-12 if reference else 0)
            average[t] = config.decay * average[t] + (1 - config.decay) * importance / median
            count[t] += 1
        if step >= warmup:
            strength = config.strength
            if not reference:
                strength *= min(1, (step - warmup + 1) / max(1, warmup))
            for p in range(elements):
                hat = [average[t, p] / (1 if reference else 1 - config.decay ** count[t]) for t in range(tasks)]
                powers = np.exp(strength * (np.array(hat) - max(hat)))
                weight[:, p] = powers / powers.sum()
        for p in range(elements):
            update[p] = sum(weight[t, p] * grads[t, p] for t in range(tasks))
        if reference and step >= warmup:
            update /= tasks
        updates.append(update)
    return updates


@pytest.mark.parametrize("compat", ["none", "reference"])
@settings(max_examples=20)
@given(tasks=st.integers(1, 5), elements=st.integers(5, 40), seed=st.integers(0, 1000), warmup=st.integers(0, 3))
def test_steps_equal_a_float64_transcription(compat, tasks, elements, seed, warmup):
    config = Specialization(strength=0.7, decay=0.9, warmup=0.0, min_warmup_steps=warmup, compat=compat)
    theta, _ = random(1, elements, seed, torch.float64)
    steps = [random(tasks, elements, seed + 1 + i, torch.float64)[1] for i in range(8)]
    # every task touches something, and (reference) more than half of the elements
    steps = [
        grads.where(grads != 0, torch.full_like(grads, 0.01)) if compat == "reference" else grads for grads in steps
    ]
    for grads in steps:
        grads[:, 0] = 1.0
    taco = make_taco(config, tasks, theta, steps=8)
    mine = [updated(taco, theta, grads).grad_P.numpy() for grads in steps]
    theirs = transcribed(config, theta.numpy(), [grads.numpy() for grads in steps])
    np.testing.assert_allclose(np.array(mine), np.array(theirs), rtol=1e-9, atol=1e-12)


def test_the_reference_update_shrinks_t_fold_when_warmup_ends():
    config = Specialization(strength=0.0, warmup=0.0, min_warmup_steps=1, compat="reference")
    theta, grads = random(4, 30, 0)
    taco = make_taco(config, 4, theta, steps=2)
    before, after = (updated(taco, theta, grads).grad_P for _ in range(2))
    torch.testing.assert_close(after, before / 4)


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


@pytest.mark.parametrize(
    "changes",
    [
        {"measure": "adam"},
        {"measure": "gradient"},
        {"average": "signed"},
        {"median": "tensor"},
        {"median": "kind"},
        {"compress": "log1p"},
        {"compress": "cap"},
        {"granularity": "row"},
        {"granularity": "row", "median": "shared"},
        {"granularity": "row", "median": "shared", "average": "signed"},
        {"granularity": "tensor"},
        {"conflict": "drop"},
        {"permute": True},
    ],
    ids=str,
)
def test_every_option_is_mean_at_strength_0_and_something_else_above(changes):
    pieces = [
        Piece("shared.weight", (4, 5), 0),
        Piece("encoder.block.0.layer.0.SelfAttention.q.weight", (3, 4), 20),
        Piece("encoder.block.0.layer.0.SelfAttention.k.weight", (2, 4), 32),
    ]
    theta, grads = random(3, 40, 0)
    grads *= torch.tensor([1.0, 0.3, 30.0]).repeat_interleave(torch.tensor([20, 12, 8]))  # so that medians differ
    second_moment = torch.linspace(0.1, 4, 40)

    def last_update(strength: float, **options) -> torch.Tensor:
        config = Specialization(strength=strength, decay=0.9, **NO_WARMUP, **options)
        method = make_method(config, 3, theta, pieces, steps=4, seed=0)
        before = updated(method, theta, -grads.roll(1, 0), second_moment=second_moment)
        assert before.grad_P.isfinite().all()
        return updated(method, theta, grads, second_moment=second_moment).grad_P

    assert torch.equal(last_update(0.0, **changes), s.mean_gradient(grads))
    assert not torch.equal(last_update(2.0, **changes), last_update(2.0))


def test_signed_averages_forget_what_alternates():
    theta = torch.ones(6)
    config = Specialization(strength=50.0, decay=0.99, average="signed", **NO_WARMUP)
    taco = make_taco(config, 2, theta, steps=100)
    steady = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
    for step in range(100):  # task 1 is larger on the first two elements, but alternates there
        sign = (-1.0) ** step
        other = torch.tensor([3.0 * sign, 3.0 * sign, 0.5, 1.0, 1.0, 1.0])
        update = updated(taco, theta, torch.stack([steady, other]))
    torch.testing.assert_close(update.grad_P, torch.ones(6), rtol=0.01, atol=0.01)


def test_adam_s_view_divides_by_its_root_mean_square():
    theta, grads = random(2, 30, 3)
    second_moment = torch.rand(30) + 0.1
    config = Specialization(strength=1.0, measure="adam", **NO_WARMUP)
    mine = updated(make_taco(config, 2, theta, steps=1), theta, grads, second_moment=second_moment).grad_P
    scaled = theta / (second_moment.sqrt() + 1e-8)
    plain = Specialization(strength=1.0, **NO_WARMUP)
    torch.testing.assert_close(mine, updated(make_taco(plain, 2, scaled, steps=1), scaled, grads).grad_P)


def test_medians_are_grouped_by_tensor_and_by_kind():
    pieces = [
        Piece("shared.weight", (2, 2), 0),
        Piece("encoder.block.0.layer.0.SelfAttention.q.weight", (2,), 4),
        Piece("encoder.block.1.layer.0.SelfAttention.q.weight", (3,), 6),
    ]
    assert median_groups(pieces, "global") == [[slice(0, 4), slice(4, 6), slice(6, 9)]]
    assert median_groups(pieces, "tensor") == [[slice(0, 4)], [slice(4, 6)], [slice(6, 9)]]
    assert median_groups(pieces, "kind") == [[slice(0, 4)], [slice(4, 6), slice(6, 9)]]


def test_a_median_over_shared_sensitivities_is_the_middle_row_s():
    # |θ·g| of the only task's rows: 1 and 3, 2 and 2, 0 and 9; means 2, 2, 4.5
    pieces = [Piece("encoder.weight", (3, 2), 0)]
    theta, grads = torch.ones(6), torch.tensor([[1.0, -3.0, 2.0, 2.0, 0.0, 9.0]])
    options = {"decay": 0.0, "granularity": "row", "median": "shared", **NO_WARMUP}
    shared = Taco(Specialization(**options), 1, theta, pieces, 1, seed=0)
    updated(shared, theta, grads)
    assert shared.average_TP.tolist() == [[1, 1, 1, 1, 2.25, 2.25]]
    signed = Taco(Specialization(average="signed", **options), 1, theta, pieces, 1, seed=0)
    updated(signed, theta, grads)  # sums −2, 4 and 9
    assert signed.average_TP.tolist() == [[-0.5, -0.5, 1, 1, 2.25, 2.25]]


def test_a_permutation_stays_inside_its_tensor():
    pieces = [Piece("a", (50,), 0), Piece("b", (5, 10), 50)]
    order = piecewise_permutation(pieces, "element", seed=3)
    assert sorted(order[:50].tolist()) == list(range(50))
    assert sorted(order[50:].tolist()) == list(range(50, 100))
    assert order.tolist() != list(range(100))
    assert torch.equal(order, piecewise_permutation(pieces, "element", seed=3))


def test_a_permutation_of_rows_keeps_each_row_together():
    pieces = [Piece("a", (50,), 0), Piece("b", (8, 2, 5), 50)]
    order = piecewise_permutation(pieces, "row", seed=3)
    assert sorted(order[:50].tolist()) == list(range(50))
    rows = order[50:].view(8, 10)
    first = rows[:, 0]
    assert torch.equal(rows, first[:, None] + torch.arange(10))
    assert sorted(first.tolist()) == list(range(50, 130, 10))
    assert first.tolist() != sorted(first.tolist())


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
    pieces = [Piece("a", (20,), 0)]

    def make() -> Method:
        return make_method(Specialization(method=method), 3, theta, pieces, steps=5, seed=0)

    first, second = make(), make()
    updated(first, theta, grads)
    second.load({name: value.clone() for name, value in first.state().items()})
    assert torch.equal(updated(first, theta, grads).grad_P, updated(second, theta, grads).grad_P)
    with pytest.raises(TrainingError, match="is none"):
        make().load({})
