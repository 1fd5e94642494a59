"""Is a degraded latent encoded as by the authors, and does a tuned U-Net begin as it was?"""

import copy
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from restoreloss import Controller, SCTuner


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def learned(module: nn.Module) -> Any:
    """As if it had been trained: nothing is the identity any more."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(0.4 * normal(*parameter.shape, seed=number))
    return module


def controller(**options: Any) -> Controller:
    defaults = {"channels": 8, "multipliers": (1, 2, 2), "control_channels": 12, "heads": 2, "groups": 4}
    return learned(Controller(4, **{**defaults, **options}))


class Assembled(nn.Module):
    """As the authors put it together, from diffusers' parts by their names."""

    def __init__(
        self,
        channels: int,
        multipliers: tuple[int, ...],
        control: int,
        layers: int,
        heads: int,
        kinds: str,
        groups: int,
    ) -> None:
        super().__init__()
        embedding, widths = 4 * channels, [channels * multiplier for multiplier in multipliers]
        self.sines, self.embed = Timesteps(channels, True, 0), TimestepEmbedding(channels, embedding)
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.down = nn.ModuleList(
            get_down_block(
                "AttnDownBlock2D" if kind == "A" else "DownBlock2D",
                num_layers=layers,
                in_channels=[channels, *widths][level],
                out_channels=width,
                temb_channels=embedding,
                add_downsample=level < len(widths) - 1,
                resnet_eps=1e-5,
                resnet_act_fn="silu",
                resnet_groups=groups,
                downsample_padding=1,
                attention_head_dim=width // heads,
                downsample_type="conv" if level < len(widths) - 1 else None,
            )
            for level, (kind, width) in enumerate(zip(kinds, widths, strict=True))
        )
        self.mid = UNetMidBlock2D(
            in_channels=widths[-1], temb_channels=embedding, dropout=0.0, resnet_eps=1e-5, resnet_act_fn="silu",
            resnet_groups=groups, attention_head_dim=widths[-1] // heads,
        )  # fmt: skip
        self.transform = nn.ModuleList(
            ResnetBlock2D(
                in_channels=width, out_channels=control, temb_channels=embedding, groups=groups, eps=1e-5, dropout=0.0,
                non_linearity="silu",
            )
            for width in widths
        )  # fmt: skip

    def copy_from(self, found: Controller) -> "Assembled":
        self.embed.load_state_dict(found.embed_time.state_dict())
        self.conv_in.load_state_dict(found.enter.state_dict())
        self.down.load_state_dict(found.levels.state_dict())
        self.mid.load_state_dict(found.middle.state_dict())
        self.transform.load_state_dict(found.to_control.state_dict())
        return self

    def forward(self, latents: Tensor, timesteps: Tensor) -> list[Tensor]:
        time = self.embed(self.sines(timesteps).to(latents.dtype))
        hidden, seen = self.conv_in(latents), []
        for block in self.down:
            hidden, states = block(hidden, time)
            # of a level with a downsampling the last state is behind it
            seen.append(states[-2 if block.downsamplers is not None else -1])
        seen[-1] = self.mid(hidden, time)
        return [transform(x, time) for transform, x in zip(self.transform, seen, strict=True)]


@pytest.mark.parametrize(
    ("channels", "multipliers", "control", "layers", "heads", "kinds", "groups"),
    [
        (8, (1, 1, 2, 2), 8, 2, 4, "AAAD", 4),
        (8, (1, 2), 12, 1, 2, "AD", 4),
        (12, (1,), 4, 3, 1, "D", 2),
        (8, (2, 1, 3), 8, 2, 2, "DAA", 2),
    ],
)
def test_the_controls_are_those_of_the_authors(
    channels: int, multipliers: tuple[int, ...], control: int, layers: int, heads: int, kinds: str, groups: int
) -> None:
    default = "A" * (len(kinds) - 1) + "D"
    found = controller(
        channels=channels, multipliers=multipliers, control_channels=control, layers=layers, heads=heads, groups=groups,
        attention=None if kinds == default else [kind == "A" for kind in kinds],
    ).double()  # fmt: skip
    expected = Assembled(channels, multipliers, control, layers, heads, kinds, groups).double().copy_from(found)
    latents, timesteps = normal(2, 4, 9, 14, dtype=torch.float64), torch.tensor([999, 250])
    maps = found(latents, timesteps)
    assert len(maps) == len(multipliers)
    for one, other in zip(maps, expected(latents, timesteps), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_default_has_the_size_of_the_authors() -> None:
    with torch.device("meta"):
        found, expected = Controller(), Assembled(256, (1, 1, 2, 2), 256, 2, 4, "AAAD", 32)
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in expected.parameters()) == 52_494_080
    expected.copy_from(found)
    heads = {module.heads for module in found.modules() if isinstance(module, Attention)}
    assert found.control_channels == 256
    assert {module.num_groups for module in found.modules() if isinstance(module, nn.GroupNorm)} == {32}
    assert heads == {module.heads for module in expected.modules() if isinstance(module, Attention)} == {4}


