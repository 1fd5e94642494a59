"""The latents of an autoencoder are normalized as its config says, in one place, and back."""

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from restoreloss import DiffLoss, LatentPrior, NoiseSchedule
from restoreloss.diffusion.latents import LatentEncoder, denormalize_latents, normalize_latents
from restoreloss.restorers import EDTR, UniRestore
from restoreloss.restorers.shapes import small_prompt, small_unet
from tests.helpers.networks import tiny_autoencoder, tiny_unet

MEAN, STD = [1.0, -2.0, 0.5, 3.0], [2.0, 4.0, 0.5, 8.0]
IMAGE = 2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1


def described(**config: Any) -> Any:
    return SimpleNamespace(**{"scaling_factor": 0.5, **config})


def by_channel(latents: torch.Tensor, scaling: float) -> torch.Tensor:
    """The formula in a loop."""
    return torch.stack([(latents[:, i] - MEAN[i]) / STD[i] * scaling for i in range(4)], dim=1)


@torch.no_grad()
def test_mean_and_deviation_of_each_channel() -> None:
    vae = tiny_autoencoder(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD).eval()
    expected = by_channel(vae.encode(IMAGE).latent_dist.mode(), 0.5)
    torch.testing.assert_close(LatentEncoder(vae)(IMAGE), expected)
    seen: list[torch.Tensor] = []

    def noise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    loss = DiffLoss(LatentPrior(vae, noise), h_space_weight=0)
    images = (IMAGE + 1) / 2
    loss(images, images, timestep=0, noise=torch.zeros_like(expected))
    signal = NoiseSchedule.linear().signal[0]
    torch.testing.assert_close(seen[0], signal * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        described(),
        described(shift_factor=0.25),
        described(latents_mean=None, latents_std=None, shift_factor=None),
        described(latents_mean=MEAN, latents_std=STD),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back(config: Any, dtype: torch.dtype) -> None:
    latents = torch.randn(2, 4, 3, 3, dtype=dtype)
    there = normalize_latents(latents, config)
    assert there.dtype == dtype and not torch.equal(there, latents)
    torch.testing.assert_close(denormalize_latents(there, config), latents)
    if getattr(config, "latents_mean", None) is not None:
        torch.testing.assert_close(there, by_channel(latents, 0.5))
    else:
        torch.testing.assert_close(there, (latents - (getattr(config, "shift_factor", None) or 0)) * 0.5)


@pytest.mark.parametrize(
    "config",
    [
        {"latents_mean": MEAN},
        {"latents_std": STD},
        {"latents_mean": MEAN, "latents_std": STD[:3]},
        {"latents_mean": MEAN, "latents_std": [1.0, 0.0, 1.0, 1.0]},
        {"latents_mean": [1.0, float("nan"), 1.0, 1.0], "latents_std": STD},
        {"latents_mean": 0.5, "latents_std": 2.0},
        {"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1},
    ],
)
def test_statistics_that_do_not_say_all_are_refused(config: dict[str, Any]) -> None:
    for turned in (normalize_latents, denormalize_latents):
        with pytest.raises(ValueError, match="should have `latents_mean` and `latents_std` of 4 numbers each"):
            turned(torch.ones(1, 4, 2, 2), described(**config))


@torch.no_grad()
def test_the_restorers_use_the_same_formula() -> None:
    vae = tiny_autoencoder(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD, norm_num_groups=4).eval()
    expected = by_channel(vae.encode(IMAGE).latent_dist.mode(), 0.5)
    image = vae.decode(vae.encode(IMAGE).latent_dist.mode()).sample / 2 + 0.5
    prior = LatentPrior(vae, small_unet(8), small_prompt(), schedule=NoiseSchedule.linear())
    edtr = EDTR(nn.Identity(), prior)
    latents = edtr.encode((IMAGE + 1) / 2)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(edtr.decode(latents), image, rtol=1e-4, atol=1e-4)
    blocks = [0] * (len(vae.config.block_out_channels) - 1)
    model = UniRestore(prior, adapters=False, cfrm_blocks=blocks, control_channels=8)
    latents, skips = model.encode((IMAGE + 1) / 2, restored=False)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(latents, skips, "see"), image, rtol=1e-4, atol=1e-4)


def autoencoders() -> dict[str, nn.Module]:
    halved = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    blocks = {"encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16)}
    return {
        "DC": diffusers.AutoencoderDC(
            latent_channels=4, **blocks, encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()), scaling_factor=0.5,
        ),
        "Tiny": diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), scaling_factor=0.5,
        ),
        "VQ": diffusers.VQModel(
            block_out_channels=(8, 16), **halved, norm_num_groups=4, latent_channels=4, vq_embed_dim=3,
            scaling_factor=0.5,
        ),
        "asymmetric": diffusers.AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 16),
            up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 16), norm_num_groups=4,
            scaling_factor=0.5,
        ),
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["DC", "Tiny", "VQ", "asymmetric"])
def test_other_autoencoders_of_diffusers(kind: str) -> None:
    vae: Any = autoencoders()[kind].eval()
    encoder, output = LatentEncoder(vae), vae.encode(IMAGE)
    raw = {
        "DC": lambda: output.latent, "Tiny": lambda: output.latents, "VQ": lambda: output.latents,
        "asymmetric": lambda: output.latent_dist.mode(),
    }[kind]()  # fmt: skip
    torch.testing.assert_close(encoder(IMAGE), 0.5 * raw)
    assert encoder.latent_channels == raw.shape[1]
    assert encoder.multiple == 16 // raw.shape[-1] == 2


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (None, "found None"),
        ("vae", "found the name 'vae': AutoencoderKL.from_pretrained"),
        (diffusers.AutoencoderKL, "found the class AutoencoderKL"),
        (tiny_unet(), r"found one that takes \(sample"),
        (lambda: 0, r"found one that takes \(\)"),
        (SimpleNamespace(config=1), "found SimpleNamespace"),
    ],
)
def test_what_is_no_autoencoder_is_refused(encoder: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"`encoder` should be .*{message}"):
        LatentEncoder(encoder)
    with pytest.raises(ValueError, match=f"`vae` should be .*{message}"):
        LatentPrior(encoder, tiny_unet())


