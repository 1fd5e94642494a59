"""Objectives out of an options file are the objectives that Python code builds."""

import copy
from functools import wraps
from inspect import signature
from types import ModuleType

import pytest
import torch
from torch import nn

import restoreloss
from restoreloss import audit
from restoreloss.integrations import options
from restoreloss.integrations.options import OPTIONS, criterion, registrable
from restoreloss.integrations.task_networks import task_network
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

    reduction = "mean"

    def __init__(self, *arguments, **given):
        super().__init__()
        Recorder.found = arguments, given

    def forward(self, restored, target):
        return (restored - target).mean()


OTHER = {  # than the defaults
    "noise_weight": 0.5, "h_space_weight": 0.2, "timesteps": (100, 600), "distance": "rms", "size": "resize",
    "compare": "native", "snr_power": 0.5, "crop": 16, "jacobian": True, "checkpointing": True,
    "input_range": (-1.0, 1.0), "reduction": "sum",
}  # fmt: skip


def test_every_option_of_diffloss_reaches_it(monkeypatch, tmp_path):
    monkeypatch.setattr(restoreloss, "DiffLoss", Recorder)
    loads, network = [], nn.Conv2d(3, 3, 1)
    reader = wraps(restoreloss.load_prior)(lambda *given, **named: loads.append((given, named)) or network)
    monkeypatch.setattr(options, "load_prior", reader)
    prior = {"revision": "main", "local_files_only": True, "head_channels": 32, "grouped_heads": False}
    prior |= {"prediction_type": "v_prediction"}
    less = {"subset": 0.5, "every": 3}
    prompt = {"encoder_hidden_states": torch.rand(1, 2, 3)}
    torch.save(prompt, tmp_path / "prompt.pt")
    named = {"prior": "some/where", "dtype": "torch.bfloat16", "conditioning": str(tmp_path / "prompt.pt")}
    found = criterion({"type": "DiffLoss", **named, **prior, **OTHER, **less})
    ((arguments, read),) = loads
    assert arguments == ("some/where",)
    torch.testing.assert_close(read.pop("conditioning"), prompt)
    assert read == prior
    assert Recorder.found == ((network,), OTHER)
    assert network.weight.dtype == torch.bfloat16
    assert (found.objective.subset, found.objective.every) == (0.5, 3)
    assert set(OPTIONS["DiffLoss"]) == {*OTHER, *prior, *less, *named, "loss_weight"}


def test_every_option_of_the_losses_on_features_reaches_them(monkeypatch):
    calls, network = [], nn.Conv2d(3, 3, 1)
    monkeypatch.setattr(options, "task_network", wraps(task_network)(lambda *a, **k: calls.append((a, k)) or network))
    named = {"weights": "file.pth", "num_classes": 7, "image_size": 64}
    seen = {"distance": "mse", "layer_weights": {"0": 2.0}, "input_range": (-1, 1), "normalize": ((0.5,), (0.5,))}
    seen |= {"layers": ["0"], "reduction": "sum"}
    for kind, networks in (("TDPLoss", 1), ("HLFLoss", 2)):
        monkeypatch.setattr(restoreloss, kind, Recorder)
        reference = {"reference": "clean.pth"} if networks == 2 else {}
        found = criterion({"type": kind, "task": "timm/some", **named, **seen, **reference, "every": 2})
        wanted = [(("timm/some",), named), (("timm/some",), named | {"weights": "clean.pth"})][:networks]
        assert calls == wanted
        assert Recorder.found == ((network,) * networks, seen)
        assert found.objective.every == 2
        known = {*named, *seen, *reference, "task", "loss_weight", "every", "subset"}
        assert set(OPTIONS[kind]) == known
        calls.clear()


def test_options_are_the_arguments_of_the_classes_with_their_defaults():
    elsewhere = {"DiffLoss": {"denoiser", "schedule", "encoder", "conditioning"}, "TDPLoss": {"task"}}
    elsewhere |= {"HLFLoss": {"task"}, "WeightedSum": set()}
    assert set(elsewhere) == set(OPTIONS)
    for kind, names in elsewhere.items():
        theirs = signature(getattr(restoreloss, kind)).parameters
        for name, parameter in theirs.items():
            if name not in names:
                assert OPTIONS[kind][name].default == parameter.default, name
        assert signature(registrable(kind)).parameters == OPTIONS[kind]


