"""Padding, resizing and cropping, against NumPy and by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from restoreloss.sizes import crop_map, fit_size
from tests.helpers.restorers import uniform

sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))
multiples = st.integers(1, 16)


def numbered(height, width):
    return torch.arange(2.0 * height * width).reshape(2, 1, height, width)


@settings(max_examples=80, deadline=None)
@given(size=sizes, multiple=multiples, policy=st.sampled_from(["pad", "resize"]))
def test_result_has_the_next_multiples(size, multiple, policy):
    found = fit_size(numbered(*size), multiple, policy)
    assert found.shape[:2] == (2, 1)
    for before, after in zip(size, found.shape[2:], strict=True):
        assert after % multiple == 0
        assert before <= after < before + multiple


@settings(max_examples=80, deadline=None)
@given(size=sizes, multiple=multiples)
def test_pad_keeps_the_image_in_its_corner_and_invents_no_value(size, multiple):
    image = numbered(*size)
    found = fit_size(image, multiple, "pad")
    assert torch.equal(found[..., : size[0], : size[1]], image)
    for before, after in zip(image, found, strict=True):
        assert set(after.flatten().tolist()) == set(before.flatten().tolist())


@settings(max_examples=80, deadline=None)
@given(size=sizes, multiple=multiples)
def test_pad_reflects_as_often_as_it_takes(size, multiple):
    image = numbered(*size)
    found = fit_size(image, multiple, "pad")

    def source(i, n):
        place, step = 0, 1
        for _ in range(i):  # a walk that turns at either end
            if not 0 <= place + step < n:
                step = -step
            place += step if n > 1 else 0
        return place

    rows, columns = ([source(i, n) for i in range(m)] for n, m in zip(size, found.shape[2:], strict=True))
    assert torch.equal(found, image[:, :, rows][:, :, :, columns])


def test_pad_equals_torch_reflect():
    image = numbered(13, 10)
    assert torch.equal(fit_size(image, 8, "pad"), F.pad(image, (0, 6, 0, 3), mode="reflect"))


def test_one_pixel_is_repeated():
    image = torch.tensor([0.25, 0.5]).reshape(1, 2, 1, 1)
    assert torch.equal(fit_size(image, 8, "pad"), image.expand(1, 2, 8, 8))


@pytest.mark.parametrize("policy", ["pad", "resize", "error"])
def test_fitting_image_comes_back_itself(policy):
    image = numbered(8, 16)
    assert fit_size(image, 8, policy) is image


@pytest.mark.parametrize(("size", "found"), [((15, 16), "15x16"), ((16, 9), "16x9")])
def test_error_names_the_multiple_and_the_size(size, found):
    with pytest.raises(ValueError, match=f"multiples of 8 .* found {found}"):
        fit_size(numbered(*size), 8, "error")


def test_resize_stretches_the_whole_image():
    ramp = torch.arange(6.0).expand(1, 1, 6, 6)
    found = fit_size(ramp, 4, "resize")
    # pixel centres at (i + 0.5) * 6 / 8 - 0.5, held within the image
    expected = torch.tensor([max(0.0, min(5.0, (i + 0.5) * 6 / 8 - 0.5)) for i in range(8)])
    torch.testing.assert_close(found, expected.expand(1, 1, 8, 8))


@pytest.mark.parametrize("policy", ["pad", "resize"])
@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_gradient_reaches_every_pixel_of_the_image(size, policy):
    image = numbered(*size).requires_grad_()
    fit_size(image, 8, policy).sum().backward()
    assert (image.grad > 0).all()
    assert float(image.grad.sum()) == pytest.approx(2 * 8 * 8)


@settings(max_examples=150, deadline=None)
@given(
    size=sizes,
    missing=st.tuples(st.integers(0, 15), st.integers(0, 15)),
    have=st.tuples(st.integers(1, 24), st.integers(1, 24)),
)
def test_crop_keeps_the_cells_that_lie_over_the_image_by_a_pixel_or_a_part(size, missing, have):
    padded = (size[0] + missing[0], size[1] + missing[1])
    features = torch.rand(1, 2, *have)

    # cell i of n covers [i, i + 1) * full / n
    def over(want, full, n):
        return sum(i * full < want * n for i in range(n))

    rows, columns = (over(*each) for each in zip(size, padded, have, strict=True))
    assert torch.equal(crop_map(features, padded, size), features[..., :rows, :columns])


@pytest.mark.parametrize(
    ("padded", "size", "have", "expected"),
    [
        ((16, 24), (16, 24), (2, 3), (2, 3)),
        ((16, 24), (9, 17), (2, 3), (2, 3)),
        ((16, 24), (8, 16), (2, 3), (1, 2)),
        ((16, 24), (1, 1), (2, 3), (1, 1)),
        ((16, 16), (13, 10), (16, 16), (13, 10)),
    ],
)
def test_crop_rounds_up(padded, size, have, expected):
    assert crop_map(torch.zeros(1, 4, *have), padded, size).shape == (1, 4, *expected)


@pytest.mark.parametrize("shape", [(2, 8), (2, 16, 8)])
def test_tokens_come_back_whole(shape):
    tokens = torch.rand(shape)
    assert crop_map(tokens, (16, 16), (9, 9)) is tokens


@pytest.mark.parametrize(("size", "multiple"), [((1, 1), 8), ((2, 3), 8), ((5, 7), 64), ((17, 30), 8), ((16, 24), 8)])
def test_images_are_continued_by_reflection(size: tuple[int, int], multiple: int) -> None:
    images = uniform(2, 3, *size)
    found = fit_size(images, multiple, "pad")
    more = [-side % multiple for side in size]
    wanted = np.pad(images.numpy(), ((0, 0), (0, 0), (0, more[0]), (0, more[1])), mode="reflect")
    np.testing.assert_array_equal(found.numpy(), wanted)
