"""Tiles of DiffLoss, weights of timesteps and cheaper priors, against all choices or on average."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from restoreloss import (
    DiffLoss,
    FlowLevels,
    LatentPrior,
    NoiseSchedule,
    Subsampled,
    WeightedSum,
    as_denoiser,
    audit,
    calibrate,
    small_prior,
)
from restoreloss.objectives.tiles import Tiles
from tests.helpers.networks import tiny_autoencoder, tiny_conditional_unet, tiny_transformer, tiny_unet


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pointwise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Sees one pixel at a time, and in its bottleneck blocks of four by four."""
    return 0.7 * x_t, F.avg_pool2d(x_t, 4).tanh()


def value_and_gradient(loss: nn.Module, z: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = loss(z, x, **options)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


# tiles


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.one_of(st.integers(1, 12), st.floats(0.05, 1.0)),
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.booleans(),
)  # fmt: skip
def test_all_tiles_together_are_the_image(
    height: int, width: int, crop: Any, multiple: int, cell: int, square: bool
) -> None:
    cell = min(cell, multiple)
    if isinstance(crop, int):
        crop = min(crop, height, width)
    padded = [side + -side % multiple for side in (height, width)]
    image = normal(1, 2, *padded).double()
    drawn = Tiles.draw(image, crop, valid=(height, width), multiple=multiple, square=square)
    assert all(side % multiple == 0 for side in drawn.size) and (not square or len(set(drawn.size)) == 1)
    choices = list(itertools.product(*(range(len(starts)) for starts in drawn.starts)))
    means = []
    for choice in choices:
        tiles = Tiles(drawn.size, drawn.starts, drawn.valid, tuple(torch.tensor([n]) for n in choice))  # type: ignore[arg-type]
        part = tiles.cut(image)
        row, column = drawn.starts[0][choice[0]], drawn.starts[1][choice[1]]
        assert torch.equal(part, image[:, :, row : row + drawn.size[0], column : column + drawn.size[1]])
        seen = F.avg_pool2d(part, cell)
        weights = tiles.weights(seen)
        means.append((seen if weights is None else weights * seen).mean())
    whole = F.avg_pool2d(image, cell)[..., : math.ceil(height / cell), : math.ceil(width / cell)]
    torch.testing.assert_close(torch.stack(means).mean(), whole.mean(), rtol=1e-5, atol=1e-6)


def test_a_tile_is_drawn_for_each_sample_and_all_are_as_likely() -> None:
    image = torch.arange(20.0).expand(6000, 1, 12, 20)
    generator = torch.Generator().manual_seed(0)
    tiles = Tiles.draw(image, 8, valid=(12, 20), multiple=4, generator=generator)
    assert tiles.size == (8, 8) and tiles.starts == ([0, 4], [0, 8, 12])  # 6, brought to a multiple of 4
    for chosen, starts in zip(tiles.chosen, tiles.starts, strict=True):
        counts = torch.bincount(chosen, minlength=len(starts)) / len(image)
        torch.testing.assert_close(counts, torch.full((len(starts),), 1 / len(starts)), atol=0.03, rtol=0)
    again = Tiles.draw(image, 8, valid=(12, 20), multiple=4, generator=torch.Generator().manual_seed(0))
    assert all(map(torch.equal, tiles.chosen, again.chosen))
    firsts = tiles.cut(image)[:, 0, 0, 0]
    assert torch.equal(firsts, torch.tensor([0.0, 8.0, 12.0])[tiles.chosen[1]])


@pytest.mark.parametrize("distance", ["mse", "l1"])
@pytest.mark.parametrize(("size", "crop"), [((16, 16), 0.5), ((12, 20), 8), ((13, 9), 4), ((8, 8), 8)])
def test_crops_are_right_on_average(distance: Any, size: tuple[int, int], crop: Any) -> None:
    denoiser = as_denoiser(pointwise)
    denoiser.multiple = 4
    whole, part = (DiffLoss(denoiser, h_space_weight=0.5, distance=distance, crop=c) for c in (None, crop))
    many = 3000
    z, x = (uniform(1, 1, *size, seed=seed).expand(many, -1, -1, -1) for seed in (0, 1))
    options: dict[str, Any] = {"timestep": 300, "generator": torch.Generator().manual_seed(0)}
    expected, gradient = value_and_gradient(whole, z[:1], x[:1], timestep=300, generator=options["generator"])
    if distance == "mse":  # of a pointwise function the noise cancels; of l1 too
        found, gradients = value_and_gradient(part, z, x, **options)
        assert abs(found / expected - 1) < 0.05
        error = (gradients.sum(0) - gradient[0]).norm() / gradient.norm()
        assert error < 0.15
    else:
        assert abs(value_and_gradient(part, z, x, **options)[0] / expected - 1) < 0.05


