"""The restoration and task networks of the recipes: their sizes, their weights, what they are shown."""

import logging
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.common.data.tasks import Task
from examples.common.engine.recognition import Recognition, features_of
from examples.common.networks.edsr import EDSR
from examples.common.networks.recognizers import recognizer
from examples.common.networks.restorers import fit_sizes, restorer
from examples.common.networks.weights import load_weights


def test_a_detector_that_began_with_imagenet_keeps_its_frozen_normalization(tmp_path: Path) -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(0)
    network = recognizer("paper", "detection", 3, pretrained=False)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, FrozenBatchNorm2d(module.num_features, eps=module.eps))
    save_file(network.state_dict(), tmp_path / "frozen.safetensors")
    again = recognizer("paper", "detection", 3, pretrained=False)
    load_weights(again, tmp_path / "frozen.safetensors")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in again.modules())
    image = [torch.rand(3, 64, 64)]
    one, other = (net.eval()(image)[0]["scores"] for net in (network, again))
    assert torch.equal(one, other)
    assert all(weight.requires_grad for weight in again.parameters())
    live = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=3)
    save_file(live.state_dict(), tmp_path / "live.safetensors")
    load_weights(fresh := recognizer("paper", "detection", 3, pretrained=False), tmp_path / "live.safetensors")
    assert any(isinstance(module, nn.BatchNorm2d) for module in fresh.modules())


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("light", [False, True])
def test_edsr_enlarges_by_its_scale(scale: int, light: bool) -> None:
    assert EDSR(scale, features=4, blocks=1, light=light)(torch.rand(1, 3, 5, 7)).shape == (1, 3, 5 * scale, 7 * scale)


def test_swinir_and_files_of_spandrel(tmp_path: Path) -> None:
    assert sum(parameter.numel() for parameter in restorer("swinir-light", 4).parameters()) == 929_628
    network = restorer("swinir-small", 4).eval()
    lr = torch.rand(1, 3, 16, 16)
    assert network(lr).shape == (1, 3, 64, 64)
    torch.save(network.state_dict(), tmp_path / "swinir.pth")
    loaded = restorer("file", 4, tmp_path / "swinir.pth").eval()
    torch.testing.assert_close(loaded(lr), network(lr))
    assert all(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match="scale 2"):
        restorer("file", 2, tmp_path / "swinir.pth")


def test_without_imagenet_weights_it_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with caplog.at_level(logging.WARNING):
        network = recognizer("paper", "classification", 7)
    assert "starts from scratch" in caplog.text
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_networks_of_timm_are_shown_what_they_were_trained_on() -> None:
    network = recognizer("timm/vit_tiny_patch16_224", "classification", 3, pretrained=False)
    shown: list[Tensor] = []
    network.register_forward_pre_hook(lambda m, i: shown.append(i[0]))
    Recognition("classification", "abc").predict(network.eval(), torch.full((1, 3, 224, 224), 0.5))
    assert shown[0].abs().max() < 1e-6
    features_of(network, ["blocks.0"])(torch.full((1, 3, 224, 224), 0.5))
    assert shown[1].abs().max() < 1e-6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_what_networks_of_ours_are_shown_is_no_guess(task: Task) -> None:
    network = recognizer("small", task, 3).eval()
    shown: list[Tensor] = []
    network.register_forward_pre_hook(lambda m, i: shown.append(i[0]))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    Recognition(task, "abc").predict(network, image)
    features_of(network, ["backbone"])(image)
    torch.testing.assert_close(shown[0], shown[1])


@pytest.mark.parametrize("name", ["RetinexFormer", "HVICIDNet", "Uformer"])
def test_a_network_of_spandrel_takes_any_size(name: str) -> None:
    network = restorer(f"spandrel/{name}", 1).eval()
    assert not any(key.startswith("network.") for key in network.state_dict())
    with torch.no_grad():
        for size in ((48, 48), (33, 41)):
            assert network(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_a_size_that_fits_is_not_touched_and_others_are_continued_by_reflection() -> None:
    from spandrel import SizeRequirements

    class Seen(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            self.image = image
            return nn.functional.interpolate(image, scale_factor=2)

    network: Any = fit_sizes(Seen(), SizeRequirements(minimum=8, multiple_of=4), 2)
    image = torch.rand(1, 3, 8, 12)
    assert network(image).shape == (1, 3, 16, 24) and torch.equal(network.image, image)
    image = torch.rand(1, 3, 7, 13)
    found = network(image)
    assert network.image.shape == (1, 3, 8, 16) and found.shape == (1, 3, 14, 26)
    assert torch.equal(network.image[..., :7, 13:], image[..., [11, 10, 9]])
    assert torch.equal(found, nn.functional.interpolate(image, scale_factor=2))
