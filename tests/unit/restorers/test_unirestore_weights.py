"""What was trained of UniRestore: saved, loaded, refused for another model, and gone on from."""

import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.unirestore.adapters import AdapterName
from restoreloss import NoiseSchedule
from tests.helpers.restorers import answers, learned, small, small_like, stable_diffusion

ADAPTERS: tuple[AdapterName, ...] = get_args(AdapterName)


def test_prompts_are_for_the_model_that_they_were_trained_with(tmp_path: Path) -> None:
    model, file = learned(small(), 0.3), tmp_path / "prompts.safetensors"
    model.save_prompts(file, ["classify"])
    assert list(load_file(file)) == ["classify"] and file.stat().st_size < 1000
    wanted = answers(model, ["classify"])
    model.add_task("detect")  # prompts that were saved before go on to load
    with torch.no_grad():
        model.tfa.prompts["classify"].zero_()
    assert model.load_prompts(file) == ("classify",)
    assert torch.equal(answers(model, ["classify"]), wanted)

    empty = small(tasks=())
    empty.load_state_dict({n: v for n, v in model.state_dict().items() if "prompts" not in n})
    assert empty.fingerprint() == model.fingerprint()
    empty.load_prompts(file)
    assert empty.tasks == ("classify",) and torch.equal(answers(empty, ["classify"]), wanted)

    for part in ("cfrm", "controller", "tuners", "tfa"):
        other = small_like(small(), 1)
        other.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            next(getattr(other, part).parameters()).view(-1)[0] += 1
        with pytest.raises(ValueError, match=rf"fingerprint {other.fingerprint()[:12]}, found"):
            other.load_prompts(file)
    other = small(gate="sigmoid")
    other.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(ValueError, match="should hold prompts for a model with the fingerprint"):
        other.load_prompts(file)
    save_file({"classify": torch.zeros(16)}, tmp_path / "without.safetensors")
    with pytest.raises(ValueError, match="found none"):
        model.load_prompts(tmp_path / "without.safetensors")
    with pytest.raises(ValueError, match="one of look, classify, detect, found 'paint'"):
        model.save_prompts(file, ["paint"])


@pytest.mark.parametrize("adapter", ["one_prompt", "several", "convolutions", None])
def test_without_prompts_no_task_is_added(adapter: Any, tmp_path: Path) -> None:
    model = small(adapter=adapter)
    file = tmp_path / "prompts.safetensors"
    for use in (lambda: model.add_task("detect"), lambda: model.save_prompts(file), lambda: model.load_prompts(file)):
        with pytest.raises(ValueError, match="needs a UniRestore with a TFA, found"):
            use()


@pytest.mark.parametrize("adapter", [*ADAPTERS, None])
def test_what_was_trained_is_saved_and_loaded(adapter: Any, tmp_path: Path) -> None:
    model, file = learned(small(adapter=adapter), 0.3), tmp_path / "trained.safetensors"
    model.save_trained(file)
    names = set(load_file(file))
    assert names == set(model.state_dict()) and not any("vae" in name or "unet" in name for name in names)
    again = small(adapter=adapter, tasks=() if adapter == "prompts" else ("look", "classify"))
    again.load_trained(file)
    tasks = ("look", "classify")
    assert set(again.tasks) == set(() if adapter is None else tasks) and torch.equal(
        answers(again, tasks), answers(model, tasks)
    )


def test_weights_of_another_model_are_refused_and_load_nothing(tmp_path: Path) -> None:
    model, file = learned(small()), tmp_path / "trained.safetensors"
    model.save_trained(file)
    for other in (
        small(adapter="several"), small(adapter=None), small(control_channels=16), small(cfrm=False), stable_diffusion()
    ):  # fmt: skip
        before = other.fingerprint()
        with pytest.raises(ValueError, match=f"{file} should hold the weights of this UniRestore, found [0-9]+ that"):
            other.load_trained(file)
        assert other.fingerprint() == before
    with pytest.raises(ValueError, match="found no such file"):
        model.load_trained(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="should be a whole safetensors file"):
        model.load_trained(tmp_path / "text.safetensors")


def test_a_file_that_was_trained_with_another_prior_is_told(tmp_path: Path) -> None:
    model, file = learned(small()), tmp_path / "trained.safetensors"
    model.save_trained(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_trained(file)
    with torch.no_grad():
        next(model._unet.network.parameters()).add_(0.01)
    with pytest.warns(UserWarning, match="was trained with the prior [0-9a-f]{12}, found"):
        model.load_trained(file)


@pytest.mark.parametrize("part", ["prompt", "prediction type", "schedule", "scale of latents"])
def test_the_prompt_the_schedule_and_the_scale_belong_to_the_prior(part: str, tmp_path: Path) -> None:
    model, file, prompts = learned(small()), tmp_path / "trained.safetensors", tmp_path / "prompts.safetensors"
    model.save_trained(file)
    model.save_prompts(prompts)
    if part == "prompt":
        model.prompt += 1
    elif part == "scale of latents":
        model._vae.network.register_to_config(scaling_factor=0.5)
    elif part == "schedule":
        model.schedule = NoiseSchedule.linear(prediction_type=model.schedule.prediction_type)
    else:
        model.schedule = NoiseSchedule(model.schedule.alphas_cumprod, prediction_type="v_prediction")
    with pytest.warns(UserWarning, match="was trained with the prior"):
        model.load_trained(file)
    with pytest.raises(ValueError, match="should hold prompts for a model with the fingerprint"):
        model.load_prompts(prompts)


def test_a_model_of_stage_1_is_gone_on_from_with_adapters(tmp_path: Path) -> None:
    first, file = learned(small(adapter=None)), tmp_path / "trained.safetensors"
    first.save_trained(file)
    model = small()
    model.load_trained(file, with_adapters=False)
    assert torch.equal(answers(model, ["look"]), answers(first, ["look"]))
    with pytest.raises(ValueError, match=r"tfa\."):
        model.load_trained(file)


def test_files_may_be_named_by_a_string(tmp_path: Path) -> None:
    model = learned(small(), 0.3)
    file, prompts = str(tmp_path / "all.safetensors"), str(tmp_path / "prompts.safetensors")
    model.save_trained(file)
    model.save_prompts(prompts)
    model.load_trained(file)
    assert sorted(model.load_prompts(prompts)) == sorted(model.tasks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.safetensors", "prompts.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_restores_in_half_precision(dtype: torch.dtype) -> None:
    model, image = small().eval(), torch.rand(1, 3, 32, 32)
    found = []
    for precision in (torch.float32, dtype):
        found.append(model.to(precision).restore(image, model.tasks[0], generator=torch.Generator().manual_seed(0)))
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(*found, atol=0.05, rtol=0)