def test_a_crop_needs_a_mean_and_a_large_enough_image() -> None:
    with pytest.raises(ValueError, match="`crop` should go with the distance mse or l1.*found 'rms'"):
        DiffLoss(pointwise, crop=4, distance="rms")
    loss = DiffLoss(tiny_unet(), crop=16)
    with pytest.raises(ValueError, match="`crop` should be at most the size of the images 12x20, found 16"):
        loss(uniform(1, 3, 12, 20).requires_grad_(), uniform(1, 3, 12, 20))
    wrongs: list[Any] = [0, -1, 0.0, 1.5, True, "half", math.nan]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="`crop` should be an integer above 0 or a share"):
            DiffLoss(pointwise, crop=wrong)


def test_the_network_sees_the_crop_only() -> None:
    seen = []

    def watched(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t.shape)
        return x_t

    denoiser = as_denoiser(watched)
    denoiser.multiple = 8
    loss = DiffLoss(denoiser, h_space_weight=0, crop=20)
    z = uniform(2, 3, 50, 60).requires_grad_()
    loss(z, uniform(2, 3, 50, 60)).backward()
    assert set(seen) == {(2, 3, 24, 24)}
    loss.eval()(z, uniform(2, 3, 50, 60))
    assert seen[-1] == (2, 3, 56, 64)
    latent = DiffLoss(watched, h_space_weight=0, crop=0.5, encoder=tiny_autoencoder())
    latent(z, uniform(2, 3, 50, 60)).backward()
    assert seen[-1] == (2, 4, 12, 15)  # half of 50 and of 60, in steps of 2, and halved by the autoencoder


def test_crops_of_what_was_resized_and_of_squares() -> None:
    for size, shape in (("resize", (14, 22)), ("pad", (14, 22))):
        denoiser = as_denoiser(pointwise)
        denoiser.multiple = 4
        whole, part = (DiffLoss(denoiser, h_space_weight=0.0, size=size, crop=c) for c in (None, 8))  # type: ignore[arg-type]
        z, x = (uniform(1, 1, *shape, seed=seed).expand(3000, -1, -1, -1) for seed in (0, 1))
        expected = value_and_gradient(whole, z[:1], x[:1], timestep=300)[0]
        found = value_and_gradient(part, z, x, timestep=300, generator=torch.Generator().manual_seed(0))[0]
        assert float(found) == pytest.approx(float(expected), rel=0.03)
    dit = DiffLoss(tiny_transformer("DiT"), conditioning=torch.tensor([1]), crop=0.5)
    z = uniform(2, 3, 12, 20).requires_grad_()
    dit(z, uniform(2, 3, 12, 20, seed=1)).backward()
    assert z.grad is not None
    for sample in z.grad:  # a square, of half of the shorter side
        rows, columns = sample.any(0).any(1), sample.any(0).any(0)
        assert int(rows.sum()) == int(columns.sum()) == 6


def test_tiles_begin_at_steps_of_the_encoder() -> None:
    loss = DiffLoss(lambda x_t, t: x_t, h_space_weight=0.0, crop=12, encoder=lambda image: F.avg_pool2d(image, 4))
    z = uniform(2, 3, 30, 30).requires_grad_()
    with pytest.raises(ValueError, match="`crop` should give tiles at multiples of the encoder's step, 4 pixels"):
        loss(z, uniform(2, 3, 30, 30))
    loss(uniform(2, 3, 24, 36).requires_grad_(), uniform(2, 3, 24, 36))


# audits


