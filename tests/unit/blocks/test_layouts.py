"""Blocks that are given the timestep act on maps of any layout as on (N, C, H, W)."""

import pytest
import torch
from torch import nn

from restoreloss import FiLM, TimeConditioned, TimeMoE
from restoreloss.blocks.time_conditioned import channels_of

SIDES = (6, 8)


class Last(nn.Module):
    """Channels last."""

    def forward(self, image):
        return image.permute(0, 2, 3, 1)


class Sequence(nn.Module):
    def forward(self, image):
        return image.flatten(2).transpose(1, 2)


def wrapped(form, block):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), form)
    timed = TimeConditioned(network, {"1": block(5)})
    with torch.no_grad():
        for parameter in timed.blocks.parameters():
            parameter.uniform_(-0.5, 0.5)
    return timed


@pytest.mark.parametrize(
    "block", [FiLM, TimeMoE, lambda c: TimeMoE(c, form="code"), lambda c: TimeMoE(c, top_k=2)],
    ids=["film", "moe", "code", "sparse"],
)  # fmt: skip
@pytest.mark.parametrize(("form", "back"), [(Last(), (0, 3, 1, 2)), (Sequence(), None)], ids=["last", "sequence"])
def test_a_block_does_to_any_layout_what_it_does_to_maps(block, form, back):
    first, other = wrapped(nn.Identity(), block), wrapped(form, block)
    other.load_state_dict(first.state_dict())
    image, t = torch.rand(2, 3, *SIDES), torch.tensor([4, 30])
    wanted, found = first(image, t), other(image, t)
    found = found.permute(back) if back else found.transpose(1, 2).unflatten(2, SIDES)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(wanted, first.network[0](image))


@pytest.mark.parametrize(("form", "count"), [(nn.Identity(), 5), (Last(), 5), (Sequence(), 5)])
def test_channels_are_found_in_any_layout(form, count):
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), form)
    assert channels_of(network, ["1"], torch.zeros(1, 3, *SIDES)) == {"1": count}


def test_where_both_ends_have_the_channels_the_sides_of_the_image_tell():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Last())
    assert channels_of(network, ["1"], torch.zeros(1, 3, 8, 16)) == {"1": 8}
    timed = TimeConditioned(network, {"1": FiLM(8)})
    with torch.no_grad():
        timed.blocks["1"].to_scale_shift.bias[:8] = torch.arange(8.0)
    image = torch.rand(1, 3, 8, 16)  # (1, 8, 16, 8): the channels are the last 8
    torch.testing.assert_close(timed(image, 3), network(image) * (1 + torch.arange(8.0)))


def test_a_sequence_that_fills_no_map_is_refused_by_blocks_that_look_at_neighbors():
    class WithClass(Sequence):
        def forward(self, image):
            return torch.cat([super().forward(image), super().forward(image)[:, :1]], dim=1)

    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), WithClass())
    image = torch.rand(1, 3, *SIDES)
    assert TimeConditioned(network, {"1": TimeMoE(5)})(image, 3).shape == (1, 49, 5)
    with pytest.raises(ValueError, match=r"found 5: \(1, 49, 5\) is no whole image"):
        TimeConditioned(network, {"1": TimeMoE(5, form="code")})(image, 3)


SMALL = {"img_size": 16, "embed_dim": 60, "num_heads": (2,)}
ARCHITECTURES = {
    "SwinIR": ("layers.0.residual_group.blocks.0", SMALL | {"depths": (1,)}),
    "HAT": ("layers.0.residual_group.blocks.0", SMALL | {"depths": (1,), "window_size": 8}),
    "DAT": ("layers.0.blocks.0", SMALL | {"depth": (1,)}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_transformers_are_conditioned(name):
    spandrel = pytest.importorskip("spandrel")
    layer, given = ARCHITECTURES[name]
    network = getattr(getattr(spandrel.architectures, name), name)(**given).eval()
    image = torch.rand(1, 3, 16, 16)
    (channels,) = channels_of(network, [layer], image).values()
    timed = TimeConditioned(network, {layer: FiLM(channels)})
    torch.testing.assert_close(timed(image, 3), network(image))
    with torch.no_grad():
        timed.blocks[layer.replace(".", "/")].to_scale_shift.bias.fill_(0.3)
    assert not torch.allclose(timed(image, 3), network(image))


@pytest.mark.parametrize("side", [5, 6])
@pytest.mark.parametrize("layer", [lambda: nn.LayerNorm(5), lambda: nn.Linear(5, 5)], ids=["norm", "linear"])
def test_a_square_map_with_as_many_channels_as_rows_is_read_as_any_other(side, layer):
    network = nn.Sequential(nn.Conv2d(3, 5, 1), Last(), layer())
    assert channels_of(network, "2", torch.rand(1, 3, side, side)) == {"2": 5}
    timed = TimeConditioned(network, {"2": FiLM(5)})
    with torch.no_grad():
        timed.blocks["2"].to_scale_shift.bias[5 + 3] = 1.0  # shifts the fourth channel
    image = torch.rand(1, 3, side, side)
    change = (timed(image, 7) - network(image)).detach()
    torch.testing.assert_close(change, torch.tensor([0.0, 0, 0, 1, 0]).expand_as(change))


def test_a_normalization_of_whole_maps_has_its_channels_first():
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.LayerNorm((5, 5, 5)))
    timed = TimeConditioned(network, {"1": FiLM(5)})
    with torch.no_grad():
        timed.blocks["1"].to_scale_shift.bias[5 + 3] = 1.0
    image = torch.rand(1, 3, 5, 5)
    change = (timed(image, 7) - network(image)).detach()
    torch.testing.assert_close(change, torch.tensor([0.0, 0, 0, 1, 0]).reshape(5, 1, 1).expand_as(change))
