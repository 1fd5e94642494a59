"""load_prior from folders and names, and what is no prior."""

import json
import pickle
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from restoreloss import DiffLoss, FlowLevels, LatentPrior, NoiseSchedule, load_prior, null_text
from tests.helpers.checkpoints import NOISY, T, adm, denoiser
from tests.helpers.networks import tiny_autoencoder, tiny_conditional_unet, tiny_transformer, tiny_unet

# folders


def test_folders_of_diffusers_are_read_with_their_scheduler(tmp_path: Path) -> None:
    unet, scheduler = tiny_unet().eval(), diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    unet.save_pretrained(tmp_path / "alone")
    unet.save_pretrained(tmp_path / "beside")
    scheduler.save_pretrained(tmp_path / "beside")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipeline")
    unet.save_pretrained(tmp_path / "below" / "unet")
    unet.half().save_pretrained(tmp_path / "half")
    unet.float()
    for name in ("alone", "beside", "pipeline", "below", "half", "pipeline/unet"):
        prior = denoiser(load_prior(tmp_path / name))
        said = name in ("beside", "pipeline", "pipeline/unet")
        table = NoiseSchedule.from_diffusers(scheduler) if said else NoiseSchedule.linear()
        torch.testing.assert_close(prior.schedule.alphas_cumprod, table.alphas_cumprod)
        assert {p.dtype for p in prior.parameters()} == {torch.float32}
        torch.testing.assert_close(prior(NOISY, T), unet(NOISY, T).sample, rtol=1e-2, atol=1e-2)
    given = denoiser(load_prior(str(tmp_path / "pipeline"), schedule=NoiseSchedule.scaled_linear()))
    assert torch.equal(given.schedule.alphas_cumprod, NoiseSchedule.scaled_linear().alphas_cumprod)


def test_folders_with_other_weights_are_refused(tmp_path: Path) -> None:
    unet = tiny_unet()
    weights = {name: value.contiguous() for name, value in unet.state_dict().items()}
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    unet.save_pretrained(tmp_path / "unet")
    lacking = {name: value for name, value in weights.items() if name != "mid_block.resnets.0.conv1.bias"}
    for changed, message in (
        (lacking, "found 1 missing: mid_block.resnets.0.conv1.bias"),
        (weights | {"extra": torch.zeros(1)}, "found 1 unexpected: extra"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            load_prior(tmp_path / "unet")
    for content in (b"", file.read_bytes()[:-1000]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="should hold the weights of a UNet2DModel, found"):
            load_prior(tmp_path / "unet")
    file.unlink()
    torch.save(Code(), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="should hold the weights of a UNet2DModel, found"):
        load_prior(tmp_path / "unet")
    unet.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert {p.dtype for p in denoiser(load_prior(tmp_path / "half")).parameters()} == {torch.float32}
    unet.save_pretrained(tmp_path / "folder.pt")
    assert denoiser(load_prior(tmp_path / "folder.pt")).in_channels == 3


def test_folders_of_transformers_are_read(tmp_path: Path) -> None:
    dit, vae = tiny_transformer("DiT", in_channels=4).eval(), tiny_autoencoder()
    for part, name in ((dit, "transformer"), (vae, "vae"), (diffusers.DDIMScheduler(), "scheduler")):
        part.save_pretrained(tmp_path / "dit" / name)  # type: ignore[operator]
    prior = load_prior(tmp_path / "dit")
    assert isinstance(prior, LatentPrior)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = dit(latents, timestep=T, class_labels=torch.tensor([5, 5])).sample  # the label of none
        torch.testing.assert_close(prior.denoiser(latents, T), expected)


def clip(projected: bool = False, width: int = 8) -> Any:
    import transformers

    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=3, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=7, bos_token_id=0, eos_token_id=1, projection_dim=6,
        )
    ).eval()  # fmt: skip


def words(folder: Path) -> Any:
    import transformers

    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=7)


TOKENS = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])