def test_an_audit_sees_the_whole() -> None:
    z, x = uniform(2, 3, 16, 16), uniform(2, 3, 16, 16, seed=1)
    reports = []
    for crop, options in ((None, {}), (0.5, {"every": 4, "subset": 0.5})):
        loss: Any = Subsampled(DiffLoss(tiny_unet(), crop=crop), **options)
        objectives = WeightedSum({"pixel": nn.L1Loss(), "diff": loss})
        reports.append((audit(objectives, z, x, draws=3), calibrate(objectives, z, x, shares={"diff": 0.5})))
        assert loss.training and loss.calls == 0
    for one, other in zip(*(report for report, _ in reports), strict=True):
        assert one.gradient_norm == pytest.approx(other.gradient_norm) and not other.flags
    assert reports[0][1] == pytest.approx(reports[1][1])


# weights of timesteps


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5, 1.0])
def test_timesteps_are_weighed_by_their_signal_to_noise(power: float) -> None:
    schedule = NoiseSchedule.linear()
    abar = schedule.alphas_cumprod.double()
    snr = [float(a / (1 - a)) ** power for a in abar[100:600]]
    loss = DiffLoss(pointwise, timesteps=(100, 600), snr_power=power)
    plain = DiffLoss(pointwise, timesteps=(100, 600))
    z, x, noise = uniform(3, 3, 8, 8), uniform(3, 3, 8, 8, seed=1), torch.zeros(3, 3, 8, 8)
    for t in (100, 222, 599):
        weight = snr[t - 100] / (sum(snr) / len(snr))
        found, expected = (one(z, x, timestep=t, noise=noise) for one in (loss, plain))
        torch.testing.assert_close(found, weight * expected, rtol=1e-3, atol=0)


def test_a_power_of_minus_one_compares_denoised_images() -> None:
    schedule, unet = NoiseSchedule.linear(), tiny_unet().eval()
    loss = DiffLoss(unet, snr_power=-1.0, h_space_weight=0, timesteps=(50, 400))
    z, x, noise = uniform(2, 3, 8, 8), uniform(2, 3, 8, 8, seed=1), normal(2, 3, 8, 8)
    ratios = []
    for t in (50, 200, 399):
        with torch.no_grad():
            noisy = [schedule.add_noise(2 * image - 1, noise, t) for image in (z, x)]
            rest = [(y - unet(y, t).sample * schedule.sigma[t]) / schedule.signal[t] for y in noisy]
        # x0-hat moves by the image itself less what the noise explains of it: compare the explained part
        explained = [one - y / schedule.signal[t] for one, y in zip(rest, noisy, strict=True)]
        ratios.append(float(loss(z, x, timestep=t, noise=noise) / F.mse_loss(*explained)))
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "power"),
    [
        ({"schedule": FlowLevels.uniform()}, -1.0),
        ({"schedule": NoiseSchedule.from_diffusers(DDPMScheduler(rescale_betas_zero_snr=True))}, -1.0),
        ({}, math.nan),
        ({}, math.inf),
    ],
)
def test_weights_that_are_not_finite_are_refused(options: dict[str, Any], power: float) -> None:
    with pytest.raises(
        ValueError, match="`snr_power` should (give finite weights over `timesteps`|be a finite number)"
    ):
        DiffLoss(pointwise, snr_power=power, **options)


# what is compared


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_a_prediction_may_be_compared_as_it_is(kind: Any) -> None:
    schedule = NoiseSchedule.linear(prediction_type=kind)
    unet = tiny_unet().eval()
    z, x, noise = uniform(2, 3, 8, 8), uniform(2, 3, 8, 8, seed=1), normal(2, 3, 8, 8)
    with torch.no_grad():
        noisy = [schedule.add_noise(2 * image - 1, noise, 300) for image in (z, x)]
        raw = [unet(y, 300).sample for y in noisy]
        turned = [schedule.to_noise(out, y, 300) for out, y in zip(raw, noisy, strict=True)]
    for compare, pair in (("native", raw), ("noise", turned)):
        loss = DiffLoss(unet, schedule, compare=compare, h_space_weight=0)  # type: ignore[arg-type]
        torch.testing.assert_close(loss(z, x, timestep=300, noise=noise), F.mse_loss(*pair))
    with pytest.raises(ValueError, match=r"`compare` should be one of \('noise', 'native'\), found 'velocity'"):
        DiffLoss(unet, compare="velocity")  # type: ignore[arg-type]


