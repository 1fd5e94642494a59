"""Objectives out of an options file are the objectives that Python code builds."""

import copy
from dataclasses import fields
from inspect import signature

import pytest
import torch
from torch import nn

import restoreloss
from restoreloss import audit
from restoreloss.integrations import options
from restoreloss.integrations.options import criterion
from tests.contract.objectives import images, pointwise


def test_diffloss_with_all_of_its_options(prior):
    network, folder = prior
    given = {"noise_weight": 0.5, "h_space_weight": 0.2, "distance": "l1", "snr_power": 0.5}
    options = {"prior": folder, "loss_weight": 0.1, "timesteps": [100, 600], "input_range": [-1, 1], "every": 2}
    found = criterion({"type": "DiffLoss", **options, **given})
    whole = restoreloss.DiffLoss(network, timesteps=(100, 600), input_range=(-1, 1), **given)
    wanted = restoreloss.Subsampled(whole, every=2)
    restored, target = (2 * image - 1 for image in images())
    for _ in range(3):
        torch.manual_seed(5)
        expected = 0.1 * wanted(restored, target)
        torch.manual_seed(5)
        torch.testing.assert_close(found(restored, target), expected)


class Recorder(nn.Module):
    """Stands for a loss, and remembers how it was made."""

    def __init__(self, *arguments, **given):
        super().__init__()
        Recorder.found = arguments, given


OTHER = {  # than the defaults
    "noise_weight": 0.5, "h_space_weight": 0.2, "timesteps": (100, 600), "distance": "rms", "size": "resize",
    "compare": "native", "snr_power": 0.5, "crop": 16, "jacobian": True, "checkpointing": True,
    "input_range": (-1.0, 1.0),
}  # fmt: skip


def test_every_option_of_diffloss_reaches_it(monkeypatch):
    monkeypatch.setattr(restoreloss, "DiffLoss", Recorder)
    loads, network = [], nn.Conv2d(3, 3, 1)
    monkeypatch.setattr(options, "load_prior", lambda *given, **named: loads.append((given, named)) or network)
    prior = {"revision": "main", "local_files_only": True, "head_channels": 32, "grouped_heads": False}
    less = {"subset": 0.5, "every": 3}
    found = criterion({"type": "DiffLoss", "prior": "some/where", "dtype": "torch.bfloat16", **prior, **OTHER, **less})
    assert loads == [(("some/where",), prior)]
    assert Recorder.found == ((network,), OTHER)
    assert network.weight.dtype == torch.bfloat16
    assert (found.objective.subset, found.objective.every) == (0.5, 3)
    known = {option.name for option in fields(options.DiffLoss)}
    assert known == {*OTHER, *prior, *less, "prior", "dtype", "loss_weight"}


def test_every_option_of_tdp_loss_reaches_it(monkeypatch):
    monkeypatch.setattr(restoreloss, "TDPLoss", Recorder)
    network, calls = nn.Conv2d(3, 3, 1), []
    monkeypatch.setattr(options, "task_network", lambda *given, **named: calls.append((given, named)) or network)
    named = {"weights": "file.pth", "num_classes": 7, "image_size": 64}
    seen = {"distance": "mse", "layer_weights": {"0": 2.0}, "input_range": (-1, 1), "normalize": ((0.5,), (0.5,))}
    criterion({"type": "TDPLoss", "task": "timm/some", "layers": ["0"], **named, **seen})
    assert calls == [(("timm/some",), named)]
    assert Recorder.found == ((network, ["0"]), seen)
    known = {option.name for option in fields(options.TDPLoss)}
    assert known == {*named, *seen, "task", "layers", "loss_weight"}


@pytest.mark.parametrize("name", options.TYPES)
def test_defaults_are_those_of_the_losses(name):
    theirs = signature(getattr(restoreloss, name)).parameters
    for option in fields(options.TYPES[name]):
        if option.name in theirs and option.name not in ("task", "normalize", "objectives"):  # ours are names
            assert option.default == theirs[option.name].default, option.name


def test_a_generator_is_handed_on_also_through_a_sum_and_a_compiled_loss(prior):
    parts = {"pixel": {"type": "L1Loss"}, "diff": {"type": "DiffLoss", "prior": prior[1]}}
    compiled = torch.compile(restoreloss.DiffLoss(pointwise), backend="aot_eager")
    restored, target = (image.detach() for image in images())
    for loss in (
        criterion(parts["diff"]),
        criterion({"type": "WeightedSum", "objectives": parts}),
        restoreloss.WeightedSum({"diff": criterion(parts["diff"])}),
        restoreloss.WeightedSum({"diff": compiled}),
    ):
        one, two = (
            loss(restored, target, generator=[torch.Generator().manual_seed(n) for n in range(len(restored))])
            for _ in range(2)
        )
        assert one == two