def test_parts_of_a_latent_prior_in_the_wrong_places_are_named() -> None:
    with pytest.raises(ValueError, match=r"`unet` should be called as .* found a AutoencoderKL, which encodes images"):
        LatentPrior(lambda u: u, tiny_autoencoder())
    with pytest.raises(ValueError, match="`unet` should be a network, found the name 'some/unet': load_prior"):
        LatentPrior(tiny_autoencoder(), "some/unet")  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("shift", [None, 0.25])
def test_an_autoencoder_gives_its_mode_shifted_and_scaled(shift):
    model = tiny_autoencoder(scaling_factor=0.5, shift_factor=shift)
    mean, _ = model.quant_conv(model.encoder(IMAGE)).chunk(2, dim=1)
    encoder = LatentEncoder(model)
    torch.testing.assert_close(encoder(IMAGE), (mean - (shift or 0)) * 0.5)
    assert torch.equal(encoder(IMAGE), encoder(IMAGE))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_multiple_of_an_autoencoder_is_what_it_halves(levels):
    model = tiny_autoencoder(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    encoder = LatentEncoder(model)
    assert 16 // encoder(torch.rand(1, 3, 16, 16)).shape[-1] == encoder.multiple == 2 ** (levels - 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "encoder", [lambda u: u[:, :, ::2, ::2], nn.Conv2d(3, 4, 2, stride=2)], ids=["function", "module"]
)
def test_any_other_encoder_is_called_as_it_is(encoder):
    latent = LatentEncoder(encoder)
    assert torch.equal(latent(IMAGE), encoder(IMAGE))
    assert latent.multiple == 1