@pytest.mark.parametrize("size", [(16, 12), (9, 7), (1, 1), (3, 2), (1, 30)])
def test_maps_are_half_as_high_and_wide_from_level_to_level(size: tuple[int, int]) -> None:
    sizes = [tuple(math.ceil(side / 2**level) for side in size) for level in range(3)]
    maps = controller()(normal(2, 4, *size), torch.tensor([5, 999]))
    assert [tuple(each.shape) for each in maps] == [(2, 12, *each) for each in sizes]


def test_one_timestep_is_for_all_pictures() -> None:
    found, latents = controller(), normal(3, 4, 8, 8)
    expected = found(latents, torch.tensor([7, 7, 7]))
    for timestep in (torch.tensor(7), torch.tensor([7])):
        assert all(torch.equal(*pair) for pair in zip(found(latents, timestep), expected, strict=True))
    assert not any(torch.allclose(*pair) for pair in zip(found(latents, torch.tensor(8)), expected, strict=True))


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    found, latents, timesteps = controller().double(), normal(3, 4, 8, 6, dtype=torch.float64), torch.tensor([1, 50, 9])
    together = found(latents, timesteps)
    for n in range(3):
        for alone, each in zip(found(latents[n : n + 1], timesteps[n]), together, strict=True):
            torch.testing.assert_close(alone, each[n : n + 1])


def test_at_the_start_every_residual_block_and_attention_passes_on_what_it_gets() -> None:
    found = Controller(4, channels=8, multipliers=(1, 2), control_channels=8, heads=2, groups=4)
    silent = [module.conv2 for module in found.modules() if isinstance(module, ResnetBlock2D)]
    silent += [module.to_out[0] for module in found.modules() if isinstance(module, Attention)]
    assert len(silent) == (2 * 2 + 2 + 2) + (2 + 1)  # levels, middle, maps; attention on the first and in the middle
    assert not any(layer.weight.any() or layer.bias.any() for layer in silent)
    latents = normal(2, 4, 6, 6)
    maps = found(latents, torch.tensor(999))
    assert torch.equal(maps[0], found.enter(latents)) and maps[1].any()
    sum(each.square().mean() for each in maps).backward()
    assert all(bool(layer.weight.grad.any()) for layer in silent)


@pytest.mark.parametrize("attention", [(True, True), (False, False), (False, True)])
def test_attention_is_where_it_was_asked_for(attention: tuple[bool, bool]) -> None:
    found = controller(multipliers=(1, 2), attention=attention)
    assert [any(isinstance(part, Attention) for part in level.modules()) for level in found.levels] == list(attention)
    assert [tuple(each.shape) for each in found(normal(1, 4, 5, 6), torch.tensor(3))] == [(1, 12, 5, 6), (1, 12, 3, 3)]


def test_the_gradient_reaches_the_latents_and_every_parameter() -> None:
    found, latents = controller(), normal(2, 4, 8, 8).requires_grad_()
    sum(each.square().mean() for each in found(latents, torch.tensor([3, 900]))).backward()
    for name, value in (("latents", latents), *found.named_parameters()):
        assert value.grad is not None and value.grad.isfinite().all(), name
        # a softmax over the keys does not see what is added to all of them
        assert name.endswith("to_k.bias") or bool(value.grad.any()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_give_nearly_the_same(dtype: torch.dtype) -> None:
    found, latents, timesteps = controller(), normal(2, 4, 8, 8), torch.tensor([3, 900])
    expected = [each.detach() for each in found(latents, timesteps)]
    with torch.autocast("cpu", dtype):
        cast = found(latents, timesteps)
    half = found.to(dtype)(latents.to(dtype), timesteps)
    assert all(each.dtype == dtype for each in half)
    for maps in (cast, half):
        for each, value in zip(maps, expected, strict=True):
            scale = float(value.abs().max())
            torch.testing.assert_close(each.float() / scale, value / scale, rtol=0.05, atol=0.05)
    sum(each.float().square().mean() for each in half).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in found.parameters())


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_latents_have_finite_gradients(value: float) -> None:
    found, latents = controller(), torch.full((1, 4, 6, 6), value, requires_grad=True)
    sum(each.square().mean() for each in found(latents, torch.tensor(0))).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (latents, *found.parameters()))


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_computes_the_same_and_is_on_its_own(duplicate: Callable[[Any], Any]) -> None:
    found, latents, skip = controller(), normal(1, 4, 6, 6), normal(1, 5, 6, 6)
    tuner = learned(SCTuner(5, 12))
    expected = tuner(skip, found(latents, torch.tensor(3))[0])
    again, tuned = duplicate(found), duplicate(tuner)
    assert torch.equal(tuned(skip, again(latents, torch.tensor(3))[0]), expected)
    for module in (again, tuned):
        for p in module.parameters():
            nn.init.zeros_(p)
    assert torch.equal(tuner(skip, found(latents, torch.tensor(3))[0]), expected)


