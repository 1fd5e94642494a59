import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from restoreloss import small_prior
from restoreloss.checks import check_choice, check_integer, check_number, describe

Color = Literal["red", "green"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (nn.L1Loss, "the class L1Loss"),
        (nn.L1Loss(), "a L1Loss"),
        (torch.zeros(2, 3), r"a tensor of shape \(2, 3\) and torch.float32"),
        (np.zeros((2, 3)), r"a numpy array of shape \(2, 3\)"),
        (small_prior, r"the function small_prior \(is the call missing\?\)"),
        (None, "None"),
        ("1e-3", "'1e-3'"),
        ([1], "list"),
    ],
)
def test_what_was_found_is_described(value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"`lr` should be a finite number, found {text}"):
        check_number("lr", value)
    assert describe(value)


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.25), Fraction(1, 3)])
def test_numbers_within_bounds_become_floats(value: Any) -> None:
    found = check_number("p", value, low=0, high=1)
    assert type(found) is float
    assert found == float(value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None, torch.tensor(0.5)])
def test_what_is_no_number_within_bounds_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`p` should be a finite number of at least 0 and at most 1, found"):
        check_number("p", value, low=0, high=1)


def test_the_lower_bound_may_be_excluded() -> None:
    with pytest.raises(ValueError, match="`lr` should be a finite number above 0, found 0"):
        check_number("lr", 0, low=0, above=True)


@pytest.mark.parametrize("value", [0, 4, 1.0, True, "2", None, math.nan])
def test_what_is_no_whole_number_within_bounds_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`n` should be a whole number of at least 1 and at most 3, found"):
        check_integer("n", value, high=3)
    assert check_integer("n", np.int64(3), high=3) == 3


@pytest.mark.parametrize("value", ["Red", None, ["red"]])
def test_what_is_no_choice_is_refused_with_the_choices(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`color` should be one of \('red', 'green'\), found"):
        check_choice("color", value, Color)
    check_choice("color", "red", Color)