@pytest.mark.parametrize("make", [tiny_autoencoder, lambda: nn.Conv2d(3, 4, 2, stride=2)])
@pytest.mark.parametrize(("of_model", "of_image"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_latents_come_in_the_dtype_of_the_image(make, of_model, of_image):
    encoder = LatentEncoder(make().to(of_model))
    latents = encoder(IMAGE.to(of_image))
    assert latents.dtype == of_image
    expected = encoder(IMAGE.to(of_image).to(of_model))
    torch.testing.assert_close(latents, expected.to(of_image), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("make", [tiny_autoencoder, lambda: nn.Conv2d(3, 4, 2, stride=2)])
def test_gradients_reach_the_image_through_an_encoder(make):
    x = IMAGE.clone().requires_grad_()
    LatentEncoder(make().requires_grad_(False))(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_autoencoders_without_a_distribution_encode_too() -> None:
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    encoder = LatentEncoder(tiny)
    torch.testing.assert_close(encoder(image), tiny.encode(image).latents * tiny.config.scaling_factor)
    with pytest.raises(ValueError, match="3 channels for this encoder, found 1"):
        encoder(image[:, :1])


def parameters_held(loss: DiffLoss) -> int:
    """All parameters that can be reached from the loss, by whatever way."""
    seen: dict[int, Any] = {id(loss): loss}
    waiting: list[Any] = [loss]
    while waiting:
        for thing in gc.get_referents(waiting.pop()):
            if not isinstance(thing, type) and id(thing) not in seen and type(thing).__name__ != "module":
                seen[id(thing)] = thing
                waiting += [] if callable(thing) and not isinstance(thing, nn.Module) else [thing]
    return sum(thing.numel() for thing in seen.values() if isinstance(thing, nn.Parameter))


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_decoder_is_let_go(wrapped: bool) -> None:
    vae, unet = tiny_autoencoder().eval(), tiny_unet(in_channels=4, out_channels=4)
    expected = LatentEncoder(vae)(IMAGE)
    count = sum(p.numel() for part in (vae.encoder, vae.quant_conv, unet) for p in part.parameters())
    decoder = weakref.ref(vae.decoder)
    loss = DiffLoss(LatentPrior(vae, unet)) if wrapped else DiffLoss(unet, encoder=vae)
    images = (IMAGE + 1) / 2
    loss(images.clone().requires_grad_(), images).backward()
    assert parameters_held(loss) == count
    del vae
    gc.collect()
    assert decoder() is None
    assert loss._encoder is not None
    torch.testing.assert_close(loss._encoder.network(IMAGE), expected)
    assert copy.deepcopy(loss)(images, images) == 0


def test_an_autoencoder_that_is_still_used_keeps_its_decoder() -> None:
    vae = tiny_autoencoder().train()
    loss = DiffLoss(LatentPrior(vae, tiny_unet(in_channels=4, out_channels=4)))
    for part, used in ((vae.encoder, True), (vae.decoder, False)):
        assert all(p.requires_grad != used for p in part.parameters())
        assert all(module.training != used for module in part.modules())
    images = (IMAGE + 1) / 2
    loss(images.clone().requires_grad_(), images).backward()
    loss.double()
    assert {p.dtype for p in vae.parameters()} == {torch.float64}
    assert vae(IMAGE.double()).sample.shape == IMAGE.shape
    other = copy.deepcopy(loss).float()
    assert {p.dtype for p in vae.parameters()} == {torch.float64}
    assert other(images, images) == 0


def test_a_failed_first_call_gives_the_decoder_back_too() -> None:
    vae = tiny_autoencoder().train()
    loss = DiffLoss(LatentPrior(vae, tiny_unet(in_channels=4, out_channels=4)))
    with pytest.raises(ValueError, match="should have 3 channels"):
        loss(torch.rand(1, 2, 16, 16), torch.rand(1, 2, 16, 16))
    assert all(p.requires_grad for p in vae.parameters()) and all(module.training for module in vae.modules())


def test_what_else_encodes_is_kept_whole() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Conv2d(3, 4, 2, 2)

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            latents: torch.Tensor = self.decoder(u)
            return latents

    encoder = LatentEncoder(Own())
    assert encoder.without_decoder() is encoder
