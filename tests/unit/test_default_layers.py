"""Layers that are looked at without being named, and how images reach networks that read something else than colors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from restoreloss import FeatureExtractor, TDPLoss
from restoreloss.default_layers import default_layers


class Encoder(nn.Module):
    """As in segmentation_models_pytorch: a list of maps, of which the first is the input."""

    out_channels: tuple[int, ...] | None = (3, 4, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        first = self.first(image)
        return [image, first, self.second(first)]


class Segmenter(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Conv2d(8, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(image)[-1])
        return logits


def images(channels: int = 3, size: int = 16) -> Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_of_an_encoder_that_gives_its_input_first_the_deepest_map_is_seen() -> None:
    network = Segmenter(Encoder())
    assert default_layers(network) == ("encoder/2",)
    (found,) = FeatureExtractor(network, normalize=None)(images()).values()
    torch.testing.assert_close(found, network.encoder(images())[2])


def test_a_container_that_holds_the_input_is_refused_whole() -> None:
    network = Segmenter(Encoder())
    with pytest.raises(ValueError, match=r"'encoder/0' is the network's input.* \['encoder/1', 'encoder/2'\]"):
        TDPLoss(network, "encoder", normalize=None)(images(), images())
    named = FeatureExtractor(network, ["encoder/0", "encoder/1"], normalize=None)(images())
    assert torch.equal(named["encoder/0"], images())  # by its own name it is meant


def test_an_encoder_of_unknown_kind_that_holds_the_input_is_refused_too() -> None:
    class Unknown(Encoder):
        out_channels = None

    with pytest.raises(ValueError, match="'encoder/0' is the network's input"):
        FeatureExtractor(Segmenter(Unknown()), normalize=None)(images())


def test_of_a_list_of_blocks_the_last_one_is_seen() -> None:
    network = models.maxvit.MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=1, block_channels=[8, 16], block_layers=[1, 1],
        head_dim=4, stochastic_depth_prob=0.0, num_classes=2,
    ).eval()  # fmt: skip
    assert default_layers(network) == ("blocks.1",)
    assert FeatureExtractor(network)(images(size=32))["blocks.1"].shape[:2] == (2, 16)


def test_of_a_transformer_without_a_head_the_last_hidden_state_is_seen() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **options)
    for network in (transformers.ViTModel(config), transformers.ViTForImageClassification(config)):
        body = network if hasattr(network, "embeddings") else network.vit
        found = FeatureExtractor(network.eval(), normalize=None)(images())
        expected = body(images()).last_hidden_state
        (value,) = (value for name, value in found.items() if name.endswith("last_hidden_state"))
        torch.testing.assert_close(value, expected)


class GreyReader(nn.Module):
    """A recognizer of text: grey images of height 16 in [-1, 1], a second argument, recurrent features."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(1, 4, (16, 4), stride=(16, 4))
        self.sequence = nn.LSTM(4, 5, batch_first=True, bidirectional=True)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        columns = self.cells(image)[:, :, 0].transpose(1, 2)
        logits: Tensor = self.sequence(columns)[0] + text.sum()
        return logits


def grey(image: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * image.mean(dim=1, keepdim=True) - 1, torch.zeros(1)


@pytest.mark.parametrize("input_range", [(0.0, 1.0), (0.0, 255.0)])
def test_a_callable_makes_the_arguments_of_any_reader(input_range: tuple[float, float]) -> None:
    torch.manual_seed(0)
    reader = GreyReader().train()
    scale = input_range[1]
    z, x = (scale * images()).requires_grad_(), scale * images().flip(0)
    loss = TDPLoss(reader, "sequence/0", normalize=grey, input_range=input_range)
    loss(z, x).backward()
    wanted = [reader(*grey(image / scale)) for image in (z, x)]
    torch.testing.assert_close(loss(z, x), (wanted[0] - wanted[1]).abs().mean())
    assert z.grad is not None and z.grad.any()
    assert reader.training and all(parameter.grad is None for parameter in reader.parameters())


def test_a_callable_that_loses_the_gradient_is_told() -> None:
    z, x = images().requires_grad_(), images().flip(0)
    loss = TDPLoss(GreyReader(), "cells", normalize=lambda image: grey(image.detach()))
    with pytest.raises(ValueError, match="Layer 'cells' should pass a gradient"):
        loss(z, x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (images(1), r"found 1; of gray ones `images.expand\(-1, 3, -1, -1\)` makes three; give `normalize`"),
        (images().permute(0, 2, 3, 1), "found 16; are the channels last"),
        (images().numpy(), "found a numpy array"),
        ([images()[0].numpy()], "found a numpy array .* in a list"),
        ([], "should be at least one"),
        (images().byte(), "should be float .* found a tensor of shape"),
    ],
)
def test_images_that_are_none_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(nn.Sequential(nn.Conv2d(3, 3, 1)), "0")(wrong)
