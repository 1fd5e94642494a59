"""What a file of weights does not say is taken from the published model that it is, or asked for: never guessed."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from safetensors.torch import save_file
from torch import Tensor

from restoreloss import Denoiser, DiffLoss, LatentPrior, NoiseSchedule, load_prior, null_text, partial_diffusion
from restoreloss.diffusion import layouts
from tests.helpers.adm import ADM
from tests.helpers.checkpoints import NOISY, T, adm
from tests.helpers.networks import tiny_unet
from tests.unit.diffusion.test_checkpoints import V2, XL, latent_model, latent_weights

# widths of heads

ATTENDS = {"attention": (1, 2, 3)}
IMPROVED = {"updown": False, "channels": 128, "blocks": 3}
LSUN = {"updown": False, "scale_shift": False, "channels": 128, "mults": (1, 1, 2, 2, 4, 4), "attention": (4,)}
PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "64x64": ({"channels": 192, "mults": (1, 2, 3, 4), "blocks": 3, **ATTENDS, "classes": 1000}, 64),
    "128x128": ({"channels": 256, "mults": (1, 1, 2, 3, 4), "attention": (2, 3, 4), "classes": 1000}, None),
    "256x256": ({"channels": 256, "mults": (1, 1, 2, 2, 4, 4), "attention": (3, 4, 5)}, 64),
    "256x256, classes": ({"channels": 256, "mults": (1, 1, 2, 2, 4, 4), "attention": (3, 4, 5), "classes": 1000}, 64),
    "FFHQ": ({"channels": 128, "mults": (1, 1, 2, 2, 4, 4), "attention": (4,), "blocks": 1}, 64),
    "CIFAR-10": ({**IMPROVED, "mults": (1, 2, 2, 2), "attention": (1, 2)}, 64),
    "ImageNet-64": ({**IMPROVED, "mults": (1, 2, 3, 4), "attention": (2, 3)}, None),
    "ImageNet-64, classes": ({**IMPROVED, "channels": 192, "mults": (1, 2, 3, 4), "attention": (2, 3)}, None),
    "bedroom": (LSUN, 512),
}


def weightless(**options: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return ADM(**options).state_dict()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_recognized(name: str) -> None:
    options, width = PUBLISHED[name]
    weights = weightless(**options)
    if width is None:
        with pytest.raises(
            ValueError, match="four heads of any width .* give DiffLoss the U-Net of its own repository"
        ):
            layouts.guided_diffusion(weights, head_channels=None, grouped_heads=None)
        return
    unet, schedule = layouts.guided_diffusion(weights, head_channels=None, grouped_heads=None)
    assert unet.config["attention_head_dim"] == width
    expected = {
        "64x64": NoiseSchedule.cosine().alphas_cumprod,
        "CIFAR-10": NoiseSchedule.cosine(4000).alphas_cumprod[::4],  # told t / 4
    }.get(name, NoiseSchedule.linear().alphas_cumprod)
    assert torch.equal(schedule.alphas_cumprod, expected)


@pytest.mark.parametrize(
    "change",
    [{"blocks": 1}, {"attention": (3,)}, {"updown": False}, {"scale_shift": False}, {"mults": (1, 2, 4, 4)}],
    ids=str,
)
def test_of_any_other_the_width_of_its_heads_is_asked_for(change: dict[str, Any]) -> None:
    weights = weightless(**(PUBLISHED["64x64"][0] | change))
    with pytest.raises(ValueError, match="`head_channels` should be given .* `num_heads`.* `grouped_heads=False`"):
        layouts.guided_diffusion(weights, head_channels=None, grouped_heads=None)
    unet, schedule = layouts.guided_diffusion(weights, head_channels=48, grouped_heads=None)
    assert unet.config["attention_head_dim"] == 48
    assert torch.equal(schedule.alphas_cumprod, NoiseSchedule.linear().alphas_cumprod)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_number_of_heads_is_read_right_or_asked_for(heads: int, tmp_path: Path) -> None:
    net = adm(width=64 // heads)  # of 64 channels in all of its attentions, as num_heads makes them
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="`head_channels` should be given"):
        load_prior(tmp_path / "net.pt")
    prior = load_prior(tmp_path / "net.pt", head_channels=64 // heads)
    assert isinstance(prior, Denoiser)
    with torch.no_grad():
        torch.testing.assert_close(prior(NOISY, T), net(NOISY, T)[:, :3], rtol=1e-4, atol=1e-4)


def test_what_a_published_model_says_is_used_and_what_is_given_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = adm(grouped=False)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    one = layouts.Published(
        "this", (32, 64, 64), 2, (1, 2), head_channels=16, grouped_heads=False, schedule=NoiseSchedule.cosine
    )
    monkeypatch.setattr(layouts, "PUBLISHED", (one,))
    cosine, linear = NoiseSchedule.cosine(), NoiseSchedule.linear()
    for options, expected in (
        ({}, cosine), ({"head_channels": 16}, cosine), ({"schedule": linear}, linear),
        ({"head_channels": 32}, linear), ({"grouped_heads": True}, cosine),
    ):  # fmt: skip
        prior = load_prior(tmp_path / "net.pt", **options)
        assert isinstance(prior, Denoiser)
        assert torch.equal(prior.schedule.alphas_cumprod, expected.alphas_cumprod)
        with torch.no_grad():
            same = torch.allclose(prior(NOISY, T), net(NOISY, T)[:, :3], rtol=1e-4, atol=1e-4)
        assert same == ("grouped_heads" not in options and options.get("head_channels", 16) == 16)


def test_a_classifier_of_guided_diffusion_is_told(tmp_path: Path) -> None:
    weights = {name: value for name, value in adm().state_dict().items() if not name.startswith("output_blocks")}
    torch.save(weights, tmp_path / "classifier.pt")
    with pytest.raises(ValueError, match="should have output_blocks, found none: is this a classifier"):
        load_prior(tmp_path / "classifier.pt", head_channels=16)


# what is predicted

WORDS = torch.zeros(1, 5, 12)
XL_WORDS = {
    "encoder_hidden_states": WORDS,
    "added_cond_kwargs": {"text_embeds": torch.ones(1, 10), "time_ids": torch.ones(1, 6)},
}
V, ZERO = {"v_pred": torch.tensor([])}, {"ztsnr": torch.tensor([])}


@pytest.fixture(scope="module")
def xl() -> dict[str, Tensor]:
    unet, vae = latent_model(**XL)
    return {key: value.contiguous() for key, value in latent_weights(unet, vae, [False, True]).items()}


def schedule_of(file: Path, **options: Any) -> NoiseSchedule:
    prior = load_prior(file, **{"conditioning": XL_WORDS, **options})
    assert isinstance(prior, LatentPrior)
    return prior.denoiser.schedule


def test_markers_in_a_file_are_read(xl: dict[str, Tensor], tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    file = tmp_path / "xl.safetensors"
    table = NoiseSchedule.scaled_linear().alphas_cumprod
    abar = table.double()
    betas = rescale_zero_terminal_snr(1 - torch.cat([abar[:1], abar[1:] / abar[:-1]]))
    zero = torch.cumprod(1 - betas, 0).float()
    for marks, prediction, expected in (
        ({}, "epsilon", table), (V, "v_prediction", table), (ZERO, "epsilon", zero), (V | ZERO, "v_prediction", zero),
    ):  # fmt: skip
        save_file(xl | marks, file)
        schedule = schedule_of(file)
        assert schedule.prediction_type == prediction
        torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-5, atol=1e-7)
    assert not recwarn.list


def test_what_is_given_wins_over_markers_and_says_so(xl: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "xl.safetensors"
    save_file(xl | V | ZERO, file)
    v = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    with pytest.warns(UserWarning, match="has the key 'v_pred', and is read as 'epsilon', as you say"):
        schedule = schedule_of(file, prediction_type="epsilon")
    assert (schedule.prediction_type, float(schedule.alphas_cumprod[-1])) == ("epsilon", 0.0)
    with pytest.warns(UserWarning, match="has the key 'ztsnr', and is read with a schedule that ends with signal"):
        assert schedule_of(file, schedule=v) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert schedule_of(file, schedule=v.zero_terminal_snr()).prediction_type == "v_prediction"
        assert schedule_of(file, prediction_type="v_prediction").alphas_cumprod[-1] == 0
        # a table does not say what is predicted; the file does
        assert schedule_of(file, schedule=v.zero_terminal_snr().alphas_cumprod).prediction_type == "v_prediction"
    save_file(xl, file)
    table = v.alphas_cumprod.numpy()
    assert schedule_of(file, schedule=table, prediction_type="sample").prediction_type == "sample"
    with pytest.raises(ValueError, match="`prediction_type` should be that of `schedule`, 'v_prediction', or left out"):
        schedule_of(file, schedule=v, prediction_type="epsilon")


@pytest.mark.parametrize("marker", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_file_of_edm_is_refused(xl: dict[str, Tensor], marker: str, tmp_path: Path) -> None:
    save_file(xl | {marker: torch.ones(4)}, tmp_path / "edm.safetensors")
    with pytest.raises(ValueError, match=f"found one of EDM .it has the key {marker}"):
        load_prior(tmp_path / "edm.safetensors", conditioning=XL_WORDS)


def test_stable_diffusion_2_is_asked_unless_its_file_says(tmp_path: Path) -> None:
    unet, vae = latent_model(**{**V2, "cross_attention_dim": 1024})
    weights, states = latent_weights(unet, vae, [False, True]), torch.zeros(1, 2, 1024)

    def read(contents: Any, **options: Any) -> str:
        torch.save(contents, tmp_path / "sd2.ckpt")
        return schedule_of(tmp_path / "sd2.ckpt", conditioning=states, **options).prediction_type

    for contents in (weights, {"state_dict": weights}, {"state_dict": weights, "global_step": 140000}):
        with pytest.raises(ValueError, match="`prediction_type` should be given for sd2.ckpt, a Stable Diffusion 2"):
            read(contents)
        assert read(contents, prediction_type="v_prediction") == "v_prediction"
        assert read(contents, schedule=NoiseSchedule.scaled_linear()) == "epsilon"
    assert read({"state_dict": weights, "global_step": 875000}) == "epsilon"
    assert read(weights | V) == "v_prediction"


def test_a_prior_without_signal_at_its_end_gives_finite_losses(xl: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(xl | V | ZERO, tmp_path / "xl.safetensors")
    prior = load_prior(tmp_path / "xl.safetensors", conditioning=XL_WORDS)
    assert isinstance(prior, LatentPrior)
    z, x = torch.rand(2, 1, 3, 16, 16)
    for t in (0, 998, 999):
        z = z.detach().requires_grad_()
        value = DiffLoss(prior)(z, x, timestep=t)
        value.backward()
        assert value.isfinite() and z.grad is not None and z.grad.isfinite().all()
    latents = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="`steps` should be at most 998, the last level of this schedule that holds"):
        partial_diffusion(prior.denoiser, latents, [999, 500])
    assert partial_diffusion(prior.denoiser, latents, [998, 500]).isfinite().all()


# arguments of another kind


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (None, {}, "`source` should be a folder, a file or a name on the hub, found None"),
        ("", {}, "`source` should be a folder, a file or a name on the hub, found ''"),
        (3, {}, "`source` should be .* found 3"),
        (numpy.ones(2), {}, "`source` should be .* found a numpy array"),
        (tiny_unet(), {}, "`source` should be .* found a UNet2DModel: DiffLoss takes it as it is"),
        (diffusers.UNet2DModel, {}, "`source` should be .* found the class UNet2DModel"),
        (["a.pt"], {}, "`source` should be .* found list"),
        ("net.pt", {"prediction_type": "v"}, "`prediction_type` should be one of .* found 'v'"),
        ("net.pt", {"head_channels": 64.0}, "`head_channels` should be a whole number of at least 1, found 64.0"),
        ("net.pt", {"head_channels": "64"}, "`head_channels` should be a whole number"),
        ("net.pt", {"grouped_heads": "no"}, "`grouped_heads` should be True, False or None, found 'no'"),
        ("net.pt", {"schedule": "linear"}, "A schedule should be .* found 'linear'"),
        ("net.pt", {"schedule": NoiseSchedule.linear}, "A schedule should be .* found the function linear"),
        ("net.pt", {"conditioning": "a photo"}, "`conditioning` should be a tensor or a mapping"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_read(source: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prior(source, **options)
    if not options:
        with pytest.raises(ValueError, match=message):
            null_text(source)
