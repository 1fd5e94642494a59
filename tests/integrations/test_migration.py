"""docs/guides/migration.md: every name on the right exists, and what it calls the same is the same.

The left-hand sides are written out here from what the authors' code computes.
"""

import ast
import copy
import importlib
import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

import restoreloss
from restoreloss import (
    CQMix,
    DenoisingLoss,
    DiffLoss,
    FeatureMatchingLoss,
    HLFLoss,
    NoiseLevels,
    NoiseSchedule,
    ParameterImportance,
    TDPLoss,
    WaveletColorFix,
    denoise,
    partial_diffusion,
    short_steps,
)
from restoreloss.regularizers import layer_decay
from tests.helpers.networks import tiny_unet
from tests.helpers.processes import ROOT

NAMES = vars(restoreloss) | vars(layer_decay) | {"nn": nn}
RECIPES = ("diffloss", "sr4ir", "edtr", "unirestore", "dtp")


def cells(column):
    """The cells of one column of the tables."""
    lines = (ROOT / "docs" / "guides" / "migration.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| theirs")]
    assert len(rows) > 40 and {len(row) for row in rows} == {3}
    return [row[column] for row in rows]


def pieces(column):
    return [piece for cell in cells(column) for piece in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("piece", sorted(set(pieces(1))))
def test_a_name_on_the_right_exists_with_these_arguments(piece):
    if piece.startswith("--"):
        configs = [importlib.import_module(f"examples.{recipe}.config") for recipe in RECIPES]
        options = {name for module in configs for cls in vars(module).values() if inspect.isclass(cls)
                   for name in getattr(cls, "__dataclass_fields__", ())}  # fmt: skip
        assert piece.removeprefix("--").split()[0] in options
        return
    tree = ast.parse(piece, mode="eval")
    assert any(isinstance(node, ast.Name) and node.id in NAMES for node in ast.walk(tree)), "nothing of ours in it"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id[0].isupper():
            assert node.id in NAMES
        if isinstance(node, ast.Call) and (function := resolved(node.func)) is not None:
            inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords})


@pytest.mark.parametrize("piece", sorted({piece for piece in pieces(2) if re.match(r"[A-Z]\w+(\(|\.)", piece)}))
def test_a_name_in_the_remarks_exists(piece):
    tree = ast.parse(piece, mode="eval")
    call = tree.body if isinstance(tree.body, ast.Call) else None
    assert resolved(tree.body if call is None else call.func) is not None
    if call is not None:
        inspect.signature(resolved(call.func)).bind_partial(**{word.arg: None for word in call.keywords})


def resolved(function):
    """What a call's function is, of our names: a name, an attribute of one, or a method of an instance of one."""
    if isinstance(function, ast.Name):
        return NAMES.get(function.id)
    if isinstance(function, ast.Attribute):
        if isinstance(function.value, ast.Call):
            owner = resolved(function.value.func)
            owner = owner if inspect.isclass(owner) else getattr(owner, "__self__", None)
            return None if owner is None else getattr(owner, function.attr).__get__(object())
        owner = resolved(function.value)
        return None if owner is None else getattr(owner, function.attr)
    return None


