"""The maths of specialization: laws as properties, small numbers by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskspec.specialize import sensitivity as s

shapes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10_000))


def random(tasks: int, elements: int, seed: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(elements, generator=generator, dtype=dtype)
    grads = torch.randn(tasks, elements, generator=generator, dtype=dtype)
    zeroed = torch.rand(tasks, elements, generator=generator) < 0.3  # tokens that a batch does not hold
    return theta, grads.masked_fill(zeroed, 0.0)


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


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.5, 3.0, 7.0]), st.integers(1, 5)), min_size=1, max_size=12))
def test_a_weighted_median_is_that_of_the_values_each_as_often_as_its_width(rows):
    values, widths = map(torch.tensor, zip(*rows, strict=True))
    positive = sorted(value for value, width in rows for _ in range(width) if value > 0)
    expected = positive[(len(positive) - 1) // 2] if positive else 0.0
    assert float(s.weighted_median(values, widths)) == expected


def test_bias_correction_before_the_first_update_is_1():
    assert s.bias_correction(torch.tensor([0]), 0.9).tolist() == [1.0]


def test_strength_is_0_in_warmup_then_grows_to_its_value():
    strengths = [s.scheduled_strength(2.0, step, warmup_steps=4) for step in range(10)]
    assert strengths == [0, 0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert s.scheduled_strength(2.0, 0, warmup_steps=0) == 2.0


def test_different_element_counts_are_refused():
    with pytest.raises(ValueError, match="param_P has 2 elements, grad_TP has 3; P must be equal"):
        s.sensitivity(torch.ones(2), torch.ones(1, 3))


def test_description_of_an_owned_row_a_shared_one_and_one_without_gradient():
    weights = torch.tensor([[0.95, 0.5, 1.0], [0.05, 0.5, 0.0]])
    said = s.describe(weights, elements_R=torch.tensor([3, 1, 0]), energy_R=torch.tensor([9.0, 16.0, 0.0]))
    assert said.saturation == 0.75
    assert said.saturated_energy == pytest.approx(9 / 25)
    one = -(0.95 * np.log(0.95) + 0.05 * np.log(0.05)) / np.log(2)
    assert said.entropy == pytest.approx((3 * one + 1) / 4, rel=1e-5)
    for alone in (s.describe(torch.ones(1, 2), torch.ones(2), torch.ones(2)), s.describe(weights, *torch.zeros(2, 3))):
        assert (alone.entropy, alone.saturation, alone.saturated_energy) == (1.0, 0.0, 0.0)
