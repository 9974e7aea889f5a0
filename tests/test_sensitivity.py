"""The maths of specialization: laws as properties, small numbers by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskspec.specialize import sensitivity as s
from taskspec.specialize.gradients import Piece

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


def test_the_elements_of_a_row_share_their_mean_and_those_of_a_vector_stand_alone():
    pieces = [Piece("matrix", (2, 2), 0), Piece("vector", (2,), 4), Piece("cube", (1, 2, 2), 6)]
    values = torch.tensor([[1.0, 3.0, 5.0, 7.0, 2.0, 4.0, 0.0, 0.0, 4.0, 4.0]])
    assert s.share_rows(values, pieces).tolist() == [[2, 2, 6, 6, 2, 4, 2, 2, 2, 2]]


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
