import copy
import inspect
import itertools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from restoreloss import CQMix


def pair(shape=(2, 3, 9, 10), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def black_and_white(n, height, width):
    """Images whose mix is its own mask: restored 1, target 0."""
    return torch.ones(n, 1, height, width), torch.zeros(n, 1, height, width)


def draw_coins(n, grid, p, seed=0):
    """One pixel a cell: the mask is the coins, (n, rows, columns)."""
    return CQMix(grid, p=p)(*black_and_white(n, *grid), generator=seeded(seed))[:, 0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_cell_shows_one_image_and_lies_where_the_nearest_enlargement_has_it(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    height, width = data.draw(st.integers(rows, 29)), data.draw(st.integers(columns, 29))
    restored, target = pair((2, 3, height, width))
    mixed, mask = CQMix((rows, columns))(
        restored, target, generator=seeded(data.draw(st.integers(0, 999))), return_mask=True
    )
    assert mask.shape == (2, 1, height, width)
    assert torch.equal(mixed, torch.where(mask.bool(), restored, target))
    coins = {}
    for n, i, j in itertools.product(range(2), range(height), range(width)):
        # the cell whose share of the image, [cell / rows, (cell + 1) / rows), holds the pixel's upper edge i / height
        row = max(cell for cell in range(rows) if cell * height <= i * rows)
        column = max(cell for cell in range(columns) if cell * width <= j * columns)
        assert coins.setdefault((n, row, column), mask[n, 0, i, j].item()) == mask[n, 0, i, j].item()
    assert len(coins) == 2 * rows * columns  # no cell is empty


@pytest.mark.parametrize("cells", range(1, 9))
@pytest.mark.parametrize("factor", range(1, 11))
def test_cells_are_those_of_interpolate_where_sizes_divide(cells, factor):
    grid, size = (cells, 9 - cells), (cells * factor, (9 - cells) * (11 - factor))
    mask = CQMix(grid)(*black_and_white(3, *size), generator=seeded())
    expected = F.interpolate(draw_coins(3, grid, 0.5)[:, None], size, mode="nearest")
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(("height", "cells"), [(7, 3), (10, 4), (11, 8), (224, 5)])
def test_cells_differ_by_one_pixel_at_most(height, cells):
    # the coins of one column of cells are all told apart somewhere within 64 draws
    masks = CQMix((cells, 1))(*black_and_white(64, height, 1), generator=seeded())[:, 0, :, 0]
    edges = [i for i in range(1, height) if not torch.equal(masks[:, i], masks[:, i - 1])]
    sizes = [b - a for a, b in itertools.pairwise([0, *edges, height])]
    assert len(sizes) == cells
    assert max(sizes) - min(sizes) <= 1


def test_default_is_sixteen_cells_and_a_fair_coin():
    mask = CQMix()(*black_and_white(500, 8, 12), generator=seeded())
    assert torch.equal(mask, F.interpolate(mask[..., ::2, ::3], (8, 12), mode="nearest"))
    assert abs(mask.mean().item() - 0.5) < 5 * 0.5 / math.sqrt(500 * 16)
    assert not torch.equal(mask, F.interpolate(mask[..., ::4, ::3], (8, 12), mode="nearest"))  # 2 rows are too few
    assert inspect.signature(CQMix).parameters["p"].kind is inspect.Parameter.KEYWORD_ONLY


def test_one_mask_for_all_channels():
    restored, target = torch.ones(8, 5, 6, 6), torch.zeros(8, 5, 6, 6)
    mixed = CQMix((3, 3))(restored, target, generator=seeded())
    assert torch.equal(mixed, mixed[:, :1].expand_as(mixed))
    assert 0 < mixed.mean() < 1


# Five standard deviations: each of some hundred comparisons fails by chance once in two million draws of the seed.


@pytest.mark.parametrize("p", [0.5, 0.1, 0.75])
def test_coins_of_every_cell_are_fair(p):
    n, grid = 20_000, (2, 4)
    bound = 5 * math.sqrt(p * (1 - p) / n)
    assert (draw_coins(n, grid, p).mean(dim=0) - p).abs().max() < bound


@pytest.mark.parametrize("p", [0.5, 0.25])
def test_coins_of_cells_samples_and_calls_are_independent(p):
    n, grid = 20_000, (2, 4)
    coins = (draw_coins(n, grid, p).flatten(1) - p) / math.sqrt(p * (1 - p))
    bound = 5 / math.sqrt(n - 1)
    between_cells = coins.T @ coins / n
    assert (between_cells - torch.diag(between_cells.diagonal())).abs().max() < bound
    for lag in (1, 2):
        between_samples = coins[lag:].T @ coins[:-lag] / (n - lag)
        assert between_samples.abs().max() < bound
    generator, mix = seeded(), CQMix(grid, p=p)
    calls = [mix(*black_and_white(n // 2, *grid), generator=generator).flatten(1) for _ in range(2)]
    first, second = ((call - p) / math.sqrt(p * (1 - p)) for call in calls)
    assert (first.T @ second / (n // 2)).abs().max() < bound * math.sqrt(2)


def test_all_patterns_of_a_grid_are_equally_frequent():
    n = 16_000
    patterns = draw_coins(n, (2, 2), 0.5).flatten(1) @ torch.tensor([1.0, 2.0, 4.0, 8.0])
    counts = patterns.long().bincount(minlength=16)
    assert (counts - n / 16).abs().max() < 5 * math.sqrt(n / 16 * 15 / 16)


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (1, 1, 4, 4)])
def test_probabilities_zero_and_one_show_one_image_alone(shape):
    restored, target = pair(shape)
    for seed in range(50):
        assert torch.equal(CQMix(p=1)(restored, target, generator=seeded(seed)), restored)
        assert torch.equal(CQMix(p=0)(restored, target, generator=seeded(seed)), target)


def test_same_seed_gives_the_same_mix_and_another_one_another():
    restored, target = pair((4, 3, 8, 8))
    mix = CQMix()
    first, second, third = (mix(restored, target, generator=seeded(s)) for s in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_without_a_generator_the_global_state_decides_and_with_one_it_is_left_alone():
    restored, target = pair((4, 3, 8, 8))
    mix = CQMix()
    torch.manual_seed(3)
    first, other = mix(restored, target), mix(restored, target)
    torch.manual_seed(3)
    assert torch.equal(mix(restored, target), first)
    assert not torch.equal(first, other)
    before = torch.get_rng_state()
    assert torch.equal(mix(restored, target, generator=seeded(3)), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("grid", [(4, 4), (1, 3), (5, 7), (8, 8)])
def test_samples_drawn_at_once_are_those_drawn_one_after_the_other(grid):
    restored, target = pair((5, 3, 11, 12))
    mix = CQMix(grid, p=0.4)
    at_once, mask = mix(restored, target, generator=seeded(), return_mask=True)
    generator = seeded()
    singly = [mix(restored[i : i + 1], target[i : i + 1], generator=generator) for i in range(5)]
    assert torch.equal(torch.cat(singly), at_once)
    listed, masks = mix(list(restored), tuple(target), generator=seeded(), return_mask=True)
    assert isinstance(listed, list) and torch.equal(torch.stack(listed), at_once)
    assert isinstance(masks, list) and torch.equal(torch.stack(masks), mask)


def test_list_of_unequal_sizes():
    sizes = [(3, 8, 9), (3, 5, 4), (1, 40, 31)]
    restored = [torch.full(size, i + 1.0) for i, size in enumerate(sizes)]
    target = [torch.full(size, -i - 1.0) for i, size in enumerate(sizes)]
    mixed, masks = CQMix((4, 4))(restored, target, generator=seeded(), return_mask=True)
    generator = seeded()
    for z, x, found, mask in zip(restored, target, mixed, masks, strict=True):
        alone = CQMix((4, 4))(z[None], x[None], generator=generator)
        assert torch.equal(found, alone[0])
        assert mask.shape == (1, *z.shape[1:])
        assert torch.equal(found, torch.where(mask.bool(), z, x))
        assert 0 < mask.mean() < 1


def test_empty_lists_and_batches_mix_to_nothing():
    assert CQMix()([], []) == []
    assert CQMix()(torch.rand(0, 3, 8, 8), torch.rand(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_dtype_is_kept_bit_for_bit(dtype):
    restored, target = (255 * u for u in pair((4, 3, 8, 8)))
    restored, target = (u > 127 if dtype is torch.bool else u.to(dtype) for u in (restored, target))
    mixed, mask = CQMix()(restored, target, generator=seeded(), return_mask=True)
    assert mixed.dtype == mask.dtype == dtype
    assert set(mask.unique().tolist()) == {0, 1}
    assert torch.equal(mixed, torch.where(mask.bool(), restored, target))
    assert torch.equal(mask.float(), CQMix()(*black_and_white(4, 8, 8), generator=seeded()))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("restored_is_half", [True, False])
def test_half_meets_single_precision(half, restored_is_half):
    restored, target = pair((4, 3, 8, 8))
    if restored_is_half:
        restored = restored.to(half).requires_grad_()
    else:
        target = target.to(half).requires_grad_()
    mixed, mask = CQMix()(restored, target, generator=seeded(), return_mask=True)
    assert mixed.dtype == mask.dtype == torch.float32
    assert torch.equal(mixed, torch.where(mask.bool(), restored.float(), target.float()))
    mixed.sum().backward()
    for image in (restored, target):
        assert image.grad is None or image.grad.dtype == half
    assert (restored if restored_is_half else target).grad.any()


def test_gradient_reaches_both_images_through_their_own_pixels_only():
    restored, target = (u.requires_grad_() for u in pair((4, 3, 9, 10)))
    mixed, mask = CQMix()(restored, target, generator=seeded(), return_mask=True)
    upstream = torch.randn(mixed.shape, generator=seeded(1))
    mixed.backward(upstream)
    assert torch.equal(restored.grad, upstream * mask)
    assert torch.equal(target.grad, upstream * (1 - mask))
    assert not mask.requires_grad


def test_pixels_not_taken_do_not_matter_not_even_nan():
    restored, target = pair((4, 3, 8, 8))
    clean, mask = CQMix()(restored, target, generator=seeded(), return_mask=True)
    broken = torch.where(mask.bool(), restored, math.nan).requires_grad_()
    mixed = CQMix()(broken, torch.where(mask.bool(), math.inf, target), generator=seeded())
    assert torch.equal(mixed, clean)
    mixed.square().sum().backward()
    assert torch.equal(broken.grad, 2 * clean * mask)


def test_gradcheck():
    restored, target = (u.requires_grad_() for u in pair((2, 2, 4, 5), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda z, x: CQMix((2, 3))(z, x, generator=seeded()), (restored, target))


def test_images_are_not_written_to():
    restored, target = pair()
    before = restored.clone(), target.clone()
    mixed = CQMix()(restored, target, generator=seeded())
    mixed.zero_()
    assert torch.equal(restored, before[0]) and torch.equal(target, before[1])


def test_it_has_no_parameters_and_no_state():
    mix = CQMix((2, 3), p=0.25)
    assert not list(mix.parameters()) and not list(mix.buffers()) and mix.state_dict() == {}
    restored, target = pair()
    mix.eval()
    evaluated = mix(restored, target, generator=seeded())
    assert torch.equal(mix.train()(restored, target, generator=seeded()), evaluated)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mix: pickle.loads(pickle.dumps(mix))])
def test_copies_mix_alike(copied):
    mix, (restored, target) = CQMix((2, 5), p=0.3), pair()
    other = copied(mix)
    assert torch.equal(other(restored, target, generator=seeded()), mix(restored, target, generator=seeded()))
    assert repr(other) == repr(mix)


def test_compiles_without_a_break_to_the_same_numbers():
    torch._dynamo.reset()
    mix = CQMix((2, 3))
    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)

    def run(function):
        restored, target = (u.requires_grad_() for u in pair())
        torch.manual_seed(4)
        mixed, mask = function(restored, target, return_mask=True)
        mixed.square().sum().backward()
        return mixed.detach(), mask, restored.grad, target.grad

    for found, expected in zip(run(compiled), run(mix), strict=True):
        assert torch.equal(found, expected)
    shapes = [u.shape for u in compiled(*([torch.rand(3, 8, 9), torch.rand(3, 5, 7)] for _ in range(2)))]
    assert shapes == [(3, 8, 9), (3, 5, 7)]


def test_generator_on_the_cpu_serves_images_elsewhere():
    images = torch.empty(2, 3, 8, 8, device="meta")
    mixed, mask = CQMix()(images, images, generator=seeded(), return_mask=True)
    assert mixed.device == mask.device == torch.device("meta")
    assert mask.shape == (2, 1, 8, 8)
    generator = seeded()
    CQMix()(images, images, generator=generator)
    after_meta = generator.get_state()
    generator = seeded()
    CQMix()(*pair((2, 3, 8, 8)), generator=generator)
    assert torch.equal(after_meta, generator.get_state())  # one stream of coins, wherever the images are


def test_repr():
    assert repr(CQMix()) == "CQMix(grid=(4, 4), p=0.5)"
    assert repr(CQMix([8, 2], p=0.25)) == "CQMix(grid=(8, 2), p=0.25)"


@pytest.mark.parametrize("grid", [(0, 4), (4, -1), (4,), (4, 4, 4), 4, (2.0, 2), (None, 2), "ab", None])
def test_bad_grid_is_refused(grid):
    with pytest.raises(ValueError, match=r"`grid(\[\d\])?` should be .*at least 1, found"):
        CQMix(grid)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf])
def test_bad_probability_is_refused(p):
    with pytest.raises(ValueError, match=r"`p` should be a finite number of at least 0 and at most 1, found"):
        CQMix(p=p)


IMAGE = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("restored", "target", "message"),
    [
        (IMAGE[0], IMAGE[0], r"`restored` should have shape \(N, C, H, W\), found \(3, 8, 8\)"),
        (IMAGE, IMAGE[0], r"`target` should have shape \(N, C, H, W\), found \(3, 8, 8\)"),
        (IMAGE, list(IMAGE), r"`target` should have shape \(N, C, H, W\), found list"),
        (list(IMAGE), IMAGE, r"`restored` should have shape \(N, C, H, W\), found list"),
        ([IMAGE[0], IMAGE], [IMAGE[0]] * 2, r"`restored\[1\]` should have shape \(C, H, W\), found \(2, 3, 8, 8\)"),
        ([IMAGE[0]], [0.5], r"`target\[0\]` should have shape \(C, H, W\), found float"),
        (IMAGE, IMAGE[:1], r"`target` should have the shape of `restored` \(2, 3, 8, 8\), found \(1, 3, 8, 8\)"),
        (IMAGE, IMAGE[:, :1], r"found \(2, 1, 8, 8\)"),
        (IMAGE, IMAGE[..., :7], r"found \(2, 3, 8, 7\)"),
        (
            [*IMAGE],
            [IMAGE[0], IMAGE[1, ..., :7]],
            r"`target\[1\]` should have the shape of `restored\[1\]` \(3, 8, 8\), found \(3, 8, 7\)",
        ),
        (
            [*IMAGE],
            [IMAGE[0]],
            r"`target` should be as many images as `restored` \(2\), found 1",
        ),
        ([IMAGE[0]], [*IMAGE], r"as many images as `restored` \(1\), found 2"),
        (IMAGE, IMAGE.to("meta"), "`target` should have the device of `restored` cpu, found meta"),
        (IMAGE.byte(), IMAGE, "`target` should have the dtype of `restored` torch.uint8, found floating"),
        (IMAGE, IMAGE.byte(), "`target` should have the dtype of `restored` floating, found torch.uint8"),
        (IMAGE.byte(), IMAGE.int(), "dtype of `restored` torch.uint8, found torch.int32"),
        (
            IMAGE[..., :3, :],
            IMAGE[..., :3, :],
            r"`grid` should have no more cells than `restored` has pixels, 3x8, found 4x4",
        ),
        (
            [IMAGE[0], IMAGE[1, ..., :3]],
            [IMAGE[0], IMAGE[1, ..., :3]],
            r"`grid` should have no more cells than `restored\[1\]` has pixels, 8x3, found 4x4",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused_by_name(restored, target, message):
    with pytest.raises(ValueError, match=message):
        CQMix()(restored, target)


def test_grid_as_large_as_the_image_is_a_coin_a_pixel():
    coins = draw_coins(200, (3, 5), 0.5)
    assert (coins[:, 1:] != coins[:, :-1]).any(dim=0).all() and (coins[..., 1:] != coins[..., :-1]).any(dim=0).all()


@pytest.mark.parametrize("pair", [(None, None), (3, 4), ([torch.rand(3, 8, 8)], None)])
def test_what_is_no_image_is_named(pair):
    with pytest.raises(ValueError, match="`restored` and `target` should be tensors, or lists of tensors"):
        CQMix()(*pair)


def test_with_a_generator_each_the_cells_of_a_sample_do_not_depend_on_its_batch():
    mix, (z, x) = CQMix((3, 2)), torch.rand(2, 4, 3, 9, 8)

    def generators(numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    mixed, mask = mix(z, x, generator=generators(range(4)), return_mask=True)
    for number in range(4):
        own = [number]
        alone = mix(z[own], x[own], generator=generators(own))
        in_a_list = mix([z[number]], [x[number]], generator=generators(own))
        assert torch.equal(alone, mixed[own])
        assert torch.equal(in_a_list[0], mixed[number])
    assert len({tuple(one.flatten().tolist()) for one in mask}) > 1
    with pytest.raises(ValueError, match="`generator` should be one, or one for each of 4, found 3"):
        mix(z, x, generator=generators(range(3)))


def calls(mix, restored, target, count):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(count):
            mix(restored, target)
    return [str(one.message) for one in told]


@pytest.mark.parametrize(
    ("of_restored", "of_target", "call"),
    [
        (lambda x: 255 * x, lambda x: x, 1),
        (lambda x: x, lambda x: 255 * x, 100),
        (lambda x: (x - 0.45) / 0.22, lambda x: x, 100),
        (lambda x: x, lambda x: (x - 0.45) / 0.22, 100),
    ],
)
def test_images_of_two_ranges_are_told_once(of_restored, of_target, call):
    mix, (restored, target) = CQMix(), pair()
    restored, target = of_restored(restored), of_target(target)
    assert calls(mix, restored, target, call - 1) == []
    (told,) = calls(mix, restored, target, 2)
    assert "`restored` spans" in told and "should be of one range" in told
    assert calls(mix, restored, target, 120) == []


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_restored_images_may_overshoot_and_begin_anywhere(scale):
    mix, (restored, target) = CQMix(), pair()
    assert calls(mix, (30 * restored - 15) * scale, target * scale, 1) == []
    assert calls(mix, (1.4 * restored - 0.2) * scale, target * scale, 120) == []
    assert calls(CQMix(), list(restored), list(target), 120) == []


def test_dark_flat_and_gray_images_are_of_one_range():
    restored, target = pair()
    assert calls(CQMix(), 0.1 * restored, 0.03 * target + 0.02, 120) == []
    assert calls(CQMix(), restored - 0.3, 0.004 * target + 0.5, 1) == []
    assert calls(CQMix(), 0 * restored + 0.5, target, 120) == []
    assert calls(CQMix(), 0.5 * restored, 1.3 * target - 0.3, 120) == []
    assert calls(CQMix(), list(restored), [0 * target[0], target[1]], 120) == []


def test_a_transform_of_functions_reads_no_values():
    restored, target = pair()
    with torch.random.fork_rng(devices=[]):
        mixed = torch.vmap(CQMix(), randomness="different")(restored[:, None], target[:, None])
    assert bool(((mixed == restored[:, None]) | (mixed == target[:, None])).all())