def images(shape=(2, 3, 16, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    restored, clean = (torch.rand(shape, generator=generator) for _ in range(2))
    return restored.requires_grad_(), clean


def mean_flat(x):
    return x.mean(dim=list(range(1, x.ndim)))


# DiffLoss


class Published:
    """The three terms of their `training_losses`, per sample, with a gradient."""

    def __init__(self):
        betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
        self.abar = torch.from_numpy(np.cumprod(1 - betas))
        self.unet = tiny_unet(out_channels=6).eval()  # learns the variance too
        self.seen = []
        self.unet.mid_block.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def terms(self, output, gt, t, noise):
        a = self.abar[t].float().reshape(-1, 1, 1, 1)
        output_noise, gt_noise = (
            self.unet(a.sqrt() * image + (1 - a).sqrt() * noise, t).sample[:, :3] for image in (output, gt)
        )
        output_h, gt_h = self.seen
        return (
            mean_flat((output - gt) ** 2),
            0.001 * mean_flat((output_noise - gt_noise) ** 2),
            0.000001 * mean_flat((output_h - gt_h) ** 2),
        )


@pytest.fixture
def published():
    return Published()


def test_diffloss_in_their_weights(published):
    output, gt = (2 * image.detach() - 1 for image in images())
    t, noise = torch.tensor([40, 700]), torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.requires_grad_()
    expected = sum(term.mean() for term in published.terms(output, gt, t, noise)[1:])
    (gradient,) = torch.autograd.grad(expected, output)
    loss = 1e-3 * DiffLoss(published.unet, h_space_weight=1e-3, input_range=(-1, 1))(
        output, gt, timestep=t, noise=noise
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, output)[0], gradient, rtol=1e-3, atol=1e-9)


def test_diffloss_of_images_in_0_1_keeps_the_ratio_to_the_pixel_loss_with_a_quarter(published):
    restored, clean = images()
    t, noise = torch.tensor([40, 700]), torch.randn(restored.shape, generator=torch.Generator().manual_seed(1))
    pixel, noise_term, h_term = (x.mean() for x in published.terms(2 * restored - 1, 2 * clean - 1, t, noise))
    loss = 2.5e-4 * DiffLoss(published.unet, h_space_weight=1e-3)(restored, clean, timestep=t, noise=noise)
    torch.testing.assert_close(loss / nn.MSELoss()(restored, clean), (noise_term + h_term) / pixel, rtol=1e-4, atol=0)


def test_diffloss_under_a_sampler_with_weights(published):
    restored, clean = images()
    t, weights = torch.tensor([40, 700]), torch.tensor([0.5, 3.0])
    torch.manual_seed(2)
    loss = DiffLoss(published.unet, h_space_weight=1e-3, timesteps=lambda n, generator: t, reduction="none")
    found = 1e-3 * (weights * loss(restored, clean)).mean()
    torch.manual_seed(2)
    noise = torch.randn(restored.shape)
    published.seen.clear()
    _, noise_term, h_term = published.terms(2 * restored - 1, 2 * clean - 1, t, noise)
    torch.testing.assert_close(found, (weights * (noise_term + h_term)).mean(), rtol=1e-4, atol=0)


def test_the_linear_schedule(published):
    x, noise = images()
    a = published.abar[[3, 999]].float().reshape(-1, 1, 1, 1)
    found = NoiseSchedule.linear().add_noise(x, noise, torch.tensor([3, 999]))
    torch.testing.assert_close(found, a.sqrt() * x + (1 - a).sqrt() * noise)


# SR4IR and EDTR: losses of features

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)


def return_feats(network, image):
    """Layer 4 of a ResNet of normalised images."""
    return nn.Sequential(*list(network.children())[:-2])((image - MEAN) / STD)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return resnet18(num_classes=5), resnet18(num_classes=5)


@pytest.mark.parametrize(("criterion", "distance"), [(F.l1_loss, "l1"), (F.mse_loss, "mse")])
def test_feature_loss(networks, criterion, distance):
    restored, clean = images((2, 3, 40, 40))
    found = TDPLoss(networks[0], ["layer4"], distance=distance)(restored, clean)
    task = networks[0].eval()
    expected = criterion(return_feats(task, restored), return_feats(task, clean))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, restored)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_feature_loss_of_a_layer_with_several_tensors():
    class Pyramid(nn.Module):
        def forward(self, image):
            return {"0": image + 0, "1": F.avg_pool2d(image, 2), "pool": F.avg_pool2d(image, 4)}

    task = nn.Sequential()
    task.add_module("backbone", Pyramid())
    restored, clean = images()
    theirs = sum(0.7 * F.l1_loss(one, other) for one, other in zip(
        Pyramid()(restored).values(), Pyramid()(clean).values(), strict=True))  # fmt: skip
    ours = TDPLoss(task, ["backbone"], layer_weights={"backbone": 3 * 0.7}, normalize=None)(restored, clean)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("grid", "factor", "size"), [(4, 56, 224), (8, 60, 480)])