def test_stable_diffusion_is_conditioned_on_the_empty_prompt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text, unet = clip(), tiny_conditional_unet(in_channels=4, out_channels=4)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    diffusers.StableDiffusionPipeline(
        vae=tiny_autoencoder(), text_encoder=text, tokenizer=words(tmp_path / "words"), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(tmp_path / "sd")  # fmt: skip
    states = null_text(tmp_path / "sd")
    assert isinstance(states, Tensor) and not states.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(states, text(TOKENS).last_hidden_state)
    prior = load_prior(tmp_path / "sd")
    assert isinstance(prior, LatentPrior) and prior.denoiser.schedule.prediction_type == "v_prediction"
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = unet(latents, T, states.expand(2, -1, -1)).sample
        torch.testing.assert_close(prior.denoiser(latents, T, native=True), expected)
    given = load_prior(tmp_path / "sd", conditioning=torch.ones(1, 3, 8))
    assert isinstance(given, LatentPrior) and given.denoiser(latents, T).shape == latents.shape
    with pytest.raises(ValueError, match=r"tokens, 8\).*found a tensor of shape \(1, 3, 9\)"):
        load_prior(tmp_path / "sd", conditioning=torch.ones(1, 3, 9))
    below = denoiser(load_prior(tmp_path / "sd" / "unet", conditioning=states, schedule=NoiseSchedule.scaled_linear()))
    assert below.in_channels == 4


@pytest.mark.parametrize("zeros", [True, False])
def test_stable_diffusion_xl_too(tmp_path: Path, zeros: bool) -> None:
    torch.manual_seed(0)
    one, two = clip(), clip(projected=True)
    unet = tiny_conditional_unet(
        in_channels=4, out_channels=4, cross_attention_dim=16, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 + 6 * 4,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=tiny_autoencoder(), text_encoder=one, text_encoder_2=two, tokenizer=words(tmp_path / "words"),
        tokenizer_2=words(tmp_path / "words"), unet=unet, scheduler=diffusers.EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=zeros,
    ).save_pretrained(tmp_path / "xl")  # fmt: skip
    found = null_text(tmp_path / "xl")
    assert isinstance(found, dict)
    states, pooled = found["encoder_hidden_states"], found["added_cond_kwargs"]["text_embeds"]
    assert states.shape == (1, 7, 16) and pooled.shape == (1, 6)
    with torch.no_grad():
        hidden = [model(TOKENS, output_hidden_states=True).hidden_states[-2] for model in (one, two)]
        torch.testing.assert_close(states, torch.cat(hidden, dim=-1) * (not zeros))
        torch.testing.assert_close(pooled, two(TOKENS).text_embeds * (not zeros))
    assert found["added_cond_kwargs"]["time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]]
    loss = DiffLoss(load_prior(tmp_path / "xl"))
    z = torch.rand(1, 3, 12, 13, requires_grad=True)
    loss(z, torch.rand(1, 3, 12, 13)).backward()
    assert z.grad is not None and z.grad.any()


def test_stable_diffusion_3_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = clip(projected=True), clip(projected=True)
    transformer = tiny_transformer(
        "SD3", in_channels=4, out_channels=4, joint_attention_dim=32, pooled_projection_dim=12
    )
    diffusers.StableDiffusion3Pipeline(
        vae=tiny_autoencoder(shift_factor=0.1), text_encoder=one, text_encoder_2=two, text_encoder_3=None,
        tokenizer=words(tmp_path / "words"), tokenizer_2=words(tmp_path / "words"), tokenizer_3=None,
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(tmp_path / "sd3")  # fmt: skip
    prior = load_prior(tmp_path / "sd3")
    assert isinstance(prior, LatentPrior) and isinstance(prior.denoiser.schedule, FlowLevels)
    found = null_text(tmp_path / "sd3")
    assert isinstance(found, dict)
    with torch.no_grad():
        pooled = torch.cat([model(TOKENS).text_embeds for model in (one, two)], dim=-1)
        hidden = torch.cat([model(TOKENS, output_hidden_states=True).hidden_states[-2] for model in (one, two)], dim=-1)
    torch.testing.assert_close(found["pooled_projections"], pooled)
    torch.testing.assert_close(found["encoder_hidden_states"][:, :7, :16], hidden)
    z = torch.rand(1, 3, 12, 13, requires_grad=True)
    DiffLoss(prior)(z, torch.rand(1, 3, 12, 13)).backward()
    assert z.grad is not None and z.grad.any()


def test_the_empty_prompt_is_of_pipelines_with_text(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="should be a pipeline with text encoders"):
        null_text(tmp_path)


# names on the hub


def cached(root: Path, name: str, part: Any) -> None:
    """As the hub's library keeps a download."""
    folder = root / f"models--{name.replace('/', '--')}"
    part.save_pretrained(folder / "snapshots" / ("ab" * 20))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("ab" * 20)


def test_a_name_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    unet = tiny_unet().eval()
    cached(tmp_path, "someone/pixels", diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(beta_end=0.03)))
    prior = denoiser(load_prior("someone/pixels", local_files_only=True))
    torch.testing.assert_close(prior(NOISY, T), unet(NOISY, T).sample)
    torch.testing.assert_close(prior.schedule.alphas_cumprod, NoiseSchedule.linear(beta_end=0.03).alphas_cumprod)
    cached(tmp_path, "someone/alone", unet)
    assert denoiser(load_prior("someone/alone", local_files_only=True)).in_channels == 3
    with pytest.raises(OSError, match="'someone/else' is no folder here, and nothing .* from the hub or its cache"):
        load_prior("someone/else", local_files_only=True)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def unreachable(repository: str, *, filename: str, local_files_only: bool, revision: str, **options: Any) -> None:
        asked.append((filename, local_files_only, revision))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(diffusers.configuration_utils, "hf_hub_download", unreachable)
    with pytest.raises(OSError, match="Without a network download it elsewhere"):
        load_prior("someone/else")
    assert asked[0][:2] == ("model_index.json", False)
    assert {filename for filename, local, _ in asked[1:] if local} == {"config.json"}
    assert all(local for _, local, _ in asked[1:])
    with pytest.raises(OSError, match="Without a network"):
        load_prior("someone/else", revision="v2")
    assert {revision for _, _, revision in asked[-4:]} == {"v2"}


# what is no prior


class Code:
    def __reduce__(self) -> Any:
        return print, ("code in a pickle ran",)


def test_code_in_a_pickle_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1)}, "callbacks": Code()}, tmp_path / "code.ckpt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Code()))
    for name in ("code.ckpt", "plain.pt"):
        with pytest.raises(ValueError, match=f"{name} should hold tensors only, found a pickle .*safetensors"):
            load_prior(tmp_path / name)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    weights, file = adm().state_dict(), tmp_path / f"net.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(weights, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"net.{suffix} should (be a whole|hold tensors only)"):
        load_prior(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"net.{suffix} should be a whole"):
        load_prior(file)


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    weights = adm().state_dict()

    def refused(changed: dict[str, Tensor], message: str) -> None:
        torch.save(changed, tmp_path / "net.pt")
        with pytest.raises(ValueError, match=message):
            load_prior(tmp_path / "net.pt", head_channels=16)

    without = {key: value for key, value in weights.items() if key != "middle_block.1.proj_out.bias"}
    refused(without, r"guided-diffusion layout .* found 1 missing: mid_block.attentions.0.to_out.0.bias\.")
    refused(weights | {"extra.weight": torch.zeros(1)}, "found 1 unexpected: extra.weight")
    refused(weights | {"out.2.bias": torch.zeros(5)}, "found 1 of another shape: conv_out.bias")
    for key in ("input_blocks.1.0.emb_layers.1.weight", "input_blocks.0.0.bias", "out.2.weight"):
        refused({name: value for name, value in weights.items() if name != key}, "should|layout")
    half = {key: value for key, value in weights.items() if not key.startswith(("output_blocks.3", "output_blocks.2"))}
    refused(half, "as many blocks in each level, found 9 on the way down, 7 on the way up")
    swin = {"patch_embed.proj.weight": torch.zeros(2), "layers.0.weight": torch.zeros(2)}
    refused(
        swin, r"net.pt should be a diffusers folder .* guided-diffusion .* latent-diffusion .* found 2 weights: patch_"
    )
    refused({}, "should hold a state dict, found no tensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="should hold a state dict, found a list"):
        load_prior(tmp_path / "list.pt")


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="should hold one of UNet2DModel, .* found AutoencoderKL"):
        load_prior(tmp_path / "vae")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no config.json in"):
        load_prior(tmp_path / "empty")
    tiny_unet(in_channels=4, out_channels=4).save_pretrained(tmp_path / "both" / "unet")
    tiny_unet().save_pretrained(tmp_path / "both" / "vae")
    with pytest.raises(ValueError, match="should hold an AutoencoderKL in vae/, found UNet2DModel"):
        load_prior(tmp_path / "both")
    tiny_unet().save_pretrained(tmp_path / "pixels" / "unet")
    tiny_autoencoder().save_pretrained(tmp_path / "pixels" / "vae")
    with pytest.raises(ValueError, match="`unet` should read the 4 channels of the latents"):
        load_prior(tmp_path / "pixels")


def test_paths_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="should be a file, found none at .*net.pt"):
        load_prior(tmp_path / "net.pt")
    with pytest.raises(FileNotFoundError, match="should be a folder, a file that ends in .*found none at"):
        load_prior(tmp_path / "nothing")
    (tmp_path / "net.onnx").write_bytes(b"1")
    with pytest.raises(FileNotFoundError, match="a file that ends in .safetensors"):
        load_prior(tmp_path / "net.onnx")
    tiny_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="`prediction_type` should be left out for a folder"):
        load_prior(tmp_path / "unet", prediction_type="v_prediction")
