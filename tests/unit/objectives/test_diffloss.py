import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from restoreloss import DiffLoss, NoiseSchedule, as_denoiser
from tests.helpers.networks import guided_unet, tiny_autoencoder, tiny_conditional_unet, tiny_unet

A, B = 0.7, 1.3


def linear(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return A * x_t, B * x_t


def pair(*shape: int, dtype: torch.dtype = torch.float32, low: float = 0.0) -> tuple[Tensor, Tensor]:
    """Random images in [low, 1]."""
    generator = torch.Generator().manual_seed(0)
    shape = shape or (3, 3, 8, 8)
    z, x = (low + (1 - low) * torch.rand(shape, generator=generator, dtype=dtype) for _ in range(2))
    return z.requires_grad_(), x


def loop_distance(difference: list[float], distance: str) -> float:
    squares = sum(d * d for d in difference)
    return {
        "mse": squares / len(difference),
        "rms": math.sqrt(squares / len(difference)),
        "l2": math.sqrt(squares),
        "l1": sum(abs(d) for d in difference) / len(difference),
    }[distance]


@pytest.mark.parametrize("distance", ["mse", "rms", "l2", "l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_denoiser_gives_the_closed_form(distance: str, reduction: str) -> None:
    z, x = pair(dtype=torch.float64)
    t = torch.tensor([0, 400, 999])
    loss = DiffLoss(linear, distance=distance, h_space_weight=0.5, reduction=reduction)
    abar = NoiseSchedule.linear().alphas_cumprod.double()[t]
    expected = []
    for i in range(3):
        # images in [0, 1] are seen in [-1, 1]: differences double; the shared noise cancels
        seen = [2 * abar[i].item() ** 0.5 * d for d in (z - x)[i].flatten().tolist()]
        noise = loop_distance([A * d for d in seen], distance)
        expected.append(noise + 0.5 * loop_distance([B * d for d in seen], distance))
    expected = torch.tensor(expected, dtype=torch.float64)
    expected = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]
    torch.testing.assert_close(loss(z, x, timestep=t), expected, rtol=1e-6, atol=0)


def test_gradient_of_mse_is_the_closed_form() -> None:
    z, x = pair(2, 3, 5, 7, dtype=torch.float64, low=-1)
    t = torch.tensor([100, 700])
    DiffLoss(linear, h_space_weight=0, input_range=(-1, 1), reduction="mean")(z, x, timestep=t).backward()
    abar = NoiseSchedule.linear().alphas_cumprod.double()[t].reshape(2, 1, 1, 1)
    torch.testing.assert_close(z.grad, 2 * A**2 * abar * (z.detach() - x) / z.numel(), rtol=1e-6, atol=0)


def test_against_the_equations_written_out_with_a_unet() -> None:
    unet, (z, x) = tiny_unet().double().eval(), pair(2, 3, 8, 8, dtype=torch.float64)
    taken: list[Tensor] = []
    unet.mid_block.register_forward_hook(lambda m, a, out: taken.append(out))
    noise, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([30, 600])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        abar = math.prod(1 - betas[s].item() for s in range(int(t[i]) + 1))
        z_t, x_t = (math.sqrt(abar) * (2 * u[i : i + 1] - 1) + math.sqrt(1 - abar) * noise[i : i + 1] for u in (z, x))
        noises = [unet(u, t[i]).sample for u in (z_t, x_t)]
        expected = expected + ((noises[0] - noises[1]) ** 2).mean() / 2
        expected = expected + 0.01 * ((taken[-2] - taken[-1]) ** 2).mean() / 2
    (gradient,) = torch.autograd.grad(expected, z)
    loss = DiffLoss(unet)
    value = loss(z, x, timestep=t, noise=noise)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(z.grad, gradient, rtol=1e-5, atol=1e-9)


def test_gradcheck_through_a_unet() -> None:
    unet = tiny_unet((4, 4)).double()
    loss = DiffLoss(unet, distance="rms", h_space_weight=0.3)
    z, x = pair(1, 3, 3, 2, dtype=torch.float64)
    noise = torch.randn(1, 3, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda u: loss(u, x, timestep=200, noise=noise), z, atol=1e-6)


@pytest.mark.parametrize("distance", ["mse", "rms", "l2", "l1"])
def test_both_terms_move_the_image(distance: str) -> None:
    z, x = pair(2, 3, 9, 6)
    loss = DiffLoss(tiny_unet(), distance=distance)
    for term in loss.terms(z, x, timestep=300).values():
        (gradient,) = torch.autograd.grad(term, z, retain_graph=True)
        assert (gradient != 0).float().mean() > 0.9


def test_a_gradient_step_lowers_the_loss_and_approaches_the_target_features() -> None:
    (z, x), loss = pair(2, 3, 8, 8), DiffLoss(tiny_unet())
    noise = torch.randn(2, 3, 8, 8)
    optimizer = torch.optim.SGD([z], lr=1.0)
    values = []
    for _ in range(20):
        value = loss(z, x, timestep=200, noise=noise)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


def test_noise_and_timestep_are_shared_and_drawn_anew() -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def spy(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append((x_t.detach(), t))
        return x_t

    z, x = pair(low=-1)
    loss = DiffLoss(spy, h_space_weight=0, input_range=(-1, 1), timesteps=(0, 1000))
    loss(z, x)
    (x_t, t_x), (z_t, t_z) = calls
    assert torch.equal(t_x, t_z)
    abar = NoiseSchedule.linear().alphas_cumprod[t_x].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(z_t - x_t, abar.sqrt() * (z.detach() - x), atol=1e-6, rtol=1e-5)
    loss(z, x)
    assert not torch.equal(calls[0][0], calls[2][0])


def test_the_target_passes_once_without_graph() -> None:
    graphs: list[bool] = []

    def spy(x_t: Tensor, t: Tensor) -> Tensor:
        graphs.append(torch.is_grad_enabled() and x_t.requires_grad)
        return x_t

    z, x = pair()
    DiffLoss(spy, h_space_weight=0)(z, x.requires_grad_()).backward()
    assert graphs == [False, True]
    assert x.grad is None


@pytest.mark.parametrize(("options", "ran"), [({"noise_weight": 0}, 0), ({"h_space_weight": 0}, 2), ({}, 2)])
def test_zero_weight_terms_cost_nothing(options: dict[str, float], ran: int) -> None:
    unet, calls = tiny_unet(), []
    unet.up_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    z, x = pair()
    terms = DiffLoss(unet, **options).terms(z, x)
    assert len(calls) == ran
    assert sorted(terms) == sorted({"noise", "h_space"} - {name.removesuffix("_weight") for name in options})


def test_terms_sum_to_the_call_and_each_is_weighted() -> None:
    z, x = pair()
    fixed = {"timestep": 200, "noise": torch.randn(3, 3, 8, 8)}
    once = DiffLoss(tiny_unet()).terms(z, x, **fixed)
    double = DiffLoss(tiny_unet(), noise_weight=2, h_space_weight=0.05)
    terms = double.terms(z, x, **fixed)
    assert torch.equal(sum(terms.values()), double(z, x, **fixed))
    torch.testing.assert_close(terms["noise"], 2 * once["noise"])
    torch.testing.assert_close(terms["h_space"], 5 * once["h_space"])


def test_mean_is_the_mean_of_the_samples_each_alone() -> None:
    z, x = pair(4, 3, 8, 8)
    noise, t = torch.randn(4, 3, 8, 8), torch.tensor([1, 10, 100, 900])
    unet = tiny_unet()
    whole = DiffLoss(unet, reduction="none")(z, x, timestep=t, noise=noise)
    alone = [DiffLoss(unet)(*(u[i : i + 1] for u in (z, x)), timestep=t[i], noise=noise[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(alone))
    torch.testing.assert_close(DiffLoss(unet)(z, x, timestep=t, noise=noise), whole.mean())
    torch.testing.assert_close(DiffLoss(unet, reduction="sum")(z, x, timestep=t, noise=noise), whole.sum())


def test_swapping_the_images_gives_the_same_value() -> None:
    z, x = (image.detach() for image in pair())
    loss, fixed = DiffLoss(tiny_unet()), {"timestep": 50, "noise": torch.randn(3, 3, 8, 8)}
    torch.testing.assert_close(loss(z, x, **fixed), loss(x, z, **fixed))


@pytest.mark.parametrize("input_range", [(0, 1), (-1, 1), (0, 255)])
def test_input_range_changes_nothing_but_the_scale_of_the_input(input_range: tuple[float, float]) -> None:
    z, x = (u.detach() for u in pair())
    low, high = input_range
    fixed = {"timestep": 50, "noise": torch.randn(3, 3, 8, 8)}
    unet = tiny_unet()
    scaled = (low + (high - low) * u for u in (z, x))
    value = DiffLoss(unet, input_range=input_range)(*scaled, **fixed)
    torch.testing.assert_close(value, DiffLoss(unet)(z, x, **fixed), rtol=1e-4, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from(["pad", "resize"]))
def test_any_size_gives_a_finite_loss_and_a_gradient(height: int, width: int, size: str) -> None:
    z, x = pair(1, 3, height, width)
    DiffLoss(tiny_unet(), size=size)(z, x, timestep=100).backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0


def test_padding_is_cropped_away() -> None:
    # a pointwise denoiser that must be fed multiples of 8: padding must not change its loss
    def pointwise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        assert x_t.shape[-2] % 8 == 0 and x_t.shape[-1] % 8 == 0
        return x_t.sin(), x_t.cos()

    denoiser = as_denoiser(pointwise)
    z, x = pair(2, 3, 11, 13)
    fixed = {"timestep": 100, "noise": torch.randn(2, 3, 11, 13)}
    expected = DiffLoss(lambda u, t: (u.sin(), u.cos()))(z, x, **fixed)
    denoiser.multiple = 8
    torch.testing.assert_close(DiffLoss(denoiser)(z, x, **fixed), expected)


def test_size_error_names_the_multiple() -> None:
    z, x = pair(1, 3, 10, 8)
    with pytest.raises(ValueError, match="multiples of 4.*10x8"):
        DiffLoss(tiny_unet(), size="error")(z, x)


@pytest.mark.parametrize("timesteps", [(5, 9), lambda n, generator: torch.randint(5, 9, (n,), generator=generator)])
def test_timesteps_stay_in_their_range_and_fill_it(timesteps: object) -> None:
    seen: list[int] = []

    def spy(x_t: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return x_t

    z, x = pair(64, 1, 1, 1)
    DiffLoss(spy, h_space_weight=0, timesteps=timesteps)(z, x)
    assert set(seen) == {5, 6, 7, 8}


def test_generator_fixes_the_result_and_leaves_the_global_state_alone() -> None:
    z, x = pair()
    loss, state = DiffLoss(linear), torch.get_rng_state()
    values = [loss(z, x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_are_compared_as_noise(prediction_type: str) -> None:
    z, x = pair(dtype=torch.float64, low=-1)
    schedule = NoiseSchedule.linear(prediction_type=prediction_type)
    t = torch.tensor([100, 400, 800])
    abar = schedule.alphas_cumprod.double()[t].reshape(-1, 1, 1, 1)
    difference = abar.sqrt() * (z - x)  # of z_t and x_t, in [-1, 1]
    if prediction_type == "v_prediction":  # noise = sqrt(abar) v + sqrt(1 - abar) x_t, and v = A x_t
        noise = (abar.sqrt() * A + (1 - abar).sqrt()) * difference
    else:  # noise = (x_t - sqrt(abar) A x_t) / sqrt(1 - abar)
        noise = (1 - abar.sqrt() * A) / (1 - abar).sqrt() * difference
    loss = DiffLoss(lambda u, t: A * u, schedule, h_space_weight=0, input_range=(-1, 1))
    torch.testing.assert_close(loss(z, x, timestep=t), noise.square().mean(), rtol=1e-5, atol=0)


def test_guided_diffusion_prior_with_its_own_checkpointing_gives_a_gradient() -> None:
    z, x = pair(2, 3, 8, 8)
    net = guided_unet(use_checkpoint=True)
    DiffLoss(net)(z, x, timestep=100).backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())


def test_conditioning_of_one_row_serves_every_batch() -> None:
    hidden = torch.randn(1, 4, 8)
    loss = DiffLoss(tiny_conditional_unet(), NoiseSchedule.scaled_linear(), conditioning=hidden)
    for n in (1, 3):
        z, x = pair(n, 3, 8, 8)
        loss(z, x).backward()
        assert z.grad.abs().sum() > 0


def test_latent_prior_encodes_both_and_differentiates_one() -> None:
    vae, unet = tiny_autoencoder(), tiny_unet(in_channels=4, out_channels=4)
    loss = DiffLoss(unet, encoder=vae)
    z, x = pair(2, 3, 17, 12)
    noise, t = torch.randn(2, 4, 9, 6), 100
    value = loss(z, x, timestep=t, noise=noise)
    value.backward()
    assert z.grad.abs().sum() > 0 and not any(p.requires_grad for p in vae.encoder.parameters())
    padded = [torch.nn.functional.pad(2 * u - 1, (0, 0, 0, 1), mode="reflect") for u in (z, x)]
    latents = [vae.encode(u).latent_dist.mode() * vae.config.scaling_factor for u in padded]
    expected = DiffLoss(unet, input_range=(-1, 1))(*latents, timestep=t, noise=noise)
    torch.testing.assert_close(value, expected)


def test_the_prior_is_frozen_hidden_and_in_eval_mode() -> None:
    unet = tiny_unet(dropout=0.5).train()
    loss = DiffLoss(unet)
    parent = nn.ModuleDict({"loss": loss, "net": nn.Conv2d(3, 3, 1)}).train()
    z, x = pair()
    assert loss(x, x).item() == 0  # dropout would show
    loss(z, x).backward()
    assert all(p.grad is None and not p.requires_grad for p in unet.parameters())
    assert list(loss.parameters()) == [] and loss.state_dict() == {}
    assert len(list(parent.parameters())) == 2


def test_follows_to_and_keeps_the_schedule_in_float32() -> None:
    unet = tiny_unet()
    loss = DiffLoss(unet).to(torch.bfloat16)
    assert next(unet.parameters()).dtype == torch.bfloat16
    z, x = pair()
    value = loss(z, x, timestep=5)
    value.backward()
    assert value.dtype == torch.float32 and z.grad.abs().sum() > 0


def bad(name: str) -> tuple[Tensor, Tensor]:
    z, x = (u.detach() for u in pair(2, 3, 8, 8))
    return {
        "shape": (z, x[:, :, :4]),
        "rank": (z[0], x[0]),
        "channels": (z[:, :1], x[:, :1]),
        "dtype": (z, (255 * x).byte()),
        "float64": (z, x.double()),
        "empty": (z[:0], x[:0]),
        "no pixels": (z[:, :, :0], x[:, :, :0]),
        "device": (z, x.to("meta")),
    }[name]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("shape", r"`target` should have the shape of `restored` \(2, 3, 8, 8\), found \(2, 3, 4, 8\)"),
        ("rank", r"`restored` should have shape \(N, C, H, W\), found \(3, 8, 8\)"),
        ("channels", r"`restored` should have shape \(N, 3, H, W\).*found \(2, 1, 8, 8\)"),
        ("dtype", "`target` should be floating point, found torch.uint8"),
        ("float64", "`target` should have the dtype of `restored` torch.float32, found torch.float64"),
        ("empty", "at least one image"),
        ("no pixels", "at least one image and one pixel"),
        ("device", "`target` should be on the device"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_name(case: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffLoss(tiny_unet())(*bad(case))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_weight": -1.0}, "`noise_weight`.*-1"),
        ({"h_space_weight": float("nan")}, "`h_space_weight`.*nan"),
        ({"noise_weight": 0, "h_space_weight": 0}, "both 0"),
        ({"distance": "L2"}, "`distance`.*'mse'.*'L2'"),
        ({"reduction": "avg"}, "`reduction`.*'avg'"),
        ({"size": "crop"}, "`size`.*'crop'"),
        ({"timesteps": (10, 2000)}, r"`timesteps`.*1000.*\(10, 2000\)"),
        ({"timesteps": (10, 10)}, "`timesteps`"),
        ({"timesteps": 5}, "`timesteps`.*found 5"),
        ({"timesteps": (0.1, 0.6)}, "`timesteps`.*two integers"),
        ({"input_range": (1, 0)}, "`input_range`"),
        ({"input_range": 255}, "`input_range`.*255"),
        ({"encoder": "vae"}, "`encoder`.*the name 'vae'"),
        ({"schedule": object()}, "alphas_cumprod.*object"),
    ],
)
def test_options_that_make_no_sense_are_refused_and_leave_the_unet_alone(options: dict, message: str) -> None:
    unet = tiny_unet().train()
    with pytest.raises(ValueError, match=message):
        DiffLoss(unet, **options)
    assert unet.training and all(p.requires_grad for p in unet.parameters())
    assert not unet.mid_block._forward_hooks


@pytest.mark.parametrize("timestep", [-1, 1000, torch.tensor([0, 1000]), torch.tensor([0, 1, 2]), torch.tensor([0.5])])
def test_timesteps_outside_the_schedule_or_the_batch_are_refused(timestep: object) -> None:
    z, x = pair(2, 3, 8, 8)
    with pytest.raises(ValueError, match="`timestep`"):
        DiffLoss(linear)(z, x, timestep=timestep)


def test_a_denoiser_without_bottleneck_is_refused_early_or_at_the_first_call() -> None:
    unet = tiny_unet(mid_block_type=None).train()
    with pytest.raises(ValueError, match="`h_space_weight` should be 0"):
        DiffLoss(unet)
    assert unet.training
    z, x = pair(2, 3, 8, 8)
    with pytest.raises(ValueError, match="no bottleneck.*h_space_weight=0"):
        DiffLoss(lambda u, t: u)(z, x)
    DiffLoss(unet, h_space_weight=0)(z, x).backward()
    assert z.grad.abs().sum() > 0


def test_noise_of_another_shape_is_refused() -> None:
    z, x = pair(2, 3, 8, 8)
    with pytest.raises(ValueError, match="`noise` should be"):
        DiffLoss(linear)(z, x, noise=torch.randn(1, 3, 8, 8))


def test_nan_pixels_give_nan_and_never_silence() -> None:
    z, x = pair(2, 3, 8, 8)
    bad = z.detach().clone()
    bad[1, 0, 0, 0] = float("nan")
    values = DiffLoss(tiny_unet(), reduction="none")(bad, x)
    assert values[0].isfinite() and values[1].isnan()


def test_a_0_to_255_image_warns_once() -> None:
    z, x = (255 * u for u in pair(2, 3, 8, 8))
    loss = DiffLoss(linear)
    with pytest.warns(UserWarning, match=r"input_range.*\(0, 1\)"):
        loss(z, x)
    loss(z, x)  # warnings of this library are errors in these tests


@pytest.mark.parametrize("h", [lambda u: u.mean((1, 2, 3)), lambda u: u.mean((2, 3)), lambda u: u[:, None]])
def test_a_bottleneck_may_have_any_shape_with_a_row_for_each_image(h: object) -> None:
    z, x = pair(3, 3, 4, 4, dtype=torch.float64, low=-1)
    loss = DiffLoss(lambda u, t: (u, h(u)), noise_weight=0, h_space_weight=1, input_range=(-1, 1))
    abar = NoiseSchedule.linear().alphas_cumprod[100].double()
    expected = abar * (h(z) - h(x)).square().mean()
    torch.testing.assert_close(loss(z, x, timestep=100), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("h", [lambda u: u.mean(), lambda u: u.transpose(0, 1)])
def test_a_bottleneck_without_a_row_for_each_image_is_refused(h: object) -> None:
    z, x = pair(2, 3, 4, 4)
    with pytest.raises(ValueError, match="bottleneck should have 2 rows"):
        DiffLoss(lambda u, t: (u, h(u)))(z, x)


def test_no_gradient_reaches_conditioning_or_noise() -> None:
    text = nn.Linear(8, 8)
    hidden = text(torch.ones(1, 4, 8))
    loss = DiffLoss(tiny_conditional_unet(), NoiseSchedule.scaled_linear(), conditioning=hidden)
    z, x = pair(2, 3, 8, 8)
    noise = torch.randn(2, 3, 8, 8, requires_grad=True)
    for _ in range(2):
        loss(z, x, noise=noise).backward()
    assert text.weight.grad is None
    assert noise.grad is None


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_timesteps_out_of_range_are_no_silence_under_compile(timestep: int) -> None:
    torch._dynamo.reset()
    z, x = pair(2, 3, 8, 8)
    compiled = torch.compile(DiffLoss(linear), backend="aot_eager")
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        compiled(z, x, timestep=torch.tensor([timestep, timestep]))


def test_the_schedule_lies_where_the_prior_lies() -> None:
    schedule = NoiseSchedule.linear()
    denoiser = as_denoiser(tiny_unet().to("meta"), schedule)
    assert denoiser.schedule.signal.is_meta
    assert not schedule.signal.is_meta


def test_images_and_prior_on_two_devices_are_refused_by_name() -> None:
    z, x = pair(2, 3, 8, 8)
    with pytest.raises(ValueError, match="`restored` should be on the denoiser's device meta, found cpu"):
        DiffLoss(tiny_unet().to("meta"))(z, x)


def test_dtype_is_that_of_the_first_floating_weight() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return self.scale * x_t

    z, x = pair(2, 3, 8, 8, low=-1)
    loss = DiffLoss(Quantised(), h_space_weight=0, input_range=(-1, 1))
    abar = NoiseSchedule.linear().alphas_cumprod[100]
    torch.testing.assert_close(loss(z, x, timestep=100), abar * (z - x).square().mean())


def test_a_denoiser_that_changes_its_timesteps_changes_only_its_own() -> None:
    def rude(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t * t.add_(1).reshape(-1, 1, 1, 1)

    z, x = pair(2, 3, 4, 4, low=-1)
    t = torch.tensor([3, 4])
    loss = DiffLoss(rude, h_space_weight=0, input_range=(-1, 1), reduction="none")
    abar = NoiseSchedule.linear().alphas_cumprod[t]
    expected = abar * (t + 1) ** 2 * (z - x).square().mean((1, 2, 3))
    torch.testing.assert_close(loss(z, x, timestep=t), expected)
    assert t.tolist() == [3, 4]


def test_a_sampler_that_returns_nonsense_is_named() -> None:
    z, x = pair(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"sampler `timesteps` should return integers of shape \(2,\), found \(3,\)"):
        DiffLoss(linear, timesteps=lambda n, generator: torch.zeros(3, dtype=torch.long))(z, x)


def test_a_latent_prior_without_its_encoder_says_so() -> None:
    z, x = pair(2, 3, 8, 8)
    with pytest.raises(ValueError, match="latent prior needs an `encoder`"):
        DiffLoss(tiny_unet(in_channels=4, out_channels=4))(z, x)
