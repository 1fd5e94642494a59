"""Do groups of channels restore features by the formula, and nothing before they have learned to?"""

import copy
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from restoreloss import CFRM
from restoreloss.blocks.cfrm import naf_blocks


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def learned(module: nn.Module) -> Any:
    """As if it had been trained: nothing is the identity any more."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(0.4 * normal(*parameter.shape, seed=number))
    return module


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def written_out(module: CFRM, features: Tensor) -> Tensor:
    """Sample by sample, group by group and tap by tap, in float64."""
    module = copy.deepcopy(module).double().requires_grad_(False)
    expand, norm, mix, intra, inter, merge = (
        getattr(module, name) for name in ("expand", "norm", "mix", "intra", "inter", "merge")
    )
    restored = []
    for h in module.blocks(features.double()):
        wide = torch.einsum("oc,chw->ohw", expand.weight[:, :, 0, 0], h) + expand.bias.view(-1, 1, 1)
        (channels, height, width), groups = wide.shape, norm.num_groups
        attended = []
        for own in torch.arange(channels).chunk(groups):
            x = wide[own]
            x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
            x = F.pad(x * norm.weight[own].view(-1, 1, 1) + norm.bias[own].view(-1, 1, 1), (1, 1, 1, 1))
            mixed = mix.bias[own].view(-1, 1, 1).repeat(1, height, width)
            for dy in range(3):
                for dx in range(3):
                    seen = x[:, dy : dy + height, dx : dx + width]
                    mixed += torch.einsum("oc,chw->ohw", mix.weight[own][:, :, dy, dx], seen)
            u = gelu(mixed)
            weight = intra.weight[own][:, :, 0, 0] @ u.mean(dim=(1, 2)) + intra.bias[own]
            attended.append(u * weight.view(-1, 1, 1))
        pooled = torch.cat(attended).mean(dim=(1, 2))
        weights = inter.weight[:, :, 0, 0] @ pooled + inter.bias
        v = torch.cat([weight * group for weight, group in zip(weights, attended, strict=True)])
        restored.append(h + torch.einsum("oc,chw->ohw", merge.weight[:, :, 0, 0], v) + merge.bias.view(-1, 1, 1))
    return torch.stack(restored)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 4),
    st.integers(0, 2),
    st.data(),
)
def test_groups_are_restored_as_in_the_formula(
    shape: tuple[int, int, int, int], expansion: int, blocks: int, data: st.DataObject
) -> None:
    width = expansion * shape[1]
    groups = data.draw(st.sampled_from([g for g in range(1, width + 1) if width % g == 0]))
    assume(width > groups or shape[0] * shape[2] * shape[3] > 1)
    module = learned(CFRM(shape[1], blocks=blocks, groups=groups, expansion=expansion)).double()
    features = normal(*shape, dtype=torch.float64)
    torch.testing.assert_close(module(features), written_out(module, features), rtol=1e-9, atol=1e-9)


def test_the_groups_meet_in_the_weights_between_them_and_in_the_last_layer_alone() -> None:
    module = learned(CFRM(2, blocks=0, groups=4)).double()
    nn.init.zeros_(module.inter.weight)
    nn.init.dirac_(module.merge.weight)  # what it returns is h and the first group, which has two channels
    features = normal(1, 2, 5, 4, dtype=torch.float64)
    before = module(features)
    with torch.no_grad():
        module.expand.weight[2:] += 1
    assert torch.equal(module(features), before)
    nn.init.ones_(module.inter.weight)
    assert not torch.allclose(module(features), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (7, 9)])
@pytest.mark.parametrize("blocks", [0, 2])
def test_the_module_is_the_identity_at_the_start_and_its_last_layer_begins_to_learn(
    blocks: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    module, features = CFRM(8, blocks=blocks).to(dtype), normal(2, 8, *size, dtype=dtype)
    restored = module(features)
    assert torch.equal(restored, features) and restored.dtype == dtype
    restored.float().square().mean().backward()
    assert bool(module.merge.weight.grad.any()) and bool(module.merge.bias.grad.any())


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    module, features = learned(CFRM(4, groups=4)).double(), normal(3, 4, 5, 6, dtype=torch.float64)
    alone = torch.cat([module(sample[None]) for sample in features])
    torch.testing.assert_close(module(features), alone)


@pytest.mark.parametrize(
    ("channels", "blocks", "count"), [(128, 1, 424_720), (256, 1, 1_668_624), (512, 9, 21_429_264), (16, 0, 5_984)]
)
def test_the_number_of_parameters_is_that_of_the_formula(channels: int, blocks: int, count: int) -> None:
    c, wide, groups = channels, 4 * channels, 16
    naf = (c + 1) * 2 * c + 10 * 2 * c + 2 * (c + 1) * c + (c + 1) * 2 * c + (c + 1) * c + 2 * 2 * c + 2 * c
    grouped = wide * (9 * wide // groups + 1) + wide * (wide // groups + 1)
    formula = blocks * naf + (c + 1) * wide + 2 * wide + grouped + (wide + 1) * groups + (wide + 1) * c
    with torch.device("meta"):
        module = CFRM(channels, blocks=blocks)
    assert sum(p.numel() for p in module.parameters()) == formula == count


@pytest.mark.parametrize("blocks", [0, 2])
def test_the_gradient_reaches_the_input_and_every_parameter(blocks: int) -> None:
    module, features = learned(CFRM(4, blocks=blocks, groups=4)), normal(2, 4, 5, 6).requires_grad_()
    module(features).square().mean().backward()
    for value in (features, *module.parameters()):
        assert value.grad is not None and bool(value.grad.any()) and value.grad.isfinite().all()


def test_the_gradient_is_that_of_finite_differences() -> None:
    module = learned(CFRM(2, blocks=1, groups=2, expansion=2)).double()
    names, values = zip(*module.named_parameters(), strict=True)

    def run(features: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (features,))

    features = normal(2, 2, 3, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (features, *values), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_give_nearly_the_same(dtype: torch.dtype) -> None:
    module, features = learned(CFRM(8, groups=8)), normal(2, 8, 9, 7)
    expected = module(features).detach()
    scale = float(expected.abs().max())
    with torch.autocast("cpu", dtype):
        found = module(features)
    torch.testing.assert_close(found.float() / scale, expected / scale, rtol=0.05, atol=0.05)
    found = module.to(dtype)(features.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float() / scale, expected / scale, rtol=0.05, atol=0.05)
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.0, 1.0, -30.0])
def test_constant_features_have_finite_gradients(value: float, dtype: torch.dtype) -> None:
    module = CFRM(8, blocks=1, groups=8).to(dtype)
    nn.init.constant_(module.merge.weight, 0.1)
    features = torch.full((2, 8, 5, 5), value, dtype=dtype, requires_grad=True)
    restored = module(features)
    restored.float().square().mean().backward()
    assert restored.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (features, *module.parameters()))


class WithoutSpandrel:
    """A finder that goes first."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "spandrel":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_without_spandrel_there_are_no_nafblocks_and_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "spandrel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [WithoutSpandrel(), *sys.meta_path])
    features = normal(1, 4, 3, 3)
    for blocks in (0, nn.Conv2d(4, 4, 1)):
        assert learned(CFRM(4, blocks=blocks))(features).shape == features.shape
    message = r"A NAFBlock needs `spandrel`, which is not installed: pip install spandrel"
    with pytest.raises(ImportError, match=message):
        CFRM(4, blocks=1)