def test_what_weighs_nothing_is_not_computed(monkeypatch):
    loss = criterion(
        {"type": "WeightedSum", "objectives": {"l1": {"type": "L1Loss"}, "l2": {"type": "MSELoss", "loss_weight": 0}}}
    )
    assert list(loss.terms(*images())) == ["l1/loss"]


def test_a_transformer_of_another_size_says_so():
    loss = criterion({"type": "TDPLoss", "task": "timm/vit_tiny_patch16_224", "weights": "random", "image_size": 32})
    with pytest.raises(ValueError, match=r"`task` should read images of 48x64, found that timm/vit.*`image_size`"):
        loss(torch.rand(1, 3, 48, 64), torch.rand(1, 3, 48, 64))


def test_every_option_of_the_losses_can_be_written():
    elsewhere = {
        "DiffLoss": {"denoiser", "schedule", "conditioning", "encoder", "reduction"},  # the prior by name has them
        "TDPLoss": {"reduction"},  # a framework wants a scalar
        "WeightedSum": {"weights"},  # each objective has a loss_weight
    }
    for name, absent in elsewhere.items():
        known = set(signature(getattr(restoreloss, name)).parameters)
        assert known - absent <= {option.name for option in fields(options.TYPES[name])}


def test_tdp_loss_with_its_network_by_name():
    options_ = {
        "type": "TDPLoss",
        "task": "timm/resnet18",
        "weights": "random",
        "layers": ["layer2"],
        "loss_weight": 2.0,
    }
    found = criterion(options_)
    wanted = restoreloss.TDPLoss(found.network.network, ["layer2"])
    restored, target = (torch.rand(1, 3, 32, 32) for _ in range(2))
    torch.testing.assert_close(found(restored, target), 2 * wanted(restored, target))


def test_networks_are_hidden_and_follow_the_criterion(prior):
    found = criterion(
        {
            "type": "WeightedSum",
            "objectives": {
                "pixel": {"type": "L1Loss"},
                "diff": {"type": "DiffLoss", "prior": prior[1], "loss_weight": 0.1},
                "task": {"type": "TDPLoss", "task": "torchvision/resnet18", "weights": "random"},
            },
        }
    )
    assert list(found.parameters()) == []
    assert found.state_dict() == {}
    restored, target = images(torch.float64, (2, 3, 32, 32))
    found.double()
    terms = found.terms(restored, target)
    assert list(terms) == ["pixel/loss", "diff/noise", "diff/h_space", "task/layer4"]
    assert all(value.dtype == torch.float64 for value in terms.values())
    copy.deepcopy(found)(restored, target).backward()
    assert restored.grad.abs().sum() > 0
    assert all(term.gradient_norm > 0 for term in audit(found, restored, target).terms)


@pytest.mark.parametrize(("kind", "loss"), [("L1Loss", nn.L1Loss()), ("MSELoss", nn.MSELoss())])
def test_pixel_losses_of_torch(kind, loss):
    restored, target = images()
    torch.testing.assert_close(
        criterion({"type": kind, "loss_weight": 3})(restored, target), 3 * loss(restored, target)
    )