def test_hlf_looks_through_two_networks_at_rest(tmp_path):
    torch.manual_seed(0)
    weights = {}
    for name in ("now", "clean"):
        network = task_network("timm/test_resnet", weights="random", num_classes=2)
        torch.save(network.state_dict(), tmp_path / f"{name}.pth")
        weights[name] = network
    given = {"task": "timm/test_resnet", "weights": str(tmp_path / "now.pth"), "num_classes": 2}
    loss = criterion({"type": "HLFLoss", **given, "reference": str(tmp_path / "clean.pth"), "loss_weight": 0.5})
    wanted = restoreloss.HLFLoss(weights["now"].requires_grad_(False), weights["clean"].requires_grad_(False))
    restored, target = (torch.rand(1, 3, 32, 32) for _ in range(2))
    torch.testing.assert_close(loss(restored, target), 0.5 * wanted(restored, target))
    assert list(loss.parameters()) == []
    with pytest.raises(FileNotFoundError, match="`reference` should be"):
        criterion({"type": "HLFLoss", **given, "reference": str(tmp_path / "none.pth")})


class Charbonnier(nn.Module):
    """As frameworks have it."""

    def __init__(self, loss_weight=1.0, reduction="mean", eps=1e-3):
        super().__init__()
        self.loss_weight, self.eps = loss_weight, eps

    def forward(self, pred, target, weight=None, **kwargs):
        return self.loss_weight * ((pred - target).square() + self.eps).sqrt().mean()


class Variation(nn.Module):
    def forward(self, image):
        return image.diff(dim=2).abs().mean()


class Two(Charbonnier):
    def forward(self, pred, target):
        return super().forward(pred, target), None


def in_a_module():
    module = ModuleType("basicsr.models.losses")
    module.CharbonnierLoss = Charbonnier
    return module


@pytest.mark.parametrize("own", [{"CharbonnierLoss": Charbonnier}, in_a_module()], ids=["registry", "module"])
def test_a_sum_may_name_what_the_framework_has_and_what_can_be_imported(own):
    parts = {
        "own": {"type": "CharbonnierLoss", "eps": 0.25, "loss_weight": 0.5, "reduction": "mean"},
        "torch": {"type": "torch.nn.HuberLoss", "delta": 0.5},
        "alone": {"type": f"{__name__}.Variation", "loss_weight": 0.1},
        "two": {"type": f"{__name__}.Two", "loss_weight": 3},
    }
    loss = criterion({"type": "WeightedSum", "objectives": parts}, own=own)
    restored, target = images()
    terms = loss.terms(restored, target)
    torch.testing.assert_close(terms["own/loss"], 0.5 * Charbonnier(eps=0.25)(restored, target))
    torch.testing.assert_close(terms["torch/loss"], nn.HuberLoss(delta=0.5)(restored, target))
    torch.testing.assert_close(terms["alone/loss"], 0.1 * Variation()(restored))
    torch.testing.assert_close(terms["two/0"], 3 * Charbonnier()(restored, target))
    assert list(terms) == ["own/loss", "torch/loss", "alone/loss", "two/0"]
    with pytest.raises(ValueError, match=r"found 'CharbonierLoss'; did you mean 'CharbonnierLoss'\?"):
        criterion({"type": "CharbonierLoss"}, own=own)


def test_weights_of_a_sum_may_be_written_as_in_python():
    parts = {"a": {"type": "L1Loss"}, "b": {"type": "MSELoss"}}
    found = criterion({"type": "WeightedSum", "objectives": parts, "weights": {"b": 0.5}, "reduction": "mean"})
    restored, target = images()
    torch.testing.assert_close(
        found(restored, target), nn.L1Loss()(restored, target) + 0.5 * nn.MSELoss()(restored, target)
    )


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
    with pytest.raises(ValueError, match=r"size that VisionTransformer reads, found \(48, 64\).*`image_size`"):
        loss(torch.rand(1, 3, 48, 64), torch.rand(1, 3, 48, 64))


