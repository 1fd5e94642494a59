from typing import Any

import pytest
import torch

from restoreloss.generators import check_generators, integers, permutation, standard_normal, stratified, uniform


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "draw",
    [
        standard_normal,
        lambda like, one: integers(0, 99, len(like), one, like.device),
        lambda like, one: stratified(0, 99, len(like), one, like.device),
    ],
)
def test_with_a_generator_each_a_sample_does_not_depend_on_its_batch(draw: Any) -> None:
    together = draw(torch.empty(3, 2), [seeded(seed) for seed in (0, 1, 2)])
    for number in range(3):
        assert torch.equal(draw(torch.empty(1, 2), [seeded(number)]), together[number : number + 1])


@pytest.mark.parametrize("draw", [standard_normal, uniform])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_generator_the_global_one_draws(draw: Any, dtype: torch.dtype) -> None:
    like = torch.empty(2, 3, dtype=dtype)
    torch.manual_seed(5)
    found = draw(like)
    assert torch.equal(found, draw(like, seeded(5)))
    assert found.shape == like.shape and found.dtype == dtype


def test_a_permutation_holds_every_number_once() -> None:
    for generator in (None, seeded(0), [seeded(seed) for seed in range(7)]):
        assert permutation(7, generator, torch.device("cpu")).sort().values.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("generator", "count", "message"),
    [
        (0, 2, "should be a torch.Generator, or one for each sample, found 0"),
        ("cpu", 2, "found 'cpu'"),
        ([seeded(0)], 2, "should be one, or one for each of 2, found 1"),
        ([None, seeded(0)], 2, "found None"),
        ([seeded(0)], None, "should be a torch.Generator, found list"),
    ],
)
def test_what_is_no_generator_is_refused(generator: Any, count: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"`generator` {message}|{message}"):
        check_generators(generator, count)


@pytest.mark.parametrize(("low", "high", "count"), [(0, 12, 4), (5, 9, 8), (3, 4, 2), (0, 10, 3)])
def test_stratified_integers_are_uniform_each_and_spread_together(low: int, high: int, count: int) -> None:
    generator = seeded(0)
    drawn = torch.stack([stratified(low, high, count, generator, torch.device("cpu")) for _ in range(6000)])
    assert drawn.min() == low and drawn.max() == high - 1 and drawn.dtype == torch.long
    for place in range(count):  # a chi-squared test of each place; 4 standard deviations of its statistic
        counts = torch.bincount(drawn[:, place] - low, minlength=high - low).double()
        expected = 6000 / (high - low)
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic <= (high - low - 1) + 4 * (2 * (high - low - 1)) ** 0.5
    edges = low + torch.arange(count + 1) * (high - low) / count
    inside = drawn.sort(dim=1).values
    assert (inside >= edges[:-1].floor()).all() and (inside <= edges[1:].ceil()).all()


def test_the_mean_of_a_stratified_batch_varies_less() -> None:
    draws = [(draw(0, 1000, 8, seeded(3), torch.device("cpu")), draw) for draw in (integers, stratified)]
    assert all(found.shape == (8,) for found, _ in draws)
    generator = seeded(0)
    spread = {}
    for _, draw in draws:
        means = [draw(0, 1000, 8, generator, torch.device("cpu")).double().mean() for _ in range(400)]
        spread[draw.__name__] = float(torch.stack(means).std())
    # var of a mean of n independent ones is range^2 / 12 n, of n strata range^2 / 12 n^3
    assert spread["stratified"] < spread["integers"] / 5