def test_stable_diffusion_3_is_read_as_a_flow() -> None:
    model = tiny_transformer("SD3").eval()
    states, pooled = normal(1, 4, 6), normal(1, 5, seed=1)
    conditioning = {"encoder_hidden_states": states, "pooled_projections": pooled}
    z, x, noise, t = uniform(2, 3, 8, 8), uniform(2, 3, 8, 8, seed=1), normal(2, 3, 8, 8), torch.tensor([100, 800])
    s = 3 * (t + 1) / (1000 + 2 * (t + 1))
    level = s[:, None, None, None]
    with torch.no_grad():
        velocity = [
            model(
                (1 - level) * (2 * image - 1) + level * noise, timestep=1000 * s,
                encoder_hidden_states=states.expand(2, -1, -1), pooled_projections=pooled.expand(2, -1),
            ).sample
            for image in (z, x)
        ]  # fmt: skip
    loss = DiffLoss(model, conditioning=conditioning, compare="native", h_space_weight=0)
    torch.testing.assert_close(loss(z, x, timestep=t, noise=noise), F.mse_loss(*velocity), rtol=1e-4, atol=1e-6)
    difference = (1 - level) * (velocity[0] - velocity[1]) + (1 - level) * 2 * (z - x)
    converted = DiffLoss(model, conditioning=conditioning, h_space_weight=0)(z, x, timestep=t, noise=noise)
    torch.testing.assert_close(converted, difference.square().mean(), rtol=1e-4, atol=1e-6)


# the network


def test_a_prior_in_half_precision_is_compared_in_single() -> None:
    whole, half = DiffLoss(tiny_unet()), DiffLoss(tiny_unet().to(torch.bfloat16))
    assert {p.dtype for p in half._denoiser.network.parameters()} == {torch.bfloat16}
    z, x, options = (
        uniform(2, 3, 16, 16),
        uniform(2, 3, 16, 16, seed=1),
        {"timestep": 300, "noise": normal(2, 3, 16, 16)},
    )
    (one, g), (other, h) = (value_and_gradient(loss, z, x, **options) for loss in (whole, half))
    assert other.dtype == torch.float32 and h.dtype == torch.float32
    assert float(other) == pytest.approx(float(one), rel=0.05)
    assert torch.cosine_similarity(g.flatten(), h.flatten(), dim=0) > 0.99


def test_recomputing_blocks_changes_nothing_but_memory() -> None:
    plain, again = tiny_unet(), tiny_unet()
    whole, less = DiffLoss(plain), DiffLoss(again, checkpointing=True)
    assert again.is_gradient_checkpointing and not plain.is_gradient_checkpointing
    z, x, options = (
        uniform(2, 3, 16, 16),
        uniform(2, 3, 16, 16, seed=1),
        {"timestep": 300, "noise": normal(2, 3, 16, 16)},
    )
    kept: dict[DiffLoss, int] = {}
    for loss in (whole, less):
        count = 0

        def keep(value: Tensor) -> Tensor:
            nonlocal count
            count += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss(z.clone().requires_grad_(), x, **options)
        kept[loss] = count
    assert kept[less] < 0.5 * kept[whole]
    for one, other in zip(
        value_and_gradient(whole, z, x, **options), value_and_gradient(less, z, x, **options), strict=True
    ):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="`checkpointing` should be False for function"):
        DiffLoss(pointwise, checkpointing=True)


# latents


def test_a_latent_prior_is_its_parts() -> None:
    schedule, states = NoiseSchedule.scaled_linear(), normal(1, 4, 8)
    unet = tiny_conditional_unet(in_channels=4, out_channels=4)
    parts = DiffLoss(unet, schedule, conditioning=states, encoder=tiny_autoencoder(shift_factor=0.1))
    prior = LatentPrior(tiny_autoencoder(shift_factor=0.1), unet, states, schedule=schedule)
    z, x, options = uniform(2, 3, 18, 15), uniform(2, 3, 18, 15, seed=1), {"timestep": 300, "noise": normal(2, 4, 9, 8)}
    for one, other in zip(
        value_and_gradient(parts, z, x, **options), value_and_gradient(DiffLoss(prior), z, x, **options), strict=True
    ):
        assert torch.equal(one, other) and other.any()