def test_tdp_loss_with_its_network_by_name():
    options_ = {
        "type": "TDPLoss",
        "task": "timm/resnet18",
        "weights": "random",
        "layers": ["layer2"],
        "loss_weight": 2.0,
    }
    found = criterion(options_)
    wanted = restoreloss.TDPLoss(found.objective.task.network, ["layer2"])
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
        ({"type": "DifLoss"}, r"`type` should be one of \['DiffLoss', .*found 'DifLoss'; did you mean 'DiffLoss'\?"),
        ({"type": "torch.nn.L3Loss"}, r"`type` should be something to import, found 'torch.nn.L3Loss': .*L3Loss"),
        ({"type": "nowhere.Loss"}, r"`type` should be something to import, found 'nowhere.Loss': .*nowhere"),
        ({"type": "DiffLoss", "reduction": "none"}, r"`reduction` should be 'mean' or 'sum', .*found 'none'"),
        ({"type": "WeightedSum", "objectives": {"a": {"type": "L1Loss"}}, "reduction": "none"}, "`reduction` should"),
        ({"type": "DiffLoss", "timestep": [1, 2]}, r"has no option 'timestep'; did you mean 'timesteps'\?"),
        ({"type": "L1Loss", "kind": "CrossEntropyLoss"}, r"`L1Loss` has no option 'kind'"),
        ({"type": "DiffLoss", "loss_weight": "1e-3"}, r"`loss_weight` should be a number, found the text '1e-3'"),
        ({"type": "DiffLoss", "crop": "5e-1"}, r"`crop` should be a number, found the text '5e-1'"),
        ({"type": "DiffLoss", "timesteps": ["1e2", 600]}, r"`timesteps` should be a number, found the text '1e2'"),
        ({"type": "DiffLoss", "loss_weight": None}, r"`loss_weight` should be a finite number, found None"),
        ({"type": "L1Loss", "loss_weight": float("nan")}, r"`loss_weight` should be a finite number, found nan"),
        ({"type": "L1Loss", "reduction": "none"}, r"`reduction` should be 'mean' or 'sum', .*found 'none'"),
        (
            {"type": "DiffLoss", "dtype": "bf16"},
            "`dtype` should be a floating-point dtype of torch, as .*, found .bf16.",
        ),
        ({"type": "DiffLoss", "timesteps": [100]}, r"`timesteps` should be two integers .*found \[100\]"),
        ({"type": "TDPLoss", "task": "timm/resnet18"}, r"`TDPLoss` should be given \['weights'\]"),
        (
            {"type": "WeightedSum", "objectives": []},
            r"`objectives` should be a mapping of names to options, found \[\]",
        ),
        ({"type": "WeightedSum", "objectives": {"a": {"type": "L2"}}}, r"`type` should be one of"),
        ({"type": ["DiffLoss"]}, r"`type` should be the name of one of .* found \['DiffLoss'\]"),
        ({"type": "L1Loss", 3: 4}, "`L1Loss` has no option 3; there is .*reduction"),
        ({"type": "L1Loss", "loss_weight": True}, "`loss_weight` should be a finite number, found True"),
        (
            {"type": "DiffLoss", "noise_weight": None},
            "`noise_weight` should be a finite number of at least 0, found None",
        ),
        (
            {"type": "DiffLoss", "noise_weight": "abc"},
            "`noise_weight` should be a finite number of at least 0, found 'abc'",
        ),
        ({"type": "DiffLoss", "snr_power": True}, "`snr_power` should be a finite number, found True"),
        ({"type": "DiffLoss", "crop": "half"}, "`crop` should be .*found 'half'"),
        ({"type": "DiffLoss", "every": 1.5}, "`every` should be a whole number of at least 1, found 1.5"),
        ({"type": "DiffLoss", "every": "2"}, "`every` should be a number, found the text '2'"),
        ({"type": "DiffLoss", "head_channels": 0}, "`head_channels` should be left out for the prior .small., found 0"),
        ({"type": "DiffLoss", "checkpointing": "false"}, "`checkpointing` should be true or false, found 'false'"),
        ({"type": "DiffLoss", "prior": None}, "`prior` should be text, found None"),
        ({"type": "DiffLoss", "prior": "smal"}, "`prior` should be 'small', a file, .* found 'smal'"),
        ({"type": "DiffLoss", "prior": ["small"]}, r"`prior` should be text, found \['small'\]"),
        ({"type": "DiffLoss", "revision": 3}, "`revision` should be text, found 3"),
        ({"type": "DiffLoss", "revision": "main"}, "`revision` should be left out for the prior 'small', found 'main'"),
        ({"type": "DiffLoss", "head_channels": 8}, "`head_channels` should be left out for the prior 'small', found 8"),
        ({"type": "DiffLoss", "dtype": 16}, "`dtype` should be text, found 16"),
        ({"type": "DiffLoss", "timesteps": 600}, "`timesteps` should be two integers .* found 600"),
        ({"type": "DiffLoss", "timesteps": [None, 600]}, r"`timesteps` should be two integers .* found \[None, 600\]"),
        ({"type": "DiffLoss", "input_range": None}, "`input_range` should be two numbers .* found None"),
        ({**TDP, "task": None}, "`task` should be text, found None"),
        ({**TDP, "task": "resnet18"}, "`task` should be 'library/name' .* found 'resnet18'"),
        ({**TDP, "task": "torchvision/resnet19"}, "`task` should be one of .* found 'resnet19'"),
        ({**TDP, "weights": None}, "`weights` should be .*found None"),
        ({**TDP, "num_classes": 0}, "`num_classes` should be a whole number of at least 1, found 0"),
        ({**TDP, "num_classes": True}, "`num_classes` should be a whole number of at least 1, found True"),
        ({**TDP, "layers": 3}, "`layers` should be a name or a list of names, found 3"),
        ({**TDP, "layers": [4]}, r"`layers` should be a name or a list of names, found \[4\]"),
        ({**TDP, "layer_weights": ["layer4"]}, "`layer_weights` should be a mapping of the layers .* found list"),
        (
            {**TDP, "layer_weights": {"layer4": None}},
            "`layer_weights\\[.layer4.\\]` should be a finite number of at least 0, found None",
        ),
        ({**TDP, "normalize": [0.5, 0.5]}, r"`normalize` should be .* found \[0.5, 0.5\]"),
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