TDP = {"type": "TDPLoss", "task": "torchvision/resnet18", "weights": "random"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prior": "small"}, r"should be a mapping with a `type`, found \{'prior'"),
        ({"type": "DifLoss"}, r"`type` should be one of \['DiffLoss', .*found 'DifLoss'"),
        ({"type": "DiffLoss", "timestep": [1, 2]}, r"has no option 'timestep'; did you mean 'timesteps'\?"),
        ({"type": "L1Loss", "kind": "CrossEntropyLoss"}, r"`L1Loss` has no option 'kind'"),
        ({"type": "DiffLoss", "loss_weight": "1e-3"}, r"`loss_weight` should be a number, found the text '1e-3'"),
        ({"type": "DiffLoss", "crop": "5e-1"}, r"`crop` should be a number, found the text '5e-1'"),
        ({"type": "DiffLoss", "timesteps": ["1e2", 600]}, r"`timesteps` should be a number, found the text '1e2'"),
        ({"type": "DiffLoss", "loss_weight": None}, r"`loss_weight` should be a finite number, found None"),
        ({"type": "L1Loss", "loss_weight": float("nan")}, r"`loss_weight` should be a finite number, found nan"),
        ({"type": "L1Loss", "reduction": "none"}, r"`reduction` should be 'mean' or 'sum', found 'none'"),
        (
            {"type": "DiffLoss", "dtype": "bf16"},
            "`dtype` should be a floating-point dtype of torch, as .*, found .bf16.",
        ),
        ({"type": "DiffLoss", "timesteps": [100]}, r"`timesteps` should be \(low, high\), found \[100\]"),
        ({"type": "TDPLoss", "task": "timm/resnet18"}, r"`TDPLoss` should be given \['weights'\]"),
        (
            {"type": "WeightedSum", "objectives": []},
            r"`objectives` should be a mapping of names to options, found \[\]",
        ),
        ({"type": "WeightedSum", "objectives": {"a": {"type": "L2"}}}, r"`type` should be one of"),
        ({"type": ["DiffLoss"]}, r"`type` should be the name of one of .* found \['DiffLoss'\]"),
        ({"type": "L1Loss", 3: 4}, "`L1Loss` has no option 3; there is loss_weight, reduction"),
        ({"type": "L1Loss", "loss_weight": True}, "`loss_weight` should be a finite number, found True"),
        ({"type": "DiffLoss", "noise_weight": None}, "`noise_weight` should be a finite number, found None"),
        ({"type": "DiffLoss", "noise_weight": "abc"}, "`noise_weight` should be a finite number, found 'abc'"),
        ({"type": "DiffLoss", "snr_power": True}, "`snr_power` should be a finite number, found True"),
        ({"type": "DiffLoss", "crop": "half"}, "`crop` should be a finite number, found 'half'"),
        ({"type": "DiffLoss", "every": 1.5}, "`every` should be a whole number, found 1.5"),
        ({"type": "DiffLoss", "every": "2"}, "`every` should be a number, found the text '2'"),
        ({"type": "DiffLoss", "head_channels": 0}, "`head_channels` should be a whole number of at least 1, found 0"),
        ({"type": "DiffLoss", "checkpointing": "false"}, "`checkpointing` should be true or false, found 'false'"),
        ({"type": "DiffLoss", "prior": None}, "`prior` should be text, found None"),
        ({"type": "DiffLoss", "prior": ["small"]}, r"`prior` should be text, found \['small'\]"),
        ({"type": "DiffLoss", "revision": 3}, "`revision` should be text, found 3"),
        ({"type": "DiffLoss", "revision": "main"}, "`revision` should be left out for the prior 'small', found 'main'"),
        ({"type": "DiffLoss", "head_channels": 8}, "`head_channels` should be left out for the prior 'small', found 8"),
        ({"type": "DiffLoss", "dtype": 16}, "`dtype` should be text, found 16"),
        ({"type": "DiffLoss", "timesteps": 600}, "`timesteps` should be a list, found 600"),
        ({"type": "DiffLoss", "timesteps": [None, 600]}, "`timesteps` should be a whole number, found None"),
        ({"type": "DiffLoss", "input_range": None}, "`input_range` should be a list, found None"),
        ({**TDP, "task": None}, "`task` should be text, found None"),
        ({**TDP, "task": "resnet18"}, "`task` should be 'library/name' .* found 'resnet18'"),
        ({**TDP, "task": "torchvision/resnet19"}, "`task` should be one of .* found 'resnet19'"),
        ({**TDP, "weights": None}, "`weights` should be text, found None"),
        ({**TDP, "num_classes": 0}, "`num_classes` should be a whole number of at least 1, found 0"),
        ({**TDP, "num_classes": True}, "`num_classes` should be a whole number, found True"),
        ({**TDP, "layers": 3}, "`layers` should be a list, found 3"),
        ({**TDP, "layers": [4]}, "`layers` should be text, found 4"),
        ({**TDP, "layer_weights": ["layer4"]}, "`layer_weights` should be a mapping, found list"),
        ({**TDP, "layer_weights": {"layer4": None}}, "`layer_weights` should be a finite number, found None"),
        ({**TDP, "normalize": [0.5, 0.5]}, "`normalize` should be a list, found 0.5"),
        (
            {"type": "WeightedSum", "objectives": {"a": {"type": "L1Loss", "loss_weight": 0}}},
            "`objectives` should leave at least one a `loss_weight` other than 0",
        ),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        criterion(given)


def test_a_prior_that_is_not_there_is_named_as_it_was_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="`prior` should be a folder, a file"):
        criterion({"type": "DiffLoss", "prior": str(tmp_path / "nowhere" / "prior")})
