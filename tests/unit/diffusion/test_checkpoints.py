"""load_prior from files: guided-diffusion and latent diffusion."""

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from restoreloss import DiffLoss, LatentPrior, NoiseSchedule, load_prior
from tests.helpers.checkpoints import NOISY, T, adm, denoiser

# guided-diffusion


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "pt"),
        ({}, "safetensors"),
        ({}, "nested"),
        ({}, "half"),
        ({"updown": False}, "pt"),
        ({"scale_shift": False}, "pt"),
        ({"grouped": False}, "pt"),
        ({"blocks": 1, "mults": (1, 1, 2, 2), "attention": (3,)}, "pt"),
        ({"mults": (1,), "attention": (0,), "width": 8}, "pt"),
        ({"attention": (), "width": 32}, "pt"),
        ({"out_channels": 3, "classes": 7}, "pt"),
    ],
    ids=str,
)
def test_guided_diffusion_is_numerically_the_same(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    net = adm(**options)
    weights = net.state_dict()
    file = tmp_path / f"net.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(weights, file)
    elif kind == "nested":
        torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}, "step": 3}, file)
    else:
        torch.save({key: value.half() for key, value in weights.items()} if kind == "half" else weights, file)
        net = net.half().float() if kind == "half" else net
    labels = torch.tensor([3]) if "classes" in options else None
    prior = denoiser(
        load_prior(
            file, head_channels=options.get("width", 16), grouped_heads=options.get("grouped", True),
            conditioning=labels,
        )
    )  # fmt: skip
    assert isinstance(prior.model, diffusers.UNet2DModel) and not prior.model.training
    assert {p.dtype for p in prior.parameters()} == {torch.float32}
    assert prior.multiple == 2 ** (len(options.get("mults", (1, 2, 2))) - 1)
    of_labels = () if labels is None else (labels.expand(2),)
    with torch.no_grad():
        expected = net(NOISY, T, *of_labels)[:, :3]
        assert (prior(NOISY, T) - expected).abs().max() < 1e-5 * expected.abs().max()
        # in float64 they are equal but for its rounding
        found, expected = prior.double()(NOISY.double(), T), net.double()(NOISY.double(), T, *of_labels)[:, :3]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    prior.float().model.save_pretrained(tmp_path / "saved")  # and it is a model of diffusers from now on
    again = denoiser(load_prior(tmp_path / "saved", conditioning=labels))
    torch.testing.assert_close(again(NOISY, T), prior(NOISY, T))


def test_what_the_file_does_not_say_matters(tmp_path: Path) -> None:
    torch.save(adm().state_dict(), tmp_path / "net.pt")
    right = denoiser(load_prior(tmp_path / "net.pt", head_channels=16))(NOISY, T)
    for options in ({"head_channels": 32}, {"head_channels": 16, "grouped_heads": False}):
        wrong = denoiser(load_prior(tmp_path / "net.pt", **options))(NOISY, T)  # type: ignore[arg-type]
        assert (wrong - right).abs().max() > 0.01
    with pytest.raises(ValueError, match="`head_channels` should divide the 64 channels of each attention, found 48"):
        load_prior(tmp_path / "net.pt", head_channels=48)


def test_a_guided_diffusion_prior_is_used_as_it_was_trained(tmp_path: Path) -> None:
    torch.save(adm().state_dict(), tmp_path / "net.pt")
    prior = denoiser(load_prior(tmp_path / "net.pt", head_channels=16))
    assert torch.equal(prior.schedule.alphas_cumprod, NoiseSchedule.linear().alphas_cumprod)
    assert prior.has_bottleneck and prior.in_channels == 3
    loss = DiffLoss(prior)
    z = torch.rand(1, 3, 15, 17, requires_grad=True)
    loss(z, torch.rand(1, 3, 15, 17)).backward()
    assert z.grad is not None and z.grad.any()
    cosine = denoiser(load_prior(tmp_path / "net.pt", head_channels=16, schedule=NoiseSchedule.cosine()))
    assert torch.equal(cosine.schedule.alphas_cumprod, NoiseSchedule.cosine().alphas_cumprod)


def test_guided_diffusion_that_no_unet2dmodel_can_be_is_refused(tmp_path: Path) -> None:
    torch.save(adm().state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="`head_channels` should be a whole number of at least 1, found 0"):
        load_prior(tmp_path / "net.pt", head_channels=0)
    torch.save(adm(channels=64, mults=(0.5, 1), attention=(1,)).state_dict(), tmp_path / "half.pt")
    with pytest.raises(ValueError, match="embeds time in as many channels as its first level has, 32, found 64"):
        load_prior(tmp_path / "half.pt")


# latent diffusion

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def unet_key(key: str, layers: int, attends: list[bool]) -> str:
    """The name that the U-Net of latent diffusion has for a weight of diffusers."""
    outside = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip
    module, kind = key.rsplit(".", 1)
    if module in outside:
        return f"{outside[module]}.{kind}"
    levels = len(attends)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        part, number, rest = match.groups()
        place = 1 if part == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{resnet(rest) if part == 'resnets' else rest}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert match is not None
    side, level, part, number, rest = match.groups()
    down = side == "down"
    index = int(level) * (layers + 1) + int(number) + (1 if down else 0)
    blocks = "input_blocks" if down else "output_blocks"
    if part == "resnets":
        return f"{blocks}.{index}.0.{resnet(rest)}"
    if part == "attentions":
        return f"{blocks}.{index}.1.{rest}"
    if down:
        return f"{blocks}.{index + layers}.0.{rest.replace('conv', 'op')}"
    return f"{blocks}.{index + layers}.{2 if attends[levels - 1 - int(level)] else 1}.{rest}"