class VariationLoss(nn.Module):
    """As BasicSR has it: what comes second is a weight."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, pred, weight=None):
        assert weight is None
        return getattr(pred.diff(dim=2).abs(), self.reduction)()


def test_a_loss_with_a_weight_in_second_place_is_one_of_the_image_alone():
    own = ModuleType("losses")
    own.VariationLoss = VariationLoss
    restored, clean = images()
    loss = criterion({"type": "VariationLoss", "loss_weight": 2.0}, own=own)
    torch.testing.assert_close(loss(restored, clean), 2 * restored.diff(dim=2).abs().mean())


def test_the_reduction_of_parts_is_that_of_their_sum():
    restored, clean = images()
    parts = {"pixel": {"type": "L1Loss", "reduction": "sum"}}
    half = criterion({"type": "WeightedSum", "subset": 0.5, "objectives": parts})
    assert half.reduction == "sum"
    found = torch.stack([half(restored.requires_grad_(), clean).detach() for _ in range(200)]).mean()
    torch.testing.assert_close(found, (restored.detach() - clean).abs().sum(), rtol=0.1, atol=0)
    assert criterion({"type": "WeightedSum", "reduction": "sum", "objectives": parts}).reduction == "sum"
    with pytest.raises(ValueError, match="`reduction` should be given to each of `objectives`"):
        criterion({"type": "WeightedSum", "reduction": "sum", "objectives": {"pixel": {"type": "L1Loss"}}})