class WithoutDiffusers:
    """A finder that goes first."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [WithoutDiffusers(), *sys.meta_path])
    assert SCTuner(4, 4)(normal(1, 4, 3, 3), normal(1, 4, 3, 3)).shape == (1, 4, 3, 3)
    with pytest.raises(ImportError, match="A Controller needs `diffusers`, which is not installed: pip install diff"):
        controller()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"multipliers": (1, 2), "attention": (True,)},
            r"`attention` should be one for each of `multipliers` \(1, 2\)",
        ),
        ({"multipliers": ()}, r"`multipliers` should be at least one whole number, found"),
        ({"layers": 0}, "`layers` should be a whole number of at least 1, found 0"),
        ({"channels": 10}, r"`groups` and `heads` should divide the channels \[10, 20, 20\], .* 12, found 4 and 2"),
        ({"control_channels": 10}, r"\[8, 16, 16\], and `groups` also `control_channels` 10, found 4"),
        ({"heads": 3}, r"`heads` should divide .* found 4 and 3"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controller(**options)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 6)),
)
def test_a_skip_is_edited_by_the_formula(shape: tuple[int, int, int, int], control: int, hidden: int | None) -> None:
    tuner = learned(SCTuner(shape[1], control, hidden=hidden)).double()
    skip, c = normal(*shape, dtype=torch.float64), normal(shape[0], control, *shape[2:], seed=1, dtype=torch.float64)
    result = tuner(skip, c)

    def layer(conv: nn.Conv2d, x: Tensor) -> Tensor:
        return conv.weight[:, :, 0, 0] @ x + conv.bias

    for n in range(shape[0]):
        for y in range(shape[2]):
            for x in range(shape[3]):
                s = skip[n, :, y, x] + layer(tuner.project, c[n, :, y, x])
                expected = s + layer(tuner.second, gelu(layer(tuner.first, s)))
                torch.testing.assert_close(result[n, :, y, x], expected, rtol=1e-9, atol=1e-9)
    assert tuner.first.out_channels == (shape[1] if hidden is None else hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tuner_changes_nothing_at_the_start_and_both_silent_layers_begin_to_learn(dtype: torch.dtype) -> None:
    tuner = SCTuner(6, 4).to(dtype)
    skip, control = normal(2, 6, 5, 3, dtype=dtype), normal(2, 4, 5, 3, dtype=dtype)
    result = tuner(skip, control)
    assert torch.equal(result, skip) and result.dtype == dtype
    result.float().square().mean().backward()
    for silent in (tuner.project, tuner.second):
        assert bool(silent.weight.grad.any()) and bool(silent.bias.grad.any())
    assert not tuner.first.weight.grad.any()


def test_the_gradient_of_a_tuner_is_that_of_finite_differences() -> None:
    tuner = learned(SCTuner(3, 2, hidden=4)).double()
    names, values = zip(*tuner.named_parameters(), strict=True)

    def run(skip: Tensor, control: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(tuner, dict(zip(names, parameters, strict=True)), (skip, control))

    given_to = [normal(2, channels, 2, 3, dtype=torch.float64).requires_grad_() for channels in (3, 2)]
    assert torch.autograd.gradcheck(run, (*given_to, *values), fast_mode=True)


def test_a_compiled_tuner_computes_the_same() -> None:
    tuner, skip, control = learned(SCTuner(6, 4)), normal(2, 6, 5, 3), normal(2, 4, 5, 3)
    compiled = torch.compile(tuner, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(skip, control), tuner(skip, control), rtol=1e-5, atol=1e-5)


def test_timesteps_and_controls_of_another_size_are_refused() -> None:
    control = controller()
    latents = normal(2, 4, 8, 8)
    assert torch.equal(control(latents, 7)[0], control(latents, torch.tensor([7, 7]))[0])
    with pytest.raises(ValueError, match=r"`timestep` should be one or 2, found \(3,\)"):
        control(latents, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"`control` should have the batch and size of `skip` \(1, 4, 3, 3\)"):
        SCTuner(4, 4)(normal(1, 4, 3, 3), normal(1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"`control` should have the batch and size of `skip` \(1, 4, 3, 3\)"):
        SCTuner(4, 4)(normal(1, 4, 3, 3), normal(2, 4, 3, 3))