def test_cqmix(grid, factor, size):
    sr, hr = (image.detach() for image in images((2, 3, size, size)))
    mixed, mask = CQMix(grid=(grid, grid))(sr, hr, return_mask=True)
    coins = mask[..., factor // 2 :: factor, factor // 2 :: factor].float()
    assert coins.shape == (2, 1, grid, grid) and 0 < coins.mean() < 1
    theirs = F.interpolate(coins, scale_factor=factor, mode="nearest")
    assert torch.equal(sr * theirs + hr * (1 - theirs), mixed)


def test_weights_of_the_task_losses():
    torch.manual_seed(0)
    logits, label = [torch.randn(4, 5) for _ in range(3)], torch.tensor([0, 1, 2, 3])
    theirs = sum(0.34 * F.cross_entropy(each, label) for each in logits)
    torch.testing.assert_close(1.02 * F.cross_entropy(torch.cat(logits), label.repeat(3)), theirs)


def test_hlf_and_feature_matching(networks):
    task, teacher = networks
    restored, clean = images((2, 3, 40, 40))
    hlf = HLFLoss(task, teacher, ["layer4"])(restored, clean)
    task.eval(), teacher.eval()
    loss_hlf = 0.5 * (
        F.l1_loss(return_feats(teacher, restored), return_feats(teacher, clean))
        + F.l1_loss(return_feats(task, restored), return_feats(task, clean))
    )
    torch.testing.assert_close(hlf, loss_hlf)
    matching = FeatureMatchingLoss(task, teacher, ["layer4"])(restored, clean)
    torch.testing.assert_close(matching, F.l1_loss(return_feats(task, restored), return_feats(teacher, clean)))


# EDTR: the short diffusion


def stable_diffusion():
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2)


def test_the_schedule_they_call_linear():
    found = NoiseSchedule.scaled_linear().alphas_cumprod
    torch.testing.assert_close(found, torch.from_numpy(stable_diffusion()).float())


def test_used_timesteps():
    for n in range(1, 60):
        assert short_steps(200, n)[::-1] == [math.floor(200 / n * i) for i in range(1, n + 1)]
    assert math.floor(1000 / 19 * 19) == 999 and short_steps(1000, 19)[0] == 1000


def predicts(x_t, t):
    """Stands for the network."""
    return 0.3 * x_t + (t / 1000).reshape(-1, 1, 1, 1)


def test_one_step():
    (z, noise), t = images((2, 4, 8, 8)), torch.tensor([50, 200])
    a = torch.from_numpy(stable_diffusion())[t].float().reshape(-1, 1, 1, 1)
    z_t = a.sqrt() * z + (1 - a).sqrt() * noise
    x_pred = (1 / a).sqrt() * z_t - (1 / a - 1).sqrt() * predicts(z_t, t)
    found = partial_diffusion(predicts, z, t, NoiseSchedule.scaled_linear(), noise=noise)
    torch.testing.assert_close(found, x_pred)


def test_four_steps_of_the_spaced_sampler():
    used = [50, 100, 150, 200]
    abar = stable_diffusion()[used]
    previous = np.append(1.0, abar[:-1])
    betas = 1 - abar / previous
    variance = betas * (1 - previous) / (1 - abar)
    start = betas * np.sqrt(previous) / (1 - abar)
    stay = (1 - previous) * np.sqrt(1 - betas) / (1 - abar)

    z_t = images((2, 4, 8, 8))[1]
    torch.manual_seed(4)
    x = z_t.double()
    for index in (3, 2, 1, 0):
        eps = predicts(x, torch.full((2,), used[index]))
        x0 = math.sqrt(1 / abar[index]) * x - math.sqrt(1 / abar[index] - 1) * eps
        x = start[index] * x0 + stay[index] * x
        if index > 0:
            x = x + math.sqrt(variance[index]) * torch.randn(z_t.shape)
    torch.manual_seed(4)
    found = denoise(predicts, z_t, short_steps(200, 4), NoiseSchedule.scaled_linear())
    torch.testing.assert_close(found, x.float(), rtol=1e-4, atol=1e-5)


