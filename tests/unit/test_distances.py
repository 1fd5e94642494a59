import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restoreloss.distances import distance_per_sample, reduce_samples

DISTANCES = ("mse", "rms", "l2", "l1")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def by_loop(prediction, reference, distance):
    values = []
    rows = (value.double().reshape(len(value), -1).tolist() for value in (prediction, reference))
    for a, b in zip(*rows, strict=True):
        if distance == "l1":
            values.append(math.fsum(abs(p - q) for p, q in zip(a, b, strict=True)) / len(a))
            continue
        squares = math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        values.append({"mse": squares / len(a), "rms": math.sqrt(squares / len(a)), "l2": math.sqrt(squares)}[distance])
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    distance=st.sampled_from(DISTANCES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_distance_equals_a_float64_loop_over_each_sample(shape, distance, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    prediction, reference = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    found = distance_per_sample(prediction, reference, distance)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), by_loop(prediction, reference, distance), rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_half_predictions_and_single_references_may_meet(distance):
    prediction, reference = torch.randn(2, 6).half(), torch.randn(2, 6)
    for a, b in ((prediction, reference), (reference, prediction)):
        found = distance_per_sample(a, b, distance)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), by_loop(a, b, distance), rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
def test_equal_predictions_have_distance_and_gradient_exactly_zero(distance, dtype, value):
    prediction = torch.full((2, 3, 5, 5), value, dtype=dtype, requires_grad=True)
    found = distance_per_sample(prediction, prediction.detach().clone(), distance)
    found.sum().backward()
    assert torch.equal(found, torch.zeros_like(found))
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_is_zero_for_the_equal_sample_alone(distance):
    prediction = torch.zeros(2, 4, requires_grad=True)
    distance_per_sample(prediction, torch.tensor([[0.0] * 4, [1.0] * 4]), distance).sum().backward()
    assert torch.equal(prediction.grad[0], torch.zeros(4))
    assert (prediction.grad[1] < 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_away_from_zero_equals_finite_differences(distance):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    offset = 0.5 + torch.rand(reference.shape, generator=generator, dtype=torch.float64)
    prediction = (reference + offset * torch.randn(reference.shape, generator=generator).sign()).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: distance_per_sample(z, reference, distance), prediction)


@pytest.mark.parametrize("size", [1e-6, 1e-12])
@pytest.mark.parametrize(("distance", "scale"), [("rms", 1.0), ("l2", math.sqrt(300)), ("l1", 1.0)])
def test_tiny_differences_keep_their_relative_precision(distance, scale, size):
    prediction = torch.full((1, 3, 10, 10), size, requires_grad=True)
    found = distance_per_sample(prediction, torch.zeros(1, 3, 10, 10), distance)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(size * scale, rel=1e-5)
    # d (scale * size) / d size, over 300 equal elements
    assert prediction.grad.flatten().tolist() == pytest.approx([scale / 300] * 300, rel=1e-5)


@pytest.mark.parametrize(("distance", "value"), [("mse", 500.0**2), ("rms", 500.0), ("l2", 500.0e3), ("l1", 500.0)])
def test_half_precision_inputs_do_not_overflow(distance, value):
    prediction = torch.full((1, 1, 1000, 1000), 500.0, dtype=torch.float16, requires_grad=True)
    found = distance_per_sample(prediction, torch.zeros_like(prediction), distance)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(value, rel=1e-5)
    assert prediction.grad.dtype == torch.float16
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 3.0), ("sum", 9.0), ("none", [1.0, 2.0, 6.0])])
def test_reduction_over_samples(reduction, expected):
    assert reduce_samples(torch.tensor([1.0, 2.0, 6.0]), reduction).tolist() == expected