def test_a_network_of_ones_own_comes_in_the_place_of_nafblocks() -> None:
    own = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    module, features = CFRM(4, blocks=own), normal(2, 4, 5, 5)
    assert module.blocks is own and torch.equal(module(features), own(features))
    torch.testing.assert_close(learned(module)(features).double(), written_out(module, features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_nafblocks_are_as_many_as_asked_for(count: int) -> None:
    blocks = naf_blocks(4, count)
    assert [type(block).__name__ for block in blocks] == ["NAFBlock"] * count
    assert len(CFRM(4).blocks) == 1 and len(CFRM(4, blocks=count).blocks) == count
    assert len({id(p) for p in blocks.parameters()}) == count * len(list(naf_blocks(4, 1).parameters()))


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def reloaded(module: CFRM) -> CFRM:
    other = CFRM(4, blocks=2)
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, reloaded])
def test_a_copy_computes_the_same_and_is_on_its_own(duplicate: Callable[[Any], Any]) -> None:
    module, features = learned(CFRM(4, blocks=2)), normal(2, 4, 5, 5)
    again, expected = duplicate(module), module(features)
    assert torch.equal(again(features), expected)
    nn.init.zeros_(again.merge.weight)
    assert torch.equal(module(features), expected) and not torch.equal(again(features), expected)


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_compiled_module_computes_the_same(blocks: int) -> None:
    module, features = learned(CFRM(4, blocks=blocks)), normal(2, 4, 5, 6)
    # spandrel's NAFBlock breaks the graph where gradients are wanted
    compiled = torch.compile(module, backend="aot_eager", fullgraph=blocks == 0)
    torch.testing.assert_close(compiled(features), module(features), rtol=1e-4, atol=1e-4)
    compiled(features).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 6}, r"multiple of `groups` \(16\), found 4 x 6"),
        ({"channels": 4, "groups": 3, "expansion": 5}, r"multiple of `groups` \(3\), found 5 x 4"),
        ({"channels": 0}, "`channels` should be a whole number of at least 1, found 0"),
        ({"channels": 4, "groups": 0}, "`groups` should be a whole number of at least 1, found 0"),
        ({"channels": 4, "groups": -4}, "`groups` should be a whole number of at least 1, found -4"),
        ({"channels": 4, "expansion": 0}, "`expansion` should be a whole number of at least 1, found 0"),
        ({"channels": 4, "blocks": -1}, "`blocks` should be a whole number of at least 0, found -1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CFRM(options.pop("channels"), **options)