def test_a_latent_prior_of_parts_that_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="`unet` should read the 4 channels of the latents of `vae`, found one.* 3"):
        LatentPrior(tiny_autoencoder(), tiny_unet())
    with pytest.raises(ValueError, match=r"hidden states of .*tokens, 8\).*found a tensor of shape \(1, 4, 6\)"):
        LatentPrior(
            tiny_autoencoder(), tiny_conditional_unet(in_channels=4, out_channels=4), normal(1, 4, 6),
            schedule=NoiseSchedule.scaled_linear(),
        )  # fmt: skip
    prior = LatentPrior(tiny_autoencoder(), tiny_unet(in_channels=4, out_channels=4))
    for options in ({"encoder": tiny_autoencoder()}, {"schedule": NoiseSchedule.linear()}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` should be None for a LatentPrior"):
            DiffLoss(prior, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_less_work_has_the_gradient_of_the_whole_on_average() -> None:
    """A quarter of an image of the small prior, 80 times, beside the whole 40 times, over the same timesteps."""
    z = uniform(1, 3, 32, 32)
    x = (z + 0.1 * normal(1, 3, 32, 32)).clamp(0, 1)
    prior = small_prior()
    sums = []
    for options, draws in (({}, 40), ({"crop": 0.5}, 80)):
        loss: Any = DiffLoss(prior, timesteps=(100, 600), **options)
        generator = torch.Generator().manual_seed(0)
        sums.append(sum(value_and_gradient(loss, z, x, generator=generator)[1] for _ in range(draws)))
    one, other = sums
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9


# no derivative of the denoiser


@pytest.mark.parametrize("distance", ["mse", "l1", "rms", "l2"])
def test_without_the_jacobian_the_gradient_is_that_of_the_definition(distance: str) -> None:
    network = tiny_unet().double()
    whole, without = (
        DiffLoss(copy.deepcopy(network), h_space_weight=0, distance=distance, jacobian=jacobian)
        for jacobian in (True, False)
    )
    z, x, noise = uniform(2, 3, 8, 8).double(), uniform(2, 3, 8, 8, seed=1).double(), normal(2, 3, 8, 8).double()
    t = torch.tensor([100, 700])
    schedule = NoiseSchedule.linear()
    with torch.no_grad():
        denoise = as_denoiser(network)
        z_t, x_t = (schedule.add_noise(2 * image - 1, noise, t) for image in (z, x))
        offset = denoise(z_t, t) - z_t - denoise(x_t, t) + x_t

    def definition(image: Tensor) -> Tensor:
        difference = schedule.add_noise(2 * image - 1, noise, t) + offset - x_t
        flat = difference.flatten(1)
        per_sample = {
            "mse": flat.square().mean(dim=1), "l1": flat.abs().mean(dim=1),
            "rms": flat.square().mean(dim=1).sqrt(), "l2": flat.norm(dim=1),
        }  # fmt: skip
        return per_sample[distance].mean()

    options = {"timestep": t, "noise": noise}
    value, gradient = value_and_gradient(without, z, x, **options)
    torch.testing.assert_close(value, whole(z, x, **options))
    (expected,) = torch.autograd.grad(definition(image := z.clone().requires_grad_()), image)
    torch.testing.assert_close(gradient, expected)
    assert torch.autograd.gradcheck(definition, (z.clone().requires_grad_(),))
    assert (
        F.cosine_similarity(gradient.flatten(), value_and_gradient(whole, z, x, **options)[1].flatten(), dim=0) < 0.99
    )


def test_without_the_jacobian_no_graph_of_the_denoiser_is_kept() -> None:
    saved = []
    loss = DiffLoss(tiny_unet(), h_space_weight=0, jacobian=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        loss(uniform(1, 3, 16, 16).requires_grad_(), uniform(1, 3, 16, 16, seed=1))
    assert sum(saved) <= 6 * 3 * 16 * 16


@pytest.mark.parametrize(
    "options", [{}, {"h_space_weight": 0, "compare": "native"}, {"h_space_weight": 0, "checkpointing": True}]
)
def test_without_the_jacobian_only_the_predicted_noise_is_compared(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`jacobian=False` should go with `h_space_weight=0`"):
        DiffLoss(tiny_unet(), jacobian=False, **options)