def resnet(rest: str) -> str:
    layer, kind = rest.rsplit(".", 1)
    return f"{RESNET[layer]}.{kind}"


def vae_key(key: str, levels: int) -> str:
    """The name that the autoencoder of latent diffusion has for a weight of diffusers."""
    key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
    for one, other in (
        ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
        ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
        ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"), ("resnets", "block"), ("down_blocks", "down"),
    ):  # fmt: skip
        key = key.replace(one, other)
    return re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", key)


def latent_weights(unet: nn.Module, vae: nn.Module, attends: list[bool]) -> dict[str, Tensor]:
    weights = {f"model.diffusion_model.{unet_key(key, 1, attends)}": value for key, value in unet.state_dict().items()}
    for key, value in vae.state_dict().items():
        name = f"first_stage_model.{vae_key(key, 2)}"
        weights[name] = value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
    return weights


def latent_model(**options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **{
            "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 12,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8, **options,
        }
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.18215,
    ).eval()  # fmt: skip
    return unet, vae


V1: dict[str, Any] = {}
V2 = {"use_linear_projection": True, "attention_head_dim": (1, 1), "block_out_channels": (64, 64)}
XL = {
    **V2, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 10 + 6 * 256, "transformer_layers_per_block": (1, 2),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("options", [V1, V2, XL], ids=["1", "2", "XL"])
def test_latent_diffusion_is_numerically_the_same(options: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    unet, vae = latent_model(**options)
    weights = latent_weights(unet, vae, [False, True])
    abar = NoiseSchedule.linear().alphas_cumprod
    if suffix == "ckpt":  # of version 1 they come with the table and the text encoder
        others = {"alphas_cumprod": abar, "cond_stage_model.transformer.x": torch.zeros(2)}
        torch.save({"state_dict": weights | others, "epoch": 1}, tmp_path / "model.ckpt")
    else:
        save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "model.safetensors")
    states = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1))
    conditioning: Any = states
    named: dict[str, Any] = {}
    if options is XL:
        embedded = {"text_embeds": torch.ones(1, 10), "time_ids": torch.ones(1, 6)}
        conditioning = {"encoder_hidden_states": states, "added_cond_kwargs": embedded}
        named = {"added_cond_kwargs": {key: value.expand(2, -1) for key, value in embedded.items()}}
    prior = load_prior(tmp_path / f"model.{suffix}", conditioning=conditioning)
    assert isinstance(prior, LatentPrior)
    expected = abar if suffix == "ckpt" else NoiseSchedule.scaled_linear().alphas_cumprod
    torch.testing.assert_close(prior.denoiser.schedule.alphas_cumprod, expected)
    latents, pictures = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            prior.denoiser(latents, T), unet(latents, T, states.expand(2, -1, -1), **named).sample,
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        scale = 0.13025 if options is XL else 0.18215
        torch.testing.assert_close(
            prior.encoder(pictures), vae.encode(pictures).latent_dist.mode() * scale, rtol=1e-4, atol=1e-5  # type: ignore[operator]
        )  # fmt: skip
    v = load_prior(tmp_path / f"model.{suffix}", conditioning=conditioning, prediction_type="v_prediction")
    assert isinstance(v, LatentPrior) and v.denoiser.schedule.prediction_type == "v_prediction"
    if suffix == "ckpt" and options is V1:
        halved = {key: value.half() for key, value in (weights | {"alphas_cumprod": abar}).items()}
        torch.save(halved, tmp_path / "half.ckpt")
        half = load_prior(tmp_path / "half.ckpt", conditioning=conditioning)
        assert isinstance(half, LatentPrior)  # the rounded table is not used
        torch.testing.assert_close(half.denoiser.schedule.alphas_cumprod, NoiseSchedule.scaled_linear().alphas_cumprod)
    DiffLoss(prior)(pictures.requires_grad_(), torch.rand(2, 3, 16, 16)).backward()
    assert pictures.grad is not None and pictures.grad.any()


def test_latent_diffusion_needs_an_autoencoder_and_words(tmp_path: Path) -> None:
    unet, vae = latent_model()
    weights = latent_weights(unet, vae, [False, True])

    def refused(changed: dict[str, Tensor], message: str) -> None:
        torch.save(changed, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=message):
            load_prior(tmp_path / "model.ckpt", conditioning=torch.zeros(1, 2, 12))

    without = {key: value for key, value in weights.items() if not key.startswith("first_stage")}
    refused(without, "an AutoencoderKL under first_stage_model.*, found none")
    refused(weights | {"first_stage_model.quantize.embedding.weight": torch.zeros(2)}, "found a VQModel")
    wordless = {key: value for key, value in weights.items() if "attn2" not in key}
    refused(wordless, "should attend to text")
    broken = dict(weights)
    del broken["first_stage_model.encoder.mid.block_1.conv1.weight"]
    refused(broken, "latent-diffusion layout should .*encoder.mid")
    torch.save(weights, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"hidden states of shape \(1 or N, tokens, 12\).*found None"):
        load_prior(tmp_path / "model.ckpt")
