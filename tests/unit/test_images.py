import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restoreloss import DiffLoss
from restoreloss.images import RangeWatch, check_pair, check_range, to_signed_range, warn_if_out_of_range

RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
SHAPE = (2, 3, 4, 4)


def spanning(low, high, shape=SHAPE):
    return torch.linspace(low, high, torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize(
    ("input_range", "closed_form"),
    [
        ((0.0, 1.0), lambda u: 2 * u - 1),
        ((-1.0, 1.0), lambda u: u),
        ((0.0, 255.0), lambda u: u / 127.5 - 1),
    ],
)
def test_range_is_mapped_to_minus_one_and_one_with_its_overshoot(input_range, closed_form):
    low, high = input_range
    image = spanning(low - 0.1 * (high - low), high + 0.1 * (high - low)).double()
    torch.testing.assert_close(to_signed_range(image, input_range), closed_form(image), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(low=st.floats(-300, 300), span=st.floats(0.5, 300), share=st.floats(-0.5, 1.5))
def test_any_range_is_mapped_linearly(low, span, share):
    image = torch.full((1, 1, 1, 1), low + share * span, dtype=torch.float64)
    assert float(to_signed_range(image, (low, low + span))) == pytest.approx(2 * share - 1, abs=1e-9)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_mapping_is_in_float32_or_higher(dtype, expected):
    image = spanning(0, 255).to(dtype)
    found = to_signed_range(image, (0.0, 255.0))
    assert found.dtype == expected
    torch.testing.assert_close(found.double(), image.double() / 127.5 - 1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_gradient_of_the_mapping_is_its_slope(low, high):
    image = spanning(low, high).requires_grad_()
    to_signed_range(image, (low, high)).sum().backward()
    torch.testing.assert_close(image.grad, torch.full(SHAPE, 2 / (high - low)))


@pytest.mark.parametrize(
    "input_range",
    [(1, 0), (0, 0), (0,), (0, 1, 2), 255, None, "ab", (0, float("nan")), (0, float("inf")), (float("-inf"), 0)],
)
def test_input_range_that_is_none_is_refused_by_name(input_range):
    with pytest.raises(ValueError, match="`input_range` should"):
        check_range(input_range)


def test_input_range_becomes_floats():
    assert [type(value) for value in check_range((0, 255))] == [float, float]
    assert check_range([-1, 1]) == (-1.0, 1.0)


GOOD = torch.rand(SHAPE)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0], "should be a tensor, found list"),
        (GOOD[0], r"should have shape \(N, C, H, W\), found \(3, 4, 4\)"),
        (GOOD[None], r"should have shape \(N, C, H, W\), found \(1, 2, 3, 4, 4\)"),
        (GOOD.mul(255).byte(), r"should be floating point, found torch.uint8: .*input_range=\(0, 255\)"),
        (GOOD.to(torch.complex64), "should be floating point, found torch.complex64"),
        (GOOD[:0], r"should hold at least one image and one pixel, found \(0, 3, 4, 4\)"),
        (GOOD[..., :0], r"should hold at least one image and one pixel, found \(2, 3, 4, 0\)"),
    ],
)
@pytest.mark.parametrize("argument", ["restored", "target"])
def test_image_that_is_none_is_refused_with_the_argument_and_what_was_found(argument, bad, message):
    with pytest.raises(ValueError, match=f"`{argument}` {message}"):
        check_pair(**{"restored": GOOD, "target": GOOD, argument: bad})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (GOOD[:1], r"`target` should have the shape of `restored` \(2, 3, 4, 4\), found \(1, 3, 4, 4\)"),
        (GOOD[:, :1], r"`target` should have the shape of `restored` \(2, 3, 4, 4\), found \(2, 1, 4, 4\)"),
        (GOOD.to("meta"), "`target` should be on the device of `restored` cpu, found meta"),
        (GOOD.double(), "`target` should have the dtype of `restored` torch.float32, found torch.float64"),
    ],
)
def test_pair_that_does_not_fit_is_refused_with_what_was_expected_and_found(target, message):
    with pytest.raises(ValueError, match=message):
        check_pair(GOOD, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float64_meets_float64_only(dtype):
    check_pair(GOOD.double(), GOOD.double())
    for pair in ((GOOD.double(), GOOD.to(dtype)), (GOOD.to(dtype), GOOD.double())):
        with pytest.raises(ValueError, match=rf"dtype of `restored` {pair[0].dtype}, found {pair[1].dtype}"):
            check_pair(*pair)


@pytest.mark.parametrize("restored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32])
def test_half_and_single_precision_may_meet(restored, target):
    check_pair(GOOD.to(restored), GOOD.to(target))


@pytest.mark.parametrize(
    ("spans", "input_range"),
    [((0, 255), (0.0, 1.0)), ((-1, 1), (0.0, 1.0)), ((0, 1), (0.0, 255.0)), ((0, 1), (-1.0, 1.0))],
)
def test_clearly_wrong_range_warns_with_both_ranges(spans, input_range):
    expected = rf"`target` spans \[{spans[0]}, {spans[1]}\] .* \({input_range[0]:g}, {input_range[1]:g}\)"
    with pytest.warns(UserWarning, match=expected):
        warn_if_out_of_range({"target": spanning(*spans, (1, 3, 8, 8))}, input_range)


@pytest.mark.parametrize("name", ["restored", "student_images"])
def test_what_an_untrained_network_makes_is_not_told_and_what_a_tanh_makes_is(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ends in ((-0.87, 1.23), (-0.3, 0.4), (-1.2, 1.1), (0.0, 2.9), (-9, 12)):
            assert not warn_if_out_of_range({name: spanning(*ends)}, (0.0, 1.0))
    for ends, settled in (((-1, 1), False), ((-0.97, 0.9), False), ((0, 255), False), ((-3, 2), True)):
        with pytest.warns(UserWarning, match=f"`{name}` spans"):
            assert warn_if_out_of_range({name: spanning(*ends)}, (0.0, 1.0), settled=settled)


def test_the_watch_looks_again_until_it_has_told():
    watch = RangeWatch((0.0, 1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(1, 102):
            watch.look({"restored": spanning(-0.5, 0.5) if call < 3 else spanning(-1, 2)})
    assert len(caught) == 1  # at the hundredth call


def within(low, high):
    span = high - low
    return [
        spanning(low, high),
        spanning(low - 0.001 * span, low + 1.05 * span),
        spanning(low + 0.05 * span, low + 0.6 * span),
        *(torch.full(SHAPE, low + share * span) for share in (0, 0.001, 0.5, 1)),
        spanning(low, high).mul(float("nan")),
    ]


@pytest.mark.parametrize("input_range", RANGES)
@pytest.mark.parametrize("case", range(8))
def test_overshoot_and_constant_images_do_not_warn(input_range, case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_out_of_range({name: within(*input_range)[case] for name in ("restored", "target")}, input_range)


def test_diffloss_warns_once_only():
    loss = DiffLoss(lambda x_t, t: x_t, h_space_weight=0)
    image = spanning(0, 255)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            loss(image, image)
    assert [str(each.message).partition(" while")[0] for each in caught] == [
        "`restored` spans [0, 255] and `target` spans [0, 255]"
    ]


def test_diffloss_does_not_warn_for_the_range_it_was_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiffLoss(lambda x_t, t: x_t, h_space_weight=0, input_range=(0, 255))(spanning(-3, 260), spanning(0, 255))
