"""The maths of specialization: laws as properties, one step against a transcription in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskspec.config import Specialization
from taskspec.errors import TrainingError
from taskspec.specialize import sensitivity as s
from taskspec.specialize.methods import Mean, Taco, make_method

shapes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10_000))


def random(tasks: int, elements: int, seed: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(elements, generator=generator, dtype=dtype)
    grads = torch.randn(tasks, elements, generator=generator, dtype=dtype)
    zeroed = torch.rand(tasks, elements, generator=generator) < 0.3  # tokens that a batch does not hold
    return theta, grads.masked_fill(zeroed, 0.0)


@given(shapes)
def test_strength_0_is_the_mean_gradient_bitwise(shape):
    theta, grads = random(*shape)
    weights = s.task_weights(s.sensitivity(theta, grads), 0.0)
    assert (weights == 1).all()
    assert torch.equal(s.combine(weights, grads), s.mean_gradient(grads))


@given(shapes, st.floats(0, 20))
def test_equal_sensitivities_give_the_mean_gradient_bitwise(shape, strength):
    tasks, elements, seed = shape
    theta, grads = random(tasks, elements, seed)
    equal = s.sensitivity(theta, grads[:1]).expand(tasks, elements)
    assert torch.equal(s.combine(s.task_weights(equal, strength), grads), s.mean_gradient(grads))


@given(shapes, st.floats(0, 20))
def test_equal_task_gradients_give_that_gradient(shape, strength):
    tasks, elements, seed = shape
    theta, grads = random(tasks, elements, seed)
    same = grads[:1].expand(tasks, elements)
    weights = s.task_weights(s.sensitivity(theta, same), strength)
    torch.testing.assert_close(s.combine(weights, same), grads[0])


@given(shapes, st.floats(0, 20))
def test_weights_sum_to_the_number_of_tasks_and_grow_with_sensitivity(shape, strength):
    theta, grads = random(*shape)
    sensitivities = s.sensitivity(theta, grads)
    weights = s.task_weights(sensitivities, strength)
    torch.testing.assert_close(weights.sum(0), torch.full_like(theta, len(grads)))
    order = sensitivities.argsort(dim=0)
    assert (weights.gather(0, order).diff(dim=0) >= -1e-5).all()


@given(shapes, st.floats(1e-3, 1e3))
def test_normalized_sensitivities_do_not_depend_on_a_task_s_loss_scale(shape, scale):
    theta, grads = random(*shape)
    plain, scaled = s.sensitivity(theta, grads), s.sensitivity(theta, grads * scale)
    torch.testing.assert_close(
        s.normalize(plain, s.positive_medians(plain)),
        s.normalize(scaled, s.positive_medians(scaled)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_median_is_taken_over_elements_above_zero():
    rows = torch.tensor([[0.0, 0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert s.positive_medians(rows).tolist() == [1.0, 0.0]
    assert s.normalize(rows.clone(), s.positive_medians(rows)).tolist() == [[0, 0, 0, 1, 3], [0] * 5]
    assert s.reference_medians(rows).tolist() == pytest.approx([1e-12, 1e-12])


@given(st.floats(0.0, 0.9999), st.integers(1, 50))
def test_a_constant_signal_is_its_own_bias_corrected_average(decay, updates):
    average = torch.zeros(1, 3, dtype=torch.float64)
    for _ in range(updates):
        s.accumulate(average, torch.full_like(average, 7.0), decay)
    corrected = average * s.bias_correction(torch.tensor([updates]), decay)[:, None]
    torch.testing.assert_close(corrected, torch.full_like(average, 7.0))


def test_bias_correction_before_the_first_update_is_1():
    assert s.bias_correction(torch.tensor([0]), 0.9).tolist() == [1.0]


def test_strength_is_0_in_warmup_then_grows_to_its_value():
    strengths = [s.scheduled_strength(2.0, step, warmup_steps=4) for step in range(10)]
    assert strengths == [0, 0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert s.scheduled_strength(2.0, 0, warmup_steps=0) == 2.0


def test_different_element_counts_are_refused():
    with pytest.raises(ValueError, match="param_P has 2 elements, grad_TP has 3; P must be equal"):
        s.sensitivity(torch.ones(2), torch.ones(1, 3))


def test_description_of_one_owner_and_of_equal_shares():
    owned = torch.tensor([[1.9, 1.0], [0.1, 1.0]])  # of T=2: shares 0.95 and 0.5
    said = s.describe(owned, update_P=torch.tensor([3.0, 4.0]), touched_P=torch.tensor([True, True]))
    assert said.saturation == 0.5
    assert said.saturated_energy == pytest.approx(9 / 25)
    one = -(0.95 * np.log(0.95) + 0.05 * np.log(0.05)) / np.log(2)
    assert said.entropy == pytest.approx((one + 1) / 2, rel=1e-5)
    alone = s.describe(torch.ones(1, 2), torch.ones(2), torch.tensor([True, True]))
    assert (alone.entropy, alone.saturation) == (1.0, 0.0)


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
@settings(max_examples=20, deadline=None)
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
    taco = Taco(config, tasks, theta, steps=8)
    mine = [taco.update(theta, grads, describe=True).grad_P.numpy() for grads in steps]
    theirs = transcribed(config, theta.numpy(), [grads.numpy() for grads in steps])
    np.testing.assert_allclose(np.array(mine), np.array(theirs), rtol=1e-9, atol=1e-12)


def test_the_reference_update_shrinks_t_fold_when_warmup_ends():
    config = Specialization(strength=0.0, warmup=0.0, min_warmup_steps=1, compat="reference")
    theta, grads = random(4, 30, 0)
    taco = Taco(config, 4, theta, steps=2)
    before, after = (taco.update(theta, grads, describe=False).grad_P for _ in range(2))
    torch.testing.assert_close(after, before / 4)


def test_taco_at_strength_0_equals_mean_bitwise_over_many_updates():
    config = Specialization(strength=0.0, warmup=0.0, min_warmup_steps=0)
    theta, _ = random(1, 50, 0)
    taco, mean = Taco(config, 3, theta, steps=10), Mean()
    for step in range(10):
        grads = random(3, 50, step)[1]
        assert torch.equal(
            taco.update(theta, grads, describe=False).grad_P, mean.update(theta, grads, describe=False).grad_P
        )


def test_a_task_without_gradient_neither_counts_an_update_nor_spoils_the_others():
    config = Specialization(warmup=0.0, min_warmup_steps=0)
    theta, grads = random(2, 20, 1)
    grads[1] = 0
    taco = Taco(config, 2, theta, steps=1)
    update = taco.update(theta, grads, describe=True)
    assert update.grad_P.isfinite().all()
    assert taco.updates_T.tolist() == [1, 0]


def test_state_of_other_tasks_is_refused_and_own_state_resumes():
    config = Specialization(decay=0.9, warmup=0.0, min_warmup_steps=0)
    theta, grads = random(2, 20, 1)
    first = make_method(config, ["a", "b"], theta, 5)
    first.update(theta, grads, describe=False)
    second = make_method(config, ["a", "b"], theta, 5)
    second.load({name: value.clone() for name, value in first.state().items()})
    assert torch.equal(
        first.update(theta, grads, describe=False).grad_P, second.update(theta, grads, describe=False).grad_P
    )
    with pytest.raises(TrainingError, match=r"average_TP is \(2, 20\), this run needs \(3, 20\)"):
        make_method(config, ["a", "b", "c"], theta, 5).load(first.state())
    with pytest.raises(TrainingError, match=r"average_TP is none"):
        make_method(config, ["a", "b"], theta, 5).load({})