def test_wavelet_reconstruction():
    def decomposition(image):
        kernel = torch.tensor([[0.0625, 0.125, 0.0625], [0.125, 0.25, 0.125], [0.0625, 0.125, 0.0625]])
        kernel, high = kernel.expand(3, 1, 3, 3), torch.zeros_like(image)
        for radius in (1, 2, 4, 8, 16):
            low = F.conv2d(F.pad(image, (radius,) * 4, mode="replicate"), kernel, groups=3, dilation=radius)
            high, image = high + image - low, low
        return high, low

    content, style = images((2, 3, 40, 33))
    torch.testing.assert_close(WaveletColorFix()(content, style), decomposition(content)[0] + decomposition(style)[1])


# DTP


def test_noise_levels():
    steps, scale = 50, 1000 / 51
    thetas = np.linspace(1e-4 * scale, 0.02 * scale, steps + 1)
    total = np.cumsum(thetas) - thetas[0]
    dt = -math.log(0.005) / total[-1]
    sigmas = 10 / 255 * np.sqrt(1 - np.exp(-2 * total * dt))
    torch.testing.assert_close(NoiseLevels.ir_sde().sigma, torch.from_numpy(sigmas).float())


def test_generative_loss():
    levels = NoiseLevels.ir_sde()
    x, noise = images()
    t = torch.tensor([4, 47])
    sigma = levels.sigma[t].reshape(-1, 1, 1, 1)

    def residual(image, t):
        return 0.1 * image

    x_t = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = DenoisingLoss(residual, levels)(x.detach(), timestep=t, noise=(x_t - x).detach() / sigma)
    torch.testing.assert_close(found, (x_t - residual(x_t, t) - x).abs().mean(), rtol=1e-4, atol=1e-6)


def test_penalty_on_moving_parameters():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    batch = torch.randn(4, 3)
    omega = [torch.zeros_like(p) for p in model.parameters()]
    for sample in batch:
        gradients = torch.autograd.grad((model(sample) ** 2).mean(), list(model.parameters()))
        omega = [o + g.abs() / len(batch) for o, g in zip(omega, gradients, strict=True)]
    anchors = copy.deepcopy([p.detach() for p in model.parameters()])
    count = sum(p.numel() for p in model.parameters())
    measured = {}
    for normalize, strength in (("sum", 0.2), ("mean", 0.2 * count)):
        measured[normalize] = ParameterImportance(model, strength=strength, normalize=normalize)
        measured[normalize].accumulate(lambda network, x: (network(x) ** 2).mean(), [batch])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    d = [p - anchor for p, anchor in zip(model.parameters(), anchors, strict=True)]
    theirs = 0.2 * sum((o * x.abs() + 0.5 * o**2 * x**2).sum() for o, x in zip(omega, d, strict=True))
    for normalize, importance in measured.items():
        torch.testing.assert_close(importance(), theirs, msg=normalize)


def test_layer_decay():
    found = layer_decay.layer_weights(["a", "b", "c", "d"], 20)
    assert list(found.values()) == pytest.approx([math.exp(-0.05 * 20 * layer / 3) for layer in range(4)])


def test_names_of_corruptions():
    theirs = (
        "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog "
        "brightness contrast elastic_transform pixelate jpeg_compression speckle_noise gaussian_blur spatter saturate"
    )
    assert list(restoreloss.CORRUPTIONS) == theirs.split()
